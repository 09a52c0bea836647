"""flightsvc.sparkdl.transformers: the stages by their old arguments, against TensorFlow and Keras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pyspark.ml import Pipeline
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.linalg import VectorUDT

import flightsvc
from flightsvc import image
from flightsvc.ml import register_network
from flightsvc.ml.networks import Network
from flightsvc.sparkdl import (
    DeepImageFeaturizer,
    DeepImagePredictor,
    KerasImageFileTransformer,
    KerasTransformer,
    TFImageTransformer,
    TFTransformer,
    imageInputPlaceholder,
)
from flightsvc.sparkdl.transformers.keras_applications import getKerasApplicationModel
from flightsvc.sparkdl.transformers.keras_utils import KSessionWrap
from flightsvc.sparkdl.transformers.utils import IMAGE_INPUT_PLACEHOLDER_NAME

v1 = tf.compat.v1
SIZES = [(9, 12), (17, 5), (9, 12)]


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three PNGs in colour, of two sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        Image.fromarray(noise(*size, 3, seed=i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(spark: Any) -> Any:
    """The same as structs, and their numbers."""
    rows = [
        (i, image.to_struct(noise(*size, 3, seed=i)[..., ::-1], f"{i}.png")) for i, size in enumerate(SIZES)
    ]
    return spark.createDataFrame(rows, f"id int, image {image.schema().simpleString()}").coalesce(1).cache()


@pytest.fixture(scope="module")
def network() -> Network:
    """A network of pictures 8 x 8 with three classes, as one of the user's own."""

    def build() -> keras.Model:
        keras.utils.set_random_seed(3)
        return keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="map"),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )

    labels = [("n1", "one"), ("n2", "two"), ("n3", "three")]
    return register_network("sparkdl_small", build, size=(8, 8), preprocess="tf", labels=labels)


def resized(i: int, height: int, width: int, method: str = "bilinear") -> np.ndarray:
    """What the sidecar feeds of a picture: RGB from 0 to 255."""
    array = noise(*SIZES[i], 3, seed=i).astype(np.float32)
    return tf.image.resize(array, (height, width), method).numpy()


def collected(frame: Any, column: str) -> list[Any]:
    return [row[column] for row in frame.orderBy("id").collect()]


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-4, atol=1e-5)


# Arguments


@pytest.mark.parametrize(
    "stage",
    [
        DeepImageFeaturizer,
        DeepImagePredictor,
        KerasImageFileTransformer,
        KerasTransformer,
        TFImageTransformer,
        TFTransformer,
    ],
)
def test_constructors_take_keywords_alone(stage: Callable[..., Any]):
    with pytest.raises(TypeError, match=r"^Method __init__ forces keyword arguments\.$"):
        stage("image")
    with pytest.raises(TypeError, match="nothing"):
        stage(nothing=1)
    stage()


def test_params_of_the_old_names(network: Network):
    stage = DeepImageFeaturizer(inputCol="image", outputCol="features", modelName="InceptionV3")
    assert (stage.getScaleHint(), stage.getPooling()) == ("SCALE_AREA_AVERAGING", "none")
    stage.setModelName("ResNet50").setScaleHint("SCALE_FAST").setInputCol("i").setOutputCol("o")
    assert (stage.getModelName(), stage.getPooling(), stage.getInputCol()) == ("ResNet50", "avg", "i")
    assert stage.setParams(pooling="max").getPooling() == "max"
    predictor = DeepImagePredictor(modelName="VGG16")
    assert (predictor.getDecodePredictions(), predictor.getTopK()) == (False, 5)
    with pytest.raises(ValueError, match="there is no network 'Inception'; did you mean InceptionV3"):
        DeepImagePredictor(modelName="Inception")
    with pytest.raises(ValueError, match="there is no network 'Nothing'"):
        getKerasApplicationModel("Nothing")
    assert getKerasApplicationModel("InceptionV3").size == (299, 299)
    with pytest.raises(ValueError, match="tfHParms never had an effect"):
        TFTransformer(tfHParms={"batch_size": 3})


def test_placeholder_and_session():
    with KSessionWrap() as (session, graph):
        placeholder = imageInputPlaceholder(nChannels=3)
        assert placeholder.graph is graph and placeholder.name == f"{IMAGE_INPUT_PLACEHOLDER_NAME}:0"
        assert placeholder.shape.as_list() == [None, None, None, 3]
        total = session.run(tf.reduce_sum(placeholder), {placeholder: np.ones((1, 2, 2, 3))})
        assert total == 12
    with pytest.raises(flightsvc.InvalidArgumentError, match="a placeholder belongs into a graph"):
        imageInputPlaceholder()


# Numbers


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_keras_models_on_numbers(spark: Any, tmp_path: Path, shape: tuple[int, ...]):
    model = keras.Sequential([keras.Input(shape), keras.layers.Dense(5, "relu"), keras.layers.Dense(2)])
    file = tmp_path / "model.h5"
    model.save(file)
    rows = np.random.default_rng(2).normal(size=(20, *shape)).astype(np.float32)
    kind = "array<" * len(shape) + "float" + ">" * len(shape)
    frame = spark.createDataFrame([(i, r.tolist()) for i, r in enumerate(rows)], f"id int, x {kind}")
    stage = KerasTransformer(inputCol="x", outputCol="y", modelFile=str(file))
    got = stage.transform(frame)
    assert got.columns == ["id", "x", "y"]
    assert got.schema["y"].dataType.simpleString() == kind
    close(collected(got, "y"), model.predict(rows, verbose=0))


def test_graphs_on_numbers_of_every_type(spark: Any):
    """The largest of each row, in a graph with an input for each type."""
    from flightsvc.sparkdl import TFInputGraph

    kinds = {"int": tf.int32, "bigint": tf.int64, "float": tf.float32, "double": tf.float64}
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        for name, kind in kinds.items():
            tf.reduce_max(v1.placeholder(kind, [None, 3], name=f"x_{name}"), axis=1, name=f"z_{name}")
        given = TFInputGraph.fromGraph(
            graph, session, [f"x_{name}:0" for name in kinds], [f"z_{name}" for name in kinds]
        )
    numbers = np.random.default_rng(4).integers(-1000, 1000, (100, 3))
    frame = spark.range(100).selectExpr(
        "cast(id as int) AS id", *(f"cast(null as array<{name}>) AS {name}" for name in kinds)
    )
    rows = [
        (i, *([name(v) for v in row] for name in (int, int, float, float))) for i, row in enumerate(numbers)
    ]
    frame = spark.createDataFrame(rows, frame.schema)
    stage = TFTransformer(
        tfInputGraph=given,
        inputMapping={name: f"x_{name}:0" for name in kinds},
        outputMapping={f"z_{name}:0": f"max_{name}" for name in kinds},
    )
    got = stage.transform(frame)
    assert got.columns == ["id", *kinds, *(f"max_{name}" for name in kinds)]
    for name in kinds:
        assert got.schema[f"max_{name}"].dataType.simpleString() == name
        close(collected(got, f"max_{name}"), numbers.max(axis=1))


# Pictures through graphs


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_graphs_see_pictures_of_their_own_size(pictures: Any, order: str):
    with tf.Graph().as_default() as graph:
        pixels = imageInputPlaceholder(nChannels=3)
        tf.reduce_mean(pixels * [1.0, 10.0, 100.0] / 255, axis=[1, 2], name="means")
    stage = TFImageTransformer(
        channelOrder=order, inputCol="image", outputCol="means", graph=graph, outputTensor="means:0"
    )
    got = stage.transform(pictures)
    assert got.schema["means"].dataType == VectorUDT()
    arrays = [noise(*size, 3, seed=i)[..., :: 1 if order == "RGB" else -1] for i, size in enumerate(SIZES)]
    wanted = [(a.astype(np.float64) * [1, 10, 100] / 255).mean(axis=(0, 1)) for a in arrays]
    close([v.toArray() for v in collected(got, "means")], wanted)


def test_graphs_may_make_pictures(pictures: Any):
    with tf.Graph().as_default() as graph:
        pixels = imageInputPlaceholder(nChannels=3)
        tf.image.resize(pixels, (6, 7), name="small")
        [output] = [op.outputs[0].name for op in graph.get_operations() if op.type == "ResizeBilinear"]
    stage = TFImageTransformer(
        channelOrder="BGR",
        inputCol="image",
        outputCol="small",
        graph=graph,
        outputTensor=output,
        outputMode="image",
    )
    for i, row in enumerate(collected(stage.transform(pictures), "small")):
        assert (row.height, row.width, row.nChannels, row.mode) == (6, 7, 3, 21)
        np.testing.assert_allclose(image.to_array(row), resized(i, 6, 7)[..., ::-1], atol=1e-3)


# Files through models of Keras


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, Path]:
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((8, 6, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(2, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(4, "softmax"),
        ]
    )
    file = tmp_path_factory.mktemp("keras") / "small.keras"
    model.save(file)
    return model, file


def test_files_through_a_loader_of_ones_own(spark: Any, folder: Path, small: tuple[keras.Model, Path]):
    model, file = small

    def load(uri: str) -> Any:
        import numpy
        from PIL import Image

        picture = Image.open(uri).resize((6, 8), Image.Resampling.NEAREST)
        return numpy.asarray(picture)[None].astype(numpy.float64)

    paths = [(i, str(folder / f"{i}.png")) for i in range(3)]
    frame = spark.createDataFrame(paths, "id int, uri string")
    stage = KerasImageFileTransformer(
        inputCol="uri", outputCol="predictions", modelFile=str(file), imageLoader=load, outputMode="vector"
    )
    got = stage.transform(frame)
    assert got.schema["predictions"].dataType == VectorUDT()
    loaded = np.concatenate([load(path) for _, path in paths])
    close([v.toArray() for v in collected(got, "predictions")], model.predict(loaded, verbose=0))


def test_files_without_a_loader(spark: Any, folder: Path, small: tuple[keras.Model, Path]):
    model, file = small
    frame = spark.createDataFrame(
        [(i, f"file:{folder / f'{i}.png'}") for i in range(3)], "id int, uri string"
    )
    stage = KerasImageFileTransformer(inputCol="uri", outputCol="p", modelFile=str(file))
    wanted = model.predict(np.stack([resized(i, 8, 6) for i in range(3)]), verbose=0)
    close([v.toArray() for v in collected(stage.transform(frame), "p")], wanted)


# Networks by name


def inside(network: Network, method: str) -> np.ndarray:
    return np.stack([resized(i, 8, 8, method) for i in range(3)]) / 127.5 - 1


def test_predictions_of_a_network(pictures: Any, network: Network):
    wanted = network.build(None).predict(inside(network, "bilinear"), verbose=0)
    plain = DeepImagePredictor(inputCol="image", outputCol="p", modelName=network.name)
    close([v.toArray() for v in collected(plain.transform(pictures), "p")], wanted)
    named = DeepImagePredictor(
        inputCol="image", outputCol="p", modelName=network.name, decodePredictions=True, topK=2
    )
    for entries, probabilities in zip(collected(named.transform(pictures), "p"), wanted, strict=True):
        best = np.argsort(-probabilities)[:2]
        names = [network.labels[i] for i in best]
        assert [(entry["class"], entry["description"]) for entry in entries] == names
        close([entry["probability"] for entry in entries], probabilities[best])


def test_features_are_the_last_map_flattened(pictures: Any, network: Network):
    model = network.build(None)
    cut = keras.Model(model.inputs, model.get_layer("map").output)
    stage = DeepImageFeaturizer(inputCol="image", outputCol="f", modelName=network.name)
    stage.setScaleHint("SCALE_DEFAULT")
    wanted = cut.predict(inside(network, "bilinear"), verbose=0).reshape(3, -1)
    assert wanted.shape == (3, 36)
    close([v.toArray() for v in collected(stage.transform(pictures), "f")], wanted)


def test_a_pipeline_learns_from_features(pictures: Any, network: Network):
    labelled = pictures.selectExpr("id", "image", "cast(id > 0 as int) AS label")
    featurizer = DeepImageFeaturizer(inputCol="image", outputCol="features", modelName=network.name)
    fitted = Pipeline(stages=[featurizer, LogisticRegression(maxIter=20, regParam=0.001)]).fit(labelled)
    assert collected(fitted.transform(labelled), "prediction") == [0.0, 1.0, 1.0]


def test_a_featurizer_is_saved_with_its_network(pictures: Any, network: Network, tmp_path: Path):
    stage = DeepImageFeaturizer(
        inputCol="image", outputCol="f", modelName=network.name, scaleHint="SCALE_FAST"
    )
    stage.save(str(tmp_path / "stage"))
    loaded = DeepImageFeaturizer.load(str(tmp_path / "stage"))
    assert isinstance(loaded, DeepImageFeaturizer) and loaded.uid == stage.uid
    assert {p.name: v for p, v in loaded.extractParamMap().items()} == {
        p.name: v for p, v in stage.extractParamMap().items()
    }
    assert loaded.getPooling() == "none"
    close(
        [v.toArray() for v in collected(loaded.transform(pictures), "f")],
        [v.toArray() for v in collected(stage.transform(pictures), "f")],
    )
