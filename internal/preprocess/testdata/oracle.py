# mypy: disable-error-code="import-untyped"
"""Preprocess pictures with TensorFlow in Python: ``python oracle.py OUT_DIR``.

The pictures are the photos of scikit-image and some made here for the kinds of files that these lack. OUT_DIR
gets each picture, each expected tensor as raw values, and ``cases.json``: for each case the picture, its
shape and element type where it is an image struct (raw, rawtype), whether a Decoder makes it, the spec, and
tensor, dtype, shape and tolerance of the answer.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

PLAIN: dict[str, Any] = {
    "Height": 48,
    "Width": 64,
    "Resize": "bilinear",
    "Antialias": False,
    "Fit": "crop",
    "Channels": "RGB",
    "Scale": [1.0] * 3,
    "Offset": [0.0] * 3,
}

# Every picture is asked for these, the photos for the first.
SPECS: list[dict[str, Any]] = [
    PLAIN | {"Height": 224, "Width": 224, "Scale": [1 / 128] * 3, "Offset": [-127 / 128] * 3},
    PLAIN | {"Height": 40, "Width": 160, "Scale": [1.0, 0.5, 0.25], "Offset": [0.0, 1.0, -2.0]},
    PLAIN | {"Height": 96, "Width": 61, "Scale": [1 / 255] * 3},
]
METHODS = [(m, a) for m in ("bilinear", "nearest", "bicubic", "area") for a in (False, True)]
METHODS = [(m, a) for m, a in METHODS if not a or m in ("bilinear", "bicubic")]
# A few pictures, which are shrunk, stretched and enlarged, are asked for these.
MANY: list[dict[str, Any]] = [
    PLAIN | {"Height": h, "Width": w, "Resize": m, "Antialias": a, "Fit": fit, "Channels": c}
    for m, a in METHODS
    for (h, w), fit, c in [
        ((48, 64), "crop", "RGB"),
        ((50, 31), "stretch", "BGR"),
        ((61, 61), "pad", "L"),
        ((140, 120), "pad", "BGR"),
        ((110, 170), "stretch", "RGB"),
    ]
]
DTYPES = ["float32", "float64", "float16", "bfloat16", "uint8", "int32"]


def collect(out: Path) -> None:
    """Put every picture into ``out``."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None
    photos = Path(spec.origin).parent / "data"
    for photo in sorted([*photos.glob("*.png"), *photos.glob("*.jpg")]):
        shutil.copy(photo, out)
    chelsea = Image.open(photos / "chelsea.png")
    chelsea.save(out / "made_444.jpg", quality=95, subsampling=0)
    chelsea.save(out / "made_420.jpg", quality=80, subsampling=2)
    chelsea.save(out / "made_progressive.jpg", progressive=True)
    chelsea.save(out / "made_restarts.jpg", restart_marker_rows=1)
    chelsea.convert("L").save(out / "made_grey.jpg")
    chelsea.convert("CMYK").save(out / "made_cmyk.jpg")
    # The same numbers read as YCCK: the last byte of the Adobe segment says so.
    cmyk = bytearray((out / "made_cmyk.jpg").read_bytes())
    cmyk[cmyk.index(b"Adobe") + 11] = 2
    (out / "made_ycck.jpg").write_bytes(cmyk)
    for orientation in range(1, 9):
        exif = turned_by(orientation, "<>"[orientation % 2])
        chelsea.resize((101, 67)).save(out / f"made_turned_{orientation}.jpg", exif=exif)
    chelsea.save(out / "made_turned_wrongly.jpg", exif=turned_by(9, "<"))
    chelsea.convert("L").save(out / "made_turned_grey.jpg", exif=turned_by(6, "<"))
    chelsea.save(out / "made_comment.jpg", comment=b"\xff\xc0" * 500)
    chelsea.quantize(64).save(out / "made_palette.png")
    chelsea.quantize(64).save(out / "made_palette_alpha.png", transparency=3)
    chelsea.save(out / "made_transparent_colour.png", transparency=(200, 100, 50))
    (out / "made_chunks.png").write_bytes(with_chunks((out / "made_palette_alpha.png").read_bytes()))
    (out / "made_chunks_colour.png").write_bytes(with_chunks((out / "chelsea.png").read_bytes()))
    chelsea.convert("1").save(out / "made_bits.png")
    chelsea.convert("LA").save(out / "made_grey_alpha.png")
    rgba = np.dstack([np.asarray(chelsea), np.arange(300 * 451).reshape(300, 451) % 251]).astype(np.uint8)
    Image.fromarray(rgba).save(out / "made_alpha.png")
    Image.fromarray(np.asarray(chelsea.convert("L")).astype(np.uint16) * 257).save(out / "made_16_bits.png")
    deep = np.asarray(chelsea).astype(np.uint16) * 256 + 77
    (out / "made_16_bits_colour.png").write_bytes(tf.io.encode_png(deep).numpy())
    (out / "made_interlaced.png").write_bytes(interlaced(np.asarray(chelsea.resize((45, 31)))))
    chelsea.save(out / "made_24.bmp")
    chelsea.quantize(64).save(out / "made_palette.bmp")
    chelsea.convert("L").save(out / "made_grey.bmp")
    chelsea.convert("1").save(out / "made_bits.bmp")
    Image.fromarray(rgba).save(out / "made_32.bmp")
    upside = bytearray((out / "made_24.bmp").read_bytes())
    upside[22:26] = (-300).to_bytes(4, "little", signed=True)
    (out / "made_top_down.bmp").write_bytes(upside)
    chelsea.save(out / "made.gif")
    film = [chelsea.rotate(a).quantize(32) for a in (10, 20, 30)]
    film[0].save(out / "made_film.gif", save_all=True, append_images=film[1:])
    chelsea.quantize(64).save(out / "made_transparent.gif", transparency=5)
    chelsea.save(out / "made_interlaced.gif", interlace=1)
    for width, height in ((1, 1), (1, 300), (300, 1), (3, 2), (2, 3)):
        chelsea.resize((width, height)).save(out / f"made_{width}x{height}.png")
        chelsea.resize((width, height)).save(out / f"made_{width}x{height}.jpg")


def turned_by(orientation: int, order: str) -> bytes:
    """EXIF that says so, little-endian (<) or big-endian."""
    text = b"a maker\0"
    entries = struct.pack(order + "HHII", 0x010F, 2, len(text), 8 + 2 + 24 + 4)
    entries += struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", 2) + entries + bytes(4) + text


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes) -> bytes:
    """The PNG with all that could change how its pixels are read, and with text before and behind them."""
    ahead = chunk(b"gAMA", struct.pack(">I", 220_000))
    ahead += chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 40000, 33000, 30000, 60000, 15000, 6000))
    ahead += chunk(b"sBIT", b"\5\6\5") + chunk(b"cICP", b"\x09\x10\0\1")
    text = chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(100)))
    head, rest = png[:33], png[33:]  # signature and IHDR
    rest, end = rest[:-12], rest[-12:]
    first = rest.index(b"IDAT") - 4
    back = chunk(b"bKGD", b"\3" if head[25] == 3 else b"\0\3" * 3)
    return head + ahead + rest[:first] + back + text + rest[first:] + text + end


def interlaced(image: np.ndarray) -> bytes:
    """A PNG in Adam7, which Pillow does not write."""
    height, width, _ = image.shape
    rows = b""
    for y, x, dy, dx in [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]:
        for row in image[y::dy, x::dx]:
            rows += b"\0" + row.tobytes() if row.size else b""

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def decode(file: Path, channels: int) -> np.ndarray:
    """The pixels as shown, uint8 [height, width, channels]; 0 channels are the file's own."""
    encoded = file.read_bytes()
    if file.suffix == ".bmp":
        return np.asarray(Image.open(file).convert("RGB"))  # tf.io.decode_bmp knows no palette
    if file.suffix == ".gif":
        channels = 3
    image: np.ndarray = tf.io.decode_image(encoded, channels=channels, expand_animations=False).numpy()
    orientation = Image.open(io.BytesIO(encoded)).getexif().get(0x0112, 1) if file.suffix == ".jpg" else 1
    if orientation != 1:
        shown = Image.fromarray(image.squeeze())
        shown.getexif()[0x0112] = orientation
        turned = ImageOps.exif_transpose(shown)
        image = np.asarray(turned).reshape(turned.height, turned.width, image.shape[2])
    return image


def resized(image: np.ndarray, spec: dict[str, Any]) -> Any:
    """The picture at the size of the spec, as float32; the box by Python's integers."""
    height, width = spec["Height"], spec["Width"]
    how = {"method": spec["Resize"], "antialias": spec["Antialias"]}
    if spec["Fit"] == "pad":
        return tf.cast(tf.image.resize_with_pad(image, height, width, **how), tf.float32)
    if spec["Fit"] == "crop":
        h, w, _ = image.shape
        box_h, box_w = max(min(h, w * height // width), 1), max(min(w, h * width // height), 1)
        y, x = (h - box_h) // 2, (w - box_w) // 2
        image = image[y : y + box_h, x : x + box_w]
    return tf.cast(tf.image.resize(image, (height, width), **how), tf.float32)


def grey(image: Any) -> Any:
    """ITU-R BT.601 of red, green, blue."""
    return image[..., 0:1] * 0.299 + image[..., 1:2] * 0.587 + image[..., 2:3] * 0.114


def cast(values: Any, dtype: str) -> np.ndarray:
    """Whole numbers rounded, halves to even ones, and saturated."""
    if dtype in ("uint8", "int32"):
        bounds = np.iinfo(dtype)
        return np.clip(np.rint(np.asarray(values, np.float64)), bounds.min, bounds.max).astype(dtype)
    made: np.ndarray = tf.cast(values, dtype).numpy()
    return made


def expected(image: np.ndarray, spec: dict[str, Any], dtype: str) -> np.ndarray:
    """The tensor of red, green, blue pixels."""
    x = resized(image, spec)
    if spec["Channels"] == "L":
        x = grey(x)
    elif spec["Channels"] == "BGR":
        x = x[..., ::-1]
    n = x.shape[-1]
    return cast(x * spec["Scale"][:n] + spec["Offset"][:n], dtype)


def main(out: Path) -> None:
    """Write the pictures, the tensors and their list."""
    collect(out)
    cases: list[dict[str, Any]] = []

    def add(
        picture: str, spec: dict[str, Any], tensor: np.ndarray, tolerance: float = 1e-5, **more: Any
    ) -> None:
        file = f"{len(cases)}.tensor"
        tensor.tofile(out / file)
        about = {"picture": picture, "spec": spec, "tensor": file, "tolerance": tolerance}
        cases.append(about | {"dtype": tensor.dtype.name, "shape": tensor.shape} | more)

    files = sorted(out.iterdir())
    for picture in files:
        image = decode(picture, 3)
        for spec in SPECS if picture.name.startswith("made") else SPECS[:1]:
            add(picture.name, spec, expected(image, spec, "float32"))

    few = [
        f
        for f in files
        if f.name in ("made_444.jpg", "camera.png", "made_turned_6.jpg", "made_3x2.png", "made_film.gif")
    ]
    for picture in few:
        image = decode(picture, 3)
        for spec in MANY:
            add(picture.name, spec, expected(image, spec, "float32"), 1e-4)
    wild = {"Scale": [3.5, -1e8, 1e8], "Offset": [-200.0, 0.5, 1e8]}
    for dtype in DTYPES:
        for method in ("bicubic", "nearest"):
            for spec in (PLAIN | {"Resize": method}, PLAIN | wild | {"Resize": method, "Channels": "BGR"}):
                add("made_444.jpg", spec, expected(decode(out / "made_444.jpg", 3), spec, dtype))

    # Keras on a picture of the network's size.
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    modes: dict[str, dict[str, Any]] = {
        "tf": {"Scale": [1 / 127.5] * 3, "Offset": [-1.0] * 3},
        "caffe": {"Channels": "BGR", "Offset": [-103.939, -116.779, -123.68]},
        "torch": {"Scale": list(1 / (255 * deviation)), "Offset": list(-mean / deviation)},
    }
    for name in ("chelsea.png", "made_420.jpg"):
        image = decode(out / name, 3)
        for mode, spec in modes.items():
            spec = PLAIN | spec | {"Height": image.shape[0], "Width": image.shape[1]}
            want = keras.applications.imagenet_utils.preprocess_input(image.astype(np.float32), mode=mode)
            add(name, spec, np.asarray(want), 1e-4, absolute=True)

    # Image structs, and what the decoder makes of them and of files.
    chelsea = np.asarray(Image.open(out / "chelsea.png"))[:120, :150]
    alpha = (np.arange(120 * 150) % 251).reshape(120, 150, 1).astype(np.uint8)
    unsized = PLAIN | {"Height": 0, "Width": 0, "Fit": "", "Resize": ""}
    antialias = PLAIN | {"Resize": "bicubic", "Antialias": True, "Fit": "pad"}

    def add_decoders(
        picture: str,
        own: np.ndarray,
        rgb: np.ndarray,
        raw: list[int] | None,
        dtype: str,
        specs: list[dict[str, Any]],
    ) -> None:
        for spec in specs:
            size = resized if spec["Height"] else lambda image, _: tf.cast(image, tf.float32)
            more = {"decoder": True, "raw": raw}
            add(picture, spec | {"Channels": ""}, cast(size(own, spec), dtype), 1e-4, **more)
            add(picture, spec | {"Channels": "BGR"}, cast(size(rgb, spec)[..., ::-1], dtype), 1e-4, **more)
            add(picture, spec | {"Channels": "L"}, cast(grey(size(rgb, spec)), dtype), 1e-4, **more)

    for dtype in ("uint8", "float32"):
        for channels in (1, 3, 4):
            bgr = [chelsea[..., :1], chelsea[..., ::-1], np.dstack([chelsea[..., ::-1], alpha])][
                channels // 2
            ]
            rgb = np.dstack([bgr] * 3) if channels == 1 else bgr[..., 2::-1]
            if dtype == "float32":
                bgr, rgb = bgr / np.float32(3) - 20, rgb / np.float32(3) - 20
            name = f"struct_{channels}.{dtype}"
            np.ascontiguousarray(bgr).tofile(out / name)
            raw = [120, 150, channels]
            for spec in (*SPECS, *MANY[::3]):
                add(name, spec, expected(rgb, spec, "float32"), 1e-4, raw=raw, rawtype=dtype)
            start = len(cases)
            add_decoders(name, bgr, rgb, raw, dtype, [PLAIN, antialias, unsized])
            for case in cases[start:]:
                case["rawtype"] = dtype
    for picture in files:
        own, rgb = decode(picture, 0), decode(picture, 3)
        if own.size > 500_000:
            continue
        if own.shape[2] == 2:
            own = np.dstack([own[..., :1]] * 3 + [own[..., 1:]])
        elif own.shape[2] > 2:
            own = own[..., [2, 1, 0, 3][: own.shape[2]]]
        sized = [PLAIN, antialias] if picture in few or own.shape[2] == 4 else []
        add_decoders(picture.name, own, rgb, None, "uint8", [unsized, *sized])
    (out / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
