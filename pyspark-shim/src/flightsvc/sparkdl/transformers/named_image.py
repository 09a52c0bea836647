"""Networks by name on columns of pictures."""

from __future__ import annotations

from flightsvc.ml import deep_image
from flightsvc.sparkdl.transformers.keras_applications import KERAS_APPLICATION_MODELS

SUPPORTED_MODELS = list(KERAS_APPLICATION_MODELS)
"""The names that sparkdl knew; :func:`flightsvc.ml.networks` lists all."""


class DeepImagePredictor(deep_image.DeepImagePredictor):
    """Says what pictures show: :class:`flightsvc.ml.DeepImagePredictor`.

    Args:
        inputCol: The column of pictures.
        outputCol: The column that is added.
        modelName: The network.
        decodePredictions: Whether the likeliest classes are named, instead of the Vector of all.
        topK: How many of them.
        others: ``weights``, ``batchSize``, ``onError``, ``errorCol``.
    """


class DeepImageFeaturizer(deep_image.DeepImageFeaturizer):
    """Makes features of pictures: :class:`flightsvc.ml.DeepImageFeaturizer` without its pooling.

    Features are the whole last map, flattened, as sparkdl had them: 131,072 of InceptionV3, 204,800 of
    Xception, 25,088 of VGG16 and VGG19; of ResNet50, which sparkdl pooled, its 2,048 means.

    Args:
        inputCol: The column of pictures.
        outputCol: The column that is added.
        modelName: The network.
        scaleHint: How pictures are resized, as :class:`flightsvc.ml.DeepImageFeaturizer` has it.
        others: ``pooling``, ``layer``, ``weights``, ``batchSize``, ``onError`` and
            ``errorCol``.
    """

    def getPooling(self) -> str:
        """Return what becomes of the last map: what was set, else what sparkdl did for this network."""
        if self.isSet(self.pooling):
            return super().getPooling()
        pooled = self.isDefined(self.modelName) and self.getModelName() == "ResNet50"
        return "avg" if pooled else "none"
