"""One stream: the window, replay after a lost server, and how it ends."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from processes import until

import flightsvc
from flightsvc.request import Request
from flightsvc.server import stream
from flightsvc.server.connection import Connection
from flightsvc.server.stream import Exchange


@pytest.fixture
def connection(client: flightsvc.Client) -> Connection:
    return client._connection


def exchange(connection: Connection, request: Request, names: list[str]) -> Exchange:
    return request.exchange(connection, names, {name: names.index(c) for name, c in request.inputs.items()})


def ints(models: Path) -> Request:
    return flightsvc.Model(models / "ints").request({"i": "i"}, {"total": "t"})


def numbered(first: int, rows: int) -> pa.RecordBatch:
    """Rows (n, 0, 0), whose total is n."""
    flat = np.zeros((rows, 3), np.int64)
    flat[:, 0] = np.arange(first, first + rows)
    lists = pa.ListArray.from_arrays(pa.array(range(0, 3 * rows + 1, 3), pa.int32()), flat.ravel())
    return pa.record_batch({"n": pa.array(range(first, first + rows)), "i": lists})


def batches(sizes: list[int]) -> Iterator[pa.RecordBatch]:
    first = 0
    for rows in sizes:
        yield numbered(first, rows)
        first += rows


def runner_of(client: flightsvc.Client, name: str) -> int:
    [pid] = [
        m["pid"] for m in client.status()["models"] if m["model"].endswith(name) and m["state"] == "ready"
    ]
    return int(pid)


def test_one_for_one_in_order(connection: Connection, models: Path):
    sizes = [1, 0, 7, 1000, 0, 3, *[11] * 50]
    sent = list(batches(sizes))
    answers = list(exchange(connection, ints(models), ["n", "i"]).answers(iter(sent)))
    assert [answer.outputs.num_rows for answer in answers] == sizes
    assert all(answer.batch is batch for answer, batch in zip(answers, sent, strict=True))
    for answer in answers:
        assert answer.outputs.schema.names == ["t"]
        assert answer.outputs["t"].to_pylist() == answer.batch["n"].to_pylist()


def test_nothing_in_nothing_out(connection: Connection, models: Path):
    assert list(exchange(connection, ints(models), ["n", "i"]).answers(iter([]))) == []


def test_the_answer_says_who_gave_it(connection: Connection, models: Path, client: flightsvc.Client):
    answers = list(exchange(connection, ints(models), ["n", "i"]).answers(batches([1, 1])))
    assert {answer.server for answer in answers} == {client.status()["server"]}


def test_the_callers_columns_are_not_copied(connection: Connection, models: Path):
    [answer] = exchange(connection, ints(models), ["n", "i"]).answers(batches([100]))
    beside = answer.joined("who")
    assert beside.schema.names == ["n", "i", "t", "who"]
    assert beside["n"].buffers()[1].address == answer.batch["n"].buffers()[1].address


def test_through_the_front_when_the_runner_cannot_be_reached(
    connection: Connection, models: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def runner(location: str) -> Any:
        asked.append(location)
        return stream.flight.FlightClient("grpc+unix:///nowhere/runner.sock")

    monkeypatch.setattr(connection, "runner", runner)
    answers = list(exchange(connection, ints(models), ["n", "i"]).answers(batches([5, 6])))
    assert [answer.outputs["t"].to_pylist() for answer in answers] == [list(range(5)), list(range(5, 11))]
    assert len(asked) == 1
    assert asked[0].startswith("grpc+unix:///")


def test_large_record_batches_are_cut_and_joined(connection: Connection, models: Path):
    rows = 4 << 20  # 96 MiB of int64[3]
    [answer] = exchange(connection, ints(models), ["n", "i"]).answers(batches([rows]))
    assert answer.outputs.num_rows == rows
    assert answer.outputs["t"].equals(answer.batch["n"])


def test_large_answers_come_as_one(connection: Connection, models: Path):
    request = flightsvc.Model(models / "ints").request({"i": "i"}, {"doubled": "d", "total": "t"})
    rows = 2_500_000  # 57 MiB in, 76 MiB out
    [answer] = exchange(connection, request, ["n", "i"]).answers(batches([rows]))
    assert answer.outputs["t"].equals(answer.batch["n"])
    assert answer.outputs["d"].flatten()[::3].to_pylist()[-3:] == [2 * (rows - k) for k in (3, 2, 1)]


def test_cuts_are_slices_that_cover_all_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "MESSAGE_BYTES", 1000)
    batch = numbered(0, 1001)
    cuts = list(stream._cut(batch, 0))
    assert max(cut.nbytes for cut in cuts) <= 1000
    assert pa.Table.from_batches(cuts).equals(pa.Table.from_batches([batch]))
    assert cuts[0]["n"].buffers()[1].address == batch["n"].buffers()[1].address


def test_a_row_beyond_the_limit_is_refused_by_column(
    connection: Connection, models: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "MESSAGE_BYTES", 1 << 20)
    monkeypatch.setattr(stream, "ROW_BYTES", 2 << 20)
    request = flightsvc.Model(models / "strings").request({"s": "s"})
    batch = pa.record_batch({"s": [b"a", b"b" * (3 << 20)]})
    with pytest.raises(
        flightsvc.InvalidArgumentError, match="row of 3 MiB, most of it in column 's'; at most 2"
    ):
        list(exchange(connection, request, ["s"]).answers(iter([batch])))


def test_the_window_is_bounded(connection: Connection, models: Path):
    pulled = itertools.count()
    last = 0

    def source() -> Iterator[pa.RecordBatch]:
        nonlocal last
        for batch in batches([10] * 40):
            last = next(pulled)
            yield batch

    for number, _ in enumerate(exchange(connection, ints(models), ["n", "i"]).answers(source())):
        assert last - number < stream.WINDOW_BATCHES


def test_stopping_early_is_no_error_and_leaves_nothing(connection: Connection, models: Path):
    for rows in (1, 1000, 200_000):  # 200,000 rows are 4.6 MiB: the helper is blocked in a write
        answers = exchange(connection, ints(models), ["n", "i"]).answers(batches([rows] * 20))
        assert next(answers).outputs["t"].to_pylist()[:1] == [0]
        begun = time.monotonic()
        answers.close()
        assert time.monotonic() - begun < 2
        assert not [t for t in threading.enumerate() if t.name == "flightsvc-writer"]
    answers = exchange(connection, ints(models), ["n", "i"]).answers(batches([5]))
    assert [answer.outputs["t"].to_pylist() for answer in answers] == [[0, 1, 2, 3, 4]]


def test_an_error_of_the_source_is_the_callers_own(connection: Connection, models: Path):
    class BrokenError(Exception):
        pass

    def source() -> Iterator[pa.RecordBatch]:
        yield from batches([5, 5])
        raise BrokenError

    with pytest.raises(BrokenError):
        list(exchange(connection, ints(models), ["n", "i"]).answers(source()))
    assert not [t for t in threading.enumerate() if t.name == "flightsvc-writer"]


@pytest.mark.parametrize("rows", [10, 100_000])
def test_a_killed_runner_costs_no_row(
    client: flightsvc.Client, connection: Connection, models: Path, rows: int
):
    seen: list[pa.Array] = []
    killed = []
    for number, answer in enumerate(
        exchange(connection, ints(models), ["n", "i"]).answers(batches([rows] * 20))
    ):
        seen.append(answer.outputs["t"])
        if number in (2, 9):
            killed.append(runner_of(client, "/ints"))
            os.kill(killed[-1], 9)
    assert len(set(killed)) == 2
    assert pa.concat_arrays(seen).equals(pa.array(range(20 * rows)))


def test_a_record_batch_that_always_loses_its_stream_is_named(
    client: flightsvc.Client, connection: Connection, models: Path, monkeypatch: pytest.MonkeyPatch
):
    read = stream._Stream.read
    lost = 0

    def kill_and_read(self: stream._Stream, rows: int) -> list[pa.RecordBatch]:
        nonlocal lost
        if rows == 13:
            lost += 1
            raise stream._Lost("the runner went away")
        return read(self, rows)

    monkeypatch.setattr(stream._Stream, "read", kill_and_read)
    request = ints(models)
    under_test = request.exchange(connection, ["n", "i"], {"i": 1}, "partition 3")
    with pytest.raises(flightsvc.UnavailableError, match="partition 3, record batch 1: 3 streams were lost"):
        list(under_test.answers(batches([5, 13, 5])))
    assert lost == 3


def test_a_refusal_is_not_tried_again(connection: Connection, models: Path):
    request = flightsvc.Model(models / "ints").request({"i": "n"})
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"'?n'?.*int64"):
        list(exchange(connection, request, ["n"]).answers(iter([pa.record_batch({"n": ["text"]})])))


def test_a_front_that_is_not_there_is_given_up(models: Path):
    settings = flightsvc.settings.Settings(retry_timeout="300ms")
    nowhere = Connection(lambda: "grpc+unix:///nowhere/front.sock", settings)
    with pytest.raises(ConnectionError, match="no answer from flightsvc for 0 s"):
        list(exchange(nowhere, ints(models), ["n", "i"]).answers(batches([1])))


def test_answers_before_an_error_are_not_lost(
    connection: Connection, client: flightsvc.Client, models: Path, monkeypatch: pytest.MonkeyPatch
):
    """The call ends while answers wait to be read, and then another record batch is to be written."""
    ended, send = False, stream._Stream.send

    def send_and_wait(self: stream._Stream, sent: stream._Slice) -> None:
        nonlocal ended

        def fails() -> bool:
            send(self, sent)  # gRPC may take one before it knows that the call has ended
            return self._failure is not None

        send(self, sent)
        if ended:
            until(fails, 10, "the failed write")
            ended = False

    monkeypatch.setattr(stream._Stream, "send", send_and_wait)
    one, bad = (pa.record_batch({"i": i}) for i in ([[1, 2, 3]], [[1, 2, 3], [4]]))
    got = []
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"row 1 of record batch 3\b"):
        for answer in exchange(connection, ints(models), ["i"]).answers(iter([one, one, one, bad, one, one])):
            got += answer.outputs.column("t").to_pylist()
            if len(got) == 1:
                until(lambda: not any(m["streams"] for m in client.status()["models"]), 10, "the end")
                ended = True
    assert got == [6] * 3
