"""Expressions that check the types of columns while Spark analyses a query; the optimizer removes them."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flightsvc.errors import InvalidArgumentError
from flightsvc.mapping import Input, TensorSpec
from flightsvc.spark.session import quoted
from flightsvc.spark.types import check_input, image_type

if TYPE_CHECKING:
    from pyspark.sql import Column
    from pyspark.sql.types import DataType

    from flightsvc.model import Model

# Types with one verdict are replaced by one of them: all decimals but decimal(20,0), and all strings.
_DECIMAL = (r"decimal\((?!20,0\)).*?\)", "decimal(38,18)")
_DEPTH = 6  # the depth of arrays that are considered for an input of unknown rank
_COLLATION = (r"string collate \w+", "string")
_IMAGE = "struct<origin:string,height:int,width:int,nChannels:int,mode:int,data:binary>"
_BEFORE = r"(?:[^<>]*(?:<[^<>]*>[^<>]*)*,)?"
IMAGES = "^struct<" + "".join(
    f"(?={_BEFORE}{field}[,>])"
    for field in ("height:int", "width:int", "nChannels:int", "mode:int", "data:binary")
)
"""A pattern for typeof of an image struct: these fields in any order, and perhaps others."""
_PLAIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)  # a column's name that needs no quotes in SQL


@dataclasses.dataclass
class Verdicts:
    """The verdict of :func:`check_input` on each type: accepted, or refused with ``head``, type and suffix.

    Attributes:
        accepted: The types that fit the input, as ``typeof`` writes them.
        head: The start of each refusal.
        refused: The suffix of a refusal, and the types it applies to.
        otherwise: The suffix for all other types.
    """

    accepted: list[str]
    head: str
    refused: dict[str, list[str]]
    otherwise: str

    @staticmethod
    def of(model: Model, name: str, spec: TensorSpec, entry: Input, label: str) -> Verdicts:
        """Collect the verdicts on the usual types of columns.

        Raises:
            InvalidArgumentError: No type fits the input.
        """
        from pyspark.sql.types import StructField, StructType

        accepted: list[str] = []
        refused: dict[str, list[str]] = {}
        depth = _DEPTH if spec.shape is None else len(spec.shape) + 2
        head = tail = ""
        # The last type fits no input; its refusal is that of all types that are not listed.
        for kind in [*_near(depth), StructType()]:
            text = kind.simpleString()
            try:
                check_input(model, name, spec, entry, StructField(label, kind))
                accepted.append(text)
            except InvalidArgumentError as error:
                head, _, tail = str(error).partition(f"{text}, input ")
                # Spark doubles backticks in its message, so the advice names a plain column or a placeholder.
                tail = tail.replace(quoted(label), label if _PLAIN.fullmatch(label) else "<column>")
                refused.setdefault(f", input {tail}", []).append(text)
        if not accepted:
            raise InvalidArgumentError(
                f"model {model.name}, signature {model.signature}: parameter {label!r}, input {tail}"
            )
        otherwise = f", input {tail}"
        refused.pop(otherwise, None)  # the same as for types that are not listed
        return Verdicts(accepted, head, refused, otherwise)


def _near(depth: int) -> Iterator[DataType]:
    """Yield the usual types of columns, and arrays of them of less than ``depth`` levels."""
    from pyspark.sql import types as spark

    integers = spark.ArrayType(spark.IntegerType())
    vector = (
        spark.StructType()
        .add("type", spark.ByteType())
        .add("size", spark.IntegerType())
        .add("indices", integers)
        .add("values", spark.ArrayType(spark.DoubleType()))
    )
    elements: list[DataType] = [
        spark.NullType(),
        spark.BooleanType(),
        spark.ByteType(),
        spark.ShortType(),
        spark.IntegerType(),
        spark.LongType(),
        spark.FloatType(),
        spark.DoubleType(),
        spark.DecimalType(20, 0),
        spark.DecimalType(38, 18),
        spark.StringType(),
        spark.BinaryType(),
        spark.DateType(),
        spark.TimestampType(),
        spark.TimestampNTZType(),
    ]
    yield from (vector, image_type())
    for element in elements:
        for _ in range(depth):
            yield element
            element = spark.ArrayType(element)


def checked(
    model: Model, feeds: Iterable[tuple[str, TensorSpec, Input]], label: str, argument: Column | str
) -> Column:
    """Return ``argument`` in an expression that Spark refuses to analyse if its type does not fit."""
    from pyspark.sql import functions as F

    column = F.col(argument) if isinstance(argument, str) else argument
    found = F.typeof(column)
    plain = F.regexp_replace(F.regexp_replace(found, *_DECIMAL), *_COLLATION)
    mark = F.concat(F.lit("|"), plain, F.lit("|"))  # one text for a list of types keeps the plan short
    for name, spec, entry in feeds:
        verdicts = Verdicts.of(model, name, spec, entry, label)
        if entry.load is not None:
            continue  # a loader takes any type
        tail = F.lit(verdicts.otherwise)
        for advice, kinds in verdicts.refused.items():
            tail = F.when(_list(kinds).contains(mark), F.lit(advice)).otherwise(tail)
        message = F.concat(F.lit(verdicts.head), found, tail)
        fits = _list(verdicts.accepted).contains(mark)
        if _IMAGE in verdicts.accepted:
            fits |= F.rlike(plain, F.lit(IMAGES))
        column = _unless(fits, message, column)
    return column


def of_type(function: str, argument: Column | str, pattern: str, wanted: str) -> Column:
    """Return ``argument`` in an expression that Spark refuses to analyse if its type does not match.

    Args:
        function: The name of the function, for the refusal.
        argument: The column.
        pattern: A regular expression for the accepted types, as ``typeof`` writes them.
        wanted: The end of the refusal, after the column and its type.
    """
    from pyspark.sql import functions as F

    column = F.col(argument) if isinstance(argument, str) else argument
    found = F.typeof(column)
    head, tail = F.lit(f"{function}: column {label_of(argument)} is "), F.lit(f"; {wanted}")
    return _unless(F.rlike(found, F.lit(pattern)), F.concat(head, found, tail), column)


def _unless(fits: Column, message: Column, column: Column) -> Column:
    """Return ``column`` in an expression that Spark refuses to analyse, with ``message``, unless ``fits``.

    The field that ``date_part`` extracts must be a constant, which Spark checks during analysis; ``typeof``
    is one. If the type fits, the field is YEAR. Else it is ``message``, which Spark's refusal quotes. The
    optimizer folds all of it and leaves the column.
    """
    from pyspark.sql import functions as F

    # Spark quotes the field as a name and doubles backticks in it.
    refusal = F.concat(F.lit("`"), F.replace(message, F.lit("`"), F.lit("")), F.lit("`"))
    field = F.when(fits, F.lit("YEAR")).otherwise(refusal)
    return F.when(F.date_part(field, F.lit(datetime.date(1970, 1, 1))).isNotNull(), column)


def label_of(argument: Column | str) -> str:
    """Return the text of an argument for messages: a + 1 for Column<'a + 1'>."""
    return argument if isinstance(argument, str) else str(argument)[len("Column<'") : -len("'>")]


def _list(kinds: list[str]) -> Column:
    from pyspark.sql import functions as F

    return F.lit(f"|{'|'.join(kinds)}|")
