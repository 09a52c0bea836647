"""Labels photographs with a real network: from a client that imports only pyarrow, in Spark, and in SQL.

`make demo` runs it, after the build. It ends with one table, and with the picture ``build/demo.png``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import IO

try:
    import contact_sheet
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import DataFrame, Row, SparkSession

    import flightsvc
    from flightsvc.ml.networks import lite0
except ModuleNotFoundError as error:
    sys.exit(f"demo: the Python package {error.name} is missing; run `make build` first")

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(flightsvc.__file__).parent / "_bin"
BUILD = ROOT / "build" / "demo"
SHEET = ROOT / "build" / "demo.png"

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Photographs that come with scikit-image: PNG and JPEG, colour and grey."""

FLIGHT_PHOTOS = ("camera.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""The photographs that the standalone client classifies, too."""

QUERY = "SELECT path, classify(content) FROM images"
"""The query in SQL; ``classify`` is the model."""


@dataclass(frozen=True)
class Answer:
    """The network's answer for one photo.

    Attributes:
        photo: the file's name.
        best: the three most probable classes, as indices and probabilities.
        server: the sidecar that answered, as host and process id; empty in SQL, where a function returns
            only the model's output.
        via: how it was asked: ``spark``, ``sql`` or ``flight``.
    """

    photo: str
    best: list[tuple[int, float]]
    server: str
    via: str


def main() -> None:
    """Runs the demo; exits with a message of one sentence if something is missing or fails."""
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {line}", flush=True)

    check_toolchain()
    BUILD.mkdir(parents=True, exist_ok=True)
    photos = copy_photos()
    model = make_model(progress)
    by_flight = classify_in_client(model, [photos / photo for photo in FLIGHT_PHOTOS], progress)
    by_spark, by_sql = classify_in_spark(model, photos, progress)
    labels = lite0.labels()
    sidecars = len({answer.server for answer in by_spark})
    contact_sheet.draw(
        SHEET,
        "What EfficientNet-Lite0 sees",
        f"{len(by_spark)} photos, classified by a Spark job through {sidecars} flightsvc sidecars",
        [contact_sheet.Tile(photos / a.photo, [(labels[i], p) for i, p in a.best]) for a in by_spark],
    )
    progress("done\n")
    print_table(by_spark + by_flight + by_sql, labels)
    print(f"\nThe contact sheet is {SHEET.relative_to(ROOT)}")


def check_toolchain() -> None:
    """Exits with a message if the demo cannot run here."""
    for name in ("flightsvc", "flightsvc-runner"):
        if not os.access(PROGRAMS / name, os.X_OK):
            sys.exit(f"demo: {PROGRAMS / name} is missing; run `make build` first")
    home = os.environ.get("JAVA_HOME")
    if shutil.which(Path(home, "bin", "java") if home else "java") is None:
        place = f"JAVA_HOME, which is {home}," if home else "PATH"
        sys.exit(f"demo: no java found in {place} and Spark needs it; install a JDK of version 17 or later")


def copy_photos() -> Path:
    """Copies the photos out of the scikit-image wheel into a folder of their own, and returns it."""
    source, folder = package_folder("skimage") / "data", BUILD / "photos"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for photo in PHOTOS:
        shutil.copyfile(source / photo, folder / photo)
    return folder


def make_model(progress: Callable[[str], None]) -> Path:
    """Returns the SavedModel's folder; another process exports it, since TensorFlow keeps its memory."""
    if lite0.folder().exists():
        progress(f"the model is there: {lite0.folder()}")
        return lite0.folder()
    progress("making the model, once")
    export = subprocess.Popen(
        [sys.executable, "-m", lite0.__name__], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with export as process:
        line = ""
        for line in process.stderr or ():
            progress(f"  {line.rstrip()}")
    if export.returncode != 0:
        sys.exit(f"demo: the model could not be made: {line.strip()}")
    return lite0.folder()


def classify_in_client(model: Path, photos: list[Path], progress: Callable[[str], None]) -> list[Answer]:
    """Starts a server and runs ``standalone_client.py``, which imports only pyarrow, against it."""
    progress("starting flightsvc serve")
    with served(BUILD / "flightsvc.log") as endpoint:
        progress(f"asking it through examples/standalone_client.py: {endpoint}")
        client = [sys.executable, str(ROOT / "examples" / "standalone_client.py"), endpoint, str(model)]
        done = subprocess.run([*client, *map(str, photos)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"demo: {done.stderr.strip()}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    way = "straight from the model's process" if all(a["redirected"] for a in found) else "through the front"
    progress(f"  {len(found)} photos answered, {way}")
    return [Answer(a["photo"], [(i, p) for i, p in a["best"]], a["server"], "flight") for a in found]


@contextmanager
def served(log: Path) -> Iterator[str]:
    """Runs ``flightsvc serve`` and yields its endpoint; it ends with the block, or with this process."""
    # Field 22 of stat is the start time of this process; the command's name before it may contain blanks and
    # brackets.
    start_time = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    command = [str(PROGRAMS / "flightsvc"), "serve", "--owner", f"{os.getpid()}:{start_time}"]
    command += ["--libtensorflow", str(package_folder("tensorflow"))]
    with log.open("w") as file:
        front = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True
        )
    with front as process:
        try:
            handshake = process.stdout.readline() if process.stdout else ""
            if not handshake:
                said = log.read_text().strip().splitlines() or ["it said nothing"]
                sys.exit(f"demo: flightsvc serve did not start: {said[-1]}")
            yield json.loads(handshake)["endpoint"]
        finally:
            process.terminate()


def classify_in_spark(
    model: Path, photos: Path, progress: Callable[[str], None]
) -> tuple[list[Answer], list[Answer]]:
    """Classifies the photos of a folder in a Spark job, then in SQL; each executor has its own sidecar."""
    progress("starting Spark: two executors, one core each")
    with spark_session(BUILD / "spark.log") as spark:
        progress("reading the model's signature")
        lite = flightsvc.Model(
            str(model),
            preprocess={"image": flightsvc.ImageInput(size=(224, 224), scale=1 / 128, offset=-127 / 128)},
        )
        inputs, outputs = {"image": "content"}, {"probabilities": "p"}
        df = spark.read.format("binaryFile").load(photos.as_uri()).select("path", "content")
        answers = df.mapInArrow(
            lite.mapper(inputs=inputs, outputs=outputs, sidecar="sidecar"),
            lite.output_schema(df.schema, inputs=inputs, outputs=outputs, sidecar="sidecar"),
        ).select("path", "p", "sidecar")
        progress("classifying in Spark; each executor starts its sidecar, which loads the model")
        by_spark = [spark_answer(*row, via="spark") for row in collect(answers, progress)]

        df.createOrReplaceTempView("images")
        flightsvc.register_udf(spark, "classify", lite)
        progress(f"the same in SQL: {QUERY}")
        by_sql = [spark_answer(*row, "", via="sql") for row in collect(spark.sql(QUERY), progress)]
    by_photo = attrgetter("photo")
    return sorted(by_spark, key=by_photo), sorted(by_sql, key=by_photo)


def spark_answer(path: str, probabilities: list[float], sidecar: str, via: str) -> Answer:
    """Returns the answer in a row of a job."""
    best = sorted(enumerate(probabilities), key=lambda pair: pair[1], reverse=True)[:3]
    return Answer(Path(path).name, best, sidecar, via)


@contextmanager
def spark_session(log: Path) -> Iterator[SparkSession]:
    """Runs Spark with two executor processes on this machine; Spark's output goes to the log."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    with log.open("w") as file:
        try:
            with redirected_output(file):  # the JVM inherits it
                spark = (
                    SparkSession.builder.master("local-cluster[2,1,2048]")
                    .appName("flightsvc demo")
                    .config("spark.ui.enabled", False)
                    .config("spark.ui.showConsoleProgress", False)
                    .config("spark.sql.warehouse.dir", (BUILD / "warehouse").as_uri())
                    .config("spark.sql.files.minPartitionNum", 4)
                    .config("spark.scheduler.minRegisteredResourcesRatio", 1.0)
                    .getOrCreate()
                )
        except (PySparkException, Py4JError):
            sys.exit(f"demo: Spark did not start; {log.relative_to(ROOT)} says why")
    application = spark.sparkContext.applicationId
    try:
        yield spark
    except (PySparkException, Py4JError) as error:
        with log.open("a") as file:
            print(error, file=file)
        sys.exit(f"demo: the Spark job failed: {reason(error)} ({log.relative_to(ROOT)} has it all)")
    finally:
        spark.stop()
        # A local cluster writes its executors' folders into the installation.
        shutil.rmtree(package_folder("pyspark") / "work" / application, ignore_errors=True)


def reason(error: Exception) -> str:
    """Returns the useful line of a job's error: that of the Python exception in a worker."""
    lines = str(error).split("JVM stacktrace:")[0].strip().splitlines()
    raised = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and ": " in line]
    return (raised or lines or [type(error).__name__])[-1].strip()


@contextmanager
def redirected_output(file: IO[str]) -> Iterator[None]:
    """Redirects standard output and error of child processes started in the block to the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def collect(df: DataFrame, progress: Callable[[str], None]) -> list[Row]:
    """Runs the job in a second thread, while this one reports progress and can be interrupted."""
    tracker = df.sparkSession.sparkContext.statusTracker()
    told = 0
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(df.collect)
        while not wait([rows], timeout=0.25).done:
            for stage in map(tracker.getStageInfo, tracker.getActiveStageIds()):
                if stage and stage.numCompletedTasks > told:
                    told = stage.numCompletedTasks
                    progress(f"  {told} of {stage.numTasks} partitions answered")
    return rows.result()


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package, without importing it."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        sys.exit(f"demo: the Python package {name} is missing; run `make build` first")
    return Path(package.origin).parent


def print_table(answers: list[Answer], labels: list[str]) -> None:
    """Prints one line per answer, and the largest difference between the three ways."""
    header = ("photo", "best three labels", "", "", "sidecar", "via")
    table = [
        (a.photo, *(f"{labels[i]} {p:.2f}" for i, p in a.best), a.server, a.via)
        for a in answers
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    for row in (header, tuple("-" * width for width in widths), *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    found: dict[tuple[str, int], list[float]] = {}
    for answer in answers:
        for label, probability in answer.best:
            found.setdefault((answer.photo, label), []).append(probability)
    largest = max(max(ways) - min(ways) for ways in found.values())
    print(f"\nSpark's answers, those in SQL and the standalone client's differ by {largest:.1g} at most.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
    except flightsvc.FlightsvcError as error:
        sys.exit(f"demo: {error}")
