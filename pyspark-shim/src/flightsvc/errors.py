"""The exceptions of this package, made here of those that Flight raises."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.flight as flight


class FlightsvcError(Exception):
    """The base of all exceptions of flightsvc; raised itself for an internal error of the server."""


class InvalidArgumentError(FlightsvcError, ValueError):
    """A column, a type, a shape or an option of the request is wrong; a retry does not help."""


class NotFoundError(FlightsvcError, KeyError):
    """There is no such model, version, signature, input, output or column."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # str of a KeyError is the quoted repr


class UnavailableError(FlightsvcError, ConnectionError):
    """The sidecar could not be reached, or streams were lost, until ``retry_timeout`` was over."""


class DeadlineExceededError(FlightsvcError, TimeoutError):
    """A call or a run of the model exceeded its timeout."""


class SidecarError(FlightsvcError, RuntimeError):
    """The sidecar could not be started on this host."""


LOST = (flight.FlightUnavailableError, flight.FlightCancelledError)
"""Errors that mean a lost connection rather than a refusal."""
FLIGHT_ERRORS = (pa.ArrowException, flight.FlightError, OSError)
"""All errors that a Flight call may raise; Arrow's IOError is an OSError in pyarrow."""

# In pyarrow: "Flight (or gRPC) returned <code> error, with message: <ours>. gRPC client debug context: ...".
_ENVELOPE = re.compile(
    r"^(?:(?:Flight|gRPC) (?:returned|RPC failed)[^:]*(?:error|failed)?,? with message: )?"
    r"(?P<text>.*?)"
    r"(?:\.? (?:gRPC client debug context|Client context|Detail): .*)?$",
    re.DOTALL,
)

# A full server says how long to wait.
_RETRY_AFTER = re.compile(r"ask again in (\d+) ms \(retry-after-ms\)")

_CLASSES: tuple[tuple[type[BaseException], type[FlightsvcError]], ...] = (
    (flight.FlightUnavailableError, UnavailableError),
    (flight.FlightCancelledError, UnavailableError),
    (flight.FlightTimedOutError, DeadlineExceededError),
    (pa.ArrowKeyError, NotFoundError),
    (pa.ArrowInvalid, InvalidArgumentError),
)


def translate(error: BaseException) -> FlightsvcError:
    """Return the exception of this package for one of pyarrow, with the server's sentence as its text."""
    if isinstance(error, FlightsvcError):
        return error
    match = _ENVELOPE.match(str(error))
    text = match["text"] if match else str(error)
    for theirs, ours in _CLASSES:
        if isinstance(error, theirs):
            return ours(text)
    return FlightsvcError(text)


def retry_after(error: BaseException) -> float:
    """Return how many seconds a full server asks to wait; 0: ``error`` is not from a full server."""
    match = _RETRY_AFTER.search(str(error))
    return int(match[1]) / 1000 if match else 0.0
