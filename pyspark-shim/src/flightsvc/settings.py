"""The settings that the shim reads, from the environment and from Spark's configuration.

A setting has one name in several spellings: ``retry_timeout`` in Python, ``--retry-timeout`` on the command
line, ``FLIGHTSVC_RETRY_TIMEOUT`` in the environment, ``spark.flightsvc.retryTimeout`` in a Spark session.
Spark's configuration overrides the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from typing import Self

from flightsvc.errors import InvalidArgumentError

SPARK_PREFIX = "spark.flightsvc."

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATIONS = ("_timeout", "_interval", "keep_alive")  # the ends of names of durations
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one process, as text; ``None`` means the default.

    Attributes:
        endpoint: Address of a running front, ``grpc+unix:///path`` or an absolute path. Default: one is
            started.
        binary: Path of the program ``flightsvc``. Default: the one in this package, else the one on PATH.
        model_root: Folder or URI of the model repository.
        poll_interval: How often the front looks for newer versions of models in use.
        cache_dir: Folder for fetched and pushed models. Default: ``flightsvc`` in the user's cache
            folder.
        cache_size: Maximum size of the models in ``cache_dir``.
        op_libraries: Files or folders of custom operations that models may load, separated by commas.
        libtensorflow: Folder that holds ``libtensorflow_cc.so.2``. Default: that of the tensorflow wheel.
        python: Python interpreter that the front asks for the folder of TensorFlow.
        run_dir: Private folder for sockets. Default: see :func:`default_run_dir`.
        idle_timeout: Time without work after which a front ends.
        cores: Threads for each model.
        memory: Memory of the host for all models together.
        keep_alive: How long a model stays in memory without a stream.
        allow_cpu_fallback: ``true``: models run on the CPU if no GPU has room.
        tune: What a front does for its models in the background: ``fold``, ``quick`` or ``off``.
        max_image_pixels: Maximum number of pixels of a picture.
        max_image_bytes: Maximum size of a picture's file.
        log_level: Level of the front's log.
        load_timeout: How long loading a model may take.
        drain_timeout: How long a front that is ending waits for its streams.
        retry_timeout: How long the shim tries to open a stream.
        fail_on_start: Spark plugin only: ``true`` ends an executor whose front does not start.
    """

    endpoint: str | None = None
    binary: str | None = None
    model_root: str | None = None
    poll_interval: str | None = None
    cache_dir: str | None = None
    cache_size: str | None = None
    op_libraries: str | None = None
    libtensorflow: str | None = None
    python: str | None = None
    run_dir: str | None = None
    idle_timeout: str | None = None
    cores: str | None = None
    memory: str | None = None
    keep_alive: str | None = None
    allow_cpu_fallback: str | None = None
    tune: str | None = None
    max_image_pixels: str | None = None
    max_image_bytes: str | None = None
    log_level: str | None = None
    load_timeout: str | None = None
    drain_timeout: str | None = None
    retry_timeout: str | None = None
    fail_on_start: str | None = None

    @classmethod
    def read(cls, conf: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Return the settings of the environment, overridden by those of a Spark configuration.

        Args:
            conf: Spark's configuration; only ``spark.flightsvc.*`` is read.
            environ: The environment; ``None``: ``os.environ``.

        Raises:
            InvalidArgumentError: A name under ``spark.flightsvc.`` is unknown, or a duration is invalid.
        """
        environ = os.environ if environ is None else environ
        values = {
            name: environ[variable(name)]
            for name in (field.name for field in dataclasses.fields(cls))
            if environ.get(variable(name))
        }
        known = {spark_key(field.name): field.name for field in dataclasses.fields(cls)}
        for key, value in (conf or {}).items():
            if not key.startswith(SPARK_PREFIX):
                continue
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise InvalidArgumentError(
                    f"there is no setting {key}; "
                    + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
                )
            if value:
                values[known[key]] = value
        for name, value in values.items():
            if name.endswith(_DURATIONS):
                try:
                    seconds(value)
                except InvalidArgumentError as error:
                    raise InvalidArgumentError(f"{spark_key(name)} ({variable(name)}): {error}") from None
        return cls(**values)

    @property
    def retry_seconds(self) -> float:
        """``retry_timeout`` in seconds."""
        return seconds(self.retry_timeout or "120s")

    @property
    def load_seconds(self) -> float:
        """``load_timeout`` in seconds."""
        return seconds(self.load_timeout or "300s")

    @property
    def drain_seconds(self) -> float:
        """``drain_timeout`` in seconds."""
        return seconds(self.drain_timeout or "10s")

    def serve_flags(self) -> list[str]:
        """Return these settings as flags of ``flightsvc serve``."""
        shim_only = {"endpoint", "binary", "retry_timeout", "fail_on_start"}
        return [
            f"--{name.replace('_', '-')}={value}"
            for name, value in dataclasses.asdict(self).items()
            if value is not None and name not in shim_only
        ]


def variable(name: str) -> str:
    """Return the environment variable of a setting: ``run_dir`` is ``FLIGHTSVC_RUN_DIR``."""
    return f"FLIGHTSVC_{name.upper()}"


def spark_key(name: str) -> str:
    """Return Spark's key of a setting: ``run_dir`` is ``spark.flightsvc.runDir``."""
    first, *rest = name.split("_")
    return SPARK_PREFIX + first + "".join(word.capitalize() for word in rest)


def seconds(duration: str) -> float:
    """Return a duration in seconds; it is written as in Go: ``5m``, ``1h30m``, ``250ms``, ``0``.

    Raises:
        InvalidArgumentError: The text is not a duration.
    """
    if duration == "0":
        return 0.0
    parts = _DURATION_PART.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise InvalidArgumentError(f"{duration!r} is not a duration; write it as 300s, 5m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def default_run_dir(environ: Mapping[str, str] | None = None) -> str:
    """Return ``$XDG_RUNTIME_DIR/flightsvc``, else ``/tmp/flightsvc-<uid>``."""
    environ = os.environ if environ is None else environ
    runtime = environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "flightsvc") if runtime else f"/tmp/flightsvc-{os.geteuid()}"
