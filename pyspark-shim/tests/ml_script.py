"""A program that uses saved stages in a process of its own and prints what came out, as one line of JSON.

    python ml_script.py FOLDER --master local[2]
    python ml_script.py FOLDER --remote sc://127.0.0.1:15002

FOLDER holds, for each case: ``stages/<case>``, a stage, and ``pipelines/<case>``, a PipelineModel of it
alone; ``cases.json`` names the rows of each, with an ``id``, in ``data``. ``validated`` and ``estimator``,
where they are there, hold a CrossValidatorModel and its CrossValidator, ``data/labelled`` their rows.
``--cases`` are run, ``--streamed`` in Structured Streaming, too. Nothing is asserted here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLUMN = "out"
"""What every case calls its result."""


def plain(value: Any) -> Any:
    """Return a cell as JSON has it."""
    if hasattr(value, "toArray"):
        return value.toArray().tolist()
    if hasattr(value, "asDict"):
        return {name: plain(part) for name, part in value.asDict().items()}
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return [plain(part) for part in value] if isinstance(value, list) else value


def answers(frame: Any, column: str = COLUMN) -> list[Any]:
    return [[row.id, plain(row[column])] for row in frame.select("id", column).orderBy("id").collect()]


def streamed(model: Any, rows: Any, data: str, folder: str) -> Any:
    spark = rows.sparkSession
    arriving = spark.readStream.schema(rows.schema).parquet(data)
    writer = model.transform(arriving).select("id", COLUMN).writeStream.format("parquet")
    query = writer.option("checkpointLocation", f"{folder}-at").trigger(availableNow=True).start(folder)
    assert query.awaitTermination(120)
    return spark.read.parquet(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--master")
    where.add_argument("--remote")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--streamed", nargs="+")
    given = parser.parse_args()
    from pyspark.ml import PipelineModel
    from pyspark.ml.tuning import CrossValidator, CrossValidatorModel
    from pyspark.sql import SparkSession

    from flightsvc.ml import Stage

    folder = given.folder
    builder = SparkSession.builder.config("spark.sql.shuffle.partitions", "2")
    builder = builder.remote(given.remote) if given.remote else builder.master(given.master)
    if not given.remote:
        builder = builder.config("spark.ui.enabled", "false").config("spark.driver.memory", "1g")
    spark = builder.getOrCreate()
    if not given.remote:
        spark.sparkContext.setLogLevel("OFF")
    said: dict[str, Any] = {"stage": {}, "pipeline": {}, "stream": {}}
    data_of = json.loads((folder / "cases.json").read_text())
    for case in given.cases:
        data = f"{folder}/data/{data_of[case]}"
        rows = spark.read.parquet(data)
        stage = Stage.load(f"{folder}/stages/{case}")
        if given.remote:  # written from here, too
            again = f"{folder}/again/{case}"
            for _ in range(2):
                stage.write().overwrite().save(again)
            stage = Stage.load(again)
        said["stage"][case] = answers(stage.transform(rows))
        model = PipelineModel.load(str(folder / "pipelines" / case))
        if given.remote:
            model.write().overwrite().save(f"{folder}/again/pipeline-{case}")
            model = PipelineModel.load(f"{folder}/again/pipeline-{case}")
        said["pipeline"][case] = answers(model.transform(rows))
        if case in given.streamed:
            kind = "connect" if given.remote else "classic"
            said["stream"][case] = answers(streamed(model, rows, data, f"{folder}/{kind}-{case}"))
    if (folder / "validated").exists():
        labelled = spark.read.parquet(str(folder / "data" / "labelled"))
        validated = CrossValidatorModel.load(str(folder / "validated"))
        said["validated"] = answers(validated.transform(labelled), "probability")
    if given.remote:
        fitted = CrossValidator.load(str(folder / "estimator")).fit(labelled)
        fitted.write().overwrite().save(f"{folder}/again/validated")
        again = CrossValidatorModel.load(f"{folder}/again/validated")
        said["fitted"] = answers(again.transform(labelled), "probability")
        said["metrics"] = fitted.avgMetrics
    said["modules"] = sorted({"tensorflow", "keras"} & {*sys.modules})
    print(json.dumps(said))
    spark.stop()


if __name__ == "__main__":
    main()
