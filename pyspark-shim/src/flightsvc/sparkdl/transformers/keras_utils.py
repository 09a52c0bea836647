"""The module ``sparkdl.transformers.keras_utils``: a graph of TensorFlow 1 with a session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flightsvc.export import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf


@contextlib.contextmanager
def KSessionWrap(graph: tf.Graph | None = None) -> Iterator[tuple[tf.compat.v1.Session, tf.Graph]]:
    """Make ``graph``, or a new one, the default graph with a session; yield ``(session, graph)``.

    It is for operations of TensorFlow. Keras 3 does not build models in a session.
    """
    tf = import_tensorflow()
    graph = graph or tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        yield session, graph
