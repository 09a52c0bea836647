"""Spark applications to which things happen: each a process of its own, with a local cluster and folders.

This file, run as a program, is the driver (see ``drive``). A test talks to it by a line per command on its
standard input and reads the answers from files. Only processes below an application are killed, and fronts
that the application's own run-dir names.

The job: 100,000 rows through the model ``mixed``, shipped by the driver, with strings, nulls, floats, nested
lists, rows that the model refuses and columns that only pass through. The first job's result is kept, and the
following ones are compared with it by the driver, which tells the differences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from processes import is_gone, left, until, until_clean

import flightsvc
from flightsvc.server import sidecar

ROWS, PARTITIONS, BATCH_ROWS = 100_000, 16, 250
EXECUTORS = 2
JOB_SECONDS = 180.0
START_SECONDS = 180.0
HEARTBEAT_SECONDS = 10  # without which an executor is lost
TOLERANCE = (1e-4, 1e-6)  # relative and absolute: docs/numerics.md

# JVMs that live for a minute compile fast rather than well.
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
CONF = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_ROWS),
    "spark.driver.extraJavaOptions": JAVA_OPTIONS,
    "spark.executor.extraJavaOptions": JAVA_OPTIONS,
    "spark.executor.memory": "640m",
    "spark.decommission.enabled": "true",
    "spark.executor.heartbeatInterval": "1s",
    "spark.network.timeoutInterval": "1s",
    "spark.storage.blockManagerHeartbeatTimeoutMs": str(HEARTBEAT_SECONDS * 1000),
}


# The test's side.


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

    def streaming(self) -> psutil.Process | None:
        """A runner that has a stream; it is a child of the front."""
        for about in self.models():
            if about["streams"]:
                with contextlib.suppress(psutil.NoSuchProcess):  # the one just killed, not yet noticed
                    runner = psutil.Process(about["pid"])
                    assert runner.ppid() == self.process.pid
                    return runner
        return None


class Application:
    """A Spark application with a cluster of executors, in folders of its own."""

    def __init__(self, models: Path, undisturbed: Path):
        """Start it; the result of the first job is kept in the file ``undisturbed``."""
        self.folder = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))
        self.run_dir, self.cache_dir = self.folder / "run", self.folder / "cache"
        for name in ("answered", "tmp"):
            (self.folder / name).mkdir()
        environ = {
            **os.environ,
            "FLIGHTSVC_RUN_DIR": str(self.run_dir),
            "FLIGHTSVC_CACHE_DIR": str(self.cache_dir),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "TMPDIR": str(self.folder / "tmp"),
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        self.log = self.folder / "log"
        self.ids: list[str] = []
        self.asked = 0
        with self.log.open("w") as log:
            self.driver = psutil.Popen(
                [sys.executable, __file__, str(self.folder), str(models), str(undisturbed)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
                text=True,
            )

    def start(self) -> None:
        """Let the driver start a session, and wait for it."""
        self.ids.append(self.ask("start", START_SECONDS))

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
        assert "error" not in answer, answer["error"] + "\n" + self.complaints()
        return answer["result"]

    def ask(self, line: str, seconds: float = JOB_SECONDS) -> Any:
        return self.answer(self.command(line), seconds)

    def begin(self, job: str = "rows") -> dict[int, int]:
        """Begin a job, and return what each front had answered before, by its process id."""
        before = {int(file.name): file.stat().st_size for file in (self.folder / "answered").iterdir()}
        self.ask(f"begin {job}")
        return before

    def finish(self) -> dict[str, Any]:
        """Wait for the job: rows, order, nulls, errors and schema must be those of the undisturbed one."""
        result = dict(self.ask("finish"))
        assert result["differences"] == [], f"{result['differences']}\n{self.complaints()}"
        return result

    def is_done(self) -> bool:
        return bool(self.ask("is_done"))

    def complaints(self) -> str:
        """What Spark has said about tasks that failed."""
        lines = self.log.read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if "Lost task" in line), 0)
        return "\n".join(lines[first:][:40])

    def jvms(self) -> list[psutil.Process]:
        """The driver's JVM, first, and those of the executors, which are its children."""
        return [p for p in self.driver.children(recursive=True) if command(p)[:1] == ["java"]]

    def executors(self) -> list[psutil.Process]:
        """The executors, the oldest first."""
        found = [p for p in self.jvms() if any("CoarseGrainedExecutorBackend" in word for word in command(p))]
        with contextlib.suppress(psutil.NoSuchProcess):
            return sorted(found, key=lambda p: (p.create_time(), p.pid))
        return []

    def front(self, owner: psutil.Process) -> Front | None:
        """The front that belongs to a process, if there is one: an executor's child, or the driver's own."""
        for path in self.run_dir.glob("*/front"):
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                named = json.loads(path.read_text())
                process = psutil.Process(named["pid"])
                if sidecar._process(named["pid"]).start != named["start"]:
                    continue
                stat = sidecar._process(owner.pid)
                own = path.parent.name == sidecar.Owner(stat.pid, stat.start).folder
                if own or process.ppid() == owner.pid:
                    return Front(path.parent, process, self.folder / "answered" / str(process.pid))
        return None

    def working(self, before: dict[int, int]) -> tuple[psutil.Process, Front]:
        """Wait until the front of an executor passes on answers in this job; the first one."""

        def first() -> tuple[psutil.Process, Front] | None:
            for executor in self.executors():
                front = self.front(executor)
                if front and front.answered() > before.get(front.process.pid, 0):
                    return executor, front
            return None

        return until(first, JOB_SECONDS, "answers")

    def fronts(self) -> list[Front]:
        """The fronts of all executors."""
        return [front for executor in self.executors() if (front := self.front(executor))]

    def everything(self, kind: str = "") -> list[str]:
        """All that there is of ours, or all of one kind."""
        return left(self.run_dir, self.cache_dir, self.folder / "tmp", kind=kind)

    def leftovers(self) -> list[str]:
        """What there is of ours that nobody has any more."""
        return left(self.run_dir, self.cache_dir, self.folder / "tmp", used=False)

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
        with contextlib.suppress(BrokenPipeError):
            self.driver.stdin.close()
        self.driver.wait(20)
        until_clean(lambda: self.everything("process"))
        shutil.rmtree(self.folder)
        # A local cluster writes its executors' folders into the installation.
        spark = importlib.util.find_spec("pyspark")
        for name in self.ids:
            shutil.rmtree(Path(spark.submodule_search_locations[0], "work", name), ignore_errors=True)


def command(process: psutil.Process) -> list[str]:
    """The command line of a process with the program's bare name; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        program, *rest = process.cmdline() or [""]
        return [Path(program).name, *rest]
    return []


# The driver's side.


def drive(folder: Path, models: Path, undisturbed: Path) -> None:
    """Run a Spark application that does what its standard input says, until that ends."""
    driver = Driver(folder, models, undisturbed)
    for number, line in enumerate(sys.stdin, 1):
        try:
            name, *arguments = line.split()
            answer = {"result": getattr(driver, name)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        beside = folder / "answer"
        beside.write_text(json.dumps(answer))
        beside.rename(folder / f"{number}.json")
        if "error" in answer:
            sys.exit(answer["error"])


def differences(got: pa.Table, want: pa.Table) -> list[str]:
    """Return in what two tables differ: all of it exact, but floats."""
    if got.schema != want.schema:
        return [f"schema {got.schema} in place of {want.schema}"]
    if got.num_rows != want.num_rows:
        return [f"{got.num_rows} rows in place of {want.num_rows}"]
    relative, absolute = TOLERANCE
    found = []
    for name in want.column_names:
        one, other = got[name].combine_chunks(), want[name].combine_chunks()
        if one.type == pa.float32() and one.is_null().equals(other.is_null()):
            off = pc.abs(pc.subtract(one, other))
            bound = pc.add(pc.multiply(pc.abs(other), relative), absolute)
            equal = bool(pc.all(pc.less_equal(off, bound)).as_py())
        else:
            equal = one.equals(other)
        if not equal:
            found.append(f"column {name}")
    return found


class Driver:
    """The application's commands."""

    def __init__(self, folder: Path, models: Path, undisturbed: Path):
        self.folder, self.models, self.undisturbed = folder, models, undisturbed
        self.job: threading.Thread | None = None
        self.group, self.result, self.error = "", pa.table({}), ""

    def start(self) -> str:
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.master(f"local-cluster[{EXECUTORS},1,640]")
        for key, value in {**CONF, **flightsvc.spark_conf()}.items():
            builder = builder.config(key, value)
        self.spark = (
            builder.config("spark.local.dir", str(self.folder / "local"))
            .config("spark.sql.warehouse.dir", str(self.folder / "warehouse"))
            .getOrCreate()
        )
        self.context = self.spark.sparkContext
        self.context.setLogLevel("WARN")
        return str(self.context.applicationId)

    def counted(self, frame: Any, model: str, **options: Any) -> Any:
        """Run a model; its answers are counted in files by front."""
        served = flightsvc.Model(self.models / model)
        schema = served.output_schema(frame.schema, sidecar="who", **options)
        mapper = served.mapper(sidecar="who", **options)
        folder = str(self.folder / "answered")

        def counted(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in mapper(batches):
                pid = batch.column("who")[0].as_py().rpartition(":")[2]
                with open(f"{folder}/{pid}", "a") as file:
                    file.write(".")
                yield batch

        return frame.mapInArrow(counted, schema).drop("who")

    def rows(self) -> Any:
        """The job: a row in 97 is refused, one in 101 and one in 103 have a null."""
        frame = self.spark.range(0, ROWS, 1, PARTITIONS).selectExpr(
            "id",
            "spark_partition_id() AS part",
            "IF(id % 7 = 0, NULL, concat('kept ', id)) AS kept",
            "IF(id % 101 = 0, NULL, transform(sequence(1, IF(id % 97 = 0, 3, 4)),"
            " v -> cast(sin(id + v) AS float))) AS a",
            "cast(id % 1000 - 500 AS int) AS b",
            "array(id % 2 = 0, id % 3 = 0) AS c",
            "IF(id % 103 = 0, NULL, concat('größe ', id)) AS d",
            "array(array(cos(id), 1D), array(2D, id / 1000D)) AS e",
        )
        return self.counted(frame, "mixed", on_error="column", error_column="why")

    def slow(self) -> Any:
        """A job of long runs: about half a second for each record batch."""
        frame = self.spark.range(0, 40 * BATCH_ROWS * EXECUTORS, 1, EXECUTORS)
        return self.counted(frame.selectExpr("id", "array(100000f) AS x"), "slow")

    def begin(self, name: str) -> None:
        """Begin a job in a thread of its own, when both executors take tasks."""
        status = self.context._jsc.sc()
        want = EXECUTORS + 1  # the driver is counted, too
        until(lambda: status.getExecutorMemoryStatus().size() == want, START_SECONDS, "executors")
        self.group = f"job {time.monotonic()}"

        def run() -> None:
            try:
                self.context.setJobGroup(self.group, self.group)
                self.result = getattr(self, name)().toArrow()
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"

        self.error = ""
        self.job = threading.Thread(target=run, name="job")
        self.job.start()

    def is_done(self) -> bool:
        return not self.job.is_alive()

    def finish(self) -> dict[str, Any]:
        """Compare the job's result; the first one ever is kept."""
        self.job.join()
        if self.error:
            raise RuntimeError(self.error)
        tracker = self.context.statusTracker()
        jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(self.group)]
        stages = [tracker.getStageInfo(stage) for job in jobs for stage in job.stageIds]
        table = self.result
        if not self.undisturbed.exists():
            beside = self.undisturbed.with_suffix(".part")
            with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            beside.rename(self.undisturbed)
        with pa.OSFile(str(self.undisturbed)) as file:
            want = pa.ipc.open_file(file).read_all()
        return {
            "differences": differences(table, want),
            "rows": table.num_rows,
            "failed_tasks": sum(stage.numFailedTasks for stage in stages if stage),
        }

    def cancel(self) -> float:
        """Cancel the job, and return when that was asked, on the monotonic clock."""
        asked = time.monotonic()
        self.context.cancelJobGroup(self.group)
        self.job.join()
        assert self.error, "the job ended before it was cancelled"
        return asked

    def stop(self) -> None:
        """End the session in the middle of its job."""
        self.spark.stop()
        self.job.join()
        assert self.error, "the job ended before the session"

    def early(self, times: str) -> dict[str, Any]:
        """Stop jobs before their answers have ended, and use the same workers again."""
        mapper = flightsvc.Model(self.models / "slow").mapper()
        result = {"limit": 0, "take": 0, "first": 0, "whole": 0, "writers_left": 0, "again": 0}

        def first_only(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            """Take one answer and leave; the input is read to its end, so Spark keeps the worker."""
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

        batches = 40
        frame = self.spark.range(0, batches * BATCH_ROWS * EXECUTORS, 1, EXECUTORS)
        frame = frame.selectExpr("id", "array(1000f) AS x")
        for _ in range(int(times)):
            answers = flightsvc.Model(self.models / "slow").transform(frame)
            result["limit"] += len(answers.limit(3).collect())
            result["take"] += len(answers.take(2))
            # Idle workers are used in turn: after some rounds one that has stopped early works again.
            stopped: set[int] = set()
            for _ in range(8):
                first = frame.mapInArrow(first_only, "pid long, value long").collect()
                stopped |= {row.pid for row in first}
                result["writers_left"] += sum(row.value for row in first)
                rows = frame.mapInArrow(whole, "pid long, value long").collect()
                assert [row.value for row in rows] == [batches * BATCH_ROWS] * EXECUTORS
                if again := stopped & {row.pid for row in rows}:
                    result["again"] += len(again)
                    break
            else:
                raise AssertionError("no worker was used again")
            result["first"] += len(first)
            result["whole"] += len(rows)
        return result


if __name__ == "__main__":
    drive(*map(Path, sys.argv[1:]))
