"""Sessions of TensorFlow 1: of a graph, a checkpoint or a SavedModel, and their variables made constants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export import first_line, import_tensorflow
from flightsvc.export.freeze import split_gathers

if TYPE_CHECKING:
    import os

    import tensorflow as tf

PLACEHOLDERS = ("Placeholder", "PlaceholderV2")
"""The types of operations that are fed."""


def freeze_graph(
    graph: tf.Graph, session: tf.compat.v1.Session, feeds: Iterable[str], fetches: Iterable[str]
) -> tf.compat.v1.GraphDef:
    """Return the part of a graph that computes ``fetches``, with the values of variables in ``session``."""
    tf = import_tensorflow()
    from tensorflow.python.util import deprecation

    inputs = [tensor_of(graph, name, "input") for name in feeds]
    outputs = [tensor_of(graph, name, "output") for name in fetches]
    graph_def = graph.as_graph_def()
    split_gathers(graph_def)
    try:
        with deprecation.silence():
            frozen = tf.compat.v1.graph_util.convert_variables_to_constants(
                session, graph_def, [tensor.op.name for tensor in outputs]
            )
    except (tf.errors.OpError, ValueError) as error:
        raise InvalidArgumentError(
            f"the variables of the graph cannot be made constants: {first_line(error)}; initialise or "
            "restore them in the session"
        ) from error
    present = {node.name for node in frozen.node}
    for tensor in inputs:  # inputs that no output needs
        if tensor.op.type in PLACEHOLDERS and tensor.op.name not in present:
            frozen.node.add().CopyFrom(tensor.op.node_def)
            present.add(tensor.op.name)
    return frozen


def strip_and_freeze(
    graph: tf.Graph, session: tf.compat.v1.Session | None, fetches: Iterable[str]
) -> tf.compat.v1.GraphDef:
    """Return the part of a graph that computes ``fetches``, with constants for its variables.

    Args:
        graph: The graph.
        session: A session with the values of variables; ``None``: the graph has no variables.
        fetches: The names of tensors.

    Raises:
        NotFoundError: The graph has no such tensor.
        InvalidArgumentError: A variable is not initialised.
    """
    if session is not None:
        return freeze_graph(graph, session, (), fetches)
    tf = import_tensorflow()
    with tf.compat.v1.Session(graph=graph, config=_config()) as session:
        return freeze_graph(graph, session, (), fetches)


@contextmanager
def graph_session() -> Iterator[tuple[tf.Graph, tf.compat.v1.Session]]:
    """Make a new graph and a session of it the default."""
    tf = import_tensorflow()
    with (
        tf.Graph().as_default() as graph,
        tf.compat.v1.Session(graph=graph, config=_config()) as session,
    ):
        yield graph, session


@contextmanager
def checkpoint_session(
    folder: str | os.PathLike[str],
) -> Iterator[tuple[tf.Graph, tf.compat.v1.Session, Any]]:
    """Restore the latest checkpoint of a folder; yield graph, session and MetaGraphDef."""
    tf = import_tensorflow()
    found = tf.train.latest_checkpoint(str(folder))
    if found is None or not Path(f"{found}.meta").exists():
        raise NotFoundError(f"{folder} holds no checkpoint of tf.compat.v1.train.Saver with its .meta file")
    with graph_session() as (graph, session):
        try:
            meta = tf.compat.v1.MetaGraphDef.FromString(Path(f"{found}.meta").read_bytes())
            tf.compat.v1.train.import_meta_graph(meta, clear_devices=True).restore(session, found)
        except Exception as error:  # any error of the reader and its kernels
            raise InvalidArgumentError(f"checkpoint {found} cannot be read: {first_line(error)}") from error
        yield graph, session, meta


@contextmanager
def saved_model_session(
    folder: str | os.PathLike[str], tag_set: str
) -> Iterator[tuple[tf.Graph, tf.compat.v1.Session, Any]]:
    """Load a graph of a SavedModel; yield graph, session and MetaGraphDef."""
    tf = import_tensorflow()
    from tensorflow.python.util import deprecation

    if not (Path(folder) / "saved_model.pb").exists():
        raise NotFoundError(f"{folder} holds no saved_model.pb; give the folder of one SavedModel")
    tags = [tag.strip() for tag in tag_set.split(",")]
    with graph_session() as (graph, session):
        try:
            with deprecation.silence():
                meta = tf.compat.v1.saved_model.load(session, tags, str(folder))
        except Exception as error:  # any error of the loader and its kernels
            raise InvalidArgumentError(
                f"{folder} cannot be loaded with the tags {tags}: {first_line(error)}"
            ) from error
        yield graph, session, meta


def _config() -> Any:
    """Return a configuration that runs sessions on the CPU, whatever devices the graph names."""
    return import_tensorflow().compat.v1.ConfigProto(device_count={"GPU": 0}, allow_soft_placement=True)


def tensor_of(graph: tf.Graph, name: str, what: str) -> tf.Tensor:
    """Return the tensor ``op`` or ``op:0``.

    Raises:
        NotFoundError: The graph has no such tensor.
    """
    try:
        return graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    except (KeyError, ValueError):
        operations = graph.get_operations()
        taken = {tensor.op.name for op in operations for tensor in op.inputs}
        near = [
            f"{op.name}:0"
            for op in operations
            if (op.type in PLACEHOLDERS if what == "input" else op.outputs and op.name not in taken)
        ]
        raise NotFoundError(
            f"the graph has no tensor {name!r} for an {what}; it has {', '.join(near[:10]) or 'none'}"
        ) from None
