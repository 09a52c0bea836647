"""Columns that workers load: files of pictures by their paths, and the results of a user's function.

The worker loads a few rows at a time and sends the loaded values instead of the column; the result has the
original column. A row that cannot be loaded counts as one that the server refuses. The server is asked for
the reasons of all rows, and ``on_error`` is applied here.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from flightsvc.errors import InvalidArgumentError
from flightsvc.mapping import Input, TensorSpec
from flightsvc.server.stream import Answer
from flightsvc.spark.files import VALUE_BYTES, one_line, read

if TYPE_CHECKING:
    import numpy as np

    from flightsvc.request import Request
    from flightsvc.server.connection import Connection

SLICE_ROWS = 64
"""The most rows that are sent together, with at most SLICE_BYTES of loaded values."""
SLICE_BYTES = 8 << 20
PICTURES = "string (paths or URIs), binary (files) or Spark's image struct"
"""The types of columns of pictures, for messages."""
DEPTHS = {"uint8": 0, "float32": 5}
"""OpenCV's depth by dtype; the mode of a picture is depth + 8 * (channels - 1)."""

_ERROR = "_flightsvc_error"  # the error column on the wire if the caller wants none
IMAGE_FIELDS = {**dict.fromkeys(("height", "width", "nChannels", "mode"), pa.int32()), "data": pa.binary()}
"""The fields of Spark's image struct without ``origin``, with Arrow's types."""
_STRUCT = pa.struct(list(IMAGE_FIELDS.items()))


def answers(
    request: Request,
    connection: Connection,
    schema: pa.Schema,
    positions: Mapping[str, int],
    batches: Iterable[pa.RecordBatch],
    place: str = "",
) -> Generator[Answer, None, None]:
    """Yield the answers to ``batches``, after loading the columns for which ``request`` says so.

    If columns are loaded, a record batch is answered in several slices, in order.

    Args:
        request: The request to the model.
        connection: The connection to the front.
        schema: The schema of the record batches.
        positions: The position of the column for each input, from :meth:`Request.columns`.
        batches: The record batches.
        place: The caller's place, for logs and errors.

    Raises:
        FlightsvcError: A row cannot be loaded and ``on_error`` is ``fail``, the request was refused, or the
            sidecar stayed away.
    """
    loading = Loading.of(request, schema, positions)
    if loading is None:
        yield from request.exchange(connection, schema.names, positions, place).answers(batches)
        return
    # A loader may return files, then arrays: each schema needs a stream of its own.
    for kind, slices in itertools.groupby(loading.slices(batches), lambda rows: rows.schema):
        exchange = loading.request.exchange(connection, kind.names, loading.positions, place)
        inner = exchange.answers(slices)
        try:
            for answer in inner:
                outputs = loading.apply_on_error(answer.batch, answer.outputs)
                yield dataclasses.replace(answer, batch=loading.caller_columns(answer.batch), outputs=outputs)
        finally:
            inner.close()


def image_fields(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return an array as the fields of Spark's image struct without ``origin``; channels keep their order.

    Args:
        array: uint8 or float32, ``[height, width]`` or ``[height, width, channels]`` with 1, 3 or 4 channels.

    Raises:
        InvalidArgumentError: The array has another type or shape.
    """
    shape = (*array.shape, 1) if array.ndim == 2 else array.shape
    if array.dtype.name not in DEPTHS:
        raise InvalidArgumentError(f"a picture is of uint8 or float32, this array is of {array.dtype.name}")
    if len(shape) != 3 or shape[2] not in (1, 3, 4) or 0 in shape:
        raise InvalidArgumentError(
            "a picture is [height, width] or [height, width, channels] with 1, 3 or 4 channels, "
            f"this array is {list(array.shape)}"
        )
    height, width, channels = shape
    mode = DEPTHS[array.dtype.name] + 8 * (channels - 1)
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {"height": height, "width": width, "nChannels": channels, "mode": mode, "data": data}


@dataclasses.dataclass(frozen=True)
class Loading:
    """The loading of columns for record batches of one schema, and the answers for the caller.

    Attributes:
        request: The request to the server, always with ``on_error="column"``.
        positions: The position of the column for each input, in the record batches of :meth:`slices`.
    """

    request: Request
    positions: dict[str, int]
    _asked: Request
    _schema: pa.Schema
    _columns: tuple[_Column, ...]

    @classmethod
    def of(cls, request: Request, schema: pa.Schema, positions: Mapping[str, int]) -> Loading | None:
        """Return the loading of columns of ``schema``; ``None``: no column is loaded.

        Raises:
            InvalidArgumentError: A column for an input of pictures has another type.
        """
        columns: list[_Column] = []
        sent = dict(positions)
        for name, position in positions.items():
            field = schema.field(position)
            entry = request.input(name, field.name)
            pictures = request.model.is_picture(name)
            load = entry.load
            if load is None and pictures and _is_text(field.type):
                load = read
            if load is None:
                if pictures and not _is_picture(field.type):
                    raise InvalidArgumentError(
                        f"model {request.model.name}, signature {request.model.signature}: column "
                        f"{field.name!r} is {field.type}, input {name!r} is made from pictures and needs "
                        f"{PICTURES}"
                    )
                continue
            wire = f"_loaded_{len(columns)}"
            while wire in schema.names:
                wire += "_"
            sent[name] = len(schema) + len(columns)
            columns.append(_Column(name, field.name, position, wire, load, entry, request.specs.get(name)))
        if not columns:
            return None
        error = request.error_column if request.on_error == "column" else _ERROR
        full = dataclasses.replace(request, on_error="column", error_column=error)
        return cls(full, sent, request, schema, tuple(columns))

    def slices(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield ``batches`` in slices: the columns, the loaded columns, and each row's place and reason.

        Raises:
            InvalidArgumentError: A row cannot be loaded and ``on_error`` is ``fail``.
        """
        kinds = [column.kind(None) for column in self._columns]
        for number, batch in enumerate(batches):
            start = held = 0
            rows: list[_Row] = []
            for row in self._rows(batch, number):
                if rows and (len(rows) == SLICE_ROWS or held + row.size > SLICE_BYTES or not row.fits(rows)):
                    yield self._slice(batch.slice(start, len(rows)), rows, kinds)
                    start, held, rows = start + len(rows), 0, []
                rows.append(row)
                held += row.size
            if rows or not batch.num_rows:
                yield self._slice(batch.slice(start), rows, kinds)

    def apply_on_error(self, rows: pa.RecordBatch, outputs: pa.RecordBatch) -> pa.RecordBatch:
        """Return the outputs for a slice after applying ``on_error``.

        Raises:
            InvalidArgumentError: A row cannot be run and ``on_error`` is ``fail``.
        """
        said = outputs.column(outputs.num_columns - 1)
        for column in self._columns:
            said = pc.replace_substring_regex(said, f'^column "{column.wire}": ', "")
            said = pc.replace_substring(said, f'"{column.wire}"', repr(column.name))
        place, own = rows.columns[-2:]
        error = pc.binary_join_element_wise(place, pc.coalesce(own, said), ": ")
        if self._asked.on_error == "fail" and error.null_count < len(error):
            raise self._failure(error.drop_null()[0].as_py())
        columns = outputs.columns[:-1]
        if self._asked.on_error == "column":
            columns.append(error)
        return pa.RecordBatch.from_arrays(columns, names=outputs.schema.names[: len(columns)])

    def caller_columns(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return the caller's columns of a slice."""
        return pa.RecordBatch.from_arrays(rows.columns[: len(self._schema)], schema=self._schema)

    def _rows(self, batch: pa.RecordBatch, number: int) -> Iterator[_Row]:
        """Yield the loaded values of each row; a row whose outputs will be null is not loaded."""
        valid = pa.repeat(True, batch.num_rows)
        if self._asked.nulls == "null":
            for position in self.positions.values():
                if position < len(self._schema):
                    valid = pc.and_(valid, batch.column(position).is_valid())
            for column in self._columns:
                valid = pc.and_(valid, batch.column(column.position).is_valid())
        for i, wanted in enumerate(valid.to_pylist()):
            given = [batch.column(column.position)[i].as_py() for column in self._columns]
            texts = [value for value in given if value and isinstance(value, str)]
            place = texts[0] if texts else f"row {i} of record batch {number}"
            values: list[Any] = []
            try:
                for column, value in zip(self._columns, given, strict=True):
                    values.append(column.loaded(value) if wanted and value is not None else None)
                yield _Row(values, [c.form(v) for c, v in zip(self._columns, values, strict=True)], place)
            except InvalidArgumentError as error:
                if self._asked.on_error == "fail":
                    raise self._failure(f"{place}: {error}") from error
                nothing = [None] * len(self._columns)
                yield _Row(nothing, nothing, place, str(error))

    def _slice(self, batch: pa.RecordBatch, rows: list[_Row], kinds: list[Any]) -> pa.RecordBatch:
        """Return rows with their loaded values; ``kinds`` has the last type of each loaded column."""
        arrays = []
        for i, column in enumerate(self._columns):
            values = [row.values[i] for row in rows]
            found = next((value for value in values if value is not None), None)
            kinds[i] = kinds[i] if found is None else column.kind(found)
            arrays.append(column.array(values, kinds[i]))
        arrays.append(pa.array([row.place for row in rows], pa.string()))
        arrays.append(pa.array([row.reason for row in rows], pa.string()))
        names = [*batch.schema.names, *(column.wire for column in self._columns), "place", "reason"]
        return pa.RecordBatch.from_arrays([*batch.columns, *arrays], names=names)

    def _failure(self, said: str) -> InvalidArgumentError:
        model, column = self._asked.model, self._columns[0]
        return InvalidArgumentError(
            f"{said.rstrip('.')} (column {column.name!r}, input {column.input!r} of model {model.name}, "
            f"signature {model.signature}). To go on without such rows: on_error='null' or on_error='column'"
        )


@dataclasses.dataclass
class _Row:
    """The loaded values of a row, or the reason why it could not be loaded.

    Values of different ``forms`` cannot be in one record batch; ``None`` fits all.
    """

    values: list[Any]
    forms: list[Any]
    place: str
    reason: str | None = None

    @property
    def size(self) -> int:
        return sum(_size(value) for value in self.values)

    def fits(self, rows: list[_Row]) -> bool:
        """Tell whether this row can be in one record batch with ``rows``."""
        for i, form in enumerate(self.forms):
            other = next((row.forms[i] for row in rows if row.forms[i] is not None), None)
            if None not in (form, other) and form != other:
                return False
        return True


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column that is loaded.

    Attributes:
        input: The name of the input that it feeds.
        name: The caller's name for the column.
        position: Its position in the caller's record batches.
        wire: The name of the loaded column on the wire.
        load: The function that loads a value.
        entry: The column's options.
        spec: The input's type; ``None``: it is made from pictures.
    """

    input: str
    name: str
    position: int
    wire: str
    load: Callable[[Any], Any]
    entry: Input
    spec: TensorSpec | None

    def loaded(self, value: Any) -> Any:
        """Load a value and return it in the form to send: bytes, the fields of a picture, or an array.

        Raises:
            InvalidArgumentError: It cannot be loaded or sent; the text is the row's reason.
        """
        try:
            found = self.load(value)
        except Exception as error:  # any error of a user's function concerns only the row
            if self.load is read:
                raise
            raise InvalidArgumentError(
                f"the loader raised {type(error).__name__}: {one_line(error)}"
            ) from error
        numpy = sys.modules.get("numpy")
        if isinstance(found, bytes | bytearray | memoryview):
            if self.spec is not None and self.spec.dtype != "string":
                raise InvalidArgumentError(f"the loader returned bytes, {self._wants()}")
            found = bytes(found)
        elif numpy is not None and isinstance(found, numpy.ndarray | numpy.generic):
            array = numpy.asarray(found)
            found = self._pixels(array) if self.spec is None else self._tensor(array, self.spec)
        else:
            raise InvalidArgumentError(f"the loader returned {type(found).__name__}, {self._wants()}")
        if _size(found) > VALUE_BYTES:
            raise InvalidArgumentError(f"it is larger than {VALUE_BYTES >> 20} MiB")
        return found

    def form(self, value: Any) -> Any:
        """Return a key that is equal for loaded values that can be in one record batch."""
        if value is None or isinstance(value, bytes | dict):
            return None if value is None else type(value)
        return value.shape if self.entry.pad is None else None

    def kind(self, value: Any) -> pa.DataType | None:
        """Return Arrow's type for a value; ``None``: the type of the input."""
        if self.spec is not None:
            return None
        return _STRUCT if isinstance(value, dict) else pa.binary()

    def array(self, values: list[Any], kind: pa.DataType | None) -> pa.Array:
        """Return loaded values as a column."""
        if kind is not None:
            return pa.array(values, kind)
        assert self.spec is not None
        if self.spec.dtype == "string":
            return pa.array(values, pa.binary())
        return _lists(values, self.spec)

    def _wants(self) -> str:
        if self.spec is None:
            return "pictures are bytes of a file or an array [height, width, channels] in the order RGB"
        if self.spec.dtype == "string":
            return f"input {self.input!r} ({self.spec}) wants bytes"
        shape = ",".join(map(str, (self.spec.shape or ())[1:]))
        return f"input {self.input!r} ({self.spec}) wants a NumPy array, one row of it: [{shape}]"

    def _pixels(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        if array.dtype.kind == "f":
            array = array.astype("float32")
        if array.ndim == 3 and array.shape[2] in (3, 4):
            array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]
        return image_fields(array)

    def _tensor(self, array: np.ndarray[Any, Any], spec: TensorSpec) -> np.ndarray[Any, Any]:
        """Return an array as one row of the input, in the dtype of the wire."""
        import numpy as np

        returned = f"the loader returned an array {list(array.shape)} of {array.dtype}, {self._wants()}"
        wanted = (spec.shape or ())[1:]
        if array.ndim == len(wanted) + 1 and len(array) == 1:
            array = array[0]
        if array.ndim != len(wanted) or (
            self.entry.pad is None
            and any(size not in (-1, found) for size, found in zip(wanted, array.shape, strict=True))
        ):
            raise InvalidArgumentError(returned)
        if spec.dtype == "string":
            raise InvalidArgumentError(returned)
        dtype = _sent(spec)
        if array.dtype.kind in "iu" and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            fits = not array.size or (array.min() >= limits.min and array.max() <= limits.max)
        else:
            fits = array.dtype.kind == dtype.kind or (dtype.kind == "f" and array.dtype.kind in "iu")
        if not fits:
            raise InvalidArgumentError(returned)
        try:
            with np.errstate(over="raise"):
                return array.astype(dtype, copy=False)
        except FloatingPointError:
            raise InvalidArgumentError(f"{returned}; a value is outside {dtype}") from None


def _sent(spec: TensorSpec) -> np.dtype[Any]:
    """Return the dtype of an input's elements on the wire."""
    import numpy as np

    return np.dtype("float32" if spec.dtype in ("float16", "bfloat16") else spec.dtype)


def _lists(rows: list[np.ndarray[Any, Any] | None], spec: TensorSpec) -> pa.Array:
    """Return arrays of one rank as a column of nested lists."""
    import numpy as np

    there = [row for row in rows if row is not None]
    array = pa.array(np.concatenate([np.empty(0, _sent(spec)), *(row.ravel() for row in there)]))
    rank = len(spec.shape or ()) - 1
    if not rank:
        taken = itertools.count()
        return array.take(pa.array([None if row is None else next(taken) for row in rows], pa.int64()))
    for axis in reversed(range(1, rank)):
        counts = [(int(np.prod(row.shape[:axis])), row.shape[axis]) for row in there]
        lengths = np.repeat([size for _, size in counts], [count for count, _ in counts])
        array = pa.ListArray.from_arrays(_offsets(lengths), array)
    missing = pa.array([row is None for row in rows], pa.bool_())
    lengths = np.array([0 if row is None else len(row) for row in rows])
    return pa.ListArray.from_arrays(_offsets(lengths), array, mask=missing)


def _offsets(lengths: np.ndarray[Any, Any]) -> pa.Array:
    import numpy as np

    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _size(value: Any) -> int:
    """Return the bytes of a loaded value."""
    if isinstance(value, dict):
        return len(value["data"])
    return 0 if value is None else len(value) if isinstance(value, bytes) else int(value.nbytes)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) or kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())
