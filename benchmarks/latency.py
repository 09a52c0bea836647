"""How soon a front serves, and how long one row takes, compared with an echo on the same kind of socket.

The echo and the model take turns, so that a machine that slows down slows both; quote the ratio. Prints a
table, writes build/bench/latency.json, and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
from record import ROOT, keep

START_BOUND_MS = 150.0
ROW_BOUND_MS = 1.5
STARTS, TURNS, ROWS = 21, 10, 500


def started(command: list[str], **options: Any) -> tuple[subprocess.Popen[bytes], bytes, float]:
    """Start a server and return it, the line it prints when it is ready, and the milliseconds until then."""
    began = time.perf_counter()
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    return server, line, (time.perf_counter() - began) * 1000


def ended(server: subprocess.Popen[bytes]) -> None:
    """End a server that was started here."""
    server.terminate()
    server.wait(30)


@contextmanager
def exchange(client: flight.FlightClient, command: bytes, schema: pa.Schema) -> Iterator[Any]:
    """Open a stream and return a function that sends a record batch and waits for its answer."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
    writer.begin(schema)

    def turn(batch: pa.RecordBatch) -> pa.RecordBatch:
        writer.write_batch(batch)
        return reader.read_chunk().data

    yield turn
    writer.done_writing()
    writer.close()


def times(turn: Any, batch: pa.RecordBatch, n: int) -> list[float]:
    """Return the milliseconds of each of n round trips."""
    result = []
    for _ in range(n):
        began = time.perf_counter()
        turn(batch)
        result.append((time.perf_counter() - began) * 1000)
    return result


def measure(run_dir: str) -> dict[str, Any]:
    """Measure starts, then one-row round trips."""
    serve = [str(ROOT / "bin" / "flightsvc"), "serve", "--run-dir", run_dir]
    serve += ["--libtensorflow", str(Path(sys.prefix, "lib/python3.11/site-packages/tensorflow"))]
    starts = []
    for _ in range(STARTS):
        server, _, ms = started(serve)
        starts.append(ms)
        ended(server)

    echo_socket = f"{run_dir}/echo.sock"
    echo, _, _ = started([str(ROOT / "build" / "bench" / "echo"), echo_socket])
    front, line, _ = started(serve)
    try:
        batch = pa.record_batch({"x": pa.array([[0.5] * 512], pa.list_(pa.float32()))})
        client = flight.FlightClient(json.loads(line)["endpoint"])
        descriptor = {"v": 1, "model": f"file://{ROOT}/build/models/mlp"}
        info = client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(descriptor)))
        [endpoint] = info.endpoints
        runner = flight.FlightClient(endpoint.locations[0])
        echoing = flight.FlightClient(f"grpc+unix://{echo_socket}")
        ours: list[float] = []
        floor: list[float] = []
        with (
            exchange(runner, endpoint.ticket.ticket, batch.schema) as model,
            exchange(echoing, b"", batch.schema) as back,
        ):
            for turn in (model, back):  # warm
                times(turn, batch, ROWS)
            for _ in range(TURNS):
                floor += times(back, batch, ROWS)
                ours += times(model, batch, ROWS)
    finally:
        ended(front)
        ended(echo)

    def percentile(values: list[float], p: float) -> float:
        return round(sorted(values)[int(p * (len(values) - 1))], 3)

    return {
        "front_ready_ms_median": round(statistics.median(starts), 1),
        "front_ready_ms_max": round(max(starts), 1),
        "one_row_ms_p50": percentile(ours, 0.5),
        "one_row_ms_p99": percentile(ours, 0.99),
        "echo_ms_p50": percentile(floor, 0.5),
        "echo_ms_p99": percentile(floor, 0.99),
        "ratio_to_echo_p50": round(percentile(ours, 0.5) / percentile(floor, 0.5), 2),
        "round_trips": len(ours),
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    """Measure, print, keep, judge."""
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["go", "build", "-o", str(folder / "echo"), "./benchmarks/echo"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as run_dir:
        figures = measure(run_dir)
    for name, value in figures.items():
        print(f"{name:<24} {value}")
    keep("latency", figures)
    missed = [
        f"{name} is {figures[name]}, more than {bound}"
        for name, bound in (("front_ready_ms_median", START_BOUND_MS), ("one_row_ms_p50", ROW_BOUND_MS))
        if figures[name] > bound
    ]
    print("\n".join(missed) or f"within the bounds of {START_BOUND_MS:.0f} ms and {ROW_BOUND_MS} ms")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
