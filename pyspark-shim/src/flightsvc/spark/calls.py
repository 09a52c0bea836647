"""Calls of a model as a function, in the workers: a stream for each function, closed when it is idle."""

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
"""A stream that no call has used for so long is closed: its model may then leave."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """What runs in the workers, once per record batch: columns in, the result out.

    Attributes:
        name: The function's name, for logs and errors.
        key: Tells this function from all others.
        request: What is asked of the model.
        parameters: The names of the columns.
        positions: Which column feeds each input.
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
        """Return a column for each parameter: of a Python function Spark checks neither names nor number."""
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
        """Yield the answers to ``batches``, each of which is asked for once the last is answered."""
        connection = worker_connection(self.request, self.conf)
        exchange = self.request.exchange(connection, names, self.positions, f"function {self.name}")
        return exchange.answers(batches, ahead=1)


class _Calls:
    """Calls of one function, schema and device in this process: a stream, from the first until it is idle."""

    def __init__(self, worker: Worker, key: tuple[int, str, str, pa.Schema]):
        self._worker = worker
        self._key = key
        self._turn = threading.Condition()  # guards what follows, and the stream
        self._answers: Generator[Answer, None, None] | None = None  # of the open stream
        self._due: pa.RecordBatch | None = None  # what it sends next; None ends it
        self._used = 0.0

    def outputs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the output columns for ``batch``.

        Raises:
            FlightsvcError: The request was refused, or the sidecar stayed away.
        """
        with self._turn:
            answers, self._answers = self._answers, None  # not kept if it fails
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
        """Leave the process's calls: each :meth:`Model.udf` is a new function, and a worker sees many."""
        with _all_calls_mutex:
            if _all_calls.get(self._key) is self:
                del _all_calls[self._key]

    def _batches(self) -> Iterator[pa.RecordBatch]:
        while self._due is not None:
            batch, self._due = self._due, None
            yield batch

    def _watch(self, answers: Generator[Answer, None, None]) -> None:
        """End the stream when it has been idle for long enough; leave when it has ended."""
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
    """Return this process's calls of a function with columns of ``schema``, on the device of its request."""
    with _all_calls_mutex:
        key = (os.getpid(), worker.key, worker.request.device, schema)
        return _all_calls.setdefault(key, _Calls(worker, key))
