"""The module ``sparkdl.transformers.named_image``: networks by name on columns of pictures."""

from __future__ import annotations

from flightsvc.ml import deep_image
from flightsvc.sparkdl.transformers.keras_applications import KERAS_APPLICATION_MODELS

SUPPORTED_MODELS = list(KERAS_APPLICATION_MODELS)
"""The names in sparkdl; :func:`flightsvc.ml.networks.networks` lists all."""


class DeepImagePredictor(deep_image.DeepImagePredictor):
    """Classifies pictures: :class:`flightsvc.ml.DeepImagePredictor`.

    Args:
        inputCol: The column of pictures.
        outputCol: The column that is added.
        modelName: The network.
        decodePredictions: Whether the most probable classes are named, instead of a Vector of all.
        topK: The number of named classes.
        others: ``weights``, ``batchSize``, ``onError``, ``errorCol``.
    """


class DeepImageFeaturizer(deep_image.DeepImageFeaturizer):
    """Computes features of pictures: :class:`flightsvc.ml.DeepImageFeaturizer` without pooling.

    Features are the last map, flattened, as in sparkdl: 131,072 of InceptionV3, 204,800 of Xception, 25,088
    of VGG16 and VGG19. For ResNet50, as in sparkdl, they are the 2,048 means of the map.

    Args:
        inputCol: The column of pictures.
        outputCol: The column that is added.
        modelName: The network.
        scaleHint: How pictures are resized; see :class:`flightsvc.ml.DeepImageFeaturizer`.
        others: ``pooling``, ``layer``, ``weights``, ``batchSize``, ``onError`` and
            ``errorCol``.
    """

    def getPooling(self) -> str:
        """Return the pooling that is set, else that of sparkdl for this network."""
        if self.isSet(self.pooling):
            return super().getPooling()
        pooled = self.isDefined(self.modelName) and self.getModelName() == "ResNet50"
        return "avg" if pooled else "none"
