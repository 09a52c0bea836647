"""Params of several stages, and their converters."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pyspark.ml.param import Param, Params, TypeConverters, shared

from flightsvc.errors import InvalidArgumentError
from flightsvc.model import Model


def to_choice(name: str, *choices: str) -> Callable[[Any], str]:
    """Return a converter that accepts only ``choices``."""

    def convert(value: Any) -> str:
        if value not in choices:
            raise InvalidArgumentError(f"{name} is {value!r}; it is one of {', '.join(choices)}")
        return str(value)

    return convert


def to_positive(name: str) -> Callable[[Any], int]:
    """Return a converter that accepts only integers above 0."""

    def convert(value: Any) -> int:
        number = operator.index(value)
        if number < 1:
            raise InvalidArgumentError(f"{name} is {number}; it is at least 1")
        return number

    return convert


def to_mapping(value: Any) -> dict[str, str]:
    """Return a mapping, or a list of pairs, of names to names as a dict.

    Raises:
        TypeError: ``value`` is something else.
    """
    try:
        pairs = list(value.items() if isinstance(value, Mapping) else value)
        mapping = dict(pairs)
    except (TypeError, ValueError):
        raise TypeError(f"want a dict or pairs of names, not {type(value).__name__}") from None
    for name in (*mapping, *mapping.values()):
        if not isinstance(name, str):
            raise TypeError(f"names are text, {name!r} is {type(name).__name__}")
    if len(mapping) < len(pairs) or len(set(mapping.values())) < len(mapping):
        raise InvalidArgumentError(f"{dict(pairs)} names a column or a tensor twice; name each once")
    return mapping


def to_model(value: Any) -> Any:
    """Return a :class:`flightsvc.Model` of text, a path or a Keras model.

    A graph of TensorFlow 1 is returned unchanged, and the file of a GraphDef as a path: a model is made of
    them when the inputs and outputs are known.

    Raises:
        TypeError: ``value`` is something else.
    """
    if isinstance(value, str | Path) and str(value).endswith(".pb") and "://" not in str(value):
        return Path(value)
    if type(value).__name__ in ("TFInputGraph", "GraphDef", "Graph", "FuncGraph"):
        return value
    try:
        return value if isinstance(value, Model) else Model(value)
    except TypeError:
        raise TypeError(
            f"a model is a flightsvc.Model, a folder, a URI, a name, a Keras model or its file, "
            f"not {type(value).__name__}"
        ) from None


def to_function(value: Any) -> Callable[..., Any]:
    """Return a function.

    Raises:
        TypeError: ``value`` is not callable.
    """
    if not callable(value):
        raise TypeError(f"want a function, not {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def param(name: str, doc: str, converter: Callable[[Any], Any] | None = None) -> Param[Any]:
    """Return a Param to be declared in a class; ``converter`` checks and converts its values."""
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class HasInputCol(shared.HasInputCol):
    """The Param ``inputCol``: the column that is read."""

    def setInputCol(self, value: str) -> Self:
        """Set the column that is read."""
        return self._set(inputCol=value)


class HasOutputCol(shared.HasOutputCol):
    """The Param ``outputCol``: the column that is added; default: ``<uid>__output``."""

    def setOutputCol(self, value: str) -> Self:
        """Set the column that is added."""
        return self._set(outputCol=value)


class HasModel(Params):
    """The Param ``model``."""

    model: Param[Any] = param(
        "model",
        "a flightsvc.Model, a SavedModel's folder, a URI, a name, a Keras model or its file",
        to_model,
    )

    def getModel(self) -> Any:
        """Return the model."""
        return self.getOrDefault(self.model)

    def setModel(self, value: Any) -> Self:
        """Set the model."""
        return self._set(model=value)


class HasModelFile(Params):
    """The Param ``modelFile``."""

    modelFile: Param[str] = param(
        "modelFile",
        "a file that Keras has saved, .keras or .h5, or the folder of a SavedModel",
        TypeConverters.toString,
    )

    def getModelFile(self) -> str:
        """Return the file of the model."""
        return self.getOrDefault(self.modelFile)

    def setModelFile(self, value: str) -> Self:
        """Set the file of the model."""
        return self._set(modelFile=value)


class HasOutputMode(Params):
    """The Param ``outputMode``."""

    outputMode: Param[str] = param(
        "outputMode",
        "vector: the output flattened, as Spark ML's Vector; image: Spark's image struct of float32",
        to_choice("outputMode", "vector", "image"),
    )

    def getOutputMode(self) -> str:
        """Return the form of the output."""
        return self.getOrDefault(self.outputMode)

    def setOutputMode(self, value: str) -> Self:
        """Set the form of the output: ``vector`` or ``image``."""
        return self._set(outputMode=value)


def first_set(stage: Params, names: Iterable[str]) -> Any:
    """Return the value of the only one of some Params that is set.

    Raises:
        InvalidArgumentError: None or several of them are set.
    """
    names = list(names)
    found = [name for name in names if stage.isSet(name)]
    if len(found) != 1:
        raise InvalidArgumentError(
            f"{' and '.join(found) or 'nothing'} is set; set one of {', '.join(names)}"
        )
    return stage.getOrDefault(found[0])
