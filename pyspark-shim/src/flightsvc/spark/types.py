"""Spark's types: those of answers, and the check of columns that feed inputs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flightsvc.errors import InvalidArgumentError
from flightsvc.mapping import Input, TensorSpec
from flightsvc.spark.loading import IMAGE_FIELDS, PICTURES

if TYPE_CHECKING:
    from pyspark.sql.types import DataType, StructField, StructType

    from flightsvc.model import Model

_INTEGERS = ("tinyint", "smallint", "int", "bigint")
_UNSIGNED = (*_INTEGERS, "decimal(20,0)")  # the server checks each value
# Spark's element types for each dtype; the first is the one to cast to.
ACCEPTED = {
    "bool": ("boolean",),
    "int8": ("tinyint",),
    "int16": ("smallint", "tinyint"),
    "int32": ("int", "smallint", "tinyint"),
    "int64": ("bigint", "int", "smallint", "tinyint"),
    "uint8": ("smallint", *_UNSIGNED),
    "uint16": ("int", *_UNSIGNED),
    "uint32": ("bigint", *_UNSIGNED),
    "uint64": ("decimal(20,0)", *_UNSIGNED),
    "float16": ("float",),
    "bfloat16": ("float",),
    "float32": ("float", "double", "smallint", "tinyint"),
    "float64": ("double", "float", "int", "smallint", "tinyint"),
    "string": ("string", "binary"),
}
_NUMBERS = {*_INTEGERS, "float", "double", "boolean", "string"}
_VECTOR = "struct<type:tinyint,size:int,indices:array<int>,values:array<double>>"


def spark_type(arrow: pa.DataType) -> DataType:
    """Return Spark's type for a type of an answer.

    Raises:
        InvalidArgumentError: Spark has no such type.
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


def check_input(model: Model, name: str, spec: TensorSpec, entry: Input, field: StructField) -> None:
    """Refuse a column whose type does not fit an input.

    Args:
        model: The model.
        name: The input's name.
        spec: The input's type.
        entry: The column's options.
        field: The column's type.

    Raises:
        InvalidArgumentError: The type does not fit. If a cast can help, the text has the SQL for it.
    """
    found, depth = _element(field.dataType)
    head = (
        f"model {model.name}, signature {model.signature}: column {field.name!r} is "
        f"{field.dataType.simpleString()}, input {name!r} ({spec})"
    )
    if model.is_picture(name):
        fits = found in ("string", "binary", "void") and not depth
        if entry.load is None and not fits and not is_image(field.dataType):
            raise InvalidArgumentError(f"{head} is made from pictures and needs {PICTURES}")
        return
    if spec.dtype not in ACCEPTED:
        raise InvalidArgumentError(f"{head} has a dtype that no column can feed")
    if spec.shape == ():
        raise InvalidArgumentError(f"{head} has no batch dimension; export the model with one")
    if entry.load is not None:
        if spec.shape is None:
            raise InvalidArgumentError(f"{head} has an unknown rank, which load= does not support")
        if spec.dtype == "string" and len(spec.shape) != 1:
            raise InvalidArgumentError(f"{head} has lists of strings, which load= does not support")
        return
    if entry.encoding == "raw":
        if found != "binary" or depth:
            raise InvalidArgumentError(
                f"{head} is encoded raw and needs binary, each cell with the bytes of one row"
            )
        return
    wanted_depth = depth if spec.shape is None else len(spec.shape) - 1
    if found == "void" and depth <= wanted_depth:
        return  # a column of nulls
    if found == _VECTOR and depth == 0:
        if spec.dtype in ("float32", "float64") and (spec.shape is None or wanted_depth == 1):
            return
        raise InvalidArgumentError(
            f"{head} needs {nested(ACCEPTED[spec.dtype][0], wanted_depth)}; make it an array first: "
            f"pyspark.ml.functions.vector_to_array({field.name!r})"
        )
    accepted = ACCEPTED[spec.dtype]
    if found in accepted and depth == wanted_depth:
        return
    expression = _expression(field.name, found, depth, spec, wanted_depth)
    advice = f"; if that is what you mean, use {expression}" if expression else ""
    if found == "binary" and not depth and spec.dtype != "string":
        advice = f"; if its cells hold the tensor's bytes, say so: Input({field.name!r}, encoding='raw')"
    raise InvalidArgumentError(f"{head} needs {nested(accepted[0], wanted_depth)}{advice}")


def widened(kind: DataType, spec: TensorSpec) -> DataType | None:
    """Return the type to which a column of numbers is cast for a floating input; ``None``: it is not cast.

    A cast to floating numbers may lose digits, but nothing else. Columns for integer inputs are not cast.
    """
    from pyspark.sql import types as spark

    found, depth = _element(kind)
    if spec.dtype not in ("float16", "bfloat16", "float32", "float64") or found in ACCEPTED[spec.dtype]:
        return None
    if found not in (*_INTEGERS, "float", "double") and not found.startswith("decimal"):
        return None
    if spec.shape is not None and depth != len(spec.shape) - 1:
        return None
    to: DataType = spark.DoubleType() if spec.dtype == "float64" else spark.FloatType()
    for _ in range(depth):
        to = spark.ArrayType(to)
    return to


def check_sendable(field: StructField) -> None:
    """Refuse a column that Spark cannot send to Python.

    Raises:
        InvalidArgumentError: It cannot; the text says how to drop the column.
    """
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import to_arrow_type

    told: dict[str, Any] = (
        {"timezone": "UTC"} if "timezone" in inspect.signature(to_arrow_type).parameters else {}
    )
    try:
        to_arrow_type(field.dataType, **told)
    except (PySparkException, ValueError) as error:  # pyarrow raises ValueError for array<void>
        raise InvalidArgumentError(
            f"column {field.name!r} is {field.dataType.simpleString()}, which Spark cannot send through "
            f"Arrow; drop it first: df.drop({field.name!r})"
        ) from error


def image_type() -> StructType:
    """Return Spark's image struct."""
    from pyspark.sql.types import StringType, StructType

    struct = StructType().add("origin", StringType())
    for name, kind in IMAGE_FIELDS.items():
        struct.add(name, spark_type(kind))
    return struct


def is_image(kind: DataType) -> bool:
    """Tell whether a type is Spark's image struct, with or without ``origin``."""
    from pyspark.sql.types import StructType

    fields = {f.name: f.dataType.simpleString() for f in kind.fields} if isinstance(kind, StructType) else {}
    return fields.get("data") == "binary" and all(
        fields.get(name) == "int" for name in ("height", "width", "nChannels", "mode")
    )


def _element(kind: DataType) -> tuple[str, int]:
    """Return the name of the innermost element type, as Spark sends it, and the depth of arrays."""
    from pyspark.sql.types import ArrayType, StringType, UserDefinedType

    depth = 0
    while isinstance(kind, ArrayType | UserDefinedType):
        if isinstance(kind, ArrayType):
            kind, depth = kind.elementType, depth + 1
        else:
            kind = kind.sqlType()
    return "string" if isinstance(kind, StringType) else kind.simpleString(), depth


def _expression(name: str, found: str, depth: int, spec: TensorSpec, wanted_depth: int) -> str | None:
    """Return SQL that converts a column for an input; ``None``: none keeps its meaning."""
    added = (spec.shape or ())[1 : 1 + max(0, wanted_depth - depth)]
    if (depth > wanted_depth and not wanted_depth) or any(size not in (-1, 1) for size in added):
        return None
    accepted = ACCEPTED[spec.dtype]
    expression = f"`{name.replace('`', '``')}`"
    if found not in accepted and accepted[0] != "string":
        number = _number(found, spec.dtype)
        if number is None:
            return None
        function, found = number
        expression = _mapped(function, expression, depth)
    for _ in range(depth - wanted_depth):
        expression = f"flatten({expression})"
    for _ in added:
        expression = f"array({expression})"
    if found not in accepted:
        expression = f"CAST({expression} AS {nested(accepted[0], wanted_depth).upper()})"
    return expression


def _number(found: str, dtype: str) -> tuple[str, str] | None:
    """Return the SQL that converts a type to a number for ``dtype``, and the type of that number.

    Times become microseconds if they fit, else seconds; dates become days; all since 1970.
    """
    if found in _NUMBERS or found.startswith("decimal"):
        return "{}", found
    if dtype in ("bool", "float16", "bfloat16", "int8", "uint8"):
        return None  # no time or date fits
    if found == "date":
        return "unix_date({})", "int"
    if not found.startswith("timestamp") or dtype in ("int16", "uint16"):
        return None
    if dtype in ("float32", "float64"):
        seconds = "{}" if found == "timestamp" else "CAST({} AS TIMESTAMP)"
        return f"CAST({seconds} AS DOUBLE)", "double"
    return ("unix_micros({})" if dtype in ("int64", "uint64") else "unix_seconds({})"), "bigint"


def _mapped(function: str, expression: str, depth: int) -> str:
    """Return ``function`` applied to ``expression``, or to each of its elements at ``depth``."""
    if depth == 0 or function == "{}":
        return function.format(expression)
    return f"transform({expression}, v{depth} -> {_mapped(function, f'v{depth}', depth - 1)})"


def nested(element: str, depth: int) -> str:
    """Return the name of an array type of ``depth`` levels."""
    return "array<" * depth + element + ">" * depth
