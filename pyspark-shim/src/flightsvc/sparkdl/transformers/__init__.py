"""The package ``sparkdl.transformers``: stages of :mod:`flightsvc.ml` with sparkdl's arguments."""
