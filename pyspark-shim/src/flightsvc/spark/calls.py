"""Functions in the workers: each keeps one stream open between its calls, until it is idle."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence

import pyarrow as pa

from flightsvc.errors import InvalidArgumentError
from flightsvc.request import Request
from flightsvc.server.stream import Answer, join
from flightsvc.spark.dataframe import on_task_device, worker_connection
from flightsvc.spark.loading import Loading

_IDLE_SECONDS = 2.0
"""A stream without calls for so long is closed, so that its model can be unloaded."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """The function that Spark calls in the workers, once for each record batch.

    Attributes:
        name: The function's name, for logs and errors.
        key: A unique key of the function.
        request: The request to the model.
        parameters: The names of the columns.
        positions: The position of the column for each input.
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
        """Return the result for one record batch, whose columns come by position or by name."""
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
                        loading.apply_on_error(rows, _calls(here, rows.schema).outputs(rows))
                        for rows in loading.slices([batch])
                    ]
                )
        if not self.struct:
            return outputs.column(0)
        return pa.StructArray.from_arrays(outputs.columns, fields=list(outputs.schema))

    def _bound(self, columns: Sequence[pa.Array], named: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Return a column for each parameter; Spark does not check names and number of arguments."""
        bound = [*columns, *(named[p] for p in self.parameters[len(columns) :] if p in named)]
        if len(bound) != len(self.parameters) or len(columns) + len(named) != len(bound):
            found = [f"{len(columns)} by position", *named]
            raise InvalidArgumentError(
                f"{self.name}({', '.join(self.parameters)}) of model {self.request.model.name}, signature "
                f"{self.request.model.signature}, was called with these arguments: {', '.join(found)}"
            )
        return bound

    def answers(
        self, names: Sequence[str], batches: Iterator[pa.RecordBatch]
    ) -> Generator[Answer, None, None]:
        """Yield the answers to ``batches``; a record batch is sent after the answer to the last one."""
        connection = worker_connection(self.request, self.conf)
        exchange = self.request.exchange(connection, names, self.positions, f"function {self.name}")
        return exchange.answers(batches, ahead=1)


class _Calls:
    """The stream of one function, schema and device in this process, opened by the first call."""

    def __init__(self, worker: Worker, key: tuple[int, str, str, pa.Schema]):
        self._worker = worker
        self._key = key
        self._turn = threading.Condition()  # guards what follows and the stream
        self._answers: Generator[Answer, None, None] | None = None  # of the open stream
        self._due: pa.RecordBatch | None = None  # the record batch to send next; None ends the stream
        self._used = 0.0

    def outputs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the output columns for ``batch``.

        Raises:
            FlightsvcError: The request was refused, or the sidecar stayed away.
        """
        with self._turn:
            answers, self._answers = self._answers, None  # a stream that fails is dropped
            try:
                if answers is None:
                    answers = self._worker.answers(batch.schema.names, self._batches())
                    threading.Thread(
                        target=self._watch, args=(answers,), name="flightsvc-idle", daemon=True
                    ).start()
                self._due = batch
                answer = next(answers)
                self._answers = answers
                self._used = time.monotonic()
                return answer.outputs
            finally:
                if self._answers is None:
                    self._forget()

    def _forget(self) -> None:
        """Remove the entry of this stream; each call of :meth:`Model.udf` makes a function with a new key."""
        with _all_calls_mutex:
            if _all_calls.get(self._key) is self:
                del _all_calls[self._key]

    def _batches(self) -> Iterator[pa.RecordBatch]:
        while self._due is not None:
            batch, self._due = self._due, None
            yield batch

    def _watch(self, answers: Generator[Answer, None, None]) -> None:
        """Close the stream after _IDLE_SECONDS without a call."""
        with self._turn:
            while self._answers is answers:
                left = self._used + _IDLE_SECONDS - time.monotonic()
                if left > 0:
                    self._turn.wait(left)
                else:
                    self._answers = None
                    self._forget()
                    next(answers, None)


# gRPC does not survive a fork, so the process is part of the key.
_all_calls: dict[tuple[int, str, str, pa.Schema], _Calls] = {}
_all_calls_mutex = threading.Lock()


def _calls(worker: Worker, schema: pa.Schema) -> _Calls:
    """Return the stream of a function for columns of ``schema`` on the device of its request."""
    with _all_calls_mutex:
        key = (os.getpid(), worker.key, worker.request.device, schema)
        return _all_calls.setdefault(key, _Calls(worker, key))
