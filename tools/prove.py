"""Runs every promise at its full count and keeps the results in build/prove.json.

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

TESTS = "pyspark-shim/tests"
FUZZ_JSON = [
    "FuzzAction",
    "FuzzCriteria",
    "FuzzLease",
    "FuzzMapping",
    "FuzzParseDescriptor",
    "FuzzPutCommand",
    "FuzzTensorShape",
]
BARS = {
    "equality": [f"{TESTS}/test_equality.py"],
    "soak": [f"{TESTS}/test_soak.py"],
    "latency": ["benchmarks/latency.py"],
    "kills-executors": [f"{TESTS}/test_kills.py", "-k", "executor and not lost"],
    "kills-lost": [f"{TESTS}/test_kills.py", "-k", "lost or early"],
    "kills-programs": [f"{TESTS}/test_kills.py", "-k", "front or runner or python_is"],
    "kills-jobs": [f"{TESTS}/test_kills.py", "-k", "session or cancelled"],
    "kills-drivers": [f"{TESTS}/test_kills.py", "-k", "driver"],
    "bad-input": [f"{TESTS}/test_bad_input.py", f"{TESTS}/test_errors.py", f"{TESTS}/test_timeouts.py"],
    "models": [f"{TESTS}/test_models.py", f"{TESTS}/test_types.py"],
    "property": [f"{TESTS}/test_property.py"],
    "sql": [f"{TESTS}/test_sql.py"],
    "shipping": [f"{TESTS}/test_shipping.py", f"{TESTS}/test_keras.py"],
    "preprocess": [f"{TESTS}/test_preprocess.py", f"{TESTS}/test_image.py"],
    "pictures": [f"{TESTS}/test_pictures.py"],
    "together": [f"{TESTS}/test_together.py"],
    "pool": [f"{TESTS}/test_pool.py"],
    "swap": [f"{TESTS}/test_swap.py"],
    "gpu": [f"{TESTS}/test_gpu.py"],
    "plugin": [f"{TESTS}/test_plugin.py"],
    "clusters": [f"{TESTS}/test_clusters.py", "-k", "not 3_5 and not plugin"],
    "clusters-3.5": [
        f"{TESTS}/test_columns.py",
        f"{TESTS}/test_clusters.py",
        "-k",
        "columns or 3_5 or plugin",
    ],
    "stages": [f"{TESTS}/test_ml.py", f"{TESTS}/test_loading.py", f"{TESTS}/test_graph.py"],
    "predictor": [f"{TESTS}/test_deep_image.py"],
    "networks": [f"{TESTS}/test_networks.py", "-k", "not every_network_answers"],
    "networks-sparkdl": [
        f"{TESTS}/test_networks.py",
        "-k",
        "every_network_answers and (Inception or Xception or VGG or ResNet50)",
    ],
    "networks-efficient": [
        f"{TESTS}/test_networks.py",
        "-k",
        "every_network_answers and Efficient and not (B4 or B5 or B6 or V2S)",
    ],
    "networks-efficient-large": [
        f"{TESTS}/test_networks.py",
        "-k",
        "every_network_answers and (EfficientNetB4 or EfficientNetB5 or EfficientNetB6 or EfficientNetV2S)",
    ],
    "networks-others": [
        f"{TESTS}/test_networks.py",
        "-k",
        "every_network_answers and not (Inception or Xception or VGG or ResNet50 or Efficient)",
    ],
    "transfer": [f"{TESTS}/test_notebook.py", f"{TESTS}/test_docs.py"],
    "featurizer-memory": [f"{TESTS}/test_featurizer_memory.py"],
    "sparkdl": [
        f"{TESTS}/test_sparkdl_{part}.py"
        for part in ("graph", "image", "names", "param", "transformers", "udf")
    ],
    "wheel": [f"{TESTS}/test_wheel.py", f"{TESTS}/test_deploy.py"],
    "bench-pictures": ["benchmarks/pictures.py"],
    "bench-quick": ["benchmarks/quick.py"],
    "bench-tuning": ["benchmarks/tuning.py"],
    "fuzz-streams": ["tools/fuzz.py", "--seconds", "300", "FuzzStream", "FuzzChunks"],
    "fuzz-files": [
        "tools/fuzz.py",
        "--seconds",
        "200",
        "FuzzUnpack",
        "FuzzParse",
        "FuzzHeader",
        "FuzzFrame",
        "FuzzWarmup",
    ],
    "fuzz-json": ["tools/fuzz.py", "--seconds", "100", *FUZZ_JSON],
}


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
    """Return what the figures depend on."""
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
    script = BARS[bar]
    command = [sys.executable, *(["-m", "pytest", "-q", "-x"] if "tests/" in script[0] else []), *script]
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
    """Run what is wanted, or missing, and write the summary."""
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
    print(f"\nhash {code}; all of it in build/prove.json")
    return int(len(results) < len(BARS) or not all(result["ok"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
