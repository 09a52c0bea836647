"""A model: where it lies, its signature, and the ways to run it on DataFrames."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from flightsvc.errors import FlightsvcError
from flightsvc.export import keras as keras_models
from flightsvc.mapping import ImageInput, Input, Options, Output, TensorSpec
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


class Model:
    """A SavedModel and one of its signatures. It is loaded only when rows arrive.

    Args:
        model: One of these:

            * a path on this machine, of a SavedModel or of numbered versions of one: text with ``/``, or that
              names a folder here. Spark ships it to the executors.
            * a URI such as ``file:///models/lite0``: text with ``://``. Each executor finds the model there.
            * a digest that :meth:`Client.push` has returned: text that begins with ``sha256:``.
            * a model of Keras, or a file that Keras has saved: text that ends in ``.keras`` or ``.h5``.
            * the name of a model in the server's repository: any other text. ``image`` is the built-in model,
              which decodes and resizes pictures.
        signature: The name of the signature to run.
        version: The number of a version, or ``latest``.
        preprocess: How inputs are made from pictures, by the name of the input.
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
        """The folder of the SavedModel, or of its versions, on this machine; ``None``: it is on a server.

        A model of Keras is exported at the first access; a file is exported again after it has changed.

        Raises:
            NotFoundError: There is no such file.
            InvalidArgumentError: Keras cannot read or export the model, or is not installed with TensorFlow.
        """
        if isinstance(self._source, str):
            return None
        if isinstance(self._source, Path):
            return keras_models.of_file(self._source) if keras_models.is_file(self._source) else self._source
        return self._exported

    @property
    def reference(self) -> str:
        """What a front on this machine finds the model by: a URI, a digest or a name."""
        folder = self.folder
        return str(self._source) if folder is None else folder.as_uri()

    @property
    def shipped(self) -> bool:
        """Whether this is a model of the driver that servers know by its digest."""
        return isinstance(self._source, str) and self.name != self._source

    def by_digest(self, digest: str) -> Model:
        """Return this model as servers know it that cannot see its folder."""
        model = Model(digest, signature=self.signature, preprocess=self.preprocess)
        model.name = self.name
        return model

    def replace(
        self, *, signature: str | None = None, preprocess: Mapping[str, ImageInput] | None = None
    ) -> Model:
        """Return a copy with another signature, or with other inputs that are made from pictures."""
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
        """Replace the digest of a shipped model with its name in errors of the server."""
        try:
            yield
        except FlightsvcError as error:
            if not self.shipped or self.reference not in str(error):
                raise
            raise type(error)(str(error).replace(self.reference, self.name)) from error

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The input tensors by name. A front reads them; it does not load the model.

        Raises:
            NotFoundError: There is no such model, version or signature.
            FlightsvcError: The front cannot be reached, or the folder has no SavedModel.
        """
        return dict(self._signature["inputs"])

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The output tensors by name; raises as :attr:`inputs`."""
        return dict(self._signature["outputs"])

    def transform(
        self, df: DataFrame, *, sidecar: str | None = None, **options: Unpack[Options]
    ) -> DataFrame:
        """Return ``df`` with the model's outputs as further columns.

        Args:
            df: A DataFrame, classic or Connect.
            sidecar: Name of a column for the sidecar that has answered, ``host:pid``; ``None``: no such
                column.
            **options: See :class:`Options`.

        Raises:
            InvalidArgumentError: A column's type does not fit its input, or a new column has the name of
                another. No task has started then.
            NotFoundError: There is no such model, signature, input, output or column.
        """
        with acting_for(df.sparkSession):
            schema = self.output_schema(df.schema, sidecar=sidecar, **options)
            mapper = self.mapper(sidecar=sidecar, **options)
        return dataframe.transform(df, mapper, schema)

    def mapper(self, *, sidecar: str | None = None, **options: Unpack[Options]) -> Mapper:
        """Return a function for ``mapInArrow`` in the active session.

        Arguments and errors are those of :meth:`transform`. Without a session, the function runs only on this
        machine.
        """
        return dataframe.mapper(self, self.request(**options), sidecar)

    def udf(self, **options: Unpack[Options]) -> Function:
        """Return this model as a function of columns: ``df.select(m.udf()("content"))``.

        The function belongs to the active session: it uses its settings, and its workers get the model. Its
        parameters are the columns of ``inputs``, in that order; by default the inputs, sorted by name. It
        returns the only output, or a struct of several outputs and, with ``on_error="column"``, the error.
        :meth:`transform` is faster: a function has only one record batch in flight.

        Args:
            **options: See :class:`Options`.

        Raises:
            InvalidArgumentError: There is no session, two outputs have one name, or no column can feed an
                input.
            NotFoundError: There is no such model, signature, input or output.
        """
        return functions.udf(self, self.request(**options))

    def output_schema(
        self, schema: StructType, *, sidecar: str | None = None, **options: Unpack[Options]
    ) -> StructType:
        """Return the schema of the result of :meth:`mapper` for ``schema``, after checking the columns.

        The active session says whether names differ by case. Arguments and errors are those of
        :meth:`transform`.
        """
        return dataframe.output_schema(self, schema, self.request(**options), sidecar)

    def request(
        self,
        inputs: Mapping[str, str | Input] | None = None,
        outputs: Mapping[str, str | Output] | None = None,
        **options: Any,
    ) -> Request:
        """Return a request to this model.

        Args:
            inputs: See :class:`Options`.
            outputs: See :class:`Options`.
            **options: The others of :class:`Options`, and ``layout``, the form of outputs of rank 2 and more:
                nested lists, of types that Spark has (``list``), or Arrow's fixed shape tensors, of all types
                of Arrow (``tensor``).

        Raises:
            InvalidArgumentError: An option has an invalid value.
        """
        return Request(self, dict(inputs or {}), dict(outputs or {}), **options)

    def driver(self) -> tuple[Model, Connection]:
        """Return this model as the driver's front knows it, and the connection to that front.

        A front at a configured endpoint may not see the model's folder, so the model is pushed to it.

        Raises:
            NotFoundError: There is no such model or version.
            FlightsvcError: The front cannot be reached, or refuses the model.
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
    """Return a URI, digest or name as text, a path as a Path, a model of Keras unchanged."""
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
    """Return the name of a model in messages."""
    if isinstance(source, str):
        return source
    return source.as_uri() if isinstance(source, Path) else f"{source.name!r} of Keras"
