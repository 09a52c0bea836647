"""Weights of a network where there are none: random, but seeded, and such that its answers say something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flightsvc.ml.networks import network


def model(name: str, seed: int = 7) -> Any:
    """Return the network of Keras; its features neither vanish nor explode, as untrained ones would."""
    import keras

    keras.utils.set_random_seed(seed)
    built = getattr(keras.applications, name)(weights=None)
    rng = np.random.default_rng(seed)
    norms = [x for x in built.layers if isinstance(x, keras.layers.BatchNormalization)]
    for layer in built.layers:
        if not isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([_value(weight, rng) for weight in layer.weights])
    if norms:  # they take the statistics of what flows through the network
        for layer in norms:
            layer.momentum = 0.0
            if layer.center:  # around 0, where each ReLU halves what it gets, rounding grows with each layer
                layer.beta.assign(np.ones(layer.beta.shape))
        _, height, width, channels = built.input_shape
        built(pictures(name, (2, height or 224, width or 224, channels), rng), training=True)
    elif network(name).mode == "caffe":  # nothing else brings colours up to 128 near 1
        first = next(layer for layer in built.layers if layer.weights)
        first.kernel.assign(first.kernel / 100)
    return built


def pictures(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Return random pictures as the network takes them."""
    mode = network(name).mode
    low, high = {"tf": (-1, 1), "caffe": (-128, 128), "torch": (-2, 2), "none": (0, 255)}[str(mode)]
    return rng.uniform(low, high, shape).astype(np.float32)


def file(name: str, folder: Path, suffix: str = ".weights.h5") -> Path:
    """Save the network's weights and return the file."""
    path = folder / f"{name}{suffix}"
    model(name).save_weights(path)
    return path


def _value(weight: Any, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = weight.shape
    if len(shape) < 2:
        return np.asarray(weight)
    inputs = np.prod(shape[:-2]) if shape[-1] == 1 or "depthwise" in weight.path else np.prod(shape[:-1])
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / inputs))
