# mypy: disable-error-code="import-untyped,misc,untyped-decorator"
"""The type table, line by line and both ways, through Client.predict and through Spark.

TensorFlow in Python runs the same SavedModels as oracle.
"""

from __future__ import annotations

import re
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
from flightsvc.spark.types import check_input

INTEGERS = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMBERS = (*INTEGERS, *UNSIGNED, *FLOATS)
DTYPES = (*NUMBERS, "bool", "string")

DECIMAL = pa.decimal128(20, 0)
WHOLE = [getattr(pa, name)() for name in (*INTEGERS, *UNSIGNED)]
# All Arrow types that a tensor of numbers takes.
ACCEPTED: dict[str, list[pa.DataType]] = {
    "int8": [pa.int8()],
    "int16": [pa.int16(), pa.int8(), pa.uint8()],
    "int32": [pa.int32(), pa.int16(), pa.int8(), pa.uint16(), pa.uint8()],
    "int64": [pa.int64(), pa.int32(), pa.int16(), pa.int8(), pa.uint32(), pa.uint16(), pa.uint8()],
    **{name: [*WHOLE, DECIMAL] for name in UNSIGNED},
    "float16": [pa.float16(), pa.float32()],
    "bfloat16": [pa.float32()],
    "float32": [
        *(pa.float32(), pa.float64(), pa.float16()),
        *(pa.int16(), pa.int8(), pa.uint16(), pa.uint8()),
    ],
    "float64": [
        *(pa.float64(), pa.float32(), pa.float16()),
        *(pa.int32(), pa.int16(), pa.int8(), pa.uint32(), pa.uint16(), pa.uint8()),
    ],
    "bool": [pa.bool_()],
}
# What an output becomes: as a list's element, and as an element of a fixed shape tensor.
LISTED = {
    **{name: getattr(pa, name)() for name in (*INTEGERS, "float32", "float64")},
    "uint8": pa.int16(),
    "uint16": pa.int32(),
    "uint32": pa.int64(),
    "uint64": DECIMAL,
    "float16": pa.float32(),
    "bfloat16": pa.float32(),
    "bool": pa.bool_(),
    "string": pa.binary(),
}
KEPT = LISTED | {name: getattr(pa, name)() for name in (*UNSIGNED, "float16")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three SavedModels: ``scalars`` and ``rows`` with a signature for each dtype, and ``special``."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("types")

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

    save("scalars", {dtype: ([spec("x", dtype)], scalar) for dtype in DTYPES})
    save(
        "rows",
        {
            dtype: ([spec("x", dtype, 3)], lambda x: {"y": tf.reverse(x, [1]), "first": x[:, 0]})
            for dtype in DTYPES
        },
    )

    def same(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.identity(x)}

    save(
        "special",
        {
            "ragged": (
                [spec("tokens", "int64", None), spec("n", "int32")],
                lambda tokens, n: {
                    "tokens": tf.identity(tokens),
                    "total": tf.reduce_sum(tf.where(tf.sequence_mask(n, tf.shape(tokens)[1]), tokens, 0), 1),
                },
            ),
            "known": ([spec("x", "float32", 4)], same),
            "words": ([spec("x", "string", None)], same),
            "flags": ([spec("x", "bool", None)], same),
            "deep": ([spec("x", "float32", None, None)], same),
            "cube": (
                [spec("x", "int32", 2, None, 2)],
                lambda x: {"y": tf.transpose(x, (0, 3, 2, 1)), "total": tf.reduce_sum(x, (1, 2, 3))},
            ),
            "vectors64": ([spec("x", "float64", None)], lambda x: {"y": x * 2, "size": 0 * x[:, 0]}),
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

    loaded = {name: tf.saved_model.load(str(made / name)) for name in ("scalars", "rows", "special")}

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


def edges(arrow: pa.DataType, dtype: str) -> list[Any]:
    """The values at the edges of what both an Arrow type and a tensor hold."""
    if pa.types.is_boolean(arrow):
        return [True, False, True]
    if pa.types.is_floating(arrow):
        return [0.0, -0.0, 1.5, -2.25, 1 / 3, 65504.0, 6e-8, float("inf"), float("-inf"), float("nan")]
    if arrow == DECIMAL:
        low, high = 0, 10**20 - 1
    else:
        info = np.iinfo(arrow.to_pandas_dtype())
        low, high = int(info.min), int(info.max)
    if dtype not in FLOATS:
        info = np.iinfo(dtype)
        low, high = max(low, int(info.min)), min(high, int(info.max))
    return [low, high, 0, 1, 100, high - 1]


def column(values: list[Any], arrow: pa.DataType) -> pa.Array:
    if pa.types.is_floating(arrow):
        return pa.array(np.array(values, arrow.to_pandas_dtype()))
    return pa.array([Decimal(v) for v in values] if arrow == DECIMAL else values, arrow)


def same(got: pa.ChunkedArray, expected: np.ndarray, what: Any = "") -> None:
    """Assert that a column of numbers, text or nested lists of them is exactly what TensorFlow says."""
    rows = expected.astype(np.float64) if expected.dtype.kind in "fV" else expected
    np.testing.assert_equal(got.to_pylist(), rows.tolist(), err_msg=str(what))


def with_null(values: pa.Array) -> pa.Array:
    return pa.concat_arrays([values, pa.nulls(1, values.type)])


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        call()
    return str(caught.value)


# Numbers.


@pytest.mark.parametrize("dtype", [*NUMBERS, "bool"])
def test_scalars(client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str):
    for arrow in ACCEPTED[dtype]:
        values = edges(arrow, dtype)
        sent = column(values, arrow)
        given = np.asarray(sent) if pa.types.is_floating(arrow) else values
        expected = tf_run("scalars", dtype, x=tensor(given, dtype))
        got = client.predict(Model(made / "scalars", signature=dtype), pa.table({"x": with_null(sent)}))
        assert got.column_names == ["x", "text", "y"]
        assert got.schema.field("y").type == LISTED[dtype], arrow
        same(got["y"].slice(0, len(values)), expected["y"], arrow)
        assert got["text"].to_pylist() == [*expected["text"].tolist(), None], arrow
        assert got["y"].to_pylist()[-1] is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_tensorflows(
    client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str
):
    """To the nearest, ties to even, subnormal numbers included."""
    dice = np.random.default_rng(11)
    bits = dice.integers(0, 1 << 32, 4000, np.uint32).view(np.float32)
    limit = {"float16": 65504, "bfloat16": 3e38, "float32": 3e38}[dtype]
    ties = np.float32(1) + np.arange(64, dtype=np.float32) * 2**-12
    values = np.concatenate([bits[np.abs(bits) <= limit], dice.normal(size=2000).astype(np.float32), ties])
    if dtype == "float32":
        values = values.astype(np.float64) * (1 + 2.0**-30)
    got = client.predict(
        Model(made / "scalars", signature=dtype), pa.table({"x": values}), outputs={"y": "y"}
    )
    same(got["y"], tf_run("scalars", dtype, x=tensor(values, dtype))["y"])


OUT_OF_RANGE: list[tuple[str, pa.DataType, list[Any], list[int]]] = [
    *((name, pa.int64(), [3, -77, 100], [1]) for name in UNSIGNED),
    ("uint8", pa.int16(), [255, 256, 0, 3077], [1, 3]),
    ("uint16", pa.int32(), [65535, 65536, 0, -3077], [1, 3]),
    ("uint32", pa.uint64(), [4294967295, 4294967296, 0], [1]),
    ("uint64", DECIMAL, [2**64 - 1, 2**64, -77], [1, 2]),
    ("uint8", DECIMAL, [255, 10**20 - 1, 7], [1]),
    ("float16", pa.float32(), [65504.0, 70077.0, float("inf"), -70077.0], [1, 3]),
    ("bfloat16", pa.float32(), [1.0, float(np.finfo(np.float32).max), float("-inf")], [1]),
]


@pytest.mark.parametrize(
    ("dtype", "arrow", "values", "bad"), OUT_OF_RANGE, ids=[f"{case[0]}-{case[1]}" for case in OUT_OF_RANGE]
)
def test_out_of_range_is_a_refused_row(
    client: flightsvc.Client, made: Path, dtype: str, arrow: pa.DataType, values: list[Any], bad: list[int]
):
    model = Model(made / "scalars", signature=dtype)
    table = pa.table({"x": column(values, arrow)})
    text = refused(lambda: client.predict(model, table))
    assert re.search(rf'/scalars, signature {dtype}: row {bad[0]} of record batch 0: .*"x".*{dtype}', text), (
        text
    )
    assert "77" not in text.split("record batch 0")[1], "a message holds no row data"
    good = [None if i in bad else value for i, value in enumerate(values)]
    nulls = client.predict(model, table, outputs={"y": "y"}, on_error="null")
    assert nulls["y"].to_pylist() == good
    said = client.predict(model, table, outputs={"y": "y"}, on_error="column", error_column="why")
    assert said["y"].to_pylist() == good
    assert [i for i, why in enumerate(said["why"].to_pylist()) if why] == bad


# Strings, dictionaries, views.


def strings() -> list[tuple[str, pa.Array]]:
    words = ["abc", "", "grün", "abc", None, "z" * 40]
    raw = [None if word is None else word.encode() for word in words]
    index = pa.array([0, 1, 2, 0, None, 3])
    once = ["abc", "", "grün", "z" * 40]
    return [
        *((str(kind), pa.array(words, kind)) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *((str(kind), pa.array(raw, kind)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
        *(
            (
                f"dictionary of {kind} by {small}",
                pa.DictionaryArray.from_arrays(index.cast(small), pa.array(once, kind)),
            )
            for kind, small in (
                (pa.string(), pa.int8()),
                (pa.large_string(), pa.int32()),
                (pa.string(), pa.uint16()),
                (pa.string(), pa.int64()),
            )
        ),
        (
            "dictionary of binary",
            pa.DictionaryArray.from_arrays(index.cast(pa.int16()), pa.array([w.encode() for w in once])),
        ),
    ]


@pytest.mark.parametrize(("name", "sent"), strings(), ids=[name for name, _ in strings()])
def test_strings(client: flightsvc.Client, made: Path, name: str, sent: pa.Array):
    got = client.predict(Model(made / "scalars", signature="string"), pa.table({"x": sent}))
    expected = [b"abc", b"", "grün".encode(), b"abc", None, b"z" * 40]
    assert got["y"].to_pylist() == expected
    assert got["text"].to_pylist() == [None if e is None else e.upper() for e in expected]
    sliced = client.predict(Model(made / "scalars", signature="string"), pa.table({"x": sent}).slice(2, 3))
    assert sliced["y"].to_pylist() == expected[2:5]


def test_binary_of_one_size_is_a_string(client: flightsvc.Client, made: Path):
    sent = pa.array([b"abc", b"\xff\0\x01", None], pa.binary(3))
    got = client.predict(Model(made / "scalars", signature="string"), pa.table({"x": sent}))
    assert got["y"].to_pylist() == [b"abc", b"\xff\0\x01", None]


def test_each_record_batch_may_have_its_own_dictionary(client: flightsvc.Client, made: Path):
    chunks = [pa.array(words).dictionary_encode() for words in (["a", "b"], ["c", "a", "c"], ["b"])]
    got = client.predict(
        Model(made / "scalars", signature="string"), pa.table({"x": pa.chunked_array(chunks)})
    )
    assert got["y"].to_pylist() == [b"a", b"b", b"c", b"a", b"c", b"b"]
    numbers = pa.array([7, 9, 7, None], pa.int32()).dictionary_encode()
    got = client.predict(Model(made / "scalars", signature="int64"), pa.table({"x": numbers}))
    assert got["y"].to_pylist() == [7, 9, 7, None]


def test_utf8_out(client: flightsvc.Client, made: Path):
    model = Model(made / "scalars", signature="string")
    as_text = {"y": Output("y", type="utf8")}
    table = pa.table({"x": pa.array([b"abc", b"\xff\xfe77", None, "grün".encode()])})
    text = refused(lambda: client.predict(model, table, outputs=as_text))
    assert re.search(r'row 1 of record batch 0: .*"y".*UTF-8', text), text
    assert "77" not in text.split("record batch 0")[1]
    got = client.predict(model, table, outputs=as_text, on_error="column")
    assert got.schema.field("y").type == pa.string()
    assert got["y"].to_pylist() == ["abc", None, None, "grün"]
    assert [bool(why) for why in got["error"].to_pylist()] == [False, True, False, False]
    got = client.predict(model, table, outputs=as_text, on_error="null")
    assert got["y"].to_pylist() == ["abc", None, None, "grün"]
    text = refused(
        lambda: client.predict(
            Model(made / "scalars", signature="int8"),
            pa.table({"x": pa.array([1], pa.int8())}),
            outputs={"y": Output("y", type="utf8")},
        )
    )
    assert "utf8" in text
    assert "int8" in text


# Lists.


def three_wide(dtype: str) -> list[list[Any]]:
    if dtype == "string":
        return [["a", "", "ccc"], ["d", "e", "f"], ["x", "y" * 30, "z"]]
    if dtype == "bool":
        return [[True, False, True], [False, False, False], [True, True, False]]
    return [[0, 1, 2], [3, 4, 5], [100, 101, 127]]


def own(dtype: str) -> pa.DataType:
    """The Arrow type nearest to a tensor's."""
    return pa.float32() if dtype in ("float16", "bfloat16") else KEPT[dtype]


def listed(values: list[Any], kind: pa.DataType) -> list[pa.Array]:
    return [
        pa.array(values, level)
        for level in (
            pa.list_(kind),
            pa.large_list(kind),
            pa.list_(kind, 3),
            pa.list_view(kind),
            pa.large_list_view(kind),
        )
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists(client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str):
    values = three_wide(dtype)
    kind = own(dtype)
    expected = tf_run("rows", dtype, x=tensor(values, dtype))
    for sent in listed([*values, None, [values[0][0], None, values[0][1]]], kind):
        got = client.predict(Model(made / "rows", signature=dtype), pa.table({"x": sent}))
        assert got.schema.field("y").type == pa.list_(pa.field("item", LISTED[dtype])), sent.type
        same(got["y"].slice(0, 3), expected["y"], sent.type)
        same(got["first"].slice(0, 3), expected["first"], sent.type)
        assert got["y"].to_pylist()[3:] == got["first"].to_pylist()[3:] == [None, None]
    inner = pa.array([value for row in values for value in row], kind).dictionary_encode()
    sent = pa.ListArray.from_arrays(pa.array([0, 3, 6, 9], pa.int32()), inner)
    got = client.predict(Model(made / "rows", signature=dtype), pa.table({"x": sent}))
    same(got["y"], expected["y"], "dictionary")


def test_a_list_of_another_length_is_a_refused_row(client: flightsvc.Client, made: Path):
    table = pa.table({"x": pa.array([[1, 2, 3], [1, 2], [4, 5, 6], [], [7, 7, 7, 7]], pa.list_(pa.int32()))})
    model = Model(made / "rows", signature="int32")
    text = refused(lambda: client.predict(model, table))
    assert re.search(r'row 1 of record batch 0: .*"x".*\b2\b.*\b3\b', text), text
    got = client.predict(model, table, on_error="column")
    assert got["y"].to_pylist() == [[3, 2, 1], None, [6, 5, 4], None, None]
    assert [bool(why) for why in got["error"].to_pylist()] == [False, True, False, True, True]


def test_nested_lists(client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]]):
    values = np.arange(5 * 2 * 3 * 2, dtype=np.int32).reshape(5, 2, 3, 2)
    expected = tf_run("special", "cube", x=tensor(values, "int32"))
    inner = pa.list_(pa.list_(pa.int32(), 2))
    for kind in (pa.list_(inner), pa.list_(pa.large_list(pa.list_(pa.int16()))), pa.list_view(inner)):
        got = client.predict(
            Model(made / "special", signature="cube"), pa.table({"x": pa.array(values.tolist(), kind)})
        )
        same(got["y"], expected["y"], kind)
        same(got["total"], expected["total"], kind)
        assert str(got.schema.field("y").type).count("list<") == 3


def test_fixed_shape_tensors_in(client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]]):
    values = np.arange(4 * 2 * 3 * 2, dtype=np.int32).reshape(4, 2, 3, 2)
    model = Model(made / "special", signature="cube")
    sent = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    expected = tf_run("special", "cube", x=tensor(values, "int32"))
    same(client.predict(model, pa.table({"x": sent}))["y"], expected["y"])
    same(client.predict(model, pa.table({"x": sent}).slice(1, 2))["y"], expected["y"][1:3])
    narrow = pa.FixedShapeTensorArray.from_numpy_ndarray(values.astype(np.int8))
    same(client.predict(model, pa.table({"x": narrow}))["y"], expected["y"])
    turned = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2, 3, 2], permutation=[2, 0, 1]), sent.storage
    )
    assert "permutation" in refused(lambda: client.predict(model, pa.table({"x": turned})))
    flat = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int32(), [12]), sent.storage)
    assert '"x"' in refused(lambda: client.predict(model, pa.table({"x": flat})))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "string"])
def test_raw_cells(client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str):
    sent = tensor(three_wide(dtype), dtype)
    cells = [row.tobytes() for row in sent.numpy()]
    expected = tf_run("rows", dtype, x=sent)
    model = Model(made / "rows", signature=dtype)
    raw = {"x": Input("c", encoding="raw")}
    size = len(cells[0])
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(size)):
        column = pa.array([*cells, None], kind)
        got = client.predict(model, pa.table({"c": column}), inputs=raw)
        same(got["y"].slice(0, 3), expected["y"], kind)
        assert got["y"].to_pylist()[3] is None
        got = client.predict(model, pa.table({"c": column}).slice(1, 2), inputs=raw)
        same(got["y"], expected["y"][1:3], kind)
    wrong = pa.table({"c": [cells[0], cells[1] + b"\0", b"", cells[2]]})
    text = refused(lambda: client.predict(model, wrong, inputs=raw))
    assert re.search(rf'row 1 of record batch 0: .*"c".*\b{size}\b', text), text
    got = client.predict(model, wrong, inputs=raw, on_error="column")
    assert [bool(why) for why in got["error"].to_pylist()] == [False, True, True, False]
    same(got["first"].take([0, 3]), expected["first"][[0, 2]])


def test_raw_cells_that_cannot_be(client: flightsvc.Client, made: Path):
    raw = {"x": Input("x", encoding="raw")}
    table = pa.table({"x": [b"\x01\x02\x00", b"\x01\x00\x01"]})
    got = client.predict(Model(made / "rows", signature="bool"), table, inputs=raw, on_error="null")
    assert got["y"].to_pylist() == [None, [True, False, True]]
    for signature, word in (("words", "string"), ("deep", "raw")):
        model = Model(made / "special", signature=signature)
        assert word in refused(lambda: client.predict(model, table, inputs=raw))  # noqa: B023
    unknown = {"x": Input("x", encoding="base64")}
    assert "base64" in refused(
        lambda: client.predict(Model(made / "rows", signature="bool"), table, inputs=unknown)
    )


# Lists that differ in length.


def test_padding_with_the_true_lengths(
    client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]]
):
    rows = [[1, 2, 3], [], [5], None, [7, 8, 9, 10]]
    table = pa.table({"t": pa.array(rows, pa.list_(pa.int32()))})
    model = Model(made / "special", signature="ragged")
    inputs = {"tokens": Input("t", pad=-1, lengths="n")}
    padded = [[1, 2, 3, -1], [-1] * 4, [5, -1, -1, -1], [7, 8, 9, 10]]
    expected = tf_run("special", "ragged", tokens=tensor(padded, "int64"), n=tensor([3, 0, 1, 4], "int32"))
    got = client.predict(model, table, inputs=inputs)
    kept = [0, 1, 2, 4]
    same(got["tokens"].take(kept), expected["tokens"])
    same(got["total"].take(kept), expected["total"])
    assert got["total"].to_pylist() == [6, 0, 5, None, 34]
    assert got["tokens"].to_pylist()[3] is None


def test_lists_of_two_lengths_without_pad(client: flightsvc.Client, made: Path):
    table = pa.table({"x": pa.array([["a"], ["b", "c"]])})
    model = Model(made / "special", signature="words")
    for policy in ("fail", "null", "column"):
        text = refused(lambda: client.predict(model, table, on_error=policy))  # noqa: B023
        assert re.search(r'"x".*\b1\b.*\b2\b.*pad', text), text
    got = client.predict(model, table, inputs={"x": Input("x", pad="-")})
    assert got["y"].to_pylist() == [[b"a", b"-"], [b"b", b"c"]]
    equal = pa.table({"x": pa.array([["a", "d"], ["b", "c"]])})
    assert client.predict(model, equal)["y"].to_pylist() == [[b"a", b"d"], [b"b", b"c"]]


def test_padding_of_every_kind(client: flightsvc.Client, made: Path):
    flags = pa.table({"x": pa.array([[False], [], [False, False]])})
    got = client.predict(
        Model(made / "special", signature="flags"), flags, inputs={"x": Input("x", pad=True)}
    )
    assert got["y"].to_pylist() == [[False, True], [True, True], [False, False]]
    deep = pa.table({"x": pa.array([[[1.0], []], [[2.0, 3.0]]], pa.list_(pa.list_(pa.float32())))})
    got = client.predict(Model(made / "special", signature="deep"), deep, inputs={"x": Input("x", pad=-1.5)})
    assert got["y"].to_pylist() == [
        [[1.0, -1.5], [-1.5, -1.5]],
        [[2.0, 3.0], [-1.5, -1.5]],
    ]
    for pad in ("text", True):
        wrong = {"x": Input("x", pad=pad)}
        assert "pad" in refused(
            lambda: client.predict(Model(made / "special", signature="deep"), deep, inputs=wrong)  # noqa: B023
        )


def test_padding_to_a_known_size(client: flightsvc.Client, made: Path):
    table = pa.table({"x": pa.array([[1.0], [1.0, 2.0, 3.0, 4.0, 5.0], []], pa.list_(pa.float64()))})
    model = Model(made / "special", signature="known")
    got = client.predict(model, table, inputs={"x": Input("x", pad=0)}, on_error="column")
    assert got["y"].to_pylist() == [[1, 0, 0, 0], None, [0, 0, 0, 0]]
    assert [bool(why) for why in got["error"].to_pylist()] == [False, True, False]
    text = refused(lambda: client.predict(model, table, inputs={"x": Input("x", pad=0)}))
    assert re.search(r"row 1 of record batch 0: .*\b5\b.*\b4\b", text), text


def test_lengths_name_an_input(client: flightsvc.Client, made: Path, spark: Any):
    table = pa.table({"t": pa.array([[1]], pa.list_(pa.int64()))})
    model = Model(made / "special", signature="ragged")
    with pytest.raises(flightsvc.FlightsvcError, match=r'"(n|size)"'):
        client.predict(model, table, inputs={"tokens": Input("t", lengths="size")})
    with pytest.raises(flightsvc.FlightsvcError, match='"n"'):
        client.predict(model, table, inputs={"tokens": "t"})
    frame = spark.createDataFrame([([1],)], "t array<bigint>")
    with pytest.raises(flightsvc.NotFoundError, match="there is no input 'size'; inputs: "):
        model.transform(frame, inputs={"tokens": Input("t", lengths="size")})
    with pytest.raises(flightsvc.NotFoundError, match="input 'n' has no column"):
        model.transform(frame, inputs={"tokens": "t"})


# Spark ML's vectors.


VECTOR = pa.struct(
    [
        pa.field("type", pa.int8(), nullable=False),
        ("size", pa.int32()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)


def dense(*values: float | None) -> dict[str, Any]:
    return {"type": 1, "size": None, "indices": None, "values": list(values)}


def sparse(size: int, **values: float) -> dict[str, Any]:
    return {
        "type": 0,
        "size": size,
        "indices": [int(k[1:]) for k in values],
        "values": list(values.values()),
    }


@pytest.mark.parametrize("signature", ["vectors64", "vectors32", "vectors3"])
def test_vectors(client: flightsvc.Client, made: Path, signature: str):
    rows = [dense(1, 2, 3), None, sparse(3, i0=1.5, i2=-2), sparse(3), dense(0, 0, 0)]
    table = pa.table({"x": pa.array(rows, VECTOR)})
    got = client.predict(Model(made / "special", signature=signature), table, outputs={"y": "y"})
    assert got["y"].to_pylist() == [[2, 4, 6], None, [3, 0, -4], [0, 0, 0], [0, 0, 0]]


def test_vectors_that_are_wrong(client: flightsvc.Client, made: Path):
    known = Model(made / "special", signature="vectors3")
    rows = [dense(1, 2, 3), dense(1, 2), sparse(4, i3=1), sparse(3, i3=1), sparse(3, i2=1, i1=1)]
    table = pa.table({"x": pa.array(rows, VECTOR)})
    got = client.predict(known, table, on_error="column")
    assert got["y"].to_pylist() == [[2, 4, 6], None, None, None, None]
    assert [bool(why) for why in got["error"].to_pylist()] == [False, True, True, True, True]
    unknown = Model(made / "special", signature="vectors64")
    two = pa.table({"x": pa.array([dense(1, 2, 3), sparse(2)], VECTOR)})
    text = refused(lambda: client.predict(unknown, two))
    assert re.search(r'"x".*\b3\b.*\b2\b', text), text
    assert '"x"' in refused(lambda: client.predict(Model(made / "rows", signature="int64"), table))


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


# Outputs.


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_tensor(
    client: flightsvc.Client, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str
):
    values = three_wide(dtype)
    kind = own(dtype)
    expected = tf_run("rows", dtype, x=tensor(values, dtype))
    table = pa.table({"x": pa.array([values[0], None, *values[1:]], pa.list_(kind))})
    got = client.predict(Model(made / "rows", signature=dtype), table, layout="tensor")
    assert got.schema.field("y").type == pa.fixed_shape_tensor(KEPT[dtype], [3])
    assert got.schema.field("first").type == KEPT[dtype], "a plain column"
    y = got["y"].combine_chunks()
    assert [row.is_valid for row in y] == [True, False, True, True]
    storage = y.storage.take(pa.array([0, 2, 3]))
    same(pa.chunked_array([storage]), expected["y"])
    same(got["first"].take([0, 2, 3]), expected["first"])
    if dtype in NUMBERS:
        whole = pa.table({"x": pa.array(values, pa.list_(kind))})
        answer = client.predict(Model(made / "rows", signature=dtype), whole, layout="tensor")
        read = answer["y"].combine_chunks().to_numpy_ndarray()
        assert read.shape == (3, 3)
        assert read.dtype == KEPT[dtype].to_pandas_dtype()
        np.testing.assert_array_equal(read.astype(np.float64), expected["y"].astype(np.float64))


def test_layout_tensor_of_higher_rank(
    client: flightsvc.Client, made: Path, models: Path, tf_run: Callable[..., dict[str, Any]]
):
    values = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    sent = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)})
    got = client.predict(models / "nested", sent, layout="tensor")
    read = got["y"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(read, values.transpose(0, 2, 1))
    text = refused(
        lambda: client.predict(
            Model(made / "special", signature="deep"),
            pa.table({"x": [[[1.0]]]}),
            layout="tensor",
        )
    )
    assert re.search(r'"y".*shape', text), text
    known = {"y": Output("y", shape=(-1, 1, 2))}
    pair = pa.table({"x": [[[1.0, 2.0]]]})
    got = client.predict(Model(made / "special", signature="deep"), pair, outputs=known, layout="tensor")
    assert got.schema.field("y").type == pa.fixed_shape_tensor(pa.float32(), [1, 2])


def test_unknown_rank_needs_a_shape(client: flightsvc.Client, made: Path, spark: Any):
    model = Model(made / "special", signature="any")
    table = pa.table({"x": pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.float32()))})
    text = refused(lambda: client.predict(model, table))
    assert re.search(r'"y".*unknown rank.*"shape":\s*\[-1', text), text
    for shape in ((-1, 3), (-1, -1)):
        got = client.predict(model, table, outputs={"y": Output("y", shape=shape)})
        assert got["y"].to_pylist() == [[2, 4, 6], [8, 10, 12]]
    for shape in ((-1,), (-1, 2), (-1, 3, 1)):
        with pytest.raises(flightsvc.FlightsvcError, match='"y"'):
            client.predict(model, table, outputs={"y": Output("y", shape=shape)})
    got = client.predict(
        model, pa.table({"x": pa.array([1.5, 2], pa.float32())}), outputs={"y": Output("y", shape=[-1])}
    )
    assert got["y"].to_pylist() == [3, 4]
    frame = spark.createDataFrame([([1.0, 2.0],)], "x array<double>")
    result = model.transform(frame, outputs={"y": Output("twice", shape=(-1, 2))})
    assert result.schema.simpleString() == "struct<x:array<double>,twice:array<float>>"
    assert result.first().twice == [2.0, 4.0]


def test_an_output_without_the_batch_is_refused(client: flightsvc.Client, made: Path, spark: Any):
    table = pa.table({"x": pa.array([1, 2, 3], pa.float32())})
    for signature in ("fixed", "total"):
        model = Model(made / "special", signature=signature)
        text = refused(lambda: client.predict(model, table, outputs={"y": "y"}))  # noqa: B023
        assert re.search(r'"y".*(batch|first dimension)', text), text
        with pytest.raises(InvalidArgumentError, match='"y"'):
            model.transform(spark.range(3).selectExpr("CAST(id AS FLOAT) AS x"), outputs={"y": "y"})
    got = client.predict(Model(made / "special", signature="fixed"), table, outputs={"z": "z"})
    assert got["z"].to_pylist() == [2, 3, 4]


# What the table does not have.


@pytest.mark.parametrize(
    ("dtype", "sent", "advice"),
    [
        ("int64", pa.array([1], pa.timestamp("us", "UTC")), r"unix_micros\("),
        ("float64", pa.array([1], pa.timestamp("us")), r"CAST\(.*DOUBLE"),
        ("int32", pa.array([1], pa.date32()), r"unix_date\("),
        ("float64", pa.array([Decimal("1.50")], pa.decimal128(10, 2)), r"CAST\(.*DOUBLE"),
        ("int64", pa.array([Decimal(1)], pa.decimal128(20, 0)), r"CAST\(.*BIGINT"),
        ("int32", pa.array([1], pa.int64()), r"CAST\(.*INT"),
        ("float16", pa.array([1.0], pa.float64()), r"CAST\(.*FLOAT"),
        ("int64", pa.array([1], pa.duration("us")), ""),
        ("int64", pa.array([1], pa.time64("us")), ""),
        ("int64", pa.array([{"a": 1}]), ""),
        ("int64", pa.array([[(1, 2)]], pa.map_(pa.int32(), pa.int32())), ""),
        ("bool", pa.array([1], pa.int8()), ""),
        ("string", pa.array([1], pa.int8()), ""),
        ("int64", pa.array(["1"]), ""),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type),
)
def test_refused_types(client: flightsvc.Client, made: Path, dtype: str, sent: pa.Array, advice: str):
    text = refused(
        lambda: client.predict(Model(made / "scalars", signature=dtype), pa.table({"spalte": sent}))
    )
    assert f"/scalars, signature {dtype}: " in text
    assert '"spalte"' in text
    assert dtype in text
    assert re.search(advice, text), text


def test_columns_of_nothing_but_null(client: flightsvc.Client, made: Path):
    got = client.predict(Model(made / "scalars", signature="int64"), pa.table({"x": pa.nulls(3)}))
    assert got["y"].to_pylist() == [None] * 3
    nothing = pa.table({"x": pa.array([None, [None], [None] * 3], pa.list_(pa.null()))})
    got = client.predict(Model(made / "rows", signature="float32"), nothing, on_error="column")
    assert got["y"].to_pylist() == [None] * 3
    assert got["error"].to_pylist() == [None] * 3


def test_nulls_may_be_refused(client: flightsvc.Client, made: Path, spark: Any):
    model = Model(made / "scalars", signature="int64")
    table = pa.table({"x": [1, None, 3]})
    assert "row 1 of record batch 0" in refused(lambda: client.predict(model, table, nulls="fail"))
    got = client.predict(model, table, nulls="fail", on_error="column")
    assert got["y"].to_pylist() == [1, None, 3]
    assert [bool(why) for why in got["error"].to_pylist()] == [False, True, False]
    frame = spark.createDataFrame([(1,), (None,)], "x bigint")
    rows = model.transform(frame, nulls="fail", on_error="column", error_column="why").collect()
    assert sorted(bool(row.why) for row in rows) == [False, True]


# Spark.


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


@pytest.mark.parametrize("dtype", DTYPES if PROVE else ("int8", "uint64", "bfloat16", "bool", "string"))
def test_spark_both_ways(spark: Any, made: Path, tf_run: Callable[..., dict[str, Any]], dtype: str):
    """Each tensor from each type that it takes, as a value and in an array."""
    from pyspark.sql.types import StructType

    from flightsvc.spark.types import spark_type

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
            text = refused(lambda: check_input(Model("m"), "x", spec, Input("c"), field))  # noqa: B023
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
            text = refused(
                lambda: check_input(
                    Model("m"),
                    "x",
                    TensorSpec(dtype, (-1,) * rank),  # noqa: B023
                    Input(name),  # noqa: B023
                    frame.schema[name],  # noqa: B023
                )
            )
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
        text = refused(lambda: check_input(Model("m"), "x", TensorSpec(dtype, (-1,)), Input("c"), field))  # noqa: B023
        assert text.endswith(f"needs {SPARK_ACCEPTED[dtype][0]}"), text


def test_advice_of_other_kinds(spark: Any):
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import MatrixUDT, Vectors, VectorUDT

    def said(frame: Any, dtype: str, shape: tuple[int, ...], entry: Input) -> str:
        return refused(lambda: check_input(Model("m"), "x", TensorSpec(dtype, shape), entry, frame.schema[0]))

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
