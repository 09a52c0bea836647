# mypy: disable-error-code="import-untyped,misc,untyped-decorator"
"""Every line of the table in docs/errors.md, caused for real: what pyarrow raises and what we raise."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

import flightsvc
from flightsvc import errors
from flightsvc.server.connection import Connection
from flightsvc.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
INTS = pa.record_batch({"i": pa.array([[1, 2, 3]], pa.list_(pa.int64()))})


# The document's table.


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table: how an error is called on its way to the caller."""

    kind: str
    code: str
    theirs: type[BaseException]
    ours: type[flightsvc.FlightsvcError]
    natural: type[BaseException]


def table() -> list[Line]:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == "kind in the server") + 2
    lines: list[Line] = []
    for kind, code, theirs, ours, _ in (row for row in rows[start:] if len(row) == 5):
        names = re.findall(r"`(\w+)`", ours)
        theirs = theirs.strip("`")
        ours_class = getattr(flightsvc, names[0])
        before = [line.natural for line in lines if line.ours is ours_class]
        natural = getattr(builtins, names[1]) if len(names) == 2 else before[0] if before else Exception
        theirs_class = getattr(flight, theirs) if theirs.startswith("Flight") else getattr(pa, theirs)
        lines.append(Line(kind, code, theirs_class, ours_class, natural))
    return lines


LINES = table()


# Ways to cause each of them. Each yields a call with pyarrow alone and one with this package.


@dataclasses.dataclass(frozen=True)
class Scene:
    client: flightsvc.Client
    front: flight.FlightClient
    models: Path
    faulty: Path
    short: Path


Calls = Iterator[tuple[Callable[[], Any], Callable[[], Any]]]


def command(body: Any) -> flight.FlightDescriptor:
    return flight.FlightDescriptor.for_command(body if isinstance(body, bytes) else json.dumps(body))


def exchange(
    client: flight.FlightClient, descriptor: flight.FlightDescriptor, batch: pa.RecordBatch
) -> pa.Table:
    writer, reader = client.do_exchange(descriptor, flight.FlightCallOptions(timeout=60))
    try:
        writer.begin(batch.schema)
        writer.write_batch(batch)
        writer.done_writing()
        return reader.read_all()
    finally:
        with contextlib.suppress(*errors.FLIGHT_ERRORS):
            writer.close()


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """A front in the foreground; yields its endpoint and ends it by SIGTERM."""
    program = [ROOT / "bin" / "flightsvc", "serve", "--log-level=error", *flags]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as front:
        try:
            yield json.loads(front.stdout.readline())["endpoint"]
        finally:
            front.terminate()
            assert front.wait(10) == 0


def bad_request(scene: Scene) -> Calls:
    yield (
        lambda: scene.front.get_schema(command(b"no descriptor")),
        lambda: scene.client.predict(scene.models / "ints", pa.table({"i": ["text"]})),
    )


def precondition(scene: Scene) -> Calls:
    (scene.short / "empty").mkdir()
    flags = (f"--run-dir={scene.short}/run", f"--libtensorflow={scene.short}/empty")
    with (
        serving(*flags) as endpoint,
        flight.FlightClient(endpoint) as front,
        flightsvc.connect(endpoint) as client,
    ):
        yield (
            lambda: front.get_flight_info(command({"v": 1, "model": (scene.models / "ints").as_uri()})),
            lambda: client.predict(scene.models / "ints", INTS),
        )


def exhausted(scene: Scene) -> Calls:
    def large_row() -> None:
        row = pa.record_batch({"s": pa.array([b"x" * (300 << 20)], pa.binary())})
        exchange(scene.front, command({"v": 1, "model": (scene.models / "strings").as_uri()}), row)

    memory = flightsvc.Model(scene.faulty, signature="memory")
    yield large_row, lambda: scene.client.predict(memory, pa.table({"n": [1 << 46]}))


def not_found(scene: Scene) -> Calls:
    yield (
        lambda: scene.front.get_schema(command({"v": 1, "model": "file:///no/such-model"})),
        lambda: scene.client.predict("/no/such-model", INTS),
    )


def unavailable(scene: Scene) -> Calls:
    info = scene.front.get_flight_info(command({"v": 1, "model": (scene.models / "ints").as_uri()}))
    [endpoint] = info.endpoints
    with flight.FlightClient(endpoint.locations[0].uri) as runner:
        used = command(endpoint.ticket.ticket)
        assert exchange(runner, used, INTS)["total"].to_pylist() == [6]
        nobody = Connection(lambda: f"grpc+unix://{scene.short}/nobody.sock", Settings(retry_timeout="200ms"))
        model = flightsvc.Model(scene.models / "ints")
        yield (
            lambda: exchange(runner, used, INTS),
            lambda: flightsvc.Client(nobody).predict(model, INTS, inputs={"i": "i"}),
        )


def canceled(scene: Scene) -> Calls:
    """Somebody, here another thread, cancels a call while its caller waits for the answer."""

    def cut_off() -> None:
        descriptor = command({"v": 1, "model": (scene.models / "ints").as_uri()})
        writer, reader = scene.front.do_exchange(descriptor, flight.FlightCallOptions(timeout=60))
        writer.begin(INTS.schema)
        assert reader.schema.names == ["doubled", "total"]  # the stream is open, and now nothing comes
        other = threading.Thread(target=reader.cancel)
        other.start()
        try:
            reader.read_chunk()
        finally:
            other.join()
            with contextlib.suppress(*errors.FLIGHT_ERRORS):
                writer.close()

    yield cut_off, lambda: scene.client._connection.retry(cut_off, patience=0)


def deadline(scene: Scene) -> Calls:
    slow = flightsvc.Model(scene.models / "slow")
    rows = pa.record_batch({"x": pa.array([[1e12]], pa.list_(pa.float32()))})
    yield (
        lambda: exchange(
            scene.front, command({"v": 1, "model": slow.reference, "run_timeout_ms": 100}), rows
        ),
        lambda: scene.client.predict(slow, rows, run_timeout=0.1),
    )


def unimplemented(scene: Scene) -> Calls:
    yield (
        lambda: list(scene.front.do_action(flight.Action("no.such", b""))),
        lambda: scene.client._connection.action("no.such", {}),
    )
    yield (
        lambda: scene.front.do_get(flight.Ticket(b"ticket")).read_all(),
        lambda: scene.client._connection.action("model", {}),
    )


def internal(scene: Scene) -> Calls:
    files = flightsvc.Model(scene.faulty, signature="files")
    rows = pa.record_batch({"path": [str(scene.short / "not-there")]})
    yield (
        lambda: exchange(
            scene.front, command({"v": 1, "model": files.reference, "signature": "files"}), rows
        ),
        lambda: scene.client.predict(files, rows),
    )


CAUSES: dict[str, tuple[Callable[[Scene], Calls], str]] = {
    "BadRequest": (bad_request, 'descriptor: invalid character|column "i" of utf8'),
    "Precondition": (precondition, "libtensorflow"),
    "Exhausted": (exhausted, "larger than max|OOM when allocating"),
    "NotFound": (not_found, "there is no folder /no/such-model"),
    "Unavailable": (unavailable, "has opened a stream already; ask the front|no answer from flightsvc"),
    "Canceled": (canceled, "(?i)cancel"),
    "Deadline": (deadline, "/slow, signature serving_default: .*run_timeout_ms .100."),
    "Unimplemented": (unimplemented, "(?i)no action|not implemented|DoGet"),
    "Internal": (internal, "signature files: .*No such file"),
}


# What pyarrow calls each code; three of them are one exception.
CODES = {
    "InvalidArgument": "invalid argument",
    "FailedPrecondition": "precondition failed",
    "ResourceExhausted": "resource exhausted",
    "NotFound": "not found",
    "Unavailable": "unavailable",
    "Canceled": "cancelled",
    "DeadlineExceeded": "timeout",
    "Unimplemented": "unimplemented",
    "Internal": "internal",
}


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose signatures fail in TensorFlow, each with another of its codes."""
    import tensorflow as tf

    class Faulty(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="path")])
        def files(self, path: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"content": tf.map_fn(tf.io.read_file, path)}

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.int64, name="n")])
        def memory(self, n: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"sum": tf.zeros_like(n, tf.float32) + tf.reduce_sum(tf.fill(n, 1.0))}

    folder = tmp_path_factory.mktemp("faulty")
    module = Faulty()
    tf.saved_model.save(module, str(folder), signatures={"files": module.files, "memory": module.memory})
    return folder


@pytest.fixture
def scene(client: flightsvc.Client, surroundings: Path, models: Path, faulty: Path) -> Iterator[Scene]:
    """After the test the same front answers rightly."""
    pid = client.status()["pid"]
    endpoint = f"grpc+unix://{surroundings}/run/user/front.sock"
    with (
        tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as short,
        flight.FlightClient(endpoint) as front,
    ):
        yield Scene(client, front, models, faulty, Path(short))
    assert client.predict(models / "ints", INTS)["total"].to_pylist() == [6]
    assert client.status()["pid"] == pid


def test_the_table_is_whole():
    source = (ROOT / "handlers" / "status.go").read_text()
    coded = dict(re.findall(r"fault\.(\w+):\s+codes\.(\w+),", source))
    assert {line.kind: line.code for line in LINES} == coded
    assert {line.kind for line in LINES} == set(CAUSES)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.kind)
def test_a_line_of_the_table(scene: Scene, line: Line):
    cause, words = CAUSES[line.kind]
    caused = 0
    for raw, ours in cause(scene):
        with pytest.raises((pa.ArrowException, flight.FlightError, OSError)) as caught:
            raw()
        assert type(caught.value) is line.theirs, repr(caught.value)
        assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)
        assert re.match(rf"(Flight|gRPC) (returned )?{CODES[line.code]}", str(caught.value)), str(
            caught.value
        )
        with pytest.raises(flightsvc.FlightsvcError) as translated:
            ours()
        assert type(translated.value) is line.ours, repr(translated.value)
        assert isinstance(translated.value, line.natural)
        assert re.search(words, str(translated.value), re.DOTALL), str(translated.value)
        assert "gRPC" not in str(translated.value), "the server's sentence, not Flight's envelope"
        caused += 1
    assert caused


# A server that is full.


def full(milliseconds: int) -> flight.FlightUnavailableError:
    return flight.FlightUnavailableError(
        "Flight returned unavailable error, with message: model m: 256 streams are open; "
        f"ask again in {milliseconds} ms (retry-after-ms). gRPC client debug context: UNKNOWN:Error"
    )


def test_a_full_server_is_asked_again_when_it_said():
    one = Connection(lambda: "grpc+unix:///never/asked", Settings())
    kept = one.runner("grpc+unix:///kept")
    calls: list[float] = []

    def attempt() -> str:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise full(150)
        return "an answer"

    assert one.retry(attempt, patience=30) == "an answer"
    assert len(calls) == 3
    assert all(later - earlier >= 0.15 for earlier, later in itertools.pairwise(calls))
    assert one.runner("grpc+unix:///kept") is kept, "a full server is there, so its clients are kept"


def test_a_full_server_is_given_up_in_time():
    one = Connection(lambda: "grpc+unix:///never/asked", Settings())

    def attempt() -> None:
        raise full(60_000)

    started = time.monotonic()
    with pytest.raises(flightsvc.UnavailableError, match=r"256 streams are open; ask again in 60000 ms"):
        one.retry(attempt, patience=2)
    assert time.monotonic() - started < 1, "it does not wait for what comes too late"


def test_retry_after_is_read_from_the_text():
    assert errors.retry_after(full(250)) == 0.25
    assert errors.retry_after(errors.translate(full(1))) == 0.001
    assert errors.retry_after(flight.FlightUnavailableError("nobody listens in 30 ms")) == 0


# A server that is older.


def test_an_unknown_field_names_both_builds(client: flightsvc.Client):
    """An older server refuses what it does not know, wherever it is, and says which builds speak."""
    ours = rf"flightsvc-python/{re.escape(flightsvc.__version__)} "
    theirs = rf"flightsvc {re.escape(client.status()['flightsvc'])}, build {client.status()['build']}"
    with pytest.raises(
        flightsvc.InvalidArgumentError,
        match=rf'unknown field "frames"; this server is {theirs}, the caller is .*{ours}.*: run both',
    ):
        client._connection.answer_schema({"v": 1, "model": "m", "frames": True})
    with pytest.raises(flightsvc.InvalidArgumentError, match=rf'unknown field "pads"; .*{theirs}.*{ours}'):
        client._connection.answer_schema({"v": 1, "model": "m", "inputs": {"x": {"column": "c", "pads": 0}}})
    with pytest.raises(flightsvc.InvalidArgumentError, match=rf'unknown field "deep"; .*{theirs}.*{ours}'):
        client._connection.action("status", {"deep": True})


def test_text_of_callers_is_escaped(client: flightsvc.Client):
    """What a caller writes gets into terminals and logs by errors: as one printable line."""
    with pytest.raises(flightsvc.FlightsvcError) as caught:
        client.metadata("file:///no/\x1b[2Jhere\nINFO forged")
    text = str(caught.value)
    assert r"\x1b[2Jhere\nINFO forged" in text
    assert text.isprintable(), repr(text)
