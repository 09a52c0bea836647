"""The Spark plugin: each executor's sidecar, its metrics, its settings, and what is left of it.

Each application is a process of its own: this file, run as a program (see ``drive``). The test sends it one
JSON line per command and reads one in answer.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from conftest import ROOT
from figures import PROVE, count, report
from processes import is_gone, left, until, until_clean

import flightsvc
from flightsvc.server import sidecar
from flightsvc.settings import Settings, spark_key

pytestmark = pytest.mark.java

JAR = ROOT / "build" / "spark-plugin" / "flightsvc-spark-plugin.jar"
PREFIX = "plugin.io.flightsvc.spark.FlightsvcPlugin."
SPARK_PREFIX = "spark.flightsvc."
KILLS = count(1, 20)
INIT_MILLISECONDS = count(3000, 300)  # in `make test` other suites have the cores
SECONDS = 120.0  # for any command
ROWS, TURNS = 4000, 10_000  # turns of the loop in the model ``slow``: some 50 ms for each record batch
BATCH_ROWS = 100
# JVMs that live for a minute compile fast rather than well.
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto"


# The test's side.


class Application:
    """A Spark application in folders of its own."""

    def __init__(self, models: Path, **environ: str):
        self.folder = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))
        self.run_dir = self.folder / "run"
        self.log = self.folder / "log"
        self.id = ""
        inherited = {name: value for name, value in os.environ.items() if name != "FLIGHTSVC_BINARY"}
        with self.log.open("w") as log:
            self.driver = psutil.Popen(
                [sys.executable, __file__, str(models)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env={
                    **inherited,
                    "FLIGHTSVC_RUN_DIR": str(self.run_dir),
                    "FLIGHTSVC_CACHE_DIR": str(self.folder / "cache"),
                    "TMPDIR": str(self.folder),
                    "XDG_STATE_HOME": str(self.folder / "state"),
                    "SPARK_LOCAL_IP": "127.0.0.1",
                    **environ,
                },
                start_new_session=True,
                text=True,
            )

    def tell(self, name: str, *args: Any) -> None:
        """Let the driver do something; ``answer`` waits for it."""
        self.driver.stdin.write(json.dumps([name, *args]) + "\n")
        self.driver.stdin.flush()

    def answer(self) -> Any:
        line = self.driver.stdout.readline()
        assert line, "the driver has ended:\n" + self.log.read_text()[-5000:]
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def ask(self, name: str, *args: Any) -> Any:
        self.tell(name, *args)
        return self.answer()

    def start(self, master: str, **settings: str) -> None:
        self.id = self.ask("start", master, str(self.folder), settings)

    def executors(self) -> list[psutil.Process]:
        """The JVMs that run tasks."""
        jvms = [p for p in self.driver.children(recursive=True) if p.name() == "java"]
        apart = [p for p in jvms if any("CoarseGrainedExecutorBackend" in word for word in p.cmdline())]
        return apart or jvms

    def left(self) -> list[str]:
        files = [str(path) for path in (self.folder / "local").rglob("flightsvc.endpoint*")]
        return files + left(self.run_dir, self.folder / "cache", self.folder)

    def end(self) -> float:
        """End the application as its user does, and return how long until nothing was left."""
        self.driver.stdin.close()
        assert self.driver.wait(60) == 0, self.log.read_text()[-5000:]
        return until_clean(self.left)

    def close(self) -> None:
        """End what a failed test has left."""
        tree = [] if is_gone(self.driver) else [*self.driver.children(recursive=True), self.driver]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.driver.stdin.close()
        self.driver.wait(20)
        self.driver.stdout.close()
        until_clean(lambda: [found for found in self.left() if " process " in found])
        shutil.rmtree(self.folder)
        if self.id:
            shutil.rmtree(work(self.id), ignore_errors=True)


def work(application: str) -> Path:
    """Where a local cluster has its executors' folders: in the installation."""
    spark = importlib.util.find_spec("pyspark")
    return Path(spark.submodule_search_locations[0], "work", application)


@contextlib.contextmanager
def application(models: Path, **environ: str) -> Iterator[Application]:
    if not JAR.exists():
        pytest.fail(f"{JAR} is not there; run: make spark-plugin")
    it = Application(models, **environ)
    try:
        yield it
    except BaseException:
        print(it.log.read_text()[-5000:])
        raise
    finally:
        it.close()


@pytest.fixture(scope="module", params=[*(["local[2]"] if PROVE else []), "local-cluster[2,1,768]"])
def app(models: Path, request: pytest.FixtureRequest) -> Iterator[Application]:
    """An application whose plugin finds the program beside its jar, or among the files that Spark ships."""
    with application(models, PATH=f"{ROOT / 'bin'}:{os.environ['PATH']}") as it:
        shipped = [str(ROOT / "bin" / name) for name in ("flightsvc", "flightsvc-runner")]
        (it.folder / "package" / "_jars").mkdir(parents=True)
        (it.folder / "package" / "_bin").symlink_to(ROOT / "bin")
        jar = shutil.copy(JAR, it.folder / "package" / "_jars")
        if request.param.startswith("local-cluster"):
            it.start(request.param, **{"spark.jars": jar, "spark.files": ",".join(shipped)})
        else:
            it.start(request.param, **{"spark.driver.extraClassPath": jar})
        it.size = len(it.executors())
        yield it


def front_of(executor: psutil.Process) -> psutil.Process:
    """The sidecar of an executor: its child."""

    def found() -> psutil.Process | None:
        return next((child for child in executor.children() if child.name() == "flightsvc"), None)

    return until(found, 20, f"sidecar of {executor.pid}")


def option(process: psutil.Process, name: str) -> str | None:
    """The value of a flag in a command line."""
    head = f"--{name}="
    return next((word.removeprefix(head) for word in process.cmdline() if word.startswith(head)), None)


def test_each_worker_reaches_its_own_executors_sidecar(app: Application):
    rows = app.ask("places")
    owners = {row["jvm"]: row for row in rows}
    assert set(owners) == {executor.pid for executor in app.executors()}
    fronts = {}
    for executor in app.executors():
        front, row = front_of(executor), owners[executor.pid]
        with flightsvc.connect(row["endpoint"]) as client:
            assert client.status()["pid"] == front.pid
        assert row["who"].startswith(f"executor {option(front, 'executor')} ")
        assert row["who"].endswith(f":{front.pid}")
        fronts[front.pid] = front
    assert len(fronts) == app.size
    assert {option(front, "executor") for front in fronts.values()} == (
        {"driver"} if app.size == 1 else {"0", "1"}
    )


def test_a_sidecar_has_the_settings_and_the_shares_of_its_executor(app: Application):
    for executor in app.executors():
        front = front_of(executor)
        assert option(front, "load-timeout") == "4m"
        assert option(front, "python") == sys.executable
        assert option(front, "cores") == ("2" if app.size == 1 else "1")
        assert option(front, "memory") is None  # the front's own default
        assert "OMP_NUM_THREADS" not in front.environ()
        place = app.folder / "package" / "_bin" if app.size == 1 else work(app.id)
        assert front.cmdline()[0].startswith(str(place))


def metrics(app: Application) -> dict[str, float]:
    """The driver's metrics of the plugin, by both servlets."""
    path = f"{app.ask('ui')}/metrics"
    with urllib.request.urlopen(f"{path}/json") as answer:
        kinds = json.load(answer)
    found = {}
    for kind, field in (("gauges", "value"), ("counters", "count")):
        for name, entry in kinds[kind].items():
            if PREFIX in name:
                found[name.partition(PREFIX)[2]] = entry[field]
    with urllib.request.urlopen(f"{path}/prometheus") as answer:
        text = answer.read().decode()
    head = PREFIX.replace(".", "_")
    lines = re.findall(rf"{head}(\w+)_(?:Value|Count){{[^}}]*}} (\S+)", text)
    assert sorted(name for name, _ in lines) == sorted(found)  # each once
    return found


def settled(app: Application) -> dict[str, float]:
    """The driver's metrics once it has heard of all that the sidecars have done; no job runs."""
    rows = sum(row["rows"] for row in app.ask("status"))
    return until(
        lambda: (m := metrics(app))["sidecars"] == app.size and m["rows"] == rows and m, 20, "reports"
    )


def test_metrics_are_read_back(app: Application):
    before = settled(app)
    assert app.ask("job", ROWS, 1) == ROWS
    after = settled(app)
    assert after["rows"] == before["rows"] + ROWS
    assert after["batches"] > before["batches"]
    assert after["runSeconds"] > before["runSeconds"]
    assert after["queueSeconds"] >= before["queueSeconds"]
    assert after["models"] == app.size
    assert after["memory"] > 32 << 20
    assert (after["errors"], after["queued"], after["deviceMemory"]) == (0, 0, 0)
    assert set(after) == {*before, "streams"}


def test_executors_have_metrics_of_their_own(app: Application):
    if app.size == 1:
        pytest.skip("the driver's are the executor's")
    total = metrics(app)["rows"]

    def rows() -> list[int]:
        files = sorted((app.folder / "metrics").glob(f"*{PREFIX}rows.csv"))
        return [int(float(list(csv.DictReader(file.open()))[-1]["count"])) for file in files]

    until(lambda: len(rows()) == app.size and sum(rows()) == total, 20, "rows of executors")


def test_status(app: Application):
    began = metrics(app)["rows"]
    rows = app.ask("status")
    assert len(rows) == app.size
    fronts = {option(front_of(executor), "executor"): front_of(executor) for executor in app.executors()}
    assert {row["executor"] for row in rows} == set(fronts)
    for row in rows:
        assert row["version"] == flightsvc.__version__
        assert row["server"].startswith(f"executor {row['executor']} {row['host']}:")
        assert row["server"].endswith(f":{fronts[row['executor']].pid}")
        assert any(model.endswith("/slow version 1: ready") for model in row["models"])
        assert row["devices"] == []
        assert row["memory"] > 32 << 20
        assert (row["rows_per_second"], row["queued"]) == (0, 0)
        assert re.fullmatch(r"stage \d+ partition \d+ attempt 0", row["answered_by"])
    assert sum(row["rows"] for row in rows) == began


def test_a_killed_sidecar_comes_back_and_the_job_is_right(app: Application):
    executor = app.executors()[0]
    endpoint = next(row["endpoint"] for row in app.ask("places") if row["jvm"] == executor.pid)
    name = option(front_of(executor), "executor")
    with flightsvc.connect(endpoint) as client:
        for _ in range(KILLS):
            front = front_of(executor)
            app.tell("job", ROWS, TURNS)
            until(lambda: sum(model["streams"] for model in client.status()["models"]), SECONDS, "a stream")
            front.send_signal(signal.SIGKILL)
            assert app.answer() == ROWS
            again = front_of(executor)
            assert again.pid != front.pid
            assert (option(again, "executor"), option(again, "endpoint")) == (name, endpoint)
            assert client.status()["pid"] == again.pid
    host = "localhost" if app.size == 1 else "127.0.0.1"
    log = app.log.read_text()  # of the driver
    assert log.count(f"executor {name} on {host} has no sidecar: flightsvc has ended: signal 9") == KILLS
    assert log.count(f"executor {name} on {host} has a sidecar again") == KILLS
    until(lambda: metrics(app)["sidecars"] == app.size, 20, "reports")


def test_the_plugin_costs_little_at_the_start_of_an_executor(app: Application):
    if app.size == 1:
        pytest.skip("what an application starts with is no executor")
    logs = [file.read_text() for file in work(app.id).glob("*/stderr")]
    took = [int(re.search(r"sidecar of executor .*: init took (\d+) ms", log)[1]) for log in logs]
    report(plugin_init_ms=took)
    assert len(took) == app.size
    assert max(took) < INIT_MILLISECONDS


def test_the_end_leaves_nothing(app: Application):
    report(**{f"plugin_end_seconds_{'local' if app.size == 1 else 'cluster'}": app.end()})


def test_refusals(models: Path):
    """What is set wrongly is said before any executor starts; a program that is not there, by the driver."""
    with application(models) as app:
        jar = {"spark.driver.extraClassPath": str(JAR), "spark.jars": str(JAR)}

        def start(**settings: str) -> str:
            """Return what the application has to say of its start, and its log since then."""
            begin = len(app.log.read_text())
            named = {f"{SPARK_PREFIX}{name}": value for name, value in settings.items()}
            said = app.ask("attempt", str(app.folder), {**jar, **named})
            return f"{said}\n{app.log.read_text()[begin:]}"

        reason = "/nowhere/flightsvc is not there (spark.flightsvc.binary or FLIGHTSVC_BINARY)"
        # The settings of the first start go into the JVM, and so are those of all later ones, too.
        endured = start(binary="/nowhere/flightsvc")
        assert endured.startswith("45\n")  # a job without models
        assert "executor driver on localhost has no sidecar: " + reason in endured
        refused = start(failOnStart="true")
        assert f"no sidecar, and spark.flightsvc.failOnStart is set: {reason}" in refused
        assert "executor driver on localhost has no sidecar: " + reason in refused
        assert (
            "there is no setting spark.flightsvc.runDri; did you mean spark.flightsvc.runDir? "
            "Correct it, or take it out of the configuration" in start(runDri="/x")
        )
        assert 'spark.flightsvc.failOnStart is "yes"; want true or false' in start(failOnStart="yes")
        wrong = start(binary=str(ROOT / "bin" / "flightsvc"), memory="much")
        assert wrong.startswith("45\n")
        assert "flightsvc did not start: " in wrong and '"much" is not an amount of memory' in wrong
        somebodys = start(
            endpoint="/run/somebody/front.sock", binary="/nowhere/flightsvc", failOnStart="true"
        )
        assert somebodys.startswith("45\n") and "no sidecar" not in somebodys

        # What of the host a sidecar has, where Spark itself runs no such cluster here.
        def shares(name: str, conf: dict[str, str], *words: str) -> Any:
            return app.ask("shares", name, conf, *words)

        assert shares("memory", {"spark.master": "local[2]"}) == 0
        assert shares("memory", {"spark.master": "yarn"}) == 192 << 20
        assert shares("memory", {"spark.master": "yarn", "spark.executor.memory": "40g"}) == 2048 << 20
        kubernetes = {"spark.master": "k8s://https://host", "spark.executor.memory": "4g"}
        assert shares("memory", {**kubernetes, "spark.kubernetes.memoryOverheadFactor": "0.4"}) == 819 << 20
        assert shares("memory", {**kubernetes, "spark.executor.memoryOverhead": "3g"}) == 1536 << 20
        assert shares("warning", {**kubernetes, "spark.executor.memoryOverhead": "1g"}) is None
        little = shares("warning", {**kubernetes, "spark.executor.memoryOverhead": "1023m"})
        assert "models have 511 MiB beside each executor" in little
        assert little.endswith("spark.executor.memoryOverhead=2g")
        backend = (
            "org.apache.spark.executor.CoarseGrainedExecutorBackend --executor-id 1 --cores 7 --app-id a"
        )
        assert shares("cores", {"spark.master": "spark://a", "spark.executor.cores": "3"}, backend) == 7
        assert shares("cores", {"spark.master": "local[3, 2]"}, "x") == 3
        assert shares("cores", {"spark.master": "local"}, "x") == 1
        assert shares("cores", {"spark.master": "local[*]"}, "x") == os.cpu_count()
        app.end()


def test_the_plugin_knows_the_settings_that_are_documented():
    java = (ROOT / "spark-plugin/src/main/java/io/flightsvc/spark/Settings.java").read_text()
    front, others = (
        set(re.findall(r'"(\w+)"', re.search(rf"String> {name} =\s*Arrays.asList\((.*?)\);", java, re.S)[1]))
        for name in ("FRONT", "OTHERS")
    )
    text = (ROOT / "docs" / "settings.md").read_text()
    documented = set(re.findall(r"`(spark\.flightsvc\.\w+)` \|", text))
    assert {SPARK_PREFIX + name for name in front | others} == documented
    every = Settings(**dict.fromkeys(inspect.signature(Settings).parameters, "x"))
    flags = {flag.removeprefix("--").removesuffix("=x").replace("-", "_") for flag in every.serve_flags()}
    assert {SPARK_PREFIX + name for name in front} == {spark_key(name) for name in flags}


def test_status_without_the_plugin(spark: Any, models: Path):
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        spark.conf.set("spark.flightsvc.runDir", f"{folder}/run")
        try:
            assert flightsvc.status(spark).collect() == []  # none is started for it
            frame = spark.range(10).selectExpr("array(cast(id AS float)) AS x")
            model = flightsvc.Model((models / "slow").as_uri())
            answers = model.transform(frame, inputs={"x": "x"}, sidecar="who").collect()
            (row,) = flightsvc.status(spark).collect()
        finally:
            spark.conf.unset("spark.flightsvc.runDir")
            for socket in Path(folder, "run").glob("*/front.sock"):
                with flightsvc.connect(str(socket)) as client:
                    client.shutdown()
            place = Path(folder)
            until(lambda: not left(place / "run", place / "cache", place), 20, "the end of both")
    assert {answer.who for answer in answers} == {row.server}
    assert row.executor is None
    assert (row.rows, row.queued) == (10, 0)


# The application's side.


def drive(models: Path) -> None:
    """Carry out a command for each line of standard input, and stop at its end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Spark prints is log
    driver = Driver(models)
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            answer = {"result": getattr(driver, name)(*args)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    driver.stop()


class Driver:
    """The application's commands."""

    def __init__(self, models: Path):
        self.slow = flightsvc.Model((models / "slow").as_uri())
        self.spark: Any = None

    def start(self, master: str, folder: str, settings: dict[str, str]) -> str:
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.master(master)
        sink = "spark.metrics.conf"
        for key, value in {
            "spark.plugins": "io.flightsvc.spark.FlightsvcPlugin",
            "spark.flightsvc.loadTimeout": "4m",
            "spark.ui.port": "0",
            "spark.ui.showConsoleProgress": "false",
            "spark.executor.memory": "512m",
            "spark.driver.memory": "512m",
            "spark.local.dir": f"{folder}/local",
            "spark.sql.warehouse.dir": f"{folder}/warehouse",
            "spark.sql.shuffle.partitions": "2",
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_ROWS),
            "spark.driver.extraJavaOptions": JAVA_OPTIONS,
            "spark.executor.extraJavaOptions": JAVA_OPTIONS,
            f"{sink}.driver.sink.prometheusServlet.class": "org.apache.spark.metrics.sink.PrometheusServlet",
            f"{sink}.driver.sink.prometheusServlet.path": "/metrics/prometheus",
            f"{sink}.executor.sink.csv.class": "org.apache.spark.metrics.sink.CsvSink",
            f"{sink}.executor.sink.csv.period": "1",
            f"{sink}.executor.sink.csv.directory": f"{folder}/metrics",
            **settings,
        }.items():
            builder = builder.config(key, value)
        Path(folder, "metrics").mkdir(exist_ok=True)
        self.spark = builder.getOrCreate()
        context = self.spark.sparkContext
        context.setLogLevel("WARN")
        executors = 1 if master.startswith("local[") else 3  # the driver is counted, too
        until(lambda: context._jsc.sc().getExecutorMemoryStatus().size() == executors, SECONDS, "executors")
        return str(context.applicationId)

    def attempt(self, folder: str, settings: dict[str, str]) -> Any:
        """Return the result of a job, or why the application did not start."""
        try:
            self.start("local[2]", folder, settings)
        except Exception as error:
            return str(error)
        result = self.spark.range(10).selectExpr("sum(id)").first()[0]
        self.stop()
        return result

    def ui(self) -> str:
        return f"http://127.0.0.1:{self.spark.sparkContext.uiWebUrl.rpartition(':')[2]}"

    def answers(self, rows: int, turns: int) -> Any:
        frame = self.spark.range(0, rows, 1, 2).selectExpr(
            "id", f"array(cast({turns} + id % 100 AS float)) AS x"
        )
        return self.slow.transform(frame, inputs={"x": "x"}, sidecar="who")

    def job(self, rows: int, turns: int) -> int:
        """Return of how many rows the answer is right."""
        return int(self.answers(rows, turns).where("y = x").dropDuplicates(["id"]).count())

    def places(self) -> list[dict[str, Any]]:
        """Return where each partition was answered."""

        def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            file = Path(os.environ["SPARK_LOCAL_DIRS"].split(",")[0], "flightsvc.endpoint")
            for batch in batches:
                yield pa.RecordBatch.from_pylist(
                    [
                        {
                            "jvm": sidecar.executor().pid,
                            "endpoint": file.read_text(),
                            "who": batch.column("who")[0].as_py(),
                        }
                    ]
                )

        columns = "jvm long, endpoint string, who string"
        return [row.asDict() for row in self.answers(BATCH_ROWS, TURNS).mapInArrow(look, columns).collect()]

    def status(self) -> list[dict[str, Any]]:
        return [row.asDict() for row in flightsvc.status(self.spark).collect()]

    def shares(self, name: str, settings: dict[str, str], *words: str) -> Any:
        """Call a function of the plugin that is not public."""
        from pyspark import SparkContext

        gateway = SparkContext._gateway
        jvm = gateway.jvm
        conf = jvm.org.apache.spark.SparkConf(False)
        for key, value in settings.items():
            conf.set(key, value)
        loader = jvm.java.lang.ClassLoader.getSystemClassLoader()
        kind = loader.loadClass("io.flightsvc.spark.Shares")
        function = next(method for method in kind.getDeclaredMethods() if method.getName() == name)
        function.setAccessible(True)
        arguments = gateway.new_array(jvm.java.lang.Object, 1 + len(words))
        for i, argument in enumerate((conf, *words)):
            arguments[i] = argument
        return function.invoke(None, arguments)

    def stop(self) -> None:
        if self.spark is not None:
            self.spark.stop()
            self.spark = None


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
