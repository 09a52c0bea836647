# mypy: disable-error-code="import-untyped"
"""Preprocess pictures with TensorFlow in Python: ``python oracle.py OUT_DIR``.

The pictures are the photos of scikit-image and some made here for the kinds of JPEG and PNG that these lack.
OUT_DIR gets each picture, each expected tensor as raw float32, and ``cases.json``, a list of
{picture, tensor, height, width, scale, offset}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from PIL import Image

SPECS: list[dict[str, Any]] = [
    {"height": 224, "width": 224, "scale": [1 / 128] * 3, "offset": [-127 / 128] * 3},
    {"height": 40, "width": 160, "scale": [1.0, 0.5, 0.25], "offset": [0.0, 1.0, -2.0]},
    {"height": 96, "width": 61, "scale": [1 / 255] * 3, "offset": [0.0] * 3},
]


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
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees
    chelsea.save(out / "made_rotated.jpg", exif=rotated)
    chelsea.save(out / "made_comment.jpg", comment=b"\xff\xc0" * 500)
    chelsea.quantize(64).save(out / "made_palette.png")
    chelsea.convert("1").save(out / "made_bits.png")
    chelsea.convert("LA").save(out / "made_grey_alpha.png")
    Image.fromarray(np.asarray(chelsea.convert("L")).astype(np.uint16) * 257).save(out / "made_16_bits.png")
    for width, height in ((1, 1), (1, 300), (300, 1), (3, 2), (2, 3)):
        chelsea.resize((width, height)).save(out / f"made_{width}x{height}.png")
        chelsea.resize((width, height)).save(out / f"made_{width}x{height}.jpg")


def expected(encoded: bytes, height: int, width: int, scale: list[float], offset: list[float]) -> np.ndarray:
    """The tensor, cropped with Python's integers and resized by tf.image."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    h, w, _ = image.shape
    if h * width < w * height:
        box_h, box_w = h, max(h * width // height, 1)
    else:
        box_h, box_w = max(w * height // width, 1), w
    y, x = (h - box_h) // 2, (w - box_w) // 2
    box = image[y : y + box_h, x : x + box_w]
    resized = tf.image.resize(box, (height, width), method="bilinear", antialias=False)
    tensor: np.ndarray = (resized * scale + offset).numpy()
    return tensor


def main(out: Path) -> None:
    """Write the pictures, the tensors and their list."""
    collect(out)
    cases = []
    for picture in sorted(out.iterdir()):
        for i, spec in enumerate(SPECS):
            tensor = f"{picture.name}.{i}.f32"
            expected(picture.read_bytes(), **spec).astype("<f4").tofile(out / tensor)
            cases.append({"picture": picture.name, "tensor": tensor, **spec})
    (out / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
