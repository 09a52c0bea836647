"""Models of Keras on a column of numbers."""

from __future__ import annotations

from typing import Any

from pyspark import keyword_only

from flightsvc.ml import tensors


class KerasTransformer(tensors.KerasTransformer):
    """Runs a model of Keras on a column: :class:`flightsvc.ml.KerasTransformer`.

    Args:
        inputCol: The column that is read: numbers, arrays or nested arrays.
        outputCol: The column that is added.
        modelFile: A file that Keras saved, ``.keras`` or ``.h5``.
        **params: Further Params: ``model``, ``batchSize``, ``onError``, ``errorCol``.
    """

    @keyword_only
    def __init__(
        self,
        inputCol: str | None = None,
        outputCol: str | None = None,
        modelFile: str | None = None,
        **params: Any,
    ):
        super().__init__(
            inputCol=inputCol,
            outputCol=outputCol,
            modelFile=modelFile,
            **params,
        )
