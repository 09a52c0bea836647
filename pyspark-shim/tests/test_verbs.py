"""What a front does besides inference: models listed, loaded, unloaded and pushed."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from processes import until

import flightsvc
from flightsvc.server import archive, sidecar
from flightsvc.server.connection import Connection
from flightsvc.settings import Settings

CHUNKS = pa.schema([pa.field("chunk", pa.binary())])
INTS = pa.table({"i": [[1, 2, 3], [4, 5, 6]]})


@pytest.fixture(scope="module")
def front(surroundings: Path, models: Path) -> Iterator[flightsvc.Client]:
    """A front of its own, with the test's models as its repository."""
    settings = Settings(
        binary=os.environ["FLIGHTSVC_BINARY"],
        run_dir=str(surroundings / "verbs"),
        cache_dir=str(surroundings / "verbs-cache"),
        model_root=str(models),
    )
    with flightsvc.Client(Connection(lambda: sidecar.for_user(settings), settings)) as client:
        yield client
        client.shutdown()


@pytest.fixture
def pushed(surroundings: Path) -> Callable[[], list[str]]:
    """Returns what the folder of pushed models holds now."""
    return lambda: sorted(path.name for path in (surroundings / "verbs-cache" / "models").glob("*"))


def put(
    front: flightsvc.Client, command: Any, pieces: list[Any], schema: pa.Schema = CHUNKS
) -> dict[str, Any]:
    """Send pieces with a raw DoPut and return its answer."""
    descriptor = flight.FlightDescriptor.for_command(json.dumps(command))
    writer, results = front._connection.front().do_put(descriptor, schema)
    with writer:
        for piece in pieces:
            column = pa.array([piece], schema.field(0).type)
            writer.write_batch(pa.record_batch([column], schema=schema))
        writer.done_writing()
        answer: dict[str, Any] = json.loads(results.read().to_pybytes())
        return answer


def state(front: flightsvc.Client, name: str) -> str:
    return next(model["state"] for model in front.models() if model["name"] == name)


def is_ready(front: flightsvc.Client, model: str) -> bool:
    return bool(front._connection.action("model.ready", {"model": model})["ready"])


def test_the_digest_is_that_of_the_server(tmp_path: Path):
    contents = {
        "variables/variables.index": "index",
        "saved_model.pb": "graph",
        "a b": "",
        "a": "1",
        "assets/grün.txt": "x\n",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    # TestDigest in modelcache/repository/store_test.go has the same one.
    assert archive.digest(tmp_path) == (
        "sha256:b859b76bdc3d55cfa86abd9b0b3e7861198ac925c0a9e95f14ee80cfc2f60860"
    )


def test_the_archive_is_a_plain_tar_and_always_the_same(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "CHUNK_BYTES", 1000)
    pieces = list(archive.chunks(models / "mlp"))
    assert {len(piece) for piece in pieces[:-1]} == {1000}
    assert pieces == list(archive.chunks(models / "mlp"))
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces)), mode="r:") as tar:
        names = tar.getnames()
        assert names == archive.files(models / "mlp") == sorted(names)
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None and file.read() == (models / "mlp" / member.name).read_bytes()


def test_push_then_predict(
    front: flightsvc.Client,
    models: Path,
    oracle: Callable[..., dict[str, Any]],
    pushed: Callable[[], list[str]],
):
    digest = front.push(models / "ints")
    assert digest == archive.digest(models / "ints")
    assert pushed() == [digest.removeprefix("sha256:")]
    assert front.push(models / "ints") == digest
    answer = put(front, {"v": 1, "put": "model"}, list(archive.chunks(models / "ints")))
    assert answer == {"digest": digest, "known": True}
    assert put(front, {"v": 1, "put": "model", "digest": digest}, []) == {"digest": digest, "known": True}
    assert pushed() == [digest.removeprefix("sha256:")]

    got = front.predict(flightsvc.Model(digest), INTS)
    expected = oracle("ints", i=np.array(INTS["i"].to_pylist(), np.int64))
    assert got["doubled"].to_pylist() == expected["doubled"].tolist()
    assert got["total"].to_pylist() == expected["total"].tolist()
    assert {"name": digest, "version": "1", "state": "ready"} in front.models()
    assert front.metadata(digest)["model"] == digest
    front.unload(digest)
    assert state(front, digest) == "unloaded"


def test_pushes_of_one_model_at_once(
    front: flightsvc.Client, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for path in archive.files(models / "two"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((models / "two" / path).read_bytes())
    (tmp_path / "assets.txt").write_bytes(os.urandom(30 << 20))
    digests: list[str] = []
    pushing = [threading.Thread(target=lambda: digests.append(front.push(tmp_path))) for _ in range(3)]
    for thread in pushing:
        thread.start()
    for thread in pushing:
        thread.join(60)
    assert digests == [archive.digest(tmp_path)] * 3
    assert front.metadata(digests[0])["version"] == "1"

    # One that was overtaken between its question and its first piece is told so, and reads no further.
    connection = front._connection
    answers = iter([flightsvc.NotFoundError("not yet"), None])

    def action(name: str, body: dict[str, Any], patience: float) -> dict[str, Any]:
        if (answer := next(answers)) is not None:
            raise answer
        return Connection.action(connection, name, body, patience)

    monkeypatch.setattr(connection, "action", action)
    assert front.push(tmp_path) == digests[0]
    assert list(answers) == []  # the second question was asked, since writing had failed


def test_load_and_unload(front: flightsvc.Client, models: Path):
    assert state(front, "strings") == "unloaded" and not is_ready(front, "strings")
    front.unload("strings")  # which is not in memory
    front.load("strings")
    front.load(models / "strings")  # the same
    assert state(front, "strings") == "ready" and is_ready(front, "strings")
    assert [m["model"] for m in front.status()["models"]].count("strings") == 1
    front.unload("strings")
    assert state(front, "strings") == "unloaded" and not is_ready(front, "strings")
    for call in (front.load, front.unload):
        with pytest.raises(flightsvc.NotFoundError, match="model nothing-here: there is no folder"):
            call("nothing-here")


def test_a_model_in_use_is_not_unloaded(front: flightsvc.Client):
    connection = front._connection
    info = connection.front().get_flight_info(
        flight.FlightDescriptor.for_command(json.dumps({"v": 1, "model": "ints"}))
    )
    with pytest.raises(flightsvc.InvalidArgumentError, match="0 open streams and 1 leases"):
        front.unload("ints")
    runner = connection.runner(info.endpoints[0].locations[0].uri.decode())
    ticket = flight.FlightDescriptor.for_command(info.endpoints[0].ticket.ticket)
    writer, reader = runner.do_exchange(ticket)
    with writer:
        writer.begin(INTS.schema)
        writer.write_table(INTS)
        assert reader.read_chunk().data["total"].to_pylist() == [6, 15]
        with pytest.raises(flightsvc.InvalidArgumentError, match=r"model ints, version 1: .*1 open streams"):
            front.unload("ints")
        writer.write_table(INTS)
        assert reader.read_chunk().data["total"].to_pylist() == [6, 15]
        writer.done_writing()
        with pytest.raises(StopIteration):
            reader.read_chunk()
    connection.retry(lambda: _unloaded(front, "ints"), 10)


def _unloaded(front: flightsvc.Client, model: str) -> None:
    """Unload; the front learns of a stream's end a little after its client."""
    try:
        front.unload(model)
    except flightsvc.InvalidArgumentError as error:
        raise flight.FlightUnavailableError(str(error)) from error


def test_flights_are_listed_without_loading(front: flightsvc.Client):
    client = front._connection.front()
    flights = {info.descriptor.command: info for info in client.list_flights()}
    command = b'{"v":1,"model":"two","version":"1","signature":"flipped"}'
    info = flights[command]
    assert info.schema.names == ["scores", "total"] and not info.endpoints
    descriptor = flight.FlightDescriptor.for_command(command)
    assert info.schema == client.get_schema(descriptor).schema
    only = [json.loads(info.descriptor.command) for info in client.list_flights(b'{"model":"two"}')]
    assert [(flight["model"], flight["signature"]) for flight in only] == [
        ("two", "flipped"),
        ("two", "serving_default"),
    ]
    assert not any(b'"counter"' in command and b"serving_default" in command for command in flights)
    reason = next(model["reason"] for model in front.models() if model["name"] == "counter")
    assert "model counter, signature serving_default: it writes to a variable" in reason
    assert state(front, "two") == "unloaded"
    with pytest.raises(pa.ArrowInvalid, match="criteria are empty or JSON"):
        list(client.list_flights(b'{"modle":"two"}'))


def test_actions(front: flightsvc.Client):
    client = front._connection.front()
    listed = [action.type for action in client.list_actions()]
    assert listed == [
        "server.ready",
        "status",
        "model.ready",
        "model.metadata",
        "repository.index",
        "model.load",
        "model.unload",
        "model.tune",
        "server.shutdown",
    ]
    for name, body in [("server.ready", b"[]"), ("repository.index", b'{"a":1}'), ("model.load", b"")]:
        with pytest.raises(pa.ArrowInvalid, match="this action wants"):
            list(client.do_action(flight.Action(name, body)))
    with pytest.raises(pa.ArrowNotImplementedError, match=r'no action "model\.eat"'):
        list(client.do_action(flight.Action("model.eat", b"")))


def tar(*entries: tuple[str, bytes | str | None]) -> bytes:
    """Archive entries: bytes are a file, ``link:``, ``hard:`` and ``fifo`` what they say."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archived:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archived.addfile(info, io.BytesIO(content))
                continue
            kind, _, info.linkname = (content or "").partition(":")
            info.type = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}[kind]
            archived.addfile(info)
    return out.getvalue()


MODEL = "model"  # stands for a saved_model.pb that can be read


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([MODEL, ("/tmp/evil", b"x")], r'the name "/tmp/evil" is absolute'),
        ([MODEL, ("../evil", b"x")], r'the name "../evil" holds ".."'),
        ([MODEL, ("evil", "link:/etc/passwd")], '"evil" is a link'),
        ([MODEL, ("evil", "hard:saved_model.pb")], '"evil" is a link'),
        ([MODEL, ("evil", "fifo")], '"evil" is of type'),
        ([MODEL, MODEL], '"saved_model.pb" occurs twice'),
        ([MODEL, ("saved_model.pb/x", b"x")], "one above it is a file"),
        ([("m/saved_model.pb", b"x")], "there is no saved_model.pb at its top"),
        ([("saved_model.pb", b"this is no protocol buffer")], r"saved_model.pb cannot be read"),
    ],
)
def test_hostile_archives(
    front: flightsvc.Client, models: Path, pushed: Callable[[], list[str]], entries: list[Any], sentence: str
):
    graph = ("saved_model.pb", (models / "nested" / "saved_model.pb").read_bytes())
    refused(
        front,
        pushed,
        {"v": 1, "put": "model"},
        [tar(*(graph if e == MODEL else e for e in entries))],
        sentence,
    )


def refused(
    front: flightsvc.Client,
    pushed: Callable[[], list[str]],
    command: Any,
    pieces: list[Any],
    sentence: str,
    schema: pa.Schema = CHUNKS,
) -> None:
    """A put must be refused with a sentence and leave nothing, and the front must go on."""
    before = pushed()
    with pytest.raises(pa.ArrowInvalid, match=sentence) as caught:
        put(front, command, pieces, schema)
    assert "/models/" not in str(caught.value)  # whose folder it was unpacked in is nobody's business
    assert pushed() == before
    assert front._connection.action("server.ready", {})["ready"]


@pytest.mark.parametrize(
    ("command", "damage", "sentence"),
    [
        ({}, lambda whole: [whole[:-2000]], "it ends early"),
        ({}, lambda whole: [whole[: len(whole) // 2]], "it ends early"),
        ({}, lambda whole: [], "it ends before its first entry"),
        ({}, lambda whole: [gzip.compress(whole)], "not compressed|neither compressed"),
        ({}, lambda whole: [whole, None], "chunk 1 of the archive is null"),
        ({}, lambda whole: [b"x" * (65 << 20)], "more than 67108864 bytes; send chunks of 4 MiB"),
        ({"digest": "sha256:" + "0" * 64}, lambda whole: [whole], "it changed while it was sent"),
        ({"digest": "0" * 64}, lambda whole: [whole], "64 lower-case hexadecimal digits"),
        ({"put": "table"}, lambda whole: [whole], 'put is "table", this server takes "model"'),
        ({"v": 2}, lambda whole: [whole], "v is 2, this server speaks 1"),
        ({"name": "x"}, lambda whole: [whole], 'unknown field "name"'),
    ],
)
def test_refused_pushes(
    front: flightsvc.Client,
    models: Path,
    pushed: Callable[[], list[str]],
    command: dict[str, Any],
    damage: Callable[[bytes], list[Any]],
    sentence: str,
):
    whole = b"".join(archive.chunks(models / "nested"))
    refused(front, pushed, {"v": 1, "put": "model", **command}, damage(whole), sentence)


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([("chunk", pa.string())]),
        pa.schema([("chunk", pa.large_binary())]),
        pa.schema([("bytes", pa.binary())]),
    ],
)
def test_wrong_schemas(front: flightsvc.Client, pushed: Callable[[], list[str]], schema: pa.Schema):
    refused(front, pushed, {"v": 1, "put": "model"}, [b""], "DoPut wants the schema", schema)


def test_a_client_that_leaves_leaves_nothing(
    front: flightsvc.Client, models: Path, pushed: Callable[[], list[str]]
):
    before = pushed()
    whole = b"".join(archive.chunks(models / "nested"))
    descriptor = flight.FlightDescriptor.for_command(json.dumps({"v": 1, "put": "model"}))
    writer, _ = front._connection.front().do_put(descriptor, CHUNKS)
    writer.write_batch(pa.record_batch([pa.array([whole[:5000]], pa.binary())], schema=CHUNKS))
    until(lambda: len(pushed()) == len(before) + 1, 10, "the beginning of the push")
    writer.done_writing()
    with pytest.raises(pa.ArrowInvalid, match="it ends early"):
        writer.close()
    assert pushed() == before


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (lambda folder: (folder / "odd").symlink_to("saved_model.pb"), "odd is a link"),
        (lambda folder: (folder / "odd").symlink_to("/tmp"), "odd is a link"),
        (lambda folder: os.mkfifo(folder / "odd"), "odd is neither a file nor a folder"),
        (lambda folder: (folder / "a\nb").touch(), "holds control characters"),
        (lambda folder: open(os.fsencode(folder) + b"/\xff", "w").close(), "or is not UTF-8"),
    ],
)
def test_odd_folders_are_not_pushed(
    front: flightsvc.Client, tmp_path: Path, odd: Callable[[Path], Any], sentence: str
):
    (tmp_path / "saved_model.pb").touch()
    odd(tmp_path)
    with pytest.raises(flightsvc.InvalidArgumentError, match=sentence):
        front.push(tmp_path)


def test_a_folder_without_a_model_is_not_pushed(front: flightsvc.Client, tmp_path: Path):
    with pytest.raises(flightsvc.NotFoundError, match=r"holds no saved_model\.pb; give the folder"):
        front.push(tmp_path)
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(flightsvc.InvalidArgumentError, match='no meta graph has the tag "serve"'):
        front.push(tmp_path)


def test_digests_are_references(front: flightsvc.Client):
    unknown = "sha256:" + "1" * 64
    assert flightsvc.Model(unknown).reference == unknown
    with pytest.raises(flightsvc.NotFoundError, match=r"has not been pushed to this host; push its folder"):
        front.predict(unknown, INTS)
    with pytest.raises(flightsvc.InvalidArgumentError, match="64 lower-case hexadecimal digits"):
        front.predict("sha256:abc", INTS)
