"""What tuning finds for EfficientNet-Lite0 and MobileNetV2, against the best configuration and a bare loop.

`flightsvc tune` searches. What it chose, what else was fast, and each of frozen
or not and oneDNN on or off are then measured again in turns, each in a runner of its own; a bare loop over
the session in the chosen configuration (`session/`) takes its turn beside the runner. Ratios are taken within
each round. Prints tables, writes build/bench/tuning.json, and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, keep, machine, place

from flightsvc.ml.networks import lite0

CHOSEN_BOUND = 0.95
"""Least speed of the chosen configuration, as a fraction of the fastest one."""
RAW_BOUND = 0.97
"""Least speed of a runner, as a fraction of the bare session loop."""
WINDOW_MS, WINDOWS = 600, 4
SECONDS = 540
"""No round starts that would probably end after this many seconds of one model."""
FLAGS = ("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile")

SESSION = ROOT / "build" / "bench" / "session"
FIELDS = ("frozen", "onednn", "cores", "num_batch_threads", "max_batch_size")

Choice = tuple[str, bool, int, int, int]
"""The fields of `FIELDS`: digest of the frozen model or "", oneDNN, threads, runs at once, rows of a run."""


def export_mobilenet(folder: Path) -> None:
    """Write MobileNetV2 with random weights, the same ones each time."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    model = keras.applications.MobileNetV2(weights=None)
    serve = tf.function(
        lambda image: {"probabilities": model(image, training=False)},
        input_signature=[tf.TensorSpec([None, 224, 224, 3], tf.float32, name="image")],
    )
    served = tf.Module()
    served.variables_read = [variable.value for variable in model.variables]
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        tf.saved_model.save(served, f"{beside}/model", signatures={"serving_default": serve})
        Path(f"{beside}/model").rename(folder)


def tensors(model: Path) -> tuple[str, str]:
    """Return the graph's tensors that are fed and fetched."""
    from tensorflow.core.protobuf import saved_model_pb2

    [meta] = saved_model_pb2.SavedModel.FromString((model / "saved_model.pb").read_bytes()).meta_graphs
    signature = meta.signature_def["serving_default"]
    [fed], [fetched] = signature.inputs.values(), signature.outputs.values()
    return fed.name, fetched.name


class Bench:
    """One model, in a front and a cache folder of its own."""

    def __init__(self, model: Path, run_dir: Path) -> None:
        self.model, self.run_dir = model, run_dir
        self.fed, self.fetched = tensors(model)
        self.environ = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
        self.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "FLIGHTSVC_CACHE_DIR": str(run_dir / "cache")}
        self.environ |= {"VIRTUAL_ENV": sys.prefix}

    def tune(self, *options: str) -> dict[str, Any]:
        """Run ``flightsvc tune`` against a new front."""
        front = subprocess.Popen(
            [ROOT / "bin" / "flightsvc", "serve", "--run-dir", str(self.run_dir), "--log-level", "warn"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environ,
        )
        assert front.stdout is not None
        try:
            endpoint = json.loads(front.stdout.readline())["endpoint"]
            command = [ROOT / "bin" / "flightsvc", "tune", str(self.model), "--json", "--endpoint", endpoint]
            done = subprocess.run([*command, *options], env=self.environ, stdout=subprocess.PIPE, check=True)
        finally:
            front.terminate()
            front.wait(60)
        return dict(json.loads(done.stdout))

    def folder(self, choice: Choice) -> Path:
        """Return the SavedModel of a choice."""
        return (
            self.run_dir / "cache" / "models" / choice[0].removeprefix("sha256:") if choice[0] else self.model
        )

    def _environ(self, choice: Choice) -> dict[str, str]:
        library = os.environ.get("LD_LIBRARY_PATH") or str(ROOT / "build" / "libtensorflow")
        return self.environ | {"TF_ENABLE_ONEDNN_OPTS": str(int(choice[1])), "LD_LIBRARY_PATH": library}

    def runner(self, choice: Choice) -> float:
        """Return the rows/s of a runner."""
        _, _, cores, callers, batch = choice
        with tempfile.TemporaryDirectory() as answers:
            measure = {
                "signature": "serving_default",
                "batch_sizes": [batch],
                "window": WINDOW_MS * 1_000_000,
                "windows": WINDOWS,
                "seed": 1,
                "folder": answers,
            }
            setup = {
                "model": self.model.name,
                "dir": str(self.folder(choice)),
                "log_level": "error",
                "cores": cores,
                "batching": {"num_batch_threads": callers},
                "measure": measure,
            }
            runner = subprocess.Popen(
                [ROOT / "bin" / "flightsvc-runner"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._environ(choice),
            )
            assert runner.stdin is not None and runner.stdout is not None
            runner.stdin.write(json.dumps(setup).encode() + b"\n")
            runner.stdin.flush()
            reports = [json.loads(line) for line in runner.stdout]
            runner.stdin.close()
            runner.wait(60)
        if "measured" not in reports[-1]:
            raise SystemExit(reports[-1]["error"])
        [measured] = reports[-1]["measured"]
        return float(measured["median"])

    def raw(self, choice: Choice) -> float:
        """Return the rows/s of the bare session."""
        _, _, cores, callers, batch = choice
        command = [
            SESSION,
            *(
                "-model",
                self.folder(choice),
                "-tensor",
                self.fed,
                "-shape",
                "224,224,3",
                "-fetch",
                self.fetched,
            ),
            *("-batch", str(batch), "-cores", str(cores), "-callers", str(callers)),
            *("-window", f"{WINDOW_MS}ms", "-windows", str(WINDOWS)),
        ]
        done = subprocess.run(
            command, env=self._environ(choice), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        return statistics.median(sorted(json.loads(done.stdout)))


def choice_of(candidate: dict[str, Any]) -> Choice:
    """Return the configuration of a candidate."""
    frozen, onednn, cores, callers, batch = (candidate.get(field) for field in FIELDS)
    return (frozen or "", bool(onednn), cores, callers, batch)


def measure(name: str, model: Path, rounds: int, run_dir: Path) -> dict[str, Any]:
    """Tune a model and measure the results again."""
    began = time.monotonic()
    bench = Bench(model, run_dir)
    search = bench.tune()
    searched = time.monotonic() - began
    print(f"{name}: searched after {searched:.0f} s", flush=True)
    chosen, default = choice_of(search["chosen"]), choice_of(search["default"])
    agreeing = [choice_of(c) for c in search["candidates"] if c["agrees"]]
    frozen = next((c[0] for c in agreeing if c[0]), "")
    grid = [(graph, on, *chosen[2:]) for graph in dict.fromkeys(["", frozen]) for on in (False, True)]
    others = [*agreeing[:2], default, *grid]
    others = [c for c in dict.fromkeys(others) if c != chosen]
    speeds: dict[Choice, list[float]] = {c: [] for c in [chosen, *others]}
    raw: list[float] = []
    took = 0.0
    for number in range(rounds):
        turn = time.monotonic()
        if number >= 2 and turn - began + took > SECONDS:
            break
        pair = [lambda: raw.append(bench.raw(chosen)), lambda: speeds[chosen].append(bench.runner(chosen))]
        for measured in pair if number % 2 else reversed(pair):
            measured()
        for other in others:
            speeds[other].append(bench.runner(other))
        took = time.monotonic() - turn
        print(f"{name}: round {number + 1} took {took:.0f} s", flush=True)
    median = {c: statistics.median(of) for c, of in speeds.items()}
    best = max(median, key=lambda c: median[c])

    def ratio(left: list[float], right: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(left, right, strict=True)), 3)

    return {
        "chosen": dict(zip(FIELDS, chosen, strict=True)),
        "best": dict(zip(FIELDS, best, strict=True)),
        "rounds": len(raw),
        "chosen_to_best": ratio(speeds[chosen], speeds[best]),
        "chosen_to_default": ratio(speeds[chosen], speeds[default]),
        "runner_to_raw": ratio(speeds[chosen], raw),
        "raw_rows_per_s": round(statistics.median(raw), 1),
        "rows_per_s": [
            {**dict(zip(FIELDS, c, strict=True)), "median": round(v, 1)} for c, v in median.items()
        ],
        "grid": [
            {"frozen": bool(c[0]), "onednn": c[1], "rows_per_s": round(median[c], 1)}
            for c in dict.fromkeys(grid)
        ],
        "freezing": {
            f"onednn_{on}": ratio(speeds[(frozen, on, *chosen[2:])], speeds[("", on, *chosen[2:])])
            for on in (False, True)
        },
        "onednn": {
            ("frozen" if graph else "as_is"): ratio(
                speeds[(graph, True, *chosen[2:])], speeds[(graph, False, *chosen[2:])]
            )
            for graph in dict.fromkeys(["", frozen])
        },
        "candidates": search["candidates"],
        "search_seconds": round(searched),
    }


def show(name: str, of: dict[str, Any]) -> None:
    """Print the tables of one model."""

    def words(c: dict[str, Any]) -> str:
        graph, on = "frozen" if c["frozen"] else "as it is", "on" if c["onednn"] else "off"
        rows = f"{c['num_batch_threads']} at once, batches of {c['max_batch_size']}"
        return f"{graph:<8}  oneDNN {on:<3}  {c['cores']} threads, {rows}"

    print(f"\n{name}, {of['rounds']} rounds")
    for c in sorted(of["rows_per_s"], key=lambda c: -c["median"]):
        mark = "*" if all(c[field] == of["chosen"][field] for field in FIELDS) else " "
        print(f" {mark} {words(c):<62} {c['median']:8.1f} rows/s")
    print(f"   {'raw session loop in the chosen configuration':<62} {of['raw_rows_per_s']:8.1f} rows/s")
    print(f"   freezing: {of['freezing']}; oneDNN: {of['onednn']}")
    print(
        f"   chosen: {of['chosen_to_best']} of the best, {of['chosen_to_default']} times the default; "
        f"runner: {of['runner_to_raw']} of the raw loop"
    )


def main() -> int:
    """Measure, print, keep, judge."""
    proving = os.environ.get("FLIGHTSVC_PROVE") == "1"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5 if proving else 2)
    parser.add_argument("--only", choices=("lite0", "mobilenet"))
    parser.add_argument("--export", metavar="DIR", help="write MobileNetV2 and nothing else")
    arguments = parser.parse_args()
    if arguments.export:
        export_mobilenet(Path(arguments.export))
        return 0
    SESSION.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["go", "build", "-o", str(SESSION), "./benchmarks/session"], cwd=ROOT, check=True)
    mobilenet = ROOT / "build" / "bench" / "mobilenet"
    if not mobilenet.exists():
        subprocess.run([sys.executable, __file__, "--export", str(mobilenet)], check=True)
    models = {"EfficientNet-Lite0": lite0.cached(), "MobileNetV2": mobilenet}
    if arguments.only:
        models = {k: v for k, v in models.items() if arguments.only in k.lower()}
    about = machine("tensorflow-cpu", "flightsvc")
    figures: dict[str, Any] = {"models": {}, "machine": about}
    for name, model in models.items():
        with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as run_dir:
            figures["models"][name] = measure(name, model, arguments.rounds, Path(run_dir))
        show(name, figures["models"][name])
    print(f"\n{place(about)}; flags {' '.join(flag for flag in FLAGS if flag in about['cpu_flags'])}")
    keep("tuning", figures)
    missed = []
    for name, of in figures["models"].items():
        for what, value, bound in (
            ("the chosen configuration reaches", of["chosen_to_best"], CHOSEN_BOUND),
            ("the runner reaches", of["runner_to_raw"], RAW_BOUND),
        ):
            if value < bound:
                missed.append(f"{name}: {what} {value}, less than {bound}")
    print(
        "\n".join(missed)
        or f"the choice is within {CHOSEN_BOUND} of the best, the runner within {RAW_BOUND} of a raw loop"
    )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
