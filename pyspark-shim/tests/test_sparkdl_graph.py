"""flightsvc.sparkdl.graph: names of tensors, graphs from everywhere, graphs as functions of SQL."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flightsvc
from flightsvc.sparkdl.graph import utils as tfx
from flightsvc.sparkdl.graph.input import TFInputGraph
from flightsvc.sparkdl.graph.tensorframes_udf import makeGraphUDF

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="module")
def tf1() -> Any:
    import tensorflow

    return tensorflow.compat.v1


@pytest.fixture(scope="module")
def graph(tf1: Any) -> Any:
    with tf1.Graph().as_default() as graph:
        x = tf1.placeholder(tf1.double, [None, 3], name="x")
        with tf1.name_scope("deep/er"):
            tf1.add(x, 3, name="z")
        tf1.placeholder(tf1.double, name="any")
    return graph


# Objects, by how a test asks for them: a function of the graph.
_OBJECTS: dict[str, Callable[[Any], Any]] = {
    "name": lambda graph: "deep/er/z",
    "name:0": lambda graph: "deep/er/z:0",
    "tensor": lambda graph: graph.get_tensor_by_name("deep/er/z:0"),
    "operation": lambda graph: graph.get_operation_by_name("deep/er/z"),
}
_WRONG: dict[str, Any] = {"int": 1, "float": 1.5, "None": None, "list": ["x:0"], "array": np.zeros(2), "": ""}


@pytest.mark.parametrize("form", _OBJECTS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("function", "name"), [("tensor_name", "deep/er/z:0"), ("op_name", "deep/er/z")])
def test_names(graph: Any, form: str, given: bool, function: str, name: str) -> None:
    found = _OBJECTS[form](graph)
    assert getattr(tfx, function)(found, *([graph] if given else [])) == name


@pytest.mark.parametrize("form", _OBJECTS)
def test_objects(graph: Any, form: str) -> None:
    found = _OBJECTS[form](graph)
    assert tfx.get_tensor(found, graph) is graph.get_tensor_by_name("deep/er/z:0")
    assert tfx.get_op(found, graph) is graph.get_operation_by_name("deep/er/z")
    assert tfx.validated_output(found, graph) == "deep/er/z"
    assert tfx.get_shape(found, graph) == [-1, 3]
    with pytest.raises(AssertionError, match="must be a Placeholder"):
        tfx.validated_input(found, graph)


@pytest.mark.parametrize("wrong", _WRONG)
@pytest.mark.parametrize("function", ["tensor_name", "op_name", "get_tensor", "get_op"])
def test_other_types_are_no_objects(graph: Any, function: str, wrong: str) -> None:
    given = [graph] if function.startswith("get") else []
    with pytest.raises(TypeError):
        getattr(tfx, function)(_WRONG[wrong], *given)


@pytest.mark.parametrize("function", ["tensor_name", "op_name", "get_tensor", "get_op"])
def test_a_graph_has_its_own_objects_alone(graph: Any, tf1: Any, function: str) -> None:
    ask = getattr(tfx, function)
    for form in ("tensor", "operation"):
        with pytest.raises(AssertionError, match="another graph"):
            ask(_OBJECTS[form](graph), tf1.Graph())
    for form in ("name", "name:0"):
        with pytest.raises(KeyError):
            ask(_OBJECTS[form](graph), tf1.Graph())
    with pytest.raises(TypeError, match=r"tf\.Graph"):
        ask("x:0", "graph")


def test_what_else_there_is(graph: Any, tf1: Any) -> None:
    assert tfx.validated_graph(graph) is graph
    assert tfx.validated_input("x:0", graph) == "x"
    assert tfx.add_scope_to_name("scope", "x:0") == "scope/x:0" and tfx.add_scope_to_name("", "x") == "x"
    assert tfx.tensor_name("x:1") == "x:1" and tfx.op_name("x:1") == "x"
    with pytest.raises(KeyError):
        tfx.get_tensor("x:1", graph)
    with pytest.raises(ValueError, match="rank"):
        tfx.get_shape("any", graph)
    with pytest.raises(TypeError):
        tfx.validated_graph("graph")
    with pytest.raises(ImportError, match=r"TFInputGraph"):
        from flightsvc.sparkdl.graph.builder import GraphFunction  # noqa: F401
    with pytest.raises(ImportError, match=r"tf\.reshape"):
        from flightsvc.sparkdl.graph.pieces import buildFlattener  # noqa: F401


def test_strip_and_freeze(tf1: Any) -> None:
    with tf1.Graph().as_default() as graph, tf1.Session() as session:
        x = tf1.placeholder(tf1.float32, [], name="x")
        y = tf1.multiply(x, tf1.get_variable("v", initializer=2.0), name="y")
        tf1.add(y, 1, name="more")
        session.run(tf1.global_variables_initializer())
        definition = tfx.strip_and_freeze_until([y], graph)  # the default session
        stripped = tfx.strip_and_freeze_until(["y:0"], graph, session, return_graph=True)
    assert "more" not in {node.name for node in definition.node}
    with tf1.Session(graph=stripped) as session:
        assert session.run("y:0", {"x:0": 4.0}) == 8.0
    with pytest.raises(ValueError, match="constants"):
        tfx.strip_and_freeze_until(["y:0"], graph)


# Graphs from everywhere: w has 25, so z is x + 3 + 25 of whole numbers, and y adds another input.

_MADE = """
import sys
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
x = tf.placeholder(tf.int64, [None], name="x")
a = tf.placeholder(tf.int64, [None], name="a")
w = tf.get_variable("w", initializer=tf.constant(25, tf.int64))
z = tf.add(x + 3, w, name="z")
y = tf.add(z, a * 10, name="y")
with tf.Session() as session:
    session.run(w.initializer)
    info = tf.saved_model.utils.build_tensor_info
    signature = tf.saved_model.build_signature_def({"in": info(x)}, {"out": info(z)}, "predict")
    builder = tf.saved_model.Builder(sys.argv[1] + "/saved")
    builder.add_meta_graph_and_variables(session, ["serve", "cpu"], {"sig": signature})
    builder.save()
    saver = tf.train.Saver()
    path = saver.save(session, sys.argv[1] + "/check/model", global_step=7)
    meta = saver.export_meta_graph(clear_devices=True)
    meta.signature_def["sig"].CopyFrom(signature)
    open(path + ".meta", "wb").write(meta.SerializeToString())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel and a checkpoint as TensorFlow 1 wrote them, each with the signature "sig"."""
    folder = tmp_path_factory.mktemp("made")
    done = subprocess.run([sys.executable, "-c", _MADE, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def built(tf1: Any, outputs: list[str]) -> TFInputGraph:
    with tf1.Graph().as_default() as graph, tf1.Session() as session:
        x = tf1.placeholder(tf1.int64, [None], name="x")
        a = tf1.placeholder(tf1.int64, [None], name="a")
        w = tf1.get_variable("w", initializer=tf1.constant(25, tf1.int64))
        z = tf1.add(x + 3, w, name="z")
        tf1.add(z, a * 10, name="y")
        session.run(w.initializer)
        return TFInputGraph.fromGraph(graph, session, ["x", "a"], outputs)


_FROM: dict[str, Callable[[Any, Path], TFInputGraph]] = {
    "graph": lambda tf1, made: built(tf1, ["z"]),
    "GraphDef": lambda tf1, made: TFInputGraph.fromGraphDef(built(tf1, ["z"]).graph_def, ["x:0"], ["z:0"]),
    "SavedModel": lambda tf1, made: TFInputGraph.fromSavedModel(made / "saved", "serve, cpu", ["x"], ["z"]),
    "checkpoint": lambda tf1, made: TFInputGraph.fromCheckpoint(made / "check", ["x"], ["z"]),
    "SavedModel, signature": lambda tf1, made: TFInputGraph.fromSavedModelWithSignature(
        str(made / "saved"), "serve,cpu", "sig"
    ),
    "checkpoint, signature": lambda tf1, made: TFInputGraph.fromCheckpointWithSignature(
        str(made / "check"), "sig"
    ),
}


@pytest.mark.parametrize("source", _FROM)
def test_graphs_from_everywhere(client: flightsvc.Client, tf1: Any, made: Path, source: str) -> None:
    import pyarrow as pa

    found = pickle.loads(pickle.dumps(_FROM[source](tf1, made)))
    inputs, outputs = {"column": "x:0"}, {"z:0": "result"}
    if "signature" in source:
        inputs = found.translateInputMapping({"column": "in"})
        outputs = found.translateOutputMapping([("out", "result")])
        assert found.input_tensor_name_from_signature == {"in": "x:0"}
        assert found.output_tensor_name_from_signature == {"out": "z:0"}
        with pytest.raises(KeyError, match="it has in"):
            found.translateInputMapping({"column": "other"})
    else:
        with pytest.raises(AssertionError, match="without a signature"):
            found.translateInputMapping({"column": "in"})
    assert inputs == {"column": "x:0"} and outputs == {"z:0": "result"}
    assert not [node for node in found.graph_def.node if "Variable" in node.op or node.op == "VarHandleOp"]
    model = flightsvc.Model(found.saved_model(["x:0"], ["z:0"]))
    big = 2**53 + 1  # no double has it
    got = client.predict(
        model, pa.table({"column": [0, -28, big]}), inputs={"x:0": "column"}, outputs=outputs
    )
    assert got["result"].to_pylist() == [28, 0, big + 28]


def test_two_inputs(client: flightsvc.Client, tf1: Any) -> None:
    import pyarrow as pa

    model = flightsvc.Model(built(tf1, ["y", "z"]).saved_model(["x", "a"], ["y", "z"]))
    got = client.predict(model, pa.table({"x": [1, 2], "a": [10, 20]}))
    assert got["y"].to_pylist() == [129, 230] and got["z"].to_pylist() == [29, 30]


def test_graphs_that_cannot_be_made(tf1: Any, made: Path, tmp_path: Path) -> None:
    good = built(tf1, ["z"]).graph_def
    for asked, error, said in (
        (lambda: TFInputGraph.fromGraphDef(good, ["no"], ["z"]), KeyError, "no tensor 'no' for an input"),
        (lambda: TFInputGraph.fromGraphDef(good, ["x"], ["no"]), KeyError, "no tensor 'no' for an output"),
        (lambda: TFInputGraph.fromGraphDef("graph", ["x"], ["z"]), AssertionError, "GraphDef"),
        (lambda: TFInputGraph.fromGraphDef(good, ["x"], None), AssertionError, "fetch_names"),
        (lambda: TFInputGraph.fromCheckpoint(made / "check", None, ["z"]), AssertionError, "feed_names"),
        (lambda: TFInputGraph.fromCheckpointWithSignature(made / "check", None), AssertionError, "None"),
        (lambda: TFInputGraph.fromCheckpointWithSignature(made / "check", "no"), KeyError, "there is sig"),
        (lambda: TFInputGraph.fromCheckpoint(tmp_path, ["x"], ["z"]), KeyError, "no checkpoint"),
        (
            lambda: TFInputGraph.fromSavedModelWithSignature(made / "saved", "serve,cpu", "no"),
            KeyError,
            "there is sig",
        ),
        (lambda: TFInputGraph.fromSavedModel(made / "saved", "gpu", ["x"], ["z"]), ValueError, "tags"),
        (lambda: TFInputGraph.fromSavedModel(tmp_path, "serve", ["x"], ["z"]), KeyError, "no saved_model.pb"),
    ):
        with pytest.raises(error, match=said):
            asked()


# Graphs as functions of SQL.


@pytest.mark.parametrize("blocked", [False, True])
def test_a_function_of_one_column(spark: Any, tf1: Any, blocked: bool) -> None:
    with tf1.Graph().as_default() as graph:
        x = tf1.placeholder(tf1.double, [None] if blocked else [], name="x")
        z = tf1.add(x, 3, name="z")
    name = f"plus_three_{blocked}".lower()
    function = makeGraphUDF(graph, name, [z], blocked=blocked)
    assert spark.catalog.functionExists(name)
    df = spark.createDataFrame([(float(i),) for i in range(5)], "other double")
    df.createOrReplaceTempView("plus_rows")
    rows = spark.sql(f"SELECT other, {name}(other) AS z FROM plus_rows").collect()
    assert [row.z for row in rows] == [row.other + 3 for row in rows] and len(rows) == 5
    assert [row.z for row in df.select(function("other").alias("z")).collect()] == [3.0, 4.0, 5.0, 6.0, 7.0]
    spark.sql(f"DROP TEMPORARY FUNCTION {name}")


def test_a_function_of_several(spark: Any, tf1: Any) -> None:
    with tf1.Graph().as_default() as graph:
        x = tf1.placeholder(tf1.float64, [], name="x")
        y = tf1.placeholder(tf1.float64, [2], name="y")
        tf1.placeholder(tf1.float64, [], name="aside")
        tf1.multiply(y, x, name="scaled")
        tf1.reduce_sum(y, name="all")
    function = makeGraphUDF(graph, "scale", ["scaled", "all:0"], {y: "weights"}, register=False)
    assert function.parameters == ("x", "weights")
    assert not spark.catalog.functionExists("scale")
    df = spark.createDataFrame([(2.0, [1.0, 2.0]), (3.0, [0.5, -0.5])], "x double, y array<double>")
    got = [row.r for row in df.select(function("x", weights="y").alias("r")).collect()]
    assert [row.asDict() for row in got] == [
        {"all": 3.0, "scaled": [2.0, 4.0]},
        {"all": 0.0, "scaled": [1.5, -1.5]},
    ]
    with pytest.raises(AssertionError, match="no placeholder that"):
        makeGraphUDF(graph, "scale", ["scaled"], {"all": "a"})
    with pytest.raises(ValueError, match="has no fetch"):
        makeGraphUDF(graph, "scale", [])
