"""Graphs of TensorFlow 1 as SavedModels, made on the driver.

A :class:`TFInputGraph` is a graph without variables, made of a session, a ``GraphDef``, a frozen file, a
checkpoint or a SavedModel. :meth:`TFInputGraph.saved_model` makes a SavedModel of it for
:class:`flightsvc.Model`. This works whether the behaviour of TensorFlow 2 is enabled in this process or not.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export import first_line, import_tensorflow
from flightsvc.export.freeze import LIMIT
from flightsvc.export.sessions import (
    PLACEHOLDERS,
    checkpoint_session,
    freeze_graph,
    graph_session,
    saved_model_session,
    tensor_of,
)
from flightsvc.server.shipping import private_folder

if TYPE_CHECKING:
    import os

    import tensorflow as tf

_STATEFUL = ("VarHandleOp", "Variable", "VariableV2", "VariableV1")

_mutex = threading.Lock()  # guards _exported; held while a model is written
_exported: dict[str, Path] = {}  # by digest of the graph and the request


class GraphError(InvalidArgumentError, AssertionError):
    """A graph or an argument is invalid; also an ``AssertionError``, as in sparkdl."""


class TFInputGraph:
    """A graph of TensorFlow 1 without variables, and the tensors of its signature.

    It is made by one of the constructors ``from...`` and can be pickled. Tensors have the names of
    TensorFlow, ``x:0``; ``x`` is the first output of the operation ``x``.

    Attributes:
        graph_def: The ``GraphDef``, reduced to what the outputs need.
        input_tensor_name_from_signature: Name in the signature to tensor; ``None``: there is no signature.
        output_tensor_name_from_signature: Name in the signature to tensor; ``None``: there is no signature.
    """

    def __init__(
        self,
        graph_def: tf.compat.v1.GraphDef,
        input_tensor_name_from_signature: Mapping[str, str] | None = None,
        output_tensor_name_from_signature: Mapping[str, str] | None = None,
    ):
        tf = import_tensorflow()
        if not isinstance(graph_def, tf.compat.v1.GraphDef):
            raise GraphError(f"a graph is a tf.compat.v1.GraphDef, not {type(graph_def).__name__}")
        self.graph_def = graph_def
        self.input_tensor_name_from_signature = _copy(input_tensor_name_from_signature)
        self.output_tensor_name_from_signature = _copy(output_tensor_name_from_signature)

    @classmethod
    def fromGraph(
        cls,
        graph: tf.Graph,
        sess: tf.compat.v1.Session,
        feed_names: Sequence[str],
        fetch_names: Sequence[str],
    ) -> Self:
        """Return the part of a graph that computes ``fetch_names``, with the values of variables in ``sess``.

        Raises:
            NotFoundError: The graph has no such tensor.
            GraphError: The names are missing, or ``graph`` is not a graph.
            InvalidArgumentError: A variable is not initialised.
        """
        if not isinstance(graph, import_tensorflow().Graph):
            raise GraphError(f"a graph is a tf.Graph, not {type(graph).__name__}")
        _both(feed_names, fetch_names)
        return cls(freeze_graph(graph, sess, feed_names, fetch_names))

    @classmethod
    def fromGraphDef(
        cls, graph_def: tf.compat.v1.GraphDef, feed_names: Sequence[str], fetch_names: Sequence[str]
    ) -> Self:
        """Return the part of a graph that computes ``fetch_names``; raises as :meth:`fromGraph`."""
        _both(feed_names, fetch_names)
        whole = cls(graph_def)
        with graph_session() as (graph, session):
            whole._import()
            return cls(freeze_graph(graph, session, feed_names, fetch_names))

    @classmethod
    def fromFrozenFile(cls, path: str | os.PathLike[str]) -> Self:
        """Return the whole graph of a file ``.pb``, a binary ``GraphDef`` without variables.

        Raises:
            NotFoundError: There is no such file.
            InvalidArgumentError: It has no ``GraphDef``.
        """
        from google.protobuf.message import DecodeError

        graph_def = import_tensorflow().compat.v1.GraphDef()
        try:
            graph_def.ParseFromString(Path(path).read_bytes())
        except OSError as error:
            raise NotFoundError(f"graph {path}: {error.strerror}") from None
        except DecodeError as error:
            raise InvalidArgumentError(f"{path} holds no frozen graph (a binary GraphDef): {error}") from None
        return cls(graph_def)

    @classmethod
    def fromCheckpoint(
        cls, checkpoint_dir: str | os.PathLike[str], feed_names: Sequence[str], fetch_names: Sequence[str]
    ) -> Self:
        """Return the graph of the latest checkpoint in a folder, with its variables.

        The checkpoint was written by ``tf.compat.v1.train.Saver``, with its ``.meta`` file.

        Raises:
            NotFoundError: There is no checkpoint, or it has no such tensor.
            GraphError: The names are missing.
            InvalidArgumentError: TensorFlow cannot read it.
        """
        _both(feed_names, fetch_names)
        with checkpoint_session(checkpoint_dir) as (graph, session, _):
            return cls(freeze_graph(graph, session, feed_names, fetch_names))

    @classmethod
    def fromCheckpointWithSignature(
        cls, checkpoint_dir: str | os.PathLike[str], signature_def_key: str
    ) -> Self:
        """Return the graph of the latest checkpoint in a folder, with the tensors of its signature.

        Raises:
            NotFoundError: There is no checkpoint, or it has no such signature.
            GraphError: ``signature_def_key`` is ``None``.
            InvalidArgumentError: TensorFlow cannot read it.
        """
        _key(signature_def_key)
        with checkpoint_session(checkpoint_dir) as (graph, session, meta):
            return cls._of_signature(graph, session, meta, signature_def_key)

    @classmethod
    def fromSavedModel(
        cls,
        saved_model_dir: str | os.PathLike[str],
        tag_set: str,
        feed_names: Sequence[str],
        fetch_names: Sequence[str],
    ) -> Self:
        """Return a graph of a SavedModel of TensorFlow 1 or 2, without using its signatures.

        Args:
            saved_model_dir: The folder with ``saved_model.pb``.
            tag_set: The tags of the graph, separated by commas; mostly ``serve``.
            feed_names: The input tensors.
            fetch_names: The output tensors.

        Raises:
            NotFoundError: There is no SavedModel, or it has no such tensor.
            GraphError: The names are missing.
            InvalidArgumentError: It has no graph with these tags, or TensorFlow cannot read it.
        """
        _both(feed_names, fetch_names)
        with saved_model_session(saved_model_dir, tag_set) as (graph, session, _):
            return cls(freeze_graph(graph, session, feed_names, fetch_names))

    @classmethod
    def fromSavedModelWithSignature(
        cls, saved_model_dir: str | os.PathLike[str], tag_set: str, signature_def_key: str
    ) -> Self:
        """Return a graph of a SavedModel with the tensors of one of its signatures.

        Raises:
            NotFoundError: There is no SavedModel, or it has no such signature.
            GraphError: ``signature_def_key`` is ``None``.
            InvalidArgumentError: It has no graph with these tags, or TensorFlow cannot read it.
        """
        _key(signature_def_key)
        with saved_model_session(saved_model_dir, tag_set) as (graph, session, meta):
            return cls._of_signature(graph, session, meta, signature_def_key)

    @classmethod
    def _of_signature(cls, graph: tf.Graph, session: Any, meta: Any, key: str) -> Self:
        if key not in meta.signature_def:
            known = ", ".join(sorted(meta.signature_def)) or "none"
            raise NotFoundError(f"there is no signature {key!r}; there is {known}")
        signature = meta.signature_def[key]
        inputs, outputs = (
            {name: _dense(name, info) for name, info in side.items()}
            for side in (signature.inputs, signature.outputs)
        )
        return cls(freeze_graph(graph, session, [*inputs.values()], [*outputs.values()]), inputs, outputs)

    def translateInputMapping(
        self, input_mapping: Mapping[str, str] | Sequence[tuple[str, str]]
    ) -> dict[str, str]:
        """Return column to tensor for a mapping of column to the input's name in the signature.

        Raises:
            NotFoundError: The signature has no such input.
            GraphError: There is no signature.
        """
        known = _signature(self.input_tensor_name_from_signature)
        return {column: _lookup(known, name, "input") for column, name in _pairs(input_mapping)}

    def translateOutputMapping(
        self, output_mapping: Mapping[str, str] | Sequence[tuple[str, str]]
    ) -> dict[str, str]:
        """Return tensor to column for a mapping of the output's name in the signature to column.

        Raises:
            NotFoundError: The signature has no such output.
            GraphError: There is no signature.
        """
        known = _signature(self.output_tensor_name_from_signature)
        return {_lookup(known, name, "output"): column for name, column in _pairs(output_mapping)}

    def saved_model(self, inputs: Sequence[str], outputs: Sequence[str], *, per_row: bool = False) -> Path:
        """Return the folder of a SavedModel of this graph, which is made once and removed with this process.

        Inputs and outputs of its signature ``serving_default`` have the names that are given here, ``x:0`` or
        ``x``.

        Args:
            inputs: The tensors that are fed, with all placeholders that the outputs need.
            outputs: The tensors that are computed.
            per_row: The graph takes one row, without a batch dimension, and is run for each row.

        Raises:
            NotFoundError: The graph has no such tensor.
            InvalidArgumentError: The outputs need another placeholder, a variable or a table; or the graph is
                too large.
        """
        tf = import_tensorflow()

        def build() -> tuple[dict[str, Any], dict[str, Any]]:
            part = Subgraph(self, inputs, outputs)
            if not per_row:
                fed = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in part.feeds]
                return dict(zip(inputs, fed, strict=True)), dict(zip(outputs, part(fed), strict=True))
            fed = [
                tf.compat.v1.placeholder(t.dtype, tf.TensorShape([None]).concatenate(t.shape))
                for t in part.feeds
            ]
            specs = [tf.TensorSpec(t.shape, t.dtype) for t in part.fetches]

            @tf.function(autograph=False)  # type: ignore[untyped-decorator]
            def rows(*tensors: Any) -> Any:
                return tf.map_fn(part, list(tensors), fn_output_signature=specs)

            return dict(zip(inputs, fed, strict=True)), dict(zip(outputs, rows(*fed), strict=True))

        return self.exported(("tensors", [*inputs], [*outputs], per_row), build)

    def placeholders(self) -> list[str]:
        """Return the names of all placeholders, ``x:0``, in the graph's order."""
        return [f"{node.name}:0" for node in self.graph_def.node if node.op in PLACEHOLDERS]

    def exported(self, asked: Any, build: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> Path:
        """Return the folder of the SavedModel that ``build`` makes in a new graph, once for ``asked``."""
        tf = import_tensorflow()
        if self.graph_def.ByteSize() > LIMIT:
            raise InvalidArgumentError(
                f"the graph has {self.graph_def.ByteSize():,} bytes, more than {LIMIT:,}; "
                "save it with its variables as a SavedModel, and give its folder"
            )
        content = hashlib.sha256(self.graph_def.SerializeToString(deterministic=True))
        content.update(repr(asked).encode())
        with _mutex:
            folder = _exported.get(content.hexdigest())
            if folder is None:
                with tf.Graph().as_default() as graph:
                    inputs, outputs = build()
                    folder = _write(graph, inputs, outputs)
                _exported[content.hexdigest()] = folder
            return folder

    def _import(self) -> None:
        """Import the whole graph, with unchanged names, into the default graph."""
        try:
            import_tensorflow().import_graph_def(self.graph_def, name="")
        except ValueError as error:
            raise InvalidArgumentError(f"TensorFlow cannot read the graph: {first_line(error)}") from error


def as_graph(given: Any, inputs: Sequence[str], outputs: Sequence[str]) -> TFInputGraph:
    """Return a TFInputGraph of itself, a ``tf.Graph``, a ``GraphDef`` or the file of one.

    Variables of a ``tf.Graph`` have their values in the default session.

    Args:
        given: The graph.
        inputs: The tensors that are fed.
        outputs: The tensors that are computed.

    Raises:
        InvalidArgumentError: ``given`` is something else, or the file has no graph.
        NotFoundError: There is no such file or tensor.
    """
    if isinstance(given, TFInputGraph):
        return given
    if isinstance(given, Path):
        return TFInputGraph.fromFrozenFile(given)
    tf = import_tensorflow()
    if isinstance(given, tf.Graph):
        session = tf.compat.v1.get_default_session()
        if session is not None and session.graph is given:
            return TFInputGraph.fromGraph(given, session, inputs, outputs)
        given = given.as_graph_def()
    if not isinstance(given, tf.compat.v1.GraphDef):
        raise InvalidArgumentError(
            f"a graph is a tf.Graph, a GraphDef or a TFInputGraph, not {type(given).__name__}"
        )
    return TFInputGraph.fromGraphDef(given, inputs, outputs)


class Subgraph:
    """The subgraph from ``feeds`` to ``fetches``; a call imports it into the current graph.

    Attributes:
        feeds: The tensors that are fed.
        fetches: The tensors that are computed.
    """

    def __init__(self, graph: TFInputGraph, feeds: Sequence[str], fetches: Sequence[str]):
        tf = import_tensorflow()
        with tf.Graph().as_default() as whole:
            graph._import()
        self.feeds = [tensor_of(whole, name, "input") for name in feeds]
        self.fetches = [tensor_of(whole, name, "output") for name in fetches]
        fed = {tensor.name for tensor in self.feeds}
        fed_ops = {tensor.op.name for tensor in self.feeds}
        reached: dict[str, Any] = {}
        used: set[str] = set()
        waiting = [tensor for tensor in self.fetches if tensor.name not in fed]
        operations = [tensor.op for tensor in waiting]
        while operations:
            operation = operations.pop()
            if operation.name in reached:
                continue
            reached[operation.name] = operation
            for tensor in operation.inputs:
                if tensor.name in fed:
                    used.add(tensor.name)
                else:
                    operations.append(tensor.op)
            operations += [op for op in operation.control_inputs if op.name not in fed_ops]
        for operation in reached.values():
            _serves(operation, fetches)
        self._used = used
        self._graph_def = tf.compat.v1.GraphDef()
        self._graph_def.CopyFrom(graph.graph_def)
        del self._graph_def.node[:]
        for node in graph.graph_def.node:
            if node.name in reached:
                new = self._graph_def.node.add()
                new.CopyFrom(node)
                new.device = ""  # the server chooses the device
                kept = [
                    i for i in node.input if not (i.startswith("^") and i[1:] in fed_ops - reached.keys())
                ]
                del new.input[:]
                new.input.extend(kept)
        for function in self._graph_def.library.function:
            for node in function.node_def:
                node.device = ""

    def __call__(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return ``fetches`` computed from ``tensors`` in the current graph."""
        given = {feed.name: tensor for feed, tensor in zip(self.feeds, tensors, strict=True)}
        wanted = sorted({tensor.name for tensor in self.fetches} - given.keys())
        tf = import_tensorflow()
        try:
            made = tf.import_graph_def(
                self._graph_def,
                input_map={name: tensor for name, tensor in given.items() if name in self._used},
                return_elements=wanted,
                name="graph",
            )
        except ValueError as error:
            raise InvalidArgumentError(f"the graph does not take its inputs: {first_line(error)}") from error
        known = dict(zip(wanted, made, strict=True)) | given
        return [tf.identity(known[tensor.name]) for tensor in self.fetches]


def _serves(operation: tf.Operation, fetches: Sequence[str]) -> None:
    """Refuse an operation that needs a value which is not in the graph."""
    which = f"output {', '.join(map(repr, fetches))}"
    if operation.type in PLACEHOLDERS:
        raise GraphError(
            f"{which} needs the placeholder '{operation.name}:0', which is not an input; map a column to it"
        )
    if operation.type in _STATEFUL:
        raise GraphError(
            f"{which} needs the variable {operation.name!r}; give the graph with the session that has its "
            "values (TFInputGraph.fromGraph), or its checkpoint or SavedModel"
        )
    if "HashTable" in operation.type:
        raise GraphError(
            f"{which} needs the table {operation.name!r}, which is filled when a SavedModel is loaded; "
            "give the folder of the SavedModel as the model"
        )


def _write(graph: tf.Graph, inputs: Mapping[str, tf.Tensor], outputs: Mapping[str, tf.Tensor]) -> Path:
    """Write ``graph`` as a SavedModel with one signature; the folder is removed with this process."""
    tf = import_tensorflow()
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    meta = saved.meta_graphs.add()
    meta.meta_info_def.tags.append("serve")
    meta.meta_info_def.tensorflow_version = tf.__version__
    meta.graph_def.CopyFrom(graph.as_graph_def(add_shapes=True))
    signature = meta.signature_def["serving_default"]
    signature.method_name = "tensorflow/serving/predict"
    for side, tensors in ((signature.inputs, inputs), (signature.outputs, outputs)):
        for name, tensor in tensors.items():
            side[name].name = tensor.name
            side[name].dtype = tensor.dtype.as_datatype_enum
            side[name].tensor_shape.CopyFrom(tensor.shape.as_proto())
    folder = Path(tempfile.mkdtemp(dir=private_folder()))
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))
    return folder


def _dense(name: str, info: Any) -> str:
    if info.WhichOneof("encoding") != "name":
        raise InvalidArgumentError(f"the signature's {name!r} is not a dense tensor, which it must be")
    return str(info.name)


def _both(feeds: Any, fetches: Any) -> None:
    for what, names in (("feed_names", feeds), ("fetch_names", fetches)):
        if names is None or isinstance(names, str):
            raise GraphError(f"{what} is {names!r}; give the names of tensors, such as ['x:0']")


def _key(key: Any) -> None:
    if not isinstance(key, str):
        raise GraphError(f"signature_def_key is {key!r}; give a name, such as 'serving_default'")


def _signature(known: dict[str, str] | None) -> dict[str, str]:
    if known is None:
        raise GraphError("the graph was made without a signature; give the names of its tensors")
    return known


def _lookup(known: Mapping[str, str], name: str, what: str) -> str:
    if name not in known:
        raise NotFoundError(f"the signature has no {what} {name!r}; it has {', '.join(sorted(known))}")
    return known[name]


def _pairs(mapping: Any) -> list[tuple[str, str]]:
    if not isinstance(mapping, Mapping | list | tuple):
        raise GraphError(f"a mapping is a dict or a list of pairs, not {type(mapping).__name__}")
    return list(mapping.items()) if isinstance(mapping, Mapping) else list(mapping)


def _copy(names: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if names is None else dict(names)
