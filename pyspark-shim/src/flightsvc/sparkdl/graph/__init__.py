"""The package ``sparkdl.graph``: graphs of TensorFlow 1."""
