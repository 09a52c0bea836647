"""Keras models as bytes; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import TRAINING, removed

_FILES = "use model.save and keras.saving.load_model; stages and flightsvc.Model take a Keras model as it is"

__getattr__ = removed(
    __name__,
    bytes_to_h5file=_FILES,
    bytes_to_model=_FILES,
    model_to_bytes=_FILES,
    is_valid_loss_function=f"{TRAINING}; keras.losses.get(name) refuses what Keras does not know",
    is_valid_optimizer=f"{TRAINING}; keras.optimizers.get(name) refuses what Keras does not know",
)
