"""The module ``sparkdl.transformers.keras_image``: models of Keras on files of pictures."""

from __future__ import annotations

from flightsvc.ml import images


class KerasImageFileTransformer(images.KerasImageFileTransformer):
    """Runs a model of Keras on pictures by their URIs: :class:`flightsvc.ml.KerasImageFileTransformer`.

    Args:
        inputCol: The column of paths or URIs.
        outputCol: The column that is added.
        modelFile: A file that Keras saved, ``.keras`` or ``.h5``.
        imageLoader: Makes an array ``[1, height, width, channels]`` of a URI, in the worker. Absent: the
            sidecar decodes the file and stretches it to the model's size, RGB from 0 to 255.
        outputMode: ``vector``, or ``image``: Spark's image struct of float32.
        others: ``model``, ``batchSize``, ``onError``, ``errorCol``.
    """
