"""The module ``sparkdl.udf.keras_image_model``: a Keras model for pictures as a function of SQL."""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export import import_keras
from flightsvc.export import keras as keras_models
from flightsvc.image import to_array
from flightsvc.mapping import ImageInput, Input
from flightsvc.model import Model
from flightsvc.spark import functions
from flightsvc.spark.session import active_session

if TYPE_CHECKING:
    import keras
    import numpy as np

_PARAMETER = "image"
_VARIANT = re.compile(r"_\d\.\d+_\d+$")  # mobilenet_1.00_224
_LOCAL = re.compile(r"file:(//(localhost)?)?(?=/)")


def registerKerasImageUDF(
    udf_name: str,
    keras_model_or_file_path: keras.Model | str | os.PathLike[str],
    preprocessor: Callable[[str], np.ndarray[Any, Any]] | None = None,
) -> Model:
    """Register a Keras model as a function of SQL: ``SELECT classify(image) FROM photos``.

    The function belongs to the active session. It takes Spark's image structs, encoded files (binary) or
    paths and URIs (string). It returns the model's output flattened, ``array<float>``. A function of that
    name is replaced; ``SHOW USER FUNCTIONS`` lists it, ``DROP TEMPORARY FUNCTION`` drops it.

    Without a ``preprocessor``, the sidecar stretches each picture to the model's size (bilinear). If
    ``model.name`` is that of a network in ``keras.applications``, such as ``resnet50``, the picture is
    normalised for it; any other model gets RGB from 0 to 255.

    With a ``preprocessor``, the worker calls it with a path, and its result is the model's input. The path is
    that in the column, without ``file:``; a struct or a binary is written to a temporary file, a struct as
    PNG.

    Args:
        udf_name: The function's name.
        keras_model_or_file_path: The model, functional or sequential, with one input and one output; or a
            file that Keras saved, ``.keras`` or ``.h5``.
        preprocessor: A function of a path that returns an array ``[height, width, channels]``, or a batch of
            one.

    Returns:
        The model, for ``transform`` and ``udf``; sparkdl returned a ``GraphFunction``.

    Raises:
        InvalidArgumentError: There is no session; the model takes no pictures, has several inputs or outputs,
            or its size is unknown; or Spark has a function of that name.
        NotFoundError: There is no such file.
    """
    session = active_session()
    if session is None:
        raise InvalidArgumentError(f"{udf_name}: no Spark session to register it in; create one first")
    model = _keras_model(udf_name, keras_model_or_file_path)
    [height, width, channels] = _shape(udf_name, model)
    served = Model(_flat(model))
    served.name = f"{model.name!r} of Keras"
    [name] = served.inputs
    if preprocessor is None:
        served.preprocess = {name: _normalised(udf_name, model.name, height, width, channels)}
        functions.register_udf(session, udf_name, served, inputs={name: _PARAMETER})
    else:
        # As a Python function, because a parameter of an SQL function has only one type.
        functions.check_name(session, udf_name)
        function = served.udf(inputs={name: Input(_PARAMETER, load=_Preprocessed(preprocessor))})
        session.udf.register(udf_name, function.arrow)
    return served


def _keras_model(udf_name: str, source: Any) -> keras.Model:
    if keras_models.is_model(source):
        return source
    path = Path(os.path.abspath(source))
    if not path.exists():
        raise NotFoundError(f"{udf_name}: there is no file {path}; give it a model of Keras, or its file")
    return keras_models.read_file(path)


def _shape(udf_name: str, model: keras.Model) -> tuple[int | None, int | None, int]:
    """Return height, width and channels of the model's input."""
    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    if len(inputs) != 1 or len(outputs) != 1:
        raise InvalidArgumentError(
            f"{udf_name}: the model {model.name!r} has {len(inputs)} inputs and {len(outputs)} outputs that "
            "Keras knows of; one of each is needed, in a functional or sequential model. For others use "
            "flightsvc.register_udf"
        )
    shape = tuple(inputs[0].shape)
    if len(shape) != 4 or shape[3] not in (1, 3):
        raise InvalidArgumentError(
            f"{udf_name}: the model {model.name!r} takes {list(shape)}, which are no pictures "
            "[batch, height, width, channels] of 1 or 3 channels; use flightsvc.register_udf"
        )
    return shape[1:]


def _flat(model: keras.Model) -> keras.Model:
    """Return the model with its output as float32 ``[batch, n]``."""
    keras = import_keras(model.name)
    output = model.outputs[0]
    if len(output.shape) == 2 and output.dtype == "float32":
        return model
    return keras.Model(model.inputs[0], keras.layers.Flatten(dtype="float32")(output), name=model.name)


def _normalised(
    udf_name: str, model_name: str, height: int | None, width: int | None, channels: int
) -> ImageInput:
    """Return the preprocessing for a model; its name may be that of a network."""
    from flightsvc.ml.networks import network, networks

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    # Both NASNets have one name in Keras.
    wanted = {"nasnet": "nasnetmobile"}.get(model_name.lower(), plain(_VARIANT.sub("", model_name)))
    known = next((network(name) for name in networks() if plain(name) == wanted and channels == 3), None)
    size = (height, width)
    if None in size and known is not None:
        size = known.size
    if size[0] is None or size[1] is None:
        raise InvalidArgumentError(
            f"{udf_name}: the model {model_name!r} takes pictures of any size; give it one: "
            "input_shape=(height, width, channels) when it is built"
        )
    if known is not None:
        return dataclasses.replace(known.preprocess(), size=(size[0], size[1]))
    return ImageInput((size[0], size[1]), fit="stretch", channels="L" if channels == 1 else "RGB")


@dataclasses.dataclass(frozen=True)
class _Preprocessed:
    """A loader for workers that calls the preprocessor for a column of any type."""

    preprocessor: Callable[[str], np.ndarray[Any, Any]]

    def __call__(self, value: str | bytes | dict[str, Any]) -> np.ndarray[Any, Any]:
        if isinstance(value, str):
            return self.preprocessor(_path(value))
        data = _png(value) if isinstance(value, dict) else value
        with tempfile.NamedTemporaryFile(suffix=".png" if isinstance(value, dict) else "") as file:
            file.write(data)
            file.flush()
            return self.preprocessor(file.name)


def _path(text: str) -> str:
    """Return the path of a ``file:`` URI, decoded if no such file exists; other text unchanged."""
    path = _LOCAL.sub("", text, count=1)
    return unquote(path) if path != text and not os.path.exists(path) else path


def _png(picture: dict[str, Any]) -> bytes:
    """Return a picture of uint8 as a PNG, exactly.

    Raises:
        InvalidArgumentError: It is of float32, or not a picture.
    """
    array = to_array(picture)
    height, width, channels = array.shape
    if array.dtype != "uint8":
        raise InvalidArgumentError("a picture of float32 cannot be written to a file for the preprocessor")
    if channels > 1:
        array = array[..., [2, 1, 0, 3][:channels]]
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)

    def chunks() -> Iterator[bytes]:
        yield b"\x89PNG\r\n\x1a\n"
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")):
            yield struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"".join(chunks())
