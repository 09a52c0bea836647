"""Pieces of graphs for pictures; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import removed

__getattr__ = removed(
    __name__,
    buildFlattener="stages flatten by themselves; in a graph of your own use tf.reshape",
    buildSpImageConverter="TFImageTransformer converts pictures by itself, and so does flightsvc.ImageInput",
)
