"""Runs make targets one after another and says how many seconds each took.

A target that fails does not stop the others; the exit code is 1 if any failed.
"""

from __future__ import annotations

import subprocess
import sys
import time


def main(targets: list[str]) -> int:
    """Run the targets and print the table."""
    results = []
    for target in targets:
        print(f"== {target}", flush=True)
        started = time.monotonic()
        code = subprocess.run(["make", "--no-print-directory", target], check=False).returncode
        results.append((target, code, time.monotonic() - started))
    print("\nsuite          seconds  result")
    for target, code, seconds in results:
        print(f"{target:<14} {seconds:7.0f}  {'ok' if code == 0 else 'FAILED'}")
    return int(any(code for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
