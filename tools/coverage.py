"""Says which functions the tests reach, so that two versions can be compared.

    python tools/coverage.py measure OUT.json [--tree FOLDER] [--go PACKAGE ...] [--python TEST ...]
    python tools/coverage.py compare BEFORE.json AFTER.json

``measure`` counts for Go what ``go test`` reaches and what both programs do during the Python tests, and
for the Python package the lines that tests, Spark's workers and other processes run. It leaves programs in
the tree's ``bin`` that count, so ``make build`` is to follow. ``compare`` knows a function by its name,
wherever it has moved, and exits with 1 if one is no longer reached or fewer lines of the package are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = "pyspark-shim/tests"
COUNTED = "-cover -covermode=atomic -coverpkg=flightsvc/..."
# Workers of Spark are forked and leave by os._exit.
SETTINGS = """[run]
source_pkgs = flightsvc
parallel = true
patch = subprocess, fork, _exit
data_file = {folder}/python
"""


def measure(tree: Path, packages: list[str], tests: list[str]) -> dict[str, Any]:
    """Run the tests of a tree and return what they reach, in per cent: functions of Go, files of Python."""
    folder = tree / "build" / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "go").mkdir(parents=True)
    settings = folder / "settings"
    settings.write_text(SETTINGS.format(folder=folder))
    python = tree / ".venv" / "bin" / "python"
    library = tree / "build" / "libtensorflow"
    environ = {
        **os.environ,
        "GOFLAGS": "-trimpath",
        "CPATH": f"{library}/include",
        "LIBRARY_PATH": str(library),
        "LD_LIBRARY_PATH": str(library),
        "GOCOVERDIR": f"{folder}/go",
        "PYSPARK_PYTHON": str(python),
    }

    def run(*command: str | Path) -> int:
        print("==", *command, flush=True)
        return subprocess.run(command, cwd=tree, env=environ, check=False).returncode

    failed = run(
        tree / "build" / "uv" / "bin" / "uv",
        "pip",
        "install",
        "--quiet",
        f"--python={python}",
        "coverage>=7.10",
    )
    source = tree / "cmd" / "flightsvc" / "detach.go"
    text = source.read_text()
    try:  # a detached front keeps some variables of its environment alone
        source.write_text(text.replace('"PATH", ', '"GOCOVERDIR", "PATH", ', 1))
        failed |= run("make", "-W", "VERSION", f"GOFLAGS=-trimpath {COUNTED}", "build")
    finally:
        source.write_text(text)
    if packages:
        failed |= run("go", "test", *COUNTED.split(), *packages, "-args", f"-test.gocoverdir={folder}/go")
    if tests:
        counted = [python, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q", "-n", "2"]
        failed |= run(*counted, "--dist", "loadfile", *tests)
    if failed:
        print("something failed; what it left out does not count", file=sys.stderr)

    def read(*command: str | Path) -> str:
        return subprocess.run(
            command, cwd=tree, env=environ, check=True, capture_output=True, text=True
        ).stdout

    functions = {}
    for line in read("go", "tool", "covdata", "func", f"-i={folder}/go").splitlines():
        place, name, share = line.split()
        if place != "total":
            functions[f"{place} {name}"] = float(share.rstrip("%"))
    lines: dict[str, Any] = {}
    if tests:
        coverage = [python, "-m", "coverage"]
        read(*coverage, "combine", "--quiet", f"--rcfile={settings}")
        only = f"--include={tree}/pyspark-shim/src/*"  # not the package that is installed from the wheel
        read(*coverage, "json", "--quiet", f"--rcfile={settings}", only, "-o", folder / "python.json")
        found = json.loads((folder / "python.json").read_text())
        lines = {
            Path(name).name: about["summary"]["percent_covered"] for name, about in found["files"].items()
        }
        lines["all"] = found["totals"]["percent_covered"]
    return {"commit": read("git", "rev-parse", "HEAD").strip(), "go": functions, "python": lines}


def unreached(functions: dict[str, float]) -> dict[str, list[str]]:
    """Return by name, without its receiver, the functions that no test reaches, but literals."""
    found = defaultdict(list)
    for key, share in functions.items():
        place, name = key.split(" ")
        if share == 0 and ".func" not in name:
            found[name.rpartition(".")[2]].append(place)
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what is reached no more, and return how much that is."""
    old, new = unreached(before["go"]), unreached(after["go"])
    names = {key.split(" ")[1].rpartition(".")[2] for key in before["go"]}
    lost = [name for name in new if name in names and len(new[name]) > len(old.get(name, ()))]
    for name in sorted(lost):
        print(f"no longer reached: {name} ({', '.join(new[name])})")
    for name in sorted(set(new) - names):
        print(f"new, not reached: {name} ({', '.join(new[name])})")
    shares = [about["python"].get("all", 0.0) for about in (before, after)]
    print(f"functions of Go reached: {reached(before['go'])} before, {reached(after['go'])} after")
    print(f"lines of the Python package reached: {shares[0]:.1f} % before, {shares[1]:.1f} % after")
    return len(lost) + (round(shares[1], 1) < round(shares[0], 1))


def reached(functions: dict[str, float]) -> str:
    """Return how many of the functions are reached, for people."""
    return f"{sum(share > 0 for share in functions.values())} of {len(functions)}"


def main() -> int:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("out", type=Path)
    measuring.add_argument("--tree", type=Path, default=ROOT)
    measuring.add_argument("--go", nargs="*", default=["./..."], metavar="PACKAGE")
    measuring.add_argument("--python", nargs="*", default=[TESTS], metavar="TEST")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "measure":
        given.out.write_text(
            json.dumps(measure(given.tree.resolve(), given.go, given.python), indent=1) + "\n"
        )
        return 0
    return int(compare(*(json.loads(file.read_text()) for file in (given.before, given.after))) > 0)


if __name__ == "__main__":
    sys.exit(main())
