"""Columns that a worker loads: pictures by their paths, tensors by a function, in DataFrames and in SQL."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flightsvc

SIZE = (32, 32)
MODES = {"colour": 16, "grey": 0, "alpha": 24}  # of the struct
KINDS = ("path", "content", "image")


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
