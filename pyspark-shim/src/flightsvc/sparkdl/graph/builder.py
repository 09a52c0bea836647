"""The builder of graphs; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import removed

__getattr__ = removed(__name__, "GraphFunction", "IsolatedSession")
