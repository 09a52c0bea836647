"""Two devices, as users see them: placement, eviction, a device that fails, too little memory, the processor.

The devices are simulated, by a library in place of NVIDIA's and by a runner that takes their memory as one on
a GPU would; all else is real. What they do is told in gpu/fakenvml and in cmd/flightsvc-runner.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from figures import report
from fronts import BIN, Front, front, make_scaled
from processes import until

import flightsvc
from flightsvc.server.connection import Connection
from flightsvc.server.stream import Exchange
from flightsvc.settings import Settings

pytestmark = pytest.mark.prove  # make test has the parts, in Go

ROOT = BIN.parent
GIB, MIB = 1 << 30, 1 << 20
FIRST, SECOND = "GPU-1", "GPU-2"
MODELS = 6
MODEL_BYTES = GIB  # of a device, for each model
SECONDS = 60.0


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a front, a runner on simulated devices and a library in place of NVIDIA's."""
    if not (shutil.which("go") and shutil.which("cc")):
        pytest.skip("skipped: needs go and cc")
    folder = tmp_path_factory.mktemp("simulated")
    shutil.copy(BIN / "flightsvc", folder)
    said = subprocess.run([BIN / "flightsvc", "--version"], capture_output=True, text=True, check=True).stdout
    version, build = said.split()  # 0.1.0 (commit-hash)
    commit = build.strip("()").rpartition("-")[0]
    of = f"-X flightsvc/internal/build.Version={version} -X flightsvc/internal/build.Commit={commit}"
    tensorflow = ROOT / "build" / "libtensorflow"
    environ = {
        **os.environ,
        "CPATH": f"{tensorflow}/include",
        "LIBRARY_PATH": str(tensorflow),
    }
    command = ["go", "build", "-trimpath", "-tags", "simulated_device", "-ldflags", of]
    command += ["-o", str(folder / "flightsvc-runner"), "./cmd/flightsvc-runner"]
    subprocess.run(command, cwd=ROOT, env=environ, check=True)
    source = ROOT / "gpu" / "fakenvml" / "library" / "fakenvml.c"
    library = ["-shared", "-fPIC", "-O1", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(["cc", *library], check=True)
    return folder


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Number i multiplies by i + 1."""
    folder = tmp_path_factory.mktemp("scaled")
    return [make_scaled(folder / f"times{i + 1}", i + 1) for i in range(MODELS)]


class Host:
    """Two simulated devices; see gpu/fakenvml/library/fakenvml.c."""

    def __init__(self, simulated: Path, state: Path, first: int, second: int):
        self.simulated, self.state = simulated, state
        state.mkdir()
        (state / "devices").write_text(
            f"{FIRST} Simulated_A {first} 8.0 -\n{SECOND} Simulated_B {second} 8.0 -\n"
        )

    def front(self, *flags: str, row_bytes: int = MIB) -> contextlib.AbstractContextManager[Front]:
        environ = {
            **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
            "LD_LIBRARY_PATH": f"{self.simulated}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "FAKENVML_STATE": str(self.state),
            "SIMULATED_MODEL_BYTES": str(MODEL_BYTES),
            "SIMULATED_ROW_BYTES": str(row_bytes),
        }
        return front(*flags, folder=self.simulated, environ=environ)

    def use(self, device: str, pid: int, size: int) -> None:
        """Let another process have memory of a device."""
        (self.state / device).mkdir(exist_ok=True)
        (self.state / device / str(pid)).write_text(str(size))

    def xid(self, device: str, number: int) -> None:
        with (self.state / "xid").open("a") as file:
            file.write(f"{device} {number}\n")


def predict(it: Front, model: Path, rows: int = 3) -> np.ndarray[Any, Any]:
    x = np.arange(rows, dtype=np.float32)
    with flightsvc.connect(it.endpoint) as client:
        answer: np.ndarray[Any, Any] = client.predict(model, pa.table({"x": x}))["y"].to_numpy()
    return answer / np.maximum(x, 1)


def factor(it: Front, model: Path) -> float:
    return float(predict(it, model)[-1])


def device(it: Front, model: Path) -> str | None:
    about = it.model(model)
    return about and about["device"]


def test_placement_eviction_and_a_device_that_fails(simulated: Path, scaled: list[Path], tmp_path: Path):
    host = Host(simulated, tmp_path / "state", 4 * GIB, 4 * GIB)
    host.use(FIRST, os.getpid(), 5 * GIB // 2)
    with host.front() as it:
        # The freest one; then both are full, and whoever is idle makes room.
        assert factor(it, scaled[0]) == 1
        assert device(it, scaled[0]) == SECOND
        for _ in range(2):
            for i, model in enumerate(scaled):
                assert factor(it, model) == i + 1
                held = [about["device"] for about in it.models() if about["state"] == "ready"]
                assert held.count(FIRST) <= 1
                assert held.count(SECOND) <= 3
        assert {FIRST, SECOND} == set(held)
        evicted = it.logged("model unloaded", why="others need its device's memory")
        assert len(evicted) >= MODELS - 4

        # A device fails: what streams there goes on elsewhere.
        host.use(FIRST, os.getpid(), 0)
        ending, answers = threading.Event(), []

        def batches() -> Iterator[pa.RecordBatch]:
            while not ending.wait(0.05):
                yield pa.record_batch({"x": pa.array([1], pa.float32())})

        def stream() -> None:
            connection = Connection(lambda: it.endpoint, Settings.read())
            descriptor = {"v": 1, "model": str(scaled[1])}
            for answer in Exchange(connection, descriptor, {"x": 0}).answers(batches(), ahead=1):
                answers.append(answer.outputs["y"][0].as_py())

        streaming = threading.Thread(target=stream)
        streaming.start()
        until(lambda: answers, SECONDS, "first answer")
        failed = device(it, scaled[1])
        other = FIRST if failed == SECOND else SECOND
        host.xid(failed, 79)  # the GPU has fallen off the bus
        until(lambda: device(it, scaled[1]) == other, SECONDS, "the other device")
        seen = len(answers)
        until(lambda: len(answers) > seen + 5, SECONDS, "answers from the other device")
        ending.set()
        streaming.join(SECONDS)
        assert not streaming.is_alive()
        assert set(answers) == {2.0}
        gone = [line for line in it.logged("model unloaded") if "XID 79" in line["why"]]
        assert gone
        with flightsvc.connect(it.endpoint) as client:
            healthy = {about["uuid"]: about["healthy"] for about in client.status()["devices"]}
        assert healthy == {failed: False, other: True}
        for i, model in enumerate(scaled):
            assert factor(it, model) == i + 1
            assert device(it, model) == other
    report(gpu_evictions=len(evicted), gpu_runners_drained=len(gone), gpu_stream_batches=len(answers))


def test_a_batch_that_does_not_fit_is_halved(simulated: Path, scaled: list[Path], tmp_path: Path):
    host = Host(simulated, tmp_path / "state", 2 * GIB, 1)
    rows = 1000
    with host.front(row_bytes=4 * MIB) as it, flightsvc.connect(it.endpoint) as client:
        for _ in range(2):
            np.testing.assert_array_equal(predict(it, scaled[2], rows)[1:], 3)
            assert device(it, scaled[2]) == FIRST
            client.unload(scaled[2])
        shrunk = it.logged("the device's memory bounds the batch")
        assert len(shrunk) == 1  # the second runner knew it
        assert 0 < shrunk[0]["max_batch_size"] * 4 * MIB <= GIB
    report(gpu_rows_that_fit=shrunk[0]["max_batch_size"])


@pytest.mark.parametrize("fallback", [False, True])
def test_the_processor_stands_in_only_if_allowed(
    simulated: Path, scaled: list[Path], tmp_path: Path, fallback: bool
):
    host = Host(simulated, tmp_path / "state", GIB, GIB)
    for uuid in (FIRST, SECOND):
        host.use(uuid, os.getpid(), GIB * 9 // 10)
    flags = ["--load-timeout=3s", *(["--allow-cpu-fallback"] if fallback else [])]
    with host.front(*flags) as it:
        if fallback:
            assert factor(it, scaled[3]) == 4
            assert device(it, scaled[3]) == ""
            assert it.logged("a model runs on the CPU in place of a device (allow-cpu-fallback)")
        else:
            with pytest.raises(flightsvc.InvalidArgumentError, match=r"of device memory and has waited"):
                predict(it, scaled[3])
            assert not it.logged("model ready")


def test_ten_thousand_placements() -> None:
    """The placements that are promised, on 8 GPUs and on a host in MIG mode, without over-commit."""
    command = ["go", "test", "-count=1", "-timeout", "10m", "-v", "-run", "^TestNoOvercommit", "./gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("--- PASS: TestNoOvercommit") == 3
    report(placements=20_000, placement_hosts="8 GPUs; 8 GPUs in MIG mode")
