"""The module ``sparkdl.transformers.keras_tensor``: models of Keras on columns of numbers."""

from __future__ import annotations

from flightsvc.ml import tensors


class KerasTransformer(tensors.KerasTransformer):
    """Runs a model of Keras on a column: :class:`flightsvc.ml.KerasTransformer`.

    Args:
        inputCol: The column that is read: numbers, arrays or nested arrays.
        outputCol: The column that is added.
        modelFile: A file that Keras saved, ``.keras`` or ``.h5``.
        others: ``model``, ``batchSize``, ``onError``, ``errorCol``.
    """
