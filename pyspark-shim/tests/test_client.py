"""The client without Spark: tables, models, bad input, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flightsvc
from flightsvc import TensorSpec


def column(values: np.ndarray) -> pa.Array:
    """A numpy array of any rank as nested lists."""
    return pa.array(values.tolist()) if values.ndim == 1 else pa.array(list(values.tolist()), nested(values))


def nested(values: np.ndarray) -> pa.DataType:
    kind = pa.from_numpy_dtype(values.dtype)
    for _ in values.shape[1:]:
        kind = pa.list_(kind)
    return kind


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_mlp_agrees_with_tensorflow(
    client: flightsvc.Client, models: Path, oracle: Callable[..., dict[str, Any]], rows: int
):
    x = np.random.default_rng(rows).normal(size=(rows, 512)).astype(np.float32)
    got = client.predict(str(models / "mlp"), pa.table({"id": range(rows), "x": column(x)}))
    assert got.column_names == ["id", "x", "y"]
    y = np.array(got["y"].to_pylist(), np.float32)
    expected = oracle("mlp", x=x)["y"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert (y.argmax(1) == expected.argmax(1)).all()


def test_two_inputs_two_outputs(
    client: flightsvc.Client, models: Path, oracle: Callable[..., dict[str, Any]]
):
    random = np.random.default_rng(2)
    a, b = random.normal(size=(9, 8)).astype(np.float32), random.normal(size=(9, 4)).astype(np.float32)
    table = pa.table({"left": column(a), "b": column(b)})
    expected = oracle("two", a=a, b=b)
    got = client.predict(
        models / "two", table, inputs={"a": "left", "b": "b"}, outputs={"sum": "s", "logits": "l"}
    )
    assert got.column_names == ["left", "b", "s", "l"]
    for name, wanted in (("s", "sum"), ("l", "logits")):
        np.testing.assert_allclose(np.array(got[name].to_pylist()), expected[wanted], rtol=1e-5, atol=1e-6)


def test_another_signature(client: flightsvc.Client, models: Path):
    table = pa.table({"a": column(np.ones((2, 8), np.float32)), "b": column(np.ones((2, 4), np.float32))})
    got = client.predict(flightsvc.Model(models / "two", signature="flipped"), table)
    assert got.column_names == ["a", "b", "scores", "total"]


def test_strings(client: flightsvc.Client, models: Path):
    table = pa.table({"s": ["abc", "", "grün", None]})
    got = client.predict(models / "strings", table, outputs={"upper": "u", "length": "n"})
    assert got["u"].to_pylist() == [b"ABC", b"", "GRüN".encode(), None]
    assert got["n"].to_pylist() == [3, 0, 5, None]


def test_chunks_are_kept_and_columns_not_copied(client: flightsvc.Client, models: Path):
    chunks = [[[1, 2, 3]] * 4, [[4, 5, 6]] * 2]
    table = pa.table({"i": pa.chunked_array(chunks, pa.list_(pa.int64()))})
    got = client.predict(models / "ints", table)
    assert [chunk.to_pylist() for chunk in got["total"].chunks] == [[6] * 4, [15] * 2]
    for k in range(2):
        assert (
            got["i"].chunk(k).values.buffers()[1].address == table["i"].chunk(k).values.buffers()[1].address
        )


@pytest.mark.parametrize("data", [pa.table({"i": pa.chunked_array([], pa.list_(pa.int64()))})])
def test_no_rows(client: flightsvc.Client, models: Path, data: pa.Table):
    got = client.predict(models / "ints", data)
    assert got.num_rows == 0
    assert got.schema.names == ["i", "doubled", "total"]
    assert got.schema.field("doubled").type == pa.list_(pa.field("item", pa.int64()))


def test_metadata_is_read_without_loading(client: flightsvc.Client, models: Path):
    about = client.metadata(models / "nested")
    assert list(about["signatures"]) == ["serving_default"]
    assert not [m for m in client.status()["models"] if m["model"].endswith("/nested")]


def test_inputs_and_outputs_of_a_model(models: Path):
    two = flightsvc.Model(models / "two")
    assert two.inputs == {"a": TensorSpec("float32", (-1, 8)), "b": TensorSpec("float32", (-1, 4))}
    assert two.outputs == {"logits": TensorSpec("float32", (-1, 3)), "sum": TensorSpec("float32", (-1, 5))}
    assert str(two.inputs["a"]) == "float32[-1,8]"
    assert flightsvc.Model(models / "strings").inputs == {"s": TensorSpec("string", (-1,))}


def test_references(models: Path, monkeypatch: pytest.MonkeyPatch):
    assert flightsvc.Model("lite0").reference == "lite0"
    assert flightsvc.Model("file:///m/lite0").reference == "file:///m/lite0"
    assert flightsvc.Model(Path("/m/a b")).reference == "file:///m/a%20b"
    monkeypatch.chdir(models)
    assert flightsvc.Model("mlp").reference == (models / "mlp").as_uri()
    assert flightsvc.Model("./none").reference == (models / "none").as_uri()


def test_a_path_with_a_space(client: flightsvc.Client, models: Path, tmp_path: Path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "1").symlink_to(models / "ints")
    table = pa.table({"i": [[1, 2, 3]]})
    assert client.predict(tmp_path / "a b", table)["total"].to_pylist() == [6]


def test_the_sidecar_says_what_is_wrong(client: flightsvc.Client, models: Path, tmp_path: Path):
    table = pa.table({"i": [[1, 2, 3]]})
    with pytest.raises(flightsvc.NotFoundError, match="nothing-here"):
        client.predict("nothing-here", table)
    with pytest.raises(flightsvc.FlightsvcError, match=r"saved_model\.pb"):
        client.predict(tmp_path, table)
    with pytest.raises(flightsvc.NotFoundError, match=r"no signature 'other'; it has serving_default"):
        client.predict(flightsvc.Model(models / "ints", signature="other"), table)
    with pytest.raises(flightsvc.NotFoundError, match=r"no column 'j' for input 'i'; columns: i"):
        client.predict(models / "ints", table, inputs={"i": "j"})
    with pytest.raises(flightsvc.FlightsvcError, match="nope"):
        client.predict(models / "ints", table, outputs={"nope": "n"})
    with pytest.raises(
        flightsvc.InvalidArgumentError, match='column "i" of utf8; it wants elements of int64'
    ):
        client.predict(models / "ints", pa.table({"i": ["text"]}))
    with pytest.raises(flightsvc.InvalidArgumentError, match="on_error is 'ignore'; it is one of"):
        client.predict(models / "ints", table, on_error="ignore")
    with pytest.raises(flightsvc.InvalidArgumentError, match="the name of another column, 'i'"):
        client.predict(models / "ints", table, outputs={"total": "i"})
    assert client.predict(models / "ints", table)["total"].to_pylist() == [6]


def test_a_column_without_a_value_is_null_in_every_batch(client: flightsvc.Client, models: Path):
    table = pa.table({"i": pa.array([[1, 2, 3]] * 40, pa.list_(pa.int64()))})
    batches = pa.Table.from_batches(table.to_batches(1))
    assert client.predict(models / "ints", batches, on_error="column")["error"].to_pylist() == [None] * 40
    nothing = pa.table({"i": pa.array([None] * 40, pa.list_(pa.int64()))})
    batches = pa.Table.from_batches(nothing.to_batches(3))
    answer = client.predict(models / "ints", batches)
    assert answer["doubled"].to_pylist() == answer["total"].to_pylist() == [None] * 40


def test_errors_are_of_their_natural_kind():
    assert issubclass(flightsvc.InvalidArgumentError, ValueError)
    assert issubclass(flightsvc.NotFoundError, KeyError)
    assert issubclass(flightsvc.DeadlineExceededError, TimeoutError)
    assert issubclass(flightsvc.UnavailableError, ConnectionError)
    assert str(flightsvc.NotFoundError("no model 'm'")) == "no model 'm'"


def test_shutdown_and_start_again(surroundings: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLIGHTSVC_RUN_DIR", str(surroundings / "other"))
    with flightsvc.connect() as client:
        first = client.status()["pid"]
        client.shutdown()
    with flightsvc.connect() as client:
        assert client.predict(models / "ints", pa.table({"i": [[1, 2, 3]]}))["total"].to_pylist() == [6]
        assert client.status()["pid"] != first
        client.shutdown()
