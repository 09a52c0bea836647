"""``transform``, ``mapper`` and their checks, with real Spark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from figures import count
from processes import is_gone, until

import flightsvc


def table(spark: Any, a: np.ndarray, b: np.ndarray, partitions: int) -> Any:
    rows = [(i, x.tolist(), y.tolist()) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    return spark.createDataFrame(rows, "id bigint, a array<float>, b array<float>").repartition(partitions)


def ints(spark: Any, rows: int, partitions: int = 2) -> Any:
    return spark.range(rows).repartition(partitions).selectExpr("id", "array(id, 0L, 1L) AS i")


def test_transform_agrees_with_tensorflow(spark: Any, models: Path, oracle: Callable[..., dict[str, Any]]):
    random = np.random.default_rng(7)
    a, b = random.normal(size=(1000, 8)).astype(np.float32), random.normal(size=(1000, 4)).astype(np.float32)
    expected = oracle("two", a=a, b=b)
    model = flightsvc.Model(models / "two")
    for partitions in (1, 3):
        frame = model.transform(
            table(spark, a, b, partitions), outputs={"logits": "l", "sum": "s"}, sidecar="who"
        )
        assert frame.columns == ["id", "a", "b", "l", "s", "who"]
        rows = sorted(frame.collect())
        assert [row.id for row in rows] == list(range(1000))
        for column, output in (("l", "logits"), ("s", "sum")):
            got = np.array([row[column] for row in rows])
            np.testing.assert_allclose(got, expected[output], rtol=1e-4, atol=1e-6)
            assert (got.argmax(1) == expected[output].argmax(1)).all()
        assert len({row.who for row in rows}) == 1
        assert rows[0].a == pytest.approx(a[0].tolist())


def test_mapper_and_output_schema(spark: Any, models: Path):
    frame = ints(spark, 250)
    model = flightsvc.Model(models / "ints")
    schema = model.output_schema(frame.schema, outputs={"total": "t"})
    assert schema.simpleString() == "struct<id:bigint,i:array<bigint>,t:bigint>"
    rows = frame.mapInArrow(model.mapper(inputs={"i": "i"}, outputs={"total": "t"}), schema).collect()
    assert sorted((row.id, row.t) for row in rows) == [(i, i + 1) for i in range(250)]


def test_all_outputs_by_name(spark: Any, models: Path):
    frame = flightsvc.Model(models / "strings").transform(
        spark.createDataFrame([("ab", 1), (None, 2)], "s string, n int"), inputs={"s": "s"}
    )
    assert frame.schema.simpleString() == "struct<s:string,n:int,length:bigint,upper:binary>"
    assert sorted(frame.collect(), key=lambda row: row.n) == [
        ("ab", 1, 2, bytearray(b"AB")),
        (None, 2, None, None),
    ]


def test_limit_then_another_job_in_the_same_worker(spark: Any, models: Path):
    model = flightsvc.Model(models / "ints")
    for _ in range(count(1, 3)):
        assert len(model.transform(ints(spark, 20_000)).limit(3).collect()) == 3
        assert len(model.transform(ints(spark, 20_000)).take(2)) == 2
        assert model.transform(ints(spark, 500)).selectExpr("sum(total - id)").first()[0] == 500


def test_a_consumer_that_stops_early(spark: Any, models: Path):
    mapper = flightsvc.Model(models / "ints").mapper(inputs={"i": "i"}, outputs={"total": "t"})

    def first_only(batches: Any) -> Any:
        yield next(mapper(batches))

    schema = "id bigint, i array<bigint>, t bigint"
    for _ in range(count(1, 3)):
        assert ints(spark, 5000).mapInArrow(first_only, schema).count() == 200  # 100 rows of each partition
    assert ints(spark, 300).mapInArrow(mapper, schema).count() == 300


def test_no_rows_and_empty_partitions(spark: Any, models: Path):
    model = flightsvc.Model(models / "ints")
    assert model.transform(ints(spark, 10).where("id < 0")).collect() == []
    assert model.transform(spark.createDataFrame([], "i array<bigint>")).collect() == []
    sparse = spark.range(0, 3, 1, 8).selectExpr("array(id, id, id) AS i")
    assert sorted(row.total for row in model.transform(sparse).collect()) == [0, 3, 6]


def test_names_compare_as_spark_says(spark: Any, models: Path):
    model = flightsvc.Model(models / "ints")
    frame = ints(spark, 5).withColumnRenamed("i", "I")
    assert sorted(row.total for row in model.transform(frame).collect()) == [1, 2, 3, 4, 5]
    spark.conf.set("spark.sql.caseSensitive", "true")
    try:
        with pytest.raises(flightsvc.NotFoundError, match="no column 'i' for input 'i'; say which one it is"):
            model.transform(frame)
    finally:
        spark.conf.unset("spark.sql.caseSensitive")


def test_the_session_of_the_frame_counts(spark: Any, models: Path, monkeypatch: pytest.MonkeyPatch):
    other = spark.newSession()
    other.conf.set("spark.sql.caseSensitive", "true")
    other.conf.set("spark.flightsvc.retryTimeout", "7s")
    model = flightsvc.Model(models / "ints")
    with pytest.raises(flightsvc.NotFoundError, match="no column 'i' for input 'i'"):
        model.transform(ints(other, 5).withColumnRenamed("i", "I"))
    monkeypatch.setattr("flightsvc.spark.dataframe.transform", lambda df, mapper, schema: mapper)
    assert model.transform(ints(other, 5)).conf["spark.flightsvc.retryTimeout"] == "7s"
    assert model.transform(ints(spark, 5)).conf["spark.flightsvc.retryTimeout"] == "60s"
    assert model.mapper().conf["spark.flightsvc.retryTimeout"] == "60s"


def test_an_input_of_a_type_that_spark_cannot_send(spark: Any, models: Path):
    from pyspark.sql.types import CharType, StructType

    kind = StructType().add("s", CharType(5))
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"needs string; .*CAST\(`s` AS STRING\)"):
        flightsvc.Model(models / "strings").output_schema(kind)
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"drop it first: df.drop\('c'\)"):
        flightsvc.Model(models / "strings").output_schema(
            StructType().add("s", "string").add("c", CharType(5))
        )


def test_unused_columns_of_one_name(spark: Any, models: Path):
    frame = ints(spark, 5).select("id", "id", "i")
    result = flightsvc.Model(models / "ints").transform(frame, outputs={"total": "t"})
    assert result.columns == ["id", "id", "i", "t"]
    assert sorted(tuple(row)[-1] for row in result.collect()) == [1, 2, 3, 4, 5]
    with pytest.raises(flightsvc.InvalidArgumentError, match="2 columns are named 'i', ambiguous for"):
        flightsvc.Model(models / "ints").transform(frame.select("i", "i"), inputs={"i": "i"})


@pytest.mark.parametrize(
    ("model", "column", "message"),
    [
        (
            "two",
            "array('1')",
            "column 'a' is array<string>, input 'a' .float32.-1,8.. needs array<float>; .* CAST",
        ),
        ("two", "array(array(1f))", "needs array<float>; if that is what you mean, use flatten.`a`."),
        ("two", "1f", "column 'a' is float, .* needs array<float>$"),
        ("two", "array(1L)", r"CAST\(`a` AS ARRAY<FLOAT>\)"),
        ("two", "map(1, 2)", "column 'a' is map<int,int>, .* needs array<float>$"),
        ("two", "binary('x')", "column 'a' is binary"),
    ],
)
def test_a_wrong_type_is_refused_on_the_driver(
    spark: Any, models: Path, model: str, column: str, message: str
):
    frame = spark.range(3).selectExpr(f"{column} AS a", "array(1f, 1f, 1f, 1f) AS b")
    with pytest.raises(flightsvc.InvalidArgumentError, match=message):
        flightsvc.Model(models / model).transform(frame)


def test_other_mistakes_are_refused_on_the_driver(spark: Any, models: Path):
    model = flightsvc.Model(models / "ints")
    frame = ints(spark, 3)
    with pytest.raises(flightsvc.NotFoundError, match="no column 'x' for input 'i'; columns: id, i"):
        model.transform(frame, inputs={"i": "x"})
    with pytest.raises(flightsvc.NotFoundError, match="no input 'q'; inputs: i"):
        model.transform(frame, inputs={"q": "i"})
    with pytest.raises(flightsvc.NotFoundError, match="input 'b' has no column"):
        flightsvc.Model(models / "two").transform(frame, inputs={"a": "i"})
    with pytest.raises(flightsvc.FlightsvcError, match="nope"):
        model.transform(frame, outputs={"nope": "n"})
    for clash in ({"outputs": {"total": "ID"}}, {"outputs": {"total": "t"}, "sidecar": "T"}):
        with pytest.raises(flightsvc.InvalidArgumentError, match="two columns"):
            model.transform(frame, **clash)
    with pytest.raises(flightsvc.NotFoundError, match="not-there"):
        flightsvc.Model("/not-there").transform(frame)
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"column 'w' is interval.*df\.drop\('w'\)"):
        model.transform(frame.selectExpr("*", "make_interval(1) AS w"))
    spark.conf.set("spark.flightsvc.retryTimeot", "1s")
    try:
        with pytest.raises(
            flightsvc.InvalidArgumentError, match=r"did you mean spark\.flightsvc\.retryTimeout"
        ):
            model.transform(frame)
    finally:
        spark.conf.unset("spark.flightsvc.retryTimeot")


@pytest.fixture
def pictures(models: Path) -> flightsvc.Model:
    image = flightsvc.ImageInput(size=(32, 32), scale=0.5, offset=(0.0, 1.0, 2.0))
    return flightsvc.Model(models / "pictures", preprocess={"image": image})


def test_a_driver_whose_front_has_left_starts_another(spark: Any, models: Path):
    frame = spark.createDataFrame([([1, 2, 3],)], "i array<bigint>")
    model = flightsvc.Model(models / "ints")
    before = model.output_schema(frame.schema)
    front = psutil.Process(model.driver()[1].action("status", {})["pid"])
    front.kill()
    until(lambda: is_gone(front), 5, "the front ends")
    assert model.output_schema(frame.schema) == before
    assert model.driver()[1].action("status", {})["pid"] != front.pid


def test_pictures_need_paths_files_or_structs(spark: Any, pictures: flightsvc.Model):
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"'image' .* is made from pictures and needs"):
        pictures.transform(spark.createDataFrame([(1,)], "content int"), inputs={"image": "content"})
