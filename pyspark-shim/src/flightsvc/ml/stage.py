"""The base of all stages: it runs a model on columns, after checks without a job."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pyspark.ml import Transformer
from pyspark.ml.param import Param, TypeConverters
from pyspark.ml.util import MLReadable, MLWritable

from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.mapping import Input, Options, Output, column_of
from flightsvc.ml import saving
from flightsvc.ml.params import param, to_choice, to_positive
from flightsvc.model import Model
from flightsvc.request import same_name
from flightsvc.spark.dataframe import unlike
from flightsvc.spark.session import acting_for, active_conf, is_case_sensitive, quoted
from flightsvc.spark.types import widened

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame
    from pyspark.sql.types import DataType, StructType


@dataclasses.dataclass(frozen=True)
class Made:
    """A column that is computed for an input and is not in the result.

    Attributes:
        type: Spark's type of the column.
        column: Returns the column, as an expression of the caller's columns.
    """

    type: DataType
    column: Callable[[], Column]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The request of a stage to its model.

    Attributes:
        model: The model.
        inputs: Input tensor to column, :class:`Input` or :class:`Made`; empty: see :class:`Options`.
        outputs: Output tensor to column or :class:`Output`, in the wanted order; empty: all outputs.
        finish: By column of an output: the type that it gets, and a function for that expression.
        hidden: Columns of outputs that ``finish`` needs and that are not in the result.
    """

    model: Model
    inputs: Mapping[str, str | Input | Made]
    outputs: Mapping[str, str | Output]
    finish: Mapping[str, tuple[DataType, Callable[[Column], Column]]] = dataclasses.field(
        default_factory=dict
    )
    hidden: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The steps of :meth:`Stage._transform`, after all checks.

    Attributes:
        asked: The request of the stage.
        made: The columns that are computed for inputs, by name.
        options: The options for :meth:`Model.transform`.
        schema: The schema of the result.
    """

    asked: Asked
    made: dict[str, Made]
    options: Options
    schema: StructType


class Stage(Transformer, MLReadable["Stage"], MLWritable):
    """A transformer that runs a model in the sidecar.

    The result has the caller's columns, then the outputs, then ``errorCol`` if ``onError`` is ``column``. All
    checks that need no rows are made before a job starts. For floating inputs, numbers of other types are
    cast, which may lose digits.

    A subclass implements :meth:`_asked`, its request, and :meth:`_build`, which makes the model from the
    Params in ``_sources``. Those that are also in ``_beside`` are not saved, because the model is.
    """

    _sources: ClassVar[tuple[str, ...]] = ("model",)
    _beside: ClassVar[tuple[str, ...]] = ("model",)
    _functions: ClassVar[tuple[str, ...]] = ()
    """Params with functions, which are saved as pickles."""
    _input_kwargs: dict[str, Any]  # the arguments of the constructor, set by keyword_only

    batchSize: Param[int] = param(
        "batchSize",
        "the most rows in one run of the model, of one or several record batches; absent: the "
        "server's setting",
        to_positive("batchSize"),
    )
    onError: Param[str] = param(
        "onError",
        "what a row that cannot be run does: fail the job, make its outputs null, or null with the reason "
        "in errorCol (column)",
        to_choice("onError", "fail", "null", "column"),
    )
    errorCol: Param[str] = param(
        "errorCol", "the column for the reason where onError is column", TypeConverters.toString
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(onError="fail", errorCol="error")
        self._held: tuple[list[Any], Model] | None = None  # values of _sources, and their model

    def getBatchSize(self) -> int | None:
        """Return the most rows in one run; ``None``: the server's setting."""
        return self.getOrDefault(self.batchSize) if self.isDefined(self.batchSize) else None

    def setBatchSize(self, value: int) -> Self:
        """Set the most rows in one run."""
        return self._set(batchSize=value)

    def getOnError(self) -> str:
        """Return what happens to a row that cannot be run."""
        return self.getOrDefault(self.onError)

    def setOnError(self, value: str) -> Self:
        """Set what happens to a row that cannot be run: ``fail``, ``null`` or ``column``."""
        return self._set(onError=value)

    def getErrorCol(self) -> str:
        """Return the column for the reason."""
        return self.getOrDefault(self.errorCol)

    def setErrorCol(self, value: str) -> Self:
        """Set the column for the reason."""
        return self._set(errorCol=value)

    def setParams(self, **params: Any) -> Self:
        """Set Params by name, as in the constructor; ``None`` does not change a Param.

        Raises:
            TypeError: There is no such Param, or a value has the wrong type.
            InvalidArgumentError: A value is invalid.
        """
        for name in params:
            if not self.hasParam(name):
                known = ", ".join(param.name for param in self.params)
                raise TypeError(f"{type(self).__name__} has no Param {name!r}; it has {known}")
        return self._set(**{name: value for name, value in params.items() if value is not None})

    def transformSchema(self, schema: StructType) -> StructType:
        """Return the schema of the result for ``schema``, after all checks; no job runs.

        Raises:
            InvalidArgumentError: A Param is missing, a column's type does not fit its input, or a new column
                has the name of another.
            NotFoundError: There is no such model, signature, input, output or column.
        """
        with self._named():
            return self._plan(schema).schema

    def write(self) -> saving.StageWriter:
        """Return a writer for this stage and its model; see :meth:`save`."""
        return saving.StageWriter(self)

    @classmethod
    def read(cls) -> saving.StageReader:
        """Return a reader for saved stages."""
        return saving.StageReader()

    @abstractmethod
    def _asked(self) -> Asked:
        """Return the request to :meth:`_model`, after checking the Params."""

    @abstractmethod
    def _build(self) -> Model:
        """Return the model that the Params in ``_sources`` define."""

    def _check(self, schema: StructType) -> None:
        """Refuse columns that only this stage does not take; by default none."""

    def _column(self, name: str) -> str:
        """Return the column in the Param ``name``.

        Raises:
            InvalidArgumentError: The Param is not set.
        """
        if not self.isDefined(name):
            raise InvalidArgumentError(f"{name} is not set; give it a column: {name}=...")
        return str(self.getOrDefault(name))

    def _model(self) -> Model:
        """Return the model: the one built or loaded before, until the Params in ``_sources`` change."""
        values = self._values()
        if self._held is None or not all(map(_same, self._held[0], values)):
            self._held = values, self._build()
        return self._held[1]

    def _hold(self, model: Model) -> None:
        """Keep ``model`` as the one that the current Params define."""
        self._held = self._values(), model

    def _values(self) -> list[Any]:
        return [self.getOrDefault(name) if self.isDefined(name) else None for name in self._sources]

    def _transform(self, dataset: DataFrame) -> DataFrame:
        from pyspark.sql import functions as F

        with self._named(), acting_for(dataset.sparkSession):
            plan = self._plan(dataset.schema)
            names, frame = list(dataset.columns), dataset
            plain = unlike(names, is_case_sensitive(active_conf()))
            if plain != names:
                frame = frame.toDF(*plain)
            if plan.made:
                made = [entry.column().alias(name) for name, entry in plan.made.items()]
                frame = frame.select("*", *made)
            result = plan.asked.model.transform(frame, **plan.options)
            if plain == names and not plan.made and not plan.asked.finish:
                return result
            columns: list[Column] = []
            sources = [*plain, *plan.schema.names[len(names) :]]
            for source, field in zip(sources, plan.schema.fields, strict=True):
                column = F.col(quoted(source))
                if len(columns) >= len(names) and field.name in plan.asked.finish:
                    column = plan.asked.finish[field.name][1](column)
                columns.append(column.alias(field.name))
            return result.select(*columns)

    def _plan(self, schema: StructType) -> _Plan:
        from pyspark.sql.types import StructField, StructType

        self._check(schema)
        asked = self._asked()
        sensitive = is_case_sensitive(active_conf())
        column = self.getErrorCol() if self.getOnError() == "column" else None
        for name in (*map(column_of, asked.outputs.values()), *([column] if column else [])):
            if any(same_name(name, other, sensitive) for other in schema.names):
                raise InvalidArgumentError(
                    f"there is a column {name!r} already; give the new one another name"
                )
        made = {
            f"{self.uid}__{i}": entry
            for i, entry in enumerate(asked.inputs.values())
            if isinstance(entry, Made)
        }
        inputs = {
            tensor: f"{self.uid}__{i}" if isinstance(entry, Made) else entry
            for i, (tensor, entry) in enumerate(asked.inputs.items())
        }
        request = asked.model.request(inputs)
        known = asked.model.inputs
        for tensor, position in request.columns([*schema.names, *made], tuple(known), sensitive).items():
            if position >= len(schema.names):
                continue
            field = schema.fields[position]
            entry = inputs[tensor] = request.input(tensor, field.name)
            if asked.model.is_picture(tensor) or entry.encoding or entry.load:
                continue
            if (to := widened(field.dataType, known[tensor])) is not None:
                name = f"{self.uid}__{tensor}"
                made[name] = Made(to, _cast(field.name, to))
                inputs[tensor] = dataclasses.replace(entry, column=name)
        options = Options(
            inputs=inputs, outputs=asked.outputs, on_error=self.getOnError(), error_column=self.getErrorCol()
        )
        if (rows := self.getBatchSize()) is not None:
            options["batching"] = {"max_batch_size": rows}
        sent = StructType([*schema.fields, *(StructField(name, entry.type) for name, entry in made.items())])
        further = asked.model.output_schema(sent, **options).fields[len(sent) :]
        further = [
            StructField(field.name, asked.finish[field.name][0]) if field.name in asked.finish else field
            for field in further
            if field.name not in asked.hidden
        ]
        return _Plan(asked, made, options, StructType([*schema.fields, *further]))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Put this stage's uid before the text of errors, once."""
        try:
            yield
        except FlightsvcError as error:
            if str(error).startswith(f"{self.uid}: "):
                raise
            raise type(error)(f"{self.uid}: {error}") from error


def as_vector(model: Model, output: str) -> tuple[DataType, Callable[[Column], Column]]:
    """Return an entry of ``finish`` of :class:`Asked` that makes a Vector of an output, in C order.

    A null stays null.

    Raises:
        InvalidArgumentError: The output has no numbers, or its rank is unknown.
        NotFoundError: The model has no such output.
    """
    from pyspark.ml.functions import array_to_vector
    from pyspark.ml.linalg import VectorUDT
    from pyspark.sql import functions as F

    where = f"model {model.name}, signature {model.signature}"
    if output not in model.outputs:
        raise NotFoundError(f"{where}: there is no output {output!r}; outputs: {', '.join(model.outputs)}")
    spec = model.outputs[output]
    if spec.dtype in ("string", "bool") or not spec.shape:
        raise InvalidArgumentError(
            f"{where}: output {output!r} is {spec}; a vector is made of numbers of a known rank"
        )
    depth = len(spec.shape) - 1

    def column(found: Column) -> Column:
        flat = found if depth else F.array(found)
        for _ in range(depth - 1):
            flat = F.flatten(flat)
        return F.when(found.isNotNull(), array_to_vector(flat.cast("array<double>")))

    return VectorUDT(), column


def _cast(name: str, to: DataType) -> Callable[[], Column]:
    def column() -> Column:
        from pyspark.sql import functions as F

        return F.col(quoted(name)).cast(to)

    return column


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values of a Param are equal; models are only equal to themselves."""
    return one is other or (isinstance(one, str | int | float) and one == other)
