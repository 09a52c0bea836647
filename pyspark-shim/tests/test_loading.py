"""Columns that a worker loads: pictures by their paths, tensors by a function, in DataFrames and in SQL."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import fs
from pyspark import cloudpickle

import flightsvc
from flightsvc.spark import loading

SIZE = (32, 32)
MODES = {"colour": 16, "grey": 0, "alpha": 24}  # of the struct
KINDS = ("path", "content", "image")

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests


def pixels(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, channels), np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "png")
    return file.getvalue()


def mean(array: np.ndarray) -> np.ndarray:
    """What the model makes of a picture: grey has three equal channels, alpha is dropped."""
    channels = 3 if array.shape[2] == 1 else array.shape[2]
    return np.broadcast_to(array, (*SIZE, channels))[:, :, :3].mean((0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded")
    for i in range(20):
        (folder / f"{i} %20.png").write_bytes(png(pixels(i)))
    return folder


@pytest.fixture(scope="module")
def pictures(models: Path) -> flightsvc.Model:
    return flightsvc.Model(models / "pictures", preprocess={"image": flightsvc.ImageInput(SIZE)})


@pytest.fixture(scope="module")
def rows(spark: Any, folder: Path) -> Iterator[dict[str, np.ndarray | None]]:
    """View ``rows`` of good and bad pictures by name, each as path, as file and as struct; their means."""
    arrays = {"colour": pixels(1), "grey": pixels(2, 1), "alpha": pixels(3, 4)}
    expected: dict[str, np.ndarray | None] = {name: mean(array) for name, array in arrays.items()}
    frame: list[Any] = [("null", None, None, None)]
    for name, array in arrays.items():
        path = folder / f"{name}.png"
        path.write_bytes(png(array))
        order = [0] if array.shape[2] == 1 else [2, 1, 0, 3][: array.shape[2]]
        struct = (str(path), *array.shape, MODES[name], bytearray(array[:, :, order].tobytes()))
        frame.append((name, f"file:{path}", bytearray(path.read_bytes()), struct))
    (folder / "corrupt.png").write_bytes(png(pixels(4))[:200])
    corrupt = bytearray((folder / "corrupt.png").read_bytes())
    frame.append(("corrupt", str(folder / "corrupt.png"), corrupt, ("", -1, -1, -1, -1, bytearray())))
    kind = "struct<origin:string,height:int,width:int,nChannels:int,mode:int,data:binary>"
    frame = spark.createDataFrame(frame, f"name string, path string, content binary, image {kind}")
    frame.coalesce(1).createOrReplaceTempView("rows")
    yield {**expected, "null": None, "corrupt": None}
    spark.catalog.dropTempView("rows")


def same(got: dict[str, Any], expected: dict[str, np.ndarray | None]) -> None:
    assert set(got) == set(expected)
    for name, wanted in expected.items():
        assert (got[name] is None) == (wanted is None), name
        if wanted is not None:
            np.testing.assert_allclose(got[name], wanted, rtol=1e-5)


# Pictures


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_by_each_policy_in_transform(
    spark: Any, pictures: flightsvc.Model, rows: dict[str, np.ndarray | None], kind: str
):
    frame = spark.table("rows")
    got = pictures.transform(frame, inputs={"image": kind}, on_error="null")
    assert got.columns == ["name", *KINDS, "mean"]
    same({row.name: row["mean"] for row in got.collect()}, rows)
    asked = {row.name: row for row in frame.collect()}
    got = pictures.transform(frame, inputs={"image": kind}, on_error="column", error_column="why").collect()
    same({row.name: row["mean"] for row in got}, rows)
    assert [row.name for row in got] == list(asked)
    assert all(row[column] == asked[row.name][column] for row in got for column in KINDS)
    [bad] = [row for row in got if row.why is not None]
    assert bad.name == "corrupt"
    if kind == "path":
        assert bad.why.startswith(f"{bad.path}: a PNG picture") and "\n" not in bad.why
    with pytest.raises(Exception, match="InvalidArgumentError") as failed:
        pictures.transform(frame, inputs={"image": kind}).collect()
    if kind == "path":
        assert f"{bad.path}: a PNG picture" in str(failed.value)
        assert "(column 'path', input 'image' of model file:" in str(failed.value)
    good = pictures.transform(frame.where("name <> 'corrupt'"), inputs={"image": kind}).collect()
    same({**{row.name: row["mean"] for row in good}, "corrupt": None}, rows)
    nulls = pictures.transform(frame, inputs={"image": kind}, on_error="column", nulls="fail").collect()
    assert {row.name for row in nulls if row.error is not None} == {"null", "corrupt"}


def test_paths_of_every_spelling_in_order(spark: Any, pictures: flightsvc.Model, folder: Path):
    files = spark.read.format("binaryFile").option("pathGlobFilter", "* *.png").load(str(folder))
    spelt = files.selectExpr("path", "input_file_name() AS encoded", "replace(path, 'file:', '') AS plain")
    many = spark.createDataFrame(spelt.collect() * 15, spelt.schema).coalesce(1)
    assert many.count() == 300  # three record batches, each of several slices
    expected = {f"{i} %20.png": pixels(i).mean((0, 1)) for i in range(20)}
    asked = [row.path for row in many.collect()]
    for column in spelt.columns:
        got = pictures.transform(many, inputs={"image": column}).collect()
        assert [row.path for row in got] == asked
        for row in got:
            np.testing.assert_allclose(row["mean"], expected[Path(row.path).name], rtol=1e-5)


# Functions of the user


def test_a_loader_of_tensors_agrees_with_tensorflow(
    spark: Any, models: Path, oracle: Callable[..., dict[str, Any]]
):
    def load(value: int) -> np.ndarray:
        if value % 10 == 3:
            raise OSError(f"no row {value}\nfor you")
        array = np.random.default_rng(value).normal(size=8)  # float64
        return array[None] if value % 2 else array.astype(np.float32)

    model = flightsvc.Model(models / "two")
    frame = spark.range(250).selectExpr("id", "id AS x", "array(1f, 2f, 3f, 4f) AS b").repartition(2)
    inputs = {"a": flightsvc.Input("x", load=load), "b": "b"}
    got = model.transform(frame, inputs=inputs, outputs={"logits": "l"}, on_error="column").collect()
    good = [i for i in range(250) if i % 10 != 3]
    a = np.array([np.random.default_rng(i).normal(size=8) for i in good], np.float32)
    b = np.array([[1, 2, 3, 4]] * len(good), np.float32)
    expected = dict(zip(good, oracle("two", a=a, b=b)["logits"], strict=True))
    assert sorted(row.id for row in got) == list(range(250))
    for row in got:
        if row.id in expected:
            assert row.error is None
            np.testing.assert_allclose(row.l, expected[row.id], rtol=1e-4, atol=1e-6)
        else:
            assert row.l is None
            assert row.error.endswith(f": the loader raised OSError: no row {row.id} for you")
    with pytest.raises(Exception, match=r"the loader raised OSError: no row \d*3 for you \(column 'x'"):
        model.transform(frame, inputs=inputs).collect()


# SQL


def test_one_function_of_sql_takes_paths_files_and_structs(
    spark: Any, pictures: flightsvc.Model, models: Path, rows: dict[str, np.ndarray | None]
):
    ints = flightsvc.Model(models / "ints")
    flightsvc.register_udf(spark, "mean_of", ints, outputs={"total": "t"})  # it is replaced
    flightsvc.register_udf(spark, "mean_of", pictures)
    flightsvc.register_udf(spark, "try_null", pictures, on_error="null")
    flightsvc.register_udf(spark, "try_column", pictures, on_error="column")
    names = ("mean_of", "try_null", "try_column")
    assert set(names) <= {row.function for row in spark.sql("SHOW USER FUNCTIONS").collect()}
    assert spark.sql("DESCRIBE FUNCTION mean_of").first()[0].endswith("mean_of")
    every = ", ".join(f"try_null({kind}) AS {kind}, try_column({kind}) AS {kind}_or_why" for kind in KINDS)
    got = spark.sql(f"SELECT name, {every} FROM rows").collect()
    for kind in KINDS:
        same({row.name: row[kind] for row in got}, rows)
        same({row.name: row[f"{kind}_or_why"]["mean"] for row in got}, rows)
        reasons = {row.name: row[f"{kind}_or_why"].error for row in got}
        assert {name for name, reason in reasons.items() if reason is not None} == {"corrupt"}
    for query in ("mean_of(path)", "mean_of(image => content)", "mean_of(image)"):
        with pytest.raises(Exception, match="InvalidArgumentError") as failed:
            spark.sql(f"SELECT {query} FROM rows").collect()
        assert query != "mean_of(path)" or "corrupt.png: a PNG picture" in str(failed.value)
    for query, text in (
        ("mean_of(1)", "is int32, input 'image' is made from pictures and needs string (paths or URIs)"),
        ("mean_of(path, path)", "mean_of(image) of model file:"),
        ("mean_of(picture => path)", "was called with these arguments: 0 by position, picture"),
    ):
        with pytest.raises(Exception, match="InvalidArgumentError") as failed:
            spark.sql(f"SELECT {query} FROM rows").collect()
        assert text in str(failed.value)
    assert spark.sql("SELECT mean_of(NULL)").first() == (None,)
    in_python = spark.table("rows").select("name", pictures.udf(on_error="null")("path").alias("m"))
    same({row.name: row.m for row in in_python.collect()}, rows)
    flightsvc.register_udf(spark, "mean_of", ints, outputs={"total": "t"})
    assert spark.sql("SELECT mean_of(array(1, 2, 3))").first() == (6,)
    for name in names:
        spark.sql(f"DROP TEMPORARY FUNCTION {name}")
        assert not spark.catalog.functionExists(name)


def test_a_loader_in_sql(spark: Any, pictures: flightsvc.Model):
    def load(text: str) -> Any:
        if text == "none":
            return None
        array = pixels(int(text))
        return {0: array, 1: array.astype(np.float64), 2: png(array)}[int(text) % 3]

    inputs = {"image": flightsvc.Input("seed", load=load)}
    flightsvc.register_udf(spark, "mean_of_seed", pictures, inputs=inputs, on_error="column")
    described = [row[0].split() for row in spark.sql("DESCRIBE FUNCTION mean_of_seed").collect()]
    assert ["Input:", "seed", "STRING"] in described
    query = "SELECT id, mean_of_seed(if(id = 7, 'none', string(id))) AS r FROM range(0, 150, 1, 1)"
    got = spark.sql(query).collect()
    assert [row.id for row in got] == list(range(150))
    for row in got:
        if row.id == 7:
            assert row.r["mean"] is None
            assert row.r.error.startswith("none: the loader returned NoneType, pictures are bytes of a file")
        else:
            assert row.r.error is None
            np.testing.assert_allclose(row.r["mean"], pixels(row.id).mean((0, 1)), rtol=1e-5)
    spark.sql("DROP TEMPORARY FUNCTION mean_of_seed")


# In one process


def predict(client: flightsvc.Client, model: Any, values: list[Any], load: Any, **options: Any) -> Any:
    [name] = model.inputs
    inputs = {name: flightsvc.Input("x", load=load)}
    table = client.predict(model, pa.table({"x": values}), inputs=inputs, **options)
    assert table["x"].to_pylist() == values
    return table.to_pylist()


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (
            None,
            "the loader returned NoneType, input 'i' (int64[-1,3]) wants a NumPy array, one row of it: [3]",
        ),
        ([1, 2, 3], "the loader returned list, "),
        (b"abc", "the loader returned bytes, "),
        (np.array([1, None, 3]), "the loader returned an array [3] of object, "),
        (np.zeros((2, 3), np.int64), "the loader returned an array [2, 3] of int64, "),
        (np.zeros(4, np.int64), "the loader returned an array [4] of int64, "),
        (np.zeros(3), "the loader returned an array [3] of float64, "),
        (np.array([1, 2, 2**63], np.uint64), "the loader returned an array [3] of uint64, "),
    ],
)
def test_what_a_loader_may_not_return(client: flightsvc.Client, models: Path, returned: Any, reason: str):
    def load(value: str) -> Any:
        return returned if value == "b" else np.array([[1, 2, 3]], np.uint8)

    model = flightsvc.Model(models / "ints")
    first, second = predict(client, model, ["a", "b"], load, on_error="column")
    assert (first["total"], first["error"]) == (6, None)
    assert second["total"] is None and second["error"].startswith(f"b: {reason}")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"^b: .*on_error='null' or on_error='column'$"):
        predict(client, model, ["a", "b"], load)


def test_bytes_for_an_input_of_strings(client: flightsvc.Client, models: Path):
    got = predict(client, flightsvc.Model(models / "strings"), [1, None, 3], lambda n: b"x" * n)
    assert [row["length"] for row in got] == [1, None, 3]


def test_few_rows_are_in_memory(client: flightsvc.Client, pictures: flightsvc.Model):
    at_once: list[int] = []
    big = np.zeros((512, 1024, 3), np.uint8)  # 1.5 MiB: five in a slice
    real = loading.Loading._slice

    def slice_of(self: Any, batch: Any, rows: Any, kinds: Any) -> Any:
        at_once.append(len(rows))
        return real(self, batch, rows, kinds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading.Loading, "_slice", slice_of)
        predict(client, pictures, list(range(12)), lambda _: big)
        assert at_once == [5, 5, 2]
        at_once.clear()
        predict(client, pictures, list(range(150)), lambda seed: png(pixels(seed)))
        assert at_once == [64, 64, 22]


def test_what_read_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a b").write_bytes(b"1")
    for text in (
        f"{tmp_path}/a b",
        f"file:{tmp_path}/a b",
        f"file:{tmp_path}/a%20b",
        f"FILE://{tmp_path}/a%20b",
    ):
        assert loading.read(text) == b"1"
    with open(tmp_path / "large", "wb") as file:
        file.truncate(loading.VALUE_BYTES + 1)
    os.mkfifo(tmp_path / "pipe")
    for text, reason in (
        (f"{tmp_path}/a%20b", "there is no such file; workers read it, so each of their hosts needs it"),
        (f"{tmp_path}/a b/c", "a part of its path is not a folder"),
        (f"file:{tmp_path}", "it is a folder, not a file"),
        (f"{tmp_path}/large", "it is larger than 255 MiB"),
        (f"{tmp_path}/pipe", "a pipe"),
        ("nowhere://a/b", r"workers cannot read nowhere: URIs .*Input\(<column>, load="),
        ("", "it is not a path"),
        ("a\0b", "it is not a path"),
        ("x" * 300, "it cannot be read: File name too long"),
    ):
        with pytest.raises(flightsvc.InvalidArgumentError, match=reason):
            loading.read(text)
    if os.getuid():
        (tmp_path / "a b").chmod(0)
        with pytest.raises(flightsvc.InvalidArgumentError, match="no permission"):
            loading.read(f"{tmp_path}/a b")
        (tmp_path / "a b").chmod(0o600)
    asked: list[str] = []

    def from_uri(uri: str) -> tuple[Any, str]:
        asked.append(uri)
        return fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "bucket/"

    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "c d").write_bytes(b"2")
    monkeypatch.setattr(fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    assert [loading.read(f"made-up://bucket/{name}") for name in ("c d", "c%20d")] == [b"2", b"2"]
    assert asked == ["made-up://bucket/"]
    for text, reason in (("made-up://bucket/e", "no such file$"), ("made-up://bucket/", "a folder")):
        with pytest.raises(flightsvc.InvalidArgumentError, match=reason):
            loading.read(text)


def test_what_an_input_refuses(spark: Any, models: Path):
    for entry, text in (
        ({"load": "me"}, "it is a function of one value"),
        ({"load": len, "encoding": "raw"}, "leave out one"),
    ):
        with pytest.raises(flightsvc.InvalidArgumentError, match=text):
            flightsvc.Input("x", **entry)
    assert flightsvc.Input("x", load=len) == flightsvc.Input("x", load=len)
    assert flightsvc.Input("x", load=len, pad=0).wire() == {"column": "x", "pad": 0}
