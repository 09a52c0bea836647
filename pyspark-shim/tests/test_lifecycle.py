"""What ends with what: executors, drivers, daemons, runners and fronts are killed under real Spark jobs.

Each application is a process of its own: this file, run as a program (see ``drive``), with a local cluster
of executors and folders of its own. The test talks to it by a line per command on its standard input and
reads the answers from files. Only processes below the application are killed, and fronts that the
application's own run-dir names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from figures import PROVE, count, report
from processes import is_gone, left, until, until_clean

import flightsvc
from flightsvc import sidecar

TIMES = count(1, 3)  # each kill
RUNNER_KILLS = count(2, 4)  # in one job
PARTITIONS, BATCHES, BATCH_ROWS = 2, 40, 25
TURNS = 10_000  # of the loop in the model ``slow``: some 50 ms for each record batch
JOB_SECONDS = 180.0
START_SECONDS = 180.0
# JVMs that live for a minute compile fast rather than well.
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


# The test's side.


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
    until(lambda: is_gone(process), 10, f"end of process {process.pid}")


@dataclasses.dataclass
class Front:
    """A front, found by the file in its folder."""

    folder: Path
    process: psutil.Process
    answered_file: Path

    def answered(self) -> int:
        """How many record batches its answers have passed on."""
        return self.answered_file.stat().st_size if self.answered_file.exists() else 0

    def models(self) -> list[dict[str, Any]]:
        with flightsvc.connect(f"{self.folder}/front.sock") as client:
            return list(client.status()["models"])

    def streaming(self, model: str) -> psutil.Process | None:
        """The runner of a model if it has a stream; it is a child of the front."""
        for about in self.models():
            if about["dir"].endswith(f"/{model}") and about["streams"]:
                with contextlib.suppress(psutil.NoSuchProcess):  # the one just killed, not yet noticed
                    runner = psutil.Process(about["pid"])
                    assert runner.ppid() == self.process.pid
                    return runner
        return None


class Application:
    """A Spark application with a cluster of executors, in folders of its own."""

    def __init__(self, models: Path, size: int):
        self.size = size  # executors
        self.folder = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))
        self.run_dir = self.folder / "run"
        (self.folder / "answered").mkdir()
        environ = {
            **os.environ,
            "FLIGHTSVC_RUN_DIR": str(self.run_dir),
            "FLIGHTSVC_CACHE_DIR": str(self.folder / "cache"),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.driver = psutil.Popen(
                [sys.executable, __file__, str(self.folder), str(models), str(size)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
                text=True,
            )
        self.asked = 0
        self.id = self.ask("start", START_SECONDS)

    def command(self, line: str) -> int:
        """Let the driver do something; ``answer`` waits for it."""
        self.driver.stdin.write(line + "\n")
        self.driver.stdin.flush()
        self.asked += 1
        return self.asked

    def answer(self, number: int, seconds: float = JOB_SECONDS) -> Any:
        file = self.folder / f"{number}.json"
        until(lambda: file.exists() or self.driver.poll() is not None, seconds, f"answer {number}")
        assert file.exists(), "the driver ended:\n" + self.log.read_text()[-5000:]
        answer = json.loads(file.read_text())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def ask(self, line: str, seconds: float = JOB_SECONDS) -> Any:
        return self.answer(self.command(line), seconds)

    def complaints(self) -> str:
        """What Spark has said about tasks that failed."""
        lines = self.log.read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if "Lost task" in line), 0)
        return "\n".join(lines[first:][:40])

    def jvms(self) -> list[psutil.Process]:
        """The driver's JVM, first, and those of the executors, which are its children."""
        return [p for p in self.driver.children(recursive=True) if command(p)[:1] == ["java"]]

    def executors(self) -> list[psutil.Process]:
        return [p for p in self.jvms() if any("CoarseGrainedExecutorBackend" in word for word in command(p))]

    def front(self, owner: psutil.Process) -> Front | None:
        """The front that belongs to a process, if there is one."""
        stat = sidecar._process(owner.pid)
        folder = self.run_dir / sidecar.Owner(stat.pid, stat.start).folder
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            named = json.loads((folder / "front").read_text())
            if sidecar._process(named["pid"]).start == named["start"]:
                process = psutil.Process(named["pid"])
                return Front(folder, process, self.folder / "answered" / str(process.pid))
        return None

    def working(self, owner: psutil.Process) -> Front:
        """Wait until the front of an executor passes on answers."""
        until(lambda: (front := self.front(owner)) and front.answered(), JOB_SECONDS, "first answer")
        front = self.front(owner)
        assert front is not None
        return front

    def left(self) -> list[str]:
        """All that there is of ours."""
        return left(self.run_dir, self.folder / "cache", self.folder)

    def until_clean(self, left: Callable[[], list[str]] | None = None) -> float:
        """Return after how many seconds nothing is left; the JVM is gone now."""
        return until_clean(left or self.left)

    def close(self) -> None:
        """End what a failed test has left."""
        tree = [] if is_gone(self.driver) else [*self.driver.children(recursive=True), self.driver]
        for path in self.run_dir.glob("*/front"):
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                named = json.loads(path.read_text())
                if sidecar._process(named["pid"]).start == named["start"]:
                    tree.append(psutil.Process(named["pid"]))
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.driver.stdin.close()
        self.driver.wait(20)
        self.until_clean(lambda: [found for found in self.left() if " process " in found])
        shutil.rmtree(self.folder)


def command(process: psutil.Process) -> list[str]:
    """The command line of a process with the program's bare name; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        program, *rest = process.cmdline() or [""]
        return [Path(program).name, *rest]
    return []


@contextlib.contextmanager
def application(models: Path, size: int = 2) -> Iterator[Application]:
    it = Application(models, size)
    try:
        yield it
    finally:
        it.close()
        # A local cluster writes its executors' folders into the installation.
        spark = importlib.util.find_spec("pyspark")
        shutil.rmtree(Path(spark.submodule_search_locations[0], "work", it.id), ignore_errors=True)


@pytest.fixture(scope="module")
def shared(models: Path) -> Iterator[Application]:
    """The application that survives what happens to it; the last test ends it."""
    with application(models) as it:
        yield it


@pytest.fixture(scope="module")
def undisturbed(shared: Application) -> dict[str, Any]:
    """The answer of the job to which nothing happens."""
    answer = shared.ask("job")
    rows = PARTITIONS * BATCHES * BATCH_ROWS
    assert [row[:2] for row in answer["rows"]] == [[i * PARTITIONS // rows, i] for i in range(rows)]
    assert [row[2] for row in answer["rows"]] == [TURNS + i % 100 for i in range(rows)]
    assert answer["failed_tasks"] == 0, shared.complaints()
    return answer


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Rows, order and outputs are those of the undisturbed job."""
    assert [row[:2] for row in got["rows"]] == [row[:2] for row in want["rows"]]
    outputs, expected = (np.array([row[2:] for row in answer["rows"]]) for answer in (got, want))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def age(process: psutil.Process) -> tuple[float, int]:
    """Order processes by their start; two may start in the same clock tick."""
    return process.create_time(), process.pid


def kill_daemon(it: Application, executor: psutil.Process, undisturbed: dict[str, Any]) -> None:
    """Kill the daemon in the middle of a job: that one and the next end rightly at the same front."""
    job = it.command("job")
    front = it.working(executor)
    [daemon] = [p for p in executor.children() if "pyspark.daemon" in command(p)]
    kill(daemon)
    assert_same(it.answer(job), undisturbed)
    assert_same(it.ask("job"), undisturbed)
    after = it.front(executor)
    assert after is not None
    assert after.process == front.process


def test_the_daemon_may_die(shared: Application, undisturbed: dict[str, Any]):
    """The workers below it go on, and are used again by the tests that follow."""
    kill_daemon(shared, min(shared.executors(), key=age), undisturbed)


def test_runners_may_die(shared: Application, undisturbed: dict[str, Any]):
    killed: list[psutil.Process] = []
    for _ in range(TIMES):
        job = shared.command("job")
        executors = shared.executors()
        assert len(executors) == 2
        answered = {executor: 0 for executor in executors}
        for executor in executors:
            if front := shared.front(executor):
                answered[executor] = front.answered()
        for number in range(RUNNER_KILLS):
            executor = executors[number % 2]
            front = until(lambda: shared.front(executor), JOB_SECONDS, "front")  # noqa: B023
            until(lambda: front.answered() > answered[executor], JOB_SECONDS, "answer")  # noqa: B023
            runner = until(lambda: front.streaming("slow"), JOB_SECONDS, "stream")  # noqa: B023
            answered[executor] = front.answered()
            assert runner not in killed
            kill(runner)
            killed.append(runner)
        answer = shared.answer(job)
        assert_same(answer, undisturbed)
        assert answer["failed_tasks"] == 0, shared.complaints()
    report(
        runner_kills_in_stream=len(killed),
        runner_kill_jobs=TIMES,
        runner_kill_jobs_wanted=5,
        runner_kill_failed_tasks=0,
    )


def test_the_front_may_die(shared: Application, undisturbed: dict[str, Any]):
    seconds = []
    for _ in range(TIMES):
        before = {executor: front for executor in shared.executors() if (front := shared.front(executor))}
        answered = {executor: front.answered() for executor, front in before.items()}
        job = shared.command("job")
        executor = shared.executors()[0]
        front = shared.working(executor)
        until(lambda: front.answered() > answered.get(executor, 0), JOB_SECONDS, "answer")  # noqa: B023
        until(lambda: front.streaming("slow"), JOB_SECONDS, "stream")  # noqa: B023
        runners = front.process.children()
        assert len(runners) == 2
        kill(front.process)
        seconds.append(shared.until_clean(lambda: [str(p) for p in runners if not is_gone(p)]))  # noqa: B023
        answer = shared.answer(job)
        assert_same(answer, undisturbed)
        assert answer["failed_tasks"] == 0, shared.complaints()
        after = shared.front(executor)
        assert after is not None
        assert after.folder == front.folder
        assert after.process != front.process
    report(front_kills=TIMES, front_kills_wanted=5, seconds_until_runners_of_killed_front_ended=seconds)


def test_stopping_early(shared: Application):
    """LIMIT, take and a consumer that stops: no error, and the same worker works afterwards."""
    answer = shared.ask(f"early {TIMES}")
    assert answer["limit"] == 3 * TIMES
    assert answer["take"] == 2 * TIMES
    assert answer["first"] == answer["whole"] == PARTITIONS * TIMES
    assert answer["writers_left"] == 0
    assert answer["again"]
    assert answer["failed_tasks"] == 0, shared.complaints()
    for executor in shared.executors():
        front = shared.front(executor)
        assert front is not None
        until(lambda: not any(m["streams"] for m in front.models()), 5, "end of streams")  # noqa: B023
    report(early_stops=4 * TIMES, early_stop_workers_used_again=answer["again"])


def test_an_executor_may_die(shared: Application, undisturbed: dict[str, Any]):
    """At the full count its daemon first. Spark replaces it, and the next one killed is the replacement."""
    seconds = []
    for _ in range(TIMES):
        until(lambda: len(shared.executors()) == 2, JOB_SECONDS, "executors")
        executor = max(shared.executors(), key=age)
        if PROVE:
            kill_daemon(shared, executor, undisturbed)
        front = shared.working(executor)
        answered = front.answered()
        job = shared.command("job")
        until(lambda: front.answered() > answered, JOB_SECONDS, "answer")  # noqa: B023
        until(lambda: front.streaming("slow"), JOB_SECONDS, "stream")  # noqa: B023
        processes = [front.process, *front.process.children()]
        assert len(processes) == 3
        kill(executor)

        def left(front: Front = front, processes: list[psutil.Process] = processes) -> list[str]:
            alive = [str(process) for process in processes if not is_gone(process)]
            return alive + [str(path) for path in (front.folder, *front.folder.glob("*")) if path.exists()]

        seconds.append(shared.until_clean(left))
        assert_same(shared.answer(job), undisturbed)
    report(
        daemon_kills=TIMES + 1 if PROVE else 1,
        daemon_kills_wanted=5,
        executor_kills=TIMES,
        executor_kills_wanted=5,
        seconds_until_clean_after_executor_killed=seconds,
    )


def end_and_wait(it: Application, end: Callable[[], None]) -> float:
    """Return the seconds from the end of the application's processes until nothing is left."""
    processes = [it.driver, *it.jvms()]
    fronts = [it.front(p) for p in (it.driver, *it.executors())]
    assert len(processes) == it.size + 2
    assert [front is not None for front in fronts] == [True] * (it.size + 1)
    end()
    for process in processes:
        until(lambda: is_gone(process), 60, f"end of {process}")  # noqa: B023
    return it.until_clean()


def test_the_application_ends(shared: Application, models: Path):
    """First the one that has seen it all, by stop and exit, then others that exit without a stop."""
    stopped, exited = [], []
    shared.ask("job")
    executors = shared.executors()
    assert len(executors) == 2
    folders = [front.folder for executor in executors if (front := shared.front(executor))]
    assert len(folders) == 2

    def stop() -> None:
        shared.ask("stop")
        for executor in executors:
            until(lambda: is_gone(executor), 30, "end of executor")  # noqa: B023
        stopped.append(shared.until_clean(lambda: [str(path) for path in folders if path.exists()]))
        shared.driver.stdin.close()

    exited.append(end_and_wait(shared, stop))
    assert shared.driver.wait() == 0
    for _ in range(TIMES - 1):
        with application(models) as it:
            assert it.ask("short") == PARTITIONS * BATCH_ROWS
            exited.append(end_and_wait(it, it.driver.stdin.close))
            assert it.driver.wait() == 0
    report(
        application_ends=TIMES,
        application_ends_wanted=5,
        seconds_until_clean_after_stop=stopped,
        seconds_until_clean_after_exit=exited,
    )


@pytest.mark.parametrize("victim", ["jvm", "python"])
def test_a_driver_may_be_killed(models: Path, victim: str):
    seconds = []
    for _ in range(TIMES):
        with application(models, count(1, 2)) as it:
            it.command("long")
            until(lambda: len(it.executors()) == it.size, JOB_SECONDS, "executors")
            for executor in it.executors():
                front = it.working(executor)
                until(lambda: front.streaming("slow"), JOB_SECONDS, "stream")  # noqa: B023
            process = it.jvms()[0] if victim == "jvm" else it.driver
            seconds.append(end_and_wait(it, lambda: process.send_signal(signal.SIGKILL)))  # noqa: B023
    report(
        **{
            f"driver_{victim}_kills": TIMES,
            f"driver_{victim}_kills_wanted": 5,
            f"seconds_until_clean_after_driver_{victim}_killed": seconds,
        }
    )


# The driver's side.


def drive(folder: Path, models: Path, size: int) -> None:
    """Run a Spark application that does what its standard input says, until that ends."""
    driver = Driver(folder, models, size)
    for number, line in enumerate(sys.stdin, 1):
        try:
            name, *arguments = line.split()
            answer = {"result": getattr(driver, name)(*map(int, arguments))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        beside = folder / "answer"
        beside.write_text(json.dumps(answer))
        beside.rename(folder / f"{number}.json")
        if "error" in answer:
            sys.exit(answer["error"])


class Driver:
    """The application's commands."""

    def __init__(self, folder: Path, models: Path, size: int):
        self.folder, self.models, self.size = folder, models, size

    def start(self) -> str:
        from pyspark.sql import SparkSession

        self.spark = (
            SparkSession.builder.master(f"local-cluster[{self.size},1,1024]")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.local.dir", str(self.folder / "local"))
            .config("spark.sql.warehouse.dir", str(self.folder / "warehouse"))
            .config("spark.sql.execution.arrow.maxRecordsPerBatch", str(BATCH_ROWS))
            .config("spark.driver.extraJavaOptions", JAVA_OPTIONS)
            .config("spark.executor.extraJavaOptions", JAVA_OPTIONS)
            .getOrCreate()
        )
        self.context = self.spark.sparkContext
        self.context.setLogLevel("WARN")
        return str(self.context.applicationId)

    def frame(self, batches: int, turns: int) -> Any:
        return self.spark.range(0, PARTITIONS * batches * BATCH_ROWS, 1, PARTITIONS).selectExpr(
            "spark_partition_id() AS part",
            "id",
            f"array(cast({turns} + id % 100 AS float)) AS x",
            "transform(sequence(0, 7), v -> cast(sin(id + v) AS float)) AS a",
            "transform(sequence(0, 3), v -> cast(cos(id - v) AS float)) AS b",
        )

    def slow(self, frame: Any) -> Any:
        """Run the model ``slow``; its answers are counted in files by front."""
        slow = flightsvc.Model((self.models / "slow").as_uri())
        schema = slow.output_schema(frame.schema, inputs={"x": "x"}, sidecar="who")
        mapper = slow.mapper(inputs={"x": "x"}, sidecar="who")
        folder = str(self.folder / "answered")

        def counted(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in mapper(batches):
                pid = batch.column("who")[0].as_py().rpartition(":")[2]
                with open(f"{folder}/{pid}", "a") as file:
                    file.write(".")
                yield batch

        return frame.mapInArrow(counted, schema)

    def job(self) -> dict[str, Any]:
        """Run both models, each in a worker of its own."""
        self.all_executors()
        frame = flightsvc.Model((self.models / "two").as_uri()).transform(
            self.slow(self.frame(BATCHES, TURNS))
        )
        with self.failures() as failed:
            rows = frame.select("part", "id", "y", "sum", "logits").collect()
        rows = [[row.part, row.id, row.y[0], *row.sum, *row.logits] for row in rows]
        return {"rows": rows, "failed_tasks": failed()}

    def short(self) -> int:
        """Run one model over few rows."""
        self.all_executors()
        return int(self.slow(self.frame(1, 1)).count())

    def long(self) -> int:
        """Run one model for so long that something may happen to it."""
        self.all_executors()
        return int(self.slow(self.frame(100 * BATCHES, TURNS)).count())

    def early(self, times: int) -> dict[str, Any]:
        self.all_executors()
        mapper = flightsvc.Model((self.models / "slow").as_uri()).mapper(inputs={"x": "x"})
        result = {"limit": 0, "take": 0, "first": 0, "whole": 0, "writers_left": 0, "again": 0}

        def first_only(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            """Take one answer and leave; the input is read to its end, so Spark keeps the worker."""
            import threading

            answers = mapper(batches)
            next(answers)
            answers.close()
            writers = [t.name for t in threading.enumerate() if t.name == "flightsvc-writer"]
            for _ in batches:
                pass
            yield pa.record_batch({"pid": [os.getpid()], "value": [len(writers)]})

        def whole(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            rows = sum(answer.num_rows for answer in mapper(batches))
            yield pa.record_batch({"pid": [os.getpid()], "value": [rows]})

        with self.failures() as failed:
            for _ in range(times):
                frame = self.frame(BATCHES, 1000)
                answers = flightsvc.Model((self.models / "slow").as_uri()).transform(frame, inputs={"x": "x"})
                result["limit"] += len(answers.limit(3).collect())
                result["take"] += len(answers.take(2))
                # Idle workers are used in turn: after some rounds one that has stopped early works again.
                stopped: set[int] = set()
                for _ in range(8):
                    first = frame.mapInArrow(first_only, "pid long, value long").collect()
                    stopped |= {row.pid for row in first}
                    result["writers_left"] += sum(row.value for row in first)
                    rows = frame.mapInArrow(whole, "pid long, value long").collect()
                    assert [row.value for row in rows] == [BATCHES * BATCH_ROWS] * PARTITIONS
                    if again := stopped & {row.pid for row in rows}:
                        result["again"] += len(again)
                        break
                else:
                    raise AssertionError("no worker was used again")
                result["first"] += len(first)
                result["whole"] += len(rows)
        return {**result, "failed_tasks": failed()}

    def stop(self) -> None:
        self.spark.stop()

    def all_executors(self) -> None:
        """Wait until all executors take tasks, so that each of two has one partition."""
        status = self.context._jsc.sc()
        executors = self.size + 1  # the driver is counted, too
        until(lambda: status.getExecutorMemoryStatus().size() == executors, START_SECONDS, "executors")

    @contextlib.contextmanager
    def failures(self) -> Iterator[Callable[[], int]]:
        """Yield what tells how many tasks have failed in the jobs begun here."""
        group = f"jobs {time.monotonic()}"
        self.context.setJobGroup(group, group)

        def failed() -> int:
            tracker = self.context.statusTracker()
            jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
            stages = [tracker.getStageInfo(stage) for job in jobs for stage in job.stageIds]
            return sum(stage.numFailedTasks for stage in stages if stage)

        yield failed


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
