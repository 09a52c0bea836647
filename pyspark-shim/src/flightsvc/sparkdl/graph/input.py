"""Graphs with their inputs and outputs."""

from flightsvc.graph import TFInputGraph

__all__ = ["TFInputGraph"]
