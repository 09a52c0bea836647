"""What is asked of a model: the model and its signature, the columns, and what becomes of bad rows."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from flightsvc.errors import FlightsvcError, InvalidArgumentError
from flightsvc.export import keras as keras_models
from flightsvc.mapping import ImageInput, Input, Options, Output, TensorSpec, check_device
from flightsvc.request import Request, read_signature
from flightsvc.server import shipping
from flightsvc.server import sidecar as sidecars
from flightsvc.server.connection import IMAGE_MODEL, Connection, shared
from flightsvc.settings import Settings
from flightsvc.spark import dataframe, functions
from flightsvc.spark.session import acting_for, active_conf

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

    from flightsvc.spark.dataframe import Mapper
    from flightsvc.spark.functions import Function


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
            return keras_models.of_file(self._source) if keras_models.is_file(self._source) else self._source
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

    def replace(
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
        with acting_for(df.sparkSession):
            schema = self.output_schema(df.schema, sidecar=sidecar, **options)
            mapper = self.mapper(sidecar=sidecar, **options)
        return dataframe.transform(df, mapper, schema)

    def mapper(self, *, sidecar: str | None = None, **options: Unpack[Options]) -> Mapper:
        """Return the function for ``mapInArrow`` in the active session.

        Arguments and errors as in :meth:`transform`. Without a session it runs on this machine alone.
        """
        return dataframe.mapper(self, self.request(**options), sidecar)

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
        return functions.udf(self, self.request(**options))

    def output_schema(
        self, schema: StructType, *, sidecar: str | None = None, **options: Unpack[Options]
    ) -> StructType:
        """Return the schema of :meth:`mapper`'s result over ``schema``; the columns are checked.

        The active session says whether names differ by case. Arguments and errors as in :meth:`transform`.
        """
        return dataframe.output_schema(self, schema, self.request(**options), sidecar)

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
            raise InvalidArgumentError(f"run_timeout is {run_timeout!r}; give seconds, or 0 for no limit")
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
        settings = Settings.read(active_conf())
        connection = shared(sidecars.for_driver, settings)
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
        return keras_models.of_model(self._source)


def _source(model: Any) -> str | Path | Any:
    """Return a reference as text, a folder or a file of Keras as a path, a Keras model as it is."""
    if keras_models.is_model(model):
        return model
    text = os.fspath(model)
    if isinstance(model, str) and ("://" in text or text.startswith("sha256:") or text == IMAGE_MODEL):
        return text
    path = Path(os.path.abspath(text))
    if not isinstance(model, str) or "/" in text or path.is_dir() or keras_models.is_file(path):
        return path
    return text


def _name(source: str | Path | Any) -> str:
    """Return what messages call a model."""
    if isinstance(source, str):
        return source
    return source.as_uri() if isinstance(source, Path) else f"{source.name!r} of Keras"
