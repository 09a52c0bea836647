"""The module ``sparkdl.param.converters``: converters for the values of Params."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from pyspark.ml.param import TypeConverters

from flightsvc.export import import_keras
from flightsvc.export.graph import TFInputGraph
from flightsvc.sparkdl.graph import utils as tfx

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["SparkDLTypeConverters"]


class _Pairs(list[tuple[str, str]]):
    """A converted mapping, which copying a stage converts again."""


class SparkDLTypeConverters:
    """Converters for ``typeConverter`` of a Param; they raise ``TypeError`` for other values."""

    @staticmethod
    def toTFGraph(value: Any) -> tf.Graph:
        """Return a ``tf.Graph``."""
        return tfx.validated_graph(value)

    @staticmethod
    def toTFInputGraph(value: Any) -> TFInputGraph:
        """Return a :class:`flightsvc.export.graph.TFInputGraph`."""
        if not isinstance(value, TFInputGraph):
            raise TypeError(
                f"want a TFInputGraph, not {type(value).__name__}; make it with TFInputGraph.from..."
            )
        return value

    @staticmethod
    def asColumnToTensorNameMap(value: Any) -> list[tuple[str, str]]:
        """Return a dict of column to tensor as sorted pairs."""
        if isinstance(value, _Pairs):
            return value
        names = SparkDLTypeConverters
        return _Pairs(
            sorted((names._column(column), names.toTFTensorName(tensor)) for column, tensor in _items(value))
        )

    @staticmethod
    def asTensorNameToColumnMap(value: Any) -> list[tuple[str, str]]:
        """Return a dict of tensor to column as sorted pairs."""
        if isinstance(value, _Pairs):
            return value
        names = SparkDLTypeConverters
        return _Pairs(
            sorted((names.toTFTensorName(tensor), names._column(column)) for tensor, column in _items(value))
        )

    @staticmethod
    def toTFTensorName(value: Any) -> str:
        """Return the name ``op:0`` of a tensor, given by itself or by name."""
        name = tfx.tensor_name(value)
        if isinstance(value, str) and name != value:
            raise TypeError(f"{value!r} names no tensor; write {name!r}")
        return name

    @staticmethod
    def toTFHParams(value: Any) -> dict[str, Any]:
        """Return hyperparameters, a dict or an object with ``values()``, as a dict."""
        found = value if isinstance(value, dict) else getattr(value, "values", lambda: None)()
        if not isinstance(found, dict):
            raise TypeError(f"hyperparameters are a dict, not {type(value).__name__}")
        return found

    @staticmethod
    def buildSupportedItemConverter(supportedList: Collection[Any]) -> Callable[[Any], Any]:
        """Return a converter that accepts only the values in ``supportedList``."""

        def convert(value: Any) -> Any:
            if value not in supportedList:
                raise TypeError(f"{value} is not in the supported list: {list(supportedList)}")
            return value

        return convert

    @staticmethod
    def toKerasLoss(value: Any) -> str:
        """Return the name of a loss of Keras.

        Raises:
            ValueError: Keras has no such loss.
        """
        keras = import_keras("of a Param")
        try:
            if isinstance(value, str) and callable(keras.losses.get(value)):
                return value
        except ValueError:
            pass
        raise ValueError(f"Named loss not supported in Keras: {value!r}")

    @staticmethod
    def toKerasOptimizer(value: Any) -> str:
        """Return the name of an optimizer of Keras."""
        keras = import_keras("of a Param")
        try:
            if isinstance(value, str) and keras.optimizers.get(value):
                return value
        except ValueError:
            pass
        raise TypeError(f"Named optimizer not supported in Keras: {value!r}")

    @staticmethod
    def toChannelOrder(value: Any) -> str:
        """Return an order of channels: ``L``, ``RGB`` or ``BGR``.

        Raises:
            ValueError: It is something else.
        """
        if value not in ("L", "RGB", "BGR"):
            raise ValueError(f"channel order {value!r} is none of L, RGB, BGR")
        return str(value)

    @staticmethod
    def _column(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"the name of a column is a str, not {type(value).__name__}")
        return TypeConverters.toString(value)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise TypeError(f"a mapping of columns and tensors is a dict, not {type(value).__name__}")
    return list(value.items())
