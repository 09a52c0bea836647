"""flightsvc.image: pictures of files, of columns and of arrays."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import make_pictures
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyspark.errors import AnalysisException
from pyspark.sql import functions as F

import flightsvc
from flightsvc import image

SPARK_STRUCT = (
    "struct<origin:string,height:int,width:int,nChannels:int,mode:int,data:binary>"  # what Spark prints
)


def encoded(picture: np.ndarray) -> bytes:
    return make_pictures.encoded(Image.fromarray(picture), "PNG")


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures and a text in two folders by label, and one more picture further down."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        path = folder / f"label={'ab'[i % 2]}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(noise(5 + i, 9, 3, seed=i)))
    (folder / "label=b" / "7.txt").write_bytes(b"no picture")
    return folder


def origins(rows: list[Any]) -> list[str]:
    return sorted(Path(row.image.origin).name for row in rows if row.image is not None)


# Arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_array_to_struct_and_back(dtype: Any, channels: int):
    array = noise(4, 6, channels).astype(dtype)
    row = image.to_struct(array, "here.png")
    assert list(row.asDict()) == [field.name for field in image.schema()]
    assert (row.origin, row.height, row.width, row.nChannels) == ("here.png", 4, 6, channels)
    assert row.mode == {1: 0, 3: 16, 4: 24}[channels] + (5 if dtype is np.float32 else 0)
    for back in (row, row.asDict()):
        got = image.to_array(back)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, array)


def test_arrays_of_two_dimensions_are_grey_and_nothing_is_copied():
    row = image.to_struct(noise(4, 6))
    assert (row.nChannels, row.mode, row.origin) == (1, 0, "")
    got = image.to_array(row)
    assert got.shape == (4, 6, 1)
    assert np.shares_memory(got, np.frombuffer(row.data, np.uint8)) and not got.flags.writeable
    turned = noise(6, 4, 3).transpose(1, 0, 2)
    np.testing.assert_array_equal(image.to_array(image.to_struct(turned)), turned)
    big = noise(4, 6).astype(">f4")
    np.testing.assert_array_equal(image.to_array(image.to_struct(big))[:, :, 0], big)


def test_schema_is_that_of_spark(spark: Any, folder: Path):
    assert image.schema() == spark.read.format("image").load(str(folder)).schema["image"].dataType


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3)), "uint8 or float32, this array is of float64"),
        (noise(2, 2, 2), r"1, 3 or 4 channels, this array is \[2, 2, 2\]"),
        (noise(1, 2, 2, 3), r"this array is \[1, 2, 2, 3\]"),
        (noise(0, 2, 3), r"this array is \[0, 2, 3\]"),
        (noise(3), r"this array is \[3\]"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str):
    with pytest.raises(flightsvc.InvalidArgumentError, match=message):
        image.to_struct(array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": -1, "height": -1, "width": -1, "data": b""}, "mode -1: Spark could not read it"),
        ({"mode": 17}, r"mode 17; modes are \[0, 5, 16, 21, 24, 29\]"),
        ({"height": 3}, r"do not match: mode 16 \(3 x uint8\), 3 x 2 pixels, 3 channels, 12 bytes"),
        ({"nChannels": 1}, "1 channels"),
        ({"data": b"x"}, "1 bytes"),
    ],
)
def test_structs_that_are_no_arrays(change: dict[str, Any], message: str):
    with pytest.raises(flightsvc.InvalidArgumentError, match=message):
        image.to_array(image.to_struct(noise(2, 2, 3)).asDict() | change)
    with pytest.raises(flightsvc.InvalidArgumentError, match="the picture is null"):
        image.to_array(None)


# Files


def test_read_images_is_lazy_and_keeps_folders(spark: Any, folder: Path):
    frame = image.read_images(spark, str(folder), on_error="column", error_column="why")
    assert frame.schema.simpleString() == f"struct<image:{SPARK_STRUCT},label:string,why:string>"
    rows = frame.collect()
    assert origins(rows) == [f"{i}.png" for i in range(6)]
    [bad] = [row for row in rows if row.why is not None]
    assert bad.image is None and bad.label == "b"
    assert bad.why.startswith(f"file:{folder}/label=b/7.txt: ") and "no picture" not in bad.why
    for row in rows:
        if row.image is not None:
            i = int(Path(row.image.origin).stem)
            assert row.label == "ab"[i % 2] and row.image.mode == 16
            np.testing.assert_array_equal(image.to_array(row.image)[:, :, ::-1], noise(5 + i, 9, 3, seed=i))


def test_read_images_asks_for_no_more_than_is_used(spark: Any, folder: Path):
    frame = image.read_images(spark, str(folder))
    assert frame.where("label = 'a'").count() == 3  # the text lies in the other folder
    assert origins(frame.where("label = 'a'").collect()) == ["0.png", "2.png", "4.png"]
    assert frame.count() == 7  # nobody looked at a picture
    assert len(frame.limit(1).collect()) <= 1


def test_options_of_the_file_source(spark: Any, folder: Path):
    def read(path: Any, **options: Any) -> Any:
        return image.read_images(spark, path, **options)

    assert origins(read(str(folder), pathGlobFilter="*.png").collect()) == [f"{i}.png" for i in range(6)]
    flat = read(str(folder), pathGlobFilter="*.png", recursiveFileLookup=True)
    assert flat.columns == ["image"] and flat.count() == 6
    two = [str(folder / "label=a"), str(folder / "label=b" / "1.png")]
    assert origins(read(two).collect()) == ["0.png", "1.png", "2.png", "4.png"]
    assert read(two, basePath=str(folder)).columns == ["image", "label"]


def test_the_settings_are_those_of_the_session_given(
    spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    other, asked = spark.newSession(), []
    other.conf.set("spark.flightsvc.retryTimeout", "61s")
    monkeypatch.setattr(image, "settings_of", lambda conf: asked.append(conf) or {})
    image.read_images(other, str(folder))
    assert [conf["spark.flightsvc.retryTimeout"] for conf in asked] == ["61s"]


def test_empty_files_have_no_row(spark: Any, tmp_path: Path):
    """No file source of Spark lists them, so it is said in the documentation that they are left out."""
    (tmp_path / "0.png").write_bytes(encoded(noise(3, 3)))
    (tmp_path / "1.png").write_bytes(b"")
    assert spark.read.format("image").load(str(tmp_path)).count() == 1
    assert origins(image.read_images(spark, str(tmp_path)).collect()) == ["0.png"]
    rows = spark.createDataFrame([(b"",)], "content binary")
    with pytest.raises(Exception, match="InvalidArgumentError: 0 bytes"):
        rows.select(image.decode()("content")).collect()


def test_read_images_refuses(spark: Any, folder: Path, tmp_path: Path):
    with pytest.raises(flightsvc.InvalidArgumentError, match="on_error is 'skip'; it is one of fail, null"):
        image.read_images(spark, str(folder), on_error="skip")
    with pytest.raises(flightsvc.InvalidArgumentError, match="two columns 'label'"):
        image.read_images(spark, str(folder), on_error="column", error_column="Label")
    (tmp_path / "image=1").mkdir()
    (tmp_path / "image=1" / "x.png").write_bytes(encoded(noise(3, 3)))
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"two columns 'image'; .*recursiveFileLookup"):
        image.read_images(spark, str(tmp_path))
    with pytest.raises(flightsvc.InvalidArgumentError, match="one path"):
        image.read_images(spark, [str(folder)], stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_folders_called_as_a_column_of_the_file_source(spark: Any, tmp_path: Path, stream: bool):
    for name in ("path", "length"):
        inner = tmp_path / name / f"{name}=1" / "a=2"
        inner.mkdir(parents=True)
        (inner / "x.png").write_bytes(encoded(noise(3, 3)))
        with pytest.raises(
            flightsvc.InvalidArgumentError, match=rf"a folder is named {name}=\.\.\., .*rename"
        ):
            image.read_images(spark, str(tmp_path / name), stream=stream)
    flat = image.read_images(spark, str(tmp_path / "length" / "length=1" / "a=2"), stream=stream)
    assert flat.columns == ["image"]


def test_folders_of_any_other_name(spark: Any, tmp_path: Path):
    inner = tmp_path / "_picture=1" / "picture=2" / "origin=3" / "a.b`c=4"
    inner.mkdir(parents=True)
    (inner / "x.png").write_bytes(encoded(noise(3, 3)))
    # Spark takes a folder that begins with _ for hidden, unless it is one of a column.
    frame = image.read_images(spark, str(tmp_path), on_error="column")
    assert frame.columns == ["image", "_picture", "picture", "origin", "a.b`c", "error"]
    [row] = frame.collect()
    assert row[1:] == (1, 2, 3, 4, None) and row.image.height == 3


def test_a_stream_goes_on_with_new_files(spark: Any, tmp_path: Path):
    inbox = tmp_path / "inbox" / "day=1"
    inbox.mkdir(parents=True)
    (inbox / "0.png").write_bytes(encoded(noise(4, 5, 3)))
    frame = image.read_images(spark, str(inbox.parent), stream=True, on_error="column", maxFilesPerTrigger=1)
    assert frame.isStreaming and frame.columns == ["image", "day", "error"]

    def run() -> list[Any]:
        query = (
            frame.writeStream.format("parquet")
            .option("checkpointLocation", str(tmp_path / "checkpoint"))
            .option("path", str(tmp_path / "out"))
            .trigger(availableNow=True)
            .start()
        )
        assert query.awaitTermination(60)
        return spark.read.parquet(str(tmp_path / "out")).collect()

    assert origins(run()) == ["0.png"]
    (inbox / "1.png").write_bytes(encoded(noise(7, 5)))
    (inbox / "2.png").write_bytes(b"no picture")
    rows = run()
    assert origins(rows) == ["0.png", "1.png"]
    assert sorted(row.error is None for row in rows) == [False, True, True]
    assert {row.day for row in rows} == {1}


# Columns


@pytest.fixture(scope="module")
def table(spark: Any) -> Any:
    """A picture, no picture and a null, as files."""
    rows = [(0, encoded(noise(20, 30, 3)), "a.png"), (1, b"nothing", "b.png"), (2, None, "c.png")]
    return spark.createDataFrame(rows, "id int, content binary, path string").repartition(1)


def test_decode_of_a_column(spark: Any, table: Any):
    frame = table.select("id", image.decode(on_error="column", error_column="why")("content").alias("r"))
    assert frame.schema["r"].dataType.simpleString() == f"struct<image:{SPARK_STRUCT},why:string>"
    good, bad, null = (row.r for row in frame.orderBy("id").collect())
    assert good.image.origin == "" and good.why is None
    np.testing.assert_array_equal(image.to_array(good.image)[:, :, ::-1], noise(20, 30, 3))
    assert bad.image is None and bad.why and "nothing" not in bad.why
    assert null.image is None and null.why is None
    named = table.where("id = 0").select(image.decode()("content", "path").alias("image"))
    assert origins(named.collect()) == ["a.png"]
    with pytest.raises(Exception, match=r"InvalidArgumentError: b\.png: "):
        table.select(image.decode()("content", "path").alias("image")).collect()


def test_decode_in_sql(spark: Any, table: Any):
    table.createOrReplaceTempView("some_files")
    spark.udf.register("decoded", image.decode(on_error="null"))
    rows = spark.sql("SELECT id, decoded(content).height AS h FROM some_files ORDER BY id").collect()
    assert [row.h for row in rows] == [20, None, None]
    spark.sql("DROP TEMPORARY FUNCTION decoded")


def test_resize_of_structs_is_that_of_tensorflow(spark: Any):
    import tensorflow as tf

    cases: list[tuple[dict[str, Any], Any]] = [
        ({}, lambda p: tf.image.resize(p[:, 2:27], (8, 10))),
        (
            {"fit": "pad", "resize": "bicubic", "antialias": True},
            lambda p: tf.image.resize_with_pad(p, 8, 10, "bicubic", antialias=True),
        ),
    ]
    arrays = [noise(20, 30, 3), noise(20, 30, 3, seed=2).astype(np.float32)]
    rows = [(image.to_struct(array, array.dtype.name),) for array in arrays]
    frame = spark.createDataFrame([*rows, (None,)], f"image {SPARK_STRUCT}").repartition(1)
    resized = [image.resize((8, 10), **how)("image").alias(f"r{i}") for i, (how, _) in enumerate(cases)]
    got = {row.r0.origin: row for row in frame.select(*resized).collect() if row.r0 is not None}
    for array, (given,) in zip(arrays, rows, strict=True):
        for i, (how, tensor) in enumerate(cases):
            picture = got[given.origin][f"r{i}"]
            assert (picture.height, picture.width, picture.mode) == (8, 10, given.mode)
            want = tensor(array.astype(np.float32)).numpy()
            if array.dtype == np.uint8:
                want = np.clip(np.rint(want), 0, 255).astype(np.uint8)
            np.testing.assert_allclose(image.to_array(picture), want, 1e-4, 1e-3, err_msg=str(how))


def test_resize_of_files_and_channels(spark: Any, table: Any):
    grey = table.select(image.resize((4, 6), channels="L", on_error="null")("content", "path").alias("image"))
    [row] = [row.image for row in grey.collect() if row.image is not None]
    assert (row.origin, row.height, row.width, row.nChannels, row.mode) == ("a.png", 4, 6, 1, 0)
    alpha = spark.createDataFrame([(image.to_struct(noise(9, 9, 4)),)], f"image {SPARK_STRUCT}")
    assert alpha.select(image.resize((4, 4))("image").alias("i")).first().i.mode == 24
    assert alpha.select(image.resize((4, 4), channels="BGR")("image").alias("i")).first().i.mode == 16


def test_resize_refuses_on_the_driver(spark: Any):
    for how in ({"resize": "lanczos"}, {"fit": "squeeze"}, {"channels": "RGB"}, {"on_error": "skip"}):
        [name] = how
        with pytest.raises(flightsvc.InvalidArgumentError, match=name):
            image.resize((4, 4), **how)
    with pytest.raises(flightsvc.InvalidArgumentError):
        image.resize((0, 4))
    with pytest.raises(flightsvc.InvalidArgumentError, match="error_column is 'image'"):
        image.decode(on_error="column", error_column="image")
    with pytest.raises(flightsvc.InvalidArgumentError, match="antialias"):
        image.resize((4, 4), resize="nearest", antialias=True)


def test_columns_of_other_types_are_refused_before_a_task(spark: Any, table: Any):
    frame = table.selectExpr("*", "array(content) AS many", "named_struct('data', content) AS part")
    for column, kind in (("id", "int"), ("path", "string"), ("many", "array<binary>"), ("part", "struct<")):
        with pytest.raises(AnalysisException, match=f"decode: column {column} is {kind}.*; pictures are bin"):
            frame.select(image.decode()(column))
    with pytest.raises(AnalysisException, match=r"resize: column id is int; the origin .* AS STRING"):
        frame.select(image.resize((4, 4))(F.col("content"), F.col("id")))
    for columns in ((), ("content", "path", "id")):
        with pytest.raises(flightsvc.InvalidArgumentError, match=f"it got {len(columns)} columns"):
            image.decode()(*columns)
    first = frame.where("id = 0")
    nameless = first.select(image.decode()("content", F.lit(None)).alias("image")).first().image
    assert nameless.origin is None and nameless.height == 20


def test_columns_of_other_types_in_sql_fail_in_words():
    files, texts, numbers = pa.array([b"x"]), pa.array(["a"]), pa.array([1])
    for columns, message in (
        (numbers, r"pictures are binary.*this column is int64"),
        (pa.array([{"data": 1}]), r"pictures are binary.*this column is struct"),
        ((files, numbers), r"origin of pictures is text.*is int64"),
        ((files, texts, numbers), "there are 3 columns"),
    ):
        with pytest.raises(flightsvc.InvalidArgumentError, match=message):
            list(image._slices(columns))


def test_large_types_of_arrow(spark: Any, table: Any, folder: Path):
    spark.conf.set("spark.sql.execution.arrow.useLargeVarTypes", "true")
    try:
        assert len(origins(image.read_images(spark, str(folder), on_error="null").collect())) == 6
        decoded = table.select(image.decode(on_error="null")("content", "path").alias("image"))
        assert origins(decoded.collect()) == ["a.png"]
        small = decoded.select(image.resize((4, 6))("image").alias("image"))
        assert [row.image.width for row in small.collect() if row.image] == [6]
    finally:
        spark.conf.unset("spark.sql.execution.arrow.useLargeVarTypes")


def test_slices_stay_small():
    sizes = [1 << 20] * 5 + [9 << 20] + [10] * 150
    column = pa.array([bytes(size) for size in sizes], pa.binary())
    pieces = list(image._slices(column))
    assert [piece.num_rows for piece in pieces] == [4, 1, 1, 64, 64, 22]
    assert pa.Table.from_batches(pieces).column("picture").to_pylist() == column.to_pylist()
    assert list(image._slices(column[:0])) == []
    structs = pa.array([{"origin": "x", "data": b"123"}, None])
    [piece] = image._slices(structs)
    assert piece.column("origin")[0].as_py() == "x" and not piece.column("picture")[1].is_valid


def test_a_picture_too_large_to_be_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image, "ROW_BYTES", (1 << 20) + 3)
    [piece] = image._slices(pa.array([b"123", b"1234"]))
    assert piece.column("picture").to_pylist() == [b"123", None]
    assert piece.column("error").to_pylist()[0] is None and "MiB" in piece.column("error").to_pylist()[1]


def test_a_picture_of_more_pixels_than_a_row_holds(spark: Any):
    side = 10_000
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    table = spark.createDataFrame(
        [(0, make_pictures.png(side, side, 8, 2, rows)), (1, encoded(noise(4, 4)))], "id int, content binary"
    ).repartition(1)
    decoded = table.select("id", image.decode(on_error="column")("content").alias("r")).orderBy("id")
    large, small = (row.r for row in decoded.collect())
    assert large.image is None and "286 MiB" in large.error
    assert small.image is not None


def test_the_name_of_the_built_in_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "image").mkdir()
    monkeypatch.chdir(tmp_path)
    assert flightsvc.Model("image").reference == "image"
    assert flightsvc.Model("./image").reference.startswith("file:")
