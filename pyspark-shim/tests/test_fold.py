"""Folding: a folded graph gives the same answers, and nothing is left of the normalisations in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")
import numpy as np  # noqa: E402
from test_freeze import answers, same, save  # noqa: E402

from flightsvc.export.fold import fold  # noqa: E402
from flightsvc.export.freeze import freeze  # noqa: E402

v1 = tf.compat.v1
Rng = np.random.Generator


def run(graph: Any, feeds: dict[str, Any], fetches: list[str], *, fuse: bool = True) -> list[Any]:
    config = v1.ConfigProto(intra_op_parallelism_threads=1)
    # Channels first on a CPU: as TensorFlow does it by itself where oneDNN is on.
    config.graph_options.rewrite_options.cpu_layout_conversion = 1  # NCHW_TO_NHWC
    if not fuse:  # TensorFlow fuses a grouped convolution with FusedBatchNorm, and then cannot run it
        config.graph_options.rewrite_options.remapping = 2  # OFF
    with tf.Graph().as_default() as loaded, v1.Session(graph=loaded, config=config) as session:
        tf.import_graph_def(graph, name="")
        result: list[Any] = session.run(fetches, feeds)
        return result


def folded(graph: Any, feeds: dict[str, Any], fetches: list[str]) -> tuple[Any, Counter[str]]:
    """Fold a graph, demand equal answers, and return it with the number of operations of each type."""
    result = fold(graph, {name.partition(":")[0] for name in (*feeds, *fetches)})
    before = run(graph, feeds, fetches, fuse=False)
    for ours, theirs in zip(run(result, feeds, fetches), before, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.dtype.kind == "f":
            assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
        else:
            assert (ours == theirs).all()
    return result, Counter(node.op for node in result.node)


def normal(rng: Rng, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype("f4")


def some(rng: Rng, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def batch_normalisation(rng: Rng, x: Any, channels: int, first: bool) -> Any:
    """Normalise as Keras 2 does, or as Keras 3 does."""
    gamma = normal(rng, channels) if rng.random() < 0.7 else None
    beta, mean = normal(rng, channels), normal(rng, channels)
    variance = rng.uniform(0.1, 3, channels).astype("f4")
    if x.shape.rank == 4 and rng.random() < 0.4:
        return v1.nn.fused_batch_norm(
            x,
            np.ones(channels, "f4") if gamma is None else gamma,
            beta,
            mean,
            variance,
            epsilon=1e-3,
            data_format="NCHW" if first else "NHWC",
            is_training=False,
        )[0]
    values = [beta, mean, variance, gamma]
    if first or rng.random() < 0.3:
        shape = [1] * x.shape.rank
        shape[1 if first else -1] = channels
        values = [None if value is None else tf.reshape(value, shape) for value in values]
    beta, mean, variance, gamma = values
    return tf.nn.batch_normalization(
        x, mean, variance, beta if rng.random() < 0.7 else None, gamma, variance_epsilon=1e-3
    )


def pictures(rng: Rng, channels: int, first: bool, sides: int = 2) -> Any:
    sizes = [int(rng.integers(5, 9)) for _ in range(sides)]
    return v1.placeholder("float32", [3, channels, *sizes] if first else [3, *sizes, channels], "x")


Made = tuple[Any, int]  # the output of an operation, and how many channels it has


def conv1d(rng: Rng, first: bool) -> Made:
    x = v1.placeholder("float32", [3, 9, 4], "x")
    return tf.nn.conv1d(x, normal(rng, 3, 4, 5), some(rng, 1, 2), some(rng, "SAME", "VALID")), 5


def conv2d(rng: Rng, first: bool) -> Made:
    groups = 1 if first else some(rng, 1, 1, 2)
    stride = some(rng, 1, 2)
    return tf.nn.conv2d(
        pictures(rng, 4, first),
        normal(rng, some(rng, 1, 3), 2, 4 // groups, 6),
        stride,
        some(rng, "SAME", "VALID"),
        "NCHW" if first else "NHWC",
        1 if stride > 1 or first else some(rng, 1, 2),
    ), 6


def depthwise(rng: Rng, first: bool) -> Made:
    multiplier, stride = int(rng.integers(1, 4)), some(rng, 1, 2)
    return tf.nn.depthwise_conv2d(
        pictures(rng, 4, first),
        normal(rng, 3, some(rng, 2, 3), 4, multiplier),
        [1, 1, stride, stride] if first else [1, stride, stride, 1],
        some(rng, "SAME", "VALID"),
        "NCHW" if first else "NHWC",
        [1, 1] if stride > 1 or first else some(rng, [1, 1], [2, 2]),
    ), 4 * multiplier


def separable(rng: Rng, first: bool) -> Made:
    layout, ones = ("NCHW", [1, 1, 1, 1]) if first else ("NHWC", [1, 1, 1, 1])
    x = pictures(rng, 3, first)
    return tf.nn.separable_conv2d(
        x, normal(rng, 2, 2, 3, 2), normal(rng, 1, 1, 6, 5), ones, "SAME", layout
    ), 5


def conv3d(rng: Rng, first: bool) -> Made:
    stride = [1, some(rng, 1, 2), 1, 1, 1][:: -1 if first else 1]
    x = pictures(rng, 2, False, 3)
    return tf.nn.conv3d(x, normal(rng, 2, 1, 2, 2, 4), stride, some(rng, "SAME", "VALID")), 4


def transposed(rng: Rng, first: bool) -> Made:
    x, stride = pictures(rng, 3, False), some(rng, 1, 2)
    sizes = [size * stride for size in x.shape[1:3]]
    return tf.nn.conv2d_transpose(x, normal(rng, 3, 3, 5, 3), [3, *sizes, 5], stride), 5


def transposed3d(rng: Rng, first: bool) -> Made:
    x = pictures(rng, 3, False, 3)
    return tf.nn.conv3d_transpose(x, normal(rng, 2, 2, 2, 4, 3), [*x.shape[:4], 4], 1), 4


def matmul(rng: Rng, first: bool) -> Made:
    x, turned = v1.placeholder("float32", [6, 5], "x"), some(rng, False, True)
    return tf.matmul(x, normal(rng, *((7, 5) if turned else (5, 7))), transpose_b=turned), 7


def dense(rng: Rng, first: bool) -> Made:
    return tf.tensordot(v1.placeholder("float32", [3, 4, 5], "x"), normal(rng, 5, 7), 1), 7


def batches(rng: Rng, first: bool) -> Made:
    x, turned = v1.placeholder("float32", [3, 4, 5], "x"), some(rng, False, True)
    batch = some(rng, 1, 3)
    return tf.raw_ops.BatchMatMulV2(
        x=x, y=normal(rng, *((batch, 7, 5) if turned else (batch, 5, 7))), adj_y=turned
    ), 7


def einsum(rng: Rng, first: bool) -> Made:
    x = v1.placeholder("float32", [3, 4, 5], "x")
    equation, *shape = some(rng, ("abc,cd->abd", 5, 6), ("abc,dc->abd", 6, 5), ("abc,cbd->ad", 5, 4, 6))
    return tf.einsum(equation, x, normal(rng, *shape)), 6


FIRST = {conv2d, depthwise, separable}
"""The operations that TensorFlow runs on a CPU with channels first."""


def groups(graph: Any) -> int:
    [convolution] = (op for op in graph.get_operations() if op.type == "Conv2D")
    x, weights = convolution.inputs
    layout = convolution.get_attr("data_format")
    return int(x.shape[1 if layout == b"NCHW" else 3] // weights.shape[2])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "make",
    [
        conv1d,
        conv2d,
        depthwise,
        separable,
        conv3d,
        transposed,
        transposed3d,
        matmul,
        dense,
        batches,
        einsum,
    ],
)
def test_normalisations_are_absorbed(make: Callable[[Rng, bool], Made], seed: int) -> None:
    rng = np.random.default_rng([seed, *make.__name__.encode()])
    first = make in FIRST and seed % 2 == 1
    with tf.Graph().as_default() as graph:
        y, channels = make(rng, first)
        if rng.random() < 0.5:
            y = tf.nn.bias_add(y, normal(rng, channels), "NCHW" if first else "NHWC")
        y = tf.identity(batch_normalisation(rng, y, channels, first))
        if rng.random() < 0.3:
            y = y * np.float32(0.5) - np.float32(0.25)
        tf.nn.relu(y, name="y")
    shape = graph.get_tensor_by_name("x:0").shape
    _, ops = folded(graph.as_graph_def(add_shapes=True), {"x:0": normal(rng, *shape)}, ["y:0"])
    shifts = "AddV2" if make is conv2d and groups(graph) > 1 else "BiasAdd"
    assert ops.pop(shifts) == 1 and ops["Relu"] == 1
    left = set(ops) & {"Mul", "AddV2", "Sub", "Rsqrt", "FusedBatchNormV3", "Identity"}
    assert not left - ({"Mul"} if make is dense else set())  # of the shape


@pytest.mark.parametrize("fetched", [False, True])
def test_an_operation_with_another_reader_stays(fetched: bool) -> None:
    rng = np.random.default_rng(1)
    with tf.Graph().as_default() as graph:
        y, channels = conv2d(rng, False)
        z = tf.identity(y, "z")
        again = y * normal(rng, channels) + normal(rng, channels)
        tf.nn.relu(again if fetched else again + z, name="y")
    shape = graph.get_tensor_by_name("x:0").shape
    fetches = ["y:0", "z:0"] if fetched else ["y:0"]
    _, ops = folded(graph.as_graph_def(add_shapes=True), {"x:0": normal(rng, *shape)}, fetches)
    assert ops["Mul"] == 1 and ops["AddV2"] == 2 - fetched and not ops["BiasAdd"]


def test_a_value_on_the_way_with_another_reader_stays() -> None:
    rng = np.random.default_rng(1)
    with tf.Graph().as_default() as graph:
        x = v1.placeholder("float32", [2, 5], "x")
        y = x @ normal(rng, 5, 3) * normal(rng, 3)
        tf.add(y + normal(rng, 3), tf.tanh(y), name="y")
    _, ops = folded(graph.as_graph_def(add_shapes=True), {"x:0": normal(rng, 2, 5)}, ["y:0"])
    assert not ops["Mul"] and ops["AddV2"] == 2 and not ops["BiasAdd"]


def test_what_is_no_scale_of_channels_stays() -> None:
    rng = np.random.default_rng(1)
    for factor in (normal(rng, 4, 1), normal(rng, 2, 4, 3), normal(rng, 1, 4, 3), normal(rng, 1, 1, 1, 3)):
        with tf.Graph().as_default() as graph:
            x = v1.placeholder("float32", [4, 5], "x")
            tf.add(x @ normal(rng, 5, 3) * factor, 1.0, name="y")
        _, ops = folded(graph.as_graph_def(add_shapes=True), {"x:0": normal(rng, 4, 5)}, ["y:0"])
        assert ops["Mul"] == 1 and ops["AddV2"] == 1
    with tf.Graph().as_default() as graph:  # one channel becomes three
        x = v1.placeholder("float32", [4, 5], "x")
        tf.multiply(x @ normal(rng, 5, 1), normal(rng, 3), name="y")
    assert folded(graph.as_graph_def(), {"x:0": normal(rng, 4, 5)}, ["y:0"])[1]["Mul"] == 1
    with tf.Graph().as_default() as graph:  # weights that are fed, a scale that is not finite, half precision
        x, w = v1.placeholder("float32", [4, 5], "x"), tf.constant(normal(rng, 5, 3), name="w")
        y = x @ w * normal(rng, 3)
        z = x @ normal(rng, 5, 3) / np.float32(0)
        h = tf.cast(x, "float16") @ normal(rng, 5, 3).astype("f2") * normal(rng, 3).astype("f2")
        tf.add_n([y, tf.cast(z > 0, "float32"), tf.cast(h, "float32")], name="y")
    feeds = {"x:0": normal(rng, 4, 5), "w:0": normal(rng, 5, 3)}
    _, ops = folded(graph.as_graph_def(add_shapes=True), feeds, ["y:0"])
    assert ops["Mul"] == 2 and ops["RealDiv"] == 1


def test_integers_and_strings_are_exact() -> None:
    with tf.Graph().as_default() as graph:
        i, s = v1.placeholder("int32", [3], "i"), v1.placeholder("string", [3], "s")
        scale = tf.reshape(tf.constant([2**30, 3, -7]) * 5, [3])
        tf.add(tf.identity(i * scale), scale, name="n")
        tf.strings.join([s, tf.identity(["a", "b", "\u00e9"])], name="t")
        tf.matmul(i[None] * 1, [[2], [3], [4]], name="m")
    feeds = {"i:0": np.array([1, 2, 2**31 - 1], "i4"), "s:0": np.array([b"x", b"", b"\xff"], object)}
    _, ops = folded(graph.as_graph_def(add_shapes=True), feeds, ["n:0", "t:0", "m:0"])
    assert ops["Mul"] == 1 and not ops["Identity"] and not ops["Reshape"]


def test_constants_do_not_grow() -> None:
    with tf.Graph().as_default() as graph:
        column = tf.constant(np.ones((300, 1), "f4"))
        tf.add(column * tf.reshape(column, [1, 300]), v1.placeholder("float32", [], "x"), name="y")
        tf.cast(tf.constant(np.ones(20_000, "i1")), "float32", name="c")
        tf.add(tf.cast(tf.constant(np.ones(20_000, "i1")), "float32"), 1.0, name="d")
    result, ops = folded(graph.as_graph_def(), {"x:0": 1.0}, ["y:0", "c:0", "d:0"])
    assert ops["Mul"] == 1 and ops["Cast"] == 2
    assert result.ByteSize() < graph.as_graph_def().ByteSize() + 2_000


@pytest.mark.parametrize("kind", ["random", "assert", "loop"])
def test_a_graph_with_a_state_or_a_loop_of_tensorflow_1_is_untouched(kind: str) -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder("float32", [], "x")
        y = x * 1.0
        if kind == "random":
            y += v1.random_normal([])
        elif kind == "assert":
            with tf.control_dependencies([v1.Assert(x > 0, [x])]):
                y = tf.identity(y)
        else:
            v1.disable_control_flow_v2()
            y = v1.while_loop(lambda y: y < 3, lambda y: y + 1, [y])
            v1.enable_control_flow_v2()
        tf.add(y, 1.0, name="y")
    graph_def = graph.as_graph_def()
    assert fold(graph_def, {"x", "y"}) is graph_def


class Two(tf.Module):
    """Two signatures with the same weights, one with a branch and a function for XLA."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(np.random.default_rng(1).normal(size=(64, 64)).astype("f4"))
        self.s = tf.Variable(np.random.default_rng(2).normal(size=64).astype("f4"))

    @tf.function(autograph=False)
    def layer(self, x: Any) -> Any:
        return tf.nn.relu((x @ tf.transpose(self.w)) * self.s + 0.5)

    @tf.function(jit_compile=True)
    def compiled(self, x: Any) -> Any:
        return x * self.s * 1.0

    @tf.function(input_signature=[tf.TensorSpec([None, 64], name="x")])
    def plain(self, x: Any) -> Any:
        return {"y": self.layer(x), "z": tf.reduce_sum(x, 1)}

    @tf.function(input_signature=[tf.TensorSpec([None, 64], name="x")])
    def deep(self, x: Any) -> Any:
        y = self.layer(x)
        return {"y": tf.cond(tf.reduce_sum(y) > 0, lambda: y @ self.w, lambda: self.compiled(y))}


def test_signatures_share_weights_and_branches_stay(tmp_path: Path) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    module = Two()
    save(tmp_path / "in", module, plain=module.plain, deep=module.deep)
    freeze(tmp_path / "in", tmp_path / "out")
    for sign in (1, -1):
        x = sign * normal(np.random.default_rng(3), 5, 64)
        for name in ("plain", "deep"):
            ours, theirs = (answers(tmp_path / folder, name, x=x) for folder in ("out", "in"))
            for output, values in theirs.items():
                assert np.abs(ours[output] - values).max() <= 1e-6 * np.abs(values).max()
    [meta] = saved_model_pb2.SavedModel.FromString(
        (tmp_path / "out" / "saved_model.pb").read_bytes()
    ).meta_graphs
    ops = Counter(node.op for node in meta.graph_def.node)
    assert ops["MatMul"] == ops["BiasAdd"] == 2 and not ops["Mul"]
    assert sum(node.ByteSize() > 16_000 for node in meta.graph_def.node) == 2  # as saved, and scaled
    calls = [node.op for function in meta.graph_def.library.function for node in function.node_def]
    assert "MatMul" in calls and {"PartitionedCall", "StatefulPartitionedCall"} & set(calls)


def network(keras: Any) -> Any:
    layers = keras.layers
    keras.utils.set_random_seed(7)
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, use_bias=False)(image)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, dilation_rate=2, padding="same")(x)
    x = layers.Activation("swish")(layers.BatchNormalization(scale=False)(x))
    y = layers.BatchNormalization(center=False)(layers.SeparableConv2D(16, 3, padding="same")(x))
    x = layers.BatchNormalization()(layers.Conv2DTranspose(4, 3)(layers.Add()([x, y])))
    x = layers.BatchNormalization()(layers.Dense(6)(layers.Reshape((-1, 8))(x)))
    x = layers.BatchNormalization()(layers.Conv1D(5, 3)(x))
    x = layers.Dense(3, activation="softmax", name="y")(layers.GlobalMaxPooling1D()(x))
    model = keras.Model(image, x)
    rng = np.random.default_rng(4)
    model.set_weights([rng.uniform(0.2, 1, weight.shape) for weight in model.get_weights()])
    return model


def test_a_network_of_keras_runs_without_a_normalisation(tmp_path: Path) -> None:
    import keras

    from flightsvc.export import keras as keras_models

    model = network(keras)
    x = normal(np.random.default_rng(5), 4, 16, 16, 3)
    folder = keras_models.of_model(model)
    same(answers(folder, image=x), {"y": model.predict(x, verbose=0)})
    with tf.Graph().as_default(), v1.Session() as session:
        meta = v1.saved_model.load(session, ["serve"], str(folder))
        of, about = meta.signature_def["serving_default"], v1.RunMetadata()
        session.run(
            of.outputs["y"].name,
            {of.inputs["image"].name: x},
            v1.RunOptions(output_partition_graphs=True),
            about,
        )
    ran = Counter(node.op for graph in about.partition_graphs for node in graph.node)
    assert not {"Rsqrt", "Sub", "IdentityN", "StatefulPartitionedCall"} & set(ran)
    assert ran["AddV2"] + ran["_MklAddV2"] <= 2  # the layer Add, and the size of the transposed convolution


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_export_the_same(tmp_path: Path) -> None:
    import keras

    network(keras).save(tmp_path / "m.keras")
    script = (
        "import sys; from pathlib import Path; from flightsvc.export import keras\n"
        "sys.stdout.buffer.write((keras.of_file(Path(sys.argv[1])) / 'saved_model.pb').read_bytes())"
    )
    one, two = (
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "m.keras"], check=True, capture_output=True
        ).stdout
        for _ in range(2)
    )
    assert one == two and len(one) > 10_000
