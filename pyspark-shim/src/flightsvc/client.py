"""Inference without Spark: a client of a front, for tables."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import pyarrow as pa

from flightsvc.errors import UnavailableError
from flightsvc.mapping import Options, check_device
from flightsvc.model import Model
from flightsvc.request import read_signature
from flightsvc.server import shipping, sidecar
from flightsvc.server.connection import Connection
from flightsvc.settings import Settings
from flightsvc.spark import loading
from flightsvc.spark.session import task


def connect(endpoint: str | None = None) -> Client:
    """Return a client of the front at ``endpoint``; it connects with its first call.

    Args:
        endpoint: ``grpc+unix:///path/front.sock`` or a bare path. Absent: ``FLIGHTSVC_ENDPOINT``, else, in
            a Spark worker, the executor's front, else this user's own, started if there is none; it ends
            when idle or by :meth:`Client.shutdown`.

    Raises:
        InvalidArgumentError: The endpoint or a setting in the environment is not one.
    """
    settings = Settings.read()
    if endpoint is not None:
        location = sidecar.address(endpoint)
        return Client(Connection(lambda: location, settings))
    find = sidecar.for_worker if _in_worker() else sidecar.for_user
    return Client(Connection(lambda: find(settings), settings))


class Client:
    """A client of one front; safe for many threads. Made by :func:`connect`."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def predict(
        self,
        model: Model | str | os.PathLike[str],
        data: pa.Table | pa.RecordBatch,
        *,
        layout: str = "list",
        **options: Unpack[Options],
    ) -> pa.Table:
        """Return ``data`` with the model's outputs as further columns.

        The caller's columns are not copied, and the result has one chunk for each record batch of ``data``.

        Args:
            model: A model, or what :class:`Model` takes.
            data: A table or a record batch.
            layout: How outputs of rank 2 and more come back: as nested lists (``list``, the types that Spark
                has) or as Arrow's fixed shape tensors (``tensor``, all types that Arrow has).
            **options: See :class:`Options`.

        Raises:
            InvalidArgumentError: A type does not fit, or an output's name is taken.
            NotFoundError: No such model, signature, input, output or column.
            FlightsvcError: The server failed or could not be reached.
        """
        if not isinstance(model, Model):
            model = Model(model)
        request = model.request(**options, layout=layout)
        request = request.with_specs(lambda: read_signature(model, self._connection)["inputs"])
        known = () if request.inputs else tuple(read_signature(model, self._connection)["inputs"])
        positions = request.columns(data.schema.names, known, case_sensitive=True)
        answers = loading.answers(request, self._connection, data.schema, positions, _batches(data))
        return pa.Table.from_batches([answer.joined() for answer in answers])

    def metadata(self, model: Model | str | os.PathLike[str]) -> dict[str, Any]:
        """Return the model's version and all its signatures, read without loading it.

        Raises:
            NotFoundError: There is no such model or version.
        """
        return self._connection.action("model.metadata", _named(model))

    def status(self) -> dict[str, Any]:
        """Return what the front says of itself: its version, process, memory, devices and models in memory.

        Sizes are bytes. ``memory`` has ``budget`` and ``reserved``. Each of ``models`` has ``model``,
        ``version``, ``state`` (``queued``, ``loading``, ``warming``, ``ready``, ``draining``, ``failed``,
        ``quarantined``) with its ``reason``, ``device`` (the UUID of a GPU, empty for the CPU),
        ``streams``, ``memory`` now, ``reserved``, ``tuned`` (the configuration that was measured to be
        fastest) and more.
        """
        return self._connection.action("status", {})

    def devices(self) -> list[dict[str, Any]]:
        """Return the GPUs and MIG instances that the front sees; empty where there are none.

        Each has ``uuid``, ``name``, ``index``, ``memory`` and ``free`` in bytes, ``compute`` capability,
        ``utilisation`` in percent (-1: not known), ``healthy`` and, where it is not, ``reason``.
        """
        devices: list[dict[str, Any]] = self.status().get("devices") or []
        return devices

    def models(self) -> list[dict[str, Any]]:
        """Return the models that the front knows: of its repository, pushed, and in memory.

        Each has ``name``, ``version``, ``state`` (one of :meth:`status`, or ``unloaded``) and, where it
        cannot be served as it is, ``reason``.
        """
        models: list[dict[str, Any]] = self._connection.action("repository.index", {})["models"]
        return models

    def load(self, model: Model | str | os.PathLike[str], *, device: str = "auto") -> None:
        """Load the model, and return when it is in memory; nothing happens if it is.

        Args:
            model: A model, or what :class:`Model` takes.
            device: See :class:`Options`.

        Raises:
            InvalidArgumentError: There can be no such device.
            NotFoundError: There is no such model or version.
            FlightsvcError: It cannot be loaded.
        """
        where = {} if check_device(device) == "auto" else {"device": device}
        self._connection.action("model.load", {**_named(model), **where})

    def unload(self, model: Model | str | os.PathLike[str]) -> None:
        """Take the model out of memory; nothing happens if it is not in memory.

        Raises:
            NotFoundError: There is no such model or version.
            InvalidArgumentError: It is being loaded, or is in use by a stream.
        """
        self._connection.action("model.unload", _named(model))

    def push(self, folder: str | os.PathLike[str]) -> str:
        """Send a SavedModel to the front's host, unless it is there already, and return its digest.

        ``Model(digest)`` is the model from then on. It stays until somebody deletes it from the front's
        ``cache-dir``.

        Args:
            folder: A folder with ``saved_model.pb``; regular files and folders alone, no links.

        Raises:
            NotFoundError: The folder holds no SavedModel.
            InvalidArgumentError: It holds something else than files and folders, the front cannot read it,
                or there is no space for it.
        """
        return shipping.send(self._connection, Path(folder))

    def shutdown(self) -> None:
        """End the front, once its streams have ended or its drain timeout is over."""
        with contextlib.suppress(UnavailableError):  # it may be quicker than its answer
            self._connection.action("server.shutdown", {}, patience=0)

    def close(self) -> None:
        """Drop the connection; the front stays."""
        self._connection.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _named(model: Model | str | os.PathLike[str]) -> dict[str, str]:
    """Return the body of an action on one model."""
    model = model if isinstance(model, Model) else Model(model)
    return {"model": model.reference, "version": model.version}


def _batches(data: pa.Table | pa.RecordBatch) -> list[pa.RecordBatch]:
    if isinstance(data, pa.RecordBatch):
        return [data]
    return data.to_batches() or [
        pa.RecordBatch.from_arrays([pa.nulls(0, kind) for kind in data.schema.types], schema=data.schema)
    ]


def _in_worker() -> bool:
    return task() is not None
