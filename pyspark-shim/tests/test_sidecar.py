"""Finding, starting and sharing a front, by many processes at once and after a kill."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import resource
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.flight as flight
import pytest

import flightsvc
from flightsvc.server import sidecar
from flightsvc.settings import Settings


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that fronts may belong to; it ends when the test does."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def at(run_dir: str, **changes: str) -> Settings:
    return dataclasses.replace(Settings.read(), run_dir=run_dir, **changes)


def process_of(popen: subprocess.Popen[bytes]) -> sidecar.Owner:
    found = sidecar._process(popen.pid)
    return sidecar.Owner(found.pid, found.start)


def front_pid(location: str) -> int:
    with flightsvc.connect(location) as client:
        return int(client.status()["pid"])


def wait_for_end(pid: int, seconds: float) -> bool:
    """Wait for the end of a process that is no child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def test_addresses():
    assert sidecar.address("/run/f.sock") == "grpc+unix:///run/f.sock"
    assert sidecar.address("grpc+tcp://host:1") == "grpc+tcp://host:1"
    with pytest.raises(ValueError, match="neither a URI nor an absolute path"):
        sidecar.address("f.sock")


def test_a_process_is_named_by_pid_and_start():
    me = sidecar.this_process()
    assert me.pid == os.getpid()
    assert me.folder == hashlib.sha256(f"{me.pid} {me.start}".encode()).hexdigest()[:8]


def test_a_command_with_parentheses_is_read(short: Path):
    program = short / "a) S 1 (b"
    program.symlink_to("/bin/cat")
    with subprocess.Popen([program], stdin=subprocess.PIPE) as popen:
        found = sidecar._process(popen.pid)
        popen.kill()
    assert (found.parent, found.command) == (os.getpid(), "a) S 1 (b")


def test_no_java_above_names_the_endpoint():
    with pytest.raises(flightsvc.SidecarError, match=r"no java process started.*FLIGHTSVC_ENDPOINT"):
        sidecar.executor()


def test_the_first_java_upwards_is_the_executor(short: Path):
    """A process called java starts Python, which starts Python: as executor, daemon and worker."""
    (short / "java").symlink_to(sys.executable)
    ask = "from flightsvc.server import sidecar; print(sidecar.executor().pid)"
    daemon = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', {ask!r}])"
    top = f"import os, subprocess; print(os.getpid()); subprocess.run([{sys.executable!r}, '-c', {daemon!r}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    out = subprocess.run(
        [short / "java", "-c", top], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(out) == 2
    assert out[0] == out[1]


def test_order_of_discovery_in_a_worker(short: Path):
    (short / "flightsvc.endpoint").write_text("grpc+unix:///plugin.sock\n")
    environ = {"SPARK_LOCAL_DIRS": f"{short},/other"}
    assert sidecar.for_worker(Settings(), environ) == "grpc+unix:///plugin.sock"
    assert sidecar.for_worker(Settings(endpoint="/conf.sock"), environ) == "grpc+unix:///conf.sock"
    environ["FLIGHTSVC_ENDPOINT"] = "/own.sock"
    assert sidecar.for_worker(Settings(endpoint="/conf.sock"), environ) == "grpc+unix:///own.sock"


def test_a_link_is_refused(short: Path):
    (short / "real").mkdir(mode=0o700)
    (short / "run").symlink_to(short / "real")
    with pytest.raises(flightsvc.SidecarError, match=f"{short}/run is not a folder .a link is not followed"):
        sidecar.start(at(f"{short}/run"), None)
    (short / "real" / "user").symlink_to(short)
    with pytest.raises(flightsvc.SidecarError, match="user is not a folder"):
        sidecar.start(at(f"{short}/real"), None)


def test_a_folder_open_to_others_is_refused(short: Path):
    (short / "run").mkdir()
    (short / "run").chmod(0o755)
    with pytest.raises(flightsvc.SidecarError, match=f"run: chmod 700 {short}/run"):
        sidecar.start(at(f"{short}/run"), None)


def test_a_folder_of_somebody_else_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(flightsvc.SidecarError, match=r"belongs to user \d+, not to user 12345"):
        sidecar.start(at(str(short)), None)


def test_a_path_too_long_for_a_socket(short: Path):
    deep = short / ("d" * 100)
    with pytest.raises(
        flightsvc.SidecarError, match=r"bytes, Linux allows 107; set spark\.flightsvc\.runDir"
    ):
        sidecar.start(at(str(deep)), None)
    assert not deep.exists()


def test_a_run_dir_that_cannot_be_made(short: Path):
    (short / "file").write_text("")
    with pytest.raises(flightsvc.SidecarError, match=f"{short}/file: File exists; set .*runDir"):
        sidecar.start(at(f"{short}/file/run"), None)


def test_a_limited_address_space_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 34, 1 << 34))
    with pytest.raises(flightsvc.SidecarError, match=r"spark\.executor\.pyspark\.memory"):
        sidecar.start(at(str(short)), None)


def test_a_missing_program_is_named(short: Path):
    with pytest.raises(flightsvc.SidecarError, match="/no/flightsvc cannot be run: No such file"):
        sidecar.start(at(str(short), binary="/no/flightsvc"), None)


def test_a_front_that_refuses_to_start_says_why(short: Path):
    with pytest.raises(flightsvc.SidecarError, match=r"flightsvc did not start: .*cores"):
        sidecar.start(at(str(short), cores="many"), None)


def test_an_owner_that_has_ended(short: Path, owner: subprocess.Popen[bytes]):
    alive = process_of(owner)
    with pytest.raises(flightsvc.SidecarError, match="it has ended"):
        sidecar.start(at(str(short)), sidecar.Owner(alive.pid, alive.start + 1))


def test_a_front_is_started_once_and_ends_with_its_owner(short: Path, owner: subprocess.Popen[bytes]):
    settings = at(str(short))
    location = sidecar.start(settings, process_of(owner))
    folder = short / process_of(owner).folder
    assert location == f"grpc+unix://{folder}/front.sock"
    assert folder.stat().st_mode & 0o777 == 0o700
    pid = front_pid(location)
    assert sidecar.start(settings, process_of(owner)) == location
    assert front_pid(location) == pid
    owner.kill()
    owner.wait()
    assert wait_for_end(pid, 5)
    assert not folder.exists()


def _start(run_dir: str, owner: sidecar.Owner) -> int:
    return front_pid(sidecar.start(at(run_dir), owner))


def test_many_workers_start_one_front(short: Path, owner: subprocess.Popen[bytes]):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as workers:
        started = [workers.submit(_start, str(short), process_of(owner)) for _ in range(4)]
        assert len({one.result(timeout=60) for one in started}) == 1


def test_a_dead_front_is_replaced(short: Path, owner: subprocess.Popen[bytes]):
    settings = at(str(short))
    location = sidecar.start(settings, process_of(owner))
    first = front_pid(location)
    os.kill(first, 9)
    assert wait_for_end(first, 5)
    assert sidecar.start(settings, process_of(owner)) == location
    assert front_pid(location) != first


def test_the_front_is_nobodys_child(short: Path, owner: subprocess.Popen[bytes]):
    location = sidecar.start(at(str(short)), process_of(owner))
    found = sidecar._process(front_pid(location))
    assert found.parent != os.getpid()
    assert os.getsid(found.pid) != os.getsid(0)


def test_a_client_of_a_location_is_lazy():
    assert isinstance(sidecar.client("grpc+unix:///nowhere.sock"), flight.FlightClient)
