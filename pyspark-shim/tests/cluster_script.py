"""A program that runs the same checks on any Spark and prints what came out, as one line of JSON.

    python cluster_script.py MODELS [CHECK ...] --master local[2] [--conf KEY=VALUE ...]
    python cluster_script.py MODELS --remote sc://127.0.0.1:15002

MODELS is the folder that make_models.py has written. Nothing is asserted here: a test compares the answers
with TensorFlow's, which need not be where this runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 200
TEXTS = [None if i % 7 == 3 else f"text {i}" for i in range(60)]
STRICT = [(0, 4.0, "1"), (1, -1.0, "2"), (2, 9.0, "x"), (3, None, "4"), (4, 25.0, "5")]


def vectors() -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of the model ``two``."""
    random = np.random.default_rng(11)
    return {name: random.normal(size=(ROWS, n)).astype(np.float32) for name, n in (("a", 8), ("b", 4))}


def pixels(number: int) -> np.ndarray[Any, Any]:
    """A picture of 32 x 32, as red, green and blue."""
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)


def png(picture: np.ndarray[Any, Any]) -> bytes:
    """Write a PNG file: nothing needs to be installed for it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = picture.shape
    lines = b"".join(b"\0" + row.tobytes() for row in picture)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pairs(spark: Any) -> Any:
    """The inputs of the model ``two``, in two partitions."""
    a, b = vectors().values()
    rows = [(i, x.tolist(), y.tolist()) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    return spark.createDataFrame(rows, "id bigint, a array<float>, b array<float>").repartition(2)


def ints(spark: Any, rows: int = ROWS, partitions: int = 2) -> Any:
    """The input of the model ``ints``: doubled is (2 * id, 0, 2), total is id + 1."""
    return spark.range(0, rows, 1, partitions).selectExpr("id", "array(id, 0L, 1L) AS i")


def transform(spark: Any, models: Path) -> Any:
    import flightsvc

    frame = flightsvc.Model(models / "two").transform(pairs(spark), outputs={"logits": "l", "sum": "s"})
    return [[row.id, row.l, row.s] for row in frame.orderBy("id").collect()]


def columns(spark: Any, models: Path) -> Any:
    import flightsvc

    two = flightsvc.Model(models / "two").udf()
    frame = pairs(spark).select("id", two(b="b", a="a").alias("r")).orderBy("id")
    return [[row.id, row.r["logits"], row.r["sum"]] for row in frame.collect()]


def sql(spark: Any, models: Path) -> Any:
    import flightsvc

    flightsvc.register_udf(spark, "total", flightsvc.Model(models / "ints"), outputs={"total": "t"})
    flightsvc.register_udf(spark, "upper_of", flightsvc.Model(models / "strings"))
    ints(spark).createOrReplaceTempView("numbers")
    spark.createDataFrame(list(enumerate(TEXTS)), "id int, text string").createOrReplaceTempView("texts")
    grouped = "SELECT total(i) % 3 AS k, count(*), sum(total(i)) FROM numbers WHERE total(i) > 10 GROUP BY 1"
    upper = "SELECT id, r.length, CAST(r.upper AS STRING) FROM (SELECT id, upper_of(text) AS r FROM texts)"
    typed = ""
    try:
        model = flightsvc.Model(models / "ints")
        flightsvc.register_udf(spark, "typed", model, outputs={"total": "t"}, types={"i": "array<int>"})
    except flightsvc.InvalidArgumentError as error:
        typed = str(error)
    return {
        "typed": typed,
        "grouped": sorted(map(list, spark.sql(grouped).collect())),
        "upper": sorted(map(list, spark.sql(upper).collect())),
        "null": spark.sql("SELECT total(CAST(NULL AS ARRAY<BIGINT>))").first()[0],
    }


def pictures(spark: Any, models: Path) -> Any:
    import flightsvc

    with tempfile.TemporaryDirectory() as folder:
        for number in range(6):
            Path(folder, f"{number}.png").write_bytes(png(pixels(number)))
        Path(folder, "6.png").write_bytes(b"no picture")
        images = flightsvc.image.read_images(spark, folder, on_error="column", error_column="why")
        rows = {Path(row.image.origin).stem if row.image else "bad": row for row in images.collect()}
        model = flightsvc.Model(models / "pictures", preprocess={"image": flightsvc.ImageInput((32, 32))})
        good = flightsvc.image.read_images(spark, folder, on_error="null").where("image IS NOT NULL")
        means = model.transform(good, inputs={"image": "image"}, outputs={"mean": "m"}).collect()
        mean = model.udf(outputs={"mean": "m"})
        by_column = good.select("image", mean("image").alias("m")).collect()
        return {
            "sums": {
                stem: int(flightsvc.image.to_array(row.image).astype(int).sum())
                for stem, row in rows.items()
                if row.image
            },
            "bad": rows["bad"].why,
            "means": {Path(row.image.origin).stem: row.m for row in means},
            "by_column": {Path(row.image.origin).stem: row.m for row in by_column},
        }


def policies(spark: Any, models: Path) -> Any:
    import flightsvc

    model = flightsvc.Model(models / "strict")
    frame = spark.createDataFrame(STRICT, "id int, x float, text string").coalesce(1)
    said: dict[str, Any] = {}
    try:
        model.transform(frame).collect()
    except Exception as error:
        said["fail"] = str(error)
    kept = model.transform(frame, on_error="null").orderBy("id").collect()
    said["null"] = [[row.root, row.number] for row in kept]
    told = model.transform(frame, on_error="column", error_column="why").orderBy("id").collect()
    said["column"] = [[row.root, row.number, row.why] for row in told]
    return said


def shipped(spark: Any, models: Path) -> Any:
    """The model's folder is gone when the job runs."""
    import flightsvc

    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(models / "ints", Path(folder, "mine"))
        Path(copy, "note.txt").write_text(f"{time.time_ns()}")  # a digest that no front knows
        frame = flightsvc.Model(copy).transform(ints(spark), outputs={"total": "t", "doubled": "d"})
    return sorted([row.id, row.t, row.d] for row in frame.collect())


def streaming(spark: Any, models: Path) -> Any:
    """Files arrive, a query stops and goes on from its checkpoint."""
    import flightsvc

    model = flightsvc.Model(models / "ints")
    flightsvc.register_udf(spark, "streamed", model, outputs={"total": "t"})
    with tempfile.TemporaryDirectory() as folder:
        source, sink = f"{folder}/in", f"{folder}/out"
        for first in (0, 50):
            part = ints(spark, 50, 1).selectExpr(f"id + {first} AS id", f"array(id + {first}, 0L, 1L) AS i")
            part.write.mode("append").parquet(source)
            arriving = spark.readStream.schema("id bigint, i array<bigint>").parquet(source)
            answered = model.transform(arriving, outputs={"total": "t"})
            rows = answered.selectExpr("id", "t", "streamed(i) AS u")
            writer = rows.writeStream.format("parquet").option("checkpointLocation", f"{folder}/at")
            query = writer.trigger(availableNow=True).start(sink)
            assert query.awaitTermination(120)
        return sorted(map(list, spark.read.parquet(sink).collect()))


def barrier(spark: Any, models: Path) -> Any:
    import flightsvc

    frame = ints(spark)
    model = flightsvc.Model(models / "ints")
    schema = model.output_schema(frame.schema, outputs={"total": "t"})
    mapper = model.mapper(inputs={"i": "i"}, outputs={"total": "t"})
    return sorted([row.id, row.t] for row in frame.mapInArrow(mapper, schema, barrier=True).collect())


def sidecars(spark: Any, models: Path) -> Any:
    """Who answered, and who says that there is one."""
    import flightsvc

    frame = flightsvc.Model(models / "ints").transform(ints(spark, 40, 8), sidecar="who")
    said: dict[str, Any] = {"answered": sorted({row.who for row in frame.collect()})}
    if hasattr(flightsvc, "status"):
        said["status"] = [row.asDict(recursive=True) for row in flightsvc.status(spark).collect()]
    return said


def elastic(spark: Any, models: Path) -> Any:
    """Executors come for a job, go when they are idle, and come again; their sidecars with them."""
    import psutil

    import flightsvc

    frame = flightsvc.Model(models / "ints").transform(ints(spark, 40, 8), sidecar="who")
    said: dict[str, Any] = {"totals": [], "sidecars": [], "left": []}
    for _ in range(2):
        rows = frame.collect()
        said["totals"].append(sum(row.total for row in rows))
        pids = sorted({int(row.who.rpartition(":")[2]) for row in rows})
        said["sidecars"].append(pids)
        end = time.monotonic() + 60
        while spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() > 1:  # the driver is one
            assert time.monotonic() < end, "executors do not go"
            time.sleep(0.1)
        end = time.monotonic() + 5
        while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
            time.sleep(0.1)
        said["left"].append([pid for pid in pids if psutil.pid_exists(pid)])
    return said


def gpus(spark: Any, models: Path) -> Any:
    """A stage has executors with a GPU that Spark was told of and that is not there."""
    from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests

    import flightsvc

    frame = ints(spark, 40)
    model = flightsvc.Model(models / "ints")
    schema = model.output_schema(frame.schema, outputs={"total": "t"})

    def run() -> Any:
        executor = ExecutorResourceRequests().cores(1).memory("512m").resource("gpu", 1)
        task = TaskResourceRequests().cpus(1).resource("gpu", 1)
        profile = ResourceProfileBuilder().require(executor).require(task).build
        mapper = model.mapper(inputs={"i": "i"}, outputs={"total": "t"})
        return sorted([r.id, r.t] for r in frame.mapInArrow(mapper, schema, profile=profile).collect())

    said: dict[str, Any] = {"refused": "", "plain": len(model.transform(frame).collect())}
    try:
        run()
    except Exception as error:
        said["refused"] = str(error)
    spark.conf.set("spark.flightsvc.allowCpuFallback", "true")  # for the sidecars of the next executors
    said["fallback"] = run()
    return said


def speculation(spark: Any, models: Path) -> Any:
    """Partition 0 goes on only when another attempt at it has begun."""
    import flightsvc

    frame = ints(spark, 40, 8)
    model = flightsvc.Model(models / "ints")
    mapper = model.mapper(inputs={"i": "i"}, outputs={"total": "t"})
    schema = model.output_schema(frame.schema, outputs={"total": "t"})
    with tempfile.TemporaryDirectory() as folder:

        def slow(batches: Any) -> Any:
            import time
            from pathlib import Path

            from pyspark import TaskContext

            context = TaskContext.get()
            Path(folder, f"{context.partitionId()}-{context.attemptNumber()}").touch()
            end = time.monotonic() + 60
            if context.partitionId() == 0:
                while not Path(folder, "0-1").exists() and time.monotonic() < end:
                    time.sleep(0.05)
            yield from mapper(batches)

        frame.mapInArrow(slow, schema).write.parquet(f"{folder}/out")
        attempts = sorted(path.name for path in Path(folder).glob("?-?"))
        rows = sorted([row.id, row.t] for row in spark.read.parquet(f"{folder}/out").collect())
    return {"attempts": attempts, "rows": rows}


EVERYWHERE = (
    "transform",
    "columns",
    "sql",
    "pictures",
    "policies",
    "shipped",
    "streaming",
    "barrier",
    "sidecars",
)
CHECKS: dict[str, Callable[[Any, Path], Any]] = {
    check.__name__: check
    for check in (
        transform,
        columns,
        sql,
        pictures,
        policies,
        shipped,
        streaming,
        barrier,
        sidecars,
        elastic,
        gpus,
        speculation,
    )
}


def session(master: str | None, remote: str | None, conf: dict[str, str]) -> Any:
    """Return a session: classic with a master, of Connect with the address of a server."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.remote(remote) if remote else SparkSession.builder.master(master)
    if not remote:
        builder = builder.appName("flightsvc checks").config("spark.ui.enabled", "false")
    conf = {"spark.sql.shuffle.partitions": "2", "spark.sql.execution.arrow.maxRecordsPerBatch": "50", **conf}
    for key, value in conf.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--master")
    where.add_argument("--remote")
    parser.add_argument("--conf", action="append", default=[])
    parser.add_argument("checks", nargs="*", default=EVERYWHERE)
    given = parser.parse_args()
    spark = session(given.master, given.remote, dict(pair.split("=", 1) for pair in given.conf))
    if not given.remote:
        spark.sparkContext.setLogLevel("OFF")
    answers: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in given.checks:
        started = time.monotonic()
        answers[name] = CHECKS[name](spark, given.models)
        seconds[name] = round(time.monotonic() - started, 1)
        print(f"{name}: {seconds[name]} s", file=sys.stderr, flush=True)
    print(json.dumps({"spark": spark.version, "seconds": seconds, "answers": answers}, default=str))
    spark.stop()


if __name__ == "__main__":
    main()
