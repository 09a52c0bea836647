"""The module ``sparkdl.transformers.keras_applications``: the networks of sparkdl by name."""

from __future__ import annotations

from flightsvc.ml.networks import Network, network

KERAS_APPLICATION_MODELS = ("InceptionV3", "ResNet50", "VGG16", "VGG19", "Xception")
"""The names in sparkdl; :mod:`flightsvc.ml.networks` has more."""


def getKerasApplicationModel(name: str) -> Network:
    """Return the network ``name``: its size, mode, labels and SavedModels.

    Raises:
        InvalidArgumentError: There is no such network; it is also a ValueError.
    """
    return network(name)
