"""The state of the sidecars of a Spark application, as a DataFrame."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flightsvc.client import Client
from flightsvc.errors import UnavailableError
from flightsvc.server import sidecar
from flightsvc.server.connection import Connection
from flightsvc.settings import Settings
from flightsvc.spark.session import conf_of, place, settings_of
from flightsvc.spark.types import spark_type

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_ROWS = 1 << 16  # enough for a task in each slot of the application
_SECONDS = 2.0  # between two questions to a sidecar, which counts once a second

_SCHEMA = pa.schema(
    {
        "executor": pa.string(),
        "host": pa.string(),
        "server": pa.string(),
        "version": pa.string(),
        "devices": pa.list_(pa.string()),
        "models": pa.list_(pa.string()),
        "memory": pa.int64(),
        "rows": pa.int64(),
        "rows_per_second": pa.float64(),
        "queued": pa.int64(),
        "answered_by": pa.string(),
    }
)


def status(spark: SparkSession) -> DataFrame:
    """Return a DataFrame with one row for each sidecar of the application's executors.

    Each action on the DataFrame asks the sidecars again, with one task for each slot of the application. It
    takes at least two seconds. An executor without a free slot may have no row. So has an executor without a
    sidecar, or whose sidecar does not answer; none is started.

    The columns: ``executor``, Spark's id of the executor if the plugin has started the sidecar, else null;
    ``host``; ``server``, as in answers; ``version`` of flightsvc; ``devices``, name and UUID of each GPU;
    ``models``, name, version and state of each model in memory; ``memory``, bytes of the front and its
    runners; ``rows``, answered since the start; ``rows_per_second``, during the question; ``queued``, rows
    that wait; ``answered_by``, the task that asked.

    Args:
        spark: A session, classic or Connect.

    Raises:
        InvalidArgumentError: A name under ``spark.flightsvc.`` is unknown.
    """
    from pyspark.sql.types import StructField, StructType

    conf = settings_of(conf_of(spark))
    Settings.read(conf)
    columns = StructType([StructField(field.name, spark_type(field.type)) for field in _SCHEMA])
    return spark.range(0, _ROWS).mapInArrow(_Asker(conf), columns).dropDuplicates(["server"])


@dataclasses.dataclass(frozen=True)
class _Asker:
    """A function for ``mapInArrow``: yields the row of the executor's sidecar, if there is one."""

    conf: dict[str, str]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:  # Spark waits until its rows are read
            pass
        settings = Settings.read(self.conf)
        location = sidecar.running_for_worker(settings)
        if location is None:
            return
        try:
            with Client(Connection(lambda: location, settings)) as client:
                before, began = client.status(), time.monotonic()
                # This task keeps its slot meanwhile, so that Spark gives other tasks to other executors.
                time.sleep(_SECONDS)
                after, took = client.status(), time.monotonic() - began
        except UnavailableError:  # the sidecar has ended meanwhile
            return
        yield pa.RecordBatch.from_pylist([_row(before, after, took)], schema=_SCHEMA)


def _row(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, Any]:
    totals = after["totals"]
    return {
        "executor": after.get("executor") or None,
        "host": socket.gethostname(),
        "server": after["server"],
        "version": after["flightsvc"],
        "devices": [f"{device['name']} {device['uuid']}" for device in after["devices"] or []],
        "models": [f"{m['model']} version {m['version']}: {m['state']}" for m in after["models"] or []],
        "memory": totals["memory"],
        "rows": totals["rows"],
        "rows_per_second": max(0, totals["rows"] - before["totals"]["rows"]) / seconds,
        "queued": totals["queued"],
        "answered_by": place(),
    }
