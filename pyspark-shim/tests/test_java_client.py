"""The Java example: the protocol as another language sees it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from conftest import ROOT
from figures import count

import flightsvc

pytestmark = pytest.mark.java

SIZES = (3, 1, 5)
NULL = 2  # this row of the last record batch has no a
SCHEMA = pa.schema({"a": pa.list_(pa.float32()), "b": pa.list_(pa.float32())})


@pytest.fixture(scope="module")
def jar() -> Path:
    jar = ROOT / "build" / "java-client" / "flightsvc-java-client.jar"
    assert jar.exists(), f"{jar} is not there; run: make java-client"
    return jar


@pytest.fixture
def two(models: Path, tmp_path: Path) -> str:
    """A copy of a model, and so a runner, of the test's own."""
    return shutil.copytree(models / "two", tmp_path / "two").as_uri()


def run(jar: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["java", "-jar", jar, *args], capture_output=True, text=True, timeout=120, check=False
    )


def questions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes SIZES record batches and returns all their values; row NULL of the last has no a there."""
    random = np.random.default_rng(7)
    a = random.normal(size=(sum(SIZES), 8)).astype(np.float32)
    b = random.normal(size=(sum(SIZES), 4)).astype(np.float32)
    start = 0
    with pa.ipc.new_stream(path, SCHEMA) as writer:
        for size in SIZES:
            left: list[Any] = a[start : start + size].tolist()
            if size == SIZES[-1]:
                left[NULL] = None
            right = b[start : start + size].tolist()
            writer.write_batch(pa.record_batch([left, right], schema=SCHEMA))
            start += size
    return a, b


def agrees(answers: Path, expected: dict[str, np.ndarray]) -> None:
    """The answers are those of TensorFlow, record batch by record batch, and null in the null row."""
    with pa.ipc.open_stream(answers) as reader:
        assert reader.schema.names == ["logits", "s"]
        batches = list(reader)
    assert [batch.num_rows for batch in batches] == list(SIZES)
    table = pa.Table.from_batches(batches)
    null = sum(SIZES[:-1]) + NULL
    for column, output in (("logits", "logits"), ("s", "sum")):
        got = table[column].to_pylist()
        assert [row is None for row in got] == [i == null for i in range(sum(SIZES))]
        keep = [i for i in range(sum(SIZES)) if i != null]
        np.testing.assert_allclose(
            np.array([got[i] for i in keep]), expected[output][keep], rtol=1e-5, atol=1e-6
        )


def test_java_client(
    jar: Path,
    client: flightsvc.Client,
    two: str,
    oracle: Callable[..., dict[str, Any]],
    tmp_path: Path,
):
    a, b = questions(tmp_path / "questions.arrows")
    expected = oracle("two", a=a, b=b)
    front = client._connection._find()
    descriptor: dict[str, Any] = {"v": 1, "model": two, "outputs": {"logits": "logits", "sum": "s"}}
    args = (front, json.dumps(descriptor), tmp_path / "questions.arrows", tmp_path / "answers.arrows")

    done = run(jar, *args)
    assert done.returncode == 0, done.stderr
    assert "stream open at the runner" in done.stdout
    assert "action status: " in done.stdout
    assert "answer Schema<logits: List<" in done.stdout
    table = done.stdout[done.stdout.index(" batch ") :].splitlines()[1:]
    assert [line.split()[:4] for line in table] == [
        ["0", "3", "1", "3"],
        ["1", "1", "1", "1"],
        ["2", "5", "1", "4"],  # the null row takes no part in the run
    ]
    assert len({line.split()[5] for line in table}) == 1, "one server answered, and said who it is"
    agrees(tmp_path / "answers.arrows", expected)

    # A runner that cannot be reached where it is: its socket is gone, but the front has a connection to it.
    with_front = flight.connect(front)
    relayed = flight.FlightDescriptor.for_command(json.dumps({**descriptor, "redirect": False}))
    writer, reader = with_front.do_exchange(relayed)
    with writer:
        writer.begin(SCHEMA)
        assert reader.schema.names == ["logits", "s"]
        writer.done_writing()
    info = with_front.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(descriptor)))
    os.remove(info.endpoints[0].locations[0].uri.decode().removeprefix("grpc+unix://"))
    (tmp_path / "answers.arrows").unlink()
    done = run(jar, *args)
    assert done.returncode == 0, done.stderr
    assert "stream open through the front" in done.stdout
    agrees(tmp_path / "answers.arrows", expected)


@pytest.mark.parametrize(
    ("descriptor", "says"),
    [
        ('{"v":1,"model":"file:///no/such/model"}', "NOT_FOUND: "),
        ('{"v":1,"model":"MODEL","nosuch":1}', 'INVALID_ARGUMENT: descriptor: .*unknown field "nosuch"'),
        ('{"v":1,"model":"MODEL","inputs":{"a":"a","b":"c"}}', 'INVALID_ARGUMENT: .*column "c"'),
        ('{"v":1,"model":"MODEL","nulls":"fail"}', "INVALID_ARGUMENT: .*row 2 of record batch 2"),
    ][:: count(3, 1)],
)
def test_java_client_tells_errors(
    jar: Path, client: flightsvc.Client, two: str, tmp_path: Path, descriptor: str, says: str
):
    questions(tmp_path / "questions.arrows")
    text = descriptor.replace("MODEL", two)
    done = run(jar, client._connection._find(), text, tmp_path / "questions.arrows")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert re.match(says, line), line
