"""Labels of classes: those of ImageNet, and those that an exported network keeps beside its graph."""

from __future__ import annotations

import functools
import importlib.resources
import json
from pathlib import Path

Labels = tuple[tuple[str, str], ...]
"""For each class its id and its name."""
FILE = Path("assets.extra", "labels.json")  # in a SavedModel, where TensorFlow reads nothing


@functools.cache
def imagenet_labels() -> Labels:
    """Return id and name of the 1,000 classes of ImageNet, in the order of the networks' outputs."""
    text = importlib.resources.files("flightsvc.ml.networks").joinpath("imagenet.tsv").read_text("utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return tuple((label, name) for label, name in rows)


def labels_of(folder: Path) -> Labels:
    """Return the labels in a SavedModel that :meth:`Network.classifier` has made; empty: it has none."""
    return tuple((label, name) for label, name in json.loads((folder / FILE).read_text("utf-8")))
