"""Named networks on columns of pictures: what Keras says of them on the driver."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from figures import PROVE
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.linalg import DenseVector
from pyspark.sql import functions as F

import flightsvc
from flightsvc.ml import DeepImageFeaturizer, DeepImagePredictor, networks, register_network
from flightsvc.ml.networks import lite0 as lite0_module

PHOTOS = ("chelsea.png", "coffee.png", "coins.png", "retina.jpg")
"""Those of the demo, or some of them: JPEG and PNG, grey and colour."""
if PROVE:
    PHOTOS += ("astronaut.png", "brick.png", "camera.png", "clock_motion.png", "gravel.png")
    PHOTOS += ("hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")

HINTS = {
    "SCALE_AREA_AVERAGING": ("area", False),
    "SCALE_DEFAULT": ("bilinear", False),
    "SCALE_FAST": ("nearest", False),
    "SCALE_REPLICATE": ("nearest", False),
    "SCALE_SMOOTH": ("bilinear", True),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    import skimage

    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        shutil.copyfile(Path(skimage.__file__).parent / "data" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def files(spark, photos):
    df = spark.read.format("binaryFile").load(str(photos)).select("path", "content")
    return df.withColumn("name", F.substring_index("path", "/", -1)).drop("path")


@pytest.fixture(scope="module")
def lite0():
    """Keras on the driver: the map before the last pooling, and the probabilities."""
    import keras
    import tensorflow as tf

    model = lite0_module.network(lite0_module.read_weights(lite0_module.weights_file()))
    head = next(layer for layer in reversed(model.layers) if isinstance(layer, keras.layers.ReLU))
    return tf.function(keras.Model(model.input, [head.output, model.output]))


@pytest.fixture(scope="module")
def said(photos, lite0):
    """``said(method, antialias)`` returns Keras's features and probabilities by photo."""
    import tensorflow as tf

    def of(method: str = "bilinear", antialias: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        tensors = []
        for name in PHOTOS:
            content = (photos / name).read_bytes()
            image = tf.io.decode_image(content, channels=3, expand_animations=False)
            resized = tf.image.resize(image, (224, 224), method, antialias=antialias)
            tensors.append((tf.cast(resized, tf.float32) - 127) / 128)
        features, probabilities = lite0(tf.stack(tensors))
        means = np.asarray(features).mean((1, 2))
        return dict(zip(PHOTOS, zip(means, np.asarray(probabilities), strict=True), strict=True))

    return of


def test_predictions_are_those_of_keras(files, said):
    stage = DeepImagePredictor(inputCol="content", outputCol="p", modelName="EfficientNetLite0")
    named = stage.copy().setDecodePredictions(True).setOutputCol("best")
    df = named.transform(stage.transform(files))
    assert df.schema["p"].dataType.typeName() == "vectorudt"
    assert df.schema["best"].dataType.simpleString() == (
        "array<struct<class:string,description:string,probability:float>>"
    )
    assert (
        named.transformSchema(stage.transformSchema(files.schema)).simpleString() == df.schema.simpleString()
    )
    rows = {row.name: row for row in df.drop("content").collect()}
    labels = networks.imagenet_labels()
    assert set(rows) == set(PHOTOS)
    for name, (_, want) in said().items():
        assert isinstance(rows[name].p, DenseVector) and len(rows[name].p) == 1000
        np.testing.assert_allclose(rows[name].p.toArray(), want, 1e-4, 1e-6)
        top = np.argsort(want)[::-1][:5]
        assert [(e["class"], e.description) for e in rows[name].best] == [labels[i] for i in top]
        np.testing.assert_allclose([e.probability for e in rows[name].best], want[top], 1e-4, 1e-6)
    assert rows["chelsea.png"].best[0].description in ("tabby", "Egyptian_cat", "tiger_cat")
    assert rows["coffee.png"].best[0]["class"] == "n07920052"  # espresso


def test_labels_are_a_literal_of_the_plan(files):
    stage = DeepImagePredictor(inputCol="content", modelName="EfficientNetLite0", decodePredictions=True)
    plan = stage.transform(files)._jdf.queryExecution().optimizedPlan().toString()
    assert "from_json" not in plan and "n01440764" in plan


def test_features_are_those_of_keras_for_each_hint(files, said):
    stage = DeepImageFeaturizer(inputCol="content", outputCol="f", modelName="EfficientNetLite0")
    assert stage.getScaleHint() == "SCALE_AREA_AVERAGING"
    df = files.coalesce(1)
    for hint in HINTS:
        df = stage.copy().setScaleHint(hint).setOutputCol(hint).transform(df)
    rows = {row.name: row for row in df.drop("content").collect()}
    for hint, how in HINTS.items():
        for name, (want, _) in said(*how).items():
            ours = rows[name][hint].toArray()
            assert ours.shape == (1280,)
            np.testing.assert_allclose(ours, want, 1e-4, 1e-4, err_msg=f"{hint} {name}")
            cosine = ours @ want / np.linalg.norm(ours) / np.linalg.norm(want)
            assert cosine > 1 - 1e-6, (hint, name)


# A network of one's own, small enough for many cases.


@pytest.fixture(scope="module")
def tiny():
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 6, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    register_network(
        "Tiny", lambda: model, size=(8, 6), preprocess="tf", labels=["cat", "dog", ("n3", "cow")]
    )
    return model


@pytest.fixture(scope="module")
def tiny_stage(tiny):
    return DeepImagePredictor(inputCol="content", outputCol="p", modelName="Tiny")


def test_structs_and_binary_are_equal(spark, files, photos, tiny_stage):
    structs = flightsvc.image.read_images(spark, str(photos))
    ours = {Path(r.origin).name: r.p for r in tiny_stage.copy().setInputCol("image").transform(structs)
            .select("image.origin", "p").collect()}  # fmt: skip
    want = {row.name: row.p for row in tiny_stage.transform(files).select("name", "p").collect()}
    assert ours == want and len(ours) == len(PHOTOS)


def test_paths_and_binary_are_equal(spark, files, photos, tiny_stage):
    paths = spark.createDataFrame(
        [(str(photos / PHOTOS[0]),), ((photos / PHOTOS[1]).as_uri(),)], "content string"
    )
    ours = {Path(row.content).name: row.p for row in tiny_stage.transform(paths).collect()}
    want = {row.name: row.p for row in tiny_stage.transform(files).select("name", "p").collect()}
    assert ours.keys() == set(PHOTOS[:2])
    for name, p in ours.items():  # what runs together may differ in the last digit
        np.testing.assert_allclose(p.toArray(), want[name].toArray(), 1e-4, 1e-6)


@pytest.fixture(scope="module")
def odd(spark, photos):
    """Pictures of each kind: null, corrupt, grey, with alpha, and a plain one."""
    import io

    from PIL import Image

    def png(mode: str) -> bytes:
        out = io.BytesIO()
        Image.open(photos / "chelsea.png").convert(mode).save(out, "PNG")
        return out.getvalue()

    rows = [("null", None), ("corrupt", b"no picture"), ("L", png("L")), ("RGBA", png("RGBA"))]
    return spark.createDataFrame([*rows, ("RGB", png("RGB"))], "name string, content binary").coalesce(1)


def expected(tiny, mode: str, photos: Path) -> np.ndarray:
    import tensorflow as tf
    from PIL import Image

    picture = np.array(Image.open(photos / "chelsea.png").convert(mode).convert("RGB"))
    return np.asarray(tiny(tf.image.resize(picture, (8, 6))[None] / 127.5 - 1))[0]


@pytest.mark.parametrize("kind", [DeepImagePredictor, DeepImageFeaturizer])
def test_odd_pictures_by_policy(odd, photos, tiny, kind):
    stage = kind(inputCol="content", outputCol="p", modelName="Tiny")
    if kind is DeepImagePredictor:
        stage.setDecodePredictions(True).setTopK(3)
    with pytest.raises(Exception, match='column "content": 10 bytes that are no JPEG'):
        stage.transform(odd).collect()
    good = stage.transform(odd.where("name != 'corrupt'")).collect()
    kept = {row.name: row for row in stage.copy().setOnError("null").transform(odd).collect()}
    told = {row.name: row for row in stage.copy().setOnError("column").transform(odd).collect()}
    assert {row.name: row.p for row in good} == {n: row.p for n, row in kept.items() if n != "corrupt"}
    assert {n: row.p for n, row in told.items()} == {n: row.p for n, row in kept.items()}
    assert kept["null"].p is None and kept["corrupt"].p is None
    assert told["null"].error is None and told["RGB"].error is None and told["corrupt"].error
    if kind is DeepImagePredictor:
        for mode in ("L", "RGBA", "RGB"):
            want = expected(tiny, mode, photos)
            top = np.argsort(want)[::-1]
            assert [e["class"] for e in kept[mode].p] == [("cat", "dog", "n3")[i] for i in top]
            np.testing.assert_allclose([e.probability for e in kept[mode].p], want[top], 1e-4, 1e-6)
    assert kept["RGBA"].p == kept["RGB"].p != kept["L"].p


def test_a_saved_stage_needs_neither_the_name_nor_tensorflow(files, tiny, tmp_path, monkeypatch):
    stages = [
        DeepImagePredictor(
            inputCol="content", outputCol="best", modelName="Tiny", decodePredictions=True, topK=2
        ),
        DeepImageFeaturizer(inputCol="content", outputCol="f", modelName="Tiny", scaleHint="SCALE_SMOOTH"),
    ]
    fitted = Pipeline(stages=stages).fit(files)
    want = fitted.transform(files).drop("content").orderBy("name").collect()
    fitted.write().overwrite().save(str(tmp_path / "pipeline"))
    monkeypatch.delitem(networks._registered, "Tiny")
    for name in ("tensorflow", "keras"):
        monkeypatch.setitem(sys.modules, name, None)  # their import fails
    loaded = PipelineModel.load(str(tmp_path / "pipeline"))
    assert loaded.transform(files).drop("content").orderBy("name").collect() == want
    predictor, featurizer = loaded.stages
    assert predictor.getModelName() == featurizer.getModelName() == "Tiny"
    assert (predictor.getTopK(), predictor.getDecodePredictions()) == (2, True)
    assert (featurizer.getScaleHint(), featurizer.getPooling(), featurizer.getLayer()) == (
        *("SCALE_SMOOTH", "avg"),
        None,
    )
    [row] = predictor.setTopK(1).transform(files.limit(1)).collect()  # it can still be told otherwise
    assert len(row.best) == 1
    with pytest.raises(flightsvc.InvalidArgumentError, match="no network 'Tiny'"):
        predictor.setModelName("Tiny")


def test_params(tiny):
    predictor, featurizer = DeepImagePredictor(), DeepImageFeaturizer()
    assert (predictor.getDecodePredictions(), predictor.getTopK(), predictor.getWeights()) == (
        False,
        5,
        "imagenet",
    )
    assert (featurizer.getPooling(), featurizer.getLayer(), featurizer.getWeights()) == (
        "avg",
        None,
        "imagenet",
    )
    featurizer.setParams(
        inputCol="i", outputCol="o", modelName="Tiny", pooling="max", layer="conv", weights="w.h5"
    )
    assert (featurizer.getInputCol(), featurizer.getOutputCol(), featurizer.getModelName()) == (
        "i",
        "o",
        "Tiny",
    )
    assert (featurizer.getPooling(), featurizer.getLayer(), featurizer.getWeights()) == (
        "max",
        "conv",
        "w.h5",
    )
    assert featurizer.setWeights(Path("v.h5")).getWeights() == "v.h5"
    for kind in (DeepImagePredictor, DeepImageFeaturizer):
        with pytest.raises(ValueError, match=r"no network 'ResNet51'; did you mean ResNet50"):
            kind(modelName="ResNet51")
        with pytest.raises(ValueError, match=r"no network 'ResNet51'.*VGG16, VGG19, Xception"):
            kind().setModelName("ResNet51")
        with pytest.raises(TypeError):
            kind().setModelName(50)
        with pytest.raises(TypeError):
            kind("content")
    with pytest.raises(ValueError, match="scaleHint is 'AREA'; it is one of SCALE_AREA_AVERAGING, SCALE_DEF"):
        featurizer.setScaleHint("AREA")
    with pytest.raises(ValueError, match="topK is 0; it is at least 1"):
        predictor.setTopK(0)
    with pytest.raises(TypeError):
        predictor.setDecodePredictions("yes")


def test_mistakes_are_said_before_a_job(spark, files, tiny, tiny_stage):
    def refused(stage, df, said):
        for call in (lambda: stage.transform(df), lambda: stage.transformSchema(df.schema)):
            with pytest.raises(flightsvc.FlightsvcError, match=said) as error:
                call()
            assert str(error.value).startswith(f"{stage.uid}: ")

    refused(DeepImagePredictor(inputCol="content"), files, "modelName is not set; give it a network")
    refused(DeepImagePredictor(modelName="Tiny"), files, "inputCol is not set; give it a column")
    refused(tiny_stage.copy().setInputCol("none"), files, "none")
    refused(tiny_stage, spark.createDataFrame([(1.5,)], "content double"), "double|struct|binary")
    refused(tiny_stage, files.withColumn("p", F.lit(1)), "there is a column 'p' already")
    refused(DeepImageFeaturizer(inputCol="content", modelName="Tiny", layer="last"), files, "no layer 'last'")
    register_network("Unlabelled", lambda: tiny, size=(8, 6))
    unlabelled = DeepImagePredictor(inputCol="content", modelName="Unlabelled", decodePredictions=True)
    refused(unlabelled, files, "has no labels for 3 classes; register it with labels=")
