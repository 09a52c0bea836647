"""Lists what flightsvc has on this host, and whose it is; needs only Linux and Python.

    python tools/leftovers.py
    python tools/leftovers.py --run-dir /run/user/1000/flightsvc --cache-dir ~/.cache/flightsvc

It prints a line for each process, folder and socket of the run-dir, lock, unfinished copy of a model, private
folder of a driver and segment of shared memory. ``in use`` means that it belongs to a live process; ``left``
means that its process has ended. The next front in the same run-dir takes over or removes the folder of a
front that has ended; the next front with the same cache-dir removes unfinished copies. The exit code is 1 if
anything is left.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = re.compile(r"\.(?:push|fetch)-(\d+)-(\d+)-")  # process id and its start
_OWNER = re.compile(r"--owner=(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class Found:
    """A process, file or lock of flightsvc.

    Attributes:
        kind: ``process``, ``folder``, ``socket``, ``file``, ``lock``, ``copy``, ``driver`` or ``memory``.
        what: A process id with its program, or a path.
        whose: Its owner, as text.
        used: Whether its process is alive; for a process, whether its owner is alive.
    """

    kind: str
    what: str
    whose: str
    used: bool

    def __str__(self) -> str:
        return f"{'in use' if self.used else 'left':<7} {self.kind:<8} {self.what}  ({self.whose})"


@dataclasses.dataclass(frozen=True)
class _Process:
    pid: int
    name: str
    parent: int
    start: int  # clock ticks after boot; pid and start together are unique
    words: str  # its command line
    environ: bytes


def default_run_dir() -> Path:
    """Return the default run-dir."""
    given = os.environ.get("FLIGHTSVC_RUN_DIR")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(given or (f"{runtime}/flightsvc" if runtime else f"/tmp/flightsvc-{os.geteuid()}"))


def default_cache_dir() -> Path:
    """Return the default cache-dir."""
    given = os.environ.get("FLIGHTSVC_CACHE_DIR")
    return Path(
        given or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "" if given else "flightsvc"
    )


def find(run_dir: Path, cache_dir: Path, temporary: Path | None = None) -> list[Found]:
    """Return what belongs to fronts with this run-dir and this cache-dir.

    Args:
        run_dir: The folder of sockets; it may be missing.
        cache_dir: The folder of models; it may be missing.
        temporary: The folder with the private folders of drivers; default: ``$TMPDIR``.
    """
    return [
        *_processes(run_dir, cache_dir),
        *_folders(run_dir),
        *_locks(run_dir, cache_dir),
        *_unfinished(cache_dir),
        *_drivers(temporary or Path(tempfile.gettempdir())),
        *_memory(),
    ]


def _read(pid: int) -> _Process | None:
    """Return a live process, else None; a zombie is not alive."""
    with contextlib.suppress(OSError, ValueError):
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] in "ZX":
            return None
        words, environ = "", b""
        with contextlib.suppress(OSError):  # of another user's process
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        return _Process(pid, name, int(fields[1]), int(fields[19]), words, environ)
    return None


def _owner(pid: int, start: int | None = None) -> tuple[str, bool]:
    """Return a process as text, and whether it is alive."""
    process = _read(pid)
    if process is None or (start is not None and process.start != start):
        return f"process {pid}, which has ended", False
    return f"{process.name} {pid}", True


def _processes(run_dir: Path, cache_dir: Path) -> Iterator[Found]:
    """Fronts and runners whose command line or environment names a folder, or whose parent's does."""
    ours = [str(run_dir), str(cache_dir)]
    all_of = {}
    for entry in Path("/proc").iterdir():
        process = _read(int(entry.name)) if entry.name.isdigit() else None
        if process and process.name.startswith("flightsvc"):
            all_of[process.pid] = process

    def belongs(process: _Process) -> bool:
        named = any(folder in process.words or folder.encode() in process.environ for folder in ours)
        return named or (process.parent in all_of and belongs(all_of[process.parent]))

    default = str(run_dir) == str(default_run_dir())  # then command lines may not name it
    for process in all_of.values():
        if not belongs(process) and not (default and b"FLIGHTSVC_RUN_DIR=" not in process.environ):
            continue
        given = _OWNER.search(process.words)
        if given:
            whose, used = _owner(int(given[1]), int(given[2]))
        elif process.name.startswith("flightsvc-runn") or "--child" in process.words:
            whose, used = _owner(process.parent)
            used = used and process.parent != 1
        else:
            whose, used = "its own, or its user's", True
        yield Found("process", f"{process.pid} {process.name}", whose, used)


def _folders(run_dir: Path) -> Iterator[Found]:
    """The folders of fronts with their sockets, and everything else in the run-dir."""
    if not run_dir.is_dir():
        return
    for folder in sorted(run_dir.iterdir()):
        whose, used = "nobody's: no front is named in it", False
        with contextlib.suppress(OSError, ValueError, KeyError):
            named = json.loads((folder / "front").read_text())
            whose, used = _owner(named["pid"], named["start"])
        held = _holders({folder})
        if not used and held:  # a process is about to start a front here, or pushes a model
            whose, used = f"locked by {_owner(held[0][1])[0]}", True
        yield Found("folder", str(folder), whose, used)
        for path in sorted(folder.glob("**/*")):
            yield Found("socket" if path.is_socket() else "file", str(path), whose, used)


def _holders(paths: set[Path]) -> list[tuple[Path, int]]:
    """Return the locked ones of these paths with the process that has the lock, -1 if it is unknown."""
    inodes = {}
    for path in paths:
        with contextlib.suppress(OSError):
            about = path.lstat()
            inodes[f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"] = path
    held = []
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] != "->" and fields[5] in inodes:  # "->" waits for a lock
            held.append((inodes[fields[5]], int(fields[4])))
    return held


def _locks(run_dir: Path, cache_dir: Path) -> Iterator[Found]:
    """Locks on folders of the run-dir, and on models and the file of fetches in the cache-dir."""
    paths = {*run_dir.glob("*"), *cache_dir.glob("*"), *cache_dir.glob("models/*")}
    for path, pid in _holders(paths):
        whose, used = _owner(pid) if pid > 0 else ("a process that fetches a model", True)
        yield Found("lock", str(path), whose, used)


def _unfinished(cache_dir: Path) -> Iterator[Found]:
    """Copies of models that are being made."""
    for path in sorted(cache_dir.glob("models/.*")):
        if named := _UNFINISHED.match(path.name):
            yield Found("copy", str(path), *_owner(int(named[1]), int(named[2])))


def _drivers(temporary: Path) -> Iterator[Found]:
    """Private folders of drivers, which a live driver keeps locked."""
    paths = sorted(temporary.glob("flightsvc-*-*"))
    held = dict(_holders(set(paths)))
    for path in paths:
        whose, used = _owner(held[path]) if path in held else ("nobody's: no process has it locked", False)
        yield Found("driver", str(path), whose, used)


def _memory() -> Iterator[Found]:
    """Segments of shared memory; flightsvc makes none."""
    for path in sorted(Path("/dev/shm").glob("*flightsvc*")):
        yield Found("memory", str(path), "unknown", False)


def main() -> int:
    """Print the list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=default_run_dir(), help="default: %(default)s")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="default: %(default)s")
    arguments = parser.parse_args()
    found = find(arguments.run_dir, arguments.cache_dir)
    for one in found:
        print(one)
    left = [one for one in found if not one.used]
    print(f"{len(found) - len(left)} in use, {len(left)} left")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
