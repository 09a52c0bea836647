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

import flightsvc
from flightsvc import InvalidArgumentError, NotFoundError, SidecarError

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


@pytest.fixture(scope="session")
def frame(spark: Any) -> Any:
    return spark.range(4).selectExpr("id", "array(id, 0L, 1L) AS i", "'text' AS s")


@pytest.fixture
def no_task_starts(spark: Any) -> Iterator[None]:
    """Nothing that runs here starts a job."""
    group = f"driver {time.monotonic()}"
    spark.sparkContext.setJobGroup(group, group)
    yield
    assert list(spark.sparkContext.statusTracker().getJobIdsForGroup(group)) == []


def lists(rows: list[list[int]]) -> pa.Table:
    return pa.table({"i": rows})


# Models.


def test_unknown_model(client: flightsvc.Client, frame: Any, no_task_starts: None):
    with pytest.raises(NotFoundError, match="model file:///no/such-model: there is no folder /no/such-model"):
        client.predict("/no/such-model", lists([[1, 2, 3]]))
    with pytest.raises(NotFoundError, match=r'model "such-model": .* no model-root .* set --model-root or'):
        client.predict("such-model", lists([[1, 2, 3]]))
    with pytest.raises(NotFoundError, match="model file:///no/such-model: there is no folder"):
        flightsvc.Model("/no/such-model").transform(frame)


def test_not_a_saved_model(client: flightsvc.Client, frame: Any, tmp_path: Path, no_task_starts: None):
    (tmp_path / "weights.h5").write_text("not a SavedModel")
    wanted = rf"model file://{tmp_path}: {tmp_path} holds no saved_model\.pb"
    with pytest.raises(NotFoundError, match=wanted):
        client.predict(tmp_path, lists([[1, 2, 3]]))
    with pytest.raises(NotFoundError, match=wanted):
        flightsvc.Model(tmp_path).transform(frame)


@pytest.mark.parametrize("content", [b"", b"no protocol buffer", b"\x12\xff\xff\xff\x7f", os.urandom(4096)])
def test_a_broken_saved_model(client: flightsvc.Client, tmp_path: Path, content: bytes):
    (tmp_path / "saved_model.pb").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=re.escape(str(tmp_path / "saved_model.pb"))):
        client.predict(tmp_path, lists([[1, 2, 3]]))


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
    with pytest.raises(
        flightsvc.FlightsvcError, match=rf"model file://{place} cannot be loaded from {place}"
    ):
        client.predict(place, table)
    # Once the file is whole the same folder is served.
    shutil.copy(models / "mlp" / "variables" / variables.name, variables)
    got = np.array(client.predict(place, table)["y"].to_pylist())
    np.testing.assert_allclose(got, oracle("mlp", x=x)["y"], rtol=1e-5, atol=1e-6)


def test_a_job_on_truncated_variables(frame: Any, models: Path, tmp_path: Path):
    shutil.copytree(models / "two", tmp_path / "two")
    [variables] = tmp_path.glob("two/variables/variables.data-*")
    os.truncate(variables, 10)
    rows = frame.selectExpr("array(1f,1f,1f,1f,1f,1f,1f,1f) AS a", "array(1f,1f,1f,1f) AS b")
    with pytest.raises(Exception, match=rf"FlightsvcError: model file://{tmp_path}/two cannot be loaded"):
        flightsvc.Model(tmp_path / "two").transform(rows).collect()


# Columns.


def test_unknown_column(client: flightsvc.Client, models: Path, frame: Any, no_task_starts: None):
    reference = (models / "ints").as_uri()
    wanted = f"model {reference}, signature serving_default: there is no column 'j' for input 'i'"
    with pytest.raises(NotFoundError, match=f"{wanted}; columns: i$"):
        client.predict(models / "ints", lists([[1, 2, 3]]), inputs={"i": "j"})
    with pytest.raises(NotFoundError, match=f"{wanted}; columns: id, i, s$"):
        flightsvc.Model(models / "ints").transform(frame, inputs={"i": "j"})


def test_wrong_dtype(client: flightsvc.Client, models: Path, frame: Any, no_task_starts: None):
    head = rf"model {(models / 'ints').as_uri()}, signature serving_default: "
    with pytest.raises(
        InvalidArgumentError,
        match=rf'{head}input "i" int64 \[\?,3\] .* column "s" of utf8; it wants elements of int64',
    ):
        client.predict(models / "ints", pa.table({"s": ["text"]}), inputs={"i": "s"})
    with pytest.raises(
        InvalidArgumentError, match=rf'{head}input "i" int64 \[\?,3\] .* column "i" of list<.*float64'
    ):
        client.predict(models / "ints", pa.table({"i": [[1.5, 2.0, 3.0]]}))
    with pytest.raises(
        InvalidArgumentError, match=rf"{head}column 's' is string, input 'i' \(int64\[-1,3\]\) needs array"
    ):
        flightsvc.Model(models / "ints").transform(frame, inputs={"i": "s"})


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


def test_a_row_that_is_too_large(client: flightsvc.Client, models: Path):
    table = pa.table({"s": pa.array([b"x" * (257 << 20)], pa.large_binary())})
    with pytest.raises(
        InvalidArgumentError, match=r"row of 257 MiB, most of it in column 's'; at most 256 MiB can be sent"
    ):
        client.predict(models / "strings", table)


# Pictures.


@pytest.fixture
def pictures(models: Path) -> flightsvc.Model:
    return flightsvc.Model(
        models / "pictures", preprocess={"image": flightsvc.ImageInput(size=(32, 32), scale=1 / 255)}
    )


def undecodable() -> list[bytes]:
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 48, 3), np.uint8)).save(out, "JPEG")
    whole = out.getvalue()
    return [b"", b"no picture", whole[:20], whole[:3], b"\x89PNG\r\n\x1a\n" + b"\0" * 40]


def test_undecodable_pictures(client: flightsvc.Client, pictures: flightsvc.Model):
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    Image.new("RGB", (40, 50), (255, 0, 51)).save(out, "PNG")
    bad = undecodable()
    table = pa.table({"content": pa.array([out.getvalue(), *bad, None, out.getvalue()], pa.binary())})
    with pytest.raises(
        InvalidArgumentError,
        match=r'model .*/pictures, .*: row 1 of record batch 0: .*"content".*; on_error "null" or "column"',
    ):
        client.predict(pictures, table, inputs={"image": "content"})
    nulls = client.predict(pictures, table, inputs={"image": "content"}, on_error="null")
    assert nulls.column_names == ["content", "mean"]
    said = client.predict(pictures, table, inputs={"image": "content"}, on_error="column", error_column="why")
    assert said.column_names == ["content", "mean", "why"]
    for answer in (nulls, said):
        means = answer["mean"].to_pylist()
        for row in range(len(table)):
            if row in (0, len(table) - 1):
                assert means[row] == pytest.approx([1.0, 0.0, 0.2], abs=1e-5)
            else:
                assert means[row] is None
    why = said["why"].to_pylist()
    assert [text is not None for text in why] == [False, *[True] * len(bad), False, False]
    assert all("content" in text or "picture" in text or "image" in text for text in why[1:-2]), why


def test_a_job_on_undecodable_pictures(spark: Any, pictures: flightsvc.Model):
    rows = spark.createDataFrame(
        [(i, bytes(content)) for i, content in enumerate(undecodable())], "id int, c binary"
    )
    with pytest.raises(
        Exception, match=r"InvalidArgumentError: model .*/pictures, .*row \d+ of record batch \d+"
    ):
        pictures.transform(rows, inputs={"image": "c"}).collect()
    for policy in ("null", "column"):
        answer = pictures.transform(rows, inputs={"image": "c"}, on_error=policy).collect()
        assert len(answer) == len(undecodable())
        assert all(row["mean"] is None for row in answer)
        assert policy == "null" or all(row["error"] for row in answer)


# Nothing at all.


def test_no_rows(client: flightsvc.Client, models: Path, spark: Any):
    kind = pa.list_(pa.int64())
    schema = pa.schema({"i": kind})
    empty = pa.RecordBatch.from_pylist([], schema)
    for nothing in (
        pa.Table.from_batches([], schema),
        pa.Table.from_batches([empty, empty], schema),
        empty,
    ):
        answer = client.predict(models / "ints", nothing)
        assert answer.num_rows == 0
        assert answer.schema.names == ["i", "doubled", "total"]
        assert [pa.types.is_list(answer.schema.types[1]), answer.schema.types[2]] == [True, pa.int64()]
    full = pa.RecordBatch.from_pylist([{"i": [1, 2, 3]}], schema)
    answer = client.predict(models / "ints", pa.Table.from_batches([empty, full, empty, full]))
    assert [len(chunk) for chunk in answer["total"].chunks] == [0, 1, 0, 1]

    model = flightsvc.Model(models / "ints")
    no_partition = spark.createDataFrame([], "i array<bigint>")
    empty_partitions = spark.range(0, 2, 1, 6).selectExpr("array(id, id, id) AS i")
    none_left = empty_partitions.where("i[0] < 0")
    for rows, totals in ((no_partition, []), (empty_partitions, [0, 3]), (none_left, [])):
        result = model.transform(rows)
        assert result.schema.simpleString() == ("struct<i:array<bigint>,doubled:array<bigint>,total:bigint>")
        assert sorted(row.total for row in result.collect()) == totals


# A front that cannot start, or cannot load.


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        yield Path(folder)


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """A front in the foreground; yields its endpoint and ends it by SIGTERM."""
    command = [ROOT / "bin" / "flightsvc", "serve", "--log-level=error", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front:
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
    done = subprocess.run(
        [ROOT / "bin" / "flightsvc", "serve", f"--endpoint=grpc+unix://{path}", f"--run-dir={folder}"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"flightsvc: address .*: a Unix socket's path has at most 107 bytes, this one has 108; "
        r"choose a shorter run-dir\n",
        done.stderr,
    ), done.stderr


def test_the_longest_socket_path_works(short: Path, monkeypatch: pytest.MonkeyPatch, models: Path):
    folder = short / ("d" * (107 - len(f"{short}//user/front.sock")))
    monkeypatch.setenv("FLIGHTSVC_RUN_DIR", str(folder))
    with flightsvc.connect() as client:
        assert client.predict(models / "ints", lists([[1, 2, 3]]))["total"].to_pylist() == [6]
        client.shutdown()


def test_no_libtensorflow(short: Path, models: Path):
    (short / "empty").mkdir()
    wanted = rf"model file://.*/ints: libtensorflow .*{short}/empty.* no libtensorflow_cc.*pip install "
    with (
        serving(f"--run-dir={short}/run", f"--libtensorflow={short}/empty") as endpoint,
        flightsvc.connect(endpoint) as client,
    ):
        assert list(client.metadata(models / "ints")["signatures"]) == ["serving_default"]
        for _ in range(2):
            with pytest.raises(flightsvc.FlightsvcError, match=wanted):
                client.predict(models / "ints", lists([[1, 2, 3]]))
        assert client.status()["models"] == []


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
    return flight.FlightDescriptor.for_command(body if isinstance(body, bytes) else json.dumps(body))


BATCH = pa.record_batch({"i": pa.array([[1, 2, 3]], pa.list_(pa.int64()))})


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"", pa.ArrowInvalid, "descriptor: "),
        (b"\xff\xfe\x00", pa.ArrowInvalid, "descriptor: invalid character"),
        ({"v": 2, "model": "{ints}"}, pa.ArrowInvalid, "descriptor: v is 2; this server speaks 1"),
        ({"v": 1, "model": "{ints}", "colour": "red"}, pa.ArrowInvalid, 'unknown field "colour"'),
        (
            {"v": 1, "model": "{ints}", "inputs": {"q": "i"}},
            pa.ArrowInvalid,
            'no input "q"; the signature has',
        ),
        ({"v": 1, "model": "{ints}", "outputs": {"q": "i"}}, pa.ArrowInvalid, 'no output "q"; the signature'),
        ({"v": 1, "model": "{ints}", "version": "7"}, pa.ArrowKeyError, "no version 7"),
        ({"v": 1, "model": "{ints}", "signature": "s"}, pa.ArrowKeyError, 'no signature "s"; this model has'),
        ({"v": 1, "model": ".."}, (pa.ArrowKeyError, pa.ArrowInvalid), r'model "\.\.": '),
        ({"v": 1, "model": "../../etc"}, (pa.ArrowKeyError, pa.ArrowInvalid), r'model "\.\./\.\./etc": '),
        ({"v": 1, "model": "ftp://host/model"}, pa.ArrowInvalid, "ftp"),
        ({"v": 1, "model": "file://host/model"}, pa.ArrowInvalid, "want file:///absolute/path"),
        ({"v": 1, "model": "x" * (10 << 20)}, pa.ArrowInvalid, "bytes, more than 65536"),
    ],
)
def test_descriptors(raw: flight.FlightClient, models: Path, body: Any, kind: Any, text: str):
    """Each verb that takes a descriptor refuses a wrong one with the same words."""
    if isinstance(body, dict) and body.get("model") == "{ints}":
        body = {**body, "model": (models / "ints").as_uri()}
    for verb in (raw.get_schema, raw.get_flight_info, lambda descriptor: exchange(raw, descriptor, BATCH)):
        error = refusal(lambda: verb(command(body)))  # noqa: B023
        assert isinstance(error, kind), repr(error)
        assert re.search(text, str(error)), str(error)


def test_no_command_in_the_descriptor(raw: flight.FlightClient):
    for descriptor in (flight.FlightDescriptor.for_path("a", "b"), flight.FlightDescriptor.for_path()):
        for verb in (raw.get_schema, raw.get_flight_info, lambda it: exchange(raw, it, BATCH)):
            error = refusal(lambda: verb(descriptor))  # noqa: B023
            assert isinstance(error, pa.ArrowInvalid)
            assert "must hold a CMD descriptor" in str(error)


def test_a_name_that_leaves_the_model_root(short: Path, models: Path):
    """Only folders directly below the model-root can be named."""
    shutil.copytree(models / "ints", short / "outside")
    (short / "root").mkdir()
    names = ("../outside", "..", ".", "a/../../outside", "../root/../outside")
    with (
        serving(f"--run-dir={short}/run", f"--model-root={short}/root") as endpoint,
        flight.FlightClient(endpoint) as client,
    ):
        for name in names:
            error = refusal(lambda: client.get_schema(command({"v": 1, "model": name})))  # noqa: B023
            assert isinstance(error, pa.ArrowInvalid), repr(error)
            assert "a name is one folder below the model-root" in str(error)


def test_streams_that_end_before_they_begin(raw: flight.FlightClient, models: Path):
    descriptor = {"v": 1, "model": (models / "ints").as_uri()}
    for target, head in both_ends(raw, descriptor):
        for nothing_sent in (True, False):
            writer, reader = target.do_exchange(head(), flight.FlightCallOptions(timeout=20))
            if nothing_sent:
                writer.done_writing()
                error = refusal(reader.read_all)
                assert isinstance(error, pa.ArrowInvalid), repr(error)
                assert "schema" in str(error) or "descriptor" in str(error)
            else:
                reader.cancel()
            with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
                writer.close()


def ticket(raw: flight.FlightClient, descriptor: dict[str, Any]) -> tuple[str, bytes]:
    """Return where the runner is and a ticket for it."""
    [endpoint] = raw.get_flight_info(command(descriptor)).endpoints
    return endpoint.locations[0].uri.decode(), endpoint.ticket.ticket


def both_ends(
    raw: flight.FlightClient, descriptor: dict[str, Any]
) -> Iterator[tuple[flight.FlightClient, Callable[[], flight.FlightDescriptor]]]:
    """Yield the front and a runner, each with what makes a good descriptor for it."""
    yield raw, lambda: command(descriptor)
    location, _ = ticket(raw, descriptor)
    with flight.FlightClient(location) as runner:
        yield runner, lambda: command(ticket(raw, descriptor)[1])


def test_a_runner_wants_a_ticket_and_takes_it_once(raw: flight.FlightClient, models: Path):
    descriptor = {"v": 1, "model": (models / "ints").as_uri()}
    location, good = ticket(raw, descriptor)
    with flight.FlightClient(location) as runner:
        whole = json.loads(good)
        lease = whole["lease"]
        leases = (None, {}, {**lease, "id": "other"}, {**lease, "expires": lease["expires"] + 60_000})
        elsewhere = {"model": (models / "words").as_uri()}, {"version": "2"}, {"signature": "other"}
        for change in (*({"lease": bad} for bad in leases), *elsewhere, {"request_id": "another"}):
            forged = {**whole, **change}
            error = refusal(lambda: exchange(runner, command(forged), BATCH))  # noqa: B023
            assert isinstance(error, flight.FlightUnavailableError), repr(error)
            assert "ask the front" in str(error)
        assert exchange(runner, command(good), BATCH)["total"].to_pylist() == [6]
        error = refusal(lambda: exchange(runner, command(good), BATCH))
        assert isinstance(error, flight.FlightUnavailableError)
        assert "has opened a stream already; ask the front for another" in str(error)
        for verb in (runner.get_schema, runner.get_flight_info):
            assert isinstance(refusal(lambda: verb(command(descriptor))), pa.ArrowNotImplementedError)  # noqa: B023


def test_wrong_columns_on_the_wire(raw: flight.FlightClient, models: Path):
    descriptor = {"v": 1, "model": (models / "ints").as_uri(), "inputs": {"i": "i"}}
    for target, head in both_ends(raw, descriptor):
        for columns, text in (
            ({"j": BATCH["i"]}, '"i"'),
            ({"i": pa.array(["text"])}, 'column "i" of utf8'),
            ({"i": pa.array([[1.0, 2.0, 3.0]])}, 'column "i" of list<item: float64'),
            ({"i": pa.array([[0]], pa.list_(pa.timestamp("us")))}, 'column "i" of list<item: timestamp'),
        ):
            error = refusal(lambda: exchange(target, head(), pa.record_batch(columns)))  # noqa: B023
            assert isinstance(error, pa.ArrowInvalid), repr(error)
            assert text in str(error)
            assert "/ints, signature serving_default" in str(error)


def test_messages_without_a_record_batch(raw: flight.FlightClient, models: Path):
    for target, head in both_ends(raw, {"v": 1, "model": (models / "ints").as_uri()}):
        writer, reader = target.do_exchange(head(), flight.FlightCallOptions(timeout=20))
        writer.begin(BATCH.schema)
        writer.write_batch(BATCH)
        writer.write_metadata(b"no record batch")
        writer.done_writing()
        error = refusal(reader.read_all)
        assert isinstance(error, pa.ArrowInvalid), repr(error)
        assert "record batch 1 cannot be read" in str(error)
        with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
            writer.close()


def test_a_message_that_is_too_large(raw: flight.FlightClient, models: Path):
    batch = pa.record_batch({"s": pa.array([b"x" * (257 << 20)], pa.binary())})
    for target, head in both_ends(raw, {"v": 1, "model": (models / "strings").as_uri()}):
        error = refusal(lambda: exchange(target, head(), batch))  # noqa: B023
        assert isinstance(error, pa.ArrowInvalid), repr(error)
        assert re.search("resource exhausted.*larger than max", str(error)), str(error)
    small = pa.record_batch({"s": [b"abc"]})
    for target, head in both_ends(raw, {"v": 1, "model": (models / "strings").as_uri()}):
        assert exchange(target, head(), small)["upper"].to_pylist() == [b"ABC"]


def test_wrong_actions(raw: flight.FlightClient):
    for action, kind, text in (
        (flight.Action("no.such", b""), pa.ArrowNotImplementedError, 'no action "no.such"; ListActions'),
        (flight.Action("model.metadata", b"x"), pa.ArrowInvalid, 'a body like {"model":"name"}'),
        (flight.Action("model.metadata", b"{}"), pa.ArrowInvalid, 'a body like {"model":"name"}'),
    ):
        error = refusal(lambda: list(raw.do_action(action)))  # noqa: B023
        assert isinstance(error, kind), repr(error)
        assert text in str(error)


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
def send(client: flightsvc.Client) -> Iterator[Callable[..., tuple[str, str]]]:
    """Send raw messages and return the gRPC code and the text that the call ends with."""
    grpc = pytest.importorskip("grpc", reason="skipped: needs grpcio, which comes with TensorFlow")
    client.status()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    channels: dict[str, Any] = {}

    def call(place: str, *said: bytes, timeout: float = 20) -> tuple[str, str]:
        if place not in channels:
            channels[place] = grpc.insecure_channel(place.replace("grpc+unix://", "unix:"), options)
        exchange = channels[place].stream_stream("/arrow.flight.protocol.FlightService/DoExchange")
        answers = exchange(iter(said), timeout=timeout)
        try:
            for _ in answers:
                pass
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""

    yield call
    for channel in channels.values():
        channel.close()


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

    def refused(self, schema: bytes, header: bytes, body: bytes) -> None:
        """Send one record batch to both ends; both must refuse it."""
        for place, command in self.ends():
            code, text = self.send(place, flight_data(schema, b"", command), flight_data(header, body))
            assert code == "INVALID_ARGUMENT", (code, text)
            assert text


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


@pytest.mark.parametrize("claim", [-1, 4, 2**20, 2**31, 2**40, 2**62, -(2**63)])
def test_lying_lengths(wire: Callable[[str], Wire], claim: int):
    """The header's 64-bit numbers, rows, nulls, places and sizes of buffers, are each replaced by a claim."""
    here = wire("ints")
    (schema, _), (header, body) = messages(LISTS)
    lied = 0
    for at in range(0, len(header) - 7, 4):
        said = int.from_bytes(header[at : at + 8], "little", signed=True)
        if said in (3, 9, 16, 24, 64, 72, 128):
            lie = header[:at] + claim.to_bytes(8, "little", signed=True) + header[at + 8 :]
            place, command = ticket(here.raw, here.descriptor)
            code, text = here.send(place, flight_data(schema, b"", command), flight_data(lie, body))
            assert code in ("OK", "INVALID_ARGUMENT"), (code, text)
            lied += code != "OK"
    assert lied >= 4  # rows and buffers at least; some numbers nobody needs to believe


def test_a_body_that_ends_early(wire: Callable[[str], Wire]):
    (schema, _), (header, body) = messages(LISTS)
    for length in (0, 1, 8, len(body) // 2, len(body) - 8):
        wire("ints").refused(schema, header, body[:length])


def test_a_stream_that_ends_after_a_dictionary(wire: Callable[[str], Wire]):
    """A dictionary that no record batch has used yet is freed once."""
    words = pa.array(["apple", "fig", "apple"]).dictionary_encode()
    (schema, _), *rest = messages(pa.record_batch({"s": words}))
    here = wire("strings")
    assert len(rest) == 2
    for _ in range(20):
        for place, command in here.ends():
            head = flight_data(schema, b"", command)
            code, text = here.send(place, head, flight_data(*rest[0]))
            assert code in ("OK", "INVALID_ARGUMENT"), (code, text)
            code, text = here.send(
                place, head, flight_data(*rest[0]), flight_data(rest[1][0], rest[1][1][:8])
            )
            assert code in ("INVALID_ARGUMENT", "UNAVAILABLE"), (code, text)  # the ticket has been used
    for place, command in here.ends():
        assert (
            here.send(place, flight_data(schema, b"", command), *(flight_data(*m) for m in rest))[0] == "OK"
        )


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
    wire("ints").refused(schema, header, body.replace(true, claim.to_bytes(8, "little", signed=True)))
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

    with serving(f"--run-dir={short}/run") as endpoint, flight.FlightClient(endpoint) as client:
        runner, _ = ticket(client, {"v": 1, "model": (models / "ints").as_uri()})
        for place in (endpoint, runner):
            assert ask(place, stranger) == "FlightUnavailableError"
        path = Path(endpoint.removeprefix("grpc+unix://"))
        for folder in (path.parent, short / "run", short):
            folder.chmod(0o755)
        for place in (endpoint, runner):
            Path(place.removeprefix("grpc+unix://")).chmod(0o666)
            assert ask(place, stranger) == "FlightUnavailableError"
        assert ask(endpoint, 0) == "answered"
        assert ask(runner, 0) == "FlightUnimplementedError" or ask(runner, 0) == "ArrowNotImplementedError"
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
    end = time.monotonic() + 10
    while any(m["streams"] for m in client.status()["models"]):
        assert time.monotonic() < end, "streams that are over are still open"
        time.sleep(0.02)


@pytest.mark.parametrize("redirect", [True, False])
def test_a_reader_that_never_reads(client: flightsvc.Client, endpoint: str, models: Path, redirect: bool):
    """It fills its own windows and nothing else; others go on."""
    x = pa.array([[1.0] * 512] * 8, pa.list_(pa.float32()))
    client.predict(models / "mlp", pa.table({"x": x}))
    of = processes(client, models / "mlp")
    before = resident_mb(of)
    arguments = [endpoint, (models / "mlp").as_uri(), json.dumps(redirect)]
    most, served = before, 0
    with subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE) as deaf:
        try:
            assert deaf.stdout.readline() == b"streaming\n"
            end = time.monotonic() + DEAF_SECONDS
            while time.monotonic() < end:
                for name, table in (("mlp", pa.table({"x": x})), ("ints", lists([[1, 2, 3]]))):
                    assert client.predict(models / name, table).num_rows == table.num_rows
                    served += 1
                most = [max(a, b) for a, b in zip(most, resident_mb(of), strict=True)]
            assert deaf.poll() is None
        finally:
            deaf.kill()
    name = "at_runner" if redirect else "relayed"
    report(**{f"deaf_reader_{name}": {"mb_before": before, "mb_most": most, "others_served": served}})
    assert served > 2 * DEAF_SECONDS
    assert all(b - a < 5 * GROWTH_MB for a, b in zip(before, most, strict=True)), (before, most)


# A client that goes away.

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


@pytest.mark.parametrize("redirect", [True, False])
def test_a_client_that_is_killed(client: flightsvc.Client, endpoint: str, models: Path, redirect: bool):
    def about() -> dict[str, Any]:
        return next(m for m in client.status()["models"] if m["dir"] == f"{models}/mlp")

    def resident_mb() -> float:
        return (
            sum(psutil.Process(pid).memory_info().rss for pid in (about()["pid"], client.status()["pid"]))
            / 1e6
        )

    before = 0.0
    for number in range(KILLED_CLIENTS):
        arguments = [endpoint, (models / "mlp").as_uri(), json.dumps(redirect)]
        with subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE) as gone:
            assert gone.stdout.readline() == b"streaming\n"
            assert about()["streams"] == 1
            gone.kill()
        end = time.monotonic() + 5
        while about()["streams"]:
            assert time.monotonic() < end, "the stream of a client that is gone is still open"
            time.sleep(0.02)
        if number + 1 == SETTLED_CLIENTS:
            before = resident_mb()
    after = resident_mb()
    report(
        **{
            f"killed_clients_{'at_runner' if redirect else 'relayed'}": KILLED_CLIENTS,
            f"mb_settled_and_at_end_{'at_runner' if redirect else 'relayed'}": [
                round(before),
                round(after),
            ],
        }
    )
    assert after - before < GROWTH_MB
