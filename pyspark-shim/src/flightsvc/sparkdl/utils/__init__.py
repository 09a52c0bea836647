"""Names of sparkdl's own machinery; see :mod:`flightsvc.sparkdl.removed`."""
