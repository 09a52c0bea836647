"""Models of many kinds equal TensorFlow in Python: over record batches, streams at once, and through Spark.

And a model that refuses rows: each such row fails alone, and never anybody else's.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from figures import count, report

import flightsvc
from flightsvc import InvalidArgumentError

ROWS = count(300, 5_000)
STREAMS = 4
WAITING = {"batch_timeout_micros": 10_000}  # so that streams meet
RUNS = 64  # at most so many when TensorFlow refuses rows
WORDS = ["apple", "pear", "fig", "quince", "Früchte", "plum", "", "APPLE", "pear ", "\0", "水", "fig\n"]


def random_inputs(name: str, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return tensors for a model."""
    rng = np.random.default_rng([11, seed])
    words = np.array([word.encode() for word in WORDS], object)
    made: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "vocabulary": lambda: {"word": rng.choice(words, n)},
        "ints": lambda: {"i": rng.integers(-(2**62), 2**62, (n, 3))},
        "mixed": lambda: {
            "a": rng.uniform(0, 2, (n, 4)).astype(np.float32),
            "b": rng.integers(-(2**31), 2**31, n, dtype=np.int32),
            "c": rng.integers(0, 2, (n, 2)).astype(bool),
            "d": rng.choice(words, n),
            "e": rng.uniform(0, 2, (n, 2, 2)),
        },
        "loop": lambda: {"n": rng.integers(1, 10**6, n)},
    }
    return made[name]()


def table(tensors: dict[str, np.ndarray], rows: int) -> pa.Table:
    """Return tensors as columns, in record batches of so many rows."""
    columns = {}
    for name, tensor in tensors.items():
        kind = pa.binary() if tensor.dtype == object else pa.from_numpy_dtype(tensor.dtype)
        for _ in tensor.shape[1:]:
            kind = pa.list_(kind)
        columns[name] = pa.array(tensor.tolist(), kind)
    return pa.Table.from_batches(pa.table(columns).to_batches(rows))


def check(got: dict[str, list[Any]], want: dict[str, np.ndarray]) -> None:
    """Compare outputs by name: floats to the last digits, all else exactly."""
    for name, tensor in want.items():
        if tensor.dtype.kind == "f":
            np.testing.assert_allclose(np.array(got[name]), tensor, 1e-5, 1e-6, err_msg=name)
        else:
            assert got[name] == tensor.tolist(), name


def outputs(answer: pa.Table, want: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: answer[name].to_pylist() for name in want}


MODELS = ["vocabulary", "mixed", "ints", "loop"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 7, 64, 5_000])
def test_a_model_over_record_batches(
    client: flightsvc.Client, models: Path, oracle: Callable[..., dict[str, Any]], name: str, rows: int
):
    tensors = random_inputs(name, min(ROWS, 50 * rows))
    want = oracle(name, **tensors)
    assert len(want) == {"mixed": 4, "vocabulary": 3}.get(name, 2)
    check(outputs(client.predict(models / name, table(tensors, rows)), want), want)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_streams_at_once(
    client: flightsvc.Client, models: Path, oracle: Callable[..., dict[str, Any]], name: str
):
    sent = [random_inputs(name, ROWS, seed) for seed in range(STREAMS)]
    want = [oracle(name, **tensors) for tensors in sent]
    with ThreadPoolExecutor(STREAMS) as pool:
        got = list(
            pool.map(lambda i: client.predict(models / name, table(sent[i], 3 + 4 * i)), range(STREAMS))
        )
    for one, other in zip(got, want, strict=True):
        check(outputs(one, other), other)


@pytest.mark.parametrize("name", MODELS[: count(2, 4)])
def test_a_model_through_spark(spark: Any, models: Path, oracle: Callable[..., dict[str, Any]], name: str):
    tensors = random_inputs(name, 250)
    want = oracle(name, **tensors)
    sent = table(tensors, 1_000)
    frame = spark.createDataFrame(sent.append_column("row", pa.array(range(250)))).repartition(3)
    rows = sorted(flightsvc.Model(models / name).transform(frame).collect(), key=lambda row: row["row"])
    got = {key: [as_python(row[key]) for row in rows] for key in want}
    check(got, want)


def as_python(value: Any) -> Any:
    """Return what Spark gave back with its bytearrays as bytes."""
    if isinstance(value, list):
        return [as_python(v) for v in value]
    return bytes(value) if isinstance(value, bytearray) else value


def test_the_vocabulary_is_read_from_the_asset(client: flightsvc.Client, models: Path):
    [asset] = (models / "vocabulary").glob("assets/*")
    words = asset.read_text().splitlines()
    answer = client.predict(models / "vocabulary", pa.table({"word": [*words, "plum"]}))
    assert answer["id"].to_pylist()[:-1] == list(range(len(words)))
    assert answer["id"].to_pylist()[-1] in (len(words), len(words) + 1)
    assert answer["position"].to_pylist() == [*range(len(words)), -1]
    assert answer["written"].to_pylist() == [*(word.encode() for word in words), b"?"]


# A model that refuses rows.


def strict(n: int, bad_x: set[int] = frozenset(), bad_text: set[int] = frozenset()) -> pa.Table:
    """Return rows for the model ``strict``; it refuses those named."""
    x = [-1.0 if i in bad_x else float(i % 100) for i in range(n)]
    text = ["none" if i in bad_text else str(i) for i in range(n)]
    return pa.table({"x": pa.array(x, pa.float32()), "text": text})


def check_strict(answer: pa.Table, refused: set[int]) -> None:
    n = answer.num_rows
    number = [None if i in refused else float(i) for i in range(n)]
    assert answer["number"].to_pylist() == number
    roots = answer["root"].to_pylist()
    assert [root is None for root in roots] == [i in refused for i in range(n)]
    kept = [i for i in range(n) if i not in refused]
    np.testing.assert_allclose([roots[i] for i in kept], [(i % 100) ** 0.5 for i in kept], 1e-5)


def about(client: flightsvc.Client, folder: Path) -> dict[str, Any]:
    """Return what status says of a model that no stream uses any more."""
    end = time.monotonic() + 5
    while True:
        [one] = [m for m in client.status()["models"] if m["dir"] == str(folder)]
        if one["streams"] == 0:
            return one
        assert time.monotonic() < end, "a stream is still open"
        time.sleep(0.02)


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1_000])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_bad_row_fails_alone(client: flightsvc.Client, models: Path, n: int, where: float):
    row = int(where * (n - 1))
    for data, words in (
        (strict(n, bad_x={row}), "x must not be negative"),
        (strict(n, bad_text={row}), "StringToNumberOp"),
    ):
        check_strict(client.predict(models / "strict", data, on_error="null"), {row})
        answer = client.predict(models / "strict", data, on_error="column", error_column="why")
        check_strict(answer, {row})
        texts = answer["why"].to_pylist()
        assert [i for i, text in enumerate(texts) if text is not None] == [row]
        assert words in texts[row]


def test_bad_rows_of_every_kind_at_once(client: flightsvc.Client, models: Path):
    data = strict(200, bad_x={3, 150}, bad_text={0, 77, 199})
    x = data["x"].to_pylist()
    x[50] = None
    data = data.set_column(0, "x", pa.array(x, pa.float32()))
    answer = client.predict(models / "strict", data, on_error="column")
    check_strict(answer, {0, 3, 50, 77, 150, 199})
    texts = answer["error"].to_pylist()
    assert {i for i, text in enumerate(texts) if text} == {0, 3, 77, 150, 199}
    assert answer.num_rows == len(texts)


def test_fail_names_the_first_bad_row(client: flightsvc.Client, models: Path):
    first, second = strict(40), strict(100, bad_x={90, 17}, bad_text={40})
    data = pa.Table.from_batches([*first.to_batches(), *second.to_batches()])
    wanted = r"/strict, signature serving_default: row 17 of record batch 1: .*x must not be negative"
    with pytest.raises(InvalidArgumentError, match=wanted):
        client.predict(models / "strict", data)


def test_many_bad_rows_end_in_bounded_time(client: flightsvc.Client, models: Path):
    """After so many runs the rows that are left are refused as a group, good ones among them."""
    bad = set(range(0, 600, 2))
    client.predict(models / "strict", strict(1))
    before = about(client, models / "strict")["runs"]
    answer = client.predict(models / "strict", strict(600, bad_x=bad), on_error="column")
    runs = about(client, models / "strict")["runs"] - before
    texts = answer["error"].to_pylist()
    refused = {i for i, text in enumerate(texts) if text is not None}
    report(runs_for_300_bad_rows_of_600=runs, refused_of_them=len(refused))
    first = len(texts) // 4  # at most: the record batch is cut for all threads
    assert 1 < runs <= first + RUNS
    assert bad <= refused
    assert all("x must not be negative" in texts[i] for i in refused)
    check_strict(answer, refused)

    with pytest.raises(
        InvalidArgumentError, match=r"row \d+ of record batch 0: .*x must not be negative"
    ) as told:
        client.predict(models / "strict", strict(600, bad_x=bad))
    assert int(re.search(r"row (\d+) of", str(told.value))[1]) == 0


def batches(data: pa.Table, rows: int) -> pa.Table:
    return pa.Table.from_batches(data.to_batches(rows))


def test_bad_rows_of_one_stream_leave_others_alone(client: flightsvc.Client, models: Path):
    """Streams that TensorFlow runs together, one of which it refuses."""
    client.predict(models / "strict", strict(1))
    joined = about(client, models / "strict")["joined_runs"]
    start = threading.Barrier(3)

    def run(data: pa.Table) -> pa.Table:
        start.wait()
        return client.predict(models / "strict", data, on_error="column", batching=WAITING)

    good, bad = batches(strict(200), 5), batches(strict(200, bad_x={7, 100}, bad_text={199}), 5)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(count(3, 30)):
            one, other, wrong = (pool.submit(run, data) for data in (good, good, bad))
            check_strict(one.result(), set())
            check_strict(other.result(), set())
            check_strict(wrong.result(), {7, 100, 199})
            texts = wrong.result()["error"].to_pylist()
            assert {i for i, text in enumerate(texts) if text is not None} == {7, 100, 199}
    shared = about(client, models / "strict")["joined_runs"] - joined
    report(joined_runs_with_refused_rows=shared)
    assert shared > 0


def test_a_stream_that_fails_leaves_others_alone(client: flightsvc.Client, models: Path):
    start = threading.Barrier(2)

    def run(data: pa.Table) -> pa.Table:
        start.wait()
        return client.predict(models / "strict", batches(data, 5), batching=WAITING)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(count(3, 30)):
            good, bad = pool.submit(run, strict(200)), pool.submit(run, strict(200, bad_text={101}))
            check_strict(good.result(), set())
            with pytest.raises(InvalidArgumentError, match="row 1 of record batch 20: "):
                bad.result()


def test_a_model_that_prints(client: flightsvc.Client, tmp_path: Path):
    """Standard output of a runner is its wire to the front; what a model prints must not get there."""
    import sys

    import tensorflow as tf

    class Printer(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            tf.print('{"opened":"forged"}', output_stream=sys.stdout, end="")
            return {"y": x + 1.0}

    module = Printer()
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
    for _ in range(3):
        assert client.predict(tmp_path, pa.table({"x": [1.0]})).column("y").to_pylist() == [2.0]
    deadline = time.monotonic() + 10
    while True:
        [about] = [m for m in client.status()["models"] if m["dir"] == str(tmp_path)]
        if about["streams"] == 0 and about["runs"] == 3:
            break
        assert time.monotonic() < deadline, about
        time.sleep(0.02)
    client.unload(tmp_path)
