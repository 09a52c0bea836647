"""Functions of Arrow arrays as functions of Spark; before Spark 4.1 by way of pandas.

Spark 4.1 has ``arrow_udf``. Earlier versions convert Arrow to pandas columns, which are converted back here.
pandas does not distinguish a null number from NaN: NaN in a column of numbers becomes null, and a null among
the floats of an array becomes NaN. Results are passed to Spark without a conversion.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from flightsvc.errors import InvalidArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import Column
    from pyspark.sql.types import DataType, StructType

_EXACT = 1 << 53  # a double represents all smaller integers
_INTEGER = pa.decimal128(20, 0)  # Spark's type for uint64
# Integer fields of Spark's image struct and vector; with a null among them, pandas has doubles.
_COUNTS = {
    **dict.fromkeys(("height", "width", "nChannels", "mode", "size"), pa.int32()),
    "type": pa.int8(),
}


def scalar(function: Callable[..., pa.Array], returns: DataType, integers: tuple[bool, ...]) -> Any:
    """Return ``function`` as a function of Spark that is called once for each record batch.

    Args:
        function: Takes an Arrow array for each column and returns an array of the type ``returns``.
        returns: Spark's type of the result.
        integers: Which columns feed only integers; pandas has them as doubles if one is null.
    """
    try:
        from pyspark.sql.functions import arrow_udf  # type: ignore[attr-defined]
    except ImportError:
        return _pandas_udf(_OfSeries(function, integers, _arrow_type(returns)), returns, "SCALAR")
    return arrow_udf(function, returns)


def iterator(
    function: Callable[[Iterator[Any]], Iterator[pa.Array]], name: str, returns: StructType
) -> tuple[Any, Callable[..., Column]]:
    """Return ``function`` as a function of Spark that is called once for each partition, and its caller.

    Spark registers the first. By way of pandas, a null becomes a struct of nulls; the second undoes that.

    Args:
        function: Takes arrays, or tuples of arrays for several columns, and yields arrays with as many rows.
        name: Its name in plans and errors.
        returns: Spark's type of the result.
    """
    try:
        from pyspark.sql.functions import arrow_udf  # type: ignore[attr-defined]
    except ImportError:
        return _pandas_iterator(function, name, returns)

    def arrays(columns: Iterator[pa.Array]) -> Iterator[pa.Array]:
        return function(columns)

    arrays.__name__ = name
    made = arrow_udf(arrays, returnType=returns)
    return made, made


def _pandas_iterator(
    function: Callable[[Iterator[Any]], Iterator[pa.Array]], name: str, returns: StructType
) -> tuple[Any, Callable[..., Column]]:
    from pyspark.sql.types import StructType

    def udf(returns: StructType, held: bool) -> Any:
        return _pandas_udf(
            _OfSeriesIterator(function, name, _arrow_type(returns), held), returns, "SCALAR_ITER"
        )

    holding = udf(StructType().add("held", returns), True)

    def call(*columns: Column) -> Column:
        held: Column = holding(*columns)["held"]
        return held

    return udf(returns, False), call


def _pandas_udf(function: Any, returns: DataType, kind: str) -> Any:
    from pyspark.sql.pandas.functions import PandasUDFType, pandas_udf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Spark recommends type hints, which would need pandas
        make: Any = pandas_udf  # its stubs accept only functions
        return make(function, returns, getattr(PandasUDFType, kind))


def _arrow_type(returns: DataType) -> pa.DataType:
    from pyspark.sql.pandas.types import to_arrow_type

    return to_arrow_type(returns)


@dataclasses.dataclass(frozen=True)
class _OfSeries:
    """A function of arrays as a function of pandas columns; for the attributes see :func:`scalar`."""

    function: Callable[..., pa.Array]
    integers: tuple[bool, ...]
    returns: pa.DataType

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *columns):  # type: ignore[no-untyped-def]  # Spark reads annotations
        # In SQL a call may have too many columns; the function refuses them.
        integers = [*self.integers, *[False] * len(columns)]
        arrays = [to_arrow(column, integer) for column, integer in zip(columns, integers, strict=False)]
        return to_pandas(self.function(*arrays).cast(self.returns))


@dataclasses.dataclass(frozen=True)
class _OfSeriesIterator:
    """A function of an iterator of arrays as a function of an iterator of pandas columns.

    Attributes:
        function: See :func:`iterator`.
        name: See :func:`iterator`.
        returns: Arrow's type of the result.
        held: Whether the result is put into a struct as its only field, so that it can be null.
    """

    function: Callable[[Iterator[Any]], Iterator[pa.Array]]
    name: str
    returns: pa.DataType
    held: bool

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, columns):  # type: ignore[no-untyped-def]  # as above
        arrays = (
            tuple(map(to_arrow, column)) if isinstance(column, tuple) else to_arrow(column)
            for column in columns
        )
        for array in self.function(arrays):
            result = pa.StructArray.from_arrays([array], names=["held"]) if self.held else array
            yield to_pandas(result.cast(self.returns))


def to_arrow(column: pd.Series[Any] | pd.DataFrame, integer: bool = False) -> pa.Array:
    """Return a pandas column of Spark as an Arrow array; a DataFrame is a struct.

    Args:
        column: The column.
        integer: Whether the column has only integers; a row with NaN becomes null.

    Raises:
        InvalidArgumentError: The values have no common type, or an integer has lost digits.
    """
    if column.ndim == 2:
        fields = [
            to_arrow(column[name], name in _COUNTS).cast(_COUNTS[name])
            if name in _COUNTS
            else to_arrow(column[name])
            for name in column.columns
        ]
        missing = pa.repeat(True, len(column))
        for field in fields:
            missing = pc.and_(missing, field.is_null())
        return pa.StructArray.from_arrays(fields, names=list(column.columns), mask=missing)
    if integer and column.dtype.kind == "f" and (column.abs() >= _EXACT).any():
        raise InvalidArgumentError(
            "a column has nulls and integers of 2^53 or more; pandas, through which this version of Spark "
            "passes it, cannot represent both; use Model.transform, or fill the nulls"
        )
    cells = column
    if column.dtype == object:
        cells = [None if integer and _has_nan(cell) else _one_dimensional(cell) for cell in column]
    found = next((cell for cell in cells if cell is not None), None)
    kind = _INTEGER if isinstance(found, decimal.Decimal) and integer else None
    try:
        if integer and column.dtype.kind == "f":
            return pa.array(column, from_pandas=True).cast(pa.int64())
        # from_pandas would make nulls of NaN in the elements of arrays.
        return pa.array(cells, kind, from_pandas=column.dtype != object)
    except pa.ArrowException as error:
        raise InvalidArgumentError(
            f"a column of {type(found).__name__} cannot be sent to the server: {error}; "
            "use Model.transform, which does not go through pandas"
        ) from error


def _has_nan(cell: Any) -> bool:
    """Tell whether an array of integers has a null, which pandas stores as NaN among doubles."""
    if getattr(cell, "dtype", None) is None:
        return False
    if cell.dtype.kind == "f":
        return bool((cell != cell).any())
    return cell.dtype == object and any(element is None or _has_nan(element) for element in cell)


def _one_dimensional(cell: Any) -> Any:
    """Return a cell that Arrow can read: nested arrays as lists, and empty arrays without a type."""
    if getattr(cell, "ndim", 0) == 0 or (cell.ndim == 1 and cell.size and cell.dtype != object):
        return cell
    return [_one_dimensional(element) for element in cell]


def to_pandas(array: pa.Array) -> pd.Series[Any] | pd.DataFrame:
    """Return an Arrow array as a pandas column for Spark, a struct as a DataFrame; nothing is copied."""
    import pandas as pd

    if not pa.types.is_struct(array.type):
        return pd.Series(_as_it_is()(pa.chunked_array([array])))
    fields = zip(array.type, array.flatten(), strict=True)
    return pd.DataFrame({field.name: _as_it_is()(pa.chunked_array([values])) for field, values in fields})


@functools.cache
def _as_it_is() -> Any:
    """Return a class of pandas arrays that Spark does not convert to Python objects and back."""
    import pandas as pd

    class AsItIs(pd.arrays.ArrowExtensionArray):  # type: ignore[misc]  # pandas has no stubs here
        def map(self, mapper: Any, na_action: Any = None) -> AsItIs:
            return self

    return AsItIs
