"""The module ``sparkdl.param.shared_params``: Params to mix into stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from pyspark.ml.param import Param, Params, TypeConverters

from flightsvc.export.graph import TFInputGraph
from flightsvc.ml import params
from flightsvc.ml.params import HasInputCol, HasModelFile, HasOutputCol, param, to_function
from flightsvc.sparkdl.param.converters import SparkDLTypeConverters

__all__ = [
    "OUTPUT_MODES",
    "CanLoadImage",
    "HasInputCol",
    "HasInputMapping",
    "HasKerasLoss",
    "HasKerasModel",
    "HasKerasOptimizer",
    "HasLabelCol",
    "HasOutputCol",
    "HasOutputMapping",
    "HasOutputMode",
    "HasTFHParams",
    "HasTFInputGraph",
]

OUTPUT_MODES = ("vector", "image")
"""The values of ``outputMode``."""


def _to_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"want a dict, not {type(value).__name__}")
    return value


class HasLabelCol(Params):
    """The column of labels."""

    labelCol: Param[str] = param("labelCol", "the column of labels", TypeConverters.toString)

    def setLabelCol(self, value: str) -> Self:
        """Set the column of labels."""
        return self._set(labelCol=value)

    def getLabelCol(self) -> str:
        """Return the column of labels."""
        return self.getOrDefault(self.labelCol)


class HasKerasModel(HasModelFile):
    """A file of a Keras model, and the arguments for fitting it."""

    kerasFitParams: Param[dict[str, Any]] = param("kerasFitParams", "the arguments of Keras's fit", _to_dict)

    def setKerasFitParams(self, value: dict[str, Any]) -> Self:
        """Set the arguments of Keras's fit."""
        return self._set(kerasFitParams=value)

    def getKerasFitParams(self) -> dict[str, Any]:
        """Return the arguments of Keras's fit."""
        return self.getOrDefault(self.kerasFitParams)

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(kerasFitParams={"verbose": 1})


class HasKerasOptimizer(Params):
    """The name of an optimizer of Keras."""

    kerasOptimizer: Param[str] = param(
        "kerasOptimizer", "the name of an optimizer of Keras", SparkDLTypeConverters.toKerasOptimizer
    )

    def setKerasOptimizer(self, value: str) -> Self:
        """Set the name of an optimizer of Keras."""
        return self._set(kerasOptimizer=value)

    def getKerasOptimizer(self) -> str:
        """Return the name of an optimizer of Keras."""
        return self.getOrDefault(self.kerasOptimizer)


class HasKerasLoss(Params):
    """The name of a loss of Keras."""

    kerasLoss: Param[str] = param(
        "kerasLoss", "the name of a loss of Keras", SparkDLTypeConverters.toKerasLoss
    )

    def setKerasLoss(self, value: str) -> Self:
        """Set the name of a loss of Keras."""
        return self._set(kerasLoss=value)

    def getKerasLoss(self) -> str:
        """Return the name of a loss of Keras."""
        return self.getOrDefault(self.kerasLoss)


class HasOutputMode(params.HasOutputMode):
    """Whether the output is a vector, which is the default, or a picture."""

    outputMode: Param[str] = param(
        "outputMode", "vector or image", SparkDLTypeConverters.buildSupportedItemConverter(OUTPUT_MODES)
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(outputMode="vector")


class CanLoadImage(Params):
    """A function that loads a picture."""

    imageLoader: Param[Callable[[str], Any]] = param(
        "imageLoader", "a function of a URI that returns the array of one picture", to_function
    )

    def setImageLoader(self, value: Callable[[str], Any]) -> Self:
        """Set a function of a URI that returns the array of one picture."""
        return self._set(imageLoader=value)

    def getImageLoader(self) -> Callable[[str], Any]:
        """Return a function of a URI that returns the array of one picture."""
        return self.getOrDefault(self.imageLoader)


class HasInputMapping(Params):
    """Which column feeds which tensor, as sorted pairs."""

    inputMapping: Param[list[tuple[str, str]]] = param(
        "inputMapping", "column to input tensor", SparkDLTypeConverters.asColumnToTensorNameMap
    )

    def setInputMapping(self, value: list[tuple[str, str]]) -> Self:
        """Set column to input tensor."""
        return self._set(inputMapping=value)

    def getInputMapping(self) -> list[tuple[str, str]]:
        """Return column to input tensor."""
        return self.getOrDefault(self.inputMapping)


class HasOutputMapping(Params):
    """Which tensor becomes which column, as sorted pairs."""

    outputMapping: Param[list[tuple[str, str]]] = param(
        "outputMapping", "output tensor to column", SparkDLTypeConverters.asTensorNameToColumnMap
    )

    def setOutputMapping(self, value: list[tuple[str, str]]) -> Self:
        """Set output tensor to column."""
        return self._set(outputMapping=value)

    def getOutputMapping(self) -> list[tuple[str, str]]:
        """Return output tensor to column."""
        return self.getOrDefault(self.outputMapping)


class HasTFInputGraph(Params):
    """A graph of TensorFlow 1."""

    tfInputGraph: Param[TFInputGraph] = param(
        "tfInputGraph", "the graph", SparkDLTypeConverters.toTFInputGraph
    )

    def setTfInputGraph(self, value: TFInputGraph) -> Self:
        """Set the graph."""
        return self._set(tfInputGraph=value)

    def getTfInputGraph(self) -> TFInputGraph:
        """Return the graph."""
        return self.getOrDefault(self.tfInputGraph)


class HasTFHParams(Params):
    """Hyperparameters."""

    tfHParams: Param[dict[str, Any]] = param(
        "tfHParams", "the hyperparameters", SparkDLTypeConverters.toTFHParams
    )

    def setTfHParams(self, value: dict[str, Any]) -> Self:
        """Set the hyperparameters."""
        return self._set(tfHParams=value)

    def getTfHParams(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return self.getOrDefault(self.tfHParams)
