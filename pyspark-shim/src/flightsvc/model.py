"""What is asked of a model: the model and its signature, the columns, and what becomes of bad rows."""

from __future__ import annotations

import dataclasses
import functools
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc import sidecar
from flightsvc.connection import Connection, shared
from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.settings import Settings
from flightsvc.stream import Exchange

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

    from flightsvc.spark import Mapper

_ON_ERROR = ("fail", "null", "column")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """The type of one input or output tensor of a signature.

    Attributes:
        dtype: TensorFlow's name of the element type, such as ``float32`` or ``string``.
        shape: One number per dimension, the batch first; -1 is any size. ``None``: the rank is unknown.
    """

    dtype: str
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "[...]" if self.shape is None else f"[{','.join(map(str, self.shape))}]"
        return self.dtype + shape


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How encoded pictures (JPEG, PNG) in a binary column become one float32 input tensor, in the sidecar.

    The largest centred box of the target's aspect is cut out, resized bilinearly with half-pixel centres
    and without antialias, and each RGB value ``v`` of 0..255 becomes ``v * scale + offset``.

    Attributes:
        size: Height and width of the tensor, in pixels.
        scale: One number, or one for each of R, G, B.
        offset: One number, or one for each of R, G, B.
    """

    size: tuple[int, int]
    scale: float | tuple[float, float, float] = 1.0
    offset: float | tuple[float, float, float] = 0.0

    def wire(self) -> dict[str, Any]:
        """Return the entry of the descriptor's ``preprocess``; defaults are left out."""
        fields: dict[str, Any] = {"size": list(self.size)}
        if self.scale != 1.0:
            fields["scale"] = self.scale
        if self.offset != 0.0:
            fields["offset"] = self.offset
        return fields


class Model:
    """A SavedModel and one of its signatures; cheap to make, nothing is loaded before rows arrive.

    Args:
        model: Folder of a SavedModel, or of its numbered versions, as it is readable on every executor; a
            URI such as ``file:///models/lite0``; or the name of a model in the server's repository. Text
            with ``://`` is a URI, text with ``/`` or that names a folder here is a path, other text a name.
        signature: Which signature to run.
        version: A version's number, or ``latest``.
        preprocess: Inputs that are made from encoded pictures.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        signature: str = "serving_default",
        version: str | int = "latest",
        preprocess: Mapping[str, ImageInput] | None = None,
    ):
        self.reference = _reference(model)
        self.signature = signature
        self.version = str(version)
        self.preprocess = dict(preprocess or {})

    def __repr__(self) -> str:
        return f"Model({self.reference!r}, signature={self.signature!r}, version={self.version!r})"

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The input tensors by name, read by a front without loading the model.

        Raises:
            NotFoundError: There is no such model, version or signature.
            FlightsvcError: The front cannot be asked, or the folder holds no SavedModel.
        """
        return dict(self._signature["inputs"])

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The output tensors by name; raises as :attr:`inputs` does."""
        return dict(self._signature["outputs"])

    def transform(
        self,
        df: DataFrame,
        *,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        on_error: str = "fail",
        error_column: str = "error",
        sidecar: str | None = None,
    ) -> DataFrame:
        """Return ``df`` with the model's outputs as further columns.

        Args:
            df: Any DataFrame, classic or Connect.
            inputs: Input tensor to column. Absent: columns of the same names, or the only column for the
                only input.
            outputs: Output tensor to column, in the wanted order. Absent: all, by tensor name.
            on_error: What a row that cannot be run does: ``fail`` the job, make its outputs ``null``, or
                null with the reason in ``error_column`` (``column``).
            error_column: Name of the column for the reason.
            sidecar: Name of a column that says which sidecar answered, ``host:pid``; absent: none.

        Raises:
            InvalidArgumentError: A column has a type that the input does not take, or an output's name is
                taken; before any task starts.
            NotFoundError: No such model, signature, input, output or column.
        """
        schema = self.output_schema(
            df.schema,
            inputs=inputs,
            outputs=outputs,
            on_error=on_error,
            error_column=error_column,
            sidecar=sidecar,
        )
        mapper = self.mapper(
            inputs=inputs, outputs=outputs, on_error=on_error, error_column=error_column, sidecar=sidecar
        )
        from flightsvc import spark

        return spark.transform(df, mapper, schema)

    def mapper(
        self,
        *,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        on_error: str = "fail",
        error_column: str = "error",
        sidecar: str | None = None,
    ) -> Mapper:
        """Return the function for ``mapInArrow``; arguments and errors as in :meth:`transform`."""
        from flightsvc import spark

        return spark.mapper(self, self.request(inputs, outputs, on_error, error_column), sidecar)

    def output_schema(
        self,
        schema: StructType,
        *,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        on_error: str = "fail",
        error_column: str = "error",
        sidecar: str | None = None,
    ) -> StructType:
        """Return the schema of :meth:`mapper`'s result over ``schema``; the columns are checked.

        Arguments and errors as in :meth:`transform`.
        """
        from flightsvc import spark

        return spark.output_schema(
            self, schema, self.request(inputs, outputs, on_error, error_column), sidecar
        )

    def request(
        self,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        on_error: str = "fail",
        error_column: str = "error",
    ) -> Request:
        """Return what is asked of this model; arguments as in :meth:`transform`."""
        if on_error not in _ON_ERROR:
            raise InvalidArgumentError(f"on_error is {on_error!r}; it is one of {', '.join(_ON_ERROR)}")
        return Request(self, dict(inputs or {}), dict(outputs or {}), on_error, error_column)

    def driver(self) -> Connection:
        """Return the connection to the front that is asked about this model on the driver."""
        return shared(sidecar.for_driver, Settings.read(_session_conf()))

    @functools.cached_property
    def _signature(self) -> dict[str, dict[str, TensorSpec]]:
        return read_signature(self, self.driver())


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a model; empty ``inputs`` or ``outputs`` leave the choice to the rules."""

    model: Model
    inputs: dict[str, str]
    outputs: dict[str, str]
    on_error: str
    error_column: str

    def descriptor(self, inputs: Mapping[str, str] | None = None, request_id: str = "") -> dict[str, Any]:
        """Return the descriptor of the wire contract, fields at their default left out.

        Args:
            inputs: Input tensor to column on the wire, once that is settled.
            request_id: Names the stream in all logs.
        """
        fields: dict[str, Any] = {"v": 1, "model": self.model.reference}
        if self.model.version != "latest":
            fields["version"] = self.model.version
        if self.model.signature != "serving_default":
            fields["signature"] = self.model.signature
        if inputs or self.inputs:
            fields["inputs"] = dict(inputs or self.inputs)
        if self.outputs:
            fields["outputs"] = self.outputs
        if self.model.preprocess:
            fields["preprocess"] = {name: image.wire() for name, image in self.model.preprocess.items()}
        if self.on_error != "fail":
            fields["on_error"] = self.on_error
        if self.on_error == "column" and self.error_column != "error":
            fields["error_column"] = self.error_column
        if request_id:
            fields["request_id"] = request_id
        return fields

    def columns(self, names: Sequence[str], known: Sequence[str], case_sensitive: bool) -> dict[str, int]:
        """Return the position of the column that feeds each input.

        Args:
            names: The columns that there are; names that nothing asks for may occur twice.
            known: The inputs of the signature; empty if ``inputs`` were given and are to be believed.
            case_sensitive: Whether ``a`` and ``A`` are two columns.

        Raises:
            NotFoundError: An input or a column does not exist, or an input has no column.
            InvalidArgumentError: A column's name occurs twice.
        """
        where = f"model {self.model.reference}, signature {self.model.signature}"
        wanted = self.inputs
        if not wanted:
            only = len(known) == 1 and len(names) == 1
            wanted = {known[0]: names[0]} if only else {name: name for name in known}
        elif known:
            for name in wanted:
                if name not in known:
                    raise NotFoundError(f"{where}: there is no input {name!r}; inputs: {', '.join(known)}")
            for name in known:
                if name not in wanted:
                    raise NotFoundError(
                        f"{where}: input {name!r} has no column; add it: inputs={{{name!r}: <column>, ...}}"
                    )
        positions: dict[str, int] = {}
        for name, column in wanted.items():
            found = [i for i, other in enumerate(names) if same_name(column, other, case_sensitive)]
            if not found:
                hint = "" if self.inputs else f"; say which one it is: inputs={{{name!r}: <column>}}"
                raise NotFoundError(
                    f"{where}: there is no column {column!r} for input {name!r}{hint}; "
                    f"columns: {', '.join(names)}"
                )
            if len(found) > 1:
                raise InvalidArgumentError(
                    f"{where}: {len(found)} columns are called {column!r}, which one feeds input {name!r}? "
                    "Rename them"
                )
            positions[name] = found[0]
        return positions

    def exchange(
        self, connection: Connection, names: Sequence[str], positions: Mapping[str, int], place: str = ""
    ) -> Exchange:
        """Return an exchange for record batches with the columns ``names``.

        Args:
            connection: Where the front is.
            names: All columns of the record batches.
            positions: Which of them feeds each input, from :meth:`columns`.
            place: Where this runs, for logs and errors.
        """
        request_id = "-".join([uuid.uuid4().hex[:12], *place.split()])
        descriptor = self.descriptor({name: names[i] for name, i in positions.items()}, request_id)
        return Exchange(connection, descriptor, {names[i]: i for i in positions.values()}, place)


def read_signature(model: Model, connection: Connection) -> dict[str, dict[str, TensorSpec]]:
    """Return the model's ``inputs`` and ``outputs``, as the front at ``connection`` reads them."""
    about = connection.action("model.metadata", {"model": model.reference, "version": model.version})
    signatures = about["signatures"]
    if model.signature not in signatures:
        raise NotFoundError(
            f"model {model.reference} has no signature {model.signature!r}; it has {', '.join(signatures)}"
        )
    return {
        side: {
            spec["name"]: TensorSpec(spec["dtype"], None if spec["shape"] is None else tuple(spec["shape"]))
            for spec in signatures[model.signature][side]
        }
        for side in ("inputs", "outputs")
    }


def same_name(one: str, other: str, case_sensitive: bool) -> bool:
    """Tell whether two column names are one to Spark."""
    return one == other if case_sensitive else one.lower() == other.lower()


def _reference(model: str | os.PathLike[str]) -> str:
    text = os.fspath(model)
    if isinstance(model, str) and "://" in text:
        return text
    if not isinstance(model, str) or "/" in text or os.path.isdir(text):
        return Path(os.path.abspath(text)).as_uri()
    return text


def _session_conf() -> dict[str, str]:
    """Return the configuration of the active Spark session, if there is any."""
    from flightsvc import spark

    return spark.active_conf()
