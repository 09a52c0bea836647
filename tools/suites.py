"""Runs make targets beside each other and prints the seconds of each, of downloads and of all together.

    python tools/suites.py TARGET ...               exits with 1 if any target failed; the others run on
    python tools/suites.py --clock NAME COMMAND     runs a shell's command and notes its seconds for the table

make decides what runs when: a suite begins when what it needs is built, and its seconds are its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOTES = "SUITES_NOTES"  # the variable with the file of noted seconds
# By uv, once it has fetched and unpacked what is to be installed.
PREPARED = re.compile(r"^Prepared .* in (?:(\d+)m )?([\d.]+)(m?s)$")


def note(name: str, code: int, seconds: float) -> None:
    """Add a line to the table of the run that this is part of, if it is."""
    if file := os.environ.get(NOTES):
        with Path(file).open("a") as lines:
            lines.write(json.dumps([name, code, seconds]) + "\n")


def clock(name: str, command: str) -> int:
    """Run a command; what uv says of its downloads is noted apart and not shown."""
    started = time.monotonic()
    with subprocess.Popen(["sh", "-c", command], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            if found := PREPARED.match(line):
                minutes, amount, unit = found.groups()
                seconds = int(minutes or 0) * 60 + float(amount) / (1000 if unit == "ms" else 1)
                note(f"download of {name}", 0, seconds)
            elif not re.match(r"(Resolved|Installed|Bytecode|Using|Uninstalled| [+~-] )", line):
                sys.stderr.write(line)
    note(name, process.returncode, time.monotonic() - started)
    return process.returncode


def main(targets: list[str]) -> int:
    """Run the targets and print the table."""
    started = time.monotonic()
    with tempfile.NamedTemporaryFile(mode="r") as notes:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "--no-print-directory", "--keep-going", "--output-sync=line", *targets]
        done = subprocess.run(command, env={**environ, NOTES: notes.name}, check=False)
        rows = [json.loads(line) for line in notes]
    print("\nseconds  result  what")
    for name, code, seconds in sorted(rows, key=lambda row: "download" in row[0]):
        print(f"{seconds:7.0f}  {'FAILED' if code else 'ok':6}  {name}")
    print(
        f"{time.monotonic() - started:7.0f}  {'FAILED' if done.returncode else 'ok':6}  all together",
        flush=True,
    )
    return int(done.returncode != 0)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(clock(*arguments[1:]) if arguments[0] == "--clock" else main(arguments))
