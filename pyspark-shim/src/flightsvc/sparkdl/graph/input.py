"""The module ``sparkdl.graph.input``: graphs with their inputs and outputs."""

from flightsvc.export.graph import TFInputGraph

__all__ = ["TFInputGraph"]
