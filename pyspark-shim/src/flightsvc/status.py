"""How the sidecars of a Spark application are."""

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

_ROWS = 1 << 16  # at least one for each task slot of the application
_SECONDS = 2.0  # between the two looks at each sidecar; it counts anew once a second

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

    Each action on it asks anew, by a job of as many tasks as the application has slots, and takes at least
    two seconds. An executor whose slots are all taken meanwhile is asked when one is free, or not at all.
    No sidecar is started for it: an executor that has none, or whose own does not answer, has no row.

    The columns: ``executor``, Spark's id of it where the plugin has started the sidecar, else null; ``host``;
    ``server``, as in answers; ``version`` of flightsvc; ``devices``, its GPUs, name and UUID, empty where
    models run on the CPU; ``models``, those in memory, each with version and state; ``memory``, bytes
    of the sidecar, front and runners; ``rows`` since it started; ``rows_per_second`` while it was asked;
    ``queued``, rows that wait now; ``answered_by``, the task that asked.

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
    """What runs in the workers: each yields one row of its executor's sidecar, or none."""

    conf: dict[str, str]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:  # Spark waits for a reader
            pass
        settings = Settings.read(self.conf)
        location = sidecar.running_for_worker(settings)
        if location is None:
            return
        try:
            with Client(Connection(lambda: location, settings)) as client:
                before, began = client.status(), time.monotonic()
                # Meanwhile this task keeps its slot, so that Spark gives the other tasks to other executors.
                time.sleep(_SECONDS)
                after, took = client.status(), time.monotonic() - began
        except UnavailableError:  # it has ended while it was asked
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
