"""Tables in files, read a record batch at a time and written whole or not at all.

Memory holds a few record batches, and of a Parquet file that is written an open row group, never a file.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet

from flightsvc.errors import InvalidArgumentError, NotFoundError

STANDARD = "-"
"""The path that means standard input or output; what comes or goes there is an Arrow stream."""
BATCH_BYTES = 16 << 20
"""About the most bytes of a record batch that is read, unless a row is larger."""

_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".arrows": "stream",
}
_READERS = {
    "parquet": ds.ParquetFileFormat(),
    "csv": ds.CsvFileFormat(parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)),
    "json": ds.JsonFileFormat(),
    "arrow": ds.IpcFileFormat(),
}
_ARROW_FILE = b"ARROW1"  # how an Arrow file begins; a stream begins otherwise
_PAGES = 1 << 20  # bytes of a column of Parquet that are read at once, rather than all of its row group
_JSON_BYTES = 4 << 20  # lines that are parsed together
_ROW_GROUP_BYTES, _ROW_GROUP_ROWS = 32 << 20, 1 << 20  # where a row group of Parquet that is written ends
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_TOLD = re.compile(r"(?:Could not open \S+ input source '.*?': )?(?:\w+: )?(?P<text>.*)", re.DOTALL)
_CSV_ROW = re.compile(r"Row #(?P<line>\d+): (?P<text>Expected \d+ columns, got \d+|.*)", re.DOTALL)
_JSON_ROW = re.compile(r"JSON parse error: (?P<text>.*?) in row (?P<row>\d+)", re.DOTALL)


def format_of(path: str) -> str:
    """Return the format of a file by the end of its name: parquet, csv, json, arrow or stream.

    Raises:
        InvalidArgumentError: There is no such ending.
    """
    kind = "stream" if path == STANDARD else _FORMATS.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise InvalidArgumentError(
            f"{path}: the format of a file is told by the end of its name: {', '.join(_FORMATS)}; "
            f"{STANDARD} is an Arrow stream on standard input or output"
        )
    return kind


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of a table; ``keys`` are the columns that its folders are named after."""

    path: str
    keys: Mapping[str, str | None]
    fragment: ds.Fragment | None  # None: an Arrow stream
    schema: pa.Schema  # without the keys


class Reader:
    """A table in files of one format.

    Attributes:
        format: See :func:`format_of`. Columns of ``csv`` are texts.
        schema: The columns. A file below a folder ``key=value`` has a column of texts for it.
        rows: How many rows there are; ``None`` if only reading tells.
    """

    def __init__(self, paths: Sequence[str], batch_rows: int):
        """Look at the files, of which folders may hold many, and read what columns they have.

        Args:
            paths: Files and folders, or ``-`` alone.
            batch_rows: The most rows of a record batch.

        Raises:
            NotFoundError: There is no such file or folder, or no file in it.
            InvalidArgumentError: The files are of several formats or have different columns, or one cannot
                be read; the text names it.
        """
        self._batch_rows = batch_rows
        found = [file for path in paths for file in _found(path)]
        self.format = format_of(found[0][0])
        for path, _ in found:
            if (other := format_of(path)) != self.format and {other, self.format} != {"arrow", "stream"}:
                raise InvalidArgumentError(
                    f"{found[0][0]} is {self.format} and {path} is {other}; run files of one format at a time"
                )
        if self.format in ("csv", "json"):  # Spark writes such files for partitions without rows
            kept = [(path, keys) for path, keys in found if os.path.getsize(path) > 0]
            if not kept:
                raise InvalidArgumentError(f"{found[0][0]}: the file is empty, so its columns are not known")
            found = kept
        self._files = [_opened(path, self.format, keys) for path, keys in found]
        self._columns = _columns(self._files, self.format)
        keys = [pa.field(name, pa.string()) for name in self._files[0].keys]
        self.schema = pa.schema([*self._columns, *keys], self._columns.metadata)
        self.rows = self._count()

    def read_as(self, types: Mapping[str, pa.DataType]) -> None:
        """Read columns of JSON lines as these types, whatever the first rows look like."""
        for name, kind in types.items():
            for schema in ("schema", "_columns"):
                known = getattr(self, schema)
                if (at := known.get_field_index(name)) >= 0:
                    setattr(self, schema, known.set(at, pa.field(name, kind)))

    def batches(self) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Yield all rows, file by file: a file's path, the number of the first row in it, and rows.

        Raises:
            InvalidArgumentError: A file cannot be read; the text names it, and the row where that is known.
        """
        for file in self._files:
            first = 0
            with _reading(file.path):
                for batch in self._of_file(file):
                    keys = [pa.repeat(pa.scalar(v, pa.string()), batch.num_rows) for v in file.keys.values()]
                    columns = [*(batch.column(name) for name in self._columns.names), *keys]
                    whole = pa.RecordBatch.from_arrays(columns, schema=self.schema)
                    step = self._batch_rows
                    if whole.nbytes > BATCH_BYTES:
                        step = min(step, max(1, whole.num_rows * BATCH_BYTES // whole.nbytes))
                    for start in range(0, whole.num_rows, step):
                        yield file.path, first + start, whole.slice(start, step)
                    first += whole.num_rows

    def _of_file(self, file: _File) -> Iterable[pa.RecordBatch]:
        if file.fragment is None:
            return _stream(file.path)
        if self.format == "json":
            return _json_lines(file.path, self._columns)
        if self.format == "parquet":  # by pages: a dataset reads whole row groups into memory
            opened = pyarrow.parquet.ParquetFile(file.path, buffer_size=_PAGES, pre_buffer=False)
            return opened.iter_batches(self._batch_rows)  # type: ignore[no-any-return]
        return file.fragment.to_batches(  # type: ignore[no-any-return]
            schema=self._columns, batch_size=self._batch_rows, batch_readahead=1, fragment_readahead=1
        )

    def _count(self) -> int | None:
        if self.format not in ("parquet", "arrow"):
            return None
        fragments = [file.fragment for file in self._files if file.fragment is not None]
        return sum(f.count_rows() for f in fragments) if len(fragments) == len(self._files) else None


def _found(path: str) -> list[tuple[str, dict[str, str | None]]]:
    """Return the files that ``path`` means, in order, with the columns in the names of their folders."""
    if not os.path.isdir(path):
        if path != STANDARD and not os.path.exists(path):
            raise NotFoundError(f"{path}: no such file or folder")
        return [(path, {})]
    files = []
    for file in sorted(Path(path).rglob("*")):
        inside = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith((".", "_")) for part in inside):
            pairs = [part.split("=", 1) for part in inside[:-1] if "=" in part]
            files.append((str(file), {k: None if v == _NO_VALUE else unquote(v) for k, v in pairs}))
    if not files:
        raise NotFoundError(f"{path}: this folder holds no files")
    return files


def _opened(path: str, kind: str, keys: Mapping[str, str | None]) -> _File:
    with _reading(path):
        if kind in ("arrow", "stream"):  # told apart by content: their names are mixed up often
            kind = "arrow" if path != STANDARD and _begins(path, _ARROW_FILE) else "stream"
        if kind == "stream":
            if path == STANDARD:
                return _File(path, keys, None, _standard_input().schema)
            with pa.ipc.open_stream(path) as stream:
                return _File(path, keys, None, stream.schema)
        fragment = _READERS[kind].make_fragment(path, pa.fs.LocalFileSystem())
        return _File(path, keys, fragment, fragment.physical_schema)


def _begins(path: str, text: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(text)) == text


_inputs: list[pa.RecordBatchReader] = []  # standard input, once it is open


def _standard_input() -> pa.RecordBatchReader:
    if not _inputs:
        _inputs.append(pa.ipc.open_stream(sys.stdin.buffer))
    return _inputs[0]


def _stream(path: str) -> Iterator[pa.RecordBatch]:
    if path == STANDARD:
        yield from _standard_input()
        return
    with pa.ipc.open_stream(path) as stream:
        yield from stream


def _columns(files: Sequence[_File], kind: str) -> pa.Schema:
    """Return the columns that all files have.

    Raises:
        InvalidArgumentError: They differ, or two of one file have one name.
    """
    first = files[0]
    for file in files:
        names = [*file.schema.names, *file.keys]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidArgumentError(f"{file.path}: two columns are called {twice!r}; rename one")
    if kind == "json":  # the types of the first rows of each file, so numbers may be whole in one
        schema = pa.unify_schemas([file.schema for file in files], promote_options="permissive")
        return pa.schema([pa.field(field.name, _as_written(field.type)) for field in schema])
    for file in files:
        ours, theirs = dict(_described(first, kind)), dict(_described(file, kind))
        if ours != theirs:
            name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
            raise InvalidArgumentError(
                f"{file.path} has other columns than {first.path}: {name!r} is {theirs.get(name, 'missing')} "
                f"here and {ours.get(name, 'missing')} there; run files with the same columns together"
            )
    if kind == "csv":
        return pa.schema([(name, pa.string()) for name in first.schema.names])
    return first.schema


def _described(file: _File, kind: str) -> Iterator[tuple[str, str]]:
    """Yield the columns of a file with their types; all columns of CSV are texts."""
    for field in file.schema:
        yield field.name, "text" if kind == "csv" else str(field.type)
    for name in file.keys:
        yield name, "a folder's name"


def _as_written(kind: pa.DataType) -> pa.DataType:
    """Return the type in which texts of JSON that look like times are left as they are."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_written(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _as_written(field.type)) for field in kind])
    return kind


def _json_lines(path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows of JSON lines; pyarrow's reader of files says no more of a mistake than its block."""
    first = 0
    with open(path, "rb") as file:
        while some := file.readlines(_JSON_BYTES):
            if not (lines := [line for line in some if line.strip()]):
                continue
            try:
                table = _parsed(lines, schema)
            except pa.ArrowInvalid:
                row = bisect.bisect_left(
                    range(len(lines)), True, key=lambda n: _fails(lines[: n + 1], schema) != ""
                )
                if reason := _fails(lines[row : row + 1], schema):
                    reason = reason.removeprefix("JSON parse error: ").removesuffix(" in row 0")
                    raise InvalidArgumentError(f"{path}: row {first + row}: {reason}") from None
                raise
            yield from table.to_batches()
            first += len(lines)


def _fails(lines: Sequence[bytes], schema: pa.Schema) -> str:
    """Return why lines cannot be read, or an empty text."""
    try:
        _parsed(lines, schema)
    except pa.ArrowInvalid as error:
        return str(error)
    return ""


def _parsed(lines: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    text = b"".join(lines)
    return pyarrow.json.read_json(
        io.BytesIO(text),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file, and the row where pyarrow knows it, in errors of reading."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        text = _TOLD.fullmatch(_said(error))["text"]  # type: ignore[index]
        if match := _CSV_ROW.search(text):  # the line of names is 1
            text = f"row {int(match['line']) - 2}: {match['text']}"
        elif match := _JSON_ROW.fullmatch(text):
            text = f"row {match['row']}: {match['text']}"
        name = "standard input" if path == STANDARD else path
        raise InvalidArgumentError(f"{name}: {text}") from error


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class Writer:
    """A table in a file that has its name only once it is whole.

    Attributes:
        whole: Whether the file has its name.
    """

    def __init__(self, path: str, schema: pa.Schema):
        """Begin the file under another name beside it.

        Raises:
            InvalidArgumentError: The format cannot hold a column, or the file cannot be written.
        """
        self._path = path
        self._partial: str | None = None
        self.whole = False
        kind = format_of(path)
        for field in schema:
            if (kind == "csv" and pa.types.is_nested(field.type)) or (
                kind in ("csv", "json") and _has_bytes(field.type)
            ):
                raise InvalidArgumentError(
                    f"{path}: {kind.upper()} has no place for column {field.name!r}, of type {field.type}; "
                    "write Parquet or Arrow, or choose other outputs"
                )
        if os.path.isdir(path):
            raise InvalidArgumentError(f"{path} is a folder; name a file")
        file: BinaryIO = sys.stdout.buffer
        with self._writing():
            if path != STANDARD:
                folder, name = os.path.split(path)
                partial = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.part")
                file = open(partial, "xb")  # noqa: SIM115, closed by commit and abort
                self._partial = partial
            self._file = file
            try:
                self._sink = _sink(kind, file, schema)
            except BaseException:
                self.abort()
                raise

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows, with the columns of the schema."""
        with self._writing():
            self._sink.write_batch(batch)

    def commit(self) -> None:
        """End the file and give it its name, in place of one that has it."""
        with self._writing():
            self._sink.close()
            self._file.flush()
            if self._partial is not None:
                self._file.close()
                os.replace(self._partial, self._path)
        self.whole = True

    def abort(self) -> None:
        """Remove what was written, if it is not whole."""
        if self._partial is not None and not self.whole:
            Path(self._partial).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise InvalidArgumentError(f"{self._path}: {_said(error)}") from error


def _has_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_nested(kind):
        return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _sink(kind: str, file: BinaryIO, schema: pa.Schema) -> Any:
    """Return what writes record batches of ``schema`` in a format: ``write_batch`` and ``close``."""
    if kind == "parquet":
        return _RowGroups(pyarrow.parquet.ParquetWriter(file, schema))
    if kind == "csv":
        return pyarrow.csv.CSVWriter(file, schema)
    if kind == "json":
        return _JsonLines(file)
    return (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(file, schema)


class _RowGroups:
    """Parquet, whose writer makes a row group of whatever it is given at once."""

    def __init__(self, writer: pyarrow.parquet.ParquetWriter):
        self._writer = writer
        self._open: list[pa.RecordBatch] = []

    def write_batch(self, batch: pa.RecordBatch) -> None:
        self._open.append(batch)
        rows, size = (sum(getattr(b, what) for b in self._open) for what in ("num_rows", "nbytes"))
        if rows >= _ROW_GROUP_ROWS or size >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._open:
            self._writer.write_table(pa.Table.from_batches(self._open), _ROW_GROUP_ROWS)
            self._open = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


class _JsonLines:
    """JSON lines, which pyarrow does not write; what JSON has no type for becomes text."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write_batch(self, batch: pa.RecordBatch) -> None:
        columns = [c.cast(pa.string()) if pa.types.is_temporal(c.type) else c for c in batch.columns]
        for row in pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist():
            self._file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")

    def close(self) -> None:
        """Do nothing: each line is whole."""
