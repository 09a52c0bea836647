"""The pages of docs/ about stages, networks, pictures and SQL: what they show runs as it stands there."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from figures import PROVE, report

import flightsvc

BLOCK = re.compile(r"^```(python|sql)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"--.*$", re.MULTILINE)
PHOTOS = {"chelsea.png": "cat", "rocket.jpg": "rocket", "coffee.png": "cat", "astronaut.png": "rocket"}


@pytest.fixture
def at(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that relative paths start from, in Python and in Spark, with photographs in ``photos``."""
    import skimage

    for name, label in PHOTOS.items():
        folder = tmp_path / "photos" / f"label={label}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(skimage.__file__).parent / "data" / name, folder / name)
    monkeypatch.chdir(tmp_path)
    hadoop = spark._jvm.org.apache.hadoop.fs
    files = hadoop.FileSystem.get(spark._jsc.hadoopConfiguration())
    before = files.getWorkingDirectory()
    files.setWorkingDirectory(hadoop.Path(str(tmp_path)))
    yield tmp_path
    files.setWorkingDirectory(before)


def small(size: tuple[int, int], classes: int) -> Any:
    """A model of Keras for pictures."""
    import keras

    layers = keras.layers
    inputs = keras.Input((*size, 3), name="image")
    means = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, strides=2)(inputs))
    return keras.Model(inputs, layers.Dense(classes, "softmax", name="probabilities")(means))


def lite0() -> None:
    """A SavedModel that is called as the pages call it."""
    import keras

    model = small((224, 224), 10)
    keras.Model(model.input, {"probabilities": model.output}).export("models/lite0", verbose=False)


def in_folders(spark: Any) -> Any:
    """The photographs' paths and labels."""
    files = Path("photos").resolve().glob("*/*")
    rows = [(str(path), float(path.parent.name == "label=cat")) for path in files]
    return spark.createDataFrame(rows, "path string, label double").coalesce(1)


def of_ml(spark: Any) -> dict[str, Any]:
    import keras

    dense = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(2)])
    dense.save("dense.keras")
    small((8, 6), 3).save("mean.keras")
    schema = "id int, x array<double>"
    spark.createDataFrame([(2, [1.0, 2.0, 3.0, 4.0])], schema).write.parquet("arriving")
    return {"labelled": in_folders(spark)}


def of_networks(spark: Any) -> dict[str, Any]:
    return {}


def of_sparkdl(spark: Any) -> dict[str, Any]:
    return {"model": small((48, 64), 2)}


def of_images(spark: Any) -> dict[str, Any]:
    import keras

    lite0()
    dense = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(2)])
    np.save("features.npy", np.arange(4.0))
    photos = flightsvc.image.read_images(spark, "photos")
    return {
        "paths": in_folders(spark),
        "model": flightsvc.Model(dense),
        "df": spark.createDataFrame([(str(Path("features.npy").resolve()),), ("none.npy",)], "uri string"),
        "row": photos.first(),
        "numpy": np,
    }


def of_sql(spark: Any) -> dict[str, Any]:
    import tensorflow as tf

    lite0()
    shutil.copytree(ROOT / "build" / "models" / "two", "models/two")
    sums = tf.Module()
    sums.call = tf.function(
        lambda x: {"sum": tf.ensure_shape(tf.reduce_sum(x, axis=-1), [None])},
        input_signature=[tf.TensorSpec(None, tf.float64, "x")],
    )
    tf.saved_model.save(sums, "models/sums", sums.call)
    files = spark.read.format("binaryFile").load("photos").select("path", "content", "label")
    structs = files.withColumn("image", flightsvc.image.decode()("content"))
    structs.createOrReplaceTempView("images")
    files.createOrReplaceTempView("files")
    pair = spark.createDataFrame([([1.0] * 8, [2.0] * 4)], "x array<float>, y array<float>")
    pair.createOrReplaceTempView("pairs")
    return {"df": files}


PAGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ml": of_ml,
    "networks": of_networks,
    "sparkdl": of_sparkdl,
    "images": of_images,
    "sql": of_sql,
}


def run(code: str, page: str, line: int, names: dict[str, Any]) -> None:
    """Run a block of Python; a DataFrame that a statement alone makes is computed."""
    tree = ast.increment_lineno(ast.parse(code), line)
    for statement in tree.body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), page, "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), page, "eval"), names)
        if hasattr(value, "collect"):
            value.collect()


@pytest.mark.parametrize("page", PAGES if PROVE else ["ml", "sparkdl"])
def test_what_a_page_shows_runs(spark: Any, at: Path, page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = [*BLOCK.finditer(text)]
    assert blocks
    names = {"spark": spark, "flightsvc": flightsvc, "__name__": "__main__", **PAGES[page](spark)}
    for block in blocks:
        kind, code = block.groups()
        if kind == "python":
            run(code, f"{page}.md", text[: block.start()].count("\n") + 1, names)
            continue
        for statement in COMMENT.sub("", code).split(";"):
            if statement.strip():
                spark.sql(statement).collect()
    for query in spark.streams.active:
        query.processAllAvailable()
        query.stop()
        assert query.exception() is None
    report(**{f"docs_{page}_blocks": len(blocks)})
