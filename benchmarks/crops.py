"""The pictures of the benchmarks: crops of photographs, as JPEG files."""

from __future__ import annotations

import importlib.util
import random
import shutil
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "build" / "bench" / "crops"
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
"""The large colour photographs that come with scikit-image."""

SIDES = (300, 500)
"""The shortest and the longest side of a crop, in pixels."""

QUALITIES = (75, 95)


def crops(count: int) -> Path:
    """Return the folder with the first ``count`` crops, the same on every machine; create them if needed."""
    folder = FOLDER / str(count)
    if folder.exists():
        return folder
    package = importlib.util.find_spec("skimage")
    assert package is not None and package.origin is not None
    photos = [Image.open(Path(package.origin).parent / "data" / name).convert("RGB") for name in PHOTOS]
    FOLDER.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=FOLDER))
    try:
        for index in range(count):
            chance = random.Random(index)
            photo = chance.choice(photos)
            width, height = (min(chance.randint(*SIDES), side) for side in photo.size)
            left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
            crop = photo.crop((left, top, left + width, top + height))
            crop.save(making / f"{index:04}.jpg", quality=chance.randint(*QUALITIES))
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder
