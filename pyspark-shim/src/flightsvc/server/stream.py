"""One exchange of record batches with a model, resumed when the stream is lost.

Two threads, as Flight wants it: the caller's thread pulls record batches, reads answers and yields them; a
helper thread writes, because a client that writes large record batches without reading blocks on flow
control. What was written stays in the window until its answer has been read, so that it can be sent again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import queue
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
"""Record batches are cut so that none is larger, unless a single row is."""
ROW_BYTES = 256 << 20
"""No row may be larger."""
WINDOW_BATCHES = 4
"""So many record batches, or ``MESSAGE_BYTES``, are on their way at once."""
LOSSES = 3
"""So many lost streams in a row are blamed on the record batch that was to be answered next."""

_JOIN_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one record batch.

    Attributes:
        batch: The record batch that was asked for, the same object.
        outputs: The output columns, as many rows in the same order; their buffers are Flight's, not shared.
        server: Which sidecar answered, ``host:pid``.
    """

    batch: pa.RecordBatch
    outputs: pa.RecordBatch
    server: str

    def joined(self, server_column: str | None = None) -> pa.RecordBatch:
        """Return the record batch with the outputs beside it, and ``server`` if a column is named for it.

        Nothing is copied.

        Raises:
            InvalidArgumentError: A new column has the name of one that is there.
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
    """The stream ended before all was answered."""


@dataclasses.dataclass
class _Piece:
    """A slice of one record batch, as it is sent; ``last`` closes the record batch."""

    rows: pa.RecordBatch
    number: int
    batch: pa.RecordBatch
    last: bool
    losses: int = 0


class Exchange:
    """Sends record batches through a model and gives back the answers in the same order."""

    def __init__(
        self, connection: Connection, descriptor: dict[str, Any], columns: dict[str, int], place: str = ""
    ):
        """Prepare an exchange; nothing is opened before the first record batch is there.

        Args:
            connection: Where the front is.
            descriptor: What to run, see the wire contract; ``inputs`` name the columns sent.
            columns: The columns to send: their name on the wire and their position in each record batch.
            place: Where this runs, for errors and logs, such as ``partition 3``.
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

        Closing the generator early cancels the stream; that is not an error.

        Args:
            batches: The record batches, all of one schema.
            ahead: So many record batches at most are on their way at once. With 1 the next is asked for only
                after the answer to the last was taken, so it may depend on it.

        Raises:
            FlightsvcError: The request was refused, or the sidecar stayed away.
        """
        pieces = self._pieces(batches)
        window: collections.deque[_Piece] = collections.deque()
        parts: list[pa.RecordBatch] = []  # answers to the pieces of the record batch under way
        stream: _Stream | None = None
        more = True
        server = ""
        try:
            while True:
                while more and _room(window, ahead):
                    piece = next(pieces, None)
                    if piece is None:
                        more = False
                        break
                    window.append(piece)
                    if stream is not None:
                        stream.send(piece)
                if not window:
                    break
                try:
                    if stream is None:
                        stream = self._open(window[0].rows.schema)
                        for piece in window:
                            stream.send(piece)
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
                    raise translate(error) from error
                piece = window.popleft()
                if piece.last:
                    answer = Answer(piece.batch, join(parts), server)
                    parts = []
                    yield answer
            if stream is not None:
                stream.close()
                stream = None
        finally:
            if stream is not None:
                stream.cancel()

    def _pieces(self, batches: Iterable[pa.RecordBatch]) -> Iterator[_Piece]:
        for number, batch in enumerate(batches):
            sent = pa.RecordBatch.from_arrays(
                [batch.column(position) for position in self._columns.values()], names=list(self._columns)
            )
            cuts = list(_cut(sent, number))
            for index, rows in enumerate(cuts):
                yield _Piece(rows, number, batch, last=index == len(cuts) - 1)

    def _open(self, schema: pa.Schema) -> _Stream:
        """Ask the front for a ticket, go where it says and wait until the answer's schema is there."""

        def attempt() -> _Stream:
            descriptor = self._descriptor if self._redirect else {**self._descriptor, "redirect": False}
            command = flight.FlightDescriptor.for_command(json.dumps(descriptor))
            options = flight.FlightCallOptions(timeout=self._connection.settings.load_seconds + 30)
            front = self._connection.front()
            [endpoint] = front.get_flight_info(command, options).endpoints
            location = endpoint.locations[0].uri.decode() if endpoint.locations else None
            # A runner that we cannot reach where it is may still be reached through the front.
            self._redirect = location is None
            client = self._connection.runner(location) if location is not None else front
            try:
                stream = _Stream(client, endpoint.ticket.ticket, schema)
            except LOST as error:
                if retry_after(error):  # it was reached, and is full
                    self._redirect = True
                raise
            self._redirect = True
            log.debug("%s: stream opened, %s", self._id, location or "through the front")
            return stream

        return self._connection.retry(attempt, self._connection.settings.retry_seconds)

    def _blame(self, piece: _Piece, error: Exception) -> None:
        piece.losses += 1
        if piece.losses == LOSSES:
            place = f"{self._place}, " if self._place else ""
            raise UnavailableError(
                f"{place}record batch {piece.number}: {LOSSES} streams were lost while it was next in turn; "
                f"the sidecar's log says why (request {self._id}). The last one said: {translate(error)}"
            ) from error


class _Stream:
    """One DoExchange call: the caller's thread reads, a helper thread writes.

    Only the caller's thread ends the call, or our half of it: Flight's client half-closes a call when it
    reads that the server has ended it, and gRPC aborts the process if two threads do so at once.
    """

    def __init__(self, client: flight.FlightClient, ticket: bytes, schema: pa.Schema):
        """Open the call and wait for the answer's schema.

        Raises:
            FlightError: The server refused, or is not there.
        """
        self.server = ""
        self._answered = 0
        self._queue: queue.SimpleQueue[pa.RecordBatch | None] = queue.SimpleQueue()
        self._failure: Exception | None = None  # the helper's; set before it cancels
        self._client = client
        self._writer, self._reader = client.do_exchange(flight.FlightDescriptor.for_command(ticket))
        try:
            self._writer.begin(schema)
            self._reader.schema  # noqa: B018, waits for the answer's schema: now the stream is open
        except BaseException:
            self._reader.cancel()
            self._finish()
            raise
        self._helper = threading.Thread(target=self._write, name="flightsvc-writer", daemon=True)
        self._helper.start()

    def send(self, piece: _Piece) -> None:
        """Hand a piece to the helper. Never blocks."""
        self._queue.put(piece.rows)

    def read(self, rows: int) -> list[pa.RecordBatch]:
        """Return the record batches that answer the next unanswered piece, which has so many rows.

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
        """Half-close a stream whose pieces are all answered, and read its end."""
        self._queue.put(None)
        self._helper.join(_JOIN_SECONDS)
        self._finish()

    def cancel(self) -> None:
        """End the call at once and wait, for a bounded time, until the helper has let go of it."""
        self._reader.cancel()
        self._queue.put(None)
        self._helper.join(_JOIN_SECONDS)
        if not self._helper.is_alive():
            self._finish()

    def _finish(self) -> None:
        """Half-close the call and read its end; how it ended has been told, or is nobody's concern."""
        with contextlib.suppress(*FLIGHT_ERRORS):
            self._writer.close()

    def _write(self) -> None:
        try:
            while (rows := self._queue.get()) is not None:
                self._writer.write_batch(rows)
        except Exception as error:  # whatever it is, the reading thread must hear of it
            self._failure = error
            self._reader.cancel()


def _room(window: collections.deque[_Piece], batches: int) -> bool:
    if len(window) >= batches:
        return False
    return sum(int(piece.rows.nbytes) for piece in window) < MESSAGE_BYTES


def _cut(batch: pa.RecordBatch, number: int) -> Iterator[pa.RecordBatch]:
    """Yield slices of ``batch``, without a copy, of at most MESSAGE_BYTES each or of one row."""
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
    """Return the parts as one record batch; a single part is itself, without a copy."""
    if len(parts) == 1:
        return parts[0]
    columns = [pa.concat_arrays([part.column(i) for part in parts]) for i in range(parts[0].num_columns)]
    return pa.RecordBatch.from_arrays(columns, schema=parts[0].schema)
