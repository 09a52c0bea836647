"""Spark's types beside Arrow's and TensorFlow's: what an answer becomes, what can feed an input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from flightsvc.errors import InvalidArgumentError
from flightsvc.model import Model, TensorSpec

if TYPE_CHECKING:
    from pyspark.sql.types import DataType, StructField

# Spark's element types that each tensor takes without a loss; float64 to float32 is allowed besides.
_ACCEPTED = {
    "bool": ("boolean",),
    "int8": ("tinyint",),
    "int16": ("smallint", "tinyint"),
    "int32": ("int", "smallint", "tinyint"),
    "int64": ("bigint", "int", "smallint", "tinyint"),
    "float32": ("float", "double", "smallint", "tinyint"),
    "float64": ("double", "float", "int", "smallint", "tinyint"),
    "string": ("string", "binary"),
}
_NUMBERS = {"tinyint", "smallint", "int", "bigint", "float", "double", "boolean"}


def spark_type(arrow: pa.DataType) -> DataType:
    """Return Spark's type for one that a server answers with.

    Raises:
        InvalidArgumentError: Spark has none.
    """
    from pyspark.sql import types as spark

    if pa.types.is_list(arrow) or pa.types.is_large_list(arrow) or pa.types.is_fixed_size_list(arrow):
        return spark.ArrayType(spark_type(arrow.value_type))
    if pa.types.is_decimal128(arrow):
        return spark.DecimalType(arrow.precision, arrow.scale)
    simple: dict[pa.DataType, DataType] = {
        pa.bool_(): spark.BooleanType(),
        pa.int8(): spark.ByteType(),
        pa.int16(): spark.ShortType(),
        pa.int32(): spark.IntegerType(),
        pa.int64(): spark.LongType(),
        pa.float32(): spark.FloatType(),
        pa.float64(): spark.DoubleType(),
        pa.string(): spark.StringType(),
        pa.large_string(): spark.StringType(),
        pa.binary(): spark.BinaryType(),
        pa.large_binary(): spark.BinaryType(),
    }
    if arrow not in simple:
        raise InvalidArgumentError(f"the server answers with {arrow}, for which Spark has no type")
    return simple[arrow]


def check_input(model: Model, name: str, spec: TensorSpec, field: StructField) -> None:
    """Refuse a column whose type cannot feed an input.

    Raises:
        InvalidArgumentError: It cannot; the text has an expression that Spark can run where there is one.
    """
    from pyspark.sql.types import ArrayType

    element, depth = field.dataType, 0
    while isinstance(element, ArrayType):
        element, depth = element.elementType, depth + 1
    found = element.simpleString()
    column = f"`{field.name.replace('`', '``')}`"
    head = (
        f"model {model.reference}, signature {model.signature}: column {field.name!r} is "
        f"{field.dataType.simpleString()}, input {name!r} ({spec})"
    )
    if name in model.preprocess:
        if found != "binary" or depth:
            raise InvalidArgumentError(f"{head} is made from encoded pictures and needs binary")
        return
    if spec.dtype not in _ACCEPTED:
        raise InvalidArgumentError(f"{head} has an element type that no column can feed")
    if spec.shape == ():
        raise InvalidArgumentError(f"{head} has no batch dimension; export the model with one")
    accepted = _ACCEPTED[spec.dtype]
    wanted_depth = depth if spec.shape is None else len(spec.shape) - 1
    if found in accepted and depth == wanted_depth:
        return
    wanted = _nested(accepted[0], wanted_depth)
    expression = column
    for _ in range(depth - wanted_depth if wanted_depth else 0):
        expression = f"flatten({expression})"
    added = (spec.shape or ())[1 : 1 + max(0, wanted_depth - depth)]
    for _ in added:
        expression = f"array({expression})"
    if found not in accepted:
        expression = f"CAST({expression} AS {wanted.upper()})"
    nestable = depth <= wanted_depth or wanted_depth > 0
    runnable = nestable and all(size in (-1, 1) for size in added)
    runnable = runnable and (found in accepted or _castable(found, accepted[0]))
    advice = f"; if that is what you mean, use {expression}" if runnable else ""
    raise InvalidArgumentError(f"{head} needs {wanted}{advice}")


def check_sendable(field: StructField) -> None:
    """Refuse a column that Spark cannot hand to Python.

    Raises:
        InvalidArgumentError: It cannot; the text says how to drop it.
    """
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import to_arrow_type

    try:
        to_arrow_type(field.dataType, timezone="UTC")
    except PySparkException as error:
        raise InvalidArgumentError(
            f"column {field.name!r} is {field.dataType.simpleString()}, which Spark cannot send through "
            f"Arrow; drop it first: df.drop({field.name!r})"
        ) from error


def _castable(found: str, wanted: str) -> bool:
    number = found in _NUMBERS or found.startswith("decimal") or found == "string"
    return (number and (wanted in _NUMBERS or wanted == "string")) or wanted == "string"


def _nested(element: str, depth: int) -> str:
    return "array<" * depth + element + ">" * depth
