"""Random models, columns, nulls, bad rows, streams and ways; TensorFlow in Python says what is right.

A case is one model with one to six streams at once, each with columns, record batches, policies and a way of
its own. A case that fails prints its number, which runs it alone: ``FLIGHTSVC_CASE=12.3`` is case 3 of model
12, ``FLIGHTSVC_CASE=12`` all cases of that model.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import property_columns
import property_models
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from figures import PROVE, report
from property_columns import BAD, NULL, OK, REFUSED, Cell, Column, Rng
from property_models import Made, Output
from pyspark.errors import PythonException

import flightsvc

SEED = 4
ONLY = os.environ.get("FLIGHTSVC_CASE")  # read at once: the tests take such variables away
MODELS = 36 if PROVE or ONLY else 12
CASES = 14 if PROVE or ONLY else 5
IN_SPARK = range(0, 36 if PROVE or ONLY else 6, 2)  # models whose first case has a stream of Spark's
MOST_STREAMS, MOST_BATCHES, MOST_ROWS = 6, 4, 300
RTOL, ATOL = 1e-4, 1e-6

tally: collections.Counter[str] = collections.Counter()
tally_mutex = threading.Lock()


def add(**numbers: int) -> None:
    with tally_mutex:
        tally.update(numbers)


# What is asked and sent.


@dataclasses.dataclass
class Ask:
    """What a stream asks for: the fields of its descriptor, and how it goes there."""

    way: str
    outputs: list[Output]
    columns: dict[str, str]  # output to column
    utf8: list[str]
    layout: str
    on_error: str
    nulls: str
    batching: Any
    inputs_named: bool
    outputs_named: bool

    def options(self, output: Output) -> dict[str, Any]:
        """Return what the mapping says of an output besides its column."""
        further: dict[str, Any] = {"type": "utf8"} if output.name in self.utf8 else {}
        if not output.rank_known:
            further["shape"] = [-1, *(-1 if d is None else d for d in output.dims)]
        return further


@dataclasses.dataclass(repr=False)
class Stream:
    """One stream of a case: its columns and record batches, and what every cell of them says."""

    number: int
    made: Made
    ask: Ask
    columns: list[Column]
    names: dict[str, str]  # input to column
    cells: list[dict[str, list[Cell]]]  # of each record batch, by input
    batches: list[pa.RecordBatch]
    ragged: bool
    together: threading.Barrier | None = None  # streams that begin to send at one moment

    def start(self) -> None:
        """Wait for the other streams; not for long, since they may have been refused."""
        if self.together is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.together.wait(1)

    def __str__(self) -> str:
        sizes = [batch.num_rows for batch in self.batches]
        lines = [f"stream {self.number}: {self.ask}, rows {sizes}{', ragged' if self.ragged else ''}"]
        return "\n    ".join([*lines, *map(str, self.columns)])


def random_ask(rng: Rng, made: Made, way: str, like: Ask | None) -> Ask:
    """Return what a stream asks for; with ``like`` the same outputs, and batching too more often than not."""
    outputs = like.outputs if like else []
    if not outputs:
        order = rng.permutation(len(made.outputs))[: int(rng.integers(1, len(made.outputs) + 1))]
        outputs = [made.outputs[int(i)] for i in order]
    named = len(outputs) < len(made.outputs) or rng.random() < 0.7 or not all(o.rank_known for o in outputs)
    if not named:
        outputs = sorted(outputs, key=lambda o: o.name)
    shaped = all(None not in o.dims for o in outputs)
    batching = [None, "off", {"batch_timeout_micros": int(rng.integers(0, 10_001))}]
    batching += [{**batching[2], "max_batch_size": int(rng.choice([1, 7, 64, 500]))}]
    chosen = batching[int(rng.choice(4, p=[0.2, 0.1, 0.5, 0.2]))]
    return Ask(
        way=way,
        outputs=outputs,
        columns={o.name: f"p{i}" if named and rng.random() < 0.5 else o.name for i, o in enumerate(outputs)},
        utf8=[o.name for o in outputs if named and o.dtype == "string" and rng.random() < 0.5],
        layout="tensor" if shaped and way != "spark" and rng.random() < 0.3 else "list",
        on_error=str(rng.choice(["fail", "null", "column", "column"])),
        nulls="fail" if rng.random() < 0.2 else "null",
        batching=like.batching if like and rng.random() < 0.9 else chosen,
        inputs_named=bool(rng.random() < 0.7),
        outputs_named=named,
    )


def random_stream(
    rng: Rng, number: int, made: Made, way: str, dims: list[list[int]], like: Ask | None
) -> Stream:
    spark = way == "spark"
    ask = random_ask(rng, made, way, like)
    columns = []
    lengths = {
        x.lengths_of: x.name for x in made.inputs if x.lengths_of and (not spark and rng.random() < 0.7)
    }
    for x, sizes in zip(made.inputs, dims, strict=True):
        if x.name not in lengths.values():
            columns.append(property_columns.random_column(rng, x, sizes, lengths.get(x.name), spark))
    ask.inputs_named |= any(column.entry for column in columns)
    if any(column.padded and None in column.feeds.dims for column in columns):
        for column in columns:  # how long a refused row's lists are may count or not
            column.bad_rate = column.bad_rate if column.feeds.numbers else 0.0
    names = {c.feeds.name: f"c{i}" if ask.inputs_named else c.feeds.name for i, c in enumerate(columns)}
    ragged = not spark and rng.random() < 0.06 and any(map(can_be_ragged, columns))
    ragged &= all(column.kind != "null" for column in columns)  # rows with a null never meet
    if ragged:
        for column in columns:
            column.null_rate = column.bad_rate = 0.0
    sizes = [
        int(rng.choice([0, 1, rng.integers(2, 10), rng.integers(2, MOST_ROWS)]))
        for _ in range(rng.integers(1, 2 if spark else MOST_BATCHES + 1))
    ]
    if spark:
        sizes = [max(1, sizes[0])]
    order = ["row", *rng.permutation([*names.values(), "unused"]).tolist()]
    if len(columns) == 1 and not spark and not ask.inputs_named:
        order = list(names.values())  # the only column feeds the only input
    cells, batches = [], []
    for n in sizes:
        said = {column.feeds.name: column.cells(rng, n) for column in columns}
        if ragged and n > 1:
            column = next(filter(can_be_ragged, columns))
            for row, length in ((0, 2), (n - 1, 3)):
                inner = [column.inside(rng, 1) for _ in range(length)]
                said[column.feeds.name][row] = Cell(OK, inner)
        cells.append(said)
        batches.append(record_batch(rng, columns, names, said, order, n))
    return Stream(number, made, ask, columns, names, cells, batches, ragged)


def can_be_ragged(column: Column) -> bool:
    if column.kind != "lists" or column.padded or column.levels[:1] == ["fixed"]:
        return False
    return bool(column.levels) and column.feeds.dims[0] is None and not column.varies


def record_batch(
    rng: Rng,
    columns: list[Column],
    names: dict[str, str],
    said: dict[str, list[Cell]],
    order: list[str],
    n: int,
) -> pa.RecordBatch:
    """Write cells into the columns of ``order``, at times as a slice of a larger record batch."""
    before, after = (int(v) for v in rng.integers(0, 4, 2)) if n and rng.random() < 0.3 else (0, 0)
    most = before + n + after
    arrays: dict[str, pa.Array] = {
        "row": pa.array(range(most), pa.int64()),
        "unused": pa.array([None if i % 3 else "x" for i in range(most)], pa.string()),
    }
    for column in columns:
        cells = said[column.feeds.name]
        cells = [*cells[:1] * before, *cells, *cells[:1] * after]
        arrays[names[column.feeds.name]] = column.array(rng, cells)
    return pa.record_batch({name: arrays[name] for name in order}).slice(before, n)


# What is expected.


@dataclasses.dataclass
class Expected:
    """The answer to one record batch: by output one value per row, ``None`` where it is null."""

    outputs: dict[str, list[Any]]
    refused: set[int]
    at_once: set[int]  # the refused rows that no run was needed for


def expect(stream: Stream, said: dict[str, list[Cell]], n: int) -> Expected:
    """Say row by row what becomes of a record batch, and let TensorFlow run the rows that are left."""
    ask = stream.ask
    null = {i for cells in said.values() for i, cell in enumerate(cells) if cell.state == NULL}
    bad = {i for cells in said.values() for i, cell in enumerate(cells) if cell.state == BAD} - null
    bad |= null if ask.nulls == "fail" else set()
    kept = [i for i in range(n) if i not in null and i not in bad]
    stubborn = {i for cells in said.values() for i, cell in enumerate(cells) if cell.state == REFUSED}
    refused = bad | (stubborn & set(kept))
    outputs: dict[str, list[Any]] = {o.name: [None] * n for o in ask.outputs}
    run = [at for at, i in enumerate(kept) if i not in stubborn]
    if run:
        tensors = {}
        for column in stream.columns:
            values = [said[column.feeds.name][i].value for i in kept]
            tensors[column.feeds.name] = column.tensor(values)[run]
            if "lengths" in column.entry:
                tensors[column.entry["lengths"]] = np.array(column.lengths(values))[run]
        got = stream.made.run(tensors)
        for output in ask.outputs:
            for at, value in zip(run, got[output.name], strict=True):
                outputs[output.name][kept[at]] = value
    for name in ask.utf8:
        for i, value in enumerate(outputs[name]):
            if value is not None and not all(is_utf8(v) for v in np.ravel(np.asarray(value, object))):
                refused.add(i)
    for values in outputs.values():
        for i in refused:
            values[i] = None
    return Expected(outputs, refused, bad)


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


LIST_TYPES = {"uint8": "int16", "uint16": "int32", "uint32": "int64", "float16": "float32"}


def answer_type(ask: Ask, output: Output) -> pa.DataType:
    """Return the type of an output's column as the contract has it."""
    if output.dtype == "string":
        leaf = pa.string() if output.name in ask.utf8 else pa.binary()
    elif output.dtype == "uint64" and ask.layout == "list":
        leaf = pa.decimal128(20, 0)
    elif output.dtype == "bfloat16":
        leaf = pa.float32()
    else:
        name = output.dtype if ask.layout == "tensor" else LIST_TYPES.get(output.dtype, output.dtype)
        leaf = pa.bool_() if name == "bool" else getattr(pa, name)()
    if ask.layout == "tensor" and output.dims:
        return pa.fixed_shape_tensor(leaf, list(output.dims))
    for _ in output.dims:
        leaf = pa.list_(leaf)
    return leaf


def check_values(ask: Ask, output: Output, got: list[Any], want: list[Any]) -> None:
    """Compare one output, row by row; floats of sums by tolerance, all else exactly."""
    assert [v is None for v in got] == [v is None for v in want], f"{output.name}: other rows are null"
    at = [i for i, v in enumerate(want) if v is not None]
    if not at:
        return
    flat = ask.layout == "tensor" and bool(output.dims)
    if output.dtype == "string":
        for i in at:
            value = np.asarray(want[i], object)
            value = (value.ravel() if flat else value).tolist()
            assert plain(got[i]) == plain(value), f"{output.name}, row {i}"
        return
    expected = np.stack([want[i] for i in at])
    expected = expected.reshape(len(at), -1) if flat else expected
    if output.dtype in property_models.FLOATS:
        ours = np.array([got[i] for i in at], np.float64).reshape(expected.shape)
        theirs = expected.astype(np.float64)
        if output.exact:
            np.testing.assert_array_equal(ours, theirs, f"{output.name}, {output.op}")
        else:
            np.testing.assert_allclose(ours, theirs, RTOL, ATOL, err_msg=f"{output.name}, {output.op}")
        return
    for i, value in zip(at, expected.tolist(), strict=True):
        assert got[i] == value, f"{output.name}, {output.op}, row {i}"


def plain(value: Any) -> Any:
    """Return strings, nested or not, as bytes."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.encode() if isinstance(value, str) else bytes(value)


def check_answer(stream: Stream, want: Expected | None, got: dict[str, list[Any]]) -> None:
    """Compare the answer to a record batch; ``None`` where the stream is to end and this one came before."""
    if want is None:
        return
    ask = stream.ask
    for output in ask.outputs:
        check_values(ask, output, got[ask.columns[output.name]], want.outputs[output.name])
    if ask.on_error == "column":
        texts = {i for i, text in enumerate(got["error"]) if text is not None}
        assert texts == want.refused, "other rows have an error text"
        assert all(got["error"][i] for i in texts)


def values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return [
        v
        for chunk in chunks
        for v in (chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk).to_pylist()
    ]


def check_schema(stream: Stream, schema: pa.Schema) -> None:
    ask = stream.ask
    for output in ask.outputs:
        assert schema.field(ask.columns[output.name]).type == answer_type(ask, output), output
    assert ("error" in schema.names) == (ask.on_error == "column")


# The ways.


def run_stream(stream: Stream, client: flightsvc.Client, front: flight.FlightClient, spark: Any) -> None:
    """Send a stream on its way and check all that comes back."""
    ends = stream.ragged and any(batch.num_rows > 1 for batch in stream.batches)
    sent = zip(stream.cells, stream.batches, strict=True)
    wanted = [None if ends else expect(stream, said, batch.num_rows) for said, batch in sent]
    blamed = next((i for i, want in enumerate(wanted) if want is not None and want.refused), None)
    fails = stream.ask.on_error == "fail" and blamed is not None
    answer = {"shim": by_shim, "spark": by_spark}.get(stream.ask.way, by_flight)
    place = {"shim": client, "spark": spark}.get(stream.ask.way, front)
    if ends or fails:
        kind = {"shim": flightsvc.InvalidArgumentError, "spark": PythonException}.get(
            stream.ask.way, pa.ArrowInvalid
        )
        with pytest.raises(kind) as caught:
            answer(stream, place, wanted)
        told = str(caught.value)
        assert stream.made.folder.name in told, told
        if ends:
            assert "pad" in told, told
        else:
            found = re.search(r"row (\d+) of record batch (\d+)", told)
            assert found, told
            if stream.ask.way != "spark":  # Spark makes record batches of its own
                row, batch = int(found[1]), int(found[2])
                want = wanted[blamed]
                assert batch == blamed, told
                assert row == min(want.at_once or want.refused), told
        add(streams_refused=1)
    else:
        answer(stream, place, wanted)
    add(**{f"way_{stream.ask.way}": 1, "streams": 1, "rows": sum(batch.num_rows for batch in stream.batches)})


def mapping(stream: Stream) -> dict[str, Any]:
    """Return the entries of the descriptor's inputs."""
    return {
        c.feeds.name: {"column": stream.names[c.feeds.name], **c.entry}
        if c.entry
        else stream.names[c.feeds.name]
        for c in stream.columns
    }


def descriptor(stream: Stream) -> dict[str, Any]:
    ask = stream.ask
    fields: dict[str, Any] = {"v": 1, "model": stream.made.folder.as_uri(), "on_error": ask.on_error}
    fields |= {"nulls": ask.nulls, "layout": ask.layout}
    if ask.inputs_named:
        fields["inputs"] = mapping(stream)
    if ask.outputs_named:
        fields["outputs"] = {
            o.name: {"column": ask.columns[o.name], **ask.options(o)}
            if ask.options(o)
            else ask.columns[o.name]
            for o in ask.outputs
        }
    if ask.batching is not None:
        fields["batching"] = ask.batching
    return fields


def by_flight(stream: Stream, front: flight.FlightClient, wanted: list[Expected | None]) -> None:
    """Go there with pyarrow alone: redirected, relayed on a ticket, or relayed on a plain descriptor."""
    with contextlib.ExitStack() as stack:
        end = time.monotonic() + 30
        while True:
            writer, reader = opened(stream, front, stack)
            try:
                check_schema(stream, reader.schema)
                break
            except flight.FlightUnavailableError as error:  # the queue is full: ask again, as told to
                told = re.search(r"ask again in (\d+) ms", str(error))
                if told is None or time.monotonic() > end:
                    raise
                add(streams_that_asked_again=1)
                time.sleep(int(told[1]) / 1e3)
        failures: list[Exception] = []

        def write() -> None:
            try:
                for batch in stream.batches:
                    writer.write_batch(batch)
            except Exception as error:
                failures.append(error)

        stream.start()
        helper = threading.Thread(target=write)
        helper.start()
        try:
            for number, want in enumerate(wanted):
                parts, about = [], {"last": False}
                while not about["last"]:
                    chunk = reader.read_chunk()
                    about = json.loads(chunk.app_metadata.to_pybytes())
                    assert about["batch"] == number
                    parts.append(chunk.data)
                table = pa.Table.from_batches(parts)
                rows = stream.batches[number].num_rows
                assert table.num_rows == rows
                check_answer(stream, want, {name: values(table[name]) for name in table.schema.names})
                if about.get("tf_rows", 0) > rows:
                    add(answers_that_shared_a_run=1)
            helper.join(10)
            assert not failures
            writer.done_writing()  # by the thread that reads: Flight's client is not safe for two here
            with pytest.raises(StopIteration):
                reader.read_chunk()
        finally:
            reader.cancel()
            helper.join(10)


def opened(stream: Stream, front: flight.FlightClient, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """Open the stream and send its schema; the server may refuse it still."""
    body = json.dumps(descriptor(stream)).encode()
    options = flight.FlightCallOptions(timeout=60)
    place = front
    if stream.ask.way != "front":
        asked = json.dumps({**descriptor(stream), "redirect": stream.ask.way == "redirect"}).encode()
        [endpoint] = front.get_flight_info(flight.FlightDescriptor.for_command(asked), options).endpoints
        body = endpoint.ticket.ticket
        assert bool(endpoint.locations) == (stream.ask.way == "redirect")
        if endpoint.locations:
            place = stack.enter_context(flight.FlightClient(endpoint.locations[0].uri))
    writer, reader = place.do_exchange(flight.FlightDescriptor.for_command(body), options)

    def close() -> None:
        with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
            writer.close()

    stack.callback(close)
    with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):  # reading tells
        writer.begin(stream.batches[0].schema)
    return writer, reader


def shim_options(stream: Stream) -> dict[str, Any]:
    """Return the keyword arguments that ask the shim for the same."""
    ask = stream.ask
    options: dict[str, Any] = {"on_error": ask.on_error, "nulls": ask.nulls, "batching": ask.batching}
    if ask.inputs_named:
        options["inputs"] = {
            c.feeds.name: flightsvc.Input(stream.names[c.feeds.name], **c.entry) for c in stream.columns
        }
    renamed = {o.name: ask.columns[o.name] for o in ask.outputs}
    if ask.outputs_named:
        options["outputs"] = {
            o.name: flightsvc.Output(renamed[o.name], **ask.options(o)) for o in ask.outputs
        }
    return options


def by_shim(stream: Stream, client: flightsvc.Client, wanted: list[Expected | None]) -> None:
    table = pa.Table.from_batches(stream.batches)
    got = client.predict(stream.made.folder, table, layout=stream.ask.layout, **shim_options(stream))
    check_schema(stream, got.schema)
    new = [stream.ask.columns[o.name] for o in stream.ask.outputs]
    new += ["error"] if stream.ask.on_error == "column" else []
    assert got.schema.names == [*table.schema.names, *new]
    assert got.select(table.schema.names).schema == table.schema
    if "row" in table.schema.names:
        assert got["row"] == table["row"]
    columns = {name: values(got[name]) for name in new}
    at = 0
    for batch, want in zip(stream.batches, wanted, strict=True):
        check_answer(stream, want, {name: rows[at : at + batch.num_rows] for name, rows in columns.items()})
        at += batch.num_rows
    assert got.num_rows == at


def by_spark(stream: Stream, spark: Any, wanted: list[Expected | None]) -> None:
    table = pa.Table.from_batches(stream.batches)
    table = table.take(
        list(range(table.num_rows))
    )  # no slice: Spark's way of reading tables has a limit there
    frame = spark.createDataFrame(table).coalesce(1)
    model = flightsvc.Model(stream.made.folder)
    rows = sorted(model.transform(frame, **shim_options(stream)).collect(), key=lambda row: row["row"])
    [want] = wanted
    names = [stream.ask.columns[o.name] for o in stream.ask.outputs]
    names += ["error"] if stream.ask.on_error == "column" else []
    check_answer(stream, want, {name: [row[name] for row in rows] for name in names})


# The cases.


@pytest.fixture
def front(endpoint: str) -> Iterator[flight.FlightClient]:
    with flight.FlightClient(endpoint) as client:
        yield client


@pytest.fixture
def spark_here(spark: Any, endpoint: str) -> Iterator[Any]:
    """Spark whose workers use the same front, so that all ways meet in one runner."""
    spark.conf.set("spark.flightsvc.endpoint", endpoint)
    yield spark
    spark.conf.unset("spark.flightsvc.endpoint")


def random_case(rng: Rng, made: Made, ways: list[str]) -> list[Stream]:
    streams = int(rng.integers(1, MOST_STREAMS + 1))
    ways = [*ways, *rng.choice(["shim", "redirect", "relay", "front"], streams).tolist()]
    alike = rng.random() < 0.7  # ask for the same outputs, with the same sizes: such may share a run
    like = random_ask(rng, made, "front", None) if alike else None
    dims = random_sizes(rng, made)
    return [
        random_stream(rng, i, made, way, dims if alike else random_sizes(rng, made), like)
        for i, way in enumerate(ways)
    ]


def random_sizes(rng: Rng, made: Made) -> list[list[int]]:
    return [[int(rng.integers(1, 5)) if d is None else d for d in x.dims] for x in made.inputs]


def run_cases(
    number: int, cases: range, client: flightsvc.Client, front: flight.FlightClient, folder: Path, spark: Any
) -> None:
    only = [int(part) for part in ONLY.split(".")] if ONLY else None
    if only and (only[0] != number or (only[1:] and only[1] not in cases)):
        pytest.skip("another case was asked for")
    made = property_models.make(np.random.default_rng([SEED, number]), number, folder / f"model{number}")
    for case in cases:
        if only and only[1:] not in ([], [case]):
            continue
        streams = random_case(np.random.default_rng([SEED, number, case]), made, ["spark"] if spark else [])
        plain = [stream for stream in streams if stream.ask.way not in ("shim", "spark")]
        together = threading.Barrier(max(1, len(plain)))
        for stream in plain:
            stream.together = together
        with ThreadPoolExecutor(len(streams)) as pool:
            done = [pool.submit(run_stream, stream, client, front, spark) for stream in streams]
        for stream, future in zip(streams, done, strict=True):
            if (error := future.exception()) is not None:
                inputs, outputs = (", ".join(map(str, side)) for side in (made.inputs, made.outputs))
                error.add_note(f"FLIGHTSVC_CASE={number}.{case}; {inputs}; {outputs}\n{stream}")
                raise error
        add(cases=1)
    about = counted(client, made)
    add(runs=about["runs"], joined_runs=about["joined_runs"])
    unload(front, made)


@pytest.mark.parametrize("number", range(MODELS))
def test_a_model(number: int, client: flightsvc.Client, front: flight.FlightClient, tmp_path: Path):
    run_cases(number, range(int(number in IN_SPARK), CASES), client, front, tmp_path, None)


def counted(client: flightsvc.Client, made: Made) -> dict[str, Any]:
    """Return what status says of a model, once its streams have reported that they are over."""
    end = time.monotonic() + 5
    while True:
        [about] = [m for m in client.status()["models"] if m["dir"] == str(made.folder)]
        if not about["streams"] or time.monotonic() > end:
            return about
        time.sleep(0.02)


def unload(front: flight.FlightClient, made: Made) -> None:
    body = json.dumps({"model": made.folder.as_uri()}).encode()
    [result] = front.do_action(flight.Action("model.unload", body))
    assert json.loads(result.body.to_pybytes())["state"] == "unloaded"


def test_that_streams_shared_runs_and_every_way_was_taken():
    if ONLY:
        pytest.skip("one case alone")
    report(
        property_seed=SEED, property_models=MODELS, **{f"property_{k}": v for k, v in sorted(tally.items())}
    )
    assert tally["cases"] == MODELS * CASES - len(IN_SPARK)
    assert tally["joined_runs"] > 0
    assert tally["answers_that_shared_a_run"] > 0
    for way in ("shim", "redirect", "relay", "front"):
        assert tally[f"way_{way}"] > 0, way
    assert tally["streams_refused"] > 0


@pytest.mark.parametrize("number", IN_SPARK)
def test_a_model_in_spark(
    number: int, client: flightsvc.Client, front: flight.FlightClient, spark_here: Any, tmp_path: Path
):
    before = tally["way_spark"]
    run_cases(number, range(1), client, front, tmp_path, spark_here)
    assert tally["way_spark"] > before
    report(property_way_spark=tally["way_spark"])
