"""Folding: a frozen graph is rewritten so that TensorFlow computes the same with fewer operations.

`fold` applies the rewrites in `REWRITES`, one after the other. The docstring of each says why answers stay
the same, but for the rounding of floats.

A graph is left as it is if one of its operations, or of the functions that it calls, has a state: tables,
random numbers, ``Assert`` and ``Print``. In a graph without these, nothing depends on the order of execution.
The bodies of loops and branches are not rewritten, and no computation in half precision is, because its
weights would be rounded once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

SMALL = 1 << 16
"""A cast of constants is evaluated if its result has at most this many bytes, or no more than before. Other
evaluated operations have results no larger than an argument."""

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_CARRIERS = _CALLS | {"If", "While", "Case"}
"""Operations that have a state only if a function that they name has one."""

_LOWERED = {"Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond"}
"""Loops and branches of TensorFlow 1, in which control inputs decide where a node runs."""

_WHOLE = ("_noinline", "_XlaMustCompile", "api_implements")
"""Attributes of functions that TensorFlow compiles or replaces as a whole."""

_SAME = {"Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot"}
"""Operations that return their inputs."""

_SHAPING = {"Reshape", "Squeeze", "ExpandDims", "Transpose"}
_ARITHMETIC = {"Add", "AddV2", "Mul", "Neg", "RealDiv", "Rsqrt", "Sqrt", "Square", "Sub"}
"""Operations that are evaluated if their inputs are constants, as is Cast."""

_NORMALISATIONS = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"}

_FLOATS = ("float32", "float64")
_WEIGHTS = 1
"""The input that is the weights, in all operations that can absorb a normalisation."""


def fold(graph: tf.compat.v1.GraphDef, kept: Iterable[str]) -> tf.compat.v1.GraphDef:
    """Return a graph that computes the same, or ``graph`` itself if it must not be rewritten.

    Args:
        graph: A graph without variables; its library has only functions that it calls. More is rewritten if
            its nodes have the attribute ``_output_shapes``.
        kept: The names of all nodes that are fed or fetched. They keep their names and outputs.
    """
    if find_state(graph):
        return graph
    nodes: list[Any] = list(graph.node)
    for rewrite in REWRITES:
        nodes = rewrite(_Graph(nodes, graph.library.function, set(kept)))
    folded = type(graph)(versions=graph.versions, library=graph.library)
    folded.node.extend(nodes)
    for node in folded.node:
        node.attr.pop("_output_shapes", None)  # of a variable's handle, where there is now its value
    return folded


def find_state(graph: tf.compat.v1.GraphDef) -> str:
    """Return an operation that keeps a graph from being rewritten, or ""."""
    from tensorflow.python.framework import op_def_registry

    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        for node in nodes:
            op = op_def_registry.get(node.op)
            if op is None or node.op in _LOWERED or (op.is_stateful and node.op not in _CARRIERS):
                return str(node.op)
    return ""


class _Graph:
    """Nodes by name, and which nodes read them. Tensors are named ``x`` and ``x:1``, never ``x:0``."""

    def __init__(self, nodes: Iterable[Any], functions: Iterable[Any], kept: set[str]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.functions = {function.signature.name: function for function in functions}
        self.kept = kept
        self._names = set(self.nodes)
        self._readers: dict[str, list[Any]] = defaultdict(list)  # an item for each use of an output
        for node in self.nodes.values():
            for tensor in _inputs(node):
                self._readers[_owner(tensor)].append(node)

    def new_name(self, name: str) -> str:
        """Return ``name``, with underscores appended if it is taken."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def reader(self, node: Any) -> Any | None:
        """Return the node that alone reads ``node``, if that is neither fed nor fetched."""
        readers = self._readers[node.name]
        return readers[0] if len(readers) == 1 and node.name not in self.kept else None

    def is_one_tensor(self, node: Any) -> bool:
        """Tell whether only the first output of ``node`` is used."""
        used = {tensor for reader in self._readers[node.name] for tensor in _inputs(reader)}
        return node.name not in self.kept and not any(name.startswith(f"{node.name}:") for name in used)

    def constant(self, tensor: str) -> np.ndarray | None:
        """Return the value of a constant."""
        from tensorflow.python.framework import tensor_util

        node = self.nodes.get(tensor)
        if node is None or node.op != "Const" or tensor in self.kept:
            return None
        value: np.ndarray = tensor_util.MakeNdarray(node.attr["value"].tensor)
        return value

    def sizes(self, tensor: str) -> list[int]:
        """Return the shape in the attribute ``_output_shapes``; empty: a scalar, or unknown."""
        node, index = self.nodes[_owner(tensor)], int(tensor.partition(":")[2] or 0)
        shapes = node.attr["_output_shapes"].list.shape if "_output_shapes" in node.attr else ()
        return [dim.size for dim in shapes[index].dim] if index < len(shapes) else []

    def needed(self) -> list[Any]:
        """Return the nodes that the kept ones depend on, each after its inputs."""
        found: dict[str, list[str]] = {}
        waiting = sorted(self.kept & self.nodes.keys())
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = [_owner(tensor) for tensor in _inputs(self.nodes[name])]
                waiting += found[name]
        return [self.nodes[name] for name in TopologicalSorter(found).static_order()]


def inline(graph: _Graph) -> list[Any]:
    """Replace a call by the body of its function, which computes what the call returns."""
    return [new for node in graph.nodes.values() for new in _expanded(graph, node, frozenset())]


def _expanded(graph: _Graph, node: Any, within: frozenset[str]) -> Iterator[Any]:
    """Yield the nodes of a call, or the node itself; ``within`` names the functions around it."""
    function = graph.functions.get(node.attr["f"].func.name) if node.op in _CALLS else None
    if function is None or _is_whole(function, node) or function.signature.name in within:
        yield node
        return
    tensors = dict(zip((arg.name for arg in function.signature.input_arg), _inputs(node), strict=True))
    names = [graph.new_name(f"{node.name}/{inner.name}") for inner in function.node_def]
    for name, inner in zip(names, function.node_def, strict=True):
        tensors |= {output: _tensor(f"{name}:{i}") for i, output in enumerate(_outputs(inner))}
    for name, inner in zip(names, function.node_def, strict=True):
        new = _copy(inner, [tensors[tensor] for tensor in _inputs(inner)])
        new.name = name
        yield from _expanded(graph, new, within | {function.signature.name})
    kinds = [arg.type for arg in function.signature.output_arg]
    returned = [tensors[_tensor(function.ret[arg.name])] for arg in function.signature.output_arg]
    new = _node("IdentityN", node.name, returned)
    new.attr["T"].list.type.extend(kinds)
    yield new if len(kinds) > 1 else _node("Identity", node.name, returned, *kinds)


def _is_whole(function: Any, node: Any) -> bool:
    """Tell whether a call must stay a call."""
    marks = [of.attr[name] for of in (function, node) for name in _WHOLE if name in of.attr]
    generic = any(value.placeholder for inner in function.node_def for value in inner.attr.values())
    return generic or any(mark.b or mark.s for mark in marks) or not function.signature.output_arg


def _outputs(node: Any) -> Iterator[str]:
    """Yield the names that the outputs of a node have in a function, in the order of their numbers."""
    from tensorflow.python.framework import op_def_registry

    for arg in op_def_registry.get(node.op).output_arg:
        count = 1
        if arg.number_attr:
            count = node.attr[arg.number_attr].i
        elif arg.type_list_attr:
            count = len(node.attr[arg.type_list_attr].list.type)
        yield from (_tensor(f"{node.name}:{arg.name}:{i}") for i in range(count))


def simplify(graph: _Graph) -> list[Any]:
    """Evaluate constants, and drop what returns its input and what no output needs.

    NumPy computes these operations as TensorFlow does, ``x * 1`` is ``x``, and an operation without a state
    has no effect but its outputs.
    """
    instead: dict[str, str] = {}
    seen: dict[bytes, str] = {}  # equal constants are one, also in two signatures
    result: list[Any] = []
    for node in graph.needed():
        inputs = [instead.get(tensor, tensor) for tensor in _inputs(node)]
        if node.name not in graph.kept:
            if node.op in _SAME:
                instead |= {_tensor(f"{node.name}:{i}"): tensor for i, tensor in enumerate(inputs)}
                continue
            if other := _times_one(graph, node, inputs):
                instead[node.name] = other
                continue
            value = _value(graph, node, inputs)
            if value is not None or (node.op == "Const" and node.ByteSize() <= SMALL):
                key = _copy(node, inputs)
                key.name = ""
                first = seen.setdefault(key.SerializeToString(deterministic=True), node.name)
                if first != node.name:
                    instead[node.name] = first
                    continue
            if value is not None:
                graph.nodes[node.name] = node = _constant(node.name, value)
        bare = node.op == "Const" and not node.input and "_class" not in node.attr
        result.append(node if bare else _copy(node, inputs))  # a large constant is not copied
    return _Graph(result, (), graph.kept).needed()


def _times_one(graph: _Graph, node: Any, inputs: Sequence[str]) -> str:
    """Return the other factor of a product with the scalar 1, or ""."""
    for factor, other in (inputs, inputs[::-1]) if node.op == "Mul" else ():
        value = graph.constant(factor)
        if value is not None and value.shape == () and value == 1:
            return other
    return ""


def _value(graph: _Graph, node: Any, inputs: Sequence[str]) -> np.ndarray | None:
    """Return the value of an operation on constants, if it is known and not too large."""
    import numpy as np

    if node.op not in {*_SHAPING, *_ARITHMETIC, "Cast"}:
        return None
    values = [value for tensor in inputs if (value := graph.constant(tensor)) is not None]
    if len(values) < len(inputs):
        return None
    x = values[0]
    if node.op in _ARITHMETIC:
        shapes = [value.shape for value in values]
        if x.dtype.name not in (*_FLOATS, "int32", "int64") or np.broadcast_shapes(*shapes) not in shapes:
            return None
    elif node.op == "Cast":
        to: Any = {1: np.float32, 2: np.float64}.get(node.attr["DstT"].type)  # the numbers of TensorFlow
        if to is None or x.dtype.kind not in "fiu" or x.size * to().itemsize > max(x.nbytes, SMALL):
            return None
        return np.asarray(x, to)
    with np.errstate(all="ignore"):
        return np.asarray(_computed(node, *values), x.dtype)


def _computed(node: Any, x: Any, y: Any = None) -> Any:
    import numpy as np

    match node.op:
        case "Reshape":
            return x.reshape(y.tolist())
        case "Squeeze":
            return x.squeeze(tuple(node.attr["squeeze_dims"].list.i) or None)
        case "ExpandDims":
            return np.expand_dims(x, int(y))
        case "Transpose":
            return x.transpose(y.tolist())
        case "Add" | "AddV2":
            return x + y
        case "Sub":
            return x - y
        case "Mul":
            return x * y
        case "RealDiv":
            return x / y
        case "Neg":
            return -x
        case "Square":
            return x * x
        case "Sqrt":
            return np.sqrt(x)
    return 1 / np.sqrt(x)


def absorb(graph: _Graph) -> list[Any]:
    """Put the scale and shift of each channel into the weights and a ``BiasAdd`` of the operation before.

    ``f(x, w)`` is linear in ``w``, and each of its channels has weights of its own, so ``s * f(x, w) + t`` is
    ``f(x, s * w) + t``, also behind operations that move values but keep channels apart. If ``f(x, w)`` or a
    value on the way has another reader, it stays.
    """
    changed: dict[str, Any] = {}
    scaled: dict[Any, str] = {}  # operations that share weights, as in two signatures, go on sharing them
    for node in graph.nodes.values():
        linear = _linear(graph, node)
        chain = _chain(graph, linear) if linear else None
        if linear is None or chain is None:
            continue
        links, scale, shift = chain
        inputs, tensor = _inputs(node), node.name
        kind = graph.nodes[inputs[_WEIGHTS]].attr["dtype"].type
        if (scale != 1).any():
            weights = linear.scaled(scale)
            if weights is None:
                continue
            key = inputs[_WEIGHTS], linear.axes, scale.tobytes()
            if key not in scaled:
                scaled[key] = graph.new_name(f"{node.name}/weights")
                changed[scaled[key]] = _constant(scaled[key], weights)
            inputs[_WEIGHTS] = scaled[key]
            changed[node.name] = _copy(node, inputs)
        if shift.any():
            op = "AddV2" if linear.grouped else "BiasAdd"
            bias, tensor = graph.new_name(f"{node.name}/bias"), graph.new_name(f"{node.name}/{op}")
            shape = [-1] + [1] * (linear.rank - 2) if linear.grouped and linear.first else [-1]
            changed[bias] = _constant(bias, shift.astype(linear.weights.dtype).reshape(shape))
            changed[tensor] = _node(op, tensor, [node.name, bias], kind)
            if not linear.grouped:
                changed[tensor].attr["data_format"].s = b"NCHW" if linear.first else b"NHWC"
        for link, is_affine in links:
            inputs = [tensor, *_inputs(link)[1:]]
            changed[link.name] = (
                _node("Identity", link.name, [tensor], kind) if is_affine else _copy(link, inputs)
            )
            tensor = link.name
    return [*(graph.nodes | changed).values()]


@dataclasses.dataclass(frozen=True)
class _Linear:
    """An operation that is linear in its weights, which are constant."""

    node: Any
    weights: np.ndarray
    axes: tuple[int, ...]
    """The axes of the weights that together number the channels."""
    rank: int
    """The rank of the output; of a product of batches the least that it may have."""
    first: bool
    """Channels are axis 1 of the output, not the last."""
    grouped: bool
    """A convolution that has groups, or may have; TensorFlow fails where it fuses that with a ``BiasAdd``."""

    @property
    def channels(self) -> int:
        return math.prod(self.weights.shape[axis] for axis in self.axes)

    def scaled(self, scale: np.ndarray) -> np.ndarray | None:
        """Return the weights with a scale for each channel, rounded once; ``None``: some are not finite."""
        import numpy as np

        shape = [size if axis in self.axes else 1 for axis, size in enumerate(self.weights.shape)]
        result = np.empty_like(self.weights)
        with np.errstate(all="ignore"):
            np.multiply(self.weights, scale.reshape(shape), out=result, casting="same_kind")
        return result if np.isfinite(result).all() else None

    def per_channel(self, value: np.ndarray | None, rank: int) -> np.ndarray | None:
        """Return what a constant that is added to or multiplied with the output has for each channel."""
        import numpy as np

        if value is None or value.ndim > rank:
            return None
        axis = value.ndim - rank + 1 if self.first else value.ndim - 1
        if any(size != 1 and (i != axis or size != self.channels) for i, size in enumerate(value.shape)):
            return None
        return np.broadcast_to(value.astype("f8").reshape(-1), self.channels)


def _linear(graph: _Graph, node: Any) -> _Linear | None:
    """Return where an operation has its channels, if it is linear in constant weights."""
    inputs = _inputs(node)
    if node.op not in _LINEAR or len(inputs) <= _WEIGHTS:
        return None
    weights = graph.constant(inputs[_WEIGHTS])
    types = {node.attr[name].type for name in ("T", "Ta", "Tb", "Tout") if name in node.attr}
    layout = _layout(node)
    if weights is None or weights.dtype.name not in _FLOATS or len(types) > 1 or layout == "NCHW_VECT_C":
        return None
    rank, axes = weights.ndim, _LINEAR[node.op]
    if any(node.attr[name].b for name in ("transpose_b", "adj_y") if name in node.attr):
        axes = (-2,)
    if node.op == "Einsum":
        [_, right, output] = node.attr["equation"].s.decode().replace("->", ",").split(",")
        rank = len(output)
        if "." in right + output or rank < 2 or right.count(output[-1]) != 1 or output.count(output[-1]) != 1:
            return None
        axes = (right.index(output[-1]),)
    first = layout.startswith("NC")
    taken = graph.sizes(inputs[0]) if node.op == "Conv2D" else []
    grouped = node.op == "Conv2D" and (not taken or taken[1 if first else -1] != weights.shape[-2])
    return _Linear(node, weights, tuple(axis % weights.ndim for axis in axes), rank, first, grouped)


_LINEAR: dict[str, tuple[int, ...]] = {
    "BatchMatMul": (-1,),
    "BatchMatMulV2": (-1,),
    "BatchMatMulV3": (-1,),
    "Conv2D": (-1,),
    "Conv2DBackpropInput": (-2,),
    "Conv3D": (-1,),
    "Conv3DBackpropInputV2": (-2,),
    "DepthwiseConv2dNative": (-2, -1),
    "Einsum": (),
    "MatMul": (-1,),
}
"""Operations that are linear in their weights, and the axes of these that number the channels."""


def _chain(graph: _Graph, linear: _Linear) -> tuple[list[tuple[Any, bool]], np.ndarray, np.ndarray] | None:
    """Return the operations behind ``linear`` that can be absorbed, and the scales and shifts that they make.

    With each comes whether it scales or shifts; the others move values.
    """
    import numpy as np

    links: list[tuple[Any, bool]] = []
    node, rank, scale, shift = linear.node, linear.rank, np.ones(linear.channels), np.zeros(linear.channels)
    while (reader := graph.reader(node)) is not None:
        if affine := _affine(graph, reader, node.name, linear, rank):
            with np.errstate(all="ignore"):
                scale, shift = scale * affine[0], shift * affine[0] + affine[1]
        elif moved := _moved(graph, reader, node.name, linear, rank):
            rank = moved
        else:
            break
        links.append((reader, affine is not None))
        node = reader
    while links and not links[-1][1]:
        links.pop()
    best = [link.op for link, _ in links] in ([], ["BiasAdd"])
    return None if best or not np.isfinite([scale, shift]).all() else (links, scale, shift)


def _affine(graph: _Graph, node: Any, tensor: str, linear: _Linear, rank: int) -> tuple[Any, Any] | None:
    """Return scale and shift of each channel if ``node`` scales and shifts ``tensor``."""
    import numpy as np

    inputs = _inputs(node)
    if node.op in _NORMALISATIONS:
        if node.attr["is_training"].b or inputs[0] != tensor or not graph.is_one_tensor(node):
            return None
        values = [graph.constant(name) for name in inputs[1:]]
        if _layout(node).startswith("NC") != linear.first or any(value is None for value in values):
            return None
        gamma, beta, mean, variance = (np.float64(value) for value in values)
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(variance + node.attr["epsilon"].f)
            return scale, beta - mean * scale
    if node.op not in _AFFINE or (inputs[0] != tensor and not _AFFINE[node.op]):
        return None
    other = graph.constant(inputs[inputs[0] == tensor])
    if node.op == "BiasAdd":
        if _layout(node).startswith("NC") != linear.first or other is None:
            return None
        return np.ones(()), np.float64(other)
    value = linear.per_channel(other, rank)
    if value is None:
        return None
    match node.op:
        case "Mul":
            return value, np.zeros(())
        case "RealDiv":
            with np.errstate(all="ignore"):
                return 1 / value, np.zeros(())
        case "Sub":
            return np.ones(()), -value
    return np.ones(()), value


_AFFINE = {"Add": True, "AddV2": True, "BiasAdd": False, "Mul": True, "RealDiv": False, "Sub": False}
"""Operations that scale or shift by a constant, and whether the constant may come first."""


def _moved(graph: _Graph, node: Any, tensor: str, linear: _Linear, rank: int) -> int:
    """Return the rank of the output if ``node`` moves values but leaves channels the last axis, else 0."""
    inputs = _inputs(node)
    if linear.first or inputs[0] != tensor or linear.node.op.startswith("BatchMatMul"):
        return 0
    match node.op:
        case "Squeeze":
            axes = {axis % rank for axis in node.attr["squeeze_dims"].list.i}
            return rank - len(axes) if axes and rank - 1 not in axes else 0
        case "BatchToSpaceND":
            block = graph.constant(inputs[1])
            return rank if block is not None and block.size <= rank - 2 else 0
        case "Reshape":
            sizes = graph.sizes(node.name)
            return len(sizes) if len(sizes) > 1 and sizes[-1] == linear.channels else 0
    return 0


REWRITES = (inline, simplify, absorb, simplify)
"""What `fold` does; the second `simplify` drops what `absorb` has made needless."""


def _layout(node: Any) -> str:
    return node.attr["data_format"].s.decode() if "data_format" in node.attr else "NHWC"


def _inputs(node: Any) -> list[str]:
    """Return the tensors that a node reads. Control inputs are left out: nothing has a state."""
    return [_tensor(name) for name in node.input if not name.startswith("^")]


def _tensor(name: str) -> str:
    return name.removesuffix(":0")


def _owner(tensor: str) -> str:
    return tensor.partition(":")[0]


def _node(op: str, name: str, inputs: Sequence[str], kind: int = 0) -> Any:
    from tensorflow.core.framework import node_def_pb2

    node = node_def_pb2.NodeDef(op=op, name=name, input=inputs)
    if kind:
        node.attr["T"].type = kind
    return node


def _constant(name: str, value: np.ndarray) -> Any:
    from tensorflow.python.framework import tensor_util

    node = _node("Const", name, [])
    node.attr["value"].tensor.CopyFrom(tensor_util.make_tensor_proto(value))
    node.attr["dtype"].type = node.attr["value"].tensor.dtype
    return node


def _copy(node: Any, inputs: Sequence[str]) -> Any:
    """Return a copy with other inputs, not bound to the place of another node."""
    new = type(node)()
    new.CopyFrom(node)
    del new.input[:]
    new.input.extend(inputs)
    for name in ("_class", "_gradient_op_type"):
        new.attr.pop(name, None)
    new.ClearField("experimental_debug_info")
    return new
