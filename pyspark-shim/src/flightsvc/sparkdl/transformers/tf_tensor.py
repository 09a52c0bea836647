"""The module ``sparkdl.transformers.tf_tensor``: graphs on columns of numbers."""

from __future__ import annotations

from typing import Any, Self

from pyspark import keyword_only

from flightsvc.errors import InvalidArgumentError
from flightsvc.ml import tensors


class TFTransformer(tensors.TFTransformer):
    """Runs a graph on columns: :class:`flightsvc.ml.TFTransformer` with the arguments of sparkdl.

    Args:
        tfInputGraph: A :class:`TFInputGraph`, or any ``model`` of :class:`flightsvc.ml.TFTransformer`.
        inputMapping: Column to input tensor: ``{"x": "x:0"}``.
        outputMapping: Output tensor to column: ``{"z:0": "z"}``.
        tfHParms: Only ``None``: it had no effect in sparkdl; use ``batchSize``.
        **params: Further Params: ``batchSize``, ``onError``, ``errorCol``, ``signature``.
    """

    @keyword_only
    def __init__(
        self,
        tfInputGraph: Any = None,
        inputMapping: Any = None,
        outputMapping: Any = None,
        tfHParms: None = None,
        **params: Any,
    ):
        given = self._input_kwargs
        super().__init__()
        self.setParams(**given)

    def setParams(self, *, tfInputGraph: Any = None, tfHParms: None = None, **params: Any) -> Self:
        """Set Params by name, as in the constructor.

        Raises:
            InvalidArgumentError: ``tfHParms`` is given, or a value is invalid.
            TypeError: There is no such Param, or a value has the wrong type.
        """
        if tfHParms is not None:
            raise InvalidArgumentError("tfHParms never had an effect in sparkdl; use batchSize")
        if tfInputGraph is not None:
            params["model"] = tfInputGraph
        return super().setParams(**params)

    def getTFInputGraph(self) -> Any:
        """Return the model."""
        return self.getModel()

    def setTFInputGraph(self, value: Any) -> Self:
        """Set the model."""
        return self.setModel(value)
