"""What tests ask about processes, and about what flightsvc leaves behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

CLEAN_SECONDS = 5.0  # after whoever used flightsvc is gone


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Return the first true result of ``condition``."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return result


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def left(home: Path, run_dir: Path) -> list[str]:
    """All that there is of ours: processes whose environment names ``home``, and what is in ``run_dir``."""
    ours = str(home).encode()
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(OSError):
            if (
                process.info["name"].startswith("flightsvc")
                and ours in Path(f"/proc/{process.pid}/environ").read_bytes()
                and not is_gone(process)
            ):
                found.append(f"{process.info['name']} {process.pid}")
    return found + [str(path) for path in run_dir.glob("**/*")]


def until_clean(left: Callable[[], list[str]]) -> float:
    """Return after how many seconds nothing is left; whoever used flightsvc is gone now."""
    started = time.monotonic()
    while found := left():
        took = time.monotonic() - started
        assert took < CLEAN_SECONDS, f"left after {took:.1f} s: {found}"
        time.sleep(0.02)
    return round(time.monotonic() - started, 2)
