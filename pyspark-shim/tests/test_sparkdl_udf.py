"""flightsvc.sparkdl.udf: models of Keras for pictures as functions of SQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pyspark.errors import PythonException
from pyspark.sql import functions as F

import flightsvc
from flightsvc import image
from flightsvc.sparkdl import registerKerasImageUDF

HEIGHT, WIDTH = 10, 8
SIZES = [(HEIGHT, WIDTH), (19, 13), (5, 30)]


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def built(name: str, outputs: int = 3, flat: bool = True) -> keras.Model:
    keras.utils.set_random_seed(outputs)
    layers = [keras.Input((HEIGHT, WIDTH, 3)), keras.layers.Conv2D(outputs, 3, activation="sigmoid")]
    return keras.Sequential([*layers, *([keras.layers.GlobalMaxPooling2D()] if flat else [])], name=name)


@pytest.fixture(scope="module")
def photos(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pictures of three sizes as structs, files and paths, one missing; as the view ``photos``."""
    folder = tmp_path_factory.mktemp("photos")
    rows: list[Any] = [(9, None, None, None)]
    for i, size in enumerate(SIZES):
        array, file = noise(*size, 3, seed=i), folder / f"a picture {i}.png"
        Image.fromarray(array).save(file)
        rows.append((i, image.to_struct(array[..., ::-1], f"file:{file}"), file.read_bytes(), f"file:{file}"))
    schema = f"id int, image {image.schema().simpleString()}, content binary, path string"
    frame = spark.createDataFrame(rows, schema).coalesce(1).cache()
    frame.createOrReplaceTempView("photos")
    return frame


@pytest.fixture
def ask(spark: Any, photos: Any) -> Callable[..., dict[int, Any]]:
    """Return what an expression is for each row of ``photos``."""

    def ask(expression: str) -> dict[int, Any]:
        return {row.id: row.y for row in spark.sql(f"SELECT id, {expression} AS y FROM photos").collect()}

    return ask


def resized(i: int) -> np.ndarray:
    return tf.image.resize(noise(*SIZES[i], 3, seed=i).astype(np.float32), (HEIGHT, WIDTH)).numpy()


def check(got: dict[int, Any], wanted: Callable[[int], np.ndarray]) -> None:
    assert sorted(got) == [0, 1, 2, 9] and got[9] is None
    for i in range(3):
        np.testing.assert_allclose(got[i], wanted(i).ravel(), rtol=1e-4, atol=1e-6)


def test_structs_files_and_paths_of_any_size(spark: Any, photos: Any, ask: Any):
    """The function is in the catalog, resizes, and gives three kinds of columns one result, until it goes."""
    model = built("mine")
    returned = registerKerasImageUDF("classify", model)
    assert isinstance(returned, flightsvc.Model)
    assert spark.catalog.functionExists("classify")
    assert "classify" in {row[0] for row in spark.sql("SHOW USER FUNCTIONS").collect()}
    [everything] = [
        spark.sql("SELECT id, classify(image) AS a, classify(content) AS b, classify(path) AS c FROM photos")
    ]
    assert everything.schema["a"].dataType.simpleString() == "array<float>"
    rows = everything.collect()
    for column in "abc":
        check({row.id: row[column] for row in rows}, lambda i: model(resized(i)[None]).numpy())
    chained = [
        photos.selectExpr("id", "classify(image) AS y"),
        photos.select("id", F.call_function("classify", "image").alias("y")),
        photos.select("id", returned.udf()("image").alias("y")),
    ]
    for frame in chained:
        assert {row.id: row.y for row in frame.collect()} == {row.id: row.a for row in rows}
    spark.sql("DROP TEMPORARY FUNCTION classify")
    assert not spark.catalog.functionExists("classify")


def test_a_name_gets_the_model_that_was_registered_last(ask: Any, tmp_path: Path):
    """Of a file, with an output that is no list, after one with a preprocessor, and before one."""
    first, second = built("first"), built("second", 2, flat=False)
    second.save(tmp_path / "second.keras")
    for model, given, preprocessor in (
        (first, first, None),
        (first, first, loader()),
        (second, str(tmp_path / "second.keras"), None),
        (second, second, loader()),
    ):
        registerKerasImageUDF("again", given, preprocessor)
        got = ask("again(image)")
        prepared = (lambda i: exactly(i)[None]) if preprocessor else (lambda i: resized(i)[None])
        check(got, lambda i, model=model, prepared=prepared: model(prepared(i)).numpy())


def loader() -> Callable[[str], Any]:
    """Return what loads a picture in a way that no model could guess: floats, of two of the channels."""

    def load(path: str) -> Any:  # not of this module, which workers cannot import
        import numpy
        from PIL import Image

        picture = Image.open(path).resize((8, 10), Image.Resampling.NEAREST)
        return numpy.asarray(picture)[..., [1, 1, 2]].astype(numpy.float64) / 255 - 0.5

    return load


def exactly(i: int) -> np.ndarray:
    picture = Image.fromarray(noise(*SIZES[i], 3, seed=i)).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    return np.asarray(picture)[..., [1, 1, 2]].astype(np.float32) / 255 - 0.5


def test_a_preprocessor_gets_a_path_whatever_the_column_holds(spark: Any, photos: Any):
    model = built("prepared")
    registerKerasImageUDF("prepared", model, loader())
    frame = spark.sql(
        "SELECT id, prepared(image) AS a, prepared(content) AS b, prepared(path) AS c FROM photos"
    )
    rows = frame.collect()
    for column in "abc":
        check({row.id: row[column] for row in rows}, lambda i: model(exactly(i)[None]).numpy())


def test_a_preprocessor_sees_every_pixel(spark: Any):
    """Grey, colours and alpha: what a struct holds is what the file for the preprocessor holds."""
    total = keras.Sequential([keras.Input((4, 6, 3)), keras.layers.Rescaling(1.0)], name="same")
    arrays = {n: noise(4, 6, n) for n in (1, 3, 4)}
    rows = [(n, image.to_struct(array)) for n, array in arrays.items()]
    frame = spark.createDataFrame(rows, f"n int, image {image.schema().simpleString()}").coalesce(1)

    def pixels(path: str) -> Any:
        import numpy
        from PIL import Image

        array = numpy.asarray(Image.open(path))
        return numpy.stack([array] * 3, -1) if array.ndim == 2 else array[..., :3]

    registerKerasImageUDF("pixels", total, pixels)
    for row in frame.selectExpr("n", "pixels(image) AS y").collect():
        array = np.repeat(arrays[1], 3, 2) if row.n == 1 else arrays[row.n][..., [2, 1, 0]]
        np.testing.assert_array_equal(row.y, array.ravel())


@pytest.mark.parametrize(
    ("name", "module"), [("resnet50", "resnet50"), ("mobilenet_1.00_224", "mobilenet"), ("vgg16", "vgg16")]
)
def test_networks_of_keras_are_normalised(ask: Any, name: str, module: str):
    model = built(name)
    registerKerasImageUDF("normalised", model)
    preprocess = getattr(keras.applications, module).preprocess_input
    check(ask("normalised(image)"), lambda i: model(preprocess(resized(i).copy())[None]).numpy())


def test_what_cannot_be_registered(spark: Any, tmp_path: Path):
    any_size = keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalMaxPooling2D()], name="any")
    numbers = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="numbers")
    for model, said in (
        (any_size, "'any' takes pictures of any size; give it one: input_shape="),
        (numbers, r"'numbers' takes \[None, 4\], which are no pictures"),
        (tmp_path / "nothing.h5", "there is no file"),
    ):
        with pytest.raises(flightsvc.FlightsvcError, match=said):
            registerKerasImageUDF("refused", model)
    assert not spark.catalog.functionExists("refused")
    for preprocessor in (None, loader()):
        with pytest.raises(flightsvc.InvalidArgumentError, match="Spark has a built-in function 'abs'"):
            registerKerasImageUDF("abs", built("m"), preprocessor)


def test_what_a_preprocessor_cannot_load(spark: Any):
    registerKerasImageUDF("loaded", built("loaded"), loader())
    with pytest.raises(PythonException, match="No such file"):
        spark.sql("SELECT loaded('/no/such/picture.png')").collect()
