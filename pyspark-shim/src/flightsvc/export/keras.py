"""Models of Keras as SavedModels, exported on the driver.

A model is exported for inference, with the signature ``serving_default`` for any number of rows. Inputs and
outputs have the names of their layers, as ``model.summary()`` prints them. A model of a subclass has no such
layers: its inputs are named after the arguments of ``call`` and have the model's ``input_dtype``; its outputs
are ``output_0``, ``output_1``. If a model takes or returns a dict, the keys are the names, and nested tensors
are ``key_0`` or ``key_name``.

The SavedModel is frozen and folded if :func:`flightsvc.export.freeze.freeze` allows it. Else it has
variables, and the log of ``flightsvc`` says why.

TensorFlow restricts the names of inputs: other characters than letters and digits become ``_``; names that
are not valid for a parameter in Python, or begin with ``_``, get the prefix ``arg_``; of two names that
differ only in case the second gets a number.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import logging
import os
import re
import shutil
import sys
import tempfile
import textwrap
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.export import import_keras, import_tensorflow
from flightsvc.server.shipping import private_folder

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

_SUFFIXES = (".keras", ".h5")
_ESCAPE = re.compile(r"\x1b\[\d*m")
_NO_NAME = re.compile(r"[^A-Za-z0-9_]")

log = logging.getLogger("flightsvc")

_mutex = threading.Lock()  # guards _files; held while a file is exported
_files: dict[Path, tuple[tuple[int, int], Path]] = {}  # by file: its size and time of change, the SavedModel


def is_model(model: object) -> bool:
    """Tell whether ``model`` is a Keras model, without importing Keras."""
    models = sys.modules.get("keras")
    return models is not None and isinstance(model, models.Model)


def is_file(path: Path) -> bool:
    """Tell by its name whether ``path`` is a file of a whole Keras model."""
    return path.suffix in _SUFFIXES and not path.is_dir()


def of_file(path: Path) -> Path:
    """Return the SavedModel of a ``.keras`` or ``.h5`` file; a changed file is exported again.

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: Keras cannot read the file; or as :func:`of_model`.
    """
    with _mutex:
        try:
            about = os.stat(path)
        except OSError as error:
            raise NotFoundError(f"model {path}: {error.strerror}") from None
        state = (about.st_size, about.st_mtime_ns)
        if path not in _files or _files[path][0] != state:
            _files[path] = state, _export(read_file(path), str(path))
        return _files[path][1]


def read_file(path: Path) -> keras.Model:
    """Return the model of a ``.keras`` or ``.h5`` file.

    Raises:
        InvalidArgumentError: Keras cannot read the file, or as :func:`import_keras`.
    """
    keras = import_keras(str(path))
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # any error of a layer
        raise InvalidArgumentError(
            f"model {path}: Keras cannot read it: {reason(error)}. Classes of your own must be registered "
            "first (keras.saving.register_keras_serializable); or load it yourself and give the object"
        ) from error


def of_model(model: keras.Model) -> Path:
    """Export a Keras model as it is now, to a folder that is removed when this process ends.

    Raises:
        InvalidArgumentError: Keras or TensorFlow is not installed, Keras runs on another backend, or the
            model is not built or cannot be traced for any number of rows.
    """
    return _export(model, f"{model.name!r} of Keras")


def _export(model: keras.Model, name: str) -> Path:
    keras, tf = import_keras(name), import_tensorflow()
    arguments = _arguments(model, name)
    specs: list[Any] = []
    for leaf in keras.tree.flatten(arguments):
        label = _unlike(_parameter(leaf.name), [spec.name for spec in specs])
        specs.append(tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype, label))

    def serve(*tensors: Any) -> dict[str, Any]:
        [args, kwargs] = keras.tree.pack_sequence_as(arguments, list(tensors))
        return _outputs(model, model(*args, **kwargs, training=False))

    folder = Path(tempfile.mkdtemp(dir=private_folder()))
    theirs = logging.getLogger("tensorflow")
    level = theirs.level
    theirs.setLevel(logging.WARNING)  # TensorFlow would log the folder
    try:
        function = tf.function(serve, input_signature=specs, autograph=False)
        function.get_concrete_function()
        exported = keras.export.ExportArchive()
        exported.track(model)
        exported.add_endpoint("serving_default", function)
        exported.write_out(str(folder), verbose=False)
    except Exception as error:  # any error of the model's own code
        raise InvalidArgumentError(f"model {name}: it cannot be exported: {reason(error)}") from error
    finally:
        theirs.setLevel(level)
    return _frozen(folder, name)


def _frozen(folder: Path, name: str) -> Path:
    """Return the folder of the frozen model, in place of ``folder``; or ``folder`` if it cannot be frozen."""
    from flightsvc.export.freeze import freeze  # not in workers, which import this module

    frozen = folder.with_name(f"{folder.name}-frozen")
    try:
        freeze(folder, frozen)
    except FlightsvcError as why:
        log.info("model %s: its variables are no constants: %s", name, why)
        return folder
    shutil.rmtree(folder)
    return frozen


@dataclasses.dataclass(frozen=True)
class _Input:
    """One tensor in the arguments of a model."""

    name: str
    shape: Sequence[int | None]
    dtype: str


def _arguments(model: keras.Model, name: str) -> list[Any]:
    """Return positional and named arguments of the model, with an :class:`_Input` for each tensor."""
    keras = import_keras(name)
    if getattr(model, "inputs", None):

        def of_tensor(tensor: Any, label: str = "") -> _Input:
            if tensor.sparse or tensor.ragged:
                raise InvalidArgumentError(
                    f"model {name}: its input {_layer(tensor)!r} is sparse or ragged; "
                    "only dense ones are served"
                )
            return _Input(label or _layer(tensor), tensor.shape, tensor.dtype)

        def below(label: str, part: Any) -> Any:
            if isinstance(part, dict):
                return {key: below(f"{label}_{key}", value) for key, value in part.items()}
            if isinstance(part, list | tuple):
                return [below(f"{label}_{i}", value) for i, value in enumerate(part)]
            return of_tensor(part, label)

        taken = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        if isinstance(taken, dict):
            return [[{key: below(key, value) for key, value in taken.items()}], {}]
        return [[keras.tree.map_structure(of_tensor, taken)], {}]
    config = model.get_build_config()
    if not config:
        raise InvalidArgumentError(
            f"model {name}: it is not built, so its inputs are not known; call it once on some rows, or "
            "begin it with keras.Input"
        )
    [first, *_] = inspect.signature(model.call).parameters
    shapes = config.get("shapes_dict") or {first: config["input_shape"]}

    def of_shape(label: str, shape: Any) -> Any:
        if isinstance(shape, dict):
            return {key: of_shape(key, value) for key, value in shape.items()}
        if all(size is None or isinstance(size, int) for size in shape):
            return _Input(label, shape, model.input_dtype)
        return [of_shape(f"{label}_{i}", value) for i, value in enumerate(shape)]

    labels = {label.removesuffix("_shape"): shape for label, shape in shapes.items()}
    return [[], {label: of_shape(label, shape) for label, shape in labels.items()}]


def _outputs(model: keras.Model, result: Any) -> dict[str, tf.Tensor]:
    """Return the output tensors by name."""
    keras = import_keras(model.name)
    if isinstance(result, dict) and not any(isinstance(v, (dict, list, tuple)) for v in result.values()):
        return result
    symbols = getattr(model, "outputs", None)
    named: dict[str, tf.Tensor] = {}
    for i, tensor in enumerate(keras.tree.flatten(result)):
        named[_unlike(_layer(symbols[i]) if symbols else f"output_{i}", named)] = tensor
    return named


def _layer(tensor: keras.KerasTensor) -> str:
    """Return the name of the layer that a tensor of a functional model comes from."""
    return str(tensor._keras_history.operation.name)


def _parameter(name: str) -> str:
    """Return ``name`` as TensorFlow accepts it for an input of a signature."""
    name = _NO_NAME.sub("_", name)
    if name[:1].isalpha() and not keyword.iskeyword(name) and name != "self":
        return name
    return f"arg_{name.lstrip('_')}"


def _unlike(name: str, taken: Collection[str]) -> str:
    """Return ``name``, with a number appended if it is taken, regardless of case."""
    known = {other.lower() for other in taken}
    number = 0
    new = name
    while new.lower() in known:
        number += 1
        new = f"{name}_{number}"
    return new


def reason(error: Exception) -> str:
    """Return the cause from the text of an error of Keras, where it is last, or below the place."""
    text = _ESCAPE.sub("", str(error)).rpartition("Exception encountered: ")[2]
    lines = [line for line in text.splitlines() if line]
    return textwrap.shorten(" ".join(lines[:2]) or type(error).__name__, 300).rstrip(".")
