"""What is asked of a model: the model and its signature, the columns, and what becomes of bad rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from flightsvc import keras_export, shipping, sidecar
from flightsvc.connection import IMAGE_MODEL, Connection, shared
from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.mapping import ImageInput, Input, Options, Output, TensorSpec, check_device, column_of, wire
from flightsvc.settings import Settings
from flightsvc.stream import Exchange

if TYPE_CHECKING:
    import keras
    import pyarrow as pa
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

    from flightsvc.spark import Mapper
    from flightsvc.sql import Function


_CHOICES = {
    "on_error": ("fail", "null", "column"),
    "nulls": ("null", "fail"),
    "layout": ("list", "tensor"),
}


class Model:
    """A SavedModel and one of its signatures; cheap to make, nothing is loaded before rows arrive.

    Args:
        model: Folder of a SavedModel, or of its numbered versions, on this machine: in Spark it is shipped
            to the executors. Or a URI such as ``file:///models/lite0``, a folder as each executor sees it;
            the digest that :meth:`Client.push` returned; the name of a model in the server's repository; a
            Keras model, or a file that Keras saved. Text with ``://`` is a URI, text that begins with
            ``sha256:`` a digest, text with ``/`` or that names a folder here a path, text that ends in
            ``.keras`` or ``.h5`` a file of Keras, other text a name. The text ``image`` is the built-in model
            that decodes and resizes pictures, ``./image`` a folder.
        signature: Which signature to run.
        version: A version's number, or ``latest``.
        preprocess: Inputs that are made from pictures.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | keras.Model,
        *,
        signature: str = "serving_default",
        version: str | int = "latest",
        preprocess: Mapping[str, ImageInput] | None = None,
    ):
        self._source = _source(model)
        self.name = _name(self._source)
        self.signature = signature
        self.version = str(version)
        self.preprocess = dict(preprocess or {})

    def __repr__(self) -> str:
        return f"Model({self.name!r}, signature={self.signature!r}, version={self.version!r})"

    @property
    def folder(self) -> Path | None:
        """The folder on this machine of the SavedModel or of its versions; ``None``: only servers know it.

        A model of Keras is exported when this is first asked: an object once, a file again when it changes.

        Raises:
            NotFoundError: There is no such file of Keras.
            InvalidArgumentError: Keras cannot read or export it; or it is not here, or not with TensorFlow.
        """
        if isinstance(self._source, str):
            return None
        if isinstance(self._source, Path):
            return keras_export.of_file(self._source) if keras_export.is_file(self._source) else self._source
        return self._exported

    @property
    def reference(self) -> str:
        """What a front on this machine finds the model by: a URI, a digest or a name; see :attr:`folder`."""
        folder = self.folder
        return str(self._source) if folder is None else folder.as_uri()

    @property
    def shipped(self) -> bool:
        """Whether this is a model of the driver that goes by its digest; its name is still the driver's."""
        return isinstance(self._source, str) and self.name != self._source

    def by_digest(self, digest: str) -> Model:
        """Return this model for servers that do not see its folder."""
        model = Model(digest, signature=self.signature, preprocess=self.preprocess)
        model.name = self.name
        return model

    def but(
        self, *, signature: str | None = None, preprocess: Mapping[str, ImageInput] | None = None
    ) -> Model:
        """Return this model with another signature, or with other inputs that are made from pictures."""
        model = copy.copy(self)
        if signature is not None:
            model.__dict__.pop("_signature", None)
            model.signature = signature
        if preprocess is not None:
            model.preprocess = dict(preprocess)
        return model

    def is_picture(self, name: str) -> bool:
        """Tell whether the input ``name`` is made from pictures."""
        return name in self.preprocess or self.reference == IMAGE_MODEL

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Call a shipped model by its name in errors of a server, which knows the digest alone."""
        try:
            yield
        except FlightsvcError as error:
            if not self.shipped or self.reference not in str(error):
                raise
            raise type(error)(str(error).replace(self.reference, self.name)) from error

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
        self, df: DataFrame, *, sidecar: str | None = None, **options: Unpack[Options]
    ) -> DataFrame:
        """Return ``df`` with the model's outputs as further columns.

        Args:
            df: Any DataFrame, classic or Connect.
            sidecar: Name of a column that says which sidecar answered, ``host:pid``; absent: none.
            **options: See :class:`Options`.

        Raises:
            InvalidArgumentError: A column has a type that the input does not take, or an output's name is
                taken; before any task starts.
            NotFoundError: No such model, signature, input, output or column.
        """
        from flightsvc import spark

        with spark.acting_for(df.sparkSession):
            schema = self.output_schema(df.schema, sidecar=sidecar, **options)
            mapper = self.mapper(sidecar=sidecar, **options)
        return spark.transform(df, mapper, schema)

    def mapper(self, *, sidecar: str | None = None, **options: Unpack[Options]) -> Mapper:
        """Return the function for ``mapInArrow`` in the active session.

        Arguments and errors as in :meth:`transform`. Without a session it runs on this machine alone.
        """
        from flightsvc import spark

        return spark.mapper(self, self.request(**options), sidecar)

    def udf(self, **options: Unpack[Options]) -> Function:
        """Return this model as a function of columns: ``df.select(m.udf()("content"))``.

        It is one of the active session, whose settings it has and whose workers get the model.
        Its parameters are named after the inputs, in the order of ``inputs``, else by name; ``inputs`` maps
        an input to its parameter's name, or to an :class:`Input` with that name. With one output it returns
        its type; with several, or with ``on_error="column"``, a struct of the outputs and the error.
        :meth:`transform` is the fast path: a function has one record batch on its way at a time.

        Args:
            **options: See :class:`Options`.

        Raises:
            InvalidArgumentError: There is no session, two outputs have one name, or an input takes no column.
            NotFoundError: No such model, signature, input or output.
        """
        from flightsvc import sql

        return sql.udf(self, self.request(**options))

    def output_schema(
        self, schema: StructType, *, sidecar: str | None = None, **options: Unpack[Options]
    ) -> StructType:
        """Return the schema of :meth:`mapper`'s result over ``schema``; the columns are checked.

        The active session says whether names differ by case. Arguments and errors as in :meth:`transform`.
        """
        from flightsvc import spark

        return spark.output_schema(self, schema, self.request(**options), sidecar)

    def request(
        self,
        inputs: Mapping[str, str | Input] | None = None,
        outputs: Mapping[str, str | Output] | None = None,
        on_error: str = "fail",
        error_column: str = "error",
        *,
        nulls: str = "null",
        run_timeout: float | None = None,
        batching: str | Mapping[str, int] | None = None,
        device: str = "auto",
        layout: str = "list",
    ) -> Request:
        """Return what is asked of this model.

        ``layout`` says how outputs of rank 2 and more come back: as nested lists (``list``, the types that
        Spark has) or as Arrow's fixed shape tensors (``tensor``, all types that Arrow has). The other
        arguments are those of :class:`Options`.

        Raises:
            InvalidArgumentError: An argument is none of its choices.
        """
        for name, value in (("on_error", on_error), ("nulls", nulls), ("layout", layout)):
            if value not in _CHOICES[name]:
                raise InvalidArgumentError(f"{name} is {value!r}; it is one of {', '.join(_CHOICES[name])}")
        if run_timeout is not None and not 0 <= run_timeout < math.inf:
            raise InvalidArgumentError(f"run_timeout is {run_timeout!r}; want seconds, 0 for no bound")
        return Request(
            self,
            dict(inputs or {}),
            dict(outputs or {}),
            on_error,
            error_column,
            nulls,
            run_timeout,
            dict(batching) if isinstance(batching, Mapping) else batching,
            layout,
            check_device(device),
        )

    def driver(self) -> tuple[Model, Connection]:
        """Return the front that is asked about this model on the driver, and the model as it knows it.

        A front at an endpoint that is set may not see the folder of the model: it gets the model by a push.

        Raises:
            NotFoundError: There is no such model or version.
            FlightsvcError: The front cannot be reached or does not take the model.
        """
        settings = Settings.read(_session_conf())
        connection = shared(sidecar.for_driver, settings)
        if settings.endpoint is None or self.folder is None:
            return self, connection
        folder = shipping.version_folder(self.folder, self.version)
        return self.by_digest(shipping.send(connection, folder)), connection

    @functools.cached_property
    def _signature(self) -> dict[str, dict[str, TensorSpec]]:
        model, connection = self.driver()
        with model.naming():
            return read_signature(model, connection)

    @functools.cached_property
    def _exported(self) -> Path:
        return keras_export.of_model(self._source)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a model; empty ``inputs`` or ``outputs`` leave the choice to the rules.

    ``specs`` has the types of the inputs whose rows a function of the user makes; see :meth:`knowing`.
    """

    model: Model
    inputs: dict[str, str | Input]
    outputs: dict[str, str | Output]
    on_error: str
    error_column: str
    nulls: str
    run_timeout: float | None
    batching: str | dict[str, int] | None
    layout: str
    device: str = "auto"
    specs: dict[str, TensorSpec] = dataclasses.field(default_factory=dict)

    def knowing(self, inputs: Callable[[], Mapping[str, TensorSpec]]) -> Request:
        """Return this request with ``specs`` out of ``inputs()``, which is asked only if there are any."""
        loaded = [
            name
            for name, entry in self.inputs.items()
            if isinstance(entry, Input) and entry.load is not None and not self.model.is_picture(name)
        ]
        if not loaded:
            return self
        known = inputs()
        return dataclasses.replace(self, specs={name: known[name] for name in loaded if name in known})

    def input(self, name: str, column: str) -> Input:
        """Return how ``column`` feeds the input ``name``."""
        entry = self.inputs.get(name)
        return dataclasses.replace(entry, column=column) if isinstance(entry, Input) else Input(column)

    def descriptor(self, inputs: Mapping[str, str] | None = None, request_id: str = "") -> dict[str, Any]:
        """Return the descriptor of the wire contract, fields at their default left out.

        Args:
            inputs: Input tensor to column on the wire, once that is settled.
            request_id: Names the stream in all logs.
        """
        if inputs is None:
            inputs = {name: column_of(entry) for name, entry in self.inputs.items()}
        fields: dict[str, Any] = {"v": 1, "model": self.model.reference}
        if self.model.version != "latest":
            fields["version"] = self.model.version
        if self.model.signature != "serving_default":
            fields["signature"] = self.model.signature
        if inputs:
            fields["inputs"] = {name: wire(self.input(name, column)) for name, column in inputs.items()}
        if self.outputs:
            fields["outputs"] = {name: wire(entry) for name, entry in self.outputs.items()}
        if self.model.preprocess:
            fields["preprocess"] = {name: image.wire() for name, image in self.model.preprocess.items()}
        if self.on_error != "fail":
            fields["on_error"] = self.on_error
        if self.on_error == "column" and self.error_column != "error":
            fields["error_column"] = self.error_column
        if self.nulls != "null":
            fields["nulls"] = self.nulls
        if self.run_timeout is not None:
            fields["run_timeout_ms"] = math.ceil(self.run_timeout * 1000)
        if self.batching is not None:
            fields["batching"] = self.batching
        if self.layout != "list":
            fields["layout"] = self.layout
        if self.device != "auto":
            fields["device"] = self.device
        if request_id:
            fields["request_id"] = request_id
        return fields

    def answer_schema(self, inputs: Mapping[str, str]) -> pa.Schema:
        """Return the schema of the answer, asked on the driver without loading the model.

        Args:
            inputs: Input tensor to column on the wire.

        Raises:
            FlightsvcError: The request is wrong, or the front cannot be asked.
        """
        model, connection = self.model.driver()
        with model.naming():
            return connection.answer_schema(dataclasses.replace(self, model=model).descriptor(inputs))

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
        where = f"model {self.model.name}, signature {self.model.signature}"
        wanted = {name: column_of(entry) for name, entry in self.inputs.items()}
        if not wanted:
            only = len(known) == 1 and len(names) == 1
            wanted = {known[0]: names[0]} if only else {name: name for name in known}
        elif known:
            entries = self.inputs.values()
            lengths = [e.lengths for e in entries if isinstance(e, Input) and e.lengths is not None]
            for name in (*wanted, *lengths):
                if name not in known:
                    raise NotFoundError(f"{where}: there is no input {name!r}; inputs: {', '.join(known)}")
            for name in known:
                if name not in wanted and name not in lengths:
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
            f"model {model.name} has no signature {model.signature!r}; it has {', '.join(signatures)}"
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


def _source(model: Any) -> str | Path | Any:
    """Return a reference as text, a folder or a file of Keras as a path, a Keras model as it is."""
    if keras_export.is_model(model):
        return model
    text = os.fspath(model)
    if isinstance(model, str) and ("://" in text or text.startswith("sha256:") or text == IMAGE_MODEL):
        return text
    path = Path(os.path.abspath(text))
    if not isinstance(model, str) or "/" in text or path.is_dir() or keras_export.is_file(path):
        return path
    return text


def _name(source: str | Path | Any) -> str:
    """Return what messages call a model."""
    if isinstance(source, str):
        return source
    return source.as_uri() if isinstance(source, Path) else f"{source.name!r} of Keras"


def _session_conf() -> dict[str, str]:
    """Return the configuration of the active Spark session, if there is any."""
    from flightsvc import spark

    return spark.active_conf()
