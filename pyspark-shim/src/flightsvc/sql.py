"""Models as functions of columns, for DataFrames and in SQL.

Spark asks a Python function for no argument types, so they are checked around it, before a task starts. For
DataFrames each argument is wrapped in an expression that Spark evaluates while it analyses the query and
that is gone afterwards. In SQL the name belongs to an SQL function with typed parameters, whose body calls
the Python function: Spark itself checks and casts the arguments, knows the parameters by name, and lists,
describes and drops the function as any other.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
import threading
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from flightsvc import columns
from flightsvc.errors import InvalidArgumentError
from flightsvc.loading import Loading
from flightsvc.mapping import Input, Options, TensorSpec
from flightsvc.model import Model, Request, same_name
from flightsvc.spark import (
    acting_for,
    active_session,
    conf_of,
    for_workers,
    is_case_sensitive,
    on_task_device,
    quoted,
    settings_of,
    worker_connection,
)
from flightsvc.spark_types import ACCEPTED, check_input, nested, spark_type
from flightsvc.stream import Answer, join

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession
    from pyspark.sql.types import DataType

_IDLE_SECONDS = 2.0
"""A stream that no call has used for so long is closed: its model may then leave."""

_HIDDEN = "_flightsvc_"  # begins the name of the Python function below a registered one
_IN_THE_WAY = "USER_DEFINED_FUNCTIONS.CANNOT_REPLACE_NON_SQL_UDF_WITH_SQL_UDF"

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


def register_udf(
    spark: SparkSession,
    name: str,
    model: Model,
    *,
    types: Mapping[str, str] | None = None,
    **options: Unpack[Options],
) -> None:
    """Make ``model`` a temporary function of SQL: ``SELECT classify(content) FROM images``.

    Its parameters and its result are those of :meth:`Model.udf`. Each parameter has an SQL type, to which
    Spark casts the argument. A function that has the name is replaced, once the new one is known to be in
    order; ``DROP TEMPORARY FUNCTION`` drops it.

    A function whose only parameter is pictures takes them of each kind, unless ``types`` names one: paths or
    URIs (string), files (binary) and Spark's image struct. A parameter of SQL has one type alone, so the name
    is that of the Python function, which takes its argument as it is and refuses types that do not fit when
    the query runs.

    Spark 3.5 has no SQL functions: there all functions are such, and take their arguments by position.

    Args:
        spark: The session that gets the function, classic or Connect.
        name: The function's name.
        model: The model.
        types: SQL types by parameter, where one shall not be the first that the input takes:
            ``{"x": "array<double>"}``.
        **options: See :class:`Options`.

    Raises:
        InvalidArgumentError: A type does not feed its input, a parameter needs to be given one, two outputs
            have one name, the name is that of a function of Spark's own, or ``types`` is given to Spark 3.5.
        NotFoundError: No such model, signature, input or output.
    """
    from pyspark.errors import AnalysisException

    check_name(spark, name)
    with acting_for(spark):
        function = _function(name, model, model.request(**options))
        if int(spark.version.split(".")[0]) < 4:
            if types:
                raise InvalidArgumentError(
                    f"types needs Spark 4, this is Spark {spark.version}, whose functions take their "
                    f"arguments as they are; leave it out and cast in the query: {name}(CAST(... AS ...))"
                )
            spark.udf.register(name, function.arrow)
            return
        given = dict(types or {})
        if not given and function.takes_pictures:
            spark.udf.register(name, function.arrow)
            return
        for parameter in given:
            if parameter not in function.parameters:
                known = ", ".join(function.parameters)
                raise InvalidArgumentError(f"types names {parameter!r}; the parameters of {name} are {known}")
        parameters = ", ".join(
            f"{quoted(parameter)} {_parameter_type(function, parameter, given.get(parameter))}"
            for parameter in function.parameters
        )
    head = f"({parameters}) COMMENT {_literal(function.title)} RETURN"
    # What Spark refuses it refuses here, where nothing is replaced yet.
    trial = f"{_HIDDEN}{uuid.uuid4().hex}"
    spark.sql(f"CREATE TEMPORARY FUNCTION {trial}{head} NULL")
    spark.sql(f"DROP TEMPORARY FUNCTION {trial}")
    # Views may call the functions that they were made with and no others, so these keep their names.
    spark.udf.register(_HIDDEN + name, function.arrow)
    body = f"{quoted(_HIDDEN + name)}({', '.join(map(quoted, function.parameters))})"
    create = f"CREATE OR REPLACE TEMPORARY FUNCTION {quoted(name)}{head} {body}"
    try:
        spark.sql(create)
    except AnalysisException as error:
        if error.getCondition() != _IN_THE_WAY:
            raise
        spark.sql(f"DROP TEMPORARY FUNCTION {quoted(name)}")
        spark.sql(create)


def check_name(spark: SparkSession, name: str) -> None:
    """Refuse a function's name that is one of Spark's own.

    Raises:
        InvalidArgumentError: It is.
    """
    system = {row[0] for row in spark.sql("SHOW SYSTEM FUNCTIONS").collect()}
    if name.lower() in system:
        raise InvalidArgumentError(
            f"Spark has a function {name!r} of its own, which would go over this one; "
            "register it under another name"
        )


def udf(model: Model, request: Request) -> Function:
    """Return the function of columns that asks ``request``; see :meth:`Model.udf`."""
    return _function("predict", model, request)


@dataclasses.dataclass(frozen=True)
class Function:
    """A model as a function of columns: called with columns, by position or by name, it returns one.

    Attributes:
        name: What plans and messages call it.
        model: The model as the driver knows it.
        request: What is asked of the model, as the workers send it.
        parameters: The names of the parameters, in order.
        positions: Which parameter feeds each input.
        returns: Spark's type of the result.
        case_sensitive: Whether ``a`` and ``A`` are two parameters.
        conf: ``spark.flightsvc.*`` of the driver's session.
    """

    name: str
    model: Model
    request: Request
    parameters: tuple[str, ...]
    positions: dict[str, int]
    returns: DataType
    case_sensitive: bool
    conf: dict[str, str]

    def __call__(self, *columns: Column | str, **named: Column | str) -> Column:
        """Return the model's outputs for ``columns``.

        A column whose type does not feed its input is refused when Spark analyses the query.

        Raises:
            InvalidArgumentError: A parameter has no column, or two, or there is no such parameter.
        """
        arguments = self._bind(columns, named)
        labels = [_label(argument) for argument in arguments]
        checked = [
            self._checked(parameter, label, argument)
            for parameter, label, argument in zip(self.parameters, labels, arguments, strict=True)
        ]
        column: Column = self.arrow(*checked).alias(f"{self.name}({', '.join(labels)})")
        return column

    @functools.cached_property
    def arrow(self) -> Any:
        """The function as Spark takes it, by position; it checks nothing."""
        from pyspark.sql.types import StructType

        struct = isinstance(self.returns, StructType)
        worker = _Worker(
            self.name, uuid.uuid4().hex, self.request, self.parameters, self.positions, struct, self.conf
        )
        integers = tuple(
            all(spec.dtype.lstrip("u").startswith("int") for _, spec, _ in self.feeds(parameter))
            for parameter in self.parameters
        )
        return columns.scalar(worker, self.returns, integers)

    @property
    def takes_pictures(self) -> bool:
        """Whether the only parameter is pictures, of any kind: paths, files or structs."""
        return len(self.parameters) == 1 and all(
            self.model.is_picture(name) and entry.load is None
            for name, _, entry in self.feeds(self.parameters[0])
        )

    @property
    def title(self) -> str:
        """Which model and signature this is."""
        return f"model {self.model.name}, signature {self.model.signature}"

    def __reduce__(self) -> Any:
        """Refuse to travel: what runs in the workers is :attr:`arrow`, this is of the driver.

        Raises:
            InvalidArgumentError: Always.
        """
        raise InvalidArgumentError(
            f"{self.title}: the function of Model.udf() is called with columns, on the driver; "
            "to give it a name in SQL use flightsvc.register_udf"
        )

    def feeds(self, parameter: str) -> Iterator[tuple[str, TensorSpec, Input]]:
        """Yield the inputs that ``parameter`` feeds: the name, the type, and how."""
        inputs = self.model.inputs
        for name, position in self.positions.items():
            if self.parameters[position] == parameter:
                yield name, inputs[name], self.request.input(name, parameter)

    def _bind(self, columns: Sequence[Column | str], named: Mapping[str, Column | str]) -> list[Column | str]:
        """Return one column for each parameter."""
        signature = f"{self.name}({', '.join(self.parameters)}) of {self.title}"
        if len(columns) > len(self.parameters):
            raise InvalidArgumentError(f"{signature} got {len(columns)} columns")
        bound = dict(zip(self.parameters, columns, strict=False))
        for name, column in named.items():
            found = [p for p in self.parameters if same_name(p, name, self.case_sensitive)]
            if not found:
                raise InvalidArgumentError(f"{signature} has no parameter {name!r}")
            if found[0] in bound:
                raise InvalidArgumentError(f"{signature} got two columns for {found[0]!r}")
            bound[found[0]] = column
        missing = [parameter for parameter in self.parameters if parameter not in bound]
        if missing:
            raise InvalidArgumentError(f"{signature} got no column for {', '.join(map(repr, missing))}")
        return [bound[parameter] for parameter in self.parameters]

    def _checked(self, parameter: str, label: str, argument: Column | str) -> Column:
        """Return ``argument`` in an expression that Spark refuses to analyse where its type does not fit."""
        from pyspark.sql import functions as F

        column = F.col(argument) if isinstance(argument, str) else argument
        found = F.typeof(column)
        plain = F.regexp_replace(F.regexp_replace(found, *_DECIMAL), *_COLLATION)
        mark = F.concat(F.lit("|"), plain, F.lit("|"))  # a list as one text keeps the plan short
        for name, spec, entry in self.feeds(parameter):
            verdicts = _Verdicts.of(self.model, name, spec, entry, label)
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
    head, tail = F.lit(f"{function}: column {_label(argument)} is "), F.lit(f"; {wanted}")
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


def _function(name: str, model: Model, request: Request) -> Function:
    """Return ``request`` as a function in the active session, its parameters and its result checked."""
    from pyspark.sql.types import StructField, StructType

    session = active_session()
    if session is None:
        raise InvalidArgumentError(
            f"model {model.name}: there is no Spark session, whose settings the function would have; "
            "make the session first"
        )
    conf = conf_of(session)
    case_sensitive = is_case_sensitive(conf)
    inputs = model.inputs
    parameters: list[str] = []
    for entry in request.inputs.values() or sorted(inputs):
        parameter = entry.column if isinstance(entry, Input) else entry
        if not any(same_name(parameter, other, case_sensitive) for other in parameters):
            parameters.append(parameter)
    positions = request.columns(parameters, tuple(inputs), case_sensitive)
    answer = request.answer_schema({key: parameters[position] for key, position in positions.items()})
    fields = [StructField(field.name, spark_type(field.type)) for field in answer]
    for i, field in enumerate(fields):
        for other in fields[:i]:
            if same_name(field.name, other.name, case_sensitive):
                raise InvalidArgumentError(
                    f"model {model.name}, signature {model.signature}: the result would have two fields "
                    f"{other.name!r}, {other.dataType.simpleString()} and {field.dataType.simpleString()}; "
                    "name one otherwise: outputs={<output>: <field>} or error_column"
                )
    function = Function(
        name,
        model,
        for_workers(request, session),
        tuple(parameters),
        positions,
        fields[0].dataType if len(fields) == 1 else StructType(fields),
        case_sensitive,
        settings_of(conf),
    )
    for parameter in parameters:
        for key, spec, entry in function.feeds(parameter):
            _Verdicts.of(model, key, spec, entry, parameter)
    return function


@dataclasses.dataclass
class _Verdicts:
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
    def of(model: Model, name: str, spec: TensorSpec, entry: Input, label: str) -> _Verdicts:
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
        return _Verdicts(accepted, head, refused, otherwise)


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


def _parameter_type(function: Function, parameter: str, given: str | None) -> str:
    """Return the SQL type of a parameter, ``given`` or the first that its input takes.

    Raises:
        InvalidArgumentError: It does not feed an input, or none is given where the input's rank is unknown.
    """
    from pyspark.sql.types import DataType, StructField

    feeds = list(function.feeds(parameter))
    if given is None:
        name, spec, entry = feeds[0]
        if entry.load is not None:
            given = "string"  # most loaders take paths or URIs
        elif function.model.is_picture(name) or entry.encoding == "raw":
            given = "binary"
        elif spec.shape is None:
            raise InvalidArgumentError(
                f"{function.title}: input {name!r} ({spec}) does not tell its rank, so parameter "
                f"{parameter!r} needs a type: types={{{parameter!r}: 'array<{ACCEPTED[spec.dtype][0]}>'}}"
            )
        else:
            # Text becomes binary exactly, but not all binary is text.
            element = "binary" if spec.dtype == "string" else ACCEPTED[spec.dtype][0]
            given = nested(element, len(spec.shape) - 1)
    kind = DataType.fromDDL(given)
    for name, spec, entry in feeds:
        check_input(function.model, name, spec, entry, StructField(parameter, kind))
    return kind.simpleString()


def _label(argument: Column | str) -> str:
    """Return what messages call an argument: Column<'a + 1'> is a + 1."""
    return argument if isinstance(argument, str) else str(argument)[len("Column<'") : -len("'>")]


def _list(kinds: list[str]) -> Column:
    from pyspark.sql import functions as F

    return F.lit(f"|{'|'.join(kinds)}|")


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


@dataclasses.dataclass(frozen=True)
class _Worker:
    """What runs in the workers, once per record batch: columns in, the result out.

    Attributes:
        name: The function's name, for logs and errors.
        key: Tells this function from all others.
        request: What is asked of the model.
        parameters: The names of the columns.
        positions: Which column feeds each input.
        struct: Whether the result is a struct of all outputs.
        conf: ``spark.flightsvc.*`` of the driver's session.
    """

    name: str
    key: str
    request: Request
    parameters: tuple[str, ...]
    positions: dict[str, int]
    struct: bool
    conf: dict[str, str]

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *columns, **named):  # type: ignore[no-untyped-def]  # Spark reads annotations
        batch = pa.RecordBatch.from_arrays(self._bound(columns, named), names=self.parameters)
        here = dataclasses.replace(self, request=on_task_device(self.request))
        with self.request.model.naming():
            loading = Loading.of(here.request, batch.schema, self.positions)
            if loading is None:
                outputs = _calls(here, batch.schema).outputs(batch)
            else:
                here = dataclasses.replace(here, request=loading.request, positions=loading.positions)
                outputs = join(
                    [
                        loading.settled(rows, _calls(here, rows.schema).outputs(rows))
                        for rows in loading.slices([batch])
                    ]
                )
        if not self.struct:
            return outputs.column(0)
        return pa.StructArray.from_arrays(outputs.columns, fields=list(outputs.schema))

    def _bound(self, columns: Sequence[pa.Array], named: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Return a column for each parameter: of a Python function Spark checks neither names nor number."""
        bound = [*columns, *(named[p] for p in self.parameters[len(columns) :] if p in named)]
        if len(bound) != len(self.parameters) or len(columns) + len(named) != len(bound):
            found = [f"{len(columns)} by position", *named]
            raise InvalidArgumentError(
                f"{self.name}({', '.join(self.parameters)}) of model {self.request.model.name}, signature "
                f"{self.request.model.signature}, was called with other arguments: {', '.join(found)}"
            )
        return bound

    def answers(
        self, names: Sequence[str], batches: Iterator[pa.RecordBatch]
    ) -> Generator[Answer, None, None]:
        """Yield the answers to ``batches``, each of which is asked for once the last is answered."""
        connection = worker_connection(self.request, self.conf)
        exchange = self.request.exchange(connection, names, self.positions, f"function {self.name}")
        return exchange.answers(batches, ahead=1)


class _Calls:
    """Calls of one function, schema and device in this process: a stream, from the first until it is idle."""

    def __init__(self, worker: _Worker):
        self._worker = worker
        self._turn = threading.Condition()  # guards what follows, and the stream
        self._answers: Generator[Answer, None, None] | None = None  # of the open stream
        self._due: pa.RecordBatch | None = None  # what it sends next; None ends it
        self._used = 0.0

    def outputs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the output columns for ``batch``.

        Raises:
            FlightsvcError: The request was refused, or the sidecar stayed away.
        """
        with self._turn:
            answers = self._answers
            if answers is None:
                answers = self._worker.answers(batch.schema.names, self._batches())
                threading.Thread(
                    target=self._watch, args=(answers,), name="flightsvc-idle", daemon=True
                ).start()
            self._answers = None  # not kept if it fails
            self._due = batch
            answer = next(answers)
            self._answers = answers
            self._used = time.monotonic()
            return answer.outputs

    def _batches(self) -> Iterator[pa.RecordBatch]:
        while self._due is not None:
            batch, self._due = self._due, None
            yield batch

    def _watch(self, answers: Generator[Answer, None, None]) -> None:
        """End the stream when it has been idle for long enough; leave when it has ended."""
        with self._turn:
            while self._answers is answers:
                left = self._used + _IDLE_SECONDS - time.monotonic()
                if left > 0:
                    self._turn.wait(left)
                else:
                    self._answers = None
                    next(answers, None)


# gRPC does not survive a fork: a stream opened before it is never used after it.
_all_calls: dict[tuple[int, str, str, pa.Schema], _Calls] = {}
_all_calls_mutex = threading.Lock()


def _calls(worker: _Worker, schema: pa.Schema) -> _Calls:
    """Return this process's calls of a function with columns of ``schema``, on the device of its request."""
    with _all_calls_mutex:
        key = (os.getpid(), worker.key, worker.request.device, schema)
        return _all_calls.setdefault(key, _Calls(worker))
