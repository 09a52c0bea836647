"""The networks of ``keras.applications``: their table, their weights, and how they are built."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export import import_keras
from flightsvc.export.keras import reason as reason_of

if TYPE_CHECKING:
    import keras

IMAGENET = "imagenet"
"""The weights that a network comes with, where no file is given."""
_HOST = "https://storage.googleapis.com"  # of all that Keras fetches
_REACH_SECONDS = 20

_KERNELS = "_weights_tf_dim_ordering_tf_kernels"
KERAS = (
    # name, height and width, mode, file of the weights; in keras.applications of Keras 3
    ("ConvNeXtBase", 224, "none", "convnext_base.h5"),
    ("ConvNeXtLarge", 224, "none", "convnext_large.h5"),
    ("ConvNeXtSmall", 224, "none", "convnext_small.h5"),
    ("ConvNeXtTiny", 224, "none", "convnext_tiny.h5"),
    ("ConvNeXtXLarge", 224, "none", "convnext_xlarge.h5"),
    ("DenseNet121", 224, "torch", f"densenet121{_KERNELS}.h5"),
    ("DenseNet169", 224, "torch", f"densenet169{_KERNELS}.h5"),
    ("DenseNet201", 224, "torch", f"densenet201{_KERNELS}.h5"),
    ("EfficientNetB0", 224, "none", "efficientnetb0.h5"),
    ("EfficientNetB1", 240, "none", "efficientnetb1.h5"),
    ("EfficientNetB2", 260, "none", "efficientnetb2.h5"),
    ("EfficientNetB3", 300, "none", "efficientnetb3.h5"),
    ("EfficientNetB4", 380, "none", "efficientnetb4.h5"),
    ("EfficientNetB5", 456, "none", "efficientnetb5.h5"),
    ("EfficientNetB6", 528, "none", "efficientnetb6.h5"),
    ("EfficientNetB7", 600, "none", "efficientnetb7.h5"),
    ("EfficientNetV2B0", 224, "none", "efficientnetv2-b0.h5"),
    ("EfficientNetV2B1", 240, "none", "efficientnetv2-b1.h5"),
    ("EfficientNetV2B2", 260, "none", "efficientnetv2-b2.h5"),
    ("EfficientNetV2B3", 300, "none", "efficientnetv2-b3.h5"),
    ("EfficientNetV2L", 480, "none", "efficientnetv2-l.h5"),
    ("EfficientNetV2M", 480, "none", "efficientnetv2-m.h5"),
    ("EfficientNetV2S", 384, "none", "efficientnetv2-s.h5"),
    ("InceptionResNetV2", 299, "tf", f"inception_resnet_v2{_KERNELS}.h5"),
    ("InceptionV3", 299, "tf", f"inception_v3{_KERNELS}.h5"),
    ("MobileNet", 224, "tf", "mobilenet_1_0_224_tf.h5"),
    ("MobileNetV2", 224, "tf", f"mobilenet_v2{_KERNELS}_1.0_224.h5"),
    ("MobileNetV3Large", 224, "none", "weights_mobilenet_v3_large_224_1.0_float.h5"),
    ("MobileNetV3Small", 224, "none", "weights_mobilenet_v3_small_224_1.0_float.h5"),
    ("NASNetLarge", 331, "tf", "nasnet_large.h5"),
    ("NASNetMobile", 224, "tf", "nasnet_mobile.h5"),
    ("ResNet101", 224, "caffe", f"resnet101{_KERNELS}.h5"),
    ("ResNet101V2", 224, "tf", f"resnet101v2{_KERNELS}.h5"),
    ("ResNet152", 224, "caffe", f"resnet152{_KERNELS}.h5"),
    ("ResNet152V2", 224, "tf", f"resnet152v2{_KERNELS}.h5"),
    ("ResNet50", 224, "caffe", f"resnet50{_KERNELS}.h5"),
    ("ResNet50V2", 224, "tf", f"resnet50v2{_KERNELS}.h5"),
    ("VGG16", 224, "caffe", f"vgg16{_KERNELS}.h5"),
    ("VGG19", 224, "caffe", f"vgg19{_KERNELS}.h5"),
    ("Xception", 299, "tf", f"xception{_KERNELS}.h5"),
)


def build_network(name: str, file: str, weights: Path | None) -> keras.Model:
    """Return a network of Keras with the weights of a file.

    The file of ImageNet's weights, wherever it lies, goes through Keras's own way: EfficientNet is built
    otherwise for it.
    """
    assert weights is not None
    keras = import_keras(name)
    build = getattr(keras.applications, name)
    if weights.name != file:
        model = build(weights=None)
        load_weights(name, model, weights)
        return model
    with _getting(keras, file, lambda *_, **__: str(weights)):
        try:
            return build(weights=IMAGENET)
        except Exception as error:  # h5py and Keras raise many
            raise _wrong(name, weights, error) from error


def load_weights(name: str, model: keras.Model, file: Path) -> None:
    """Load the weights, all of them: Keras itself only warns of some layers that a file does not have."""
    keras = import_keras(name)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(keras.ops.full(variable.shape, float("nan"), variable.dtype))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_weights(file)
    except Exception as error:  # h5py and Keras raise many
        raise _wrong(name, file, error) from error
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype) and keras.ops.any(keras.ops.isnan(variable)):
            raise _wrong(name, file, ValueError(f"it lacks {variable.path}"))


def _wrong(name: str, file: Path, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(f"network {name}: {file} does not hold its weights: {reason_of(error)}")


def fetch(name: str, file: Path) -> None:
    """Let Keras fetch the weights into ``file``; it prints how far it is.

    Raises:
        NotFoundError: It cannot.
    """

    def missing(reason: str) -> NotFoundError:
        return NotFoundError(
            f"network {name}: its weights are not in Keras's cache and cannot be downloaded ({reason}); "
            f"put {file.name} into {file.parent}, or give a file by weights=<file>"
        )

    try:  # Keras itself would wait without a bound
        with contextlib.suppress(urllib.error.HTTPError):  # which is an answer
            urllib.request.urlopen(_HOST, timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise missing(f"{_HOST}: {getattr(error, 'reason', error)}") from None
    keras = import_keras(name)

    class Fetched(Exception):  # ends the building of the network, which nobody needs
        pass

    def fetched(get: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        try:
            get(*args, **kwargs, cache_dir=str(file.parent.parent))
        except Exception as error:  # Keras raises Exception itself
            raise missing(reason_of(error)) from error
        raise Fetched

    file.parent.mkdir(parents=True, exist_ok=True)
    with _getting(keras, file.name, fetched), contextlib.suppress(Fetched):
        getattr(keras.applications, name)(weights=IMAGENET)
    if not file.is_file():
        raise missing("Keras put it somewhere else")


@contextlib.contextmanager
def _getting(keras: Any, file: str, instead: Callable[..., str]) -> Iterator[None]:
    """Put a function in the place of Keras's ``get_file``, for one file; it gets the old one first."""
    file_utils = keras.src.utils.file_utils
    old = file_utils.get_file

    def get_file(fname: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return instead(old, fname, *args, **kwargs) if fname == file else old(fname, *args, **kwargs)

    file_utils.get_file = get_file
    try:
        yield
    finally:
        file_utils.get_file = old


def weights_folder() -> Path:
    """Return the folder in which Keras keeps weights."""
    home = os.environ.get("KERAS_HOME")
    if not home:
        user = os.path.expanduser("~")
        home = os.path.join(user if os.access(user, os.W_OK) else "/tmp", ".keras")
    return Path(os.path.abspath(os.path.expanduser(home))) / "models"
