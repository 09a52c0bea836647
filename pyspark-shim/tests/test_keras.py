"""Models of Keras: exported on the driver, and equal to what Keras predicts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flightsvc


@pytest.fixture(scope="module", autouse=True)
def keras(oracle: Callable[..., Any]) -> Iterator[Any]:
    import keras

    keras.utils.set_random_seed(5)
    yield keras
    keras.backend.clear_session()


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def column(values: np.ndarray) -> pa.Array:
    kind = pa.string() if values.dtype.kind == "U" else pa.from_numpy_dtype(values.dtype)
    for _ in values.shape[1:]:
        kind = pa.list_(kind)
    return pa.array(values.tolist(), kind)


def check(
    client: flightsvc.Client,
    model: flightsvc.Model,
    data: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
) -> None:
    """Demand that the columns ``data`` of all inputs give the outputs ``expected``."""
    assert sorted(model.inputs) == sorted(data)
    assert sorted(model.outputs) == sorted(expected)
    got = client.predict(model, pa.table({name: column(values) for name, values in data.items()}))
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(got[name].to_pylist()), values, rtol=1e-5, atol=1e-6)


def sequential(keras: Any) -> Any:
    layers = [keras.layers.Dense(5, "relu"), keras.layers.Dropout(0.5), keras.layers.Dense(2, name="scores")]
    return keras.Sequential([keras.Input((4,), name="x"), *layers])


def functional(keras: Any) -> Any:
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    both = keras.layers.Concatenate()([b, a])
    left, right = keras.layers.Dense(2, name="left")(both), keras.layers.Dense(1, name="right")(a)
    return keras.Model([a, b], [left, right])


def convolutional(keras: Any) -> Any:
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3)(image)
    x = keras.layers.Dropout(0.3)(keras.layers.ReLU()(keras.layers.BatchNormalization()(x)))
    model = keras.Model(image, keras.layers.Dense(3, name="y")(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile("sgd", "mse")
    model.fit(floats(32, 8, 8, 3), floats(32, 3), verbose=0)  # moves the averages of the normalisation
    return model


def recurrent(keras: Any) -> Any:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(20, 4, mask_zero=True)(tokens)
    x = keras.layers.Concatenate()([keras.layers.LSTM(3)(x), keras.layers.GRU(3)(x)])
    return keras.Model(tokens, keras.layers.Dense(2, name="y")(x))


def normalised(keras: Any) -> Any:
    normal = keras.layers.Normalization()
    normal.adapt(3 * floats(50, 4) + 1)
    return keras.Sequential([keras.Input((4,), name="x"), normal, keras.layers.Dense(2, name="y")])


def pixels(keras: Any) -> Any:
    image = keras.Input((4, 4, 1), dtype="uint8", name="image")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
    return keras.Model(
        image, {"whole": keras.layers.Dense(2)(x), "half": keras.layers.Dense(2, dtype="float16")(x)}
    )


def words(keras: Any) -> Any:
    word = keras.Input((), dtype="string", name="word")
    number = keras.layers.StringLookup(vocabulary=["red", "green"])(word)
    return keras.Model(word, keras.layers.Embedding(4, 3, name="y")(number))


TOKENS = np.array([[1, 2, 3, 0], [19, 5, 0, 0], [7, 7, 7, 7]], np.int32)
PIXELS = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1) * 5


@pytest.mark.parametrize(
    ("make", "data", "outputs"),
    [
        (sequential, {"x": floats(7, 4)}, ["scores"]),
        (functional, {"a": floats(5, 3), "b": floats(5, 2)}, ["left", "right"]),
        (convolutional, {"image": floats(3, 8, 8, 3)}, ["y"]),
        pytest.param(recurrent, {"tokens": TOKENS}, ["y"], marks=pytest.mark.slow),
        (normalised, {"x": floats(7, 4)}, ["y"]),
        (pixels, {"image": PIXELS}, ["half", "whole"]),
        (words, {"word": np.array(["green", "blue", "red"])}, ["y"]),
    ],
)
def test_agrees_with_keras(
    client: flightsvc.Client,
    keras: Any,
    tmp_path: Path,
    make: Callable[[Any], Any],
    data: dict[str, np.ndarray],
    outputs: list[str],
):
    import tensorflow as tf

    model = make(keras)
    tensors = [tf.constant(values) for values in data.values()]
    answer = model.predict(tensors if len(tensors) > 1 else tensors[0], verbose=0)
    by_name = (
        answer if isinstance(answer, dict) else dict(zip(outputs, keras.tree.flatten(answer), strict=True))
    )
    check(client, flightsvc.Model(model), data, by_name)
    model.save(tmp_path / "m.keras")
    check(client, flightsvc.Model(tmp_path / "m.keras"), data, by_name)


def test_models_of_a_class(client: flightsvc.Client, keras: Any):
    class One(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.normal = keras.layers.Dense(3), keras.layers.BatchNormalization()

        def call(self, rows: Any, training: bool = False) -> Any:
            return self.normal(self.dense(rows), training=training)

    class Named(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, both: Any) -> Any:
            return {"sum": self.dense(both["p"]) + both["q"], "twice": 2 * both["p"]}

    class Listed(keras.Model):
        def call(self, pair: Any) -> Any:
            return [pair[0] + pair[1], pair[0] - pair[1]]

    one, named, listed = One(), Named(), Listed()
    x, p, q = floats(4, 5), floats(4, 2), floats(4, 3)
    check(client, flightsvc.Model(one_of(one, x)), {"rows": x}, {"output_0": one.predict(x, verbose=0)})
    both = {"p": p, "q": q}
    check(client, flightsvc.Model(one_of(named, both)), both, named.predict(both, verbose=0))
    sums = {"output_0": p + p, "output_1": p - p}
    check(client, flightsvc.Model(one_of(listed, [p, p])), {"pair_0": p, "pair_1": p}, sums)


def test_names_that_tensorflow_does_not_take(client: flightsvc.Client, keras: Any):
    names = ["A", "a", "_in", "self", "class", "1st", "a.b"]
    inputs = [keras.Input((2,), name=name) for name in names]
    model = keras.Model(inputs, keras.layers.Concatenate(name="_y")(inputs))
    arrays = [floats(3, 2) + i for i in range(len(names))]
    labels = ["A", "a_1", "arg_in", "arg_self", "arg_class", "arg_1st", "a_b"]
    data = dict(zip(labels, arrays, strict=True))
    check(client, flightsvc.Model(model), data, {"_y": np.concatenate(arrays, 1)})


def test_nested_inputs(client: flightsvc.Client, keras: Any):
    a, b, c = (keras.Input((2,), name=name) for name in "abc")
    model = keras.Model({"p": [a, b], "q": {"r": c}}, keras.layers.Concatenate(name="y")([a, b, c]))
    x, y, z = floats(3, 2), floats(3, 2) + 1, floats(3, 2) + 2
    check(client, flightsvc.Model(model), {"p_0": x, "p_1": y, "q_r": z}, {"y": np.concatenate([x, y, z], 1)})


def one_of(model: Any, rows: Any) -> Any:
    """Return the model, built by a call."""
    model(rows)
    return model


def test_one_layer_with_two_outputs(client: flightsvc.Client, keras: Any):
    steps = keras.Input((3, 2), name="steps")
    model = keras.Model(steps, keras.layers.GRU(2, return_state=True, name="gru")(steps))
    x = floats(4, 3, 2)
    last, state = model.predict(x, verbose=0)
    check(client, flightsvc.Model(model), {"steps": x}, {"gru": last, "gru_1": state})


@pytest.mark.prove  # make test has layers of its kinds
def test_an_application_of_keras(client: flightsvc.Client, keras: Any):
    network = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    model = flightsvc.Model(network)
    assert str(next(iter(model.inputs.values()))) == "float32[-1,32,32,3]"
    x = floats(2, 32, 32, 3)
    check(client, model, {next(iter(model.inputs)): x}, {"predictions": network.predict(x, verbose=0)})


def test_in_spark(spark: Any, keras: Any, tmp_path: Path):
    network = sequential(keras)
    network.save(tmp_path / "m.keras")
    network.save(tmp_path / "m.h5")
    x = floats(20, 4)
    expected = network.predict(x, verbose=0)
    frame = spark.createDataFrame([(row.tolist(),) for row in x], "x array<float>").coalesce(1)
    for model in (network, tmp_path / "m.keras", str(tmp_path / "m.h5")):
        rows = flightsvc.Model(model).transform(frame).collect()
        np.testing.assert_allclose([row.scores for row in rows], expected, rtol=1e-5, atol=1e-6)


def test_exported_once_and_anew_when_the_file_changes(client: flightsvc.Client, keras: Any, tmp_path: Path):
    x = floats(3, 4)
    first, second = sequential(keras), sequential(keras)
    file = tmp_path / "m.keras"
    first.save(file)
    model, again = flightsvc.Model(file), flightsvc.Model(file)
    assert model.folder == model.folder == again.folder
    check(client, model, {"x": x}, {"scores": first.predict(x, verbose=0)})
    second.save(file)
    check(client, model, {"x": x}, {"scores": second.predict(x, verbose=0)})
    held = flightsvc.Model(first)
    assert held.folder == held.folder
    assert held.reference.startswith("file:///")
    assert repr(held).startswith(f"Model(\"'{first.name}' of Keras\"")


def test_what_cannot_be_exported(keras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(flightsvc.NotFoundError, match=r"none\.keras: No such file"):
        _ = flightsvc.Model("none.keras").inputs
    (tmp_path / "bad.keras").write_bytes(b"no model")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"bad\.keras: Keras cannot read it: "):
        _ = flightsvc.Model(tmp_path / "bad.keras").inputs
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"it is not built, .* call it once on some"):
        _ = flightsvc.Model(keras.Sequential([keras.layers.Dense(2)])).inputs
    sparse = keras.Input((4,), sparse=True, name="few")
    with pytest.raises(flightsvc.InvalidArgumentError, match="input 'few' is sparse or ragged"):
        _ = flightsvc.Model(keras.Model(sparse, keras.layers.Dense(2)(sparse))).inputs

    class Mine(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            if x.shape[0] is None:
                raise ValueError("only for 4 rows")
            return x

    x = keras.Input(batch_shape=(4, 2))
    mine = keras.Model(x, Mine()(x))
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"it cannot be exported: .*only for 4"):
        _ = flightsvc.Model(mine).inputs
    mine.save(tmp_path / "mine.keras")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"'Mine'.*register_keras_serializable"):
        _ = flightsvc.Model(tmp_path / "mine.keras").inputs
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"runs on jax here.*KERAS_BACKEND=tensorflow"):
        _ = flightsvc.Model(sequential(keras)).inputs
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(flightsvc.InvalidArgumentError, match="needs Keras and TensorFlow on the driver"):
        _ = flightsvc.Model(tmp_path / "bad.keras").inputs
