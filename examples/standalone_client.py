"""Classifies photos through a running ``flightsvc serve``, with nothing but pyarrow.

    bin/flightsvc serve                  # prints one line of JSON; its "endpoint" is the first argument here
    python standalone_client.py grpc+unix:///run/user/1000/flightsvc/1c2d3e4f/front.sock MODEL PHOTO...

MODEL is the folder of a SavedModel with an input ``image`` and an output ``probabilities``. For each photo
one line of JSON is printed: its name, the three most probable classes with their probabilities, the server
that answered, and whether the data went directly to the runner, the model's own process ("redirected": true),
or through the front (false).
"""

from __future__ import annotations

import heapq
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight

BATCH = 4
"""Photos in one record batch."""


def classify(endpoint: str, model: Path, photos: list[Path]) -> None:
    """Sends the photos to the server at ``endpoint`` and prints their classes.

    Raises:
        pyarrow.lib.ArrowException: the server refused the request; the text is the server's message.
            After `pyarrow.flight.FlightUnavailableError` the request may be tried again.
    """
    descriptor = {
        "v": 1,
        "model": model.resolve().as_uri(),
        "inputs": {"image": "content"},  # the model's input <- the record batch's column
        "outputs": {"probabilities": "p"},  # the model's output -> the answer's column
        "preprocess": {"image": {"size": [224, 224], "scale": 1 / 128, "offset": -127 / 128}},
    }
    front = flight.connect(endpoint)

    # The front loads the model, then returns the location to send data to (the runner; without a location,
    # this connection to the front) and the ticket to send there.
    info = front.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(descriptor)))
    place = info.endpoints[0]
    server = flight.connect(place.locations[0]) if place.locations else front
    writer, reader = server.do_exchange(flight.FlightDescriptor.for_command(place.ticket.ticket))

    schema = pa.schema({"content": pa.binary()})
    name = ""
    with writer:
        writer.begin(schema)
        for start in range(0, len(photos), BATCH):
            some = photos[start : start + BATCH]
            writer.write_batch(pa.record_batch([[photo.read_bytes() for photo in some]], schema=schema))
            # The answer to a record batch is one record batch or several, with the rows in the same order.
            rows: list[list[float]] = []
            last = False
            while not last:
                chunk = reader.read_chunk()
                about = json.loads(chunk.app_metadata.to_pybytes())
                name, last = about.get("server", name), about["last"]
                rows += chunk.data["p"].to_pylist()
            for photo, row in zip(some, rows, strict=True):
                best = heapq.nlargest(3, range(len(row)), key=row.__getitem__)
                answer = {
                    "photo": photo.name,
                    "best": [[index, row[index]] for index in best],
                    "server": name,
                    "redirected": server is not front,
                }
                print(json.dumps(answer), flush=True)
        writer.done_writing()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python standalone_client.py ENDPOINT MODEL PHOTO...")
    try:
        classify(sys.argv[1], Path(sys.argv[2]), [Path(photo) for photo in sys.argv[3:]])
    except (OSError, pa.ArrowException) as error:
        sentence = str(error).split(" gRPC client debug context")[0]
        sys.exit(f"{Path(sys.argv[0]).name}: {sentence}")
