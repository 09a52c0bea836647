"""Prints the configuration of the Spark plugin, as lines of a ``spark-defaults.conf``."""

from __future__ import annotations

import sys

from flightsvc.errors import FlightsvcError
from flightsvc.plugin import spark_conf

if __name__ == "__main__":
    try:
        for key, value in spark_conf().items():
            print(key, value)
    except FlightsvcError as error:
        sys.exit(f"flightsvc: {error}")
