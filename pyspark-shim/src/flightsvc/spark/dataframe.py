"""Models on DataFrames: the checks on the driver, and the function that runs in the workers.

The driver needs this package and pyspark, a worker this package and pyarrow. The function carries Spark's
configuration to the workers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from flightsvc.errors import InvalidArgumentError
from flightsvc.request import Request, same_name
from flightsvc.server import shipping
from flightsvc.server import sidecar as sidecars
from flightsvc.server.connection import Connection, shared
from flightsvc.settings import Settings
from flightsvc.spark import loading
from flightsvc.spark.session import (
    active_conf,
    active_session,
    conf_of,
    is_case_sensitive,
    place,
    settings_of,
    task,
)
from flightsvc.spark.types import check_input, check_sendable, spark_type

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

    from flightsvc.model import Model


@dataclasses.dataclass(frozen=True)
class Mapper:
    """A function for ``mapInArrow`` that adds the model's outputs to record batches.

    It yields the same rows in the same order: one record batch for each one read, or several small ones if
    columns are loaded.

    Attributes:
        request: The request to the model.
        known: The inputs of the signature; empty if ``request`` names the inputs.
        conf: ``spark.flightsvc.*`` of the driver's session.
        case_sensitive: Whether ``a`` and ``A`` are different columns.
        sidecar: Name of the column for the sidecar that has answered; ``None``: no such column.
    """

    request: Request
    known: tuple[str, ...]
    conf: dict[str, str]
    case_sensitive: bool
    sidecar: str | None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Run in a worker, once for each partition; an empty partition opens no stream."""
        first = next(batches, None)
        if first is None:
            return
        names = first.schema.names
        with self.request.model.naming():
            positions = self.request.columns(names, self.known, self.case_sensitive)
            connection = worker_connection(self.request, self.conf)
            request = on_task_device(self.request)
            every = itertools.chain([first], batches)
            answers = loading.answers(request, connection, first.schema, positions, every, place())
            try:
                for answer in answers:
                    yield answer.joined(self.sidecar)
            finally:
                answers.close()


def worker_connection(request: Request, conf: dict[str, str]) -> Connection:
    """Return a worker's connection to its front, after making sure that the front has the model."""
    connection = shared(sidecars.for_worker, Settings.read(conf))
    if request.model.shipped:
        shipping.receive(connection, request.model.reference, request.model.name)
    return connection


def on_task_device(request: Request) -> Request:
    """Return ``request`` for the GPUs that Spark has assigned to this task, unless it names a device."""
    context = task()
    if request.device != "auto" or context is None:
        return request
    assigned = context.resources().get("gpu")
    return dataclasses.replace(request, device=",".join(assigned.addresses)) if assigned else request


def for_workers(request: Request, session: SparkSession | None) -> Request:
    """Return ``request`` for the workers of ``session``: with ``specs``, and with the model by its digest.

    A model in a folder of the driver is given to Spark. Without a session it stays a folder, for a function
    that runs on this machine.

    Raises:
        NotFoundError: There is no such model or version on the driver.
        InvalidArgumentError: The folder contains a link, or a file changed while it was read.
    """
    model = request.model
    request = request.with_specs(lambda: model.inputs)
    if session is None or model.folder is None:
        return request
    folder = shipping.version_folder(model.folder, model.version)
    return dataclasses.replace(request, model=model.by_digest(shipping.add(session, folder)))


def mapper(model: Model, request: Request, sidecar: str | None) -> Mapper:
    """Return the function that sends ``request`` in the workers; see :meth:`Model.mapper`."""
    session = active_session()
    conf = conf_of(session)
    return Mapper(
        for_workers(request, session),
        known=() if request.inputs else tuple(model.inputs),
        conf=settings_of(conf),
        case_sensitive=is_case_sensitive(conf),
        sidecar=sidecar,
    )


def output_schema(model: Model, schema: StructType, request: Request, sidecar: str | None) -> StructType:
    """Return ``schema`` with the columns of the answer, after checks; see :meth:`Model.output_schema`."""
    from pyspark.sql.types import StringType, StructField, StructType

    case_sensitive = is_case_sensitive(active_conf())
    inputs = model.inputs
    positions = request.columns(schema.names, tuple(inputs), case_sensitive)
    for name, position in positions.items():
        field = schema.fields[position]
        check_input(model, name, inputs[name], request.input(name, field.name), field)
    for field in schema.fields:
        check_sendable(field)
    answer = request.answer_schema({name: schema.names[position] for name, position in positions.items()})
    further = [StructField(field.name, spark_type(field.type)) for field in answer]
    if sidecar is not None:
        further.append(StructField(sidecar, StringType()))
    taken = list(schema.names)
    for field in further:
        for other in taken:
            if same_name(field.name, other, case_sensitive):
                raise InvalidArgumentError(
                    f"model {model.name}: the result would have two columns {other!r}; "
                    "give the new one another name: outputs={<output>: <column>}, error_column or sidecar"
                )
        taken.append(field.name)
    return StructType([*schema.fields, *further])


def transform(df: DataFrame, mapper: Mapper, schema: StructType) -> DataFrame:
    """Return ``df`` mapped to ``schema``; columns of one name are renamed meanwhile, as Arrow needs it."""
    names = unlike(df.columns, mapper.case_sensitive)
    if names == df.columns:
        return df.mapInArrow(mapper, schema)
    from pyspark.sql.types import StructField, StructType

    further = schema.fields[len(names) :]
    sent = [StructField(n, f.dataType, f.nullable) for n, f in zip(names, schema.fields, strict=False)]
    return df.toDF(*names).mapInArrow(mapper, StructType([*sent, *further])).toDF(*schema.names)


def unlike(names: list[str], case_sensitive: bool) -> list[str]:
    """Return names that are all different to Spark: ``_`` is appended where they are not."""
    result: list[str] = []
    for name in names:
        while any(same_name(name, other, case_sensitive) for other in result):
            name += "_"
        result.append(name)
    return result
