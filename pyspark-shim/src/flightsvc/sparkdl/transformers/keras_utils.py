"""A graph and a session of TensorFlow 1 for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flightsvc.export import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf


@contextlib.contextmanager
def KSessionWrap(graph: tf.Graph | None = None) -> Iterator[tuple[tf.compat.v1.Session, tf.Graph]]:
    """Make ``graph``, or a new one, the default one, with a session of its own: ``(session, graph)``.

    Keras 3 has no session: models of Keras are not built in it, operations of TensorFlow are.
    """
    tf = import_tensorflow()
    graph = graph or tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        yield session, graph
