# mypy: disable-error-code="import-untyped,misc,untyped-decorator"
"""The type table as Spark sees it: values both ways, advice on the driver, and what goes into a descriptor.

TensorFlow in Python runs the same SavedModels as oracle. Values of every other Arrow type are compared with
it in ``test_property.py``; their edges are in ``internal/tensor``.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from figures import PROVE, count

import flightsvc
from flightsvc import Input, InvalidArgumentError, Model, Output, TensorSpec
from flightsvc.spark.types import ACCEPTED as SPARK_ACCEPTED
from flightsvc.spark.types import check_input, spark_type

INTEGERS = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMBERS = (*INTEGERS, *UNSIGNED, *FLOATS)
BOTH_WAYS = (*NUMBERS, "bool", "string") if PROVE else ("int8", "uint64", "bfloat16", "bool", "string")

LISTED = {
    **{name: getattr(pa, name)() for name in (*INTEGERS, "float32", "float64")},
    "uint8": pa.int16(),
    "uint16": pa.int32(),
    "uint32": pa.int64(),
    "uint64": pa.decimal128(20, 0),
    "float16": pa.float32(),
    "bfloat16": pa.float32(),
    "bool": pa.bool_(),
    "string": pa.binary(),
}
"""What an output becomes."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three SavedModels: ``scalars`` and ``rows`` with a signature for each dtype, and ``special``."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("types")
    dtypes = {*BOTH_WAYS, "int64", "uint8", "float32"}

    def save(name: str, functions: dict[str, tuple[list[tf.TensorSpec], Callable[..., Any]]]) -> None:
        module = tf.Module()
        module.functions = {
            key: tf.function(body, input_signature=specs) for key, (specs, body) in functions.items()
        }
        tf.saved_model.save(module, str(folder / name), signatures=module.functions)

    def spec(name: str, dtype: str, *shape: int | None) -> tf.TensorSpec:
        return tf.TensorSpec((None, *shape), tf.as_dtype(dtype), name=name)

    def scalar(x: tf.Tensor) -> dict[str, tf.Tensor]:
        text = tf.strings.upper(x) if x.dtype == tf.string else tf.strings.as_string(x)
        return {"y": tf.identity(x), "text": text}

    save("scalars", {dtype: ([spec("x", dtype)], scalar) for dtype in dtypes})
    save("rows", {dtype: ([spec("x", dtype, 3)], lambda x: {"y": tf.reverse(x, [1])}) for dtype in dtypes})

    def ragged(tokens: tf.Tensor, n: tf.Tensor) -> dict[str, tf.Tensor]:
        counted = tf.where(tf.sequence_mask(n, tf.shape(tokens)[1]), tokens, 0)
        return {"tokens": tf.identity(tokens), "total": tf.reduce_sum(counted, 1)}

    save(
        "special",
        {
            "ragged": ([spec("tokens", "int64", None), spec("n", "int32")], ragged),
            "vectors64": ([spec("x", "float64", None)], lambda x: {"y": x * 2}),
            "vectors32": ([spec("x", "float32", None)], lambda x: {"y": x * 2}),
            "vectors3": ([spec("x", "float64", 3)], lambda x: {"y": x * 2}),
            "any": ([tf.TensorSpec(None, tf.float32, name="x")], lambda x: {"y": x * 2}),
            "fixed": ([spec("x", "float32")], lambda x: {"y": tf.constant([1.0, 2.0, 3.0]), "z": x + 1}),
            "total": ([spec("x", "float32")], lambda x: {"y": tf.reduce_sum(x)}),
        },
    )
    return folder


@pytest.fixture(scope="module")
def tf_run(made: Path) -> Callable[..., dict[str, Any]]:
    """TensorFlow in Python: ``tf_run("rows", "int8", x=tensor)`` returns numpy arrays by output."""
    import tensorflow as tf

    loaded = {name: tf.saved_model.load(str(made / name)) for name in ("scalars", "special")}

    def run(model: str, signature: str, **inputs: Any) -> dict[str, Any]:
        outputs = loaded[model].signatures[signature](**inputs)
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def tensor(values: Any, dtype: str) -> Any:
    """Values as a tensor, rounded as IEEE says: TensorFlow's own cast takes subnormal numbers for 0."""
    import tensorflow as tf

    kind = tf.as_dtype(dtype)
    if dtype in FLOATS:
        with np.errstate(over="ignore"):
            return tf.constant(np.asarray(values).astype(kind.as_numpy_dtype))
    return tf.constant(values, kind)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        call()
    return str(caught.value)


def advice(spec: TensorSpec, entry: Input, field: Any) -> str:
    """Return the refusal of a column for an input ``x``."""
    return refused(lambda: check_input(Model("m"), "x", spec, entry, field))


SPARK_EDGES: dict[str, list[Any]] = {
    "tinyint": [-128, 127, 0],
    "smallint": [-(2**15), 2**15 - 1, 0],
    "int": [-(2**31), 2**31 - 1, 0],
    "bigint": [-(2**63), 2**63 - 1, 0],
    "float": [1.5, -0.25, float("inf")],
    "double": [1.5, 1 / 3, float("nan")],
    "boolean": [True, False],
    "string": ["grün", "", "abc"],
    "binary": [b"\xff\0", b""],
    "decimal(20,0)": [Decimal(2**64 - 1), Decimal(0), Decimal(77)],
}


@pytest.mark.parametrize("dtype", BOTH_WAYS)
def test_spark_both_ways(spark: Any, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str):
    """Each tensor from each type that it takes, as a value and in an array."""
    from pyspark.sql.types import StructType

    scalars, arrays = Model(made / "scalars", signature=dtype), Model(made / "rows", signature=dtype)
    kinds = SPARK_ACCEPTED[dtype]
    for kind in kinds:
        schema = StructType.fromDDL(f"x {kind}")
        assert scalars.output_schema(schema).names == ["x", "text", "y"]
        arrays.output_schema(StructType.fromDDL(f"x array<{kind}>"))
    kind = kinds[0]
    values = SPARK_EDGES[kind]
    if dtype in UNSIGNED:
        high = int(np.iinfo(dtype).max)
        values = [Decimal(v) if kind.startswith("decimal") else v for v in (0, high, 1)]
    frame = spark.createDataFrame(
        [(i, value, [value] * 3) for i, value in enumerate([*values, None])],
        f"id int, x {kind}, a array<{kind}>",
    ).repartition(2)
    given = [int(v) if isinstance(v, Decimal) else v for v in values]
    expected = tf_run("scalars", dtype, x=tensor(given, dtype))
    result = arrays.transform(
        scalars.transform(frame, inputs={"x": "x"}, outputs={"y": "y"}),
        inputs={"x": "a"},
        outputs={"y": "ys"},
    )
    out = spark_type(LISTED[dtype]).simpleString()
    assert result.schema.simpleString() == (
        f"struct<id:int,x:{kind},a:array<{kind}>,y:{out},ys:array<{out}>>"
    )
    rows = sorted(result.collect(), key=lambda row: row.id)
    got = [bytes(row.y) if isinstance(row.y, bytearray) else row.y for row in rows]
    wanted = expected["y"].astype(np.float64) if dtype in FLOATS else expected["y"]
    np.testing.assert_equal(got, [*wanted.tolist(), None])
    for row, value in zip(rows, wanted.tolist(), strict=False):
        many = [bytes(y) if isinstance(y, bytearray) else y for y in row.ys]
        np.testing.assert_equal(many, [value] * 3)
    assert rows[-1].ys is None


def test_spark_out_of_range(spark: Any, made: Path):
    frame = spark.range(0, 300, 100).selectExpr("id", "id - 50 AS x")
    model = Model(made / "scalars", signature="uint8")
    with pytest.raises(Exception, match=r'InvalidArgumentError: .*row \d of record batch \d: .*"x"'):
        model.transform(frame).collect()
    rows = sorted(model.transform(frame, outputs={"y": "y"}, on_error="column").collect())
    assert [row.y for row in rows] == [None, 50, 150]
    assert [bool(row.error) for row in rows] == [True, False, False]


def test_spark_raw_ragged_and_void(spark: Any, made: Path):
    cells = [np.array(row, np.float32).tobytes() for row in ([1, 2, 3], [4, 5, 6])]
    frame = spark.createDataFrame([(cell,) for cell in cells], "c binary")
    model = Model(made / "rows", signature="float32")
    rows = model.transform(frame, inputs={"x": Input("c", encoding="raw")}).collect()
    assert sorted(row.y for row in rows) == [[3, 2, 1], [6, 5, 4]]
    words = spark.createDataFrame([([1, 2],), ([3],), ([],)], "t array<int>").coalesce(1)
    ragged = Model(made / "special", signature="ragged").transform(
        words, inputs={"tokens": Input("t", pad=9, lengths="n")}, batching="off", run_timeout=60
    )
    assert sorted((row.tokens, row.total) for row in ragged.collect()) == [
        ([1, 2], 3),
        ([3, 9], 3),
        ([9, 9], 0),
    ]
    void = spark.sql("SELECT NULL AS x, array(NULL) AS a")
    assert Model(made / "scalars", signature="int64").transform(void, inputs={"x": "x"}).first().y is None
    assert model.transform(void, inputs={"x": "a"}).first().y is None
    text = Model(made / "scalars", signature="string").transform(
        spark.createDataFrame([("grün",)], "x string"), outputs={"y": Output("y", type="utf8")}
    )
    assert text.schema["y"].dataType.simpleString() == "string"
    assert text.first().y == "grün"


def test_lengths_name_an_input(spark: Any, made: Path):
    model = Model(made / "special", signature="ragged")
    frame = spark.createDataFrame([([1],)], "t array<bigint>")
    with pytest.raises(flightsvc.NotFoundError, match="there is no input 'size'; inputs: "):
        model.transform(frame, inputs={"tokens": Input("t", lengths="size")})
    with pytest.raises(flightsvc.NotFoundError, match="input 'n' has no column"):
        model.transform(frame, inputs={"tokens": "t"})


def test_vectors_from_spark(spark: Any, made: Path, tf_run: Callable[..., dict[str, Any]]):
    from pyspark.ml.linalg import Vectors, VectorUDT
    from pyspark.sql.types import IntegerType, StructField, StructType

    rows = [
        (0, Vectors.dense([1.0, 2.0, 3.0])),
        (1, Vectors.sparse(3, [1], [0.1])),
        (2, None),
        (3, Vectors.sparse(3, [], [])),
        (4, Vectors.dense([-1.0, 1 / 3, 1e-300])),
    ]
    schema = StructType([StructField("id", IntegerType()), StructField("v", VectorUDT())])
    frame = spark.createDataFrame(rows, schema).repartition(2)
    arrays = np.array([vector.toArray() for _, vector in rows if vector is not None])
    kinds = (("vectors32", "float32"), ("vectors64", "float64"), ("vectors3", "float64"))
    for signature, dtype in kinds[: count(1, 3)]:
        expected = tf_run("special", signature, x=tensor(arrays, dtype))["y"].tolist()
        result = Model(made / "special", signature=signature).transform(
            frame, inputs={"x": "v"}, outputs={"y": "y"}
        )
        got = {row.id: row.y for row in result.collect()}
        assert [got[i] for i in (0, 1, 3, 4)] == expected
        assert got[2] is None
    assert result.schema["v"].dataType == VectorUDT()


def test_outputs_that_need_more_or_cannot_be(spark: Any, made: Path):
    frame = spark.createDataFrame([([1.0, 2.0],)], "x array<double>")
    model = Model(made / "special", signature="any")
    result = model.transform(frame, outputs={"y": Output("twice", shape=(-1, 2))})
    assert result.schema.simpleString() == "struct<x:array<double>,twice:array<float>>"
    assert result.first().twice == [2.0, 4.0]
    for signature in ("fixed", "total"):
        model = Model(made / "special", signature=signature)
        with pytest.raises(InvalidArgumentError, match='"y"'):
            model.transform(spark.range(3).selectExpr("CAST(id AS FLOAT) AS x"), outputs={"y": "y"})


# Advice on the driver; no server is asked.


ADVISED = [
    (
        "TIMESTAMP'2026-01-02 03:04:05'",
        ("int64", "uint64", "int32", "uint32", "float32", "float64", "string"),
    ),
    ("TIMESTAMP_NTZ'2026-01-02 03:04:05'", ("int64", "uint64", "int32", "float32", "float64", "string")),
    ("DATE'2026-01-02'", ("int16", "int32", "int64", "uint16", "uint64", "float32", "float64", "string")),
    ("1.5BD", (*NUMBERS, "bool", "string")),
    ("CAST(7 AS DECIMAL(20,0))", (*INTEGERS, *FLOATS, "bool", "string")),
    ("CAST(7 AS DECIMAL(38,0))", (*NUMBERS, "string")),
    ("7L", ("int8", "int16", "int32", *FLOATS, "bool", "string")),
    ("7", ("int8", "int16", "float16", "bfloat16", "float32", "bool", "string")),
    ("CAST(7 AS TINYINT)", ("float16", "bfloat16", "bool", "string")),
    ("1.5D", (*INTEGERS, *UNSIGNED, "float16", "bfloat16", "bool", "string")),
    ("1.5F", (*INTEGERS, *UNSIGNED, "bool", "string")),
    ("true", (*NUMBERS, "string")),
    ("'1'", (*NUMBERS, "bool")),
    ("map(1, 2)", ("string",)),
    ("named_struct('a', 1)", ("string",)),
    ("TIME'01:02:03'", ("string",)),
]
NESTINGS = ["{}", "array({})", "array(array({}))"]


@pytest.mark.parametrize(("value", "dtypes"), ADVISED, ids=[value for value, _ in ADVISED])
def test_advice_runs(spark: Any, value: str, dtypes: tuple[str, ...]):
    """Every expression that a refusal names makes the column fit, and Spark can run it."""
    columns = [f"{nesting.format(value)} AS `a ``{depth}`" for depth, nesting in enumerate(NESTINGS)]
    frame = spark.sql("SELECT " + ", ".join(columns))
    specs, expressions = [], []
    for dtype in dtypes:
        for depth, field in enumerate(frame.schema.fields):
            spec = TensorSpec(dtype, (-1,) * (depth + 1))
            text = advice(spec, Input("c"), field)
            head = f"column 'a `{depth}' is {field.dataType.simpleString()}, input 'x' ({spec}) needs "
            assert head in text
            assert "; if that is what you mean, use " in text, text
            specs.append(spec)
            expressions.append(text.split("use ", 1)[1])
    fitting = frame.selectExpr(*(f"{expression} AS c{i}" for i, expression in enumerate(expressions)))
    for spec, field in zip(specs, fitting.schema.fields, strict=True):
        check_input(Model("m"), "x", spec, Input("c"), field)
    [row] = fitting.collect()
    assert None not in row


def test_advice_means_what_it_says(spark: Any):
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    try:
        frame = spark.sql("SELECT TIMESTAMP'1970-01-02 00:00:01.5' AS t, array(DATE'1970-01-11') AS d")
        for name, dtype, rank, expected in (
            ("t", "int64", 1, 86_401_500_000),
            ("t", "int32", 1, 86_401),
            ("t", "float64", 1, 86_401.5),
            ("d", "int32", 2, [10]),
            ("d", "float32", 2, [10.0]),
        ):
            text = advice(TensorSpec(dtype, (-1,) * rank), Input(name), frame.schema[name])
            assert frame.selectExpr(text.split("use ", 1)[1]).first()[0] == expected
    finally:
        spark.conf.unset("spark.sql.session.timeZone")


def test_what_no_expression_mends(spark: Any):
    """No advice where none would mean the same."""
    for value, dtype in (
        ("map(1, 2)", "int64"),
        ("TIMESTAMP'2026-01-02 03:04:05'", "int8"),
        ("DATE'2026-01-02'", "bool"),
        ("named_struct('a', 1)", "float32"),
        ("parse_json('1')", "int64"),
        ("INTERVAL 1 DAY", "int64"),
    ):
        [field] = spark.sql(f"SELECT {value} AS c").schema.fields
        text = advice(TensorSpec(dtype, (-1,)), Input("c"), field)
        assert text.endswith(f"needs {SPARK_ACCEPTED[dtype][0]}"), text


def test_advice_of_other_kinds(spark: Any):
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import MatrixUDT, Vectors, VectorUDT

    def said(frame: Any, dtype: str, shape: tuple[int, ...], entry: Input) -> str:
        return advice(TensorSpec(dtype, shape), entry, frame.schema[0])

    vector = spark.createDataFrame([(Vectors.dense([1.0, 2.0]),)], ["c"])
    assert vector.schema["c"].dataType == VectorUDT()
    for dtype in ("float32", "float64"):
        check_input(Model("m"), "x", TensorSpec(dtype, (-1, 2)), Input("c"), vector.schema["c"])
        check_input(Model("m"), "x", TensorSpec(dtype, None), Input("c"), vector.schema["c"])
    text = said(vector, "int64", (-1, -1), Input("c"))
    assert text.endswith("make it an array first: pyspark.ml.functions.vector_to_array('c')")
    array = vector.select(vector_to_array("c").alias("c"))
    expression = said(array, "int64", (-1, -1), Input("c")).split("use ")[1]
    assert array.selectExpr(expression).first()[0] == [1, 2]
    said(vector, "float32", (-1, 2, 2), Input("c"))

    binary = spark.sql("SELECT X'00' AS c")
    assert "say so: Input('c', encoding='raw')" in said(binary, "float32", (-1, 1), Input("c"))
    raw = Input("c", encoding="raw")
    check_input(Model("m"), "x", TensorSpec("float32", (-1, 1)), raw, binary.schema["c"])
    floats = spark.sql("SELECT array(1F) AS c")
    assert "is encoded raw and needs binary" in said(floats, "float32", (-1, 1), raw)
    for value in ("NULL", "array(NULL)"):
        void = spark.sql(f"SELECT {value} AS c").schema["c"]
        check_input(Model("m"), "x", TensorSpec("int8", (-1, 3)), Input("c"), void)
    assert "needs array<float>" in said(spark.createDataFrame([], "c int"), "float32", (-1, 2), Input("c"))
    assert MatrixUDT().simpleString() == "matrix"


# What goes into the descriptor.


def test_the_descriptor_leaves_defaults_out():
    plain = Model("m").request({"x": "c", "y": Input("d")}, {"z": Output("z")})
    assert plain.descriptor() == {"v": 1, "model": "m", "inputs": {"x": "c", "y": "d"}, "outputs": {"z": "z"}}
    full = Model("m").request(
        {"x": Input("c", encoding="raw", pad=0, lengths="n"), "s": Input("d", pad="")},
        {"z": Output("zz", type="utf8", shape=(-1, 3)), "w": "w"},
        on_error="column",
        error_column="why",
        nulls="fail",
        run_timeout=0.0004,
        batching={"max_batch_size": 8},
        layout="tensor",
    )
    assert full.descriptor({"x": "C", "s": "d"}) == {
        "v": 1,
        "model": "m",
        "inputs": {
            "x": {"column": "C", "encoding": "raw", "pad": 0, "lengths": "n"},
            "s": {"column": "d", "pad": ""},
        },
        "outputs": {"z": {"column": "zz", "type": "utf8", "shape": [-1, 3]}, "w": "w"},
        "on_error": "column",
        "error_column": "why",
        "nulls": "fail",
        "run_timeout_ms": 1,
        "batching": {"max_batch_size": 8},
        "layout": "tensor",
    }
    assert Model("m").request(run_timeout=0).descriptor()["run_timeout_ms"] == 0
    assert full.columns(["C", "d"], ["n", "s", "x"], case_sensitive=False) == {"x": 0, "s": 1}


def test_options_that_are_none():
    for options, text in (
        ({"on_error": "ignore"}, "on_error is 'ignore'; it is one of fail, null, column"),
        ({"nulls": "drop"}, "nulls is 'drop'; it is one of null, fail"),
        ({"layout": "rows"}, "layout is 'rows'; it is one of list, tensor"),
        ({"run_timeout": -1}, "run_timeout is -1; give seconds"),
        ({"run_timeout": float("nan")}, "run_timeout is nan; give seconds"),
    ):
        assert refused(lambda: Model("m").request(**options)).startswith(text)  # noqa: B023
    assert "pad of column 'c' is nan" in refused(lambda: Input("c", pad=float("nan")))
    with pytest.raises(TypeError, match="layuot"):
        Model("m").request(layuot="tensor")
