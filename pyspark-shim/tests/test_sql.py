"""Models as functions of SQL and of DataFrames."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from processes import until

import flightsvc
from flightsvc.spark import calls as sql_calls
from flightsvc.spark import functions
from flightsvc.spark.verdicts import Verdicts


@pytest.fixture(scope="module")
def views(spark: Any, models: Path) -> Iterator[Any]:
    """View ``t``: id 0..249 and i, whose total is id; functions ``total``, ``both``, ``upper``, ``width``."""
    spark.range(250).selectExpr("id", "array(id, 0L, 0L) AS i").createOrReplaceTempView("t")
    ints, strings = flightsvc.Model(models / "ints"), flightsvc.Model(models / "strings")
    flightsvc.register_udf(spark, "total", ints, outputs={"total": "t"})
    flightsvc.register_udf(spark, "both", ints)
    upper = flightsvc.Output("u", type="utf8")
    flightsvc.register_udf(spark, "upper_of", strings, outputs={"upper": upper})
    flightsvc.register_udf(spark, "width", strings, outputs={"length": "n"}, inputs={"s": "text"})
    yield spark
    for name in ("total", "both", "upper_of", "width"):
        spark.sql(f"DROP TEMPORARY FUNCTION {name}")


def refused(spark: Any, run: Callable[[], Any]) -> str:
    """Return the text of the error that ``run`` raises; no task may have started until then."""
    group = uuid.uuid4().hex
    spark.sparkContext.setJobGroup(group, "refused")
    with pytest.raises(Exception) as caught:
        run()
    assert list(spark.sparkContext.statusTracker().getJobIdsForGroup(group)) == []
    return str(caught.value)


def test_columns_and_sql_agree_with_tensorflow(
    spark: Any, models: Path, oracle: Callable[..., dict[str, Any]]
):
    random = np.random.default_rng(3)
    a, b = random.normal(size=(250, 8)).astype(np.float32), random.normal(size=(250, 4)).astype(np.float32)
    expected = oracle("two", a=a, b=b)
    rows = [(i, x.tolist(), y.tolist()) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    frame = spark.createDataFrame(rows, "id bigint, left array<float>, right array<float>")
    frame.repartition(2).createOrReplaceTempView("pairs")
    model = flightsvc.Model(models / "two")
    two, logits = model.udf(), model.udf(inputs={"b": "y", "a": "x"}, outputs={"logits": "l"})
    flightsvc.register_udf(spark, "two", model, outputs={"logits": "l", "sum": "s"})
    got = frame.select(
        "id", two("left", frame.right), two(b="right", a="left"), logits("right", "left").alias("l")
    )
    assert got.columns == ["id", "predict(left, right)", "predict(left, right)", "l"]
    kind = "struct<logits:array<float>,sum:array<float>>"
    assert [f.dataType.simpleString() for f in got.schema] == ["bigint", kind, kind, "array<float>"]
    by_sql = spark.sql(
        "SELECT id, two(left, right), two(b => right, a => left), two(right, b => left) FROM pairs"
    )
    assert by_sql.schema[1].dataType.simpleString() == "struct<l:array<float>,s:array<float>>"
    by_sql = by_sql.drop(by_sql.columns[3])  # rows of the wrong length, had they been asked for
    for index, (column, in_sql) in enumerate(
        zip(sorted(got.collect()), sorted(by_sql.collect()), strict=True)
    ):
        for values in (column[1].logits, column[2].logits, column.l, in_sql[1].l, in_sql[2].l):
            np.testing.assert_allclose(values, expected["logits"][index], rtol=1e-4, atol=1e-6)
        for values in (column[1].sum, in_sql[1].s):
            np.testing.assert_allclose(values, expected["sum"][index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "query, rows",
    [
        ("SELECT both(i) FROM t WHERE id = 3", [(([6, 0, 0], 3),)]),
        ("SELECT total(i => i) + total(i) FROM t WHERE total(i) > 247", [(496,), (498,)]),
        ("SELECT total(i) % 2 k, count(*) n FROM t GROUP BY total(i) % 2 ORDER BY k", [(0, 125), (1, 125)]),
        ("SELECT id % 2, sum(total(i)) s FROM t GROUP BY 1 HAVING max(total(i)) > 248", [(1, 15625)]),
        ("SELECT count(*), sum(a.id) FROM t a JOIN t b ON total(a.i) = b.id + 240", [(10, 2445)]),
        ("WITH c AS (SELECT total(i) AS x FROM t) SELECT sum(x), max(x) FROM c", [(31125, 249)]),
        ("SELECT total(array(max(id), 1L, 1L)) FROM t", [(251,)]),
        ("SELECT upper_of(upper_of('ab')), width(upper_of('é')), total(array(1L, 2L, 3L))", [("AB", 2, 6)]),
        ("SELECT width(text => 'abc'), both(NULL).total, width(NULL)", [(3, None, None)]),
        ("SELECT CASE WHEN id > 1 THEN total(i) END FROM t ORDER BY id LIMIT 3", [(None,), (None,), (2,)]),
        ("SELECT EXISTS (SELECT 1 FROM t WHERE total(i) = 7)", [(True,)]),
        ("SELECT total(i) FROM t WHERE id < 0", []),
    ],
)
def test_where_a_query_may_call(views: Any, query: str, rows: list[Any]):
    assert [tuple(row) for row in views.sql(query).collect()] == rows


def test_a_view_and_a_limit_and_then_another_job(views: Any):
    views.sql("CREATE OR REPLACE TEMPORARY VIEW v AS SELECT id, total(i) AS x FROM t")
    assert views.sql("SELECT sum(x - id) FROM v").first()[0] == 0
    views.range(50_000).selectExpr("array(id, 0L, 0L) AS i").createOrReplaceTempView("many")
    for _ in range(2):
        assert len(views.sql("SELECT both(i) FROM many LIMIT 3").collect()) == 3
        assert len(views.sql("SELECT total(i) FROM many").take(2)) == 2
        assert views.sql("SELECT sum(x) FROM v").first()[0] == 31125
    views.sql("DROP VIEW v")


def test_structured_streaming(views: Any, models: Path, tmp_path: Path):
    views.table("t").repartition(3).write.parquet(str(tmp_path / "in"))
    frame = views.readStream.schema("id bigint, i array<bigint>").parquet(str(tmp_path / "in"))
    frame.createOrReplaceTempView("arriving")
    doubled = flightsvc.Model(models / "ints").udf(outputs={"doubled": "d"})("i")
    plain = frame.select("id", "i", doubled.alias("d")).selectExpr("id", "total(i) AS x", "d")
    grouped = views.sql("SELECT total(i) % 2 AS k, count(*) AS n FROM arriving GROUP BY 1")
    for name, rows, mode in (("plain", plain, "append"), ("grouped", grouped, "complete")):
        sink = rows.writeStream.format("memory").queryName(name).outputMode(mode)
        query = sink.trigger(availableNow=True).start()
        assert query.awaitTermination(60)
        assert query.exception() is None
    assert sorted((r.id, r.x, r.d[0]) for r in views.table("plain").collect()) == [
        (i, i, 2 * i) for i in range(250)
    ]
    assert sorted(map(tuple, views.table("grouped").collect())) == [(0, 125), (1, 125)]


def test_rows_that_cannot_be_run(spark: Any, models: Path):
    model = flightsvc.Model(models / "strict")
    spark.createDataFrame(
        [(0, 4.0, "1"), (1, -1.0, "2"), (2, 9.0, "x"), (3, None, "4"), (4, 25.0, "5")],
        "id int, x float, text string",
    ).coalesce(1).createOrReplaceTempView("rows")
    for policy in ("fail", "null", "column"):
        flightsvc.register_udf(spark, f"try_{policy}", model, on_error=policy, error_column="why")
    with pytest.raises(Exception, match=r"row 1 of record batch 0.*x must not be negative"):
        spark.sql("SELECT try_fail(text, x) FROM rows").collect()
    assert spark.sql("SELECT try_fail(text, x).root FROM rows WHERE id IN (0, 3)").collect() == [
        (2,),
        (None,),
    ]
    good = [(2.0, 1.0), (None, None), (None, None), (None, None), (5.0, 5.0)]
    got = spark.sql("SELECT r.root, r.number FROM (SELECT try_null(x => x, text => text) r FROM rows)")
    assert [tuple(row) for row in got.collect()] == good
    got = spark.sql("SELECT try_column(x => x, text => text) AS r FROM rows").collect()
    assert [(row.r.root, row.r.number) for row in got] == good
    assert [row.r.why is None for row in got] == [True, False, False, True, True]
    assert "x must not be negative" in got[1].r.why
    root = model.udf(outputs={"root": "root"}, on_error="column", nulls="fail")
    kind = spark.table("rows").select(root(x="x", text="text").alias("r")).schema["r"].dataType
    assert kind.simpleString() == "struct<root:float,error:string>"


def test_listed_replaced_and_dropped(spark: Any, models: Path):
    ints, strings = flightsvc.Model(models / "ints"), flightsvc.Model(models / "strings")
    spark.udf.register("mine", lambda: "of Python")
    flightsvc.register_udf(spark, "mine", ints, outputs={"total": "t"})
    flightsvc.register_udf(spark, "mine", strings, outputs={"length": "n"}, inputs={"s": "the text"})
    assert "mine" in [row.function for row in spark.sql("SHOW USER FUNCTIONS").collect()]
    assert "mine" in [f.name for f in spark.catalog.listFunctions(pattern="mine")]
    described = [row[0] for row in spark.sql("DESCRIBE FUNCTION EXTENDED mine").collect()]
    assert any(line.split() == ["Input:", "the", "text", "BINARY"] for line in described), described
    assert any(line.endswith(f"{strings.name}, signature serving_default") for line in described), described
    assert spark.sql("SELECT mine('abc'), mine(`the text` => 'ab')").first() == (3, 2)
    spark.sql("DROP TEMPORARY FUNCTION mine")
    assert not spark.catalog.functionExists("mine")
    assert "UNRESOLVED_ROUTINE" in refused(spark, lambda: spark.sql("SELECT mine('abc')"))
    flightsvc.register_udf(spark, "mine", ints, outputs={"total": "t"})
    assert spark.sql("SELECT mine(array(1, 2, 3))").first() == (6,)
    spark.sql("DROP TEMPORARY FUNCTION mine")


def test_a_replacement_that_fails_replaces_nothing(spark: Any, models: Path):
    ints = flightsvc.Model(models / "ints")
    flightsvc.register_udf(
        spark, "kept", ints, outputs={"total": "t"}, types={"i": "array<bigint> -- of rows"}
    )
    listed = [row.function for row in spark.sql("SHOW USER FUNCTIONS").collect()]
    picture = "origin string, height int, width int, nChannels int, mode int, data binary"
    mean = flightsvc.Model(models / "pictures", preprocess={"image": flightsvc.ImageInput((32, 32))})
    with pytest.raises(Exception, match="PARSE_SYNTAX_ERROR"):  # Spark names no such field in a type
        flightsvc.register_udf(spark, "kept", mean, types={"image": f"{picture}, `of a day` date"})
    assert spark.sql("SELECT kept(array(1, 2, 3))").first() == (6,)
    assert [row.function for row in spark.sql("SHOW USER FUNCTIONS").collect()] == listed
    spark.sql("DROP TEMPORARY FUNCTION kept")


def test_what_was_made_with_a_function_that_is_replaced(spark: Any, models: Path):
    ints = flightsvc.Model(models / "ints")
    flightsvc.register_udf(spark, "again", ints, outputs={"total": "t"})
    frame = spark.sql("SELECT again(array(1, 2, 3)) AS x")
    frame.createOrReplaceTempView("of_frame")
    spark.sql("CREATE OR REPLACE TEMPORARY VIEW of_sql AS SELECT again(array(1, 2, 3)) AS x")
    flightsvc.register_udf(spark, "again", flightsvc.Model(models / "sums"), outputs={"width": "w"})
    assert (frame.first(), spark.table("of_frame").first()) == ((6,), (6,))
    assert spark.table("of_sql").first() == (3,)
    flightsvc.register_udf(spark, "again", ints, outputs={"doubled": "d"})
    assert frame.first() == (6,)
    assert "CANNOT_UP_CAST_DATATYPE" in refused(spark, lambda: spark.table("of_sql"))
    spark.sql("DROP TEMPORARY FUNCTION again")


def test_the_session_of_a_registration_counts(spark: Any, models: Path):
    other = spark.newSession()
    other.conf.set("spark.sql.caseSensitive", "true")
    outputs = {"doubled": "T", "total": "t"}
    flightsvc.register_udf(other, "cased", flightsvc.Model(models / "ints"), outputs=outputs)
    assert other.sql("SELECT cased(array(1, 2, 3)).t").first() == (6,)


def test_a_function_stays_on_the_driver(spark: Any, models: Path, monkeypatch: pytest.MonkeyPatch):
    total = flightsvc.Model(models / "ints").udf(outputs={"total": "t"})
    with pytest.raises(Exception, match=r"to give it a name in SQL use flightsvc.register_udf"):
        spark.udf.register("f", total)
    monkeypatch.setattr(functions, "active_session", lambda: None)
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"no Spark session, .* create a session first"):
        flightsvc.Model(models / "ints").udf()


def test_types_are_refused_on_the_driver(views: Any, models: Path):
    frame = views.table("t").selectExpr(
        "*",
        "array(1.5D) AS d",
        "array(1.5) AS m",
        "named_struct('b', array(i)) AS `a`",
        "array(1.5D) AS `my col`",
        "'x' AS s",
        "date(now()) day",
    )
    total = flightsvc.Model(models / "ints").udf(outputs={"total": "t"})
    wants = r"input 'i' (int64[-1,3]) needs array<bigint>"
    advice = "; if that is what you mean, use "
    for argument, found, cast in (
        ("d", "column 'd' is array<double>", f"{advice}CAST(d AS ARRAY<BIGINT>)"),
        ("m", "column 'm' is array<decimal(2,1)>", f"{advice}CAST(m AS ARRAY<BIGINT>)"),
        ("a.b", "column 'a.b' is array<array<bigint>>", f"{advice}flatten(a.b)"),
        ("my col", "column 'my col' is array<double>", f"{advice}CAST(<column> AS ARRAY<BIGINT>)"),
        (frame["my col"], "column 'my col' is array<double>", f"{advice}CAST(<column> AS ARRAY<BIGINT>)"),
        (frame.id + 1, ".id, 1)' is bigint", "`"),
        ("s", "column 's' is string", "`"),
    ):
        text = refused(views, lambda argument=argument: frame.select(total(argument)).collect())
        assert f"model file://{models}/ints, signature serving_default: column" in text
        assert f"{found}, {wants}{cast}" in text
    assert "aggregate" not in refused(views, lambda: frame.groupBy(total("d")).count().collect())
    width = flightsvc.Model(models / "strings").udf(outputs={"length": "n"})
    text = refused(views, lambda: frame.where(width("day") > 3).collect())
    assert (
        "column 'day' is date, input 's' (string[-1]) needs string" in text and "CAST(day AS STRING)" in text
    )
    # In SQL it is Spark that refuses what it cannot cast, and casts the rest.
    text = refused(views, lambda: views.sql("SELECT total(id) FROM t").collect())
    assert 'cannot cast "BIGINT" to "ARRAY<BIGINT>"' in text and "id" in text
    text = refused(views, lambda: views.sql("SELECT width(id) FROM t").collect())
    assert 'cannot cast "BIGINT" to "BINARY"' in text
    assert "requires 1 parameter" in refused(views, lambda: views.sql("SELECT total()").collect())
    assert "the argument named `j`" in refused(views, lambda: views.sql("SELECT total(j => id) FROM t"))
    assert views.sql("SELECT total(array('1', '2', '3')), total(array(1Y, 2Y, 3Y))").first() == (6, 6)


def test_a_type_that_reaches_a_worker_is_refused_there(views: Any, models: Path):
    total = flightsvc.Model(models / "ints").udf(outputs={"total": "t"})
    with pytest.raises(
        Exception, match=r'input "i" int64 \[\?,3\] wants 1 level of list.*column "i" is int64'
    ):
        views.table("t").select(total.arrow("id")).collect()


def test_types_that_fit_are_left_alone(spark: Any, models: Path):
    frame = spark.sql(
        "SELECT array(1.0D, 2.0D, 3.0D) d, array(1Y) y, array(NULL) v, 'a' COLLATE UTF8_LCASE s, "
        "x'61' b, NULL n"
    )
    total = flightsvc.Model(models / "sums").udf(outputs={"total": "t"})
    width = flightsvc.Model(models / "strings").udf(outputs={"length": "n"})
    got = frame.select(total("d"), total("y"), total("v"), total("n"), width("s"), width("b"), width("n"))
    assert got.first() == (6.0, 1.0, None, None, 1, 1, None)
    plan = got._jdf.queryExecution().optimizedPlan().toString()
    assert "typeof" not in plan and "CASE" not in plan, plan


def test_types_for_an_input_of_unknown_rank(models: Path):
    spec, model = flightsvc.TensorSpec("int64", None), flightsvc.Model(models / "ints")
    accepted = Verdicts.of(model, "x", spec, flightsvc.Input("x"), "x").accepted
    for kind in ("bigint", "array<bigint>", "array<array<array<array<int>>>>", "void"):
        assert kind in accepted
    assert not [kind for kind in accepted if "double" in kind]


def test_vectors(spark: Any, models: Path):
    from pyspark.ml.linalg import Vectors

    frame = spark.createDataFrame([(Vectors.dense(1, 2),), (Vectors.sparse(2, [1], [5.0]),)], ["features"])
    total = flightsvc.Model(models / "sums").udf(outputs={"total": "t"})
    assert [row[0] for row in frame.coalesce(1).select(total("features")).collect()] == [3.0, 5.0]


def test_what_a_registration_refuses(spark: Any, models: Path):
    ints, two = flightsvc.Model(models / "ints"), flightsvc.Model(models / "two")
    for text, model, options in (
        ("two fields 'T', array<bigint> and bigint", ints, {"outputs": {"doubled": "T", "total": "t"}}),
        ('column name "t"', ints, {"outputs": {"doubled": "t", "total": "t"}}),
        (
            "two fields 'Error', bigint and string",
            ints,
            {"outputs": {"total": "Error"}, "on_error": "column"},
        ),
        ("input 'b' has no column", two, {"inputs": {"a": "x"}}),
        ("there is no input 'z'", two, {"inputs": {"z": "x"}}),
        ("types names 'y'; the parameters of f are i", ints, {"types": {"y": "int"}}),
        ("column 'i' is array<string>, input 'i' (int64[-1,3])", ints, {"types": {"i": "array<string>"}}),
    ):
        with pytest.raises(flightsvc.FlightsvcError) as caught:
            flightsvc.register_udf(spark, "f", model, **options)
        assert text in str(caught.value)
    assert not spark.catalog.functionExists("f")
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"built-in function 'Sum'.* under another name"):
        flightsvc.register_udf(spark, "Sum", ints)
    total = ints.udf(outputs={"total": "t"})
    for text, columns, named in (
        ("predict(i) of model", ("a", "b"), {}),
        ("has no parameter 'z'", (), {"z": "a"}),
        ("got two columns for 'i'", ("a",), {"I": "b"}),
        ("got no column for 'i'", (), {}),
    ):
        with pytest.raises(flightsvc.InvalidArgumentError) as caught:
            total(*columns, **named)
        assert text in str(caught.value)


def test_names_compare_as_spark_says(spark: Any, models: Path):
    ints = flightsvc.Model(models / "ints")
    spark.conf.set("spark.sql.caseSensitive", "true")
    try:
        both = ints.udf(outputs={"doubled": "T", "total": "t"})
        assert both.returns.simpleString() == "struct<T:array<bigint>,t:bigint>"
        with pytest.raises(flightsvc.InvalidArgumentError, match="no parameter 'I'"):
            both(I="i")
    finally:
        spark.conf.unset("spark.sql.caseSensitive")


def test_a_parameter_of_another_type(spark: Any, models: Path):
    ints = flightsvc.Model(models / "ints")
    flightsvc.register_udf(
        spark, "raw", ints, outputs={"total": "t"}, inputs={"i": flightsvc.Input("b", encoding="raw")}
    )
    assert spark.sql(f"SELECT raw(x'{'0100000000000000' * 3}')").first() == (3,)
    flightsvc.register_udf(spark, "raw", ints, outputs={"total": "t"}, types={"i": "array<int>"})
    described = [row[0].split() for row in spark.sql("DESCRIBE FUNCTION raw").collect()]
    assert ["Input:", "i", "ARRAY<INT>"] in described
    assert spark.sql("SELECT raw(array(1, 2, 3))").first() == (6,)
    spark.sql("DROP TEMPORARY FUNCTION raw")


def test_pictures(spark: Any, models: Path):
    pixels = np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8)
    struct = "struct<origin:string,height:int,width:int,nChannels:int,mode:int,data:binary>"
    bgr = bytearray(pixels[:, :, ::-1].tobytes())
    images = spark.createDataFrame([(("", 32, 32, 3, 16, bgr),)], f"image {struct}")
    images.createOrReplaceTempView("images")
    model = flightsvc.Model(models / "pictures", preprocess={"image": flightsvc.ImageInput((32, 32))})
    mean = model.udf()
    flightsvc.register_udf(spark, "mean_of_image", model, types={"image": struct})
    turned = "struct(image.data, image.mode, image.nChannels, image.width, image.height) AS i"
    for result in (
        images.selectExpr(turned).select(mean("i")),
        spark.sql("SELECT mean_of_image(image) FROM images"),
    ):
        np.testing.assert_allclose(result.first()[0], pixels.mean((0, 1)), rtol=1e-5)
    fields = "'height', 1, 'width', 1, 'nChannels', 1, 'mode', 0, 'data', x'00'"
    for other in (
        "array(image)",
        f"named_struct({fields.replace(', 1, ', ', 1L, ', 1)})",
        "named_struct('theight', 1, 'width', 1, 'nChannels', 1, 'mode', 0, 'mydata', x'00')",
        f"named_struct('a', 1, 'image', named_struct({fields}))",
    ):
        other_frame = images.selectExpr(f"{other} AS o")
        text = refused(spark, lambda other_frame=other_frame: other_frame.select(mean("o")))
        assert "column 'o' is " in text and "binary (files) or Spark's image struct" in text
    beside = images.selectExpr(f"named_struct('a', array(1), {fields}, 'b', named_struct('c', 1)) AS o")
    assert beside.select(mean("o")).columns == ["predict(o)"]
    numbers = spark.sql("SELECT 1 AS n")
    text = refused(spark, lambda: numbers.select(mean("n")).collect())
    assert "column 'n' is int, input 'image'" in text and "needs string (paths or URIs), binary" in text
    flightsvc.register_udf(spark, "mean_of_file", model, types={"image": "binary"})
    text = refused(spark, lambda: spark.sql("SELECT mean_of_file(image) FROM images").collect())
    assert "cannot cast" in text and '"BINARY"' in text


@pytest.fixture
def worker(client: flightsvc.Client, models: Path, monkeypatch: pytest.MonkeyPatch) -> sql_calls.Worker:
    """What a Spark worker runs, here, with the front of ``client``."""
    monkeypatch.setattr(sql_calls, "worker_connection", lambda request, conf: client._connection)
    request = flightsvc.Model(models / "ints").request({"i": "i"}, {"total": "t"})
    return sql_calls.Worker("total", uuid.uuid4().hex, request, ("i",), {"i": 0}, False, {})


def lists(*rows: list[int], kind: Any = None) -> pa.Array:
    return pa.array(rows, pa.list_(kind or pa.int64()))


def streams(client: flightsvc.Client) -> tuple[int, int]:
    """How many streams the runner of ``ints`` has open, and its pid."""
    [model] = [m for m in client.status()["models"] if m["model"].endswith("/ints") and m["state"] == "ready"]
    return model["streams"], model["pid"]


def idle_threads() -> int:
    return sum(thread.name == "flightsvc-idle" for thread in threading.enumerate())


def test_calls_share_a_stream_that_closes_when_idle(client: flightsvc.Client, worker: sql_calls.Worker):
    for n in range(20):
        assert worker(lists([n, 1, 0], [0, 0, n])).to_pylist() == [n + 1, n]
    assert worker(lists()).to_pylist() == []
    assert streams(client)[0] == 1
    used = time.monotonic()
    until(lambda: not streams(client)[0] and not idle_threads(), 10, "the end of the stream")
    assert time.monotonic() - used > 0.5 * sql_calls._IDLE_SECONDS
    assert worker(lists([1, 1, 1])).to_pylist() == [3]
    for n in range(10):  # another stream for another schema, once
        assert worker(lists([1, 2, n], kind=pa.int32())).to_pylist() == [n + 3]
        assert worker(lists([1, 1, n])).to_pylist() == [n + 2]
    assert streams(client)[0] == 2
    assert idle_threads() == 2


def test_a_stream_is_of_the_device_that_its_task_was_given(
    worker: sql_calls.Worker, monkeypatch: pytest.MonkeyPatch
):
    given = iter(["auto", "cpu", "auto", "cpu"])
    monkeypatch.setattr(
        sql_calls, "on_task_device", lambda request: dataclasses.replace(request, device=next(given))
    )
    for n in range(4):
        assert worker(lists([n, 1, 0])).to_pylist() == [n + 1]
    kept = {key[2]: calls for key, calls in sql_calls._all_calls.items() if key[1] == worker.key}
    assert sorted(kept) == ["auto", "cpu"]
    assert all(kept[device]._worker.request.device == device for device in kept)


def test_a_worker_forgets_functions_that_are_idle_or_fail(
    worker: sql_calls.Worker, monkeypatch: pytest.MonkeyPatch
):
    ours = [dataclasses.replace(worker, key=uuid.uuid4().hex) for _ in range(3)]  # as Model.udf() makes them

    def kept() -> set[str]:
        return {key[1] for key in sql_calls._all_calls} & {function.key for function in ours}

    for function in ours:
        assert function(lists([1, 2, 3])).to_pylist() == [6]
    assert kept() == {function.key for function in ours}
    until(lambda: not idle_threads(), 10, "the end of the streams")
    assert not kept()

    def fails(request: Any, conf: Any) -> Any:
        raise flightsvc.UnavailableError("no front")

    monkeypatch.setattr(sql_calls, "worker_connection", fails)
    with pytest.raises(flightsvc.UnavailableError):
        ours[0](lists([1, 2, 3]))
    assert not kept()


def test_a_runner_killed_between_calls_costs_nothing(client: flightsvc.Client, worker: sql_calls.Worker):
    assert worker(lists([1, 2, 3])).to_pylist() == [6]
    _, pid = streams(client)
    os.kill(pid, 9)
    assert worker(lists([4, 5, 6])).to_pylist() == [15]
    assert streams(client)[1] != pid


def test_a_refused_call_does_not_spoil_the_next(client: flightsvc.Client, worker: sql_calls.Worker):
    with pytest.raises(flightsvc.InvalidArgumentError, match="a list of 2 elements"):
        worker(lists([1, 2]))
    assert worker(lists([1, 2, 3])).to_pylist() == [6]
