# mypy: disable-error-code="import-untyped"
"""Answer the test models with TensorFlow in Python: ``python oracle.py MODELS`` prints JSON.

A list of cases, one for each model, signature and number of rows: the tensors to feed and those to fetch,
each with its name in the graph, dtype, shape and flat data (strings in base64).
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

TEXTS = [
    b"",
    b"a",
    b"exactly 22 bytes long.",
    b"one byte more: 23 bytes",
    "caf\u00e9 \u65e5\u672c".encode(),
    b"\0\0",
    b"z" * 100_000,
]


def inputs(model: str, rows: int, random: np.random.Generator) -> dict[str, Any]:
    """What to feed ``model``."""
    match model:
        case "mlp":
            return {"x": random.normal(size=(rows, 512)).astype(np.float32)}
        case "two":
            return {
                "a": random.normal(size=(rows, 8)).astype(np.float32),
                "b": random.normal(size=(rows, 4)).astype(np.float32),
            }
        case "strings":
            return {"s": np.array([TEXTS[i % len(TEXTS)] for i in range(rows)], dtype=object)}
        case "ints":
            return {"i": random.integers(-(2**60), 2**60, size=(rows, 3))}
        case "pictures":
            return {"image": random.uniform(size=(rows, 32, 32, 3)).astype(np.float32)}
        case "nested":
            return {"x": random.normal(size=(rows, 2, 3)).astype(np.float32)}
    raise ValueError(f"no inputs for model {model}")


def tensor(name: str, value: tf.Tensor) -> dict[str, Any]:
    """One tensor of a case."""
    flat = value.numpy().ravel().tolist()
    if value.dtype == tf.string:
        flat = [base64.b64encode(text).decode() for text in flat]
    return {"name": name, "dtype": value.dtype.name, "shape": value.shape.as_list(), "data": flat}


def cases(folder: Path) -> list[dict[str, Any]]:
    """Every case, in a fixed order."""
    found = []
    random = np.random.default_rng(7)
    for model in ("mlp", "two", "strings", "ints", "pictures", "nested"):
        loaded = tf.saved_model.load(str(folder / model))
        saved = saved_model_pb2.SavedModel.FromString((folder / model / "saved_model.pb").read_bytes())
        for signature, function in loaded.signatures.items():
            names = saved.meta_graphs[0].signature_def[signature]
            for rows in (0, 1, 7, 64):
                feeds = {key: tf.constant(value) for key, value in inputs(model, rows, random).items()}
                if model == "strings" and rows == 0:
                    feeds = {"s": tf.constant([], dtype=tf.string)}
                answers = function(**feeds)
                found.append(
                    {
                        "name": f"{model}/{signature}/{rows}",
                        "model": model,
                        "feeds": [tensor(names.inputs[key].name, value) for key, value in feeds.items()],
                        "answers": [tensor(names.outputs[key].name, value) for key, value in answers.items()],
                    }
                )
    return found


if __name__ == "__main__":
    json.dump(cases(Path(sys.argv[1])), sys.stdout)
