"""The Flight clients of one process to one front."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as flight

from flightsvc.errors import (
    FLIGHT_ERRORS,
    LOST,
    UnavailableError,
    retry_after,
    translate,
)
from flightsvc.server import sidecar
from flightsvc.settings import Settings

log = logging.getLogger("flightsvc")

T = TypeVar("T")

IMAGE_MODEL = "image"
"""The name of the model that is built into the server: it makes Spark's image structs of pictures."""

_FIRST_DELAY, _LAST_DELAY = 0.05, 5.0
_PERSON_WAITS = 5.0  # seconds for which a question that somebody sits in front of is asked again


class Connection:
    """The clients of this process to a front and to the runners behind it; safe for many threads.

    A front that went away is found, or started, again: :meth:`forget` drops the clients, the next use
    looks for the front anew.
    """

    def __init__(self, find: Callable[[], str], settings: Settings):
        """Take ``find``, which returns the front's location, and connect with the first use."""
        self.settings = settings
        self._find = find
        self._mutex = threading.Lock()  # guards what follows
        self._front: flight.FlightClient | None = None
        self._runners: dict[str, flight.FlightClient] = {}

    def front(self) -> flight.FlightClient:
        """Return the client of the front."""
        with self._mutex:
            if self._front is None:
                location = self._find()
                log.debug("using the front at %s", location)
                self._front = sidecar.client(location)
            return self._front

    def runner(self, location: str) -> flight.FlightClient:
        """Return the client of a runner that the front sent us to."""
        with self._mutex:
            if location not in self._runners:
                self._runners[location] = sidecar.client(location)
            return self._runners[location]

    def forget(self) -> None:
        """Drop all clients; streams that are open on them go on."""
        with self._mutex:
            self._front = None
            self._runners.clear()

    def retry(self, attempt: Callable[[], T], patience: float) -> T:
        """Return what ``attempt`` returns, tried again with back-off while the other end is unavailable.

        A server that is full says when to ask again; that is waited for, too.

        Args:
            attempt: What to do; it uses this connection.
            patience: For how many seconds it is tried again.

        Raises:
            UnavailableError: It was unavailable all the time.
            FlightsvcError: Any other refusal, at once.
        """
        end = time.monotonic() + patience
        for number, delay in enumerate(_delays()):
            try:
                return attempt()
            except LOST as error:
                reason = translate(error)
                full = retry_after(error)
                if full:
                    delay += full
                else:
                    self.forget()
                if time.monotonic() + delay > end:
                    raise UnavailableError(
                        f"no answer from flightsvc for {patience:.0f} s: {reason}"
                    ) from error
                level = logging.WARNING if number == 3 else logging.DEBUG
                log.log(level, "flightsvc is unavailable, trying for %.0f s: %s", patience, reason)
                time.sleep(delay)
            except FLIGHT_ERRORS as error:
                raise translate(error) from error
        raise AssertionError("the delays never end")

    def action(self, name: str, body: dict[str, Any], patience: float = _PERSON_WAITS) -> dict[str, Any]:
        """Ask the front to do something and return its answer; both are JSON objects.

        It is asked again for ``patience`` seconds; raises as :meth:`retry` does.
        """

        def ask() -> dict[str, Any]:
            return self._ask(self.front(), name, body)

        return self.retry(ask, patience)

    def answer_schema(self, descriptor: dict[str, Any]) -> pa.Schema:
        """Return the schema of the answer to ``descriptor``, without loading the model."""

        def ask() -> pa.Schema:
            options = flight.FlightCallOptions(timeout=self.settings.load_seconds)
            command = flight.FlightDescriptor.for_command(json.dumps(descriptor))
            try:
                return self.front().get_schema(command, options).schema
            except OSError as error:  # get_schema alone raises Arrow's error for this
                if "Detail: Unavailable" in str(error):
                    raise flight.FlightUnavailableError(str(error)) from error
                raise

        return self.retry(ask, _PERSON_WAITS)

    def _ask(self, front: flight.FlightClient, name: str, body: dict[str, Any]) -> dict[str, Any]:
        action = flight.Action(name, json.dumps(body).encode())
        options = flight.FlightCallOptions(timeout=self.settings.load_seconds)
        results = list(front.do_action(action, options))
        answer: dict[str, Any] = json.loads(results[0].body.to_pybytes()) if results else {}
        return answer


def _delays() -> Iterator[float]:
    delay = _FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1.5)
        delay = min(2 * delay, _LAST_DELAY)


# gRPC does not survive a fork: a client made before it is never used after it.
_connections: dict[tuple[int, Callable[[Settings], str], Settings], Connection] = {}
_connections_mutex = threading.Lock()


def shared(find: Callable[[Settings], str], settings: Settings) -> Connection:
    """Return this process's connection to the front that ``find`` finds for ``settings``."""
    key = (os.getpid(), find, settings)
    with _connections_mutex:
        if key not in _connections:
            _connections[key] = Connection(lambda: find(settings), settings)
        return _connections[key]
