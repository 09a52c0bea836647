"""The Spark session that this package uses, its configuration, and the running task."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from flightsvc.settings import SPARK_PREFIX

if TYPE_CHECKING:
    from pyspark import TaskContext
    from pyspark.sql import SparkSession

_CASE_SENSITIVE = "spark.sql.caseSensitive"

_session: ContextVar[SparkSession | None] = ContextVar("flightsvc_session", default=None)  # set by acting_for


@contextlib.contextmanager
def acting_for(session: SparkSession) -> Iterator[None]:
    """Use ``session`` as the active session of this package meanwhile."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def active_session() -> SparkSession | None:
    """Return the session of :func:`acting_for`, else Spark's active session; ``None``: there is none.

    Spark's active session is this thread's, else the application's, classic or Connect.
    """
    session = _session.get()
    if session is not None:
        return session
    if "pyspark.sql" not in sys.modules:
        return None
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    try:
        return SparkSession.active()
    except PySparkRuntimeError:
        return None


def conf_of(session: SparkSession | None) -> dict[str, str]:
    """Return the configuration of a session; empty for ``None``."""
    if session is None:
        return {}
    conf = session.conf
    if hasattr(conf, "getAll"):
        return dict(conf.getAll)
    return {row.key: row.value for row in session.sql("SET").collect()}  # Spark 3.5


def settings_of(conf: dict[str, str]) -> dict[str, str]:
    """Return the part of a session's configuration that workers need: ``spark.flightsvc.*``."""
    return {key: value for key, value in conf.items() if key.startswith(SPARK_PREFIX)}


def active_conf() -> dict[str, str]:
    """Return the configuration of the active session; empty without a session."""
    return conf_of(active_session())


def quoted(name: str) -> str:
    """Return a name quoted for SQL."""
    return f"`{name.replace('`', '``')}`"


def task() -> TaskContext | None:
    """Return the context of this thread's Spark task; ``None``: the thread runs none."""
    if "pyspark" not in sys.modules:
        return None
    from pyspark import TaskContext

    return TaskContext.get()


def is_case_sensitive(conf: dict[str, str]) -> bool:
    """Tell whether ``a`` and ``A`` are different columns."""
    return conf.get(_CASE_SENSITIVE, "false").lower() == "true"


def place() -> str:
    """Return stage, partition and attempt of this thread's Spark task, for errors and logs; else ``""``."""
    context = task()
    if context is None:
        return ""
    return f"stage {context.stageId()} partition {context.partitionId()} attempt {context.attemptNumber()}"
