"""Names of sparkdl for Keras on Horovod; see :mod:`flightsvc.sparkdl.removed`."""
