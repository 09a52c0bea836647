"""The module ``sparkdl.param``: Params that stages share, and what converts their values."""

from pyspark import keyword_only

from flightsvc.sparkdl.param.converters import SparkDLTypeConverters
from flightsvc.sparkdl.param.shared_params import (
    OUTPUT_MODES,
    CanLoadImage,
    HasInputCol,
    HasInputMapping,
    HasKerasLoss,
    HasKerasModel,
    HasKerasOptimizer,
    HasLabelCol,
    HasOutputCol,
    HasOutputMapping,
    HasOutputMode,
    HasTFHParams,
    HasTFInputGraph,
)

__all__ = [
    "OUTPUT_MODES",
    "CanLoadImage",
    "HasInputCol",
    "HasInputMapping",
    "HasKerasLoss",
    "HasKerasModel",
    "HasKerasOptimizer",
    "HasLabelCol",
    "HasOutputCol",
    "HasOutputMapping",
    "HasOutputMode",
    "HasTFHParams",
    "HasTFInputGraph",
    "SparkDLTypeConverters",
    "keyword_only",
]
