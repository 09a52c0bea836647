"""New versions under load: every stream ends on the version it began with, and a bad version changes nothing.

The load comes from processes of their own: this file, run as a program (see ``drive``). Version n of the
model multiplies by n, so that each answer says which version gave it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from figures import PROVE, count, report
from fronts import Front, copied, front, lost_streams, make_scaled
from processes import is_gone, until

import flightsvc
from flightsvc.server.connection import Connection
from flightsvc.server.stream import Exchange
from flightsvc.settings import Settings

NAME = "scaled"
PROCESSES, STREAMS = count(2, 4), count(4, 16)  # the streams are at once, in all
RATE = count(200, 1000)  # record batches a second in all, of one row each
STREAM_BATCHES = 50
STREAMS_ACROSS = count(10, 100)  # that are open at some time while the old version drains
SETTLE = count(1.0, 10.0)  # seconds of load before and after
SWAP_SECONDS = 60.0
POLL = 0.5
GROWING = (6, 0.4)  # a version arrives in so many parts, so many seconds apart


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a stream has seen; times on the monotonic clock, which processes share."""

    opened: float
    ended: float
    versions: list[int]  # that answered
    error: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return the SavedModel of a version, made once."""
    folder = tmp_path_factory.mktemp("versions")

    def version(number: int) -> Path:
        place = folder / str(number)
        return place if place.exists() else make_scaled(place, number, 4)

    return version


@pytest.fixture
def root(tmp_path: Path, made: Callable[[int], Path]) -> Path:
    """A model-root whose one model has version 1."""
    (tmp_path / NAME).mkdir()
    copied(made(1), tmp_path / NAME / "1")
    return tmp_path


class Load:
    """Processes that stream to a front until they are told to stop."""

    def __init__(self, it: Front):
        command = [sys.executable, __file__, it.endpoint, str(STREAMS // PROCESSES), str(STREAMS / RATE)]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(PROCESSES)
        ]
        for process in self.processes:
            assert process.stdout.readline() == "streaming\n"
        self.started = time.monotonic()

    def end(self) -> list[Stream]:
        for process in self.processes:
            process.stdin.close()
        self.seconds = time.monotonic() - self.started
        streams, batches = [], 0
        for process in self.processes:
            answer = json.loads(process.stdout.read())
            assert process.wait(30) == 0
            assert answer["lost"] == []  # none was resumed
            streams += [Stream(**about) for about in answer["streams"]]
            batches += answer["batches"]
        self.rate = batches / self.seconds
        return sorted(streams, key=lambda stream: stream.opened)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


@pytest.fixture
def loaded(root: Path) -> Iterator[tuple[Front, Load]]:
    with front(f"--model-root={root}", f"--poll-interval={POLL}s") as it:
        load = Load(it)
        try:
            yield it, load
        finally:
            load.close()


def state(it: Front, version: int) -> dict[str, Any]:
    """Return what the status says of a version, nothing if that does not name it."""
    found = (model for model in it.models() if model["model"] == NAME and model["version"] == str(version))
    return next(found, {})


def serves(it: Front) -> int:
    """Return the version that a request gets now."""
    with flightsvc.connect(it.endpoint) as client:
        return round(client.predict(NAME, pa.table({"x": pa.array([1], pa.float32())}))["y"][0].as_py())


class LongLived(threading.Thread):
    """A stream that sends a record batch now and then, until it is told to end."""

    def __init__(self, it: Front):
        super().__init__(daemon=True)
        location = it.endpoint
        self.connection = Connection(lambda: location, Settings.read())
        self.ending = threading.Event()
        self.versions: list[tuple[float, int]] = []
        self.error = ""

    def run(self) -> None:
        def batches() -> Iterator[pa.RecordBatch]:
            while not self.ending.wait(0.2):
                yield pa.record_batch({"x": pa.array([2], pa.float32())})

        descriptor = {"v": 1, "model": NAME, "request_id": "long-lived"}
        try:
            for answer in Exchange(self.connection, descriptor, {"x": 0}).answers(batches(), ahead=1):
                self.versions.append((time.monotonic(), round(answer.outputs["y"][0].as_py() / 2)))
        except flightsvc.FlightsvcError as error:
            self.error = str(error)

    def end(self) -> None:
        self.ending.set()
        self.join(30)
        assert not self.is_alive()


def check(streams: list[Stream], versions: set[int]) -> None:
    """No stream failed or mixed versions, and these versions answered, in order."""
    assert not [stream.error for stream in streams if stream.error]
    assert not [stream.versions for stream in streams if len(stream.versions) != 1]
    assert {stream.versions[0] for stream in streams} == versions


def test_a_new_version_under_load(loaded: tuple[Front, Load], root: Path, made: Callable[[int], Path]):
    it, load = loaded
    second = made(2)
    long_lived = LongLived(it)
    long_lived.start()
    until(lambda: long_lived.versions, SWAP_SECONDS, "first answer")
    time.sleep(SETTLE)
    old = psutil.Process(state(it, 1)["pid"])
    put = time.monotonic()
    copied(second, root / NAME / "2")
    until(lambda: serves(it) == 2, SWAP_SECONDS, "new version")
    served = time.monotonic()
    assert state(it, 1)["state"] == "draining"
    assert state(it, 2)["state"] == "ready"
    until(lambda: state(it, 2)["streams"] > 1, SWAP_SECONDS, "streams of the load")  # one may be of serves
    time.sleep(SETTLE + STREAMS * STREAM_BATCHES / RATE)
    assert not is_gone(old)
    assert len(it.logged("a newer version serves", version="2", before="1")) == 1
    long_lived.end()
    until(lambda: is_gone(old), 10, "end of the old version")
    assert it.logged("model unloaded", version="1", why="a newer version serves")
    streams = load.end()
    check(streams, {1, 2})
    assert not long_lived.error
    assert {version for _, version in long_lived.versions} == {1}
    first_new = min(stream.opened for stream in streams if stream.versions == [2])
    assert long_lived.versions[-1][0] > first_new + SETTLE  # both answer while the old one drains
    across = [stream for stream in streams if stream.ended > put and stream.opened < served + SETTLE]
    assert len(across) >= STREAMS_ACROSS
    report(
        swap_streams=len(streams),
        swap_streams_across=len(across),
        swap_streams_across_wanted=100,
        swap_batches_a_second=round(load.rate),
        swap_batches_a_second_wanted=1000,
        swap_failed_streams=0,
        swap_mixed_streams=0,
        swap_seconds_until_new_version_serves=round(served - put, 1),
        swap_seconds_of_both=round(long_lived.versions[-1][0] - first_new, 1),
    )
    assert not PROVE or load.rate > 0.95 * RATE


def truncated(source: Path, place: Path) -> None:
    """Put a version there whose variables are cut short."""
    beside = place.with_name(f".{place.name}")
    shutil.copytree(source, beside)
    [data] = beside.glob("variables/variables.data*")
    os.truncate(data, data.stat().st_size // 2)
    beside.rename(place)


def growing(source: Path, place: Path) -> None:
    """Copy a version as cp does, slowly: the graph first, the variables by and by."""
    parts, seconds = GROWING
    (place / "variables").mkdir(parents=True)
    for path in sorted(source.glob("**/*")):
        if path.is_file() and not path.name.startswith("variables.data"):
            shutil.copy(path, place / path.relative_to(source))
    [data] = source.glob("variables/variables.data*")
    text = data.read_bytes()
    with (place / data.relative_to(source)).open("wb", buffering=0) as file:
        for part in np.array_split(np.frombuffer(text, np.uint8), parts):
            file.write(part.tobytes())
            time.sleep(seconds)


def kill_loads(it: Front, version: int) -> int:
    """Kill every runner that begins until the version is in quarantine; return how many."""
    known, killed, end = set(it.runners()), 0, time.monotonic() + SWAP_SECONDS
    while state(it, version).get("state") != "quarantined":
        assert time.monotonic() < end
        for pid in set(it.runners()) - known:
            known.add(pid)
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


@pytest.mark.slow
def test_a_bad_version_changes_nothing(loaded: tuple[Front, Load], root: Path, made: Callable[[int], Path]):
    it, load = loaded
    fifth, sixth = made(5), made(6)
    pid = state(it, 1)["pid"]
    truncated(fifth, root / NAME / "2")
    until(lambda: state(it, 2).get("state") == "failed", SWAP_SECONDS, "failure of version 2")
    assert "its files are damaged or incomplete" in state(it, 2)["reason"]
    assert serves(it) == 1
    copied(made(5), root / NAME / "3")
    assert kill_loads(it, 3) == 2  # as if it crashed
    assert "signal: killed" in state(it, 3)["reason"]
    assert serves(it) == 1
    assert state(it, 1)["pid"] == pid
    growing(sixth, root / NAME / "6")
    assert not it.logged("model failed", version="6")
    until(lambda: serves(it) == 6, SWAP_SECONDS, "version 6")
    assert len(it.logged("model ready", version="6")) == 1
    time.sleep(STREAMS * STREAM_BATCHES / RATE)
    check(load.end(), {1, 6})
    report(
        bad_versions=["truncated variables", "killed while loading", "copied slowly"],
        bad_versions_failed_streams=0,
    )


# The load's side.


def drive(endpoint: str, streams: int, seconds: float) -> None:
    """Keep streams open, with a record batch every so many seconds on each, until standard input ends."""
    ending = threading.Event()
    seen: list[Stream] = []
    answered: list[float] = []  # versions, of each record batch

    def stream(connection: Connection, number: int) -> Stream:
        opened = time.monotonic()
        versions: list[int] = []
        error = ""

        def batches() -> Iterator[pa.RecordBatch]:
            for i in range(1, STREAM_BATCHES + 1):
                yield pa.record_batch({"x": pa.array([i], pa.float32())})
                time.sleep(max(0.0, opened + i * seconds - time.monotonic()))
                if ending.is_set():
                    return

        descriptor = {"v": 1, "model": NAME, "request_id": f"{os.getpid()}-{number}"}
        try:
            for answer in Exchange(connection, descriptor, {"x": 0}).answers(batches(), ahead=1):
                version = answer.outputs["y"][0].as_py() / answer.batch["x"][0].as_py()
                answered.append(version)
                if version not in versions:
                    versions.append(version)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Stream(opened, time.monotonic(), versions, error)

    def work(number: int) -> None:
        connection = Connection(lambda: endpoint, Settings.read())
        while not ending.is_set():
            seen.append(stream(connection, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(streams)]
    with flightsvc.connect(endpoint) as client:
        client.load(NAME)
    with lost_streams() as lost:
        for thread in threads:
            thread.start()
        until(lambda: len(answered) > 5 * streams, SWAP_SECONDS, "first answers")
        print("streaming", flush=True)
        before = len(answered)
        sys.stdin.read()
        batches = len(answered) - before
        ending.set()
        for thread in threads:
            thread.join()
    seen_as_json = [dataclasses.asdict(about) for about in seen]
    print(json.dumps({"streams": seen_as_json, "batches": batches, "lost": lost}))


if __name__ == "__main__":
    drive(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
