"""Types of columns checked while Spark analyses a query, by expressions that the optimizer removes."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flightsvc.errors import InvalidArgumentError
from flightsvc.mapping import Input, TensorSpec
from flightsvc.spark.session import quoted
from flightsvc.spark.types import check_input

if TYPE_CHECKING:
    from pyspark.sql import Column
    from pyspark.sql.types import DataType

    from flightsvc.model import Model

# Of decimals only decimal(20,0) differs from the others, of strings all are one: pattern, replacement.
_DECIMAL = (r"decimal\((?!20,0\)).*?\)", "decimal(38,18)")
_DEPTH = 6  # arrays less deep than this are looked at where the input does not tell its rank
_COLLATION = (r"string collate \w+", "string")
_IMAGE = "struct<origin:string,height:int,width:int,nChannels:int,mode:int,data:binary>"
_BEFORE = r"(?:[^<>]*(?:<[^<>]*>[^<>]*)*,)?"
IMAGES = "^struct<" + "".join(
    f"(?={_BEFORE}{field}[,>])"
    for field in ("height:int", "width:int", "nChannels:int", "mode:int", "data:binary")
)
"""Matches an image struct as typeof writes it: these fields in any order, perhaps beside others."""
_PLAIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)  # a column's name that SQL takes unquoted


@dataclasses.dataclass
class Verdicts:
    """What :func:`check_input` says of each type, in pieces: ``head``, the type, and why it is refused.

    Attributes:
        accepted: The types that feed the input, as ``typeof`` writes them.
        head: How each refusal begins.
        refused: How it ends, each with the types of which that is said.
        otherwise: How it ends for all other types.
    """

    accepted: list[str]
    head: str
    refused: dict[str, list[str]]
    otherwise: str

    @staticmethod
    def of(model: Model, name: str, spec: TensorSpec, entry: Input, label: str) -> Verdicts:
        """Ask for all types that are near the input's.

        Raises:
            InvalidArgumentError: None feeds the input.
        """
        from pyspark.sql.types import StructField, StructType

        accepted: list[str] = []
        refused: dict[str, list[str]] = {}
        depth = _DEPTH if spec.shape is None else len(spec.shape) + 2
        head = tail = ""
        # The last is a type that feeds nothing and has no advice of its own.
        for kind in [*_near(depth), StructType()]:
            text = kind.simpleString()
            try:
                check_input(model, name, spec, entry, StructField(label, kind))
                accepted.append(text)
            except InvalidArgumentError as error:
                head, _, tail = str(error).partition(f"{text}, input ")
                # An expression cannot be quoted, and Spark would double the backticks of a name.
                tail = tail.replace(quoted(label), label if _PLAIN.fullmatch(label) else "<column>")
                refused.setdefault(f", input {tail}", []).append(text)
        if not accepted:
            raise InvalidArgumentError(
                f"model {model.name}, signature {model.signature}: parameter {label!r}, input {tail}"
            )
        otherwise = f", input {tail}"
        refused.pop(otherwise, None)  # said of all that are not listed
        return Verdicts(accepted, head, refused, otherwise)


def _near(depth: int) -> Iterator[DataType]:
    """Yield what columns hold, and arrays of it less than ``depth`` deep."""
    from pyspark.sql import types as spark

    integers = spark.ArrayType(spark.IntegerType())
    vector = (
        spark.StructType()
        .add("type", spark.ByteType())
        .add("size", spark.IntegerType())
        .add("indices", integers)
        .add("values", spark.ArrayType(spark.DoubleType()))
    )
    picture = spark.StructType().add("origin", spark.StringType())
    for name in ("height", "width", "nChannels", "mode"):
        picture.add(name, spark.IntegerType())
    picture.add("data", spark.BinaryType())
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
    yield from (vector, picture)
    for element in elements:
        for _ in range(depth):
            yield element
            element = spark.ArrayType(element)


def checked(
    model: Model, feeds: Iterable[tuple[str, TensorSpec, Input]], label: str, argument: Column | str
) -> Column:
    """Return ``argument`` in an expression that Spark refuses to analyse where its type does not fit."""
    from pyspark.sql import functions as F

    column = F.col(argument) if isinstance(argument, str) else argument
    found = F.typeof(column)
    plain = F.regexp_replace(F.regexp_replace(found, *_DECIMAL), *_COLLATION)
    mark = F.concat(F.lit("|"), plain, F.lit("|"))  # a list as one text keeps the plan short
    for name, spec, entry in feeds:
        verdicts = Verdicts.of(model, name, spec, entry, label)
        if entry.load is not None:
            continue  # it takes any type
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
    """Return ``argument`` in an expression that Spark refuses to analyse where its type is another.

    Args:
        function: Whose argument it is, for the refusal.
        argument: The column.
        pattern: A regular expression for the types that are taken, as ``typeof`` writes them.
        wanted: How the refusal goes on after the column and its type.
    """
    from pyspark.sql import functions as F

    column = F.col(argument) if isinstance(argument, str) else argument
    found = F.typeof(column)
    head, tail = F.lit(f"{function}: column {label_of(argument)} is "), F.lit(f"; {wanted}")
    return _unless(F.rlike(found, F.lit(pattern)), F.concat(head, found, tail), column)


def _unless(fits: Column, message: Column, column: Column) -> Column:
    """Return ``column`` in an expression that Spark refuses to analyse, with ``message``, unless ``fits``.

    ``typeof`` is known to the analysis, and so must be the field that ``date_part`` extracts: with a type
    that fits it is one, else our message, which the refusal quotes. All of it is constant, so the optimizer
    leaves nothing but the column.
    """
    from pyspark.sql import functions as F

    # Spark quotes it as a name, where backticks would be doubled.
    refusal = F.concat(F.lit("`"), F.replace(message, F.lit("`"), F.lit("")), F.lit("`"))
    field = F.when(fits, F.lit("YEAR")).otherwise(refusal)
    return F.when(F.date_part(field, F.lit(datetime.date(1970, 1, 1))).isNotNull(), column)


def label_of(argument: Column | str) -> str:
    """Return what messages call an argument: Column<'a + 1'> is a + 1."""
    return argument if isinstance(argument, str) else str(argument)[len("Column<'") : -len("'>")]


def _list(kinds: list[str]) -> Column:
    from pyspark.sql import functions as F

    return F.lit(f"|{'|'.join(kinds)}|")
