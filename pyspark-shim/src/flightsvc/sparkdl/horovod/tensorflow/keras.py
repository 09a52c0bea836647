"""The callback of Keras on Horovod; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import TRAINING, removed

__getattr__ = removed(__name__, LogCallback=f"{TRAINING}; Keras has keras.callbacks.CSVLogger")
