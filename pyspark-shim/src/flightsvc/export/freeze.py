"""Freezing, also as a program: variables of a SavedModel become constants, and the graph is folded.

    flightsvc freeze MODEL_DIR OUT_DIR [--signature NAME]...

OUT_DIR becomes a SavedModel of one graph without variables, with the signatures of MODEL_DIR. What folding
does is in `flightsvc.export.fold`. Outputs may differ by the rounding of floats.

A model is frozen only if that cannot change its results: all state that its signatures reach must be
variables that no signature assigns. The result must stay below `LIMIT`, because TensorFlow reads a graph as
one message of at most 2 GB. Otherwise nothing is written, and the reason is printed.

The last line on standard output is JSON: ``{"frozen": true, ...}``, or ``{"frozen": false, "reason": "..."}``
with exit code 3. Exit code 1 is an error, such as a folder without a SavedModel. Progress is written to
standard error.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.commandline import Parser
from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.export import first_line, import_tensorflow
from flightsvc.export.fold import find_state, fold

if TYPE_CHECKING:
    import tensorflow as tf

LIMIT = 1_500_000_000
"""The largest frozen graph, in bytes. A message of protobuf may have 2 GB; TensorFlow adds to the graph while
it optimises."""

FOLDED = "folded by flightsvc"
"""The ``meta_graph_version`` of a folded SavedModel, by which a server knows it."""

NOT_FROZEN = 3
"""The exit code for a model that cannot be frozen."""

_VARIABLES = {"VarHandleOp", "VariableV2", "Variable"}
_READS = {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "DisableCopyOnRead"}
"""The operations on variables that TensorFlow can replace."""


class NotFrozen(FlightsvcError):
    """The model cannot be frozen; the text is the reason."""


def freeze(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    signatures: Sequence[str] = (),
    *,
    limit: int = LIMIT,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the SavedModel in ``model_dir`` with constants for its variables to ``out_dir``.

    It is written beside ``out_dir`` and renamed when complete. Files in ``assets.extra``, such as records for
    warm-up, are copied.

    Args:
        model_dir: The folder with ``saved_model.pb``.
        out_dir: The new folder, which must not exist.
        signatures: The names of signatures to keep; empty: all that assign no variable.
        limit: The largest result, in bytes.
        progress: A function that is called with a line of text at the start of each step.

    Returns:
        ``signatures``, the names; ``variables``, the number of variables; ``bytes``, the size of the graph;
        ``not_folded``, the operation that keeps the graph from being folded, or "".

    Raises:
        NotFrozen: The model cannot be frozen.
        NotFoundError: ``model_dir`` has no SavedModel, or no such signature.
        InvalidArgumentError: TensorFlow is not installed, ``out_dir`` exists, or the file is damaged.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if out_dir.exists():
        raise InvalidArgumentError(f"{out_dir} exists already; name a new folder")
    try:
        data = (model_dir / "saved_model.pb").read_bytes()
    except OSError as error:
        raise NotFoundError(f"{model_dir} is not a SavedModel: saved_model.pb: {error.strerror}") from None
    progress("importing TensorFlow")
    tf = import_tensorflow("freezing")
    from tensorflow.python.util import deprecation

    progress("looking for what has a state")
    meta = _meta_graph(data, model_dir)
    if meta.meta_info_def.meta_graph_version == FOLDED:
        raise NotFrozen("it is frozen and folded already")
    kept = _kept(meta, signatures, model_dir)
    variables = _variables(meta, kept, limit)
    progress("reading the variables")
    config = tf.compat.v1.ConfigProto(device_count={"GPU": 0}, allow_soft_placement=True)
    config.graph_options.rewrite_options.disable_meta_optimizer = True  # each variable is read once
    with (
        tf.Graph().as_default() as graph,
        tf.compat.v1.Session(graph=graph, config=config) as session,
        deprecation.silence(),
    ):
        try:
            tf.compat.v1.saved_model.load(session, ["serve"], str(model_dir))
        except Exception as error:  # any error of the loader and its kernels
            raise InvalidArgumentError(f"{model_dir} cannot be loaded: {first_line(error)}") from error
        progress(f"making {variables} variables constants")
        fetches = sorted(
            {_node(info.name) for name in kept for info in meta.signature_def[name].outputs.values()}
        )
        fed = {_node(info.name) for name in kept for info in meta.signature_def[name].inputs.values()}
        try:
            loaded = graph.as_graph_def()
            split_gathers(loaded)
            frozen = tf.compat.v1.graph_util.convert_variables_to_constants(session, loaded, fetches)
            with tf.Graph().as_default() as checked:
                tf.import_graph_def(frozen, name="")  # checks all types, also in functions
            frozen = checked.as_graph_def(add_shapes=True)
        except Exception as error:  # an unknown operation on variables, or a graph above 2 GB
            raise NotFrozen(f"TensorFlow cannot make its variables constants: {first_line(error)}") from error
    present = {node.name for node in frozen.node}
    frozen.node.extend(
        node for node in meta.graph_def.node if node.name in fed - present
    )  # inputs that no output needs
    _prune(frozen)
    progress("folding")
    folded = fold(frozen, fed.union(fetches))
    state = find_state(frozen) if folded is frozen else ""
    _prune(folded)
    size = folded.ByteSize()
    if size > limit:
        raise NotFrozen(f"the frozen graph would have {size:,} bytes, more than {limit:,}")
    progress("writing")
    _write(meta, folded, kept, "" if state else FOLDED, model_dir, out_dir)
    return {"signatures": kept, "variables": variables, "bytes": size, "not_folded": state}


def _meta_graph(data: bytes, model_dir: Path) -> Any:
    """Return the meta graph for serving."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString(data)
    except DecodeError as error:
        raise InvalidArgumentError(f"{model_dir}/saved_model.pb cannot be read: {error}") from None
    for meta in saved.meta_graphs:
        if "serve" in meta.meta_info_def.tags:
            return meta
    raise InvalidArgumentError(f"{model_dir} has no graph with the tag 'serve'; export the model for serving")


def _kept(meta: Any, wanted: Sequence[str], model_dir: Path) -> list[str]:
    """Return the names of the signatures to keep, sorted."""
    names = sorted(name for name in meta.signature_def if name != "__saved_model_init_op")
    for name in wanted:
        if name not in names:
            raise NotFoundError(f"{model_dir} has no signature {name!r}; it has {', '.join(names)}")
    if wanted:
        return sorted(set(wanted))
    pure = [name for name in names if not _writes(_Reach(meta, [name]))]
    return pure or names


class _Reach:
    """The nodes that the outputs of signatures depend on, and the functions that these nodes call."""

    def __init__(self, meta: Any, signatures: Iterable[str]) -> None:
        by_name = {node.name: node for node in meta.graph_def.node}
        waiting = [
            _node(info.name) for name in signatures for info in meta.signature_def[name].outputs.values()
        ]
        self.nodes: dict[str, Any] = {}
        """The nodes of the graph itself, by name."""
        while waiting:
            name = waiting.pop()
            if name in self.nodes or name not in by_name:
                continue
            self.nodes[name] = by_name[name]
            waiting += [_node(source) for source in by_name[name].input]
        self.functions = _called_functions(self.nodes.values(), meta.graph_def.library)

    def __iter__(self) -> Iterator[Any]:
        yield from self.nodes.values()
        for function in self.functions.values():
            yield from function.node_def

    def variables(self) -> dict[str, Any]:
        """Return the variables by their shared name, or else by the node's."""
        return {
            node.attr["shared_name"].s.decode() or node.name: node for node in self if node.op in _VARIABLES
        }


def _variables(meta: Any, kept: Sequence[str], limit: int) -> int:
    """Return the number of variables, or raise `NotFrozen`."""
    from tensorflow.python.framework import dtypes, op_def_registry

    reach = _Reach(meta, kept)
    if found := _writes(reach):
        raise NotFrozen(f"it assigns a variable ({found})")
    resource = dtypes.resource.as_datatype_enum
    for node in reach:
        op = op_def_registry.get(node.op)
        if op is None and node.op not in {f.signature.name for f in meta.graph_def.library.function}:
            raise NotFrozen(f"it has an operation that TensorFlow does not know ({node.op})")
        if op is None or node.op in _VARIABLES:
            continue
        makes = any(arg.type == resource or arg.is_ref for arg in op.output_arg)
        takes = any(arg.type == resource or arg.is_ref for arg in op.input_arg)
        if makes and not takes:
            what = "a table" if "Table" in node.op else "a state that is no variable"
            raise NotFrozen(f"it has {what} ({node.op})")
        if takes and node.op not in _READS:
            what = "a table" if "Table" in node.op else "a state in a way that a constant does not allow"
            raise NotFrozen(f"it uses {what} ({node.op})")
    if files := {_node(asset.tensor_info.name) for asset in meta.asset_file_def} & set(reach.nodes):
        raise NotFrozen(f"it reads a file of the model ({sorted(files)[0]})")
    variables = reach.variables()
    for name in meta.signature_def:
        if name in kept or name == "__saved_model_init_op":
            continue
        other = _Reach(meta, [name])
        if (found := _writes(other)) and (shared := set(variables) & set(other.variables())):
            raise NotFrozen(f"the signature {name!r} may assign its variable {sorted(shared)[0]!r} ({found})")
    size = sum(_bytes(node) for node in variables.values())
    if size > limit:
        raise NotFrozen(f"its variables have {size:,} bytes; a frozen graph may have {limit:,}")
    return len(variables)


def _writes(reach: _Reach) -> str:
    """Return the name of an operation that writes to a variable, or ""."""
    for node in reach:
        if node.op.startswith(
            ("ResourceApply", "ResourceSparseApply", "ResourceScatter", "ResourceStridedSliceAssign")
        ):
            return str(node.op)
        if node.op.startswith("Assign") or node.op in {"CountUpTo", "ResourceCountUpTo"}:
            return str(node.op)
        if node.op.startswith("Scatter") and node.op != "ScatterNd":
            return str(node.op)
    return ""


def split_gathers(graph: Any) -> None:
    """Replace each gather from a variable by a read and a gather; in functions the converter skips it."""
    for nodes, inside in [(graph.node, False), *((f.node_def, True) for f in graph.library.function)]:
        for node in [node for node in nodes if node.op == "ResourceGather"]:
            read, axis = nodes.add(), nodes.add()
            read.name, read.op, axis.name, axis.op = (
                f"{node.name}/read",
                "ReadVariableOp",
                f"{node.name}/axis",
                "Const",
            )
            read.device = axis.device = node.device
            handle, indices, *control = node.input
            read.input.extend([handle, *control])
            read.attr["dtype"].CopyFrom(node.attr["dtype"])
            batch_dims = node.attr["batch_dims"].i if "batch_dims" in node.attr else 0  # also the axis
            axis.attr["dtype"].type = 3  # int32
            axis.attr["value"].tensor.dtype = 3
            axis.attr["value"].tensor.tensor_shape.SetInParent()
            axis.attr["value"].tensor.int_val.append(batch_dims)
            node.op = "GatherV2"
            del node.input[:]
            node.input.extend(
                [f"{read.name}:value:0", indices, f"{axis.name}:output:0"]
                if inside
                else [read.name, indices, axis.name]
            )
            node.input.extend(control)
            node.attr["Tparams"].CopyFrom(node.attr["dtype"])
            node.attr["Taxis"].type = 3
            for name in ("dtype", "validate_indices"):
                node.attr.pop(name, None)


def _bytes(variable: Any) -> int:
    """Return the size of a variable in bytes; 0 if its shape is unknown."""
    from tensorflow.python.framework import dtypes

    sizes = [dim.size for dim in variable.attr["shape"].shape.dim]
    element: Any = dtypes.as_dtype(variable.attr["dtype"].type)
    return int(max(math.prod(sizes), 0) * element.size)


def _called_functions(nodes: Iterable[Any], library: Any) -> dict[str, Any]:
    """Return the functions of ``library`` that nodes call, directly or through functions, by name."""
    functions = {function.signature.name: function for function in library.function}
    found: dict[str, Any] = {}
    called = [name for node in nodes for name in _called(node)]
    while called:
        name = called.pop()
        if name in functions and name not in found:
            found[name] = functions[name]
            called += [inner for node in functions[name].node_def for inner in _called(node)]
    return found


def _called(node: Any) -> list[str]:
    """Return the names of the functions that a node calls."""
    named = [node.op]
    for value in node.attr.values():
        named += [value.func.name] if value.HasField("func") else [f.name for f in value.list.func]
    return named


def _node(tensor: str) -> str:
    """Return the name of the node of a tensor, or of an input of a node."""
    return tensor.removeprefix("^").partition(":")[0]


def _prune(graph: Any) -> None:
    """Drop functions that no node calls, and sort the others by name."""
    used = _called_functions(graph.node, graph.library)
    gradients = [gradient for gradient in graph.library.gradient if gradient.function_name in used]
    kept = [used[name] for name in sorted(used)]
    graph.ClearField("library")
    graph.library.function.extend(kept)
    graph.library.gradient.extend(gradients)


def _write(
    meta: Any,
    graph: tf.compat.v1.GraphDef,
    kept: Sequence[str],
    version: str,
    model_dir: Path,
    out_dir: Path,
) -> None:
    """Write the SavedModel beside ``out_dir`` and rename it."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    new = saved.meta_graphs.add()
    new.meta_info_def.tags.append("serve")
    new.meta_info_def.tensorflow_version = meta.meta_info_def.tensorflow_version
    new.meta_info_def.meta_graph_version = version
    new.graph_def.CopyFrom(graph)
    for name in kept:
        new.signature_def[name].CopyFrom(meta.signature_def[name])
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as beside:
        folder = Path(beside) / "model"
        folder.mkdir()
        (folder / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))
        if (model_dir / "assets.extra").is_dir():
            shutil.copytree(model_dir / "assets.extra", folder / "assets.extra")
        folder.rename(out_dir)


def main(arguments: Sequence[str]) -> int:
    """Answer ``flightsvc freeze``: freeze a model and print one line of JSON."""
    parser = Parser("freeze", "<model> <out>", "Replace a model's variables by constants.")
    parser.add_argument("model", metavar="<model>", help="Folder of a SavedModel.")
    parser.add_argument("out", metavar="<out>", help="The new folder.")
    parser.add_argument(
        "--signature",
        action="append",
        default=[],
        metavar="NAME",
        help="Keep this one; once for each. Default: all that assign no variable.",
    )
    given = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # TensorFlow would take memory of GPUs
    try:
        about = freeze(
            given.model,
            given.out,
            given.signature,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except NotFrozen as why:
        print(json.dumps({"frozen": False, "reason": str(why)}))
        return NOT_FROZEN
    print(json.dumps({"frozen": True, **about}))
    return 0
