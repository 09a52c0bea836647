"""Names of sparkdl that trained models; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import removed

__getattr__ = removed(__name__, "KerasImageFileEstimator")
