"""What is wrong is refused where it is seen, in words, and the next request on the same front works."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from figures import count, report
from processes import until

import flightsvc
from flightsvc import InvalidArgumentError, SidecarError

ROOT = Path(__file__).resolve().parents[2]
RANDOM_STREAMS = 20
KILLED_CLIENTS = count(2, 80)
SETTLED_CLIENTS = count(1, 50)  # the C library keeps freed memory, up to some high-water mark
REFUSALS = count(300, 3_000)
GROWTH_MB = 100
MUTATIONS = count(200, 3_000)
STREAMS = 1_000
DEAF_SECONDS = count(2, 20)
cases = 0


@pytest.fixture(autouse=True)
def next_request_works(client: flightsvc.Client, models: Path) -> Iterator[None]:
    """After each test the same front, with the same process, answers rightly."""
    global cases
    front = client.status()["pid"]
    yield
    cases += 1
    report(bad_input_tests=cases)
    assert client.predict(models / "ints", pa.table({"i": [[1, 2, 3]]}))["total"].to_pylist() == [6]
    assert client.status()["pid"] == front


@pytest.fixture
def raw(endpoint: str) -> Iterator[flight.FlightClient]:
    """A client as anybody may write one, with pyarrow alone."""
    with flight.FlightClient(endpoint) as client:
        yield client


def lists(rows: list[list[int]]) -> pa.Table:
    return pa.table({"i": rows})


@pytest.mark.parametrize("size", [0, 100])
def test_truncated_variables(
    client: flightsvc.Client,
    models: Path,
    tmp_path: Path,
    oracle: Callable[..., dict[str, Any]],
    size: int,
):
    place = tmp_path / "mlp"
    shutil.copytree(models / "mlp", place)
    [variables] = place.glob("variables/variables.data-*")
    os.truncate(variables, size)
    x = np.ones((1, 512), np.float32)
    table = pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float32()))})
    wanted = rf"model file://{place} cannot be loaded from {place}.*Read less bytes than requested"
    with pytest.raises(flightsvc.FlightsvcError, match=wanted) as caught:
        client.predict(place, table)
    assert type(caught.value) is flightsvc.FlightsvcError, repr(caught.value)  # of no narrower class
    # Once the file is whole the same folder is served.
    shutil.copy(models / "mlp" / "variables" / variables.name, variables)
    got = np.array(client.predict(place, table)["y"].to_pylist())
    np.testing.assert_allclose(got, oracle("mlp", x=x)["y"], rtol=1e-5, atol=1e-6)


def test_many_refusals(client: flightsvc.Client, models: Path):
    """A refusal may come while the client is still writing, at any moment of it."""
    dice = np.random.default_rng(5)
    for _ in range(REFUSALS):
        sizes = dice.integers(1, 3000, dice.integers(1, 8))
        rows = [pa.array([[1, 2, 3]] * size, pa.list_(pa.int64())) for size in sizes]
        rows[dice.integers(len(rows))] = pa.array([[1, 2]], pa.list_(pa.int64()))
        with pytest.raises(InvalidArgumentError, match=r"/ints, signature serving_default: "):
            client.predict(models / "ints", pa.table({"i": pa.chunked_array(rows)}))
    report(refused_calls=REFUSALS)


# Paths of sockets.


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        yield Path(folder)


@contextlib.contextmanager
def serving(run_dir: Path, log: Path) -> Iterator[str]:
    """A front in the foreground; yields its endpoint and ends it by SIGTERM."""
    command = [ROOT / "bin" / "flightsvc", "serve", f"--run-dir={run_dir}"]
    with (
        log.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as front,
    ):
        try:
            yield json.loads(front.stdout.readline())["endpoint"]
        finally:
            front.terminate()
            assert front.wait(10) == 0


def test_a_socket_path_that_is_too_long(short: Path, monkeypatch: pytest.MonkeyPatch):
    folder = short / ("d" * (107 - len(f"{short}//user/front.sock") + 1))  # one byte too many
    path = f"{folder}/user/front.sock"
    assert len(path) == 108
    monkeypatch.setenv("FLIGHTSVC_RUN_DIR", str(folder))
    with (
        flightsvc.connect() as client,
        pytest.raises(SidecarError, match=r"of 108 bytes, Linux allows 107; set spark\.flightsvc\.runDir or"),
    ):
        client.status()
    assert not folder.exists()


def test_the_longest_socket_path_works(short: Path, monkeypatch: pytest.MonkeyPatch, models: Path):
    folder = short / ("d" * (107 - len(f"{short}//user/front.sock")))
    monkeypatch.setenv("FLIGHTSVC_RUN_DIR", str(folder))
    with flightsvc.connect() as client:
        assert client.predict(models / "ints", lists([[1, 2, 3]]))["total"].to_pylist() == [6]
        client.shutdown()


# The raw wire.


def refusal(call: Callable[[], Any]) -> BaseException:
    """Return the exception that a Flight call ends with."""
    with pytest.raises((pa.ArrowException, flight.FlightError, OSError)) as caught:
        call()
    return caught.value


def exchange(
    client: flight.FlightClient,
    descriptor: flight.FlightDescriptor,
    batch: pa.RecordBatch,
) -> pa.Table:
    writer, reader = client.do_exchange(descriptor, flight.FlightCallOptions(timeout=60))
    with writer:
        writer.begin(batch.schema)
        writer.write_batch(batch)
        writer.done_writing()
        return reader.read_all()


def command(body: Any) -> flight.FlightDescriptor:
    if isinstance(body, flight.FlightDescriptor):
        return body
    return flight.FlightDescriptor.for_command(body if isinstance(body, bytes) else json.dumps(body))


BATCH = pa.record_batch({"i": pa.array([[1, 2, 3]], pa.list_(pa.int64()))})


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"\xff\xfe\x00", pa.ArrowInvalid, "descriptor: invalid character"),
        ({"inputs": {"q": "i"}}, pa.ArrowInvalid, 'no input "q"; the signature has'),
        ({"version": "7"}, pa.ArrowKeyError, "no version 7"),
        ({"model": "x" * (10 << 20)}, pa.ArrowInvalid, "bytes, more than 65536"),
        (flight.FlightDescriptor.for_path("a", "b"), pa.ArrowInvalid, "must hold a CMD descriptor"),
        (flight.FlightDescriptor.for_path(), pa.ArrowInvalid, "must hold a CMD descriptor"),
    ],
)
def test_descriptors(raw: flight.FlightClient, models: Path, body: Any, kind: Any, text: str):
    """Each verb that takes a descriptor refuses a wrong one with the same words."""
    if isinstance(body, dict):
        body = {"v": 1, "model": (models / "ints").as_uri(), **body}
    for verb in (raw.get_schema, raw.get_flight_info, lambda descriptor: exchange(raw, descriptor, BATCH)):
        error = refusal(lambda: verb(command(body)))  # noqa: B023
        assert isinstance(error, kind), repr(error)
        assert text in str(error)


def test_a_stream_that_ends_before_it_begins(raw: flight.FlightClient, models: Path):
    descriptor = command({"v": 1, "model": (models / "ints").as_uri()})
    writer, reader = raw.do_exchange(descriptor, flight.FlightCallOptions(timeout=20))
    writer.done_writing()
    error = refusal(reader.read_all)
    assert isinstance(error, pa.ArrowInvalid), repr(error)
    assert "descriptor" in str(error)
    with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
        writer.close()


def ticket(raw: flight.FlightClient, descriptor: dict[str, Any]) -> tuple[str, bytes]:
    """Return where the runner is and a ticket for it."""
    [endpoint] = raw.get_flight_info(command(descriptor)).endpoints
    return endpoint.locations[0].uri.decode(), endpoint.ticket.ticket


def test_a_message_that_is_too_large(raw: flight.FlightClient, models: Path):
    """The runner refuses it; that the front does is in test_errors.py."""
    location, good = ticket(raw, {"v": 1, "model": (models / "strings").as_uri()})
    batch = pa.record_batch({"s": pa.array([b"x" * (257 << 20)], pa.binary())})
    with flight.FlightClient(location) as runner:
        error = refusal(lambda: exchange(runner, command(good), batch))
    assert isinstance(error, pa.ArrowInvalid), repr(error)
    assert re.search("resource exhausted.*larger than max", str(error)), str(error)


def test_random_bytes(raw: flight.FlightClient, models: Path, surroundings: Path):
    """Bytes where gRPC, a descriptor, a schema or a record batch should be."""
    import socket

    dice = random.Random(3)
    location, _ = ticket(raw, {"v": 1, "model": (models / "ints").as_uri()})
    sockets = [f"{surroundings}/run/user/front.sock", location.removeprefix("grpc+unix://")]
    for number in range(RANDOM_STREAMS):
        noise = dice.randbytes(dice.randrange(1, 100_000))
        with socket.socket(socket.AF_UNIX) as plain:
            plain.settimeout(10)
            plain.connect(sockets[number % 2])
            with contextlib.suppress(OSError):  # the server may hang up while we talk
                if number % 4 > 1:
                    plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                plain.sendall(noise)
                plain.shutdown(socket.SHUT_WR)
                while plain.recv(65536):
                    pass
        error = refusal(lambda: exchange(raw, command(noise[:1000]), BATCH))  # noqa: B023
        assert isinstance(error, pa.ArrowInvalid), repr(error)
    report(random_streams=2 * RANDOM_STREAMS)


# Record batches that lie. pyarrow does not send what is malformed, so here is what Flight makes of a message.


def field(number: int, content: bytes) -> bytes:
    """Return one field of a protocol buffer that holds bytes."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    return varint(number << 3 | 2) + varint(len(content)) + content


def flight_data(header: bytes, body: bytes = b"", descriptor: bytes = b"") -> bytes:
    """Return a FlightData message as it goes over the wire."""
    asked = field(1, b"\x08\x02" + field(2, descriptor)) if descriptor else b""  # type CMD
    return asked + field(2, header) + field(1000, body)


def messages(batch: pa.RecordBatch, compression: str | None = None) -> list[tuple[bytes, bytes]]:
    """Return header and body of each IPC message: schema, dictionaries, record batch."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(sink.getvalue()))
    return [(m.metadata.to_pybytes(), m.body.to_pybytes() if m.body else b"") for m in reader]


@pytest.fixture(scope="module")
def send(client: flightsvc.Client) -> Callable[..., tuple[str, str]]:
    """Send raw messages and return the gRPC code and the text that the call ends with."""
    grpc = pytest.importorskip("grpc", reason="skipped: needs grpcio, which comes with TensorFlow")
    client.status()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

    def call(place: str, *said: bytes, timeout: float = 20) -> tuple[str, str]:
        with grpc.insecure_channel(place.replace("grpc+unix://", "unix:"), options) as channel:
            exchange = channel.stream_stream("/arrow.flight.protocol.FlightService/DoExchange")
            try:
                list(exchange(iter(said), timeout=timeout))
            except grpc.RpcError as error:
                return error.code().name, error.details()
            return "OK", ""

    return call


LISTS = pa.record_batch({"i": pa.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], pa.list_(pa.int64()))})
NAMES = pa.record_batch({"s": pa.array([b"apple", b"fig", None, b""], pa.binary())})


class Wire:
    """Both ends of the server as raw messages reach them."""

    def __init__(self, raw: flight.FlightClient, endpoint: str, send: Any, model: Path):
        self.send, self.endpoint = send, endpoint
        self.descriptor = {"v": 1, "model": model.as_uri()}
        self.raw = raw

    def ends(self) -> Iterator[tuple[str, bytes]]:
        """Yield a place to send to and the command to begin with."""
        yield self.endpoint, json.dumps(self.descriptor).encode()
        yield ticket(self.raw, self.descriptor)


@pytest.fixture
def wire(raw: flight.FlightClient, endpoint: str, send: Any, models: Path) -> Callable[[str], Wire]:
    return lambda name: Wire(raw, endpoint, send, models / name)


def processes(client: flightsvc.Client, folder: Path) -> list[psutil.Process]:
    """Return the front and the runner of a model."""
    status = client.status()
    [runner] = [m["pid"] for m in status["models"] if m["dir"] == str(folder)]
    return [psutil.Process(pid) for pid in (status["pid"], runner)]


def resident_mb(of: list[psutil.Process]) -> list[int]:
    return [round(process.memory_info().rss / 1e6) for process in of]


def test_a_true_record_batch_on_the_raw_wire(wire: Callable[[str], Wire]):
    """What is sent below is refused for what was changed in it alone."""
    for name, batch in (("ints", LISTS), ("strings", NAMES)):
        for compression in (None, "lz4", "zstd"):
            (schema, _), (header, body) = messages(batch, compression)
            here = wire(name)
            for place, command in here.ends():
                said = flight_data(schema, b"", command), flight_data(header, body)
                assert here.send(place, *said) == ("OK", "")


def test_random_changes_to_record_batches(wire: Callable[[str], Wire]):
    """Any byte of a header or a body may be another: an answer or a refusal, at once, never a fault."""
    dice = random.Random(7)
    codes: dict[str, int] = {}
    for number in range(MUTATIONS):
        name, batch = (("ints", LISTS), ("strings", NAMES))[number % 2]
        here = wire(name)
        said = [list(part) for part in messages(batch, dice.choice([None, "lz4", "zstd"]))]
        for _ in range(dice.randrange(1, 4)):
            message = said[1] if dice.random() < 0.9 else said[0]
            which = 0 if dice.random() < 0.7 or not message[1] else 1
            content = bytearray(message[which])
            content[dice.randrange(len(content))] = dice.choice([0, 1, 127, 128, 255, dice.randrange(256)])
            message[which] = bytes(content)
        place, command = ticket(here.raw, here.descriptor)
        if number % 8 == 0:
            place, command = here.endpoint, json.dumps(here.descriptor).encode()
        started = time.monotonic()
        code, text = here.send(place, flight_data(*said[0], command), flight_data(*said[1]))
        assert time.monotonic() - started < 5
        assert code in ("OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), (number, code, text)
        codes[code] = codes.get(code, 0) + 1
    report(mutated_record_batches=codes)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("claim", [0, 1, 71, 73, 2**20, 2**33, 2**40, 2**62, -2, -(2**63)])
def test_compressed_record_batches_with_a_lying_length(
    client: flightsvc.Client, models: Path, wire: Callable[[str], Wire], compression: str, claim: int
):
    """A compressed buffer begins with the size that it will have."""
    client.predict(models / "ints", lists([[1, 2, 3]]))
    of = processes(client, models / "ints")
    before = resident_mb(of)
    rows = pa.array([[1, 1, 1]] * 300, pa.list_(pa.int64()))
    (schema, _), (header, body) = messages(pa.record_batch({"i": rows}), compression)
    true = (8 * 900).to_bytes(8, "little")
    assert body.count(true) == 1
    lie = body.replace(true, claim.to_bytes(8, "little", signed=True))
    here = wire("ints")
    for place, command in here.ends():
        code, text = here.send(place, flight_data(schema, b"", command), flight_data(header, lie))
        assert code == "INVALID_ARGUMENT" and text, (code, text)
    after = resident_mb(of)
    assert all(b - a < GROWTH_MB for a, b in zip(before, after, strict=True)), (before, after)
    assert resident_peak_mb(of[1]) < 4_000


def resident_peak_mb(process: psutil.Process) -> float:
    """Return the most memory that a process has ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3


# Another user of this host.

STRANGER = """
import os, sys
import pyarrow as pa, pyarrow.flight as flight
endpoint, user = sys.argv[1], int(sys.argv[2])
client = flight.FlightClient(endpoint)
if user:
    os.setgroups([]); os.setgid(user); os.setuid(user)
try:
    list(client.do_action(flight.Action("server.ready", b"{}"), flight.FlightCallOptions(timeout=10)))
except Exception as error:
    print(type(error).__name__)
else:
    print("answered")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="skipped: needs root")
def test_another_user_of_this_host_is_refused(short: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    """By the folder's mode, and where that is opened by the user id of the caller, at front and runner."""
    stranger = 65_534
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)  # where the server looks for TensorFlow

    def ask(endpoint: str, user: int) -> str:
        command = [sys.executable, "-c", STRANGER, endpoint, str(user)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    with serving(short / "run", log := short / "log") as endpoint, flight.FlightClient(endpoint) as client:
        runner, _ = ticket(client, {"v": 1, "model": (models / "ints").as_uri()})
        for place in (endpoint, runner):
            assert ask(place, stranger) == "FlightUnavailableError"
        path = Path(endpoint.removeprefix("grpc+unix://"))
        for folder in (path.parent, short / "run", short):
            folder.chmod(0o755)
        for place in (endpoint, runner):
            Path(place.removeprefix("grpc+unix://")).chmod(0o666)
            log.write_text("")
            assert ask(place, stranger) == "FlightUnavailableError"
            until(lambda: "connection of another user refused" in log.read_text(), 5, "a line in the log")
        assert ask(endpoint, 0) == "answered"
        assert ask(runner, 0) in ("FlightUnimplementedError", "ArrowNotImplementedError")
        answer = exchange(client, command({"v": 1, "model": (models / "ints").as_uri()}), BATCH)
        assert answer["total"].to_pylist() == [6]


# More than there is room for.


class Trailers(flight.ClientMiddlewareFactory):
    """Keeps the value of ``retry-after-ms`` of every call that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.retry_after: list[int] = []

    def start_call(self, info: Any) -> flight.ClientMiddleware:
        outer = self

        class Call(flight.ClientMiddleware):
            def received_headers(self, headers: dict[str, list[str]]) -> None:
                outer.retry_after += [int(value) for value in headers.get("retry-after-ms", [])]

        return Call()


@pytest.mark.parametrize("redirect", [True, False])
def test_a_thousand_streams_at_once(client: flightsvc.Client, endpoint: str, models: Path, redirect: bool):
    """Those that find room are answered, the others are told when to come again."""
    client.predict(models / "ints", lists([[1, 2, 3]]))
    of = processes(client, models / "ints")
    before = resident_mb(of)
    descriptor = {"v": 1, "model": (models / "ints").as_uri(), "redirect": redirect}
    trailers, open_streams, refusals = Trailers(), [], []
    answered = 0
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(flight.FlightClient(endpoint, middleware=[trailers]))
        place = raw
        if redirect:
            location, _ = ticket(raw, descriptor)
            place = stack.enter_context(flight.FlightClient(location, middleware=[trailers]))
        options = flight.FlightCallOptions(timeout=300)
        for number in range(STREAMS):
            try:
                [found] = raw.get_flight_info(command(descriptor), options).endpoints
                head = flight.FlightDescriptor.for_command(found.ticket.ticket)
                writer, reader = place.do_exchange(head, options)
                batch = pa.record_batch({"i": pa.array([[number, 1, 1]], pa.list_(pa.int64()))})
                writer.begin(batch.schema)
                with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
                    writer.write_batch(batch)  # a refusal may be here already; reading tells it
                open_streams.append((number, writer, reader))
            except flight.FlightUnavailableError as error:
                refusals.append(str(error))
        during = resident_mb(of)
        for number, writer, reader in open_streams:
            try:
                assert reader.read_chunk().data["total"].to_pylist() == [number + 2]
                answered += 1
            except flight.FlightUnavailableError as error:
                refusals.append(str(error))
            reader.cancel()
            with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
                writer.close()
    name = "at_runner" if redirect else "relayed"
    report(
        **{
            f"streams_at_once_{name}": {"asked": STREAMS, "answered": answered, "refused": len(refusals)},
            f"streams_at_once_{name}_mb_before_and_during": [before, during],
        }
    )
    assert answered + len(refusals) == STREAMS
    assert answered >= 200
    assert refusals
    for text in refusals:
        assert re.search(r"retry-after-ms", text), text
        assert re.search(r"\b\d+ ms\b", text), text
    assert len(trailers.retry_after) == len(refusals)
    assert all(0 < ms <= 60_000 for ms in trailers.retry_after)
    assert all(b - a < 2 * GROWTH_MB for a, b in zip(before, during, strict=True)), (before, during)
    until(lambda: not any(m["streams"] for m in client.status()["models"]), 10, "the end of all streams")


# Clients that do not read, and go away.

CLIENT = """
import json, sys
import pyarrow as pa, pyarrow.flight as flight
endpoint, model, redirect = sys.argv[1:]
front = flight.FlightClient(endpoint)
descriptor = {"v": 1, "model": model, "redirect": json.loads(redirect)}
info = front.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(descriptor)))
[place] = info.endpoints
runner = flight.FlightClient(place.locations[0].uri) if place.locations else front
writer, reader = runner.do_exchange(flight.FlightDescriptor.for_command(place.ticket.ticket))
values = pa.array([1.0] * (512 * 4096), pa.float32())
batch = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(values, 512)})
writer.begin(batch.schema)
writer.write_batch(batch)
reader.read_chunk()
print("streaming", flush=True)
while True:
    writer.write_batch(batch)  # and nobody reads: this blocks when the windows are full
"""


@contextlib.contextmanager
def streaming(endpoint: str, model: Path, redirect: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A client of the model, which has had its first answer; it is killed at the end."""
    command = [sys.executable, "-c", CLIENT, endpoint, model.as_uri(), json.dumps(redirect)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        try:
            assert client.stdout.readline() == b"streaming\n"
            yield client
        finally:
            client.kill()


@pytest.mark.parametrize("redirect", [True, False])
def test_a_reader_that_never_reads(client: flightsvc.Client, endpoint: str, models: Path, redirect: bool):
    """It fills its own windows and nothing else; others go on."""
    x = pa.array([[1.0] * 512] * 8, pa.list_(pa.float32()))
    client.predict(models / "mlp", pa.table({"x": x}))
    of = processes(client, models / "mlp")
    before = resident_mb(of)
    most, served = before, 0
    with streaming(endpoint, models / "mlp", redirect) as deaf:
        end = time.monotonic() + DEAF_SECONDS
        while time.monotonic() < end:
            for name, table in (("mlp", pa.table({"x": x})), ("ints", lists([[1, 2, 3]]))):
                assert client.predict(models / name, table).num_rows == table.num_rows
                served += 1
            most = [max(a, b) for a, b in zip(most, resident_mb(of), strict=True)]
        assert deaf.poll() is None
    name = "at_runner" if redirect else "relayed"
    report(**{f"deaf_reader_{name}": {"mb_before": before, "mb_most": most, "others_served": served}})
    assert served > 2 * DEAF_SECONDS
    assert all(b - a < 5 * GROWTH_MB for a, b in zip(before, most, strict=True)), (before, most)


@pytest.mark.parametrize("redirect", [True, False])
def test_a_client_that_is_killed(client: flightsvc.Client, endpoint: str, models: Path, redirect: bool):
    def streams() -> int:
        [open_streams] = [m["streams"] for m in client.status()["models"] if m["dir"] == f"{models}/mlp"]
        return int(open_streams)

    before = 0
    for number in range(KILLED_CLIENTS):
        with streaming(endpoint, models / "mlp", redirect):
            assert streams() == 1
        until(lambda: not streams(), 5, "the end of the stream of a client that is gone")
        if number + 1 == SETTLED_CLIENTS:
            before = sum(resident_mb(processes(client, models / "mlp")))
    after = sum(resident_mb(processes(client, models / "mlp")))
    name = "at_runner" if redirect else "relayed"
    report(**{f"killed_clients_{name}": KILLED_CLIENTS, f"mb_settled_and_at_end_{name}": [before, after]})
    assert after - before < GROWTH_MB
