"""Which models are frozen, and that a frozen one means the same: real SavedModels, TensorFlow's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flightsvc
from flightsvc.export.freeze import NOT_FROZEN, NotFrozen, freeze, main

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")
import numpy as np  # noqa: E402


def answers(folder: Path, signature: str = "serving_default", **inputs: Any) -> dict[str, Any]:
    """Run a SavedModel in a session, as the sidecar does."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
        of = meta.signature_def[signature]
        fetches = {name: info.name for name, info in of.outputs.items()}
        result: dict[str, Any] = session.run(fetches, {of.inputs[k].name: v for k, v in inputs.items()})
        return result


def signatures(folder: Path) -> dict[str, Any]:
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    [meta] = saved.meta_graphs
    ops = [node.op for node in meta.graph_def.node]
    ops += [node.op for function in meta.graph_def.library.function for node in function.node_def]
    assert not [op for op in ops if "Var" in op and op != "VariableShape"]
    return dict(meta.signature_def)


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert value.dtype == right[name].dtype


def save(folder: Path, module: Any, **functions: Any) -> Path:
    tf.saved_model.save(module, str(folder), signatures=functions or {"serving_default": module.serve})
    return folder


def test_small_models(models: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for model, inputs in {
        "mlp": {"x": rng.normal(size=(7, 512)).astype("f4")},
        "two": {"a": rng.normal(size=(3, 8)).astype("f4"), "b": rng.normal(size=(3, 4)).astype("f4")},
    }.items():
        about = freeze(models / model, tmp_path / model)
        assert about["variables"] == 3 and about["bytes"] > 0
        of = signatures(tmp_path / model)
        assert sorted(of) == about["signatures"]
        loaded = tf.saved_model.load(str(models / model))
        for name, signature in of.items():
            theirs = loaded.signatures[name](**{k: tf.constant(v) for k, v in inputs.items()})
            same(answers(tmp_path / model, name, **inputs), {k: v.numpy() for k, v in theirs.items()})
            assert signature.inputs.keys() == inputs.keys()


def test_signatures_are_untouched(models: Path, tmp_path: Path) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    freeze(models / "two", tmp_path / "both")
    freeze(models / "two", tmp_path / "one", ["flipped"])
    [meta] = saved_model_pb2.SavedModel.FromString(
        (models / "two" / "saved_model.pb").read_bytes()
    ).meta_graphs
    for name, signature in signatures(tmp_path / "both").items():
        assert signature == meta.signature_def[name]
    assert list(signatures(tmp_path / "one")) == ["flipped"]


def test_keras(tmp_path: Path) -> None:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.5),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, activation="softmax", name="classes"),
        ]
    )
    keras.Model(model.inputs, {"classes": model.outputs[0]}).export(tmp_path / "in", verbose=False)
    x = np.random.default_rng(2).normal(size=(5, 8, 8, 3)).astype("f4")
    freeze(tmp_path / "in", tmp_path / "out")
    same(answers(tmp_path / "out", image=x), {"classes": model.predict(x, verbose=0)})


class Branches(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(np.eye(3, dtype="f4") * 0.5)
        self.table = tf.Variable(np.arange(12, dtype="f4").reshape(4, 3))

    @tf.function(
        input_signature=[tf.TensorSpec([None, 3], name="x"), tf.TensorSpec([None], tf.int64, name="i")]
    )
    def serve(self, x: Any, i: Any) -> dict[str, Any]:
        for _ in tf.range(tf.reduce_max(i)):
            x = x @ self.w + 1.0
        x = tf.cond(tf.reduce_sum(x) > 0, lambda: x @ self.w, lambda: x - tf.reduce_sum(self.w))
        return {"y": x + tf.gather(self.table, i)}


def test_control_flow_and_gather(tmp_path: Path) -> None:
    module = Branches()
    save(tmp_path / "in", module)
    about = freeze(tmp_path / "in", tmp_path / "out")
    assert about["variables"] == 2
    signatures(tmp_path / "out")
    for sign in (1, -9):
        x, i = np.full((2, 3), sign, "f4"), np.array([2, 3])
        theirs = {k: v.numpy() for k, v in module.serve(x=tf.constant(x), i=tf.constant(i)).items()}
        same(answers(tmp_path / "out", x=x, i=i), theirs)


class GatherInBranch(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = tf.Variable(np.arange(12, dtype="f4").reshape(4, 3))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="i")])
    def serve(self, i: Any) -> dict[str, Any]:
        return {"y": tf.cond(tf.size(i) > 3, lambda: tf.gather(self.table, i), lambda: self.table[:1] * 2.0)}


def test_gather_in_a_branch(tmp_path: Path) -> None:
    module = GatherInBranch()
    save(tmp_path / "in", module)
    freeze(tmp_path / "in", tmp_path / "out")
    for i in (np.array([1, 2]), np.array([3, 0, 1, 2])):
        same(answers(tmp_path / "out", i=i), {"y": module.serve(tf.constant(i))["y"].numpy()})


@pytest.mark.slow
def test_two_processes_write_the_same(models: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "flightsvc", "freeze", str(models / "two"), str(tmp_path / name)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for process in started:
        told = json.loads(process.communicate()[0].splitlines()[-1])
        assert process.returncode == 0 and told["frozen"]
        assert told["signatures"] == ["flipped", "serving_default"]
    a, b = ((tmp_path / name / "saved_model.pb").read_bytes() for name in "ab")
    assert a == b


def test_extra_assets_go_along(models: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(models / "mlp", tmp_path / "in")
    (tmp_path / "in" / "assets.extra").mkdir()
    (tmp_path / "in" / "assets.extra" / "note").write_text("x")
    freeze(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "assets.extra" / "note").read_text() == "x"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["assets.extra", "saved_model.pb"]


class Table(tf.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.w = tf.Variable(2.0)
        if kind == "mutable":
            self.table: Any = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
        else:
            pairs = tf.lookup.KeyValueTensorInitializer(
                tf.constant([1, 2], tf.int64), tf.constant([0.5, 1.5])
            )
            self.table = tf.lookup.StaticHashTable(pairs, -1.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="k")])
    def serve(self, k: Any) -> dict[str, Any]:
        return {"v": self.table.lookup(k) * self.w}


@pytest.mark.parametrize("kind", ["static", "mutable"])
def test_tables_are_refused(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "in", Table(kind))
    with pytest.raises(NotFrozen, match="table"):
        freeze(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vocabulary_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFrozen, match="table"):
        freeze(models / "vocabulary", tmp_path / "out")


def test_counter_is_refused(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFrozen, match=r"assigns a variable \(AssignAddVariableOp\)"):
        freeze(models / "counter", tmp_path / "out", ["serving_default"])
    with pytest.raises(NotFrozen, match="'serving_default' may assign its variable"):
        freeze(models / "counter", tmp_path / "out", ["pure"])
    assert main([str(models / "counter"), str(tmp_path / "out")]) == NOT_FROZEN
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["frozen"] is False and "assign" in told["reason"]


class Apart(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.count = tf.Variable(3.0), tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
    def serve(self, x: Any) -> dict[str, Any]:
        return {"y": x * self.w}

    @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
    def tick(self, x: Any) -> dict[str, Any]:
        return {"n": self.count.assign_add(tf.reduce_sum(x))}


def test_another_signature_with_variables_of_its_own_does_not_matter(tmp_path: Path) -> None:
    module = Apart()
    save(tmp_path / "in", module, serving_default=module.serve, tick=module.tick)
    assert freeze(tmp_path / "in", tmp_path / "out")["signatures"] == ["serving_default"]
    same(answers(tmp_path / "out", x=np.array([1, 2], "f4")), {"y": np.array([3, 6], "f4")})


class Ragged(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(2.0)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], name="values"),
            tf.TensorSpec([None], tf.int64, name="lengths"),
        ]
    )
    def serve(self, values: Any, lengths: Any) -> dict[str, Any]:
        ragged = tf.RaggedTensor.from_row_lengths(values, lengths)
        return {"total": tf.reduce_sum(ragged * self.w, axis=1)}


def test_ragged_inside(tmp_path: Path) -> None:
    save(tmp_path / "in", Ragged())
    freeze(tmp_path / "in", tmp_path / "out")
    values, lengths = np.arange(6, dtype="f4"), np.array([1, 0, 5])
    same(answers(tmp_path / "out", values=values, lengths=lengths), {"total": np.array([0, 0, 30], "f4")})


class RaggedInput(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(2.0)

    @tf.function(input_signature=[tf.RaggedTensorSpec([None, None], tf.float32)])
    def serve(self, x: Any) -> dict[str, Any]:
        return {"total": tf.reduce_sum(x * self.w, axis=1)}


def test_ragged_input(tmp_path: Path) -> None:
    save(tmp_path / "in", RaggedInput())
    freeze(tmp_path / "in", tmp_path / "out")
    splits = np.array([0, 2, 2, 3])  # TensorFlow exports a ragged input as its values and its row splits
    values = np.array([1, 2, 4], "f4")
    same(answers(tmp_path / "out", x=values, x_1=splits), {"total": np.array([6, 0, 8], "f4")})


def test_tf1_style(tmp_path: Path) -> None:
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, [None, 2], name="x")
        resource = tf1.get_variable("r", initializer=np.ones((2, 2), "f4") * 3, use_resource=True)
        reference = tf1.get_variable("v", initializer=np.ones(2, "f4"), use_resource=False)
        y = tf.identity(x @ resource + reference, name="y")
        session.run(tf1.global_variables_initializer())
        tf1.saved_model.simple_save(session, str(tmp_path / "in"), {"x": x}, {"y": y})
    x = np.array([[1, 2]], "f4")
    assert freeze(tmp_path / "in", tmp_path / "out")["variables"] == 2
    same(answers(tmp_path / "out", x=x), {"y": np.array([[10, 10]], "f4")})


def test_size_limit(models: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFrozen, match=r"its variables have 133,888 bytes; a frozen graph may have 133,887"):
        freeze(models / "mlp", tmp_path / "out", limit=133_887)
    with pytest.raises(NotFrozen, match="the frozen graph would have"):
        freeze(models / "mlp", tmp_path / "out", limit=133_888)
    assert not (tmp_path / "out").exists()


def test_without_variables(models: Path, tmp_path: Path) -> None:
    about = freeze(models / "ints", tmp_path / "out")
    assert (about["variables"], about["not_folded"]) == (0, "")
    i = np.array([[1, 2, 3], [-4, 1 << 40, 6]], "i8")
    same(answers(tmp_path / "out", i=i), answers(models / "ints", i=i))
    with pytest.raises(NotFrozen, match="frozen and folded already"):
        freeze(tmp_path / "out", tmp_path / "again")


def test_mistakes_are_sentences(models: Path, tmp_path: Path) -> None:
    with pytest.raises(flightsvc.NotFoundError, match="not a SavedModel"):
        freeze(tmp_path, tmp_path / "out")
    with pytest.raises(flightsvc.NotFoundError, match="no signature 'x'; it has flipped, serving_default"):
        freeze(models / "two", tmp_path / "out", ["x"])
    with pytest.raises(flightsvc.InvalidArgumentError, match="exists already"):
        freeze(models / "two", tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff\xff")
    with pytest.raises(flightsvc.InvalidArgumentError, match="cannot be read"):
        freeze(tmp_path, tmp_path / "out")
