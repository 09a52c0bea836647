"""The golden files, as pyarrow and the shim see them; handlers/golden_test.go reads the same files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from conftest import ROOT

import flightsvc
from flightsvc import ImageInput, Input, Model, Output
from flightsvc.request import Request
from flightsvc.server import sidecar
from flightsvc.server.connection import Connection
from flightsvc.settings import Settings

GOLDEN = ROOT / "testdata" / "golden"
MODEL = "file:///models/m"


@pytest.fixture(scope="module")
def client(surroundings: Path) -> Iterator[flightsvc.Client]:
    """A client of a front of its own, which keeps pushed models among the files of this test run."""
    settings = Settings(
        binary=os.environ["FLIGHTSVC_BINARY"],
        run_dir=str(surroundings / "golden"),
        cache_dir=str(surroundings / "golden-cache"),
    )
    with flightsvc.Client(Connection(lambda: sidecar.for_user(settings), settings)) as client:
        yield client
        client.shutdown()


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def batches(name: str) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    with pa.ipc.open_stream(GOLDEN / name) as reader:
        return reader.schema, list(reader)


def asked(**about: Any) -> Callable[[], Request]:
    """What a caller writes: arguments of Model, ImageInput and all, and of Model.request."""
    kinds = ("signature", "version", "preprocess")
    model = {name: about.pop(name) for name in kinds if name in about}
    return lambda: Model(MODEL, **model).request(**about)


# By the names of the golden descriptors. The shim writes neither what the server takes as a default, nor a
# plane; redirect, the request id and the lease belong to the stream, not to the request.
WRITTEN: dict[str, Callable[[], Request]] = {
    "the least": asked(),
    "a version by text": asked(version=7),
    "another signature": asked(signature="embed"),
    "a GPU of those that Spark gave": asked(device="0,1"),
    "a GPU by its UUID": asked(device="GPU-1c2d3e4f-0a1b-2c3d-4e5f-60718293a4b5"),
    "inputs": asked(inputs={"x": "f"}),
    "inputs in their order": asked(inputs={"z": "1", "a": "2", "m": "3"}),
    "raw cells": asked(inputs={"x": Input("f", encoding="raw")}),
    "padded lists": asked(inputs={"x": Input("f", pad=0)}),
    "padded lists with lengths": asked(inputs={"x": Input("f", pad=-1.5, lengths="len")}),
    "padded strings": asked(inputs={"x": Input("f", pad="")}),
    "padded bools": asked(inputs={"x": Input("f", pad=False)}),
    "outputs in their order": asked(outputs={"z": "1", "a": "2", "m": "3"}),
    "an output as text": asked(outputs={"y": Output("p", type="utf8")}),
    "an output's shape": asked(outputs={"y": Output("p", shape=(-1, 3))}),
    "pictures": asked(preprocess={"image": ImageInput((2, 3))}),
    "pictures, scaled": asked(preprocess={"image": ImageInput((2, 3), scale=0.5, offset=(1.5, 2.5, 3.5))}),
    "on_error null": asked(on_error="null"),
    "on_error column": asked(on_error="column"),
    "another error column": asked(on_error="column", error_column="why"),
    "nulls fail": asked(nulls="fail"),
    "layout tensor": asked(layout="tensor"),
    "no run timeout": asked(run_timeout=0),
    "a run timeout": asked(run_timeout=1.5),
    "batching off": asked(batching="off"),
    "batching limits": asked(batching={"max_batch_size": 64, "batch_timeout_micros": 1000}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_shim_writes_the_golden_descriptor(name: str):
    [text] = [case["text"] for case in golden("descriptors.json")["taken"] if case["name"] == name]
    assert json.dumps(WRITTEN[name]().descriptor()) == text


def test_a_server_takes_and_refuses_them(client: flightsvc.Client):
    """Those that are taken name a model that is not there; the others are refused before it is looked for."""
    front = flight.connect(client._connection._find())
    cases = golden("descriptors.json")
    for case in cases["taken"]:
        with pytest.raises(pa.ArrowKeyError, match=MODEL):
            front.get_schema(flight.FlightDescriptor.for_command(case["text"]))
    for case in cases["refused"]:
        with pytest.raises(pa.ArrowInvalid) as refusal:
            front.get_schema(flight.FlightDescriptor.for_command(case["text"]))
        assert [words for words in case["says"] if words not in str(refusal.value)] == [], case["name"]
    client.push(GOLDEN / "model")
    for case in cases["unfit"]:
        kind = pa.ArrowKeyError if case["name"] == "no such signature" else pa.ArrowInvalid
        with pytest.raises(kind) as refusal:
            front.get_schema(flight.FlightDescriptor.for_command(case["text"]))
        assert [words for words in case["says"] if words not in str(refusal.value)] == [], case["name"]


def test_columns_are_what_pyarrow_reads():
    schema, rows = batches("columns.arrows")
    assert [batch.num_rows for batch in rows] == [5, 0, 2]
    for batch in rows:
        batch.validate(full=True)
    asks = golden("columns.json")
    assert {ask["entry"]["column"] for ask in asks} == set(schema.names)
    assert isinstance(schema.field("fixed_shape_tensor").type, pa.FixedShapeTensorType)


@pytest.mark.parametrize("name", ["ints", "strings"])
@pytest.mark.parametrize("redirect", [True, False])
def test_a_server_gives_the_golden_answer(
    client: flightsvc.Client, models: Path, oracle: Callable[..., dict[str, Any]], name: str, redirect: bool
):
    front = flight.connect(client._connection._find())
    schema, questions = batches(f"questions-{name}.arrows")
    expected, answers = batches(f"answers-{name}.arrows")
    descriptor = {"v": 1, "model": (models / name).as_uri(), "redirect": redirect}
    command = flight.FlightDescriptor.for_command(json.dumps(descriptor))
    assert front.get_schema(command).schema.equals(expected)
    info = front.get_flight_info(command)
    assert info.schema.equals(expected)
    [place] = info.endpoints
    assert bool(place.locations) == redirect
    server = flight.connect(place.locations[0]) if redirect else front
    writer, reader = server.do_exchange(flight.FlightDescriptor.for_command(place.ticket.ticket))
    with writer:
        writer.begin(schema)
        assert reader.schema.equals(expected)
        for question in questions:
            writer.write_batch(question)
        writer.done_writing()
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            chunk = reader.read_chunk()
            assert chunk.data.to_pylist() == answer.to_pylist()
            about = json.loads(chunk.app_metadata.to_pybytes())
            first, *_ = golden("app_metadata.json")
            fields = first["says"] if number == 0 else {**first["says"], "server": None, "form": None}
            assert set(about) == {key for key, value in fields.items() if value is not None}
            assert (about["batch"], about["last"]) == (number, True)
            assert all(isinstance(about[key], int) for key in ("queue_us", "run_us", "total_us", "tf_rows"))
            # TensorFlow in Python says the same about the rows without a null.
            rows = [i for i, row in enumerate(answer.to_pylist()) if None not in row.values()]
            if rows:
                [column] = question.columns
                truth = oracle(name, **{schema.names[0]: np.array([column[i].as_py() for i in rows])})
                for output, values in truth.items():
                    assert [answer[output][i].as_py() for i in rows] == values.tolist()
        with pytest.raises(StopIteration):
            reader.read_chunk()


def test_status_has_the_golden_fields(client: flightsvc.Client, models: Path):
    client.predict(models / "ints", pa.table({"i": pa.array([[1, 2, 3]], pa.list_(pa.int64()))}))
    got, want = client.status(), golden("status.json")
    assert {key: type(value) for key, value in got.items()} == {
        key: type(value) for key, value in want.items()
    }
    assert got["v"] == want["v"]
    [model] = [model for model in got["models"] if model["model"] == (models / "ints").as_uri()]
    assert {k: type(v) for k, v in model.items()} == {k: type(v) for k, v in want["models"][0].items()}


def test_the_golden_digest():
    want = golden("digest.json")
    folder = GOLDEN / "model"
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    lines = [
        f"{path} {len(files[path])} {hashlib.sha256(files[path]).hexdigest()}\n"
        for path in sorted(files, key=str.encode)
    ]
    assert lines == want["lines"]
    assert f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}" == want["digest"]


def test_a_pushed_model_and_the_golden_metadata(client: flightsvc.Client):
    """DoPut of the archive, cut anywhere; then the schema of the answer of the model that it holds."""
    front = flight.connect(client._connection._find())
    digest = golden("digest.json")["digest"]
    archive = (GOLDEN / "model.tar").read_bytes()
    chunk = pa.schema([("chunk", pa.binary())])
    writer, reader = front.do_put(flight.FlightDescriptor.for_command('{"v":1,"put":"model"}'), chunk)
    with writer:
        for start in range(0, len(archive), 1000):
            writer.write_batch(pa.record_batch([[archive[start : start + 1000]]], schema=chunk))
        writer.done_writing()
        answer = json.loads(reader.read().to_pybytes())
    assert answer["digest"] == digest
    command = {"v": 1, "put": "model", "digest": digest}
    writer, reader = front.do_put(flight.FlightDescriptor.for_command(json.dumps(command)), chunk)
    assert json.loads(reader.read().to_pybytes()) == {"digest": digest, "known": True}
    writer.close()
    assert client.push(GOLDEN / "model") == digest

    want = golden("schema_metadata.json")
    descriptor = {**want.pop("descriptor"), "model": digest}
    schema = front.get_schema(flight.FlightDescriptor.for_command(json.dumps(descriptor))).schema
    got = {key.decode(): json.loads(value) for key, value in schema.metadata.items()}
    assert got == {**want, "flightsvc.v": 1}
    assert schema.equals(pa.schema([("y", pa.list_(pa.float32()))]))
