"""Models as functions of columns, for DataFrames and in SQL.

Spark does not check the argument types of Python functions, so this package does before a task starts. For
DataFrames, each argument is wrapped in an expression that Spark evaluates while it analyses the query; see
``verdicts``. In SQL, a function with typed parameters calls the Python function. Spark checks and casts its
arguments, knows its parameters by name, and lists, describes and drops it as any other function.
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from flightsvc.errors import InvalidArgumentError
from flightsvc.mapping import Input, Options, TensorSpec
from flightsvc.request import Request, same_name
from flightsvc.spark import arrays
from flightsvc.spark.calls import Worker
from flightsvc.spark.dataframe import for_workers
from flightsvc.spark.session import (
    acting_for,
    active_session,
    conf_of,
    is_case_sensitive,
    quoted,
    settings_of,
)
from flightsvc.spark.types import ACCEPTED, check_input, nested, spark_type
from flightsvc.spark.verdicts import Verdicts, checked, label_of

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession
    from pyspark.sql.types import DataType

    from flightsvc.model import Model

_HIDDEN = "_flightsvc_"  # the start of the name of the Python function that a registered function calls
_IN_THE_WAY = "USER_DEFINED_FUNCTIONS.CANNOT_REPLACE_NON_SQL_UDF_WITH_SQL_UDF"


def register_udf(
    spark: SparkSession,
    name: str,
    model: Model,
    *,
    types: Mapping[str, str] | None = None,
    **options: Unpack[Options],
) -> None:
    """Register ``model`` as a temporary function of SQL: ``SELECT classify(content) FROM images``.

    Parameters and result are those of :meth:`Model.udf`. Each parameter has an SQL type, to which Spark casts
    the argument. An existing function of that name is replaced when the new one has been checked.
    ``DROP TEMPORARY FUNCTION`` drops it.

    If the only parameter is pictures and ``types`` is absent, the function takes paths or URIs (string),
    files (binary) and Spark's image structs. A parameter of an SQL function has only one type, so in this
    case the Python function itself is registered: it refuses other types only when the query runs.

    Spark 3.5 has no SQL functions, so all functions are registered like that and take arguments by position.

    Args:
        spark: The session, classic or Connect.
        name: The function's name.
        model: The model.
        types: SQL types of parameters that shall not have the default: ``{"x": "array<double>"}``.
        **options: See :class:`Options`.

    Raises:
        InvalidArgumentError: A type does not fit its input, a parameter has no default type, two outputs have
            one name, Spark has a function of that name, or ``types`` is given to Spark 3.5.
        NotFoundError: There is no such model, signature, input or output.
    """
    from pyspark.errors import AnalysisException

    check_name(spark, name)
    with acting_for(spark):
        function = _function(name, model, model.request(**options))
        if int(spark.version.split(".")[0]) < 4:
            if types:
                raise InvalidArgumentError(
                    f"types needs Spark 4, this is Spark {spark.version}, whose functions do not cast their "
                    f"arguments; leave types out and cast in the query: {name}(CAST(... AS ...))"
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
    # If Spark refuses the types, it does so for this trial, before anything is replaced.
    trial = f"{_HIDDEN}{uuid.uuid4().hex}"
    spark.sql(f"CREATE TEMPORARY FUNCTION {trial}{head} NULL")
    spark.sql(f"DROP TEMPORARY FUNCTION {trial}")
    # The Python function keeps its name: views may call only the functions that they were made with.
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
    """Refuse a name that one of Spark's own functions has.

    Raises:
        InvalidArgumentError: Spark has such a function.
    """
    system = {row[0] for row in spark.sql("SHOW SYSTEM FUNCTIONS").collect()}
    if name.lower() in system:
        raise InvalidArgumentError(
            f"Spark has a built-in function {name!r}, which it would call instead; "
            "register it under another name"
        )


def udf(model: Model, request: Request) -> Function:
    """Return ``request`` as a function of columns; see :meth:`Model.udf`."""
    return _function("predict", model, request)


@dataclasses.dataclass(frozen=True)
class Function:
    """A model as a function of columns, which are given by position or by name.

    Attributes:
        name: Its name in plans and messages.
        model: The model as the driver knows it.
        request: The request that the workers send.
        parameters: The names of the parameters, in order.
        positions: The position of the parameter for each input.
        returns: Spark's type of the result.
        case_sensitive: Whether ``a`` and ``A`` are different parameters.
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

        Spark refuses a column whose type does not fit its input when it analyses the query.

        Raises:
            InvalidArgumentError: A parameter has no column or two, or there is no such parameter.
        """
        arguments = self._bind(columns, named)
        labels = [label_of(argument) for argument in arguments]
        fitting = [
            checked(self.model, self.feeds(parameter), label, argument)
            for parameter, label, argument in zip(self.parameters, labels, arguments, strict=True)
        ]
        column: Column = self.arrow(*fitting).alias(f"{self.name}({', '.join(labels)})")
        return column

    @functools.cached_property
    def arrow(self) -> Any:
        """The function for Spark, with arguments by position and unchecked."""
        from pyspark.sql.types import StructType

        struct = isinstance(self.returns, StructType)
        worker = Worker(
            self.name, uuid.uuid4().hex, self.request, self.parameters, self.positions, struct, self.conf
        )
        integers = tuple(
            all(spec.dtype.lstrip("u").startswith("int") for _, spec, _ in self.feeds(parameter))
            for parameter in self.parameters
        )
        return arrays.scalar(worker, self.returns, integers)

    @property
    def takes_pictures(self) -> bool:
        """Whether the only parameter is pictures: paths, files or structs."""
        return len(self.parameters) == 1 and all(
            self.model.is_picture(name) and entry.load is None
            for name, _, entry in self.feeds(self.parameters[0])
        )

    @property
    def title(self) -> str:
        """The model and signature, for messages."""
        return f"model {self.model.name}, signature {self.model.signature}"

    def __reduce__(self) -> Any:
        """Refuse to be pickled: only :attr:`arrow` runs in the workers.

        Raises:
            InvalidArgumentError: Always.
        """
        raise InvalidArgumentError(
            f"{self.title}: the function of Model.udf() is called with columns, on the driver; "
            "to give it a name in SQL use flightsvc.register_udf"
        )

    def feeds(self, parameter: str) -> Iterator[tuple[str, TensorSpec, Input]]:
        """Yield name, type and :class:`Input` of each input that ``parameter`` feeds."""
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


def _function(name: str, model: Model, request: Request) -> Function:
    """Return ``request`` as a function in the active session, after checking parameters and result."""
    from pyspark.sql.types import StructField, StructType

    session = active_session()
    if session is None:
        raise InvalidArgumentError(
            f"model {model.name}: there is no Spark session, whose settings a function needs; "
            "create a session first"
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
                    "give one another name: outputs={<output>: <field>} or error_column"
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
            Verdicts.of(model, key, spec, entry, parameter)
    return function


def _parameter_type(function: Function, parameter: str, given: str | None) -> str:
    """Return the SQL type of a parameter: ``given``, or the first that its input takes.

    Raises:
        InvalidArgumentError: The type does not fit an input, or none is given for an input of unknown rank.
    """
    from pyspark.sql.types import DataType, StructField

    feeds = list(function.feeds(parameter))
    if given is None:
        name, spec, entry = feeds[0]
        if entry.load is not None:
            given = "string"  # mostly paths or URIs
        elif function.model.is_picture(name) or entry.encoding == "raw":
            given = "binary"
        elif spec.shape is None:
            raise InvalidArgumentError(
                f"{function.title}: input {name!r} ({spec}) has an unknown rank, so parameter "
                f"{parameter!r} needs a type: types={{{parameter!r}: 'array<{ACCEPTED[spec.dtype][0]}>'}}"
            )
        else:
            # Any text can be cast to binary, but not all binary to text.
            element = "binary" if spec.dtype == "string" else ACCEPTED[spec.dtype][0]
            given = nested(element, len(spec.shape) - 1)
    kind = DataType.fromDDL(given)
    for name, spec, entry in feeds:
        check_input(function.model, name, spec, entry, StructField(parameter, kind))
    return kind.simpleString()


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
