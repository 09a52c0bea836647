"""What all stages have in common: a model is asked for columns, before a job everything is checked."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pyspark.ml import Transformer
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.util import MLReadable, MLWritable

from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.mapping import Input, Options, Output, column_of
from flightsvc.ml import saving
from flightsvc.ml.params import to_choice, to_positive
from flightsvc.model import Model
from flightsvc.request import same_name
from flightsvc.spark.session import acting_for, active_conf, is_case_sensitive, quoted
from flightsvc.spark.types import widened

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame
    from pyspark.sql.types import DataType, StructType


@dataclasses.dataclass(frozen=True)
class Made:
    """A column that is computed to feed an input and is not part of the result.

    Attributes:
        type: Its type.
        column: Returns the expression, over the caller's columns.
    """

    type: DataType
    column: Callable[[], Column]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a stage asks of its model.

    Attributes:
        model: The model.
        inputs: Input tensor to column, to :class:`Input` or to :class:`Made`; empty: see :class:`Options`.
        outputs: Output tensor to column or to :class:`Output`, in the wanted order; empty: all.
        finish: What becomes of an output afterwards, by column: its type, and the expression for it.
        hidden: Columns of outputs that the expressions of ``finish`` use and the result does not have.
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
    """What :meth:`Stage._transform` does.

    Attributes:
        asked: What the stage wants.
        made: Columns for the inputs alone, by name.
        options: What :meth:`Model.transform` gets.
        schema: The result's.
    """

    asked: Asked
    made: dict[str, Made]
    options: Options
    schema: StructType


class Stage(Transformer, MLReadable["Stage"], MLWritable):
    """A transformer whose work a model does in the sidecar.

    The result has the caller's columns as they are, then the outputs, then ``errorCol`` if it is asked for.
    All that can be checked without a row is checked before a job starts. Numbers of another type than the
    input's are cast for it where nothing but digits can be lost: any number feeds a floating input.

    A subclass says in :meth:`_asked` what it wants and in :meth:`_build` which model, made of the Params in
    ``_sources``; those of them in ``_beside`` are not saved, since the model is.
    """

    _sources: ClassVar[tuple[str, ...]] = ("model",)
    _beside: ClassVar[tuple[str, ...]] = ("model",)
    _functions: ClassVar[tuple[str, ...]] = ()
    """Params that hold functions; they are saved as pickles."""
    _input_kwargs: dict[str, Any]  # what the constructor was called with, by keyword_only

    batchSize: Param[int] = Param(
        Params._dummy(),
        "batchSize",
        "the most rows of one run of the model, of one or several record batches; absent: the server's",
        typeConverter=to_positive("batchSize"),
    )
    onError: Param[str] = Param(
        Params._dummy(),
        "onError",
        "what a row that cannot be run does: fail the job, make its outputs null, or null with the reason "
        "in errorCol (column)",
        typeConverter=to_choice("onError", "fail", "null", "column"),
    )
    errorCol: Param[str] = Param(
        Params._dummy(),
        "errorCol",
        "the column for the reason where onError is column",
        typeConverter=TypeConverters.toString,
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(onError="fail", errorCol="error")
        self._held: tuple[list[Any], Model] | None = None  # values of the sources, and what they made

    def getBatchSize(self) -> int | None:
        """Return the most rows of one run; ``None``: the server's."""
        return self.getOrDefault(self.batchSize) if self.isDefined(self.batchSize) else None

    def setBatchSize(self, value: int) -> Self:
        """Set the most rows of one run."""
        return self._set(batchSize=value)

    def getOnError(self) -> str:
        """Return what a row that cannot be run does."""
        return self.getOrDefault(self.onError)

    def setOnError(self, value: str) -> Self:
        """Set what a row that cannot be run does: ``fail``, ``null`` or ``column``."""
        return self._set(onError=value)

    def getErrorCol(self) -> str:
        """Return the column for the reason."""
        return self.getOrDefault(self.errorCol)

    def setErrorCol(self, value: str) -> Self:
        """Set the column for the reason."""
        return self._set(errorCol=value)

    def setParams(self, **params: Any) -> Self:
        """Set Params by name, as the constructor takes them; ``None`` leaves one as it is.

        Raises:
            TypeError: There is no such Param, or a value has another type.
            InvalidArgumentError: A value is none of its choices.
        """
        for name in params:
            if not self.hasParam(name):
                known = ", ".join(param.name for param in self.params)
                raise TypeError(f"{type(self).__name__} has no Param {name!r}; it has {known}")
        return self._set(**{name: value for name, value in params.items() if value is not None})

    def transformSchema(self, schema: StructType) -> StructType:
        """Return the schema of the result over ``schema``, all checked without a job.

        Raises:
            InvalidArgumentError: A Param is missing, a column has a type that the input does not take, or an
                output's name is taken.
            NotFoundError: No such model, signature, input, output or column.
        """
        with self._named():
            return self._plan(schema).schema

    def write(self) -> saving.StageWriter:
        """Return the writer of this stage and its model; see :meth:`save`."""
        return saving.StageWriter(self)

    @classmethod
    def read(cls) -> saving.StageReader:
        """Return the reader of a saved stage."""
        return saving.StageReader()

    @abstractmethod
    def _asked(self) -> Asked:
        """Return what this stage wants of :meth:`_model`; checks what the Params alone tell."""

    @abstractmethod
    def _build(self) -> Model:
        """Return the model that the Params in ``_sources`` say."""

    def _check(self, schema: StructType) -> None:
        """Refuse columns that the model's signature lets through; nothing here."""

    def _column(self, name: str) -> str:
        """Return the column that the Param ``name`` says.

        Raises:
            InvalidArgumentError: It is not set.
        """
        if not self.isDefined(name):
            raise InvalidArgumentError(f"{name} is not set; give it a column: {name}=...")
        return str(self.getOrDefault(name))

    def _model(self) -> Model:
        """Return the model, built once, or loaded, for as long as the Params that make it stay the same."""
        values = self._values()
        if self._held is None or not all(map(_same, self._held[0], values)):
            self._held = values, self._build()
        return self._held[1]

    def _hold(self, model: Model) -> None:
        """Take ``model`` for the one that the Params make, as they are now."""
        self._held = self._values(), model

    def _values(self) -> list[Any]:
        return [self.getOrDefault(name) if self.isDefined(name) else None for name in self._sources]

    def _transform(self, dataset: DataFrame) -> DataFrame:
        from pyspark.sql import functions as F

        with self._named(), acting_for(dataset.sparkSession):
            plan = self._plan(dataset.schema)
            names, frame = list(dataset.columns), dataset
            plain = _unlike(names)
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
        """Begin errors with this stage's name, once."""
        try:
            yield
        except FlightsvcError as error:
            if str(error).startswith(f"{self.uid}: "):
                raise
            raise type(error)(f"{self.uid}: {error}") from error


def as_vector(model: Model, output: str) -> tuple[DataType, Callable[[Column], Column]]:
    """Return how an output becomes Spark ML's Vector, flattened in C order; for ``finish`` of :class:`Asked`.

    A null stays one.

    Raises:
        InvalidArgumentError: The output is no number, or its rank is not known.
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
    """Tell whether two values of a Param are one; models are, where they are the same object."""
    return one is other or (isinstance(one, str | int | float) and one == other)


def _unlike(names: list[str]) -> list[str]:
    """Return names that differ in more than case; the first of each stays."""
    taken: set[str] = set()
    result = []
    for name in names:
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        result.append(name)
    return result
