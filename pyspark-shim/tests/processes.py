"""What tests ask about processes, and about what flightsvc leaves behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import leftovers

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


def left(run_dir: Path, cache_dir: Path, temporary: Path, used: bool = True, kind: str = "") -> list[str]:
    """All that there is of ours in these folders, or what nobody has, or one kind: see tools/leftovers.py."""
    found = leftovers.find(run_dir, cache_dir, temporary)
    return [str(one) for one in found if (used or not one.used) and kind in ("", one.kind)]


def until_clean(left: Callable[[], list[str]]) -> float:
    """Return after how many seconds nothing is left; whoever used flightsvc is gone now."""
    started = time.monotonic()
    while found := left():
        took = time.monotonic() - started
        assert took < CLEAN_SECONDS, f"left after {took:.1f} s: {found}"
        time.sleep(0.02)
    return round(time.monotonic() - started, 2)
