"""The exchange of record batches with a model, which is resumed when a stream is lost.

The caller's thread takes record batches, reads answers and yields them. A second thread writes, because a
client that only writes is blocked by flow control. Record batches stay in the window until their answers have
been read, so that they can be sent again on a new stream.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import queue
import re
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from flightsvc.errors import (
    FLIGHT_ERRORS,
    LOST,
    FlightsvcError,
    InvalidArgumentError,
    UnavailableError,
    retry_after,
    translate,
)
from flightsvc.server.connection import Connection

log = logging.getLogger("flightsvc")

MESSAGE_BYTES = 64 << 20
"""The largest record batch that is sent; larger ones are cut, down to one row."""
ROW_BYTES = 256 << 20
"""The largest row."""
WINDOW_BATCHES = 4
"""The most record batches in flight at once; they hold at most ``MESSAGE_BYTES``."""
LOSSES = 3
"""After so many lost streams in a row, the record batch that was due is reported as the cause."""

_JOIN_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one record batch.

    Attributes:
        batch: The record batch that was sent, the same object.
        outputs: The output columns, one row for each row of ``batch``. Flight owns the buffers.
        server: Which sidecar answered, ``host:pid``.
    """

    batch: pa.RecordBatch
    outputs: pa.RecordBatch
    server: str

    def joined(self, server_column: str | None = None) -> pa.RecordBatch:
        """Return the columns of the record batch, then the outputs, then ``server`` as ``server_column``.

        Nothing is copied.

        Args:
            server_column: Name of the column for ``server``; ``None``: no such column.

        Raises:
            InvalidArgumentError: Two columns have one name.
        """
        columns = [*self.batch.columns, *self.outputs.columns]
        fields = [*self.batch.schema, *self.outputs.schema]
        if server_column is not None:
            columns.append(pa.repeat(pa.scalar(self.server, pa.string()), self.batch.num_rows))
            fields.append(pa.field(server_column, pa.string()))
        taken = set(self.batch.schema.names)
        for field in fields[self.batch.num_columns :]:
            if field.name in taken:
                raise InvalidArgumentError(
                    f"an output would have the name of another column, {field.name!r}; "
                    "give it another name: outputs={<output>: <column>}"
                )
            taken.add(field.name)
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, self.batch.schema.metadata))


class _Lost(Exception):
    """The stream ended before all record batches were answered."""


@dataclasses.dataclass
class _Slice:
    """Rows of one record batch that are sent together; ``last`` marks the record batch's last slice."""

    rows: pa.RecordBatch
    number: int
    batch: pa.RecordBatch
    last: bool
    losses: int = 0


class Exchange:
    """Sends record batches to a model and yields the answers in the same order."""

    def __init__(
        self, connection: Connection, descriptor: dict[str, Any], columns: dict[str, int], place: str = ""
    ):
        """Prepare an exchange; the stream is opened for the first record batch.

        Args:
            connection: Where the front is.
            descriptor: The descriptor of docs/protocol.md; its ``inputs`` name the columns that are sent.
            columns: The columns to send, by their name on the wire: their position in each record batch.
            place: The caller's place, for errors and logs, such as ``partition 3``.
        """
        self._connection = connection
        self._descriptor = descriptor
        self._columns = columns
        self._place = place
        self._id = descriptor.get("request_id", "")
        self._redirect = True

    def answers(
        self, batches: Iterable[pa.RecordBatch], ahead: int = WINDOW_BATCHES
    ) -> Generator[Answer, None, None]:
        """Yield one answer for each record batch, in order.

        Closing the generator early cancels the stream.

        Args:
            batches: The record batches, all of one schema.
            ahead: The most record batches in flight. With 1, the next record batch is taken only after the
                caller has taken the last answer, so it may depend on that answer.

        Raises:
            FlightsvcError: The request was refused, or the sidecar stayed away.
        """
        slices = self._slices(batches)
        window: collections.deque[_Slice] = collections.deque()
        parts: list[pa.RecordBatch] = []  # answers to the slices of the record batch under way
        stream: _Stream | None = None
        more = True
        one_by_one = False
        server = ""
        try:
            while True:
                while more and _room(window, 1 if one_by_one else ahead):
                    sent = next(slices, None)
                    if sent is None:
                        more = False
                        break
                    window.append(sent)
                    if stream is not None:
                        stream.send(sent)
                if not window:
                    break
                try:
                    if stream is None:
                        stream = self._open(window[0].rows.schema)
                        for sent in list(window)[: 1 if one_by_one else None]:
                            stream.send(sent)
                    parts += stream.read(window[0].rows.num_rows)
                    server = stream.server or server
                except (_Lost, *LOST) as error:
                    log.info("%s: the stream was lost: %s", self._id, error)
                    if stream is not None:
                        stream.cancel()
                        stream = None
                    self._connection.forget()
                    self._blame(window[0], error)
                    continue
                except FLIGHT_ERRORS as error:
                    if stream is None:
                        raise translate(error) from error
                    refused = stream.renumbered(translate(error))
                    doubtful = stream.could_not_write and len(window) > 1 and not one_by_one
                    if not doubtful or not isinstance(refused, InvalidArgumentError):
                        raise refused from error
                    # Which record batch is at fault? Arrow drops unread answers when it cannot write.
                    stream.cancel()
                    stream, one_by_one = None, True
                    continue
                sent = window.popleft()
                if one_by_one and window:
                    stream.send(window[0])
                if sent.last:
                    answer = Answer(sent.batch, join(parts), server)
                    parts = []
                    yield answer
            if stream is not None:
                stream.close()
                stream = None
        finally:
            if stream is not None:
                stream.cancel()

    def _slices(self, batches: Iterable[pa.RecordBatch]) -> Iterator[_Slice]:
        for number, batch in enumerate(batches):
            sent = pa.RecordBatch.from_arrays(
                [batch.column(position) for position in self._columns.values()], names=list(self._columns)
            )
            cuts = list(_cut(sent, number))
            for index, rows in enumerate(cuts):
                yield _Slice(rows, number, batch, last=index == len(cuts) - 1)

    def _open(self, schema: pa.Schema) -> _Stream:
        """Get a ticket from the front, open the stream it names, and wait for the answer's schema."""

        def attempt() -> _Stream:
            descriptor = self._descriptor if self._redirect else {**self._descriptor, "redirect": False}
            command = flight.FlightDescriptor.for_command(json.dumps(descriptor))
            options = flight.FlightCallOptions(timeout=self._connection.settings.load_seconds + 30)
            front = self._connection.front()
            [endpoint] = front.get_flight_info(command, options).endpoints
            location = endpoint.locations[0].uri.decode() if endpoint.locations else None
            # If the runner's socket cannot be opened, the next attempt asks for a stream through the front.
            self._redirect = location is None
            client = self._connection.runner(location) if location is not None else front
            try:
                stream = _Stream(client, endpoint.ticket.ticket, schema)
            except LOST as error:
                if retry_after(error):  # the runner is full, but its socket can be opened
                    self._redirect = True
                raise
            self._redirect = True
            log.debug("%s: stream opened, %s", self._id, location or "through the front")
            return stream

        return self._connection.retry(attempt, self._connection.settings.retry_seconds)

    def _blame(self, sent: _Slice, error: Exception) -> None:
        sent.losses += 1
        if sent.losses == LOSSES:
            place = f"{self._place}, " if self._place else ""
            raise UnavailableError(
                f"{place}record batch {sent.number}: {LOSSES} streams were lost while it was next in turn; "
                f"the sidecar's log says why (request {self._id}). The last one said: {translate(error)}"
            ) from error


class _Stream:
    """One DoExchange call: the caller's thread reads, a helper thread writes.

    Only the caller's thread closes the call or its sending side. Flight's client also closes the sending side
    when it reads the end of the call, and gRPC aborts the process if two threads do so at once.
    """

    def __init__(self, client: flight.FlightClient, ticket: bytes, schema: pa.Schema):
        """Open the call and wait for the answer's schema.

        Raises:
            FlightError: The server refused, or cannot be reached.
        """
        self.server = ""
        self._answered = 0
        self._numbers: list[int] = []  # of the record batches whose slices were sent, in this order
        self._queue: queue.SimpleQueue[pa.RecordBatch | None] = queue.SimpleQueue()
        self._failure: Exception | None = None  # of the helper thread, which sets it before it cancels
        self._client = client
        self._writer, self._reader = client.do_exchange(flight.FlightDescriptor.for_command(ticket))
        try:
            self._writer.begin(schema)
            self._reader.schema  # noqa: B018, waits for the answer's schema, which opens the stream
        except BaseException:
            self._reader.cancel()
            self._finish()
            raise
        self._helper = threading.Thread(target=self._write, name="flightsvc-writer", daemon=True)
        self._helper.start()

    @property
    def could_not_write(self) -> bool:
        """Whether the call ended while a slice was written."""
        return self._failure is not None

    def send(self, sent: _Slice) -> None:
        """Queue a slice for the helper thread; never blocks."""
        self._numbers.append(sent.number)
        self._queue.put(sent.rows)

    def renumbered(self, error: FlightsvcError) -> FlightsvcError:
        """Return the error with the caller's number of a record batch: the server counts what it was sent."""

        def number(found: re.Match[str]) -> str:
            sent = int(found[1])
            return f"record batch {self._numbers[sent] if sent < len(self._numbers) else sent}"

        return type(error)(re.sub(r"record batch (\d+)", number, str(error), count=1))

    def read(self, rows: int) -> list[pa.RecordBatch]:
        """Return the record batches that answer the next slice, which has ``rows`` rows.

        Raises:
            _Lost: The stream ended without the answer.
            FlightError, ArrowException: It ended with an error.
        """
        parts: list[pa.RecordBatch] = []
        while True:
            try:
                chunk = self._reader.read_chunk()
            except StopIteration:
                raise self._failure or _Lost("the stream ended early") from None
            except FLIGHT_ERRORS as error:
                raise (self._failure or error) from None
            about = json.loads(chunk.app_metadata.to_pybytes())
            if about["batch"] != self._answered:
                raise FlightsvcError(
                    f"the server answered record batch {about['batch']}, not {self._answered}"
                )
            self.server = about.get("server", self.server)
            parts.append(chunk.data)
            if about["last"]:
                self._answered += 1
                if sum(part.num_rows for part in parts) != rows:
                    raise FlightsvcError(
                        f"the server answered {sum(p.num_rows for p in parts)} rows for {rows}"
                    )
                return parts

    def close(self) -> None:
        """Close the sending side of a stream whose slices are all answered, and read the end of the call."""
        self._queue.put(None)
        self._helper.join(_JOIN_SECONDS)
        self._finish()

    def cancel(self) -> None:
        """Cancel the call and wait, for a bounded time, for the helper thread to end."""
        self._reader.cancel()
        self._queue.put(None)
        self._helper.join(_JOIN_SECONDS)
        if not self._helper.is_alive():
            self._finish()

    def _finish(self) -> None:
        """Close the sending side and read the end of the call; its status no longer matters."""
        with contextlib.suppress(*FLIGHT_ERRORS):
            self._writer.close()

    def _write(self) -> None:
        try:
            while (rows := self._queue.get()) is not None:
                self._writer.write_batch(rows)
        except Exception as error:  # passed on to the reading thread, whatever it is
            self._failure = error
            self._reader.cancel()


def _room(window: collections.deque[_Slice], batches: int) -> bool:
    if len(window) >= batches:
        return False
    return sum(int(sent.rows.nbytes) for sent in window) < MESSAGE_BYTES


def _cut(batch: pa.RecordBatch, number: int) -> Iterator[pa.RecordBatch]:
    """Yield slices of ``batch``, without copying, of at most MESSAGE_BYTES or of one row."""
    if batch.nbytes <= MESSAGE_BYTES:
        yield batch
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _cut(batch.slice(0, half), number)
        yield from _cut(batch.slice(half), number)
    elif batch.nbytes <= ROW_BYTES:
        yield batch
    else:
        sizes = {name: column.nbytes for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        column = max(sizes, key=sizes.__getitem__)
        raise InvalidArgumentError(
            f"record batch {number} has a row of {batch.nbytes >> 20} MiB, most of it in column {column!r}; "
            f"at most {ROW_BYTES >> 20} MiB can be sent"
        )


def join(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the parts as one record batch; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    columns = [pa.concat_arrays([part.column(i) for part in parts]) for i in range(parts[0].num_columns)]
    return pa.RecordBatch.from_arrays(columns, schema=parts[0].schema)
