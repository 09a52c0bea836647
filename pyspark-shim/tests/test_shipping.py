"""Models of the driver in Spark: they reach the workers without a path that both can read."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flightsvc
from flightsvc.model import Model
from flightsvc.server import archive, shipping


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the model ``ints``, with a digest of its own."""
    copy = tmp_path / "a model"
    shutil.copytree(models / "ints", copy)
    (copy / "note.txt").write_text(str(tmp_path))
    return copy


@pytest.fixture(scope="session")
def times(oracle: Callable[..., Any]) -> Callable[[Path, int], None]:
    """Write a SavedModel: x float32 [-1] -> y, so many times x."""
    import tensorflow as tf

    def write(folder: Path, factor: int) -> None:
        module = tf.Module()
        module.factor = tf.Variable(float(factor))
        serve = tf.function(
            lambda x: {"y": x * module.factor}, input_signature=[tf.TensorSpec([None], tf.float32, "x")]
        )
        tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})

    return write


def ints(spark: Any, rows: int = 20, partitions: int = 2) -> Any:
    return spark.range(rows).repartition(partitions).selectExpr("array(id, 0L, 1L) AS i")


def totals(frame: Any) -> list[int]:
    return sorted(row.total for row in frame.collect())


def pushes(state: Path, digest: str) -> int:
    """How often fronts that log below ``state`` have taken a model in."""
    lines = [line for log in state.glob("flightsvc/log/*") for line in log.read_text().splitlines()]
    return sum('"model pushed"' in line and digest in line for line in lines)


def executor_front(surroundings: Path, digest: str) -> dict[str, Any]:
    """Return the status of the front that has the model in memory, which is the executor's."""
    for socket in (surroundings / "run").glob("*/front.sock"):
        if socket.parent.name != "user":
            with flightsvc.connect(str(socket)) as front:
                status = front.status()
            if digest in [model["model"] for model in status["models"]]:
                return status
    raise AssertionError(f"no front of an executor has {digest} in memory")


def test_the_folder_may_go_once_it_is_shipped(spark: Any, folder: Path, surroundings: Path):
    (folder / "padding").write_bytes(os.urandom(20 << 20))  # so that the workers meet
    digest = archive.digest(folder)
    frame = Model(folder).transform(ints(spark, 40, partitions=8))
    shutil.rmtree(folder)
    assert totals(frame) == list(range(1, 41))
    status = executor_front(surroundings, digest)
    assert not [model for model in status["models"] if "a%20model" in model["model"]]
    assert totals(frame) == list(range(1, 41))
    assert pushes(surroundings / "state", digest) == 1


def test_a_front_that_is_lost_and_a_cache_that_is_lost(spark: Any, folder: Path, surroundings: Path):
    digest = archive.digest(folder)
    frame = Model(folder).transform(ints(spark))
    assert totals(frame) == list(range(1, 21))
    os.kill(executor_front(surroundings, digest)["pid"], signal.SIGKILL)
    assert totals(frame) == list(range(1, 21))
    assert pushes(surroundings / "state", digest) == 1  # it was still on the disk
    shutil.rmtree(surroundings / "cache" / "models" / digest.removeprefix("sha256:"))
    assert totals(frame) == list(range(1, 21))
    assert pushes(surroundings / "state", digest) == 1  # it was still in memory
    os.kill(executor_front(surroundings, digest)["pid"], signal.SIGKILL)
    assert totals(frame) == list(range(1, 21))
    assert pushes(surroundings / "state", digest) == 2


def test_a_changed_folder_is_shipped_anew(spark: Any, tmp_path: Path, times: Callable[[Path, int], None]):
    times(tmp_path / "m", 2)
    frame = spark.range(1, 4).selectExpr("cast(id AS float) AS x")
    model = Model(tmp_path / "m")
    before = model.transform(frame)
    times(tmp_path / "m", 3)
    after = model.transform(frame)
    assert sorted(row.y for row in after.collect()) == [3, 6, 9]
    assert sorted(row.y for row in before.collect()) == [2, 4, 6]


def test_an_unchanged_folder_is_read_once(spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    read = []
    digest = archive.digest
    monkeypatch.setattr(archive, "digest", lambda place: read.append(place) or digest(place))
    for _ in range(3):
        Model(folder).transform(ints(spark))
    assert read == [folder]
    os.utime(folder / "note.txt", (1, 1))
    Model(folder).transform(ints(spark))
    assert read == [folder, folder]


def test_versions(spark: Any, tmp_path: Path, times: Callable[[Path, int], None]):
    for version in (2, 10):
        times(tmp_path / "m" / str(version), version)
    (tmp_path / "m" / "11").mkdir()  # holds no model
    frame = spark.range(1, 3).selectExpr("cast(id AS float) AS x")
    for version, expected in (("latest", [10, 20]), (2, [2, 4])):
        shipped = Model(tmp_path / "m", version=version).transform(frame)
        assert sorted(row.y for row in shipped.collect()) == expected
    with pytest.raises(flightsvc.NotFoundError, match="version 3"):
        Model(tmp_path / "m", version=3).transform(frame)
    with pytest.raises(flightsvc.NotFoundError, match="no folder of version 3"):
        Model(tmp_path / "m", version=3).mapper(inputs={"x": "x"})


def test_what_cannot_be_shipped_is_refused_on_the_driver(spark: Any, folder: Path, tmp_path: Path):
    (folder / "variables" / "link").symlink_to("/etc/hostname")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"variables/link is a link; a model holds"):
        Model(folder).transform(ints(spark))
    with pytest.raises(flightsvc.NotFoundError, match=r"holds no saved_model\.pb"):
        Model(tmp_path).mapper(inputs={"i": "i"})
    with pytest.raises(flightsvc.NotFoundError, match="gone: there is no such folder"):
        Model(tmp_path / "gone").mapper(inputs={"i": "i"})


def test_errors_of_the_workers_name_the_path(spark: Any, models: Path):
    frame = spark.createDataFrame([(-1.0, "x")], "x float, text string")
    with pytest.raises(Exception, match="models/strict") as failed:
        Model(models / "strict").transform(frame).collect()
    assert "InvalidArgumentError: " in str(failed.value)
    assert "sha256:" not in str(failed.value).split("InvalidArgumentError: ")[-1]


def test_a_front_at_an_endpoint_gets_the_model_by_a_push(
    spark: Any, folder: Path, endpoint: str, client: flightsvc.Client
):
    digest = archive.digest(folder)
    spark.conf.set("spark.flightsvc.endpoint", endpoint)
    try:
        model = Model(folder)
        assert list(model.inputs) == ["i"]
        assert digest in [known["name"] for known in client.models()]
        frame = model.transform(ints(spark))
        shutil.rmtree(folder)
        assert totals(frame) == list(range(1, 21))
    finally:
        spark.conf.unset("spark.flightsvc.endpoint")
    assert digest in [known["model"] for known in client.status()["models"]]


def test_from_another_thread_and_another_session(spark: Any, folder: Path):
    frames = []

    def plan() -> None:
        frames.append(Model(folder).transform(ints(spark.newSession())))

    thread = threading.Thread(target=plan)
    thread.start()
    thread.join()
    shutil.rmtree(folder)
    assert totals(frames[0]) == list(range(1, 21))


def test_without_a_session_the_model_stays_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flightsvc.spark.dataframe.active_session", lambda: None)
    assert Model(folder).mapper(inputs={"i": "i"}).request.model.reference == folder.as_uri()


def test_an_archive_that_did_not_arrive(spark: Any, client: flightsvc.Client, folder: Path):
    digest = archive.digest(folder)
    with pytest.raises(
        flightsvc.NotFoundError, match=r"model lite: its archive .* has not reached this work"
    ):
        shipping.receive(client._connection, digest, "lite")
    whole = b"".join(archive.chunks(folder))
    broken = shipping.private_folder() / f"flightsvc-{digest.removeprefix('sha256:')}.model"
    broken.write_bytes(whole[: len(whole) // 2])
    spark.sparkContext.addFile(str(broken))
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"model lite: its archive .* was refused: "):
        shipping.receive(client._connection, digest, "lite")
    assert not shipping.known(client._connection, digest)


def test_the_archive_is_a_plain_tar_that_spark_leaves_alone(spark: Any, folder: Path):
    from pyspark import SparkFiles

    Model(folder).mapper(inputs={"i": "i"})
    sent = Path(SparkFiles.get(f"flightsvc-{archive.digest(folder).removeprefix('sha256:')}.model"))
    with tarfile.open(fileobj=io.BytesIO(sent.read_bytes()), mode="r:") as tar:
        assert sorted(tar.getnames()) == archive.files(folder)
    assert not (sent.parent / "saved_model.pb").exists()


def test_archives_of_a_killed_process_go_with_the_next(tmp_path: Path):
    script = (
        "import sys; from flightsvc.server import shipping; print(shipping.private_folder(), flush=True);"
        "sys.stdin.read()"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    started: list[Any] = []

    def start() -> Path:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environ,
            )
        )
        return Path(started[-1].stdout.readline().strip())

    try:
        lost, lives = start(), start()
        assert lost.stat().st_mode & 0o777 == 0o700
        (lost / "m.model").write_text("x")
        started[0].kill()
        started[0].wait()
        last = start()
        assert sorted(tmp_path.iterdir()) == sorted([lives, last])
    finally:
        for process in started:
            process.communicate("")
    assert list(tmp_path.iterdir()) == []


def test_archives_go_with_their_process():
    script = (
        "from flightsvc.server import shipping; folder = shipping.private_folder();"
        "print(folder, folder.exists())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    place, existed = done.stdout.split()
    assert existed == "True"
    assert not Path(place).exists()
