"""Many at once on one host: Spark classic and Connect, two executors, two users; all run one script.

The script is ``together_job.py``. Each application has a home of its own; all have answered before the first
one ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from figures import report
from PIL import Image
from processes import is_gone, left, until, until_clean
from test_shipping import pushes
from together_job import OFFSET, SCALE, SIZE

from flightsvc.server import archive, sidecar

pytestmark = [pytest.mark.java, pytest.mark.prove]

SPARK = Path(importlib.util.find_spec("pyspark").submodule_search_locations[0])
SCRIPT = Path(__file__).with_name("together_job.py")
PICTURES, LABELS = 1200, ("bird", "cat", "dog")
TIMES = 3
ANSWER_SECONDS = 240.0
TOLERANCE = 1e-5  # of values between -1 and 1

# What an administrator sets. A local cluster begins its first job with both of its executors; JVMs that live
# for a minute compile fast rather than well. No front ends because it is idle.
DEFAULTS = """
spark.driver.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
spark.executor.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
spark.ui.enabled false
spark.ui.showConsoleProgress false
spark.sql.shuffle.partitions 2
spark.cores.max 2
spark.scheduler.minRegisteredResourcesRatio 1.0
spark.scheduler.maxRegisteredResourcesWaitingTime 120s
spark.connect.grpc.binding.address 127.0.0.1
spark.flightsvc.idleTimeout 0
"""

STRANGER = pwd.getpwnam("nobody")


class Job:
    """The script as one user's process, with a home and, for Connect, a server."""

    def __init__(self, place: Path, name: str, kind: str, url: str, python: Path, user: Any = None):
        self.name, self.home = name, place / name
        self.user = user or pwd.getpwuid(os.getuid())
        self.run_dir, self.spool = self.home / "run" / "flightsvc", self.home / "tmp"
        self.answers, self.log = self.home / "answers.json", self.home / "log"
        for folder in (self.home, self.run_dir.parent, self.spool, self.home / "conf", self.home / "spark"):
            folder.mkdir(mode=0o700)
        # A local cluster writes its executors' folders into the installation.
        for part in ("bin", "jars"):
            (self.home / "spark" / part).symlink_to(SPARK / part)
        (self.home / "conf" / "spark-defaults.conf").write_text(DEFAULTS)
        self.log.touch()
        for path in (self.home, *self.home.glob("**/*")):
            os.lchown(path, self.user.pw_uid, self.user.pw_gid)
        hidden = ("FLIGHTSVC_CACHE_DIR", "FLIGHTSVC_RUN_DIR", "XDG_")
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(hidden)},
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.run_dir.parent),
            "TMPDIR": str(self.spool),
            "SPARK_HOME": str(self.home / "spark"),
            "SPARK_LOCAL_DIRS": str(self.spool),
            "SPARK_CONF_DIR": str(self.home / "conf"),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_PYTHON": str(python),
            "LD_LIBRARY_PATH": f"{python.parents[1]}/lib",  # a copy of Python names that of the original
        }
        self.processes: list[psutil.Popen] = []
        if kind == "remote":
            url = self.serve_connect(url)
        arguments = [kind, url, place / "model", place / "pictures", self.answers]
        self.script = self.start([python, place / SCRIPT.name, *arguments])

    def start(self, command: list[Any]) -> psutil.Popen:
        other: dict[str, Any] = {}
        if self.user.pw_uid != os.getuid():
            other = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        with self.log.open("a") as log:
            self.processes.append(
                psutil.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=self.environ,
                    cwd=self.home,
                    start_new_session=True,
                    **other,
                )
            )
        return self.processes[-1]

    def serve_connect(self, master: str) -> str:
        """Start a Connect server; a client tries until it is there."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = "org.apache.spark.sql.connect.service.SparkConnectServer"
        how = ["--class", server, "--master", master, "--conf", f"spark.connect.grpc.binding.port={port}"]
        self.start([SPARK / "bin" / "spark-submit", *how, "spark-internal"])
        return f"sc://127.0.0.1:{port}"

    @functools.cached_property
    def answer(self) -> dict[str, Any]:
        until(lambda: self.answers.exists() or self.script.poll() is not None, ANSWER_SECONDS, self.name)
        assert self.answers.exists(), f"{self.name} ended:\n" + self.log.read_text()[-5000:]
        return dict(json.loads(self.answers.read_text()))

    def fronts(self) -> list[psutil.Process]:
        owners = (sidecar._occupant(str(folder)) for folder in self.run_dir.glob("*"))
        return [psutil.Process(owner.pid) for owner in owners if owner]

    def tree(self) -> list[psutil.Process]:
        alive = [process for process in self.processes if not is_gone(process)]
        return [child for process in alive for child in process.children(recursive=True)] + alive

    def left(self, kind: str = "") -> list[str]:
        return left(self.run_dir, self.home / ".cache" / "flightsvc", self.spool, kind=kind)

    def end(self) -> float:
        """End the application and return the seconds from then until nothing is left."""
        tree = self.tree()
        self.script.stdin.close()
        assert self.script.wait(60) == 0, self.log.read_text()[-5000:]
        for server in self.processes[:-1]:
            server.terminate()
            server.wait(60)
        for process in tree:
            until(lambda: is_gone(process), 60, f"end of {process}")  # noqa: B023
        return until_clean(self.left)

    def close(self) -> None:
        """End what a failed test has left."""
        for process in [*self.tree(), *self.fronts()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.stdin.close()
            process.wait(20)
        until_clean(lambda: self.left("process"))
        shutil.rmtree(self.home)


def write_pictures(folder: Path) -> None:
    """Write photographs and noise, PNG and JPEG, grey and colour, all of different sizes."""
    import skimage

    sources = [Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "coffee.png")]
    photographs = [Image.open(path).convert("RGB") for path in sources]
    numbers = np.random.default_rng(7)
    for i in range(PICTURES):
        x, y, width, height = (*numbers.integers(0, 200, 2).tolist(), *numbers.integers(20, 160, 2).tolist())
        picture = photographs[i % 2].crop((x, y, x + width, y + height))
        if i % 5 == 0:
            picture = Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture = picture.convert("L") if i % 7 == 0 else picture
        path = folder / f"label={LABELS[i % len(LABELS)]}" / f"{i:04}.{('png', 'jpg')[i % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def copied_python(folder: Path) -> Path:
    """Copy the interpreter without its packages, which stay where they are."""
    python, library = folder / "bin" / "python3", folder / "lib" / Path(os.__file__).parent.name
    python.parent.mkdir(parents=True)
    shutil.copy(os.path.realpath(sys.executable), python)
    beside = shutil.ignore_patterns("site-packages", "test", "idlelib", "tkinter", "config-*")
    shutil.copytree(Path(os.__file__).parent, library, ignore=beside)
    for shared in Path(sys.base_prefix, "lib").glob("libpython3.*"):
        shutil.copy(shared, folder / "lib")
    (library / "site-packages").symlink_to(SPARK.parent)
    return python


@functools.cache
def python_of(user: pwd.struct_passwd, place: Path) -> Path | None:
    """Return a Python that another user of this host can run: ours, else a copy of it, else ``None``."""

    def runs(python: Path) -> bool:
        script = "import flightsvc, os; open(os.environ['FLIGHTSVC_BINARY'])"
        with contextlib.suppress(PermissionError):
            return not subprocess.run(
                [python, "-c", script],
                env={**os.environ, "LD_LIBRARY_PATH": f"{python.parents[1]}/lib"},
                cwd=place,
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
                stderr=subprocess.DEVNULL,
                check=False,
            ).returncode
        return False

    if runs(ours := Path(sys.executable)):
        return ours
    return copy if runs(copy := copied_python(place / "python")) else None


@pytest.fixture(scope="module")
def place(models: Path) -> Iterator[Path]:
    """A folder that all users of this host can read: the script, a model and pictures."""
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        place = Path(folder)
        place.chmod(0o755)
        shutil.copy(SCRIPT, place)
        shutil.copytree(models / "pictures", place / "model")
        write_pictures(place / "pictures")
        yield place


@pytest.fixture(scope="module", params=range(TIMES))
def jobs(place: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Job]]:
    """All applications by name, running."""
    with contextlib.ExitStack() as stack:
        jobs = {}

        def start(name: str, *how: Any) -> None:
            jobs[name] = Job(place, name, *how)
            stack.callback(jobs[name].close)

        python = Path(sys.executable)
        theirs = python_of(STRANGER, place) if os.getuid() == 0 else None
        start("cluster", "master", "local-cluster[2,1,1024]", python)
        start("connect", "remote", "local[2]", python)
        start("classic", "master", "local[2]", python)
        if theirs:
            start("stranger", "master", "local[2]", theirs, STRANGER)
        yield jobs


@pytest.fixture(scope="module")
def expected(place: Path, oracle: Callable[..., Any]) -> dict[str, Any]:
    """What TensorFlow in Python makes of the pictures."""
    import tensorflow as tf

    sides, resized = {}, []
    paths = sorted(place.glob("pictures/*/*"))
    for path in paths:
        picture = tf.io.decode_image(path.read_bytes(), channels=3)
        sides[path.name] = list(picture.shape[:2])
        resized.append(tf.image.resize(picture, SIZE) * SCALE + OFFSET)
    means = oracle("pictures", image=np.stack(resized))["mean"]
    labels = np.array([path.parent.name.removeprefix("label=") for path in paths])
    grouped = [[label, (labels == label).sum(), means[labels == label, 0].mean()] for label in LABELS]
    return {"names": [path.name for path in paths], "sides": sides, "means": means, "grouped": grouped}


FIGURES: dict[str, list[Any]] = {}


def figure(name: str, value: Any) -> None:
    """Report a figure of every repetition."""
    FIGURES.setdefault(name, []).append(value)
    report(**{name: FIGURES[name]})


def numbers(answer: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return all that the model has computed in an application."""
    parts = ([row[-1] for row in answer[part]] for part in ("transformed", "read"))
    return np.concatenate([*map(np.ravel, parts), [red for _, _, red in answer["grouped"]]])


def test_answers_are_those_of_tensorflow(jobs: dict[str, Job], expected: dict[str, Any]):
    started = time.monotonic()
    reds = [red for _, _, red in expected["grouped"]]
    wanted = np.concatenate([expected["means"].ravel(), expected["means"].ravel(), reds])
    for job in jobs.values():
        answer = job.answer
        for part in ("transformed", "read"):
            assert [Path(row[0]).name for row in answer[part]] == expected["names"]
        assert {Path(path).name: sides for path, *sides, _ in answer["read"]} == expected["sides"]
        assert answer["functions"] == [1, ["means"], 0]  # listed once, and not after it was dropped
        assert "column 'length' is bigint, input 'image' (float32[-1,32,32,3])" in answer["refused"]
        assert [row[:2] for row in answer["grouped"]] == [row[:2] for row in expected["grouped"]]
        np.testing.assert_allclose(numbers(answer), wanted, rtol=0, atol=TOLERANCE, err_msg=job.name)
    largest = max(float(np.abs(numbers(job.answer) - wanted).max()) for job in jobs.values())
    figure("together_largest_difference_to_tensorflow", float(f"{largest:.2g}"))
    figure("together_seconds", round(time.monotonic() - started, 1))
    report(together_pictures=PICTURES, together_applications=list(jobs))


def test_answers_are_the_same_everywhere(jobs: dict[str, Job]):
    first, *others = (job.answer for job in jobs.values())
    for other in others:
        for part in ("transformed", "grouped", "read"):
            assert [row[:-1] for row in other[part]] == [row[:-1] for row in first[part]]
        np.testing.assert_allclose(numbers(other), numbers(first), rtol=0, atol=TOLERANCE)
    equal = all(np.array_equal(numbers(other), numbers(first)) for other in others)
    figure("together_equal_to_the_bit", equal)


def test_every_host_unpacks_a_model_once(jobs: dict[str, Job], place: Path):
    """Two executors have two sidecars; what the first of all workers pushes serves both."""
    digest = archive.digest(place / "model")
    for name, job in jobs.items():
        assert len(job.answer["sidecars"]) == (2 if name == "cluster" else 1), name
        pids = {int(sidecar.rpartition(":")[2]) for sidecar in job.answer["sidecars"]}
        fronts = {front.pid for front in job.fronts()}
        assert pids < fronts  # one more has read the signature for the driver
        assert len(fronts) == len(pids) + 1
        assert pushes(job.home / ".local" / "state", digest) == 1
        kept = job.home / ".cache" / "flightsvc" / "models"
        assert [path.name for path in kept.iterdir()] == [digest.removeprefix("sha256:")]


def test_two_users(jobs: dict[str, Job]):
    """Processes and files are each user's own, and closed to the other."""
    if os.getuid() != 0:
        pytest.skip("skipped: needs root")
    if "stranger" not in jobs:
        pytest.skip(f"skipped: {STRANGER.pw_name} may not read Python's packages or our binary here")
    for job in jobs.values():
        _ = job.answer
    for name in ("classic", "stranger"):
        job = jobs[name]
        fronts = job.fronts()
        processes = [*fronts, *(runner for front in fronts for runner in front.children())]
        if name == "stranger":
            assert len(processes) == 4  # two fronts, two runners: the model and the decoder of pictures
        assert {tuple(process.uids()) for process in processes} == {(job.user.pw_uid,) * 3}
        paths = [job.home, *job.home.glob("**/*")]
        assert {path.lstat().st_uid for path in paths} == {job.user.pw_uid}
        ours = [job.run_dir, job.home / ".cache" / "flightsvc", job.home / ".local" / "state" / "flightsvc"]
        for path in [*ours, *job.run_dir.glob("**/*")]:
            mode = path.lstat().st_mode
            assert not mode & 0o077, f"{path} {stat.filemode(mode)}"
        assert sum(path.is_socket() for path in job.run_dir.glob("**/*")) == len(processes)


def test_nothing_is_left(jobs: dict[str, Job]):
    """When all have answered they end, one after the other; the others have what they had."""
    for job in jobs.values():
        _ = job.answer
    running = dict(jobs)
    for name in jobs:
        others = {other: job.left() for other, job in running.items() if other != name}
        job = running.pop(name)
        assert len(job.left()) > 2
        figure(f"together_seconds_until_clean_{name}", job.end())
        assert {other: job.left() for other, job in running.items()} == others
