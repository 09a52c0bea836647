"""Columns of pandas, as Spark before 4.1 hands them to a function, there and back."""

from __future__ import annotations

import decimal
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import flightsvc
from flightsvc.spark import arrays

FLOATS = np.array([1.5, math.nan], np.float32)


@pytest.mark.parametrize(
    ("column", "integer", "expected"),
    [
        (pd.Series([1, 2, 3], dtype="int16"), True, pa.array([1, 2, 3], pa.int16())),
        (pd.Series([1.0, math.nan, 3.0]), True, pa.array([1, None, 3], pa.int64())),
        (pd.Series([1.0, math.nan]), False, pa.array([1.0, None], pa.float64())),
        (pd.Series([True, None], dtype=object), False, pa.array([True, None])),
        (pd.Series(["a", None]), False, pa.array(["a", None])),
        (pd.Series([b"a", None]), False, pa.array([b"a", None])),
        (pd.Series([None, None]), False, pa.nulls(2)),
        (
            pd.Series([decimal.Decimal(2**64 - 1), None]),
            True,
            pa.array([decimal.Decimal(2**64 - 1), None], pa.decimal128(20, 0)),
        ),
        (
            pd.Series([np.array([2**60, 1]), None, np.array([1.0, math.nan])]),
            True,
            pa.array([[2**60, 1], None, None], pa.list_(pa.int64())),
        ),
        (
            pd.Series([np.ones((2, 2), np.float32), np.zeros((0,))]),
            False,
            pa.array([[[1, 1], [1, 1]], []], pa.list_(pa.list_(pa.float32()))),
        ),
    ],
)
def test_to_arrow(column: pd.Series, integer: bool, expected: pa.Array):
    assert arrays.to_arrow(column, integer).equals(expected)


def test_nan_among_floats_stays_nan():
    array = arrays.to_arrow(pd.Series([FLOATS, None]))
    assert array.type == pa.list_(pa.float32()) and array[1].as_py() is None
    assert array.values.null_count == 0 and math.isnan(array[0].as_py()[1])


def test_a_struct_with_a_null_is_one_again():
    picture = pd.DataFrame({"origin": ["x", None], "height": [2.0, math.nan], "data": [b"ab", None]})
    kind = pa.struct([("origin", pa.string()), ("height", pa.int32()), ("data", pa.binary())])
    expected = pa.array([{"origin": "x", "height": 2, "data": b"ab"}, None], kind)
    assert arrays.to_arrow(picture).equals(expected)


def test_what_pandas_has_spoiled_is_refused():
    with pytest.raises(flightsvc.InvalidArgumentError, match=r"2\^53 or more.* use Model\.transform"):
        arrays.to_arrow(pd.Series([float(2**53), math.nan]), True)
    for column, integer in ((pd.Series([1.5, math.nan]), True), (pd.Series([{1: 2}, "a"]), False)):
        with pytest.raises(flightsvc.InvalidArgumentError, match="cannot be sent to the server"):
            arrays.to_arrow(column, integer)


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1, None, 2**60 + 1], pa.int64()),
        pa.array([[1.5, math.nan], None, []], pa.list_(pa.float32())),
        pa.array([math.nan, None], pa.float32()),
        pa.array([{"a": [1], "b": None}, None], pa.struct([("a", pa.list_(pa.int32())), ("b", pa.string())])),
    ],
)
def test_to_pandas_as_spark_3_5_makes_arrow_of_it(array: pa.Array):
    def again(series: pd.Series, kind: pa.DataType) -> pa.Array:
        kept = series.apply(list)  # what it does with arrays, and would spoil
        assert hasattr(kept.array, "__arrow_array__")
        return pa.Array.from_pandas(kept, mask=None, type=kind)

    column = arrays.to_pandas(array)
    if not pa.types.is_struct(array.type):
        assert again(column, array.type).to_string() == array.to_string()
        return
    for field, values in zip(array.type, array.flatten(), strict=True):
        assert again(column[field.name], field.type).to_string() == values.to_string()
