"""Stages that run models of TensorFlow and Keras on columns of numbers and text."""

from __future__ import annotations

from typing import Any, Self

from pyspark import keyword_only
from pyspark.ml.param import Param, TypeConverters

from flightsvc.errors import InvalidArgumentError
from flightsvc.export.graph import as_graph
from flightsvc.ml.params import (
    HasInputCol,
    HasModel,
    HasModelFile,
    HasOutputCol,
    first_set,
    param,
    to_mapping,
)
from flightsvc.ml.stage import Asked, Stage
from flightsvc.model import Model


class TFTransformer(Stage, HasModel):
    """Runs a model of TensorFlow on columns.

    Args:
        model: A :class:`flightsvc.Model` or an argument for one: the folder of a SavedModel, a URI, a name, a
            Keras model or its file. Or a graph of TensorFlow 1: a ``tf.Graph``, a ``GraphDef``, its file
            ``.pb``, or a :class:`flightsvc.export.graph.TFInputGraph`. The stage reads a graph once; after
            further training, give it a new TFInputGraph.
        inputMapping: Column to input tensor. Default: columns with the inputs' names, or the only column.
        outputMapping: Output tensor to column, in the wanted order. Default: all, sorted by name.
        signature: The name of the signature. Default: that of the model, else ``serving_default``.
        batchSize: The most rows in one run of the model.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    inputMapping: Param[dict[str, str]] = param("inputMapping", "column to input tensor", to_mapping)
    outputMapping: Param[dict[str, str]] = param("outputMapping", "output tensor to column", to_mapping)
    signature: Param[str] = param("signature", "the name of the signature to run", TypeConverters.toString)

    _sources = ("model", "signature")

    @keyword_only
    def __init__(
        self,
        *,
        model: Any = None,
        inputMapping: dict[str, str] | None = None,
        outputMapping: dict[str, str] | None = None,
        signature: str | None = None,
        batchSize: int | None = None,
        onError: str | None = None,
        errorCol: str | None = None,
    ):
        super().__init__()
        self.setParams(**self._input_kwargs)

    def getInputMapping(self) -> dict[str, str]:
        """Return column to input tensor; empty: the default."""
        return self.getOrDefault(self.inputMapping) if self.isDefined(self.inputMapping) else {}

    def setInputMapping(self, value: dict[str, str]) -> Self:
        """Set column to input tensor."""
        return self._set(inputMapping=value)

    def getOutputMapping(self) -> dict[str, str]:
        """Return output tensor to column; empty: the default."""
        return self.getOrDefault(self.outputMapping) if self.isDefined(self.outputMapping) else {}

    def setOutputMapping(self, value: dict[str, str]) -> Self:
        """Set output tensor to column."""
        return self._set(outputMapping=value)

    def getSignature(self) -> str:
        """Return the name of the signature."""
        return self._model().signature

    def setSignature(self, value: str) -> Self:
        """Set the name of the signature."""
        return self._set(signature=value)

    def _values(self) -> list[Any]:
        values = super()._values()
        if values[0] is not None and not isinstance(values[0], Model):  # a graph
            values.append(repr(self._tensors()))
        return values

    def _tensors(self) -> tuple[list[str], list[str]]:
        """Return the input tensors and the output tensors of a graph."""
        return [*self.getInputMapping().values()], [*self.getOutputMapping()]

    def _build(self) -> Model:
        given = first_set(self, ["model"])
        if isinstance(given, Model):
            return given.replace(
                signature=self.getOrDefault(self.signature) if self.isSet("signature") else None
            )
        inputs, outputs = self._tensors()
        if not inputs or not outputs:
            raise InvalidArgumentError(
                "a graph has no signature; set inputMapping, column to input tensor, and outputMapping, "
                "output tensor to column"
            )
        return Model(as_graph(given, inputs, outputs).saved_model(inputs, outputs))

    def _asked(self) -> Asked:
        inputs = {tensor: column for column, tensor in self.getInputMapping().items()}
        return Asked(self._model(), inputs, self.getOutputMapping())


class KerasStage(Stage, HasModel, HasModelFile, HasInputCol, HasOutputCol):
    """The base of stages of Keras models: one column feeds the only input, one has the only output."""

    _sources = ("model", "modelFile")
    _beside = ("model", "modelFile")

    def _build(self) -> Model:
        found = first_set(self, ["modelFile", "model"])
        return found if isinstance(found, Model) else Model(found)

    def _ends(self) -> tuple[str, str]:
        """Return the names of the model's only input and only output.

        Raises:
            InvalidArgumentError: The model has several inputs or outputs.
        """
        model = self._model()
        for side in ("inputs", "outputs"):
            names = list(getattr(model, side))
            if len(names) != 1:
                raise InvalidArgumentError(
                    f"model {model.name}, signature {model.signature}: it has {len(names)} {side}, "
                    f"{', '.join(names)}; use TFTransformer, which maps each to a column"
                )
        return next(iter(model.inputs)), next(iter(model.outputs))


class KerasTransformer(KerasStage):
    """Runs a model of Keras with one input and one output on a column of numbers.

    The column has numbers, arrays, nested arrays or Spark ML's Vectors; the result has the same depth.

    Args:
        inputCol: The column that is read.
        outputCol: The column that is added.
        modelFile: A file that Keras has saved, ``.keras`` or ``.h5``.
        model: Instead of ``modelFile``: a Keras model, or any model that :class:`TFTransformer` takes.
        batchSize: The most rows in one run of the model.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    @keyword_only
    def __init__(
        self,
        *,
        inputCol: str | None = None,
        outputCol: str | None = None,
        modelFile: str | None = None,
        model: Any = None,
        batchSize: int | None = None,
        onError: str | None = None,
        errorCol: str | None = None,
    ):
        super().__init__()
        self.setParams(**self._input_kwargs)

    def _asked(self) -> Asked:
        source, output = self._ends()
        return Asked(self._model(), {source: self._column("inputCol")}, {output: self.getOutputCol()})
