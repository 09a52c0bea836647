"""A user's job: one picture model as DataFrame, as SQL and on pictures that Spark holds.

    python together_job.py master|remote URL MODEL PICTURES ANSWERS

``master`` is Spark classic, ``remote`` Spark Connect; nothing else below knows which it is. The answers are
written as JSON, ordered by path. The session stays until the standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

import flightsvc
import flightsvc.image

SIZE, SCALE, OFFSET = (32, 32), 1 / 128, -127 / 128


def main(kind: str, url: str, folder: str, pictures: str, answers: str) -> None:
    spark = getattr(SparkSession.builder, kind)(url).appName("together").getOrCreate()
    image = flightsvc.ImageInput(SIZE, fit="stretch", scale=SCALE, offset=OFFSET)
    model = flightsvc.Model(folder, preprocess={"image": image})
    files = spark.read.format("binaryFile").load(pictures)

    frame = model.transform(files.select("path", "content"), inputs={"image": "content"}, sidecar="sidecar")
    transformed = frame.drop("content").collect()

    flightsvc.register_udf(spark, "means", model)
    files.createOrReplaceTempView("pictures")
    grouped = spark.sql("""
        SELECT label, count(*) AS pictures, avg(means(content)[0]) AS red
        FROM pictures GROUP BY label ORDER BY label
    """).collect()

    named = spark.sql("SELECT means(image => content)[1] AS green FROM pictures LIMIT 1").collect()
    listed = [function.name for function in spark.catalog.listFunctions(pattern="means")]
    spark.sql("DROP TEMPORARY FUNCTION means")
    listed += [function.name for function in spark.catalog.listFunctions(pattern="means")]
    function = model.udf(on_error="column")
    reasons = files.select(function("content").alias("r")).where("r.error IS NOT NULL").count()
    try:
        refused = str(files.select(function("length")).collect())
    except PySparkException as error:
        refused = str(error)

    decoded = flightsvc.image.read_images(spark, pictures)
    frame = model.transform(decoded, inputs={"image": "image"}, sidecar="sidecar")
    read = frame.select("image.origin", "image.height", "image.width", "mean", "sidecar").collect()

    result = {
        "transformed": sorted([row.path, row.mean] for row in transformed),
        "grouped": [list(row) for row in grouped],
        "functions": [len(named), listed, reasons],
        "refused": refused,
        "read": sorted([row.origin, row.height, row.width, row.mean] for row in read),
        "sidecars": sorted({row.sidecar for row in (*transformed, *read)}),
    }
    beside = Path(answers + ".part")
    beside.write_text(json.dumps(result))
    os.replace(beside, answers)
    sys.stdin.read()
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
