"""Runs of TensorFlow that take too long: the stream hears of it, and at last the runner goes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from figures import report

import flightsvc

ANSWERED = 1.0  # seconds after the timeout in which the stream is answered, whatever TensorFlow does
ENDED = 10.0  # seconds after the timeout when the runner ends
SLACK = 3.0  # seconds for a machine with other work


@pytest.fixture(scope="module")
def stubborn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks at nothing while it finds the eigenvalues of a matrix of x rows."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    class Stubborn(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.int32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            size = tf.reduce_max(x)
            matrix = tf.random.stateless_normal((size, size), seed=(1, 2))
            return {"y": tf.cast(x, tf.float32) + 0.0 * tf.reduce_sum(tf.linalg.eigvalsh(matrix))}

    place = tmp_path_factory.mktemp("stubborn")
    module = Stubborn()
    tf.saved_model.save(module, str(place), signatures={"serving_default": module.serve})
    return place


def rows(*x: int) -> pa.Table:
    return pa.table({"x": pa.array(x, pa.int32())})


def runner(client: flightsvc.Client, model: Path) -> dict[str, Any]:
    [status] = [m for m in client.status()["models"] if m["dir"] == str(model)]
    return status


def test_a_run_that_can_be_cancelled_is(client: flightsvc.Client, models: Path):
    model = models / "slow"
    client.predict(model, pa.table({"x": [[1.0]]}))
    pid = runner(client, model)["pid"]
    started = time.monotonic()
    with pytest.raises(
        flightsvc.DeadlineExceededError, match=r"model .*slow.*record batch 0.*run_timeout_ms"
    ):
        client.predict(model, pa.table({"x": [[1e12]]}), run_timeout=0.2)
    assert time.monotonic() - started < 0.2 + ANSWERED + SLACK
    assert client.predict(model, pa.table({"x": [[2.0]]})).column("y").to_pylist() == [[2.0]]
    assert runner(client, model)["pid"] == pid  # nothing had to end


@pytest.mark.slow
def test_a_runner_that_does_not_listen_ends(client: flightsvc.Client, stubborn: Path):
    client.predict(stubborn, rows(2))
    pid = runner(client, stubborn)["pid"]
    started = time.monotonic()
    heard: list[float] = []

    def ask() -> None:
        with pytest.raises(flightsvc.DeadlineExceededError, match=r"record batch 0.*run_timeout_ms \(200\)"):
            client.predict(stubborn, rows(9_000), run_timeout=0.2)
        heard.append(time.monotonic() - started)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(30)
    assert heard and heard[0] < 0.2 + ANSWERED + SLACK  # not the 10 s, and not sent again
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() - started < 0.2 + ENDED + SLACK
        time.sleep(0.05)
    took = time.monotonic() - started
    assert took > ENDED
    report(stuck_run_answered_seconds=round(heard[0], 2), stuck_runner_ended_seconds=round(took, 2))
    assert client.predict(stubborn, rows(2)).column("y").to_pylist() == [2.0]  # another one
    assert runner(client, stubborn)["pid"] != pid


def test_the_callers_deadline_bounds_the_stream(endpoint: str, models: Path):
    import json

    import pyarrow.flight as flight

    command = json.dumps({"v": 1, "model": f"file://{models}/slow"})
    with flight.connect(endpoint) as front:
        writer, reader = front.do_exchange(
            flight.FlightDescriptor.for_command(command), flight.FlightCallOptions(timeout=1.5)
        )
        batch = pa.RecordBatch.from_pydict({"x": pa.array([[1e12]], pa.list_(pa.float32()))})
        writer.begin(batch.schema)
        writer.write_batch(batch)
        with pytest.raises(flight.FlightTimedOutError):
            reader.read_chunk()
        with pytest.raises(flight.FlightTimedOutError):
            writer.close()
