"""The module ``sparkdl.graph.utils``, often imported as ``tfx``: names, tensors and operations of graphs.

Arguments are tensors, operations, or names: ``op`` or ``op:0``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flightsvc.errors import NotFoundError
from flightsvc.export import import_tensorflow
from flightsvc.export.graph import GraphError
from flightsvc.export.sessions import strip_and_freeze

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = [
    "add_scope_to_name",
    "get_op",
    "get_shape",
    "get_tensor",
    "op_name",
    "strip_and_freeze_until",
    "tensor_name",
    "validated_graph",
    "validated_input",
    "validated_output",
]

_NAME = re.compile(r"(?P<op>[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*)(:(?P<index>[0-9]+))?")


def validated_graph(graph: tf.Graph) -> tf.Graph:
    """Return ``graph``.

    Raises:
        TypeError: It is not a ``tf.Graph``.
    """
    tf = import_tensorflow()
    if not isinstance(graph, tf.Graph):
        raise TypeError(f"a graph is a tf.Graph, not {type(graph).__name__}")
    return graph


def get_shape(tfobj_or_name: Any, graph: tf.Graph) -> list[int]:
    """Return the shape of a tensor, with -1 for unknown sizes.

    Raises:
        ValueError: Its rank is unknown.
        TypeError, NotFoundError, AssertionError: As :func:`get_tensor`.
    """
    shape = get_tensor(tfobj_or_name, graph).shape
    if shape.rank is None:
        raise ValueError(f"the rank of {tensor_name(tfobj_or_name)!r} is not known")
    return [-1 if size is None else size for size in shape.as_list()]


def get_op(tfobj_or_name: Any, graph: tf.Graph) -> tf.Operation:
    """Return an operation of ``graph``.

    Raises:
        TypeError: An argument has the wrong type.
        NotFoundError: The graph has no operation of that name.
        AssertionError: The object is in another graph.
    """
    find = validated_graph(graph).get_operation_by_name
    return _found(tfobj_or_name, graph, find, op_name(tfobj_or_name), "operation")


def get_tensor(tfobj_or_name: Any, graph: tf.Graph) -> tf.Tensor:
    """Return a tensor of ``graph``: for an operation its first output.

    Raises:
        TypeError: An argument has the wrong type.
        NotFoundError: The graph has no tensor of that name.
        AssertionError: The object is in another graph.
    """
    find = validated_graph(graph).get_tensor_by_name
    return _found(tfobj_or_name, graph, find, tensor_name(tfobj_or_name), "tensor")


def tensor_name(tfobj_or_name: Any, graph: tf.Graph | None = None) -> str:
    """Return the name of a tensor, ``op:0`` for an operation; it must be in ``graph`` if that is given.

    Raises:
        TypeError: It is not a name, tensor or operation.
        NotFoundError, AssertionError: As :func:`get_tensor`.
    """
    if graph is not None:
        return str(get_tensor(tfobj_or_name, graph).name)
    operation, index = _parts(tfobj_or_name)
    return f"{operation}:{index or 0}"


def op_name(tfobj_or_name: Any, graph: tf.Graph | None = None) -> str:
    """Return the name of an operation, or of that of a tensor; it must be in ``graph`` if that is given.

    Raises:
        TypeError: It is not a name, tensor or operation.
        NotFoundError, AssertionError: As :func:`get_op`.
    """
    if graph is not None:
        return str(get_op(tfobj_or_name, graph).name)
    return _parts(tfobj_or_name)[0]


def add_scope_to_name(scope: str, name: str) -> str:
    """Return ``name`` in the scope ``scope``, which may be empty.

    Raises:
        TypeError: An argument is not text.
    """
    for text in (scope, name):
        if not isinstance(text, str):
            raise TypeError(f"a name is a str, not {type(text).__name__}")
    return f"{scope}/{name}" if scope else name


def validated_output(tfobj_or_name: Any, graph: tf.Graph) -> str:
    """Return the name of the operation of an output of ``graph``; raises as :func:`get_op`."""
    return op_name(tfobj_or_name, graph)


def validated_input(tfobj_or_name: Any, graph: tf.Graph) -> str:
    """Return the name of a placeholder of ``graph``; raises as :func:`get_op`.

    Raises:
        AssertionError: It is not a placeholder.
    """
    operation = get_op(tfobj_or_name, graph)
    if not operation.type.startswith("Placeholder"):
        raise GraphError(f"{operation.name!r} is a {operation.type}, an input must be a Placeholder")
    return str(operation.name)


def strip_and_freeze_until(
    fetches: Sequence[Any],
    graph: tf.Graph,
    sess: tf.compat.v1.Session | None = None,
    return_graph: bool = False,
) -> tf.compat.v1.GraphDef | tf.Graph:
    """Return the part of ``graph`` that computes ``fetches``, with constants for its variables.

    Args:
        fetches: Tensors, operations or names.
        graph: The graph.
        sess: A session with the values of variables; ``None``: the default session, if it is of this graph.
        return_graph: Return a ``tf.Graph`` instead of a ``GraphDef``.

    Raises:
        TypeError, NotFoundError, AssertionError: As :func:`get_tensor`.
        InvalidArgumentError: A variable is not initialised.
    """
    tf = import_tensorflow()
    names = [tensor_name(fetch, graph) for fetch in fetches]
    session = sess or tf.compat.v1.get_default_session()
    if sess is None and session is not None and session.graph is not graph:
        session = None
    graph_def = strip_and_freeze(graph, session, names)
    if not return_graph:
        return graph_def
    with tf.Graph().as_default() as stripped:
        tf.import_graph_def(graph_def, name="")
    return stripped


def _parts(found: Any) -> tuple[str, str | None]:
    """Return the name of the operation, and the number of the output if it is given."""
    tf = import_tensorflow()
    if isinstance(found, tf.Operation):
        return found.name, None
    if not isinstance(found, str) and tf.is_tensor(found) and hasattr(found, "graph"):
        found = found.name
    if not isinstance(found, str):
        raise TypeError(f"want a tensor, an operation or a name, not {type(found).__name__}")
    match = _NAME.fullmatch(found)
    if match is None:
        raise TypeError(f"{found!r} is no name of a tensor or an operation; such are 'x' and 'x:0'")
    return match["op"], match["index"]


def _found(given: Any, graph: tf.Graph, find: Callable[[str], Any], name: str, what: str) -> Any:
    """Return what ``find`` finds in ``graph``; refuse an object in another graph."""
    if not isinstance(given, str) and getattr(given, "graph", graph) is not graph:
        raise GraphError(f"{op_name(given)!r} belongs to another graph")
    try:
        return find(name)
    except (KeyError, ValueError):
        raise NotFoundError(f"the graph has no {what} {name!r}") from None
