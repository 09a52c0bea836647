"""Stages for columns of numbers and text: any SavedModel, any model of Keras."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pyspark.ml.param import Param, Params, TypeConverters

from flightsvc.errors import InvalidArgumentError
from flightsvc.ml.params import HasInputCol, HasModel, HasModelFile, HasOutputCol, first_set, to_mapping
from flightsvc.ml.stage import Asked, Stage
from flightsvc.model import Model

if TYPE_CHECKING:
    from flightsvc.export.graph import TFInputGraph


class TFTransformer(Stage, HasModel):
    """Runs a model of TensorFlow on columns.

    Args:
        model: A :class:`flightsvc.Model`, or what makes one: the folder of a SavedModel, a URI, a name, a
            Keras model or its file. Or a graph of TensorFlow 1: a ``tf.Graph``, a ``GraphDef``, its file
            ``.pb``, or a :class:`flightsvc.export.graph.TFInputGraph`.
        inputMapping: Column to input tensor. Absent: columns of the inputs' names, or the only column.
        outputMapping: Output tensor to column, in the wanted order. Absent: all, by tensor name.
        signature: Which signature to run. Absent: the model's own, else ``serving_default``.
        batchSize: The most rows of one run.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

    inputMapping: Param[dict[str, str]] = Param(
        Params._dummy(),
        "inputMapping",
        "column to input tensor",
        typeConverter=to_mapping,
    )
    outputMapping: Param[dict[str, str]] = Param(
        Params._dummy(),
        "outputMapping",
        "output tensor to column",
        typeConverter=to_mapping,
    )
    signature: Param[str] = Param(
        Params._dummy(),
        "signature",
        "which signature of the model to run",
        typeConverter=TypeConverters.toString,
    )

    _sources = ("model", "signature")

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
        self.setParams(
            model=model,
            inputMapping=inputMapping,
            outputMapping=outputMapping,
            signature=signature,
            batchSize=batchSize,
            onError=onError,
            errorCol=errorCol,
        )

    def getInputMapping(self) -> dict[str, str]:
        """Return column to input tensor; empty when absent."""
        return self.getOrDefault(self.inputMapping) if self.isDefined(self.inputMapping) else {}

    def setInputMapping(self, value: dict[str, str]) -> Self:
        """Set column to input tensor."""
        return self._set(inputMapping=value)

    def getOutputMapping(self) -> dict[str, str]:
        """Return output tensor to column; empty when absent."""
        return self.getOrDefault(self.outputMapping) if self.isDefined(self.outputMapping) else {}

    def setOutputMapping(self, value: dict[str, str]) -> Self:
        """Set output tensor to column."""
        return self._set(outputMapping=value)

    def getSignature(self) -> str:
        """Return which signature is run."""
        return self._model().signature

    def setSignature(self, value: str) -> Self:
        """Set which signature to run."""
        return self._set(signature=value)

    def _model(self) -> Model:
        given = self.getOrDefault(self.model) if self.isSet(self.model) else None
        if given is None or isinstance(given, Model):
            return super()._model()
        inputs, outputs = self.getInputMapping(), self.getOutputMapping()
        if not inputs or not outputs:
            raise InvalidArgumentError(
                "a graph has no signature; set inputMapping, column to input tensor, and outputMapping, "
                "output tensor to column"
            )
        tensors = [*inputs.values()], [*outputs]
        return Model(as_graph(given, *tensors).saved_model(*tensors))

    def _build(self) -> Model:
        model: Model = first_set(self, ["model"])
        return model.but(signature=self.getOrDefault(self.signature)) if self.isSet("signature") else model

    def _asked(self) -> Asked:
        inputs = {tensor: column for column, tensor in self.getInputMapping().items()}
        return Asked(self._model(), inputs, self.getOutputMapping())


class KerasStage(Stage, HasModel, HasModelFile, HasInputCol, HasOutputCol):
    """What stages of a Keras model have in common: one column feeds its only input, one is its output."""

    _sources = ("model", "modelFile")
    _beside = ("model", "modelFile")

    def _build(self) -> Model:
        found = first_set(self, ["modelFile", "model"])
        return found if isinstance(found, Model) else Model(found)

    def _ends(self) -> tuple[str, str]:
        """Return the names of the model's only input and only output.

        Raises:
            InvalidArgumentError: It has several.
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

    The column holds numbers, arrays or nested arrays, or Spark ML's Vectors; so deep is the result.

    Args:
        inputCol: The column that is read.
        outputCol: The column that is added.
        modelFile: A file that Keras saved, ``.keras`` or ``.h5``.
        model: Instead of it a Keras model, or all that :class:`TFTransformer` takes.
        batchSize: The most rows of one run.
        onError: ``fail``, ``null`` or ``column``.
        errorCol: The column for the reason.
    """

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
        self.setParams(
            inputCol=inputCol,
            outputCol=outputCol,
            modelFile=modelFile,
            model=model,
            batchSize=batchSize,
            onError=onError,
            errorCol=errorCol,
        )

    def _asked(self) -> Asked:
        source, output = self._ends()
        return Asked(self._model(), {source: self._column("inputCol")}, {output: self.getOutputCol()})


def as_graph(given: Any, inputs: Sequence[str], outputs: Sequence[str]) -> TFInputGraph:
    """Return a graph of TensorFlow 1: a TFInputGraph as it is, a ``tf.Graph``, a ``GraphDef`` or its file.

    The variables of a ``tf.Graph`` are those of the session that is the default one.

    Args:
        given: The graph.
        inputs: The tensors that are fed.
        outputs: The tensors that are asked for.

    Raises:
        InvalidArgumentError: It is something else, or the file holds none.
        NotFoundError: There is no such file or tensor.
    """
    from flightsvc.export.graph import TFInputGraph

    if isinstance(given, TFInputGraph):
        return given
    if isinstance(given, Path):
        return TFInputGraph.fromFrozenFile(given)
    import tensorflow as tf

    if isinstance(given, tf.Graph):
        session = tf.compat.v1.get_default_session()
        if session is not None and session.graph is given:
            return TFInputGraph.fromGraph(given, session, inputs, outputs)
        given = given.as_graph_def()
    if not isinstance(given, tf.compat.v1.GraphDef):
        raise InvalidArgumentError(
            f"a graph is a tf.Graph, a GraphDef or a TFInputGraph, not {type(given).__name__}"
        )
    return TFInputGraph.fromGraphDef(given, inputs, outputs)
