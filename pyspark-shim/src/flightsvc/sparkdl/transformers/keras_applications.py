"""Networks by the names of sparkdl; :mod:`flightsvc.ml.networks` has many more."""

from __future__ import annotations

from flightsvc.ml.networks import Network, network

KERAS_APPLICATION_MODELS = ("InceptionV3", "ResNet50", "VGG16", "VGG19", "Xception")
"""The names that sparkdl knew."""


def getKerasApplicationModel(name: str) -> Network:
    """Return the network of a name: its size, mode, labels and SavedModels.

    Raises:
        InvalidArgumentError: There is none; it is a ValueError.
    """
    return network(name)
