"""Memory: many pictures through DeepImageFeaturizer leave the driver and the executor as they were.

python test_featurizer_memory.py PICTURES      prints one line of JSON
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from figures import PROVE, count, report

PICTURES = count(320, 20_000)
FILES = 40
GROWTH_MB = 100
"""The most that any kind of process may have more at the end than it had in the first half."""


def kinds() -> dict[str, float]:
    """Return the anonymous memory below this process in MB: the driver, the executor, its Python, ours."""
    found = {"driver": 0.0, "executor": 0.0, "workers": 0.0, "sidecar": 0.0}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            command = " ".join(process.cmdline())
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        kind = "driver"
        if "CoarseGrainedExecutorBackend" in command:
            kind = "executor"
        elif "pyspark.daemon" in command:
            kind = "workers"
        elif "flightsvc serve" in command or "flightsvc-runner" in command:
            kind = "sidecar"
        found[kind] += sum(int(line.split()[1]) / 1024 for line in rollup if line.startswith("Pss_Anon:"))
    return found


def featurize(pictures: int, folder: Path) -> None:
    """Run the job and print what it made and the memory over time."""
    import skimage
    from PIL import Image
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    import flightsvc
    from flightsvc.ml import DeepImageFeaturizer

    photo = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png")
    for i in range(FILES):
        photo.crop((i, i, 300 + i, 300 + i)).save(folder / f"{i}.jpg")
    small = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
    spark = (
        SparkSession.builder.master("local-cluster[1,2,768]")
        .config(map=flightsvc.spark_conf())
        .config("spark.driver.memory", "512m")
        .config("spark.executor.memory", "512m")
        .config("spark.driver.extraJavaOptions", small)
        .config("spark.executor.extraJavaOptions", small)
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("OFF")
    paths = spark.range(0, pictures, 1, max(4, pictures // 500)).select(
        F.concat(F.lit(f"{folder}/"), (F.col("id") % FILES).cast("string"), F.lit(".jpg")).alias("path")
    )
    stage = DeepImageFeaturizer(inputCol="path", outputCol="features", modelName="EfficientNetLite0")
    first = vector_to_array("features")[0]
    made = (
        stage.transform(paths)
        .groupBy("path")
        .agg(F.count("features").alias("n"), F.min(first).alias("least"), F.max(first).alias("most"))
    )
    samples: list[dict[str, float]] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(1.0):
            samples.append(kinds())

    watch = threading.Thread(target=sample, daemon=True)
    watch.start()
    started = time.monotonic()
    rows = made.collect()
    seconds = time.monotonic() - started
    ended.set()
    watch.join()
    spread = max(row.most - row.least for row in rows)
    print(json.dumps({"rows": sum(row.n for row in rows), "files": len(rows), "spread": spread,
                      "seconds": seconds, "samples": samples}))  # fmt: skip
    spark.stop()


@pytest.mark.prove
@pytest.mark.java
def test_memory_stays_flat(surroundings: Path, tmp_path: Path):
    if not (Path(__file__).resolve().parents[1] / "src" / "flightsvc" / "_jars").exists():
        pytest.skip("needs the Spark plugin: make spark-plugin")
    done = subprocess.run(
        [sys.executable, __file__, str(PICTURES), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["rows"], said["files"]) == (PICTURES, FILES)
    assert said["spread"] < 1e-4  # a picture has the same features each time
    samples = said["samples"]
    assert len(samples) >= 2
    quarter = len(samples) // 4
    for kind in samples[0]:
        early = max(sample[kind] for sample in samples[: 2 * quarter + 1])
        late = max(sample[kind] for sample in samples[-quarter - 1 :])
        report(**{f"featurizer_{kind}_mb_first_half_and_end": [round(early), round(late)]})
        assert not PROVE or late - early < GROWTH_MB, kind
    report(
        featurizer_pictures=PICTURES,
        featurizer_pictures_wanted=20_000,
        featurizer_pictures_per_second=round(PICTURES / said["seconds"], 1),
    )


if __name__ == "__main__":
    place = Path(sys.argv[2])
    featurize(int(sys.argv[1]), place)
    shutil.rmtree(place, ignore_errors=True)
