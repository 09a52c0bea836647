"""Labels of classes: those of ImageNet, and those in the folder of an exported network."""

from __future__ import annotations

import functools
import importlib.resources
import json
from pathlib import Path

Labels = tuple[tuple[str, str], ...]
"""Id and name of each class."""
FILE = Path("assets.extra", "labels.json")  # in the folder of a SavedModel; TensorFlow ignores it


@functools.cache
def imagenet_labels() -> Labels:
    """Return the 1,000 classes of ImageNet, in the order of the networks' outputs."""
    return tuple((label, name) for label, name in read_table("imagenet.tsv"))


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table beside this module, a file of values separated by tabs."""
    text = importlib.resources.files("flightsvc.ml.networks").joinpath(name).read_text("utf-8")
    return [line.split("\t") for line in text.splitlines() if not line.startswith("#")]


def labels_of(folder: Path) -> Labels:
    """Return the labels of a SavedModel made by :meth:`Network.classifier`; empty: unknown."""
    return tuple((label, name) for label, name in json.loads((folder / FILE).read_text("utf-8")))
