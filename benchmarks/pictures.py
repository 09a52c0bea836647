"""Decoding and resizing pictures: flightsvc against the same TensorFlow kernels in one `tf.data` pipeline.

Both make batches of tensors of the same JPEG files from memory, on two cores: ours in Go, in two goroutines;
the pipeline from Python, with a parallel map over two threads. They take turns, and ratios are taken within
each turn. Prints a table, writes build/bench/pictures.json, and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import tensorflow as tf
from crops import crops
from record import ROOT, keep, machine, place

BATCH, SIZE, THREADS = 32, 224, 2
RATIO_BOUND = 0.9
DIFFERENCE_BOUND = 1e-5
"""Largest allowed difference of a value between -1 and 1."""

PROGRAM = ROOT / "build" / "bench" / "pictures"
TENSOR = ROOT / "build" / "bench" / "pictures.tensor"


Seconds = tuple[float, float]
"""Wall-clock time and CPU time of a run."""


def pipeline(files: list[Path]) -> tuple[Callable[[], Seconds], np.ndarray]:
    """Return a function that runs the `tf.data` pipeline once, and its first batch."""

    def picture(content: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_jpeg(content, channels=3)
        height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
        side = tf.minimum(height, width)
        box = tf.image.crop_to_bounding_box(pixels, (height - side) // 2, (width - side) // 2, side, side)
        return tf.image.resize(box, [SIZE, SIZE]) / 128 - 127 / 128

    contents = tf.data.Dataset.from_tensor_slices([file.read_bytes() for file in files])
    batches = contents.map(picture, num_parallel_calls=THREADS).batch(BATCH).prefetch(1)

    def turn() -> Seconds:
        began, used = time.perf_counter(), time.process_time()
        for _ in batches:
            pass
        return time.perf_counter() - began, time.process_time() - used

    return turn, next(iter(batches)).numpy()


@contextmanager
def goroutines(files: list[Path]) -> Iterator[Callable[[], Seconds]]:
    """Yield a function that makes the Go program process the files once."""
    command = [str(PROGRAM), str(TENSOR), *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None and program.stdout is not None

        def turn() -> Seconds:
            program.stdin.write("\n")
            program.stdin.flush()
            line = program.stdout.readline()
            if not line:
                sys.exit("bench-pictures: the Go program failed")
            seconds, used = map(float, line.split())
            return seconds, used

        yield turn
        program.stdin.close()


def measure(images: int, rounds: int) -> dict[str, Any]:
    """Run both alternately and return the results."""
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["go", "build", "-o", str(PROGRAM), "./benchmarks/pictures"], cwd=ROOT, check=True)
    files = sorted(crops(images).iterdir())
    figures: dict[str, Any] = {"images": images, "rounds": rounds}
    theirs, expected = pipeline(files)
    with goroutines(files) as ours:
        theirs(), ours()  # warm
        turns = [(ours(), theirs()) for _ in range(rounds)]
    found = np.fromfile(TENSOR, np.float32).reshape(expected.shape)
    TENSOR.unlink()
    ratios = [round(other / own, 3) for (own, _), (other, _) in turns]
    figures |= {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_difference": float(np.abs(found - expected).max()),
        "machine": machine("tensorflow-cpu", "numpy"),
    }
    for name, own in zip(("ours", "tf_data"), zip(*turns, strict=True), strict=True):
        figures[f"{name}_images_per_s"] = round(images / statistics.median(s for s, _ in own))
        figures[f"{name}_processor_ms"] = round(statistics.median(used for _, used in own) * 1000 / images, 2)
    return figures


def main() -> int:
    """Measure, print, keep, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    figures = measure(arguments.images, arguments.rounds)
    print("         images/s   ms of the processor for each")
    for name in ("ours", "tf_data"):
        print(f"{name:<8} {figures[f'{name}_images_per_s']:8} {figures[f'{name}_processor_ms']:20}")
    print(f"ratio {figures['ratio']}, of turns {min(figures['ratios'])} to {max(figures['ratios'])}")
    print(f"largest difference of a value {figures['largest_difference']:.1e}")
    print(place(figures["machine"]))
    keep("pictures", figures)
    missed = []
    if figures["ratio"] < RATIO_BOUND:
        missed.append(f"ratio is {figures['ratio']}, less than {RATIO_BOUND}")
    if figures["largest_difference"] > DIFFERENCE_BOUND:
        missed.append(f"tensors differ by {figures['largest_difference']:.1e}, more than {DIFFERENCE_BOUND}")
    print("\n".join(missed) or f"at least {RATIO_BOUND} of tf.data, with the same tensors")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
