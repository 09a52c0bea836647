"""flightsvc.sparkdl.image.imageIO: pictures as arrays, structs, files and in Pillow's hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from make_pictures import ORIENTATION, encoded, sixteen_bits
from PIL import Image
from pyspark.errors import PythonException
from pyspark.sql import functions as F

import flightsvc
from flightsvc import image
from flightsvc.sparkdl.image import imageIO

FIELDS = ["origin", "height", "width", "nChannels", "mode", "data"]
ALL = [(channels, dtype) for channels in (1, 3, 4) for dtype in ("uint8", "float32")]


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures and one file that is none."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(encoded(Image.fromarray(noise(7, 5, 3, seed=ord(name))), "PNG"))
    (folder / "c.png").write_bytes(b"no picture")
    return folder


def by_name(frame: Any) -> dict[str, Any]:
    return {Path(row.image.origin).name: row.image for row in frame.collect() if row.image is not None}


# Arrays and structs


@pytest.mark.parametrize(("channels", "dtype"), ALL)
def test_arrays_become_structs_and_back_exactly(channels: int, dtype: str):
    array = noise(4, 6, channels).astype(dtype) / np.asarray(1 if dtype == "uint8" else 3, dtype)
    array = array.astype(dtype)
    for given in (array, array[None]):
        row = imageIO.imageArrayToStruct(given, origin="drawn")
        assert list(row.asDict()) == FIELDS == image.schema().names
        assert (row.origin, row.height, row.width, row.nChannels) == ("drawn", 4, 6, channels)
        kind = imageIO.imageTypeByOrdinal(row.mode)
        assert (kind.nChannels, kind.dtype) == (channels, dtype) and kind == imageIO.imageTypeByName(
            kind.name
        )
        back = imageIO.imageStructToArray(row)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, array)


def test_structs_go_through_a_function_of_python(spark: Any):
    rows = [imageIO.imageArrayToStruct(noise(4, 6, n).astype(dtype), "here") for n, dtype in ALL]
    frame = spark.createDataFrame([(row,) for row in rows], f"image {image.schema().simpleString()}")
    again = F.udf(
        lambda picture: imageIO.imageArrayToStruct(imageIO.imageStructToArray(picture), picture.origin),
        image.schema(),
    )
    got = [row.image for row in frame.coalesce(1).select(again("image").alias("image")).collect()]
    assert got == rows
    assert {(row.height, row.width) for row in got} == {(4, 6)}


def test_what_is_no_picture_is_refused():
    for array, said in (
        (np.zeros((2, 4, 4, 3), np.uint8), "first dimension of a 4-d image array is expected to be 1"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
    ):
        with pytest.raises(ValueError, match=said):
            imageIO.imageArrayToStruct(array)
    for call, argument in (
        (imageIO.imageTypeByOrdinal, -1),
        (imageIO.imageTypeByOrdinal, 6),
        (imageIO.imageTypeByName, "CV_64FC1"),
    ):
        with pytest.raises(KeyError, match="unsupported image type"):
            call(argument)
    with pytest.raises(flightsvc.NotFoundError, match="Spark gives -1 to a picture that it cannot read"):
        imageIO.imageTypeByOrdinal(-1)


def test_channel_orders():
    colours, alpha, grey = noise(4, 6, 3), noise(4, 6, 4), noise(4, 6, 1)
    np.testing.assert_array_equal(imageIO.fixColorChannelOrdering("RGB", colours), colours[..., ::-1])
    np.testing.assert_array_equal(imageIO.fixColorChannelOrdering("RGB", alpha), alpha[..., [2, 1, 0, 3]])
    assert imageIO.fixColorChannelOrdering("BGR", colours) is colours
    for array in (grey, grey[..., 0]):
        assert imageIO.fixColorChannelOrdering("L", array) is array
    for order, array in (("L", colours), ("HSV", colours)):
        with pytest.raises(ValueError, match=r"[Cc]hannel order"):
            imageIO.fixColorChannelOrdering(order, array)


# Pillow

RGB = noise(8, 6, 3)
RGBA = noise(8, 6, 4)
GREY = noise(8, 6)


def transparent_palette() -> Image.Image:
    picture = Image.fromarray(GREY % 4).copy()
    picture = picture.convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    picture.info["transparency"] = 2
    return picture


PICTURES = {
    "L": (Image.fromarray(GREY), GREY[..., None]),
    "1": (Image.fromarray(GREY > 127), np.where(GREY > 127, 255, 0)[..., None]),
    "RGB": (Image.fromarray(RGB), RGB[..., ::-1]),
    "RGBA": (Image.fromarray(RGBA), RGBA[..., [2, 1, 0, 3]]),
    "LA": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(RGB[..., 0])]),
        np.stack([GREY, GREY, GREY, RGB[..., 0]], -1),
    ),
    "P": (
        Image.fromarray(RGB).quantize(16),
        np.asarray(Image.fromarray(RGB).quantize(16).convert("RGB"))[..., ::-1],
    ),
    "CMYK": (
        Image.merge(
            "CMYK", [Image.fromarray(255 - RGB[..., i]) for i in range(3)] + [Image.new("L", (6, 8))]
        ),
        RGB[..., ::-1],
    ),
}


@pytest.mark.parametrize("mode", PICTURES)
def test_pictures_of_pillow(mode: str):
    picture, wanted = PICTURES[mode]
    assert picture.mode == mode
    got = imageIO.PIL_to_imageStruct(picture)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)
    back = imageIO.imageStructToPIL(imageIO.imageArrayToStruct(got))
    assert back.mode == {1: "L", 3: "RGB", 4: "RGBA"}[wanted.shape[2]]
    np.testing.assert_array_equal(imageIO.PIL_to_imageStruct(back), wanted)
    if mode != "CMYK":
        np.testing.assert_array_equal(imageIO.PIL_decode(encoded(picture, "PNG")), wanted)


def test_files_by_pillow_have_the_channels_of_the_sidecar(spark: Any, tmp_path: Path):
    """Alpha, a transparent palette, 16 bits, CMYK, a picture that lies on its side."""
    smooth = Image.fromarray(RGB).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    files = {
        "alpha": encoded(Image.fromarray(RGBA), "PNG"),
        "palette": encoded(transparent_palette(), "PNG", transparency=2),
        "sixteen": sixteen_bits(GREY),
        "cmyk": encoded(smooth.convert("CMYK"), "JPEG", quality=95),
        "turned": encoded(smooth, "JPEG", quality=95, exif=exif),
        "grey": encoded(smooth.convert("L"), "JPEG", quality=95),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    sidecars = by_name(image.read_images(spark, str(tmp_path)))
    pillows = by_name(imageIO.readImagesWithCustomFn(str(tmp_path), imageIO.PIL_decode, onError="fail"))
    assert sidecars.keys() == pillows.keys() == files.keys()
    for name, picture in pillows.items():
        here, there = imageIO.imageStructToArray(picture), image.to_array(sidecars[name])
        tolerance = 4 if name in ("cmyk", "turned", "grey") else 0  # libjpeg has two transforms
        assert np.abs(here.astype(int) - there).mean() <= tolerance, name
    assert image.to_array(pillows["turned"]).shape == (64, 48, 3)


def test_pillow_cannot_have_floats():
    row = imageIO.imageArrayToStruct(noise(4, 6, 3).astype(np.float32))
    with pytest.raises(ValueError, match="Can not convert image of type float32 to PIL"):
        imageIO.imageStructToPIL(row)
    with pytest.raises(ValueError, match="mode F has no fixed range"):
        imageIO.PIL_to_imageStruct(Image.fromarray(noise(4, 6).astype(np.float32)))


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_decode_and_resize_is_width_first(mode: str):
    picture, _ = PICTURES[mode]
    got = imageIO.PIL_decode_and_resize((9, 4))(encoded(picture, "PNG"))
    plain = picture if mode == "L" else picture.convert("RGB")
    wanted = np.asarray(plain.resize((9, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(got, wanted[..., None] if mode == "L" else wanted[..., ::-1])
    assert got.shape[:2] == (4, 9)


# Resizing columns


def test_resize_is_that_of_tensorflow_and_near_pillow(spark: Any):
    pictures = [noise(40, 30, n) for n in (1, 3, 4)] + [noise(60, 50, 3).astype(np.float32)]
    rows = [(i, imageIO.imageArrayToStruct(array)) for i, array in enumerate(pictures)]
    frame = spark.createDataFrame([*rows, (9, None)], f"id int, image {image.schema().simpleString()}")
    resized = frame.select("id", imageIO.createResizeImageUDF((12, 17))("image").alias("image"))
    got = {row.id: row.image for row in resized.collect()}
    assert got.pop(9) is None
    for i, picture in got.items():
        wanted = tf.image.resize(pictures[i], (12, 17), "bicubic", antialias=True).numpy()
        if pictures[i].dtype == np.uint8:
            wanted = np.rint(wanted.clip(0, 255))
        here = image.to_array(picture)
        assert here.dtype == pictures[i].dtype
        np.testing.assert_allclose(here, wanted, atol=1e-3 if here.dtype == np.float32 else 1)
    pillows = np.asarray(Image.fromarray(pictures[1]).resize((17, 12)))
    assert np.abs(image.to_array(got[1]).astype(int) - pillows).mean() < 1


def test_a_picture_of_that_size_stays_as_it_is(spark: Any):
    row = imageIO.imageArrayToStruct(noise(12, 17, 3), "here")
    frame = spark.createDataFrame([(row,)], f"image {image.schema().simpleString()}")
    assert frame.select(imageIO.createResizeImageUDF((12, 17))("image").alias("image")).first().image == row
    for size in ((12, 17, 3), (12,)):
        with pytest.raises(ValueError, match=r"should have format \[height, width\] but got"):
            imageIO.createResizeImageUDF(size)  # type: ignore[arg-type]


def test_a_picture_that_spark_could_not_read(spark: Any, folder: Path):
    frame = spark.read.format("image").load(str(folder))
    resize = imageIO.createResizeImageUDF((4, 4), onError="column")
    rows = frame.select(resize("image").alias("r")).select("r.*").collect()
    assert sorted(row.image is not None for row in rows) == [False, True, True]
    [reason] = [row.error for row in rows if row.image is None]
    assert reason.startswith(f"file://{folder}/c.png: ") and "mode -1" in reason


# Files


def test_three_files_are_two_pictures_and_a_null(spark: Any, folder: Path):
    frame = imageIO.readImagesWithCustomFn(str(folder), imageIO.PIL_decode)
    assert frame.schema.simpleString() == f"struct<image:{image.schema().simpleString()}>"
    assert sorted(row.image is not None for row in frame.collect()) == [False, True, True]
    for name, picture in by_name(frame).items():
        assert (picture.height, picture.width, picture.nChannels, picture.mode) == (7, 5, 3, 16)
        np.testing.assert_array_equal(
            imageIO.imageStructToArray(picture), noise(7, 5, 3, seed=ord(name[0]))[..., ::-1]
        )


def test_the_reason_of_a_null(spark: Any, folder: Path):
    def picky(data: bytes) -> Any:
        if not data.startswith(b"\x89PNG"):
            raise KeyError("no PNG")
        return [1, 2, 3]

    frame = imageIO.readImagesWithCustomFn(str(folder), picky, onError="column", errorCol="why")
    assert frame.columns == ["image", "why"]
    reasons = sorted(row.why.rpartition("/")[2] for row in frame.collect() if row.image is None)
    assert reasons == [
        "a.png: decode_f returned a list, not an array",
        "b.png: decode_f returned a list, not an array",
        "c.png: KeyError: 'no PNG'",
    ]
    with pytest.raises(PythonException, match=r"c\.png: .*To go on without such files: onError='null'"):
        imageIO.readImagesWithCustomFn(str(folder), imageIO.PIL_decode, onError="fail").collect()
    for options, said in (({"onError": "skip"}, "onError is 'skip'"), ({"errorCol": "Image"}, "errorCol is")):
        with pytest.raises(flightsvc.InvalidArgumentError, match=said):
            imageIO.readImagesWithCustomFn(str(folder), picky, **{"onError": "column", **options})


def test_partitions(spark: Any, folder: Path):
    assert imageIO.readImagesWithCustomFn(str(folder), imageIO.PIL_decode, 217).rdd.getNumPartitions() == 217
    for given in (spark, spark.sparkContext, None):
        files = imageIO.filesToDF(given, str(folder), numPartitions=3)
        assert files.schema.simpleString() == "struct<filePath:string,fileData:binary>"
        assert files.rdd.getNumPartitions() == 3
    rows = {Path(row.filePath).name: row.fileData for row in files.collect()}
    assert rows == {path.name: path.read_bytes() for path in folder.iterdir()}
