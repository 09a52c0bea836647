"""A front of a test's own, its log and its runners' memory; and models whose answers say who they are."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

import flightsvc
from flightsvc.server import sidecar

BIN = Path(__file__).resolve().parents[2] / "bin"


def make_scaled(place: Path, factor: float, megabytes: float = 0.0) -> Path:
    """Write the SavedModel x [-1] -> y [-1], x times a factor, with so many MB of other variables."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    class Scaled(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = tf.Variable(float(factor))
            self.ballast = tf.Variable(tf.ones(max(1, int(megabytes * 250_000))))

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": x * self.factor * self.ballast[0]}

    module = Scaled()
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".made.", dir=place.parent))
    tf.saved_model.save(module, str(beside), signatures={"serving_default": module.serve})
    beside.chmod(0o755)
    return beside.rename(place)


class Front:
    """``flightsvc serve`` in the foreground."""

    def __init__(self, *flags: str, folder: Path = BIN, environ: Mapping[str, str] = os.environ):
        """Start the one in ``folder``; flags are those of ``flightsvc serve``."""
        command = [folder / "flightsvc", "serve", f"--libtensorflow={sidecar._tensorflow()}", *flags]
        # A file, not a pipe: what the front said before it answered is then here before the answer.
        with tempfile.NamedTemporaryFile("a", prefix="fs-log-") as written:
            self._written = Path(written.name).open()  # noqa: SIM115 - until the front is closed
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=written, text=True, env=environ
            )
        self._log: list[dict[str, Any]] = []
        self._said: list[str] = []  # by libraries
        self._begun = ""  # a line that is not complete
        self.endpoint: str = json.loads(self.process.stdout.readline())["endpoint"]

    def _read(self) -> None:
        for line in self._written:
            self._begun += line
            if not line.endswith("\n"):
                return
            try:
                self._log.append(json.loads(self._begun))
            except ValueError:
                self._said.append(self._begun)
            self._begun = ""

    def logged(self, message: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the lines of the log so far with this message and these fields."""
        self._read()
        return [
            line
            for line in self._log
            if line["msg"] == message and all(line.get(name) == value for name, value in fields.items())
        ]

    def text(self) -> str:
        """Return the end of the log, for a test that fails."""
        self._read()
        about = [line for line in self._log if line["msg"] != "call ended"]
        return "\n".join([*self._said[-20:], *map(json.dumps, about[-60:])])

    def models(self) -> list[dict[str, Any]]:
        with flightsvc.connect(self.endpoint) as client:
            return list(client.status()["models"])

    def model(self, folder: Path) -> dict[str, Any] | None:
        """Return the status of the model in a folder if it has one."""
        return next((model for model in self.models() if model["dir"] == str(folder)), None)

    def runners(self) -> list[int]:
        """Return the runners' process ids, also of those that load or end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.process.pid).children()]
        return []

    def close(self) -> None:
        """End it by SIGTERM; it must leave nothing."""
        runners = self.runners()
        self.process.terminate()
        try:
            assert self.process.wait(20) == 0, self.text()
            assert not [pid for pid in runners if own_memory(pid)]
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self._written.close()


@contextlib.contextmanager
def front(*flags: str, **how: Any) -> Iterator[Front]:
    """A front in folders of its own."""
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        it = Front(f"--run-dir={folder}/run", f"--cache-dir={folder}/cache", *flags, **how)
        try:
            yield it
        except BaseException:
            print(it.text())
            raise
        finally:
            it.close()


def own_memory(pid: int) -> int:
    """Return the bytes that a process has for itself, 0 if it has ended: what is not a file's."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return sum(int(values.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
    return 0


def host_memory_but(pid: int) -> int:
    """Return the bytes of anonymous memory that the host has given out, less what others than ``pid`` have.

    Not what is free: some kernels count freed pages among it seconds later, whoever had them.
    """
    given = sum(_kilobytes(Path("/proc/meminfo"), "AnonPages:", "Shmem:"))
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if folder.name != str(pid):
                given -= sum(_kilobytes(folder / "smaps_rollup", "Pss_Anon:"))
    return given << 10


def _kilobytes(file: Path, *names: str) -> Iterator[int]:
    for line in file.read_text().splitlines():
        if line.startswith(names):
            yield int(line.split()[1])


@contextlib.contextmanager
def lost_streams() -> Iterator[list[str]]:
    """The requests of this process whose streams were lost and resumed."""
    lost: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "the stream was lost" in record.msg:
                lost.append(record.args[0])

    log, handler = logging.getLogger("flightsvc"), Handler()
    before, log.level = log.level, logging.INFO
    log.addHandler(handler)
    try:
        yield lost
    finally:
        log.removeHandler(handler)
        log.level = before


class Sampler(threading.Thread):
    """Reads what all runners of a front have in memory, five times a second."""

    def __init__(self, front: Front):
        super().__init__(name="sampler", daemon=True)
        self.front, self.ended = front, threading.Event()
        self.samples: list[
            tuple[float, dict[int, int]]
        ] = []  # seconds on the monotonic clock; bytes by process

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.samples.append((time.monotonic(), {pid: own_memory(pid) for pid in self.front.runners()}))

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def most(self) -> int:
        """Return the most bytes that all runners had at once."""
        return max(sum(sample.values()) for _, sample in self.samples)

    def pids(self) -> set[int]:
        return {pid for _, sample in self.samples for pid in sample}


def copied(source: Path, place: Path) -> Path:
    """Copy a SavedModel beside its place and rename it into place, as one should, and return it."""
    beside = place.with_name(f".{place.name}")
    shutil.copytree(source, beside)
    return beside.rename(place)
