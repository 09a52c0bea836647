"""Checks every promise at its full count and writes the results to build/prove.json.

A bar is one promise: a pytest file or a benchmark that checks it and writes its figures, as JSON, to the
file that FLIGHTSVC_FIGURES names. With FLIGHTSVC_PROVE=1 it runs at its full count. A result is kept under
the hash of the tracked files without documents, so a bar that has passed for this code is not run again.

    python tools/prove.py            all bars that have not passed for this code
    python tools/prove.py soak ...   these bars, again
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "prove"
BAR_SECONDS = 20 * 60

FUZZ_JSON = [
    "FuzzAction",
    "FuzzCriteria",
    "FuzzLease",
    "FuzzMapping",
    "FuzzParseDescriptor",
    "FuzzPutCommand",
    "FuzzTensorShape",
]
# The files of tests of each bar. Of a file with several bars, tests carry the mark `bar`.
TESTS = {
    "equality": "equality",
    "soak": "soak",
    **dict.fromkeys(
        ["kills-executors", "kills-lost", "kills-programs", "kills-jobs", "kills-drivers"], "kills"
    ),
    "bad-input": "bad_input errors timeouts",
    "models": "models types",
    "property": "property",
    "sql": "sql",
    "shipping": "shipping keras",
    "preprocess": "preprocess image",
    "pictures": "pictures",
    "together": "together",
    "pool": "pool",
    "swap": "swap",
    "form": "form",
    "gpu": "gpu",
    "plugin": "plugin",
    "clusters": "clusters",
    "clusters-3.5": "columns clusters",
    "stages": "ml loading graph",
    "predictor": "deep_image",
    **dict.fromkeys(
        [
            "networks",
            "networks-sparkdl",
            "networks-efficient",
            "networks-efficient-large",
            "networks-others",
        ],
        "networks",
    ),
    "transfer": "notebook docs",
    "featurizer-memory": "featurizer_memory",
    "sparkdl": "sparkdl_graph sparkdl_image sparkdl_names sparkdl_param sparkdl_transformers sparkdl_udf",
    "wheel": "wheel deploy",
}
COMMANDS = {
    "race": ["make", "test-race"],
    "latency": [sys.executable, "benchmarks/latency.py"],
    "bench-pictures": [sys.executable, "benchmarks/pictures.py"],
    "bench-quick": [sys.executable, "benchmarks/quick.py"],
    "bench-tuning": [sys.executable, "benchmarks/tuning.py"],
    "fuzz-streams": [sys.executable, "tools/fuzz.py", "--seconds", "300", "FuzzStream", "FuzzChunks"],
    "fuzz-files": [
        sys.executable,
        "tools/fuzz.py",
        "--seconds",
        "200",
        "FuzzUnpack",
        "FuzzParse",
        "FuzzHeader",
        "FuzzFrame",
        "FuzzWarmup",
    ],
    "fuzz-json": [sys.executable, "tools/fuzz.py", "--seconds", "100", *FUZZ_JSON],
}
BARS = [*TESTS, *COMMANDS]


def git(*arguments: str) -> str:
    """Return what git prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def code_hash() -> str:
    """Return a hash of all tracked files, as they lie here, except documents."""
    total = hashlib.sha256()
    for name in sorted(git("ls-files", "-z").split("\0")):
        path = ROOT / name
        if not name or name.startswith("docs/") or path.suffix == ".md" or not path.is_file():
            continue
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Return the properties of this machine that figures depend on."""
    cpu = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    flags = [flag for flag in cpu.get("flags", "").split() if flag.startswith(("avx", "fma", "sse4"))]
    return {
        "cpu": cpu.get("model name"),
        "flags": flags,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("pyarrow", "pyspark", "tensorflow-cpu")},
    }


def run(bar: str, code: str) -> dict[str, Any]:
    """Run one bar and keep its result if it passed."""
    kept = KEPT / code / f"{bar}.json"
    figures = kept.with_suffix(".figures")
    kept.parent.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    if bar in TESTS:
        files = [f"pyspark-shim/tests/test_{name}.py" for name in TESTS[bar].split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--bar", bar, *files]
    else:
        command = COMMANDS[bar]
    environ = {**os.environ, "FLIGHTSVC_PROVE": "1", "FLIGHTSVC_FIGURES": str(figures)}
    print(f"== {bar}: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    try:
        ok = subprocess.run(command, cwd=ROOT, env=environ, timeout=BAR_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{bar}: not done after {BAR_SECONDS} s")
        ok = False
    result = {
        "ok": ok,
        "seconds": round(time.monotonic() - started),
        "figures": json.loads(figures.read_text()) if figures.exists() else {},
    }
    if ok:
        kept.write_text(json.dumps(result))
    return result


def main(wanted: list[str]) -> int:
    """Run the wanted bars, or all that are missing, and write the summary."""
    for name in wanted:
        if name not in BARS:
            print(f"there is no bar {name!r}; there are {', '.join(BARS)}")
            return 2
    code = code_hash()
    results = {}
    for bar in BARS:
        kept = KEPT / code / f"{bar}.json"
        if kept.exists() and bar not in wanted:
            results[bar] = json.loads(kept.read_text())
        elif not wanted or bar in wanted:
            results[bar] = run(bar, code)
    summary = {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "hash": code,
        "machine": machine(),
        "bars": results,
    }
    (ROOT / "build" / "prove.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\nbar             seconds  result")
    for bar in BARS:
        result = results.get(bar)
        text = "not run" if result is None else "ok" if result["ok"] else "FAILED"
        print(f"{bar:<14} {result['seconds'] if result else 0:8}  {text}")
        for name, value in (result or {}).get("figures", {}).items():
            print(f"{'':14}{name}: {value}")
    print(f"\nhash {code}; build/prove.json has all results")
    return int(len(results) < len(BARS) or not all(result["ok"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
