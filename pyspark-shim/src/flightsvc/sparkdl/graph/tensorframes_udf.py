"""The module ``sparkdl.graph.tensorframes_udf``: a graph as a function of SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError
from flightsvc.export import import_tensorflow
from flightsvc.export.graph import GraphError, TFInputGraph
from flightsvc.export.sessions import strip_and_freeze
from flightsvc.model import Model
from flightsvc.spark.functions import Function, register_udf
from flightsvc.spark.session import active_session
from flightsvc.sparkdl.graph import utils as tfx

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["makeGraphUDF"]


def makeGraphUDF(
    graph: tf.Graph,
    udf_name: str,
    fetches: Sequence[Any],
    feeds_to_fields_map: Mapping[Any, str] | None = None,
    blocked: bool = False,
    register: bool = True,
) -> Function:
    """Make a graph of TensorFlow 1 a function in the active session: ``SELECT name(x, y) FROM points``.

    The parameters are the placeholders that the fetches need, sorted by name. The result is the only fetch,
    or a struct of several fetches, sorted by name. Variables have their values in the default session.

    Args:
        graph: The graph.
        udf_name: The function's name.
        fetches: The results: tensors, operations or names.
        feeds_to_fields_map: Placeholder to the name of its parameter, if that is another.
        blocked: Whether the graph takes many rows, with an unknown first dimension; else it takes one row,
            without a batch dimension.
        register: Whether the function is registered for SQL.

    Returns:
        The function of columns: ``df.select(f("x", "y"))``. sparkdl returned a handle of the JVM.

    Raises:
        TypeError: ``graph`` is not a ``tf.Graph``, or a fetch is not a tensor.
        AssertionError: A fetch is in another graph, or the map names something else than a placeholder.
        NotFoundError: The graph has no such tensor.
        InvalidArgumentError: There is no session, no fetch or no placeholder, or a variable without a value.
    """
    tf = import_tensorflow()
    names = sorted(tfx.tensor_name(fetch, graph) for fetch in fetches)
    session = tf.compat.v1.get_default_session()
    frozen = TFInputGraph(
        strip_and_freeze(graph, session if session and session.graph is graph else None, names)
    )
    feeds = sorted(frozen.placeholders())
    if not names or not feeds:
        raise InvalidArgumentError(
            f"function {udf_name!r} has no {'placeholder that its fetches need' if names else 'fetch'}"
        )
    parameters = {feed: feed.removesuffix(":0") for feed in feeds}
    for feed, field in (feeds_to_fields_map or {}).items():
        name = tfx.tensor_name(feed, graph)
        if name not in parameters:
            raise GraphError(
                f"{name!r} is no placeholder that {', '.join(names)} need; those are {', '.join(feeds)}"
            )
        parameters[name] = field
    model = Model(frozen.saved_model(feeds, names, per_row=not blocked))
    columns = {name: name.removesuffix(":0") for name in names}
    spark: Any = active_session()
    if register and spark is not None:
        register_udf(spark, udf_name, model, inputs=parameters, outputs=columns)
    return model.udf(inputs=parameters, outputs=columns)
