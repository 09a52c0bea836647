"""Inference on Arrow tables, without Spark: the client of one front."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
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
    """Return a client of the front at ``endpoint``; its first call connects.

    Args:
        endpoint: ``grpc+unix:///path/front.sock`` or an absolute path. ``None``: ``FLIGHTSVC_ENDPOINT`` if it
            is set; else the executor's front in a Spark worker, or this user's front elsewhere, which is
            started if there is none. That front ends when it is idle, or by :meth:`Client.shutdown`.

    Raises:
        InvalidArgumentError: The endpoint or a setting in the environment is invalid.
    """
    settings = Settings.read()
    if endpoint is not None:
        location = sidecar.address(endpoint)
        return Client(Connection(lambda: location, settings))
    find = sidecar.for_worker if _in_worker() else sidecar.for_user
    return Client(Connection(lambda: find(settings), settings))


class Client:
    """A client of one front, made by :func:`connect`; safe for concurrent use."""

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

        The columns of ``data`` are not copied. The result has one chunk for each record batch of ``data``.

        Args:
            model: A model, or an argument for :class:`Model`.
            data: A table or a record batch.
            layout: The form of outputs of rank 2 and more: nested lists, of types that Spark has (``list``),
                or Arrow's fixed shape tensors, of all types of Arrow (``tensor``).
            **options: See :class:`Options`.

        Raises:
            InvalidArgumentError: A column's type does not fit its input, or two columns have one name.
            NotFoundError: There is no such model, signature, input, output or column.
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
        """Return the state of the front: its version, process, memory, devices and models in memory.

        Sizes are bytes. ``memory`` has ``budget`` and ``reserved``. Each of ``models`` has ``model``,
        ``version``, ``state`` (``queued``, ``loading``, ``warming``, ``ready``, ``draining``, ``failed``,
        ``quarantined``) with its ``reason``, ``device`` (the UUID of a GPU, empty for the CPU),
        ``streams``, ``memory``, ``reserved``, ``tuned`` (the fastest configuration that tuning has found) and
        more.
        """
        return self._connection.action("status", {})

    def devices(self) -> list[dict[str, Any]]:
        """Return the GPUs and MIG instances of the front's host.

        Each has ``uuid``, ``name``, ``index``, ``memory`` and ``free`` in bytes, ``compute`` capability,
        ``utilisation`` in percent (-1: unknown), ``healthy`` and, if it is not, ``reason``.
        """
        devices: list[dict[str, Any]] = self.status().get("devices") or []
        return devices

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the front's repository, pushed models, and models in memory.

        Each has ``name``, ``version``, ``state`` (as in :meth:`status`, or ``unloaded``) and, if it cannot be
        served, ``reason``.
        """
        models: list[dict[str, Any]] = self._connection.action("repository.index", {})["models"]
        return models

    def load(self, model: Model | str | os.PathLike[str], *, device: str = "auto") -> None:
        """Load the model unless it is in memory, and return when it is ready.

        Args:
            model: A model, or an argument for :class:`Model`.
            device: See :class:`Options`.

        Raises:
            InvalidArgumentError: The device is invalid.
            NotFoundError: There is no such model or version.
            FlightsvcError: It cannot be loaded.
        """
        where = {} if check_device(device) == "auto" else {"device": device}
        self._connection.action("model.load", {**_named(model), **where})

    def unload(self, model: Model | str | os.PathLike[str]) -> None:
        """Remove the model from memory, if it is there.

        Raises:
            NotFoundError: There is no such model or version.
            InvalidArgumentError: It is being loaded, or is in use by a stream.
        """
        self._connection.action("model.unload", _named(model))

    def push(self, folder: str | os.PathLike[str]) -> str:
        """Send a SavedModel to the front unless it has it; return the digest, with which ``Model`` finds it.

        The front keeps it in its ``cache-dir``.

        Args:
            folder: A folder with ``saved_model.pb``. It contains only regular files and folders, no links.

        Raises:
            NotFoundError: The folder has no SavedModel.
            InvalidArgumentError: It contains something other than files and folders, the front cannot read
                it, or there is no room for it.
        """
        return shipping.send(self._connection, Path(folder))

    def shutdown(self) -> None:
        """End the front, after its streams have ended or ``drain_timeout`` is over."""
        with contextlib.suppress(UnavailableError):  # it may end before it has answered
            self._connection.action("server.shutdown", {}, patience=0)

    def close(self) -> None:
        """Close the connection; the front continues."""
        self._connection.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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
