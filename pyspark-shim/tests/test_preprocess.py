"""What becomes of pictures on their way into a model, beside Keras and TensorFlow in Python."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from figures import count, report
from PIL import Image

import flightsvc

SIDES = (48, 64)
TOLERANCE = 1e-4


def photographs() -> np.ndarray:
    """Return pictures of one size, uint8 [n, height, width, 3]: photographs and noise."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    height, width = SIDES
    kinds = np.random.default_rng(5)
    some = [kinds.integers(0, 256, (height, width, 3)) for _ in range(count(2, 20))]
    for name in ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png")[: count(2, 4)]:
        with Image.open(folder / name) as photograph:
            whole = np.asarray(photograph.convert("RGB"))
        some += [whole[y : y + height, x : x + width] for y in (0, 99) for x in (0, 120)]
    return np.stack(some).astype(np.uint8)


def encoded(picture: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def struct(picture: np.ndarray, mode: int) -> dict[str, Any]:
    height, width, channels = picture.shape
    return {
        "origin": "",
        "height": height,
        "width": width,
        "nChannels": channels,
        "mode": mode,
        "data": picture.tobytes(),
    }


IMAGE = pa.struct(
    [("origin", pa.string())]
    + [(name, pa.int32()) for name in ("height", "width", "nChannels", "mode")]
    + [("data", pa.binary())]
)


@pytest.fixture(scope="module")
def through(client: flightsvc.Client, models: Path) -> Any:
    """``through(ImageInput, column)`` returns the tensor that the model ``echo`` was given."""

    def run(image: flightsvc.ImageInput, column: pa.Array) -> np.ndarray:
        model = flightsvc.Model(models / "echo", preprocess={"image": image})
        answer = client.predict(model, pa.table({"image": column}), outputs={"same": "same"})["same"]
        values = answer.combine_chunks()
        while pa.types.is_list(values.type):
            values = values.flatten()
        channels = 1 if image.channels == "L" else 3
        return values.to_numpy().reshape(len(column), *image.size, channels)

    return run


@pytest.mark.parametrize("mode", ["tf", "caffe", "torch"])
@pytest.mark.parametrize("kind", ["files", "structs", "float structs"])
def test_preprocess_input_of_keras(through: Any, oracle: Any, mode: str, kind: str):
    from keras.applications.imagenet_utils import preprocess_input

    pictures = photographs()
    if kind == "files":
        column = pa.array([encoded(p) for p in pictures])
    elif kind == "structs":
        column = pa.array([struct(p[..., ::-1], 16) for p in pictures], IMAGE)
    else:
        column = pa.array([struct(p[..., ::-1].astype(np.float32), 21) for p in pictures], IMAGE)
    ours = through(flightsvc.ImageInput.keras(mode, SIDES), column)
    theirs = preprocess_input(pictures.astype(np.float32), data_format="channels_last", mode=mode)
    difference = float(np.abs(ours - theirs).max())
    report(**{f"keras_{mode}_{kind.replace(' ', '_')}": f"{difference:.2g} over {len(pictures)} pictures"})
    assert difference <= TOLERANCE


def test_modes_that_keras_does_not_have_are_refused():
    with pytest.raises(flightsvc.InvalidArgumentError, match="one of tf, caffe, torch"):
        flightsvc.ImageInput.keras("imagenet", SIDES)


@pytest.mark.parametrize("resize", ["bilinear", "nearest", "bicubic", "area"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(20, 30), (90, 100)])
def test_resize_of_tensorflow(through: Any, oracle: Any, resize: str, antialias: bool, size: tuple[int, int]):
    import tensorflow as tf

    if antialias and resize in ("nearest", "area"):
        with pytest.raises(flightsvc.InvalidArgumentError, match="antialias works with bilinear and bicubic"):
            through(flightsvc.ImageInput(size, resize=resize, antialias=True), pa.array([b""]))
        return
    pictures = photographs()
    how = {"resize": resize, "antialias": antialias}
    files = pa.array([encoded(p) for p in pictures])
    ours = through(flightsvc.ImageInput(size, fit="stretch", **how), files)
    theirs = tf.image.resize(pictures, size, method=resize, antialias=antialias).numpy()
    assert float(np.abs(ours - theirs).max()) <= 1e-3
    padded = through(flightsvc.ImageInput(size, fit="pad", **how), files)
    theirs = tf.image.resize_with_pad(pictures, *size, method=resize, antialias=antialias).numpy()
    assert float(np.abs(padded - theirs).max()) <= 1e-3


def test_channels_and_numbers(through: Any):
    pictures = photographs()[:3]
    files = pa.array([encoded(p) for p in pictures])
    bgr = through(flightsvc.ImageInput(SIDES, channels="BGR", scale=(1, 2, 3), offset=(0, 0, 5)), files)
    assert np.array_equal(bgr, pictures[..., ::-1] * np.float32([1, 2, 3]) + np.float32([0, 0, 5]))
    grey = through(flightsvc.ImageInput(SIDES, channels="L", scale=2, offset=1), files)
    luma = pictures @ np.float32([0.299, 0.587, 0.114])
    assert np.allclose(grey[..., 0], 2 * luma + 1, atol=1e-3)


def test_whole_numbers(client: flightsvc.Client, models: Path):
    pictures = np.random.default_rng(1).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)
    image = flightsvc.ImageInput((16, 24), scale=2.0)
    files = pa.table({"image": [encoded(p) for p in pictures]})
    answer = client.predict(flightsvc.Model(models / "bytes", preprocess={"image": image}), files)
    saturated = np.minimum(2 * pictures.astype(int), 255).sum(axis=(1, 2, 3))
    assert answer["total"].to_pylist() == saturated.tolist()


def test_what_the_signature_does_not_take_is_refused(client: flightsvc.Client, models: Path):
    column = pa.table({"image": [encoded(photographs()[0])]})
    for image, words in (
        (flightsvc.ImageInput((16, 16)), r"makes uint8 \[\?,16,16,3\].*uint8 \[\?,16,24,3\]"),
        (flightsvc.ImageInput((16, 24), dtype="float32"), r"makes float32 .*uint8"),
        (flightsvc.ImageInput((16, 24), channels="L"), r"makes uint8 \[\?,16,24,1\]"),
        (flightsvc.ImageInput((16, 24), fit="contain"), 'fit is "contain"'),
    ):
        with pytest.raises(flightsvc.InvalidArgumentError, match=words):
            client.predict(flightsvc.Model(models / "bytes", preprocess={"image": image}), column)


def test_rows_of_image_structs_are_refused_one_by_one(client: flightsvc.Client, models: Path):
    good = struct(photographs()[0], 16)
    rows = [good, {**good, "mode": -1, "height": -1}, None, {**good, "height": 1}, {**good, "mode": 17}, good]
    model = flightsvc.Model(models / "pictures", preprocess={"image": flightsvc.ImageInput((32, 32))})
    answer = client.predict(model, pa.table({"image": pa.array(rows, IMAGE)}), on_error="column")
    assert answer["mean"].is_null().to_pylist() == [False, True, True, True, True, False]
    errors = answer["error"].to_pylist()
    for at, words in ((1, "invalid"), (3, "9216 bytes"), (4, "mode 17")):
        assert words in errors[at]
    assert [errors[0], errors[2], errors[5]] == [None] * 3


def test_numbers_of_numpy_are_numbers():
    ours = flightsvc.ImageInput(
        (np.int64(32), 24), scale=np.float32(2), offset=np.array([0.5, 1, 2], np.float32), dtype="uint8"
    )
    assert ours == flightsvc.ImageInput((32, 24), scale=2.0, offset=(0.5, 1.0, 2.0), dtype="uint8")
    assert hash(ours) and json.loads(json.dumps(ours.wire())) == ours.wire()
    assert flightsvc.ImageInput([32, 24], scale=np.array(2)).scale == 2.0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"size": 224}, "size is 224; it is height and width"),
        ({"size": (32.0, 32)}, "size is .* whole pixels"),
        ({"size": (1, 2, 3)}, "size is "),
        ({"scale": "2"}, "scale is '2'; it is a finite number, or one for each channel"),
        ({"scale": None}, "scale is None"),
        ({"scale": np.ones((2, 2))}, "scale is "),
        ({"offset": float("nan")}, "offset is nan"),
        ({"offset": (0, 0, np.inf)}, "offset is "),
        ({"offset": 10**400}, "offset is "),
        ({"dtype": np.float32}, "dtype is .*such as 'float32'"),
    ],
)
def test_numbers_that_are_none(how: dict[str, Any], message: str):
    with pytest.raises(flightsvc.InvalidArgumentError, match=message):
        flightsvc.ImageInput(**{"size": (32, 32)} | how)
