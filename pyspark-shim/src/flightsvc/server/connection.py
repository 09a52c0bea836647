"""The Flight clients that one process keeps for a front and its runners."""

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
"""The name of the server's built-in model, which decodes pictures into Spark's image structs."""

_FIRST_DELAY, _LAST_DELAY = 0.05, 5.0
_DRIVER_PATIENCE = 5.0  # seconds; on the driver a person waits for the answer


class Connection:
    """This process's Flight clients for a front and its runners; safe for concurrent use.

    After :meth:`forget`, the next call finds the front again, or starts one.
    """

    def __init__(self, find: Callable[[], str], settings: Settings):
        """Keep ``find``, which returns the front's location; the first call connects."""
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
        """Return the client of the runner at ``location``, which the front named."""
        with self._mutex:
            if location not in self._runners:
                self._runners[location] = sidecar.client(location)
            return self._runners[location]

    def forget(self) -> None:
        """Drop all clients; open streams continue."""
        with self._mutex:
            self._front = None
            self._runners.clear()

    def retry(self, attempt: Callable[[], T], patience: float) -> T:
        """Call ``attempt`` until the server is available, with increasing delays; return its result.

        A full server says how long to wait; that is added to the delay.

        Args:
            attempt: A function that uses this connection.
            patience: Seconds after which this gives up.

        Raises:
            UnavailableError: The server was unavailable for that long.
            FlightsvcError: The server refused for another reason; not tried again.
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

    def action(self, name: str, body: dict[str, Any], patience: float = _DRIVER_PATIENCE) -> dict[str, Any]:
        """Run the action ``name`` of the front and return its answer; ``body`` and answer are JSON objects.

        Tried again for ``patience`` seconds; raises as :meth:`retry` does.
        """

        def ask() -> dict[str, Any]:
            return self._ask(self.front(), name, body)

        return self.retry(ask, patience)

    def answer_schema(self, descriptor: dict[str, Any]) -> pa.Schema:
        """Return the schema of the answer to ``descriptor``; the front does not load the model for this."""

        def ask() -> pa.Schema:
            options = flight.FlightCallOptions(timeout=self.settings.load_seconds)
            command = flight.FlightDescriptor.for_command(json.dumps(descriptor))
            try:
                return self.front().get_schema(command, options).schema
            except OSError as error:  # only get_schema reports Unavailable as an OSError
                if "Detail: Unavailable" in str(error):
                    raise flight.FlightUnavailableError(str(error)) from error
                raise

        return self.retry(ask, _DRIVER_PATIENCE)

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


# A gRPC client must not be used after a fork, so the process is part of the key.
_connections: dict[tuple[int, Callable[[Settings], str], Settings], Connection] = {}
_connections_mutex = threading.Lock()


def shared(find: Callable[[Settings], str], settings: Settings) -> Connection:
    """Return this process's connection for ``settings``; ``find`` locates the front."""
    key = (os.getpid(), find, settings)
    with _connections_mutex:
        if key not in _connections:
            _connections[key] = Connection(lambda: find(settings), settings)
        return _connections[key]
