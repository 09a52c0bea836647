"""How a bar counts and what it reports: small in `make test`, full in `make prove`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Read at once: the tests take all variables of flightsvc out of their environment.
PROVE = os.environ.get("FLIGHTSVC_PROVE") == "1"
_FILE = os.environ.get("FLIGHTSVC_FIGURES")


def count(small: int, full: int) -> int:
    """Return how often to do it."""
    return full if PROVE else small


def report(**figures: Any) -> None:
    """Print figures and add them to the file that `make prove` reads."""
    for name, value in figures.items():
        print(f"{name}: {value}")
    if _FILE:
        file = Path(_FILE)
        kept = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**kept, **figures}))
