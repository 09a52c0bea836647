"""Pictures to classes in Spark: flightsvc against `predict_batch_udf` with TensorFlow in the Python workers.

EfficientNet-Lite0 over JPEG files on ``local[2]``. The ways take turns, each run in a process and a session
of its own: a first job over a tenth of the files, which starts and loads all there is, then the measured one
over all of them. Prints a table, writes build/bench/quick.json, and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, keep, machine, place

sys.path.append(str(ROOT / "examples"))
import crops

from flightsvc.ml.networks import lite0

BENCH = ROOT / "build" / "bench"
LOG = BENCH / "quick.log"

RATIO_BOUND = 1.2
"""Least ratio of pictures per second, flightsvc to `predict_batch_udf`."""

DIFFERENCE_BOUND = 1e-3
"""Largest allowed difference of a probability; all ways decode and resize with the same kernels."""

LIMIT_S = 9 * 60
"""After the first round, no round starts that would probably end later than this."""

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
"""TensorFlow's own variable; if it is unset, TensorFlow decides by the CPU."""

WAYS = {
    "flightsvc": {},
    "predict_batch_udf": {},
    "predict_batch_udf, oneDNN": {ONEDNN: "1"},
}
"""The ways by name, each with environment variables of its Spark."""

OURS, THEIRS, _ = WAYS


def ours(model: str) -> Callable[[Any], Any]:
    """Return a function that adds the column ``p`` to a DataFrame of files, through the sidecar."""
    import flightsvc

    lite = flightsvc.Model(
        model, preprocess={"image": flightsvc.ImageInput(size=(224, 224), scale=1 / 128, offset=-127 / 128)}
    )
    return lambda df: lite.transform(df, inputs={"image": "content"}, outputs={"probabilities": "p"})


def theirs(model: str) -> Callable[[Any], Any]:
    """Return a function that adds the column ``p`` to a DataFrame of files, by Spark's documentation."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    def make_predict_fn() -> Callable[[np.ndarray], np.ndarray]:
        import tensorflow as tf

        network = tf.saved_model.load(model).signatures["serving_default"]

        @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
        def picture(content):
            pixels = tf.io.decode_jpeg(content, channels=3)
            height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
            side = tf.minimum(height, width)
            box = tf.image.crop_to_bounding_box(pixels, (height - side) // 2, (width - side) // 2, side, side)
            return tf.image.resize(box, [224, 224]) / 128 - 127 / 128

        def predict(contents: np.ndarray) -> np.ndarray:
            images = tf.stack([picture(content) for content in contents])
            return network(image=images)["probabilities"].numpy()

        return predict

    classify = predict_batch_udf(make_predict_fn, return_type=ArrayType(FloatType()), batch_size=32)
    return lambda df: df.withColumn("p", classify("content"))


def run(way: str, folder: str, model: str, answers: str) -> None:
    """Run one way, write its answers to a file, print the seconds of both jobs as a line of JSON."""
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master("local[2]")
        .appName(f"flightsvc bench-quick: {way}")
        .config("spark.ui.enabled", False)
        .config("spark.ui.showConsoleProgress", False)
        .config("spark.sql.warehouse.dir", (BENCH / "warehouse").as_uri())
        .getOrCreate()
    )
    classify = ours(model) if way == OURS else theirs(model)

    def job(files: str) -> tuple[float, Any]:
        df = spark.read.format("binaryFile").option("pathGlobFilter", files).load(folder)
        began = time.perf_counter()
        table = classify(df.select("path", "content")).select("path", "p").toArrow()
        return time.perf_counter() - began, table

    first, _ = job("*0.jpg")
    seconds, table = job("*.jpg")
    spark.stop()
    np.save(answers, np.array(table.sort_by("path")["p"].to_pylist(), np.float32))
    print(json.dumps({"first_job_s": first, "s": seconds}))


def started(way: str, folder: Path, model: Path) -> tuple[dict[str, float], np.ndarray]:
    """Run one way in a process of its own and return its seconds and its answers."""
    answers = BENCH / "quick-answers.npy"
    environment = {name: value for name, value in os.environ.items() if name != ONEDNN} | WAYS[way]
    environment |= {"PYSPARK_PYTHON": sys.executable, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    command = [sys.executable, __file__, "--run", way, str(folder), str(model), str(answers)]
    with LOG.open("a") as log:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=False
        )
    if done.returncode != 0:
        sys.exit(f"bench-quick: the run of {way} failed; {LOG.relative_to(ROOT)} says why")
    found = np.load(answers)
    answers.unlink()
    return json.loads(done.stdout.splitlines()[-1]), found


def measure(images: int, rounds: int) -> dict[str, Any]:
    """Run the ways alternately and return the results; ratios are taken within each round."""
    BENCH.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    folder = crops.crops(images)
    # A process of its own exports the model, so that TensorFlow's memory is freed.
    subprocess.run([sys.executable, "-m", lite0.__name__], stdout=subprocess.DEVNULL, check=True)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    answers: dict[str, np.ndarray] = {}
    began = time.monotonic()
    for turn in range(rounds):
        if turn and (time.monotonic() - began) * (turn + 1) / turn > LIMIT_S:
            print(f"no time for another round: {turn} of {rounds} must do")
            break
        for way in WAYS:
            seconds, answers[way] = started(way, folder, lite0.folder())
            runs[way].append(seconds)
            print(
                f"round {turn + 1} of {rounds}: {way:<25} {images / seconds['s']:6.1f} images/s", flush=True
            )
    figures: dict[str, Any] = {"images": images, "rounds": len(runs[OURS]), "ways": {}}
    for way, own in runs.items():
        ratios = [other["s"] / mine["s"] for mine, other in zip(runs[OURS], own, strict=True)]
        figures["ways"][way] = {
            "images_per_s": round(images / statistics.median(r["s"] for r in own), 1),
            "images_per_s_of_rounds": [round(images / r["s"], 1) for r in own],
            "first_job_s": round(statistics.median(r["first_job_s"] for r in own), 1),
            "ours_is_faster_by": round(statistics.median(ratios), 2),
            "largest_difference": float(np.abs(answers[way] - answers[OURS]).max()),
            "same_best_class": int((answers[way].argmax(1) == answers[OURS].argmax(1)).sum()),
        }
    figures["ratio"] = figures["ways"][THEIRS]["ours_is_faster_by"]
    return figures | {"machine": machine("tensorflow-cpu", "pyspark", "pyarrow", "numpy", "flightsvc")}


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{'':<26} images/s   first job   ours is faster by   largest difference   same best class")
    for way, of in figures["ways"].items():
        print(
            f"{way:<26} {of['images_per_s']:8.1f} {of['first_job_s']:9.1f} s {of['ours_is_faster_by']:19.2f} "
            f"{of['largest_difference']:20.1e} {of['same_best_class']:9} of {figures['images']}"
        )
    print(place(figures["machine"]))


def main() -> int:
    """Measure, print, keep, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=4, metavar=("WAY", "CROPS", "MODEL", "ANSWERS"), help="one run alone")
    arguments = parser.parse_args()
    if arguments.run:
        run(*arguments.run)
        return 0
    figures = measure(arguments.images, arguments.rounds)
    show(figures)
    keep("quick", figures)
    of = figures["ways"][THEIRS]
    missed = []
    if figures["ratio"] <= RATIO_BOUND:
        missed.append(f"ours is {figures['ratio']} times as fast as {THEIRS}, not more than {RATIO_BOUND}")
    if of["largest_difference"] > DIFFERENCE_BOUND:
        missed.append(f"answers differ by {of['largest_difference']:.1e}, more than {DIFFERENCE_BOUND}")
    print("\n".join(missed) or f"more than {RATIO_BOUND} times as fast as {THEIRS}, with the same answers")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
