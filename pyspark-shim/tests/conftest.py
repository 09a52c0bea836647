"""One front and one Spark session for all tests, in folders of their own.

The tests run against the real programs: `make build` has put them into bin/.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from figures import PROVE

import flightsvc

ROOT = Path(__file__).resolve().parents[2]

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bar", help="of the tests marked with a bar, only those of this one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses the Spark session, skip what only `make prove` runs, and select a bar's tests."""
    wanted, others = config.getoption("bar"), []
    for item in items:
        if "spark" in item.fixturenames:
            item.add_marker("spark")
        if item.get_closest_marker("prove") and not PROVE:
            item.add_marker(pytest.mark.skip("make prove runs it"))
        bar = item.get_closest_marker("bar")
        if wanted and bar and bar.args != (wanted,):
            others.append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session", autouse=True)
def surroundings() -> Iterator[Path]:
    """Folders and settings of this test run, inherited by every process that it starts."""
    binary = ROOT / "bin" / "flightsvc"
    if not binary.exists():
        pytest.exit(f"{binary} is not there; run: make build", returncode=1)
    with (
        # Under /tmp, not under pytest's own folder: the path of a socket has at most 107 bytes.
        tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in [name for name in os.environ if name.startswith("FLIGHTSVC_")]:
            patch.delenv(name)
        patch.setenv("FLIGHTSVC_BINARY", str(binary))
        patch.setenv("FLIGHTSVC_RUN_DIR", f"{folder}/run")
        patch.setenv("FLIGHTSVC_CACHE_DIR", f"{folder}/cache")
        patch.setenv("FLIGHTSVC_TUNE", "off")  # test_form.py lets a front fold models; it takes a processor
        patch.setenv("XDG_STATE_HOME", f"{folder}/state")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        yield Path(folder)


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the small SavedModels."""
    folder = ROOT / "build" / "models"
    script, done = Path(__file__).with_name("make_models.py"), folder / ".done"
    if done.exists() and done.stat().st_mtime > script.stat().st_mtime:  # by make, of this script
        return folder
    made = subprocess.run(
        [sys.executable, script, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def oracle(models: Path) -> Callable[..., dict[str, Any]]:
    """TensorFlow in Python: ``oracle("mlp", x=array)`` returns the outputs as numpy arrays by name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    loaded: dict[str, Any] = {}

    def run(name: str, **inputs: Any) -> dict[str, Any]:
        if name not in loaded:
            loaded[name] = tf.saved_model.load(str(models / name))
        outputs = loaded[name].signatures["serving_default"](**{k: tf.constant(v) for k, v in inputs.items()})
        return {key: value.numpy() for key, value in outputs.items()}

    return run


@pytest.fixture(scope="session")
def client(surroundings: Path) -> Iterator[flightsvc.Client]:
    """A client of the user's own front, started for this test run and ended with it."""
    with flightsvc.connect() as client:
        yield client
        with contextlib.suppress(flightsvc.FlightsvcError):
            front = psutil.Process(client.status()["pid"])
            client.shutdown()
            front.wait(20)  # its folder goes next


@pytest.fixture
def endpoint(client: flightsvc.Client, surroundings: Path) -> str:
    """The address of the front of ``client``, started if need be."""
    client.status()
    return f"grpc+unix://{surroundings}/run/user/front.sock"


@pytest.fixture(scope="session")
def spark(surroundings: Path) -> Iterator[Any]:
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local[2]")
        .appName("flightsvc tests")
        # A JVM that lives for minutes compiles fast rather than well.
        .config("spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "100")
        .config("spark.flightsvc.retryTimeout", "60s")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
