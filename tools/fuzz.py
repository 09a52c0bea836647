"""Runs every fuzz target of the repository and prints a table of the results.

    python tools/fuzz.py                                   1,000,000 executions of each target
    python tools/fuzz.py --executions 20000 --unguided     a short run that is built fast
    python tools/fuzz.py --seconds 60 FuzzStream ...       these targets, for at most 60 s each

A target fails if Go finds a failing input, which it writes to testdata/fuzz below the package, if there is no
further execution for a minute, or if its processes grow. Each target bounds the time and the memory of one
execution itself. Figures are added to the file that FLIGHTSVC_FIGURES names, if it is set.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FUNCTION = re.compile(r"^func (Fuzz\w+)\(", re.MULTILINE)
PROGRESS = re.compile(r"fuzz: elapsed: .*execs: (\d+)")
STALL_SECONDS = 60  # without a further execution; Go reports every 3 s
START_SECONDS = 300  # before the first execution that is not a seed
GROWTH_MIB = 512  # of all processes of a target, from the first half minute to the end
SETTLED_SECONDS = 10


@dataclass
class Target:
    """One fuzz function and its test binary."""

    folder: Path
    binary: Path
    name: str


@dataclass
class Outcome:
    """The result of one target."""

    executions: int = 0
    seconds: float = 0.0
    rss_start_mib: int = 0
    rss_end_mib: int = 0
    fault: str = ""

    @property
    def rate(self) -> int:
        """Return the executions per second."""
        return round(self.executions / self.seconds) if self.seconds else 0


def targets(wanted: list[str], build: Path, guided: bool) -> list[Target]:
    """Build and return the fuzz functions of the repository, or the wanted ones.

    A guided target counts the branches that an input takes; all libraries are compiled once more for that.
    """
    found = []
    listed = ["go", "list", "-f", "{{.Dir}}", "./..."]
    folders = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for folder in map(Path, folders):
        names = [name for file in folder.glob("*_test.go") for name in FUNCTION.findall(file.read_text())]
        names = [name for name in names if not wanted or name in wanted]
        if names:
            binary = build / f"{folder.name}.test"
            counting = ["-fuzz=."] if guided else []
            subprocess.run(["go", "test", "-c", *counting, "-o", binary, folder], cwd=ROOT, check=True)
            found += [Target(folder, binary, name) for name in sorted(names)]
    if unknown := set(wanted) - {target.name for target in found}:
        sys.exit(f"there is no target {', '.join(sorted(unknown))}")
    return found


def resident_mib(group: int) -> int:
    """Return the resident memory of the fuzzing processes in a process group."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and b"-test.fuzzworker" in (stat.parent / "cmdline").read_bytes():
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # the process has ended
            continue
    return total >> 20


def fuzz(target: Target, executions: int, seconds: float, parallel: int) -> Outcome:
    """Run one target for a number of executions, or seconds if that is not 0, or until it fails."""
    command = [
        str(target.binary),
        "-test.run=^$",
        f"-test.fuzz=^{target.name}$",
        f"-test.fuzztime={executions}x",
    ]
    command += ["-test.fuzzminimizetime=1x", f"-test.parallel={parallel}", "-test.timeout=0"]
    command += [f"-test.fuzzcachedir={target.binary}.{target.name}"]
    process = subprocess.Popen(
        command,
        cwd=target.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: Any) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    outcome, output = Outcome(), []
    began = moved = time.monotonic()
    fuzzing = 0.0  # time of the first execution
    samples: list[tuple[float, int]] = []
    stopped = False
    while True:
        now = time.monotonic()
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            line = ""
        if line is None:
            break
        if line:
            output.append(line)
        if found := PROGRESS.match(line):
            fuzzing = fuzzing or now
            if int(found[1]) > outcome.executions:
                outcome.executions, moved = int(found[1]), now
        if fuzzing and (resident := resident_mib(process.pid)):
            samples.append((now - fuzzing, resident))
        if stopped:
            continue
        if now - moved > (STALL_SECONDS if fuzzing else START_SECONDS):
            outcome.fault = f"no execution for {now - moved:.0f} s"
            stopped = True
            os.killpg(process.pid, signal.SIGKILL)
        elif seconds and fuzzing and now - fuzzing > seconds:
            stopped = True
            process.send_signal(signal.SIGINT)
    code = process.wait()
    outcome.seconds = time.monotonic() - (fuzzing or began)
    settled = [resident for at, resident in samples if at >= SETTLED_SECONDS]
    outcome.rss_start_mib = (settled or [resident for _, resident in samples] or [0])[0]
    outcome.rss_end_mib = max([resident for _, resident in samples[-10:]], default=0)
    text = "".join(output)
    if not outcome.fault and ((code != 0 and not stopped) or "--- FAIL" in text or "Failing input" in text):
        written = re.search(r"Failing input written to (\S+)", text)
        folder = target.folder.relative_to(ROOT)
        outcome.fault = f"failing input in {folder}/{written[1]}" if written else "failed"
        print(text, flush=True)
    elif not outcome.fault and outcome.rss_end_mib > outcome.rss_start_mib + GROWTH_MIB:
        outcome.fault = f"grew by {outcome.rss_end_mib - outcome.rss_start_mib} MiB"
    return outcome


def report(figures: dict[str, Any]) -> None:
    """Add figures to the file that `make prove` reads."""
    if name := os.environ.get("FLIGHTSVC_FIGURES"):
        file = Path(name)
        kept = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**kept, **figures}))


def main() -> int:
    """Run the targets and print the table."""
    parser = argparse.ArgumentParser(description="Run every fuzz target.")
    parser.add_argument("targets", nargs="*", help="names; default: all")
    parser.add_argument("--executions", type=int, default=1_000_000, help="of each target")
    parser.add_argument("--seconds", type=float, default=0, help="limit for each target; 0 for none")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--parallel",
        type=int,
        default=cores,
        help="processes of one target; with fewer than cores, several targets run at once",
    )
    parser.add_argument("--unguided", action="store_true", help="do not count branches, which builds faster")
    asked = parser.parse_args()
    wanted = asked.executions
    head = f"{'target':<28} {'executions':>11} {'seconds':>8} {'per s':>9} {'resident MiB':>13}  result"
    print(head, flush=True)
    failed = 0
    with (
        tempfile.TemporaryDirectory(prefix="flightsvc-fuzz-") as build,
        ThreadPoolExecutor(max(1, cores // asked.parallel)) as pool,
    ):
        found = targets(asked.targets, Path(build), guided=not asked.unguided)
        outcomes = pool.map(lambda target: fuzz(target, wanted, asked.seconds, asked.parallel), found)
        for target, outcome in zip(found, outcomes, strict=True):
            early = f"stopped early, of {wanted}" if outcome.executions < wanted else "ok"
            failed += bool(outcome.fault)
            label = f"{target.folder.name}.{target.name}"
            memory = f"{outcome.rss_start_mib} to {outcome.rss_end_mib}"
            print(
                f"{label:<28} {outcome.executions:>11} {outcome.seconds:>8.1f} {outcome.rate:>9} {memory:>13}"
                f"  {outcome.fault or early}",
                flush=True,
            )
            said = f"{outcome.executions} of {wanted} in {outcome.seconds:.0f} s, {outcome.rate} a second"
            report({target.name: f"{said}, resident {memory} MiB, {outcome.fault or 'no failure'}"})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
