"""The transformers of sparkdl: the stages of :mod:`flightsvc.ml` with the old arguments and defaults."""
