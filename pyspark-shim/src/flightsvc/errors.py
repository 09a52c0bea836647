"""What can go wrong, as exceptions, and the one place that makes them from Flight's."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.flight as flight


class FlightsvcError(Exception):
    """Anything that flightsvc raises; by itself: the server failed in a way that nobody foresaw."""


class InvalidArgumentError(FlightsvcError, ValueError):
    """The request is wrong: a column, a type, a shape, an option; trying again does not help."""


class NotFoundError(FlightsvcError, KeyError):
    """No such model, version, signature, input, output or column."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError would show the quoted repr


class UnavailableError(FlightsvcError, ConnectionError):
    """The sidecar could not be reached, or kept losing the stream, for as long as we may wait."""


class DeadlineExceededError(FlightsvcError, TimeoutError):
    """A call or a run of the model took longer than it may."""


class SidecarError(FlightsvcError, RuntimeError):
    """The sidecar could not be started on this host."""


LOST = (flight.FlightUnavailableError, flight.FlightCancelledError)
"""What says that the other end is gone, rather than that it refused."""
FLIGHT_ERRORS = (pa.ArrowException, flight.FlightError, OSError)
"""All that a Flight call may raise; pyarrow raises Arrow's IOError as OSError."""

# Arrow says "Flight (or gRPC) returned <code> error, with message: <ours>. gRPC client debug context: ...".
_ENVELOPE = re.compile(
    r"^(?:(?:Flight|gRPC) (?:returned|RPC failed)[^:]*(?:error|failed)?,? with message: )?"
    r"(?P<text>.*?)"
    r"(?:\.? (?:gRPC client debug context|Client context|Detail): .*)?$",
    re.DOTALL,
)

# A server that is full says for how long it would rather not be asked.
_RETRY_AFTER = re.compile(r"ask again in (\d+) ms \(retry-after-ms\)")

_CLASSES: tuple[tuple[type[BaseException], type[FlightsvcError]], ...] = (
    (flight.FlightUnavailableError, UnavailableError),
    (flight.FlightCancelledError, UnavailableError),
    (flight.FlightTimedOutError, DeadlineExceededError),
    (pa.ArrowKeyError, NotFoundError),
    (pa.ArrowInvalid, InvalidArgumentError),
)


def translate(error: BaseException) -> FlightsvcError:
    """Return our exception for one that pyarrow raised, with the server's own sentence as its text."""
    if isinstance(error, FlightsvcError):
        return error
    match = _ENVELOPE.match(str(error))
    text = match["text"] if match else str(error)
    for theirs, ours in _CLASSES:
        if isinstance(error, theirs):
            return ours(text)
    return FlightsvcError(text)


def retry_after(error: BaseException) -> float:
    """Return for how many seconds a full server asks to be left alone, 0 if ``error`` does not say so."""
    match = _RETRY_AFTER.search(str(error))
    return int(match[1]) / 1000 if match else 0.0
