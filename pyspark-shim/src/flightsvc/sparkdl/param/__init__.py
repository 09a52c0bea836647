"""The package ``sparkdl.param``: shared Params and their converters."""

from pyspark import keyword_only

from flightsvc.sparkdl.param import shared_params
from flightsvc.sparkdl.param.converters import SparkDLTypeConverters
from flightsvc.sparkdl.param.shared_params import *  # noqa: F403, the names in its __all__

__all__ = ["SparkDLTypeConverters", "keyword_only"]
__all__ += shared_params.__all__
