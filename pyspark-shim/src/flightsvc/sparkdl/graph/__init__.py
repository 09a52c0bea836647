"""Graphs of TensorFlow 1, by the names of sparkdl."""
