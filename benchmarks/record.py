"""Records figures, with the machine and versions that they depend on."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def machine(*packages: str) -> dict[str, Any]:
    """Return this machine's CPU, its current load, and the versions of Python and of ``packages``."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_flags": cpu.get("flags", "").split(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": dict(zip(("1_min", "5_min", "15_min"), os.getloadavg(), strict=True)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def place(machine: dict[str, Any]) -> str:
    """Return a line about the machine of `machine`."""
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"].values())
    return f"{machine['cpu']}, {machine['cores']} cores; load average over 1, 5, 15 minutes: {load}"


def keep(name: str, figures: dict[str, Any]) -> None:
    """Write figures to ``build/bench/<name>.json``, and to the file FLIGHTSVC_FIGURES if that is set."""
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / f"{name}.json", os.environ.get("FLIGHTSVC_FIGURES")):
        if path:
            Path(path).write_text(json.dumps(figures, indent=1))
