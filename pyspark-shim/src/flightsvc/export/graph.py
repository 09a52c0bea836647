"""Graphs of TensorFlow 1 as SavedModels; on the driver, which needs TensorFlow.

A :class:`TFInputGraph` is a graph whose variables are constants, made of a session, a ``GraphDef``, a frozen
file, a checkpoint or a SavedModel. :meth:`TFInputGraph.saved_model` makes a SavedModel of it, for
:class:`flightsvc.Model`; :func:`picture_model` one that takes pictures, each at its own size.

All of it works on graphs of its own, whether TensorFlow 2's behaviour is on or off in this process.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export.freeze import LIMIT, split_gathers
from flightsvc.server.shipping import private_folder

if TYPE_CHECKING:
    import os

    import tensorflow as tf

_STATEFUL = ("VarHandleOp", "Variable", "VariableV2", "VariableV1")
_PLACEHOLDERS = ("Placeholder", "PlaceholderV2")

_mutex = threading.Lock()  # guards _exported, and is held while one is written
_exported: dict[str, Path] = {}  # by digest of what was asked for


class GraphError(InvalidArgumentError, AssertionError):
    """A graph is not made as its constructor needs it; an ``AssertionError``, too, as it was in sparkdl."""


class TFInputGraph:
    """A graph of TensorFlow 1 without variables, and the tensors that its signature names.

    Use one of the constructors ``from...``. It can be pickled. Tensors are named as TensorFlow names them,
    ``x:0``; ``x`` is the first output of the operation ``x``.

    Attributes:
        graph_def: The ``GraphDef``, stripped to what its outputs need.
        input_tensor_name_from_signature: Name in the signature to tensor; ``None``: there is no signature.
        output_tensor_name_from_signature: Name in the signature to tensor; ``None``: there is no signature.
    """

    def __init__(
        self,
        graph_def: tf.compat.v1.GraphDef,
        input_tensor_name_from_signature: Mapping[str, str] | None = None,
        output_tensor_name_from_signature: Mapping[str, str] | None = None,
    ):
        tf = _tensorflow()
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
        """Return the part of a graph that computes ``fetch_names``, its variables as they are in ``sess``.

        Raises:
            NotFoundError: The graph has no such tensor.
            GraphError: The names are missing, or it is no graph.
            InvalidArgumentError: A variable is not initialised.
        """
        if not isinstance(graph, _tensorflow().Graph):
            raise GraphError(f"a graph is a tf.Graph, not {type(graph).__name__}")
        _both(feed_names, fetch_names)
        return cls(_frozen(graph, sess, feed_names, fetch_names))

    @classmethod
    def fromGraphDef(
        cls, graph_def: tf.compat.v1.GraphDef, feed_names: Sequence[str], fetch_names: Sequence[str]
    ) -> Self:
        """Return the part of a graph without variables that computes ``fetch_names``; raises as fromGraph."""
        _both(feed_names, fetch_names)
        whole = cls(graph_def)
        with _session() as (graph, session):
            whole._import()
            return cls(_frozen(graph, session, feed_names, fetch_names))

    @classmethod
    def fromFrozenFile(cls, path: str | os.PathLike[str]) -> Self:
        """Return all of the graph in a file ``.pb``, a binary ``GraphDef`` without variables.

        Raises:
            NotFoundError: There is no such file.
            InvalidArgumentError: It holds no ``GraphDef``.
        """
        from google.protobuf.message import DecodeError

        graph_def = _tensorflow().compat.v1.GraphDef()
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
        """Return the graph of the latest checkpoint in a folder, with the variables saved there.

        The checkpoint is one of ``tf.compat.v1.train.Saver``, with its ``.meta`` file.

        Raises:
            NotFoundError: There is no checkpoint, or it has no such tensor.
            GraphError: The names are missing.
            InvalidArgumentError: TensorFlow cannot read it.
        """
        _both(feed_names, fetch_names)
        with _checkpoint(checkpoint_dir) as (graph, session, _):
            return cls(_frozen(graph, session, feed_names, fetch_names))

    @classmethod
    def fromCheckpointWithSignature(
        cls, checkpoint_dir: str | os.PathLike[str], signature_def_key: str
    ) -> Self:
        """Return the graph of the latest checkpoint in a folder, with the tensors of a signature saved there.

        Raises:
            NotFoundError: There is no checkpoint, or it has no such signature.
            GraphError: ``signature_def_key`` is ``None``.
            InvalidArgumentError: TensorFlow cannot read it.
        """
        _key(signature_def_key)
        with _checkpoint(checkpoint_dir) as (graph, session, meta):
            return cls._of_signature(graph, session, meta, signature_def_key)

    @classmethod
    def fromSavedModel(
        cls,
        saved_model_dir: str | os.PathLike[str],
        tag_set: str,
        feed_names: Sequence[str],
        fetch_names: Sequence[str],
    ) -> Self:
        """Return a graph of a SavedModel, of TensorFlow 1 or 2, whatever its signatures are.

        Args:
            saved_model_dir: The folder with ``saved_model.pb``.
            tag_set: The tags of the graph, with commas between; mostly ``serve``.
            feed_names: The input tensors.
            fetch_names: The output tensors.

        Raises:
            NotFoundError: There is no SavedModel, or it has no such tensor.
            GraphError: The names are missing.
            InvalidArgumentError: It has no graph with these tags, or TensorFlow cannot read it.
        """
        _both(feed_names, fetch_names)
        with _loaded(saved_model_dir, tag_set) as (graph, session, _):
            return cls(_frozen(graph, session, feed_names, fetch_names))

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
        with _loaded(saved_model_dir, tag_set) as (graph, session, meta):
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
        return cls(_frozen(graph, session, [*inputs.values()], [*outputs.values()]), inputs, outputs)

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
        """Return the folder of a SavedModel of this graph, made once; it goes with this process.

        Its signature ``serving_default`` calls inputs and outputs as they are called here: ``x:0`` and ``x``
        stay what they are.

        Args:
            inputs: The tensors that columns feed; every placeholder that the outputs need.
            outputs: The tensors that become columns.
            per_row: The graph takes one row, without a batch dimension, and is run for each.

        Raises:
            NotFoundError: The graph has no such tensor.
            InvalidArgumentError: The outputs need a placeholder that is no input, or a variable or a table,
                or the graph is too large.
        """
        tf = _tensorflow()

        def build() -> tuple[dict[str, Any], dict[str, Any]]:
            part = _Part(self, inputs, outputs)
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

        return self._exported(("tensors", [*inputs], [*outputs], per_row), build)

    def placeholders(self) -> list[str]:
        """Return the names of all placeholders, ``x:0``, in the graph's order."""
        return [f"{node.name}:0" for node in self.graph_def.node if node.op in _PLACEHOLDERS]

    def _exported(self, asked: Any, build: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> Path:
        """Return the folder of the SavedModel that ``build`` makes in a new graph, once for what is asked."""
        tf = _tensorflow()
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
        """Import all of the graph, by its own names, into the default graph."""
        try:
            _tensorflow().import_graph_def(self.graph_def, name="")
        except ValueError as error:
            raise InvalidArgumentError(f"TensorFlow cannot read the graph: {_line(error)}") from error


class _Part:
    """What of a graph leads from ``feeds`` to ``fetches``; called with tensors it imports it into a graph.

    Attributes:
        feeds: The tensors that are fed, with dtype and shape.
        fetches: The tensors that are computed.
    """

    def __init__(self, graph: TFInputGraph, feeds: Sequence[str], fetches: Sequence[str]):
        tf = _tensorflow()
        with tf.Graph().as_default() as whole:
            graph._import()
        self.feeds = [_tensor(whole, name, "input") for name in feeds]
        self.fetches = [_tensor(whole, name, "output") for name in fetches]
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
                new.device = ""  # where it runs is the server's matter
                kept = [
                    i for i in node.input if not (i.startswith("^") and i[1:] in fed_ops - reached.keys())
                ]
                del new.input[:]
                new.input.extend(kept)
        for function in self._graph_def.library.function:
            for node in function.node_def:
                node.device = ""

    def __call__(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the tensors of ``fetches``, computed of ``tensors`` in the current graph."""
        given = {feed.name: tensor for feed, tensor in zip(self.feeds, tensors, strict=True)}
        wanted = sorted({tensor.name for tensor in self.fetches} - given.keys())
        tf = _tensorflow()
        try:
            made = tf.import_graph_def(
                self._graph_def,
                input_map={name: tensor for name, tensor in given.items() if name in self._used},
                return_elements=wanted,
                name="graph",
            )
        except ValueError as error:
            raise InvalidArgumentError(f"the graph does not accept its inputs: {_line(error)}") from error
        known = dict(zip(wanted, made, strict=True)) | given
        return [tf.identity(known[tensor.name]) for tensor in self.fetches]


def _serves(operation: tf.Operation, fetches: Sequence[str]) -> None:
    """Refuse an operation that needs what a SavedModel without variables does not have."""
    which = f"output {', '.join(map(repr, fetches))}"
    if operation.type in _PLACEHOLDERS:
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


def picture_model(
    graph: TFInputGraph, inputTensor: str, outputTensor: str, channelOrder: str, outputMode: str
) -> Path:
    """Return the folder of a SavedModel that runs a graph on each picture at the picture's own size.

    Its inputs are the fields of Spark's image struct: ``data`` (string), ``height``, ``width``, ``nChannels``
    and ``mode`` (int32), one of each a row. The graph gets ``[1, height, width, channels]``, values as they
    are in ``data``. Where the graph takes 3 channels grey becomes three equal ones, where it takes 1 colours
    become grey, where it does not say grey stays grey; alpha is dropped.

    Outputs in mode ``vector``: ``vector`` (float32), all values of the row's output. Where the graph does not
    tell how many these are there is ``length`` (int32), too, and zeros are behind those of a row that has
    less than others. In mode ``image``: the fields again, of
    a picture of uint8 where the output is that, else of float32; colours are blue, green, red again.

    Args:
        graph: The graph.
        inputTensor: The tensor that gets the picture.
        outputTensor: The tensor that is the result; for pictures ``[1, height, width, channels]``.
        channelOrder: ``RGB``, ``BGR`` or ``L``, as the graph takes them.
        outputMode: ``vector`` or ``image``.

    Raises:
        NotFoundError: The graph has no such tensor.
        InvalidArgumentError: The graph does not take such pictures or does not return some, or there is no
            such order or mode.
    """
    for name, value, known in (
        ("channelOrder", channelOrder, ("RGB", "BGR", "L")),
        ("outputMode", outputMode, ("vector", "image")),
    ):
        if value not in known:
            raise InvalidArgumentError(f"{name} is {value!r}; it is one of {', '.join(known)}")
    tf = _tensorflow()

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        part = _Part(graph, [inputTensor], [outputTensor])
        [feed], [fetch] = part.feeds, part.fetches
        channels = _channels(feed, channelOrder)
        if outputMode == "image" and fetch.shape.rank not in (None, 3, 4):
            raise InvalidArgumentError(
                f"output {outputTensor!r} is {fetch.shape}, not a picture; it must be [1, height, width, "
                "channels]; or set outputMode to 'vector'"
            )

        def row(fields: dict[str, Any]) -> dict[str, Any]:
            picture = tf.cast(_in_order(_pixels(**fields), channelOrder, channels), feed.dtype)[None]
            picture.set_shape([1, None, None, channels])
            [made] = part([picture])
            if made.dtype != tf.uint8 or outputMode == "vector":
                made = tf.cast(made, tf.float32)
            if outputMode == "vector":
                return {"data": _raw(made)}
            return _struct(made, channelOrder)

        width = None if fetch.shape.rank is None else fetch.shape[1:].num_elements()
        names = ("height", "width", "nChannels", "mode")
        inputs = {"data": tf.compat.v1.placeholder(tf.string, [None])}
        inputs |= {name: tf.compat.v1.placeholder(tf.int32, [None]) for name in names}
        specs = {"data": tf.TensorSpec([], tf.string)}
        if outputMode == "image":
            specs |= {name: tf.TensorSpec([], tf.int32) for name in names}

        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def rows(fields: dict[str, Any]) -> dict[str, Any]:
            made: dict[str, Any] = tf.map_fn(row, fields, fn_output_signature=specs)
            if outputMode == "image":
                return made
            sizes = tf.strings.length(made["data"])
            longest = tf.maximum(tf.reduce_max(sizes), 4)
            vector = tf.io.decode_raw(made["data"], tf.float32, fixed_length=longest)
            if width:
                return {"vector": tf.ensure_shape(vector, [None, width])}
            return {"vector": vector, "length": sizes // 4}

        return inputs, rows(inputs)

    return graph._exported(("pictures", inputTensor, outputTensor, channelOrder, outputMode), build)


def _channels(feed: tf.Tensor, channelOrder: str) -> int | None:
    """Return how many channels the graph takes; ``None``: it does not say."""
    shape = None if feed.shape.rank is None else feed.shape.as_list()
    if shape is not None and (len(shape) != 4 or shape[0] not in (None, 1)):
        raise InvalidArgumentError(
            f"input {feed.name!r} is {feed.shape}; for pictures it must be [None, height, width, channels]"
        )
    channels: int | None = shape[3] if shape else None
    if channelOrder == "L":
        channels = channels or 1
    if channels not in (None, 1, 3) or (channelOrder == "L" and channels != 1):
        raise InvalidArgumentError(
            f"input {feed.name!r} takes {channels} channels, channelOrder {channelOrder!r} "
            f"has {1 if channelOrder == 'L' else 3}"
        )
    return channels


def _pixels(
    data: tf.Tensor, height: tf.Tensor, width: tf.Tensor, nChannels: tf.Tensor, mode: tf.Tensor
) -> tf.Tensor:
    """Return the picture of a struct as float32 [height, width, nChannels], in the struct's order."""
    tf = _tensorflow()
    count = tf.cast(height, tf.int64) * tf.cast(width, tf.int64) * tf.cast(nChannels, tf.int64)
    size = tf.strings.length(data)
    floats = tf.equal(mode % 8, 5)
    known = tf.reduce_any(tf.equal(mode, [0, 16, 24, 5, 21, 29])) & tf.equal(nChannels, mode // 8 + 1)
    fits = tf.equal(tf.cast(size, tf.int64), count * tf.where(floats, tf.constant(4, tf.int64), 1))
    checks = [
        tf.debugging.Assert(known, ["the picture is invalid, or its mode and nChannels do not agree:", mode]),
        tf.debugging.Assert(
            (height > 0) & (width > 0) & fits,
            ["height, width and nChannels do not agree with the bytes of data:", height, width, size],
        ),
    ]
    with tf.control_dependencies(checks):
        data = tf.identity(data)
    values = tf.cond(
        floats,
        lambda: tf.io.decode_raw(data, tf.float32),
        lambda: tf.cast(tf.io.decode_raw(data, tf.uint8), tf.float32),
    )
    return tf.reshape(values, tf.stack([height, width, nChannels]))


def _in_order(picture: tf.Tensor, channelOrder: str, channels: int | None) -> tf.Tensor:
    """Return a picture of a struct in the channels that the graph takes."""
    tf = _tensorflow()
    grey = tf.equal(tf.shape(picture)[2], 1)
    if channels == 1:
        weights = tf.constant([0.114, 0.587, 0.299])
        return tf.cond(
            grey,
            lambda: picture,
            lambda: tf.reduce_sum(picture[..., :3] * weights, axis=-1, keepdims=True),
        )
    if channels == 3:
        picture = tf.cond(grey, lambda: tf.repeat(picture, 3, axis=-1), lambda: picture)
    picture = picture[..., :3]
    return tf.reverse(picture, [-1]) if channelOrder == "RGB" else picture


def _struct(picture: tf.Tensor, channelOrder: str) -> dict[str, tf.Tensor]:
    """Return the fields of the struct of a picture that the graph made."""
    tf = _tensorflow()
    rank = tf.rank(picture)
    shape = tf.shape(picture)
    alone = tf.equal(rank, 3) | (tf.equal(rank, 4) & tf.equal(shape[0], 1))
    check = tf.debugging.Assert(alone, ["the output is no picture [1, height, width, channels]:", shape])
    with tf.control_dependencies([check]):
        picture = tf.reshape(picture, shape[-3:])
    height, width, channels = tf.unstack(tf.shape(picture), num=3)
    check = tf.debugging.Assert(
        tf.reduce_any(tf.equal(channels, [1, 3, 4])),
        ["the output is a picture of other than 1, 3 or 4 channels:", channels],
    )
    with tf.control_dependencies([check]):
        picture = tf.identity(picture)
    if channelOrder == "RGB":
        order = tf.range(channels)
        order = tf.where((channels >= 3) & (order < 3), 2 - order, order)
        picture = tf.gather(picture, order, axis=-1)
    mode = (channels - 1) * 8 + (0 if picture.dtype == tf.uint8 else 5)
    return {"data": _raw(picture), "height": height, "width": width, "nChannels": channels, "mode": mode}


def _raw(tensor: tf.Tensor) -> tf.Tensor:
    """Return the bytes of a tensor's values: the end of the tensor as TensorFlow writes it."""
    tf = _tensorflow()
    size = tf.size(tensor) * tensor.dtype.size
    return tf.strings.substr(tf.io.serialize_tensor(tensor), -size, size)


def _frozen(
    graph: tf.Graph, session: tf.compat.v1.Session, feeds: Iterable[str], fetches: Iterable[str]
) -> tf.compat.v1.GraphDef:
    """Return the part of a graph that computes ``fetches``, variables as they are in ``session``."""
    tf = _tensorflow()
    from tensorflow.python.util import deprecation

    inputs = [_tensor(graph, name, "input") for name in feeds]
    outputs = [_tensor(graph, name, "output") for name in fetches]
    graph_def = graph.as_graph_def()
    split_gathers(graph_def)
    try:
        with deprecation.silence():
            frozen = tf.compat.v1.graph_util.convert_variables_to_constants(
                session, graph_def, [tensor.op.name for tensor in outputs]
            )
    except (tf.errors.OpError, ValueError) as error:
        raise InvalidArgumentError(
            f"the variables of the graph cannot be made constants: {_line(error)}; initialise or restore "
            "them in the session"
        ) from error
    present = {node.name for node in frozen.node}
    for tensor in inputs:  # that no output needs
        if tensor.op.type in _PLACEHOLDERS and tensor.op.name not in present:
            frozen.node.add().CopyFrom(tensor.op.node_def)
            present.add(tensor.op.name)
    return frozen


def strip_and_freeze(
    graph: tf.Graph, session: tf.compat.v1.Session | None, fetches: Iterable[str]
) -> tf.compat.v1.GraphDef:
    """Return the part of a graph that computes ``fetches``, with constants for its variables.

    Args:
        graph: The graph.
        session: Has the values of the variables; ``None``: there are none.
        fetches: Names of tensors.

    Raises:
        NotFoundError: The graph has no such tensor.
        InvalidArgumentError: A variable is not initialised.
    """
    if session is not None:
        return _frozen(graph, session, (), fetches)
    tf = _tensorflow()
    with tf.compat.v1.Session(graph=graph, config=_config()) as session:
        return _frozen(graph, session, (), fetches)


@contextmanager
def _session() -> Iterator[tuple[tf.Graph, tf.compat.v1.Session]]:
    """Make a graph and a session of it the default."""
    tf = _tensorflow()
    with (
        tf.Graph().as_default() as graph,
        tf.compat.v1.Session(graph=graph, config=_config()) as session,
    ):
        yield graph, session


@contextmanager
def _checkpoint(folder: str | os.PathLike[str]) -> Iterator[tuple[tf.Graph, tf.compat.v1.Session, Any]]:
    """Restore the latest checkpoint of a folder; the last is its MetaGraphDef."""
    tf = _tensorflow()
    found = tf.train.latest_checkpoint(str(folder))
    if found is None or not Path(f"{found}.meta").exists():
        raise NotFoundError(f"{folder} holds no checkpoint of tf.compat.v1.train.Saver with its .meta file")
    with _session() as (graph, session):
        try:
            meta = tf.compat.v1.MetaGraphDef.FromString(Path(f"{found}.meta").read_bytes())
            tf.compat.v1.train.import_meta_graph(meta, clear_devices=True).restore(session, found)
        except Exception as error:  # whatever the reader and its kernels raise
            raise InvalidArgumentError(f"checkpoint {found} cannot be read: {_line(error)}") from error
        yield graph, session, meta


@contextmanager
def _loaded(
    folder: str | os.PathLike[str], tag_set: str
) -> Iterator[tuple[tf.Graph, tf.compat.v1.Session, Any]]:
    """Load a graph of a SavedModel; the last is its MetaGraphDef."""
    tf = _tensorflow()
    from tensorflow.python.util import deprecation

    if not (Path(folder) / "saved_model.pb").exists():
        raise NotFoundError(f"{folder} holds no saved_model.pb; give the folder of one SavedModel")
    tags = [tag.strip() for tag in tag_set.split(",")]
    with _session() as (graph, session):
        try:
            with deprecation.silence():
                meta = tf.compat.v1.saved_model.load(session, tags, str(folder))
        except Exception as error:  # whatever the loader and its kernels raise
            raise InvalidArgumentError(
                f"{folder} cannot be loaded with the tags {tags}: {_line(error)}"
            ) from error
        yield graph, session, meta


def _write(graph: tf.Graph, inputs: Mapping[str, tf.Tensor], outputs: Mapping[str, tf.Tensor]) -> Path:
    """Write ``graph`` as a SavedModel with one signature into a folder that goes with this process."""
    tf = _tensorflow()
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


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as error:
        raise InvalidArgumentError(
            f"a graph needs TensorFlow on the driver ({error}); pip install tensorflow, or give the folder "
            "of a SavedModel"
        ) from error
    return tensorflow


def _config() -> Any:
    """Return how sessions here run: on the processor, whatever devices the graph names."""
    return _tensorflow().compat.v1.ConfigProto(device_count={"GPU": 0}, allow_soft_placement=True)


def _tensor(graph: tf.Graph, name: str, what: str) -> tf.Tensor:
    """Return the tensor that ``op`` or ``op:0`` names.

    Raises:
        NotFoundError: The graph has none.
    """
    try:
        return graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    except (KeyError, ValueError):
        operations = graph.get_operations()
        taken = {tensor.op.name for op in operations for tensor in op.inputs}
        near = [
            f"{op.name}:0"
            for op in operations
            if (op.type in _PLACEHOLDERS if what == "input" else op.outputs and op.name not in taken)
        ]
        raise NotFoundError(
            f"the graph has no tensor {name!r} for an {what}; it has {', '.join(near[:10]) or 'none'}"
        ) from None


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


def _line(error: Exception) -> str:
    """Return what an error says, without the graph's stack below it."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
