"""SavedModels made here: of models of Keras, of graphs of TensorFlow 1, of variables made constants.

This package alone imports TensorFlow and Keras, and not before it is asked for them. ``keras``, ``graph`` and
``pictures`` run on the driver; ``freeze`` is a program that a server runs, on its own host.
"""

from __future__ import annotations

from typing import Any

from flightsvc.errors import InvalidArgumentError


def import_tensorflow(what: str = "a graph") -> Any:
    """Return TensorFlow.

    Args:
        what: What needs it, for the error.

    Raises:
        InvalidArgumentError: It is not installed here.
    """
    try:
        import tensorflow
    except ImportError as error:
        raise InvalidArgumentError(
            f"{what} needs TensorFlow in this Python ({error}); pip install tensorflow"
        ) from error
    return tensorflow


def import_keras(name: str) -> Any:
    """Return Keras, which runs on TensorFlow.

    Args:
        name: The model that needs it, for the error.

    Raises:
        InvalidArgumentError: One of them is not installed here, or Keras runs on something else.
    """
    try:
        import keras
        import tensorflow  # noqa: F401, Keras on another backend does not need it, the export does
    except ImportError as error:
        raise InvalidArgumentError(
            f"model {name}: exporting a model of Keras needs Keras and TensorFlow on the driver ({error}); "
            "pip install tensorflow, or give the folder of a SavedModel"
        ) from error
    if keras.backend.backend() != "tensorflow":
        raise InvalidArgumentError(
            f"model {name}: Keras runs on {keras.backend.backend()} here, and only models on TensorFlow "
            "can be exported; save it as a .keras file and start the driver with KERAS_BACKEND=tensorflow"
        )
    return keras


def first_line(error: Exception) -> str:
    """Return what an error of TensorFlow says, without the graph's stack below it."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
