"""Inference without Spark: a client of a front, for tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from flightsvc import sidecar
from flightsvc.connection import Connection
from flightsvc.errors import UnavailableError
from flightsvc.model import Model, read_signature
from flightsvc.settings import Settings


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
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        on_error: str = "fail",
        error_column: str = "error",
    ) -> pa.Table:
        """Return ``data`` with the model's outputs as further columns.

        The caller's columns are not copied, and the result has one chunk for each of ``data``.

        Args:
            model: A model, or what :class:`Model` takes.
            data: A table or a record batch.
            inputs: Input tensor to column. Absent: columns of the same names, or the only column for the
                only input.
            outputs: Output tensor to column, in the wanted order. Absent: all, by tensor name.
            on_error: What a row that cannot be run does: ``fail`` the call, make its outputs ``null``, or
                null with the reason in ``error_column`` (``column``).
            error_column: Name of the column for the reason.

        Raises:
            InvalidArgumentError: A type does not fit, or an output's name is taken.
            NotFoundError: No such model, signature, input, output or column.
            FlightsvcError: The server failed or could not be reached.
        """
        if not isinstance(model, Model):
            model = Model(model)
        request = model.request(inputs, outputs, on_error, error_column)
        known = () if inputs else tuple(read_signature(model, self._connection)["inputs"])
        positions = request.columns(data.schema.names, known, case_sensitive=True)
        exchange = request.exchange(self._connection, data.schema.names, positions)
        return pa.Table.from_batches([answer.beside() for answer in exchange.answers(_batches(data))])

    def metadata(self, model: Model | str | os.PathLike[str]) -> dict[str, Any]:
        """Return the model's version and all its signatures, read without loading it.

        Raises:
            NotFoundError: There is no such model or version.
        """
        model = model if isinstance(model, Model) else Model(model)
        return self._connection.action("model.metadata", {"model": model.reference, "version": model.version})

    def status(self) -> dict[str, Any]:
        """Return what the front says of itself: its version, process and models."""
        return self._connection.action("status", {})

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


def _batches(data: pa.Table | pa.RecordBatch) -> list[pa.RecordBatch]:
    if isinstance(data, pa.RecordBatch):
        return [data]
    nothing = pa.RecordBatch.from_arrays(
        [pa.array([], field.type) for field in data.schema], schema=data.schema
    )
    return data.to_batches() or [nothing]


def _in_worker() -> bool:
    from flightsvc import spark

    return spark.task() is not None
