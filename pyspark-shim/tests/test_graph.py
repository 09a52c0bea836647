"""Graphs of TensorFlow 1 as SavedModels: what the server answers is what a session computes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import Row

import flightsvc
from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.export.graph import TFInputGraph
from flightsvc.export.pictures import picture_model

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

_ROWS = np.random.default_rng(3).normal(size=(7, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def tf1() -> Any:
    import tensorflow

    return tensorflow.compat.v1


@pytest.fixture(scope="module")
def dense(tf1: Any) -> tuple[TFInputGraph, np.ndarray]:
    """y = tanh(x w + b), and what a session computes."""
    with tf1.Graph().as_default() as graph, tf1.Session(graph=graph) as session:
        x = tf1.placeholder(tf1.float32, [None, 4], name="x")
        w = tf1.get_variable("w", [4, 3], initializer=tf1.random_normal_initializer(seed=1))
        b = tf1.get_variable("b", initializer=np.float32([1, 2, 3]))
        y = tf1.tanh(tf1.matmul(x, w) + b, name="y")
        session.run(tf1.global_variables_initializer())
        return TFInputGraph.fromGraph(graph, session, ["x"], ["y:0"]), session.run(y, {x: _ROWS})


def predict(client: flightsvc.Client, folder: Path, **options: Any) -> dict[str, list[Any]]:
    data = options.pop("data")
    answer = client.predict(flightsvc.Model(folder), pa.table(data), **options)
    return answer.to_pydict()


def lists(rows: np.ndarray) -> pa.Array:
    return pa.array(rows.tolist(), pa.list_(pa.from_numpy_dtype(rows.dtype)))


def test_a_graph_is_served_by_the_names_that_it_was_asked_by(
    client: flightsvc.Client, dense: tuple[TFInputGraph, np.ndarray]
) -> None:
    graph, expected = dense
    folder = pickle.loads(pickle.dumps(graph)).saved_model(["x:0"], ["y", "y:0"])
    model = flightsvc.Model(folder)
    assert list(model.inputs) == ["x:0"] and sorted(model.outputs) == ["y", "y:0"]
    got = predict(client, folder, data={"x:0": lists(_ROWS)})
    np.testing.assert_allclose(got["y:0"], expected, rtol=1e-5, atol=1e-6)
    assert got["y"] == got["y:0"]
    assert graph.saved_model(["x:0"], ["y", "y:0"]) == folder, "it was made a second time"
    assert graph.saved_model(["x"], ["y"]) != folder


def test_a_tensor_inside_can_be_fed_and_an_input_can_be_an_output(client: flightsvc.Client, tf1: Any) -> None:
    with tf1.Graph().as_default() as graph:
        x = tf1.placeholder(tf1.int64, [None], name="x")
        tf1.add(tf1.identity(x * 3, name="middle"), 1, name="z")
    graph = TFInputGraph.fromGraphDef(graph.as_graph_def(), ["middle"], ["z"])
    folder = graph.saved_model(["middle:0"], ["z:0", "middle"])
    got = predict(client, folder, data={"middle:0": pa.array([1, 2, 3])})
    assert got["z:0"] == [2, 3, 4] and got["middle"] == [1, 2, 3]


def test_rows_without_a_batch_dimension(client: flightsvc.Client, tf1: Any) -> None:
    with tf1.Graph().as_default() as graph:
        x = tf1.placeholder(tf1.float64, [], name="x")
        v = tf1.placeholder(tf1.float64, [3], name="v")
        tf1.reduce_max(v * x, name="most")
        steps = tf1.while_loop(lambda i, s: i < 3, lambda i, s: (i + 1, s + x), [0, x])
        tf1.stack([steps[1], x], name="pair")
    graph = TFInputGraph.fromGraphDef(graph.as_graph_def(), ["x", "v"], ["most", "pair"])
    folder = graph.saved_model(["x", "v"], ["most", "pair"], per_row=True)
    rows = np.arange(6, dtype=np.float64).reshape(2, 3)
    got = predict(client, folder, data={"x": pa.array([2.0, -1.0]), "v": lists(rows)})
    assert got["most"] == [4.0, -3.0] and got["pair"] == [[8.0, 2.0], [-4.0, -1.0]]


def test_what_cannot_be_served_is_said_on_the_driver(
    dense: tuple[TFInputGraph, np.ndarray], tf1: Any
) -> None:
    graph, _ = dense
    with pytest.raises(NotFoundError, match=r"no tensor 'z:0' for an output; it has .*y:0"):
        graph.saved_model(["x:0"], ["z:0"])
    with pytest.raises(InvalidArgumentError, match="needs the placeholder 'x:0', which is not an input"):
        graph.saved_model([], ["y"])
    with tf1.Graph().as_default() as other:
        x = tf1.placeholder(tf1.float32, [None], name="x")
        tf1.multiply(x, tf1.get_variable("v", initializer=2.0), name="y")
    with pytest.raises(InvalidArgumentError, match="variable"):
        TFInputGraph.fromGraphDef(other.as_graph_def(), ["x"], ["y"]).saved_model(["x"], ["y"])


def test_a_frozen_file(
    client: flightsvc.Client, dense: tuple[TFInputGraph, np.ndarray], tmp_path: Path
) -> None:
    graph, expected = dense
    (tmp_path / "net.pb").write_bytes(graph.graph_def.SerializeToString())
    folder = TFInputGraph.fromFrozenFile(tmp_path / "net.pb").saved_model(["x"], ["y"])
    np.testing.assert_allclose(predict(client, folder, data={"x": lists(_ROWS)})["y"], expected, rtol=1e-5)
    (tmp_path / "bad.pb").write_bytes(b"\xff no graph")
    with pytest.raises(InvalidArgumentError, match="holds no frozen graph"):
        TFInputGraph.fromFrozenFile(tmp_path / "bad.pb")
    with pytest.raises(NotFoundError, match="No such file"):
        TFInputGraph.fromFrozenFile(tmp_path / "none.pb")


def test_a_saved_model_of_tensorflow_2(client: flightsvc.Client, models: Path, oracle: Any) -> None:
    model = flightsvc.Model(models / "mlp")
    graph = TFInputGraph.fromSavedModelWithSignature(models / "mlp", "serve", "serving_default")
    [(name, spec)] = model.inputs.items()
    [output] = model.outputs
    rows = np.random.default_rng(0).normal(size=(5, *spec.shape[1:])).astype(np.float32)
    [x], [y] = graph.translateInputMapping({"c": name}).values(), graph.translateOutputMapping({output: "o"})
    got = predict(client, graph.saved_model([x], [y]), data={x: lists(rows)})
    np.testing.assert_allclose(got[y], oracle("mlp", **{name: rows})[output], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_without_the_behaviour_of_tensorflow_2(client: flightsvc.Client, tmp_path: Path) -> None:
    script = """
import shutil, sys
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
from flightsvc.export.graph import TFInputGraph
from flightsvc.export.pictures import picture_model
with tf.Session() as session:
    x = tf.placeholder(tf.float32, [3], name="x")
    tf.multiply(x, tf.get_variable("v", initializer=2.0), name="y")
    p = tf.placeholder(tf.float32, [None, None, None, 3], name="p")
    tf.add(p, 1.0, name="q")
    session.run(tf.global_variables_initializer())
    graph = TFInputGraph.fromGraph(session.graph, session, ["x", "p"], ["y", "q"])
shutil.copytree(graph.saved_model(["x"], ["y"], per_row=True), sys.argv[1])
picture_model(graph, "p", "q", "RGB", "vector")
"""
    folder = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    got = predict(client, folder, data={"x": lists(np.float32([[1, 2, 3], [4, 5, 6]]))})
    assert got["y"] == [[2, 4, 6], [8, 10, 12]]


# Pictures, each at its own size.


def drawn(height: int, width: int, channels: int, kind: Any) -> np.ndarray:
    values = np.random.default_rng(height * channels).integers(0, 256, (height, width, channels))
    return values.astype(kind)


_PICTURES = [
    drawn(*size, kind)
    for size in ((3, 5, 1), (4, 2, 3), (2, 6, 4), (5, 5, 3))
    for kind in (np.uint8, np.float32)
]


def wanted(picture: np.ndarray, order: str, channels: int | None) -> np.ndarray:
    """The batch of one that the graph gets of a picture, in NumPy."""
    x = picture.astype(np.float32)
    if channels == 1:
        x = x if x.shape[2] == 1 else (x[..., :3] @ np.float32([0.114, 0.587, 0.299]))[..., None]
    elif x.shape[2] == 1:
        x = x if channels is None else np.repeat(x, 3, axis=2)
    else:
        x = x[..., :3]
    return x[None, ..., ::-1] if order == "RGB" else x[None]


def columns(pictures: list[np.ndarray]) -> dict[str, pa.Array]:
    structs = [flightsvc.image.to_struct(picture) for picture in pictures]
    fields = [("data", pa.binary())] + [(n, pa.int32()) for n in ("height", "width", "nChannels", "mode")]
    return {name: pa.array([getattr(s, name) for s in structs], kind) for name, kind in fields}


def pixels(tf1: Any, channels: int | None, out: str) -> tuple[TFInputGraph, Any]:
    """A graph of pictures, and a function that runs it in a session."""
    with tf1.Graph().as_default() as graph:
        x = tf1.placeholder(tf1.float32, [None, None, None, channels], name="x")
        tf1.multiply(x, 0.5, name="half")
        tf1.reduce_mean(x, axis=[1, 2], name="mean")
        tf1.cast(255 - x, tf1.uint8, name="negative")

    def run(batch: np.ndarray) -> np.ndarray:
        with tf1.Session(graph=graph) as session:
            return session.run(f"{out}:0", {"x:0": batch})

    return TFInputGraph.fromGraphDef(graph.as_graph_def(), ["x"], [out]), run


@pytest.mark.parametrize(
    ("order", "channels"), [("RGB", 3), ("BGR", 3), ("RGB", None), ("BGR", None), ("L", None), ("L", 1)]
)
@pytest.mark.parametrize("out", ["mean", "half"])
def test_vectors_of_pictures(client: flightsvc.Client, tf1: Any, order: str, channels: int, out: str) -> None:
    graph, run = pixels(tf1, channels, out)
    folder = picture_model(graph, "x", f"{out}:0", order, "vector")
    for batching in (None, {"max_batch_size": 1}):
        got = predict(client, folder, data=columns(_PICTURES), batching=batching)
        for i, picture in enumerate(_PICTURES):
            expected = run(wanted(picture, order, 1 if order == "L" else channels)).ravel()
            vector = got["vector"][i][: got["length"][i]] if "length" in got else got["vector"][i]
            np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("order", "channels"), [("RGB", 3), ("BGR", None), ("L", 1)])
@pytest.mark.parametrize("out", ["half", "negative"])
def test_pictures_of_pictures(
    client: flightsvc.Client, tf1: Any, order: str, channels: int, out: str
) -> None:
    graph, run = pixels(tf1, channels, out)
    got = predict(
        client,
        picture_model(graph, "x:0", out, order, "image"),
        data=columns(_PICTURES),
        outputs={name: f"new_{name}" for name in ("data", "height", "width", "nChannels", "mode")},
    )
    for i, picture in enumerate(_PICTURES):
        [expected] = run(wanted(picture, order, channels))
        row = Row(
            origin="",
            **{name.removeprefix("new_"): v[i] for name, v in got.items() if name.startswith("new_")},
        )
        array = flightsvc.image.to_array(row)
        assert array.dtype == expected.dtype
        expected = expected[..., ::-1] if order == "RGB" else expected
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1 if out == "negative" else 1e-4)


def test_pictures_that_cannot_be_used_and_graphs_that_take_none(client: flightsvc.Client, tf1: Any) -> None:
    graph, _ = pixels(tf1, 3, "mean")
    data = columns(_PICTURES[:3])
    data["mode"] = pa.array([-1, 0, 16], pa.int32())
    data["height"] = pa.array([-1, 3, 40], pa.int32())
    data["nChannels"] = pa.array([-1, 1, 3], pa.int32())
    data["data"] = pa.array([b"", bytes(15), bytes(7)], pa.binary())
    data["width"] = pa.array([-1, 5, 5], pa.int32())
    folder = picture_model(graph, "x", "mean", "RGB", "vector")
    got = predict(client, folder, data=data, on_error="column")
    assert got["vector"] == [None, [0, 0, 0], None]
    assert "the picture is invalid" in got["error"][0] and "do not agree with" in got["error"][2]
    with pytest.raises(InvalidArgumentError, match="takes 3 channels, channelOrder 'L' has 1"):
        picture_model(graph, "x", "mean", "L", "vector")
    with pytest.raises(InvalidArgumentError, match="not a picture"):
        picture_model(graph, "x", "mean", "RGB", "image")
    with pytest.raises(InvalidArgumentError, match="one of RGB, BGR, L"):
        picture_model(graph, "x", "mean", "HSV", "vector")
