# mypy: disable-error-code="import-untyped,misc,untyped-decorator"
"""Write the small SavedModels that the tests of every language share.

Usage: ``python make_models.py OUT_DIR``. Each model is deterministic and lies in ``OUT_DIR/<name>``; one that
is already there is left alone. A model is written beside its place and renamed into it: a reader never sees
half. Tensors are float32 unless said otherwise; -1 is any number of rows. Signature ``serving_default``:

- ``mlp``: x [-1, 512] -> y [-1, 10], the softmax of a dense network 512-64-10
- ``two``: a [-1, 8], b [-1, 4] -> sum [-1, 5], logits [-1, 3]; its second signature, ``flipped``, calls the
  same two total and scores
- ``strings``: s string [-1] -> upper string [-1] (ASCII upper case), length int64 [-1] (bytes)
- ``ints``: i int64 [-1, 3] -> doubled int64 [-1, 3], total int64 [-1]
- ``pictures``: image [-1, 32, 32, 3] -> mean [-1, 3], of each channel
- ``echo``: image [-1, -1, -1, -1] -> same, the image itself
- ``bytes``: image uint8 [-1, 16, 24, 3] -> total int64 [-1], the sum of its values
- ``slow``: x [-1, 1] -> y [-1, 1], x itself after max(x) turns of a loop of a few microseconds each
- ``nested``: x [-1, 2, 3] -> y [-1, 3, 2], transposed
- ``vocabulary``: word string [-1] -> id int64 [-1], position int32 [-1], written string [-1]; its five words
  lie in an asset, other words fall into two further ids, position -1 and "?"
- ``mixed``: a [-1, 4], b int32 [-1], c bool [-1, 2], d string [-1], e float64 [-1, 2, 2] -> score [-1],
  picked int64 [-1, 2], label string [-1, 2], sure bool [-1]
- ``loop``: n int64 [-1], positive -> steps int64 [-1], peak int64 [-1], of the Collatz sequence down to 1
- ``strict``: x [-1], text string [-1] -> root [-1], number float64 [-1]; it refuses an x below 0 and a text
  that is no number
- ``sums``: x [-1, -1] -> total [-1], width int64 [-1]
- ``meeting``: x [-1, 1] -> y [-1, 1], x itself once two runs have begun; it assigns a variable, so no server
  runs it
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf


def weights(seed: int, rows: int, columns: int) -> tf.Variable:
    """One seeded dense kernel, scaled to keep activations near 1."""
    values = tf.random.stateless_normal((rows, columns), seed=(seed, 0), stddev=rows**-0.5)
    return tf.Variable(values, trainable=False)


def spec(name: str, *shape: int | None, dtype: tf.DType = tf.float32) -> tf.TensorSpec:
    """An input with any number of rows, each of the given shape."""
    return tf.TensorSpec((None, *shape), dtype, name=name)


class Mlp(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = weights(1, 512, 64), weights(2, 64, 10)
        self.bias = tf.Variable(tf.linspace(-0.5, 0.5, 64), trainable=False)

    @tf.function(input_signature=[spec("x", 512)])
    def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.nn.softmax(tf.nn.relu(x @ self.hidden + self.bias) @ self.out)}


class Two(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_a, self.of_b = weights(3, 8, 5), weights(4, 4, 5)
        self.head = weights(5, 5, 3)

    def network(self, a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        total = a @ self.of_a + b @ self.of_b
        return total, tf.nn.tanh(total) @ self.head

    @tf.function(input_signature=[spec("a", 8), spec("b", 4)])
    def serve(self, a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        total, logits = self.network(a, b)
        return {"sum": total, "logits": logits}

    @tf.function(input_signature=[spec("a", 8), spec("b", 4)])
    def flipped(self, a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        total, logits = self.network(a, b)
        return {"scores": logits, "total": total}


class Strings(tf.Module):
    @tf.function(input_signature=[spec("s", dtype=tf.string)])
    def serve(self, s: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"upper": tf.strings.upper(s), "length": tf.cast(tf.strings.length(s), tf.int64)}


class Ints(tf.Module):
    @tf.function(input_signature=[spec("i", 3, dtype=tf.int64)])
    def serve(self, i: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"doubled": i * 2, "total": tf.reduce_sum(i, axis=1)}


class Pictures(tf.Module):
    @tf.function(input_signature=[spec("image", 32, 32, 3)])
    def serve(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"mean": tf.reduce_mean(image, axis=(1, 2))}


class Slow(tf.Module):
    @tf.function(input_signature=[spec("x", 1)])
    def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        turns = tf.cast(tf.reduce_max(x), tf.int64)
        _, y = tf.while_loop(
            lambda n, _: n < turns,
            lambda n, y: (n + 1, tf.reverse(y, axis=[1])),  # a row of one value reversed is itself
            (tf.constant(0, tf.int64), x),
            parallel_iterations=1,
        )
        return {"y": y}


class Nested(tf.Module):
    @tf.function(input_signature=[spec("x", 2, 3)])
    def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.transpose(x, (0, 2, 1))}


class Counter(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = tf.Variable(0.0)

    @tf.function(input_signature=[spec("x", 1)])
    def pure(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x + self.seen}

    @tf.function(input_signature=[spec("x", 1)])
    def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        self.seen.assign_add(1.0)
        return self.pure(x)


class Meeting(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begun = tf.Variable(0.0)

    @tf.function(input_signature=[spec("x", 1)])
    def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        self.begun.assign_add(1.0)
        turns = tf.while_loop(lambda n: self.begun < 2.0, lambda n: (n + 1.0,), (tf.constant(0.0),))
        return {"y": x + 0.0 * turns[0]}


WORDS = ("apple", "pear", "fig", "quince", "Fr\u00fcchte")


class Vocabulary(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()  # as long as this module: saving copies the file
        words = Path(self.folder.name, "words.txt")
        words.write_text("".join(f"{word}\n" for word in WORDS))
        asset = self.asset = tf.saved_model.Asset(str(words))

        def lines(key: str, value: str) -> tf.lookup.TextFileInitializer:
            index = {"word": tf.lookup.TextFileIndex.WHOLE_LINE, "line": tf.lookup.TextFileIndex.LINE_NUMBER}
            types = {"word": tf.string, "line": tf.int64}
            return tf.lookup.TextFileInitializer(
                asset.asset_path, types[key], index[key], types[value], index[value]
            )

        self.ids = tf.lookup.StaticVocabularyTable(lines("word", "line"), num_oov_buckets=2)
        self.places = tf.lookup.StaticHashTable(lines("word", "line"), default_value=-1)
        self.words = tf.lookup.StaticHashTable(lines("line", "word"), default_value="?")

    @tf.function(input_signature=[spec("word", dtype=tf.string)])
    def serve(self, word: tf.Tensor) -> dict[str, tf.Tensor]:
        place = self.places.lookup(word)
        return {
            "id": self.ids.lookup(word),
            "position": tf.cast(place, tf.int32),
            "written": self.words.lookup(place),
        }


class Mixed(tf.Module):
    @tf.function(
        input_signature=[
            spec("a", 4),
            spec("b", dtype=tf.int32),
            spec("c", 2, dtype=tf.bool),
            spec("d", dtype=tf.string),
            spec("e", 2, 2, dtype=tf.float64),
        ]
    )
    def serve(
        self, a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor, e: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        score = tf.reduce_sum(a * a, axis=1) + tf.cast(tf.linalg.trace(e), tf.float32)
        return {
            "score": score,
            "picked": tf.where(c, tf.cast(b, tf.int64)[:, tf.newaxis], tf.constant(-1, tf.int64)),
            "label": tf.strings.join(
                [tf.stack([d, tf.strings.upper(d)], axis=1), tf.strings.as_string(c)], ":"
            ),
            "sure": tf.reduce_all(c, axis=1),
        }


class Loop(tf.Module):
    @tf.function(input_signature=[spec("n", dtype=tf.int64)])
    def serve(self, n: tf.Tensor) -> dict[str, tf.Tensor]:
        def step(n: tf.Tensor, steps: tf.Tensor, peak: tf.Tensor) -> tuple[tf.Tensor, ...]:
            following = tf.where(n % 2 == 0, n // 2, 3 * n + 1)
            n, steps = tf.where(n > 1, following, n), steps + tf.cast(n > 1, tf.int64)
            return n, steps, tf.maximum(peak, n)

        _, steps, peak = tf.while_loop(
            lambda n, *_: tf.reduce_any(n > 1), step, (n, tf.zeros_like(n), n), parallel_iterations=1
        )
        return {"steps": steps, "peak": peak}


class Strict(tf.Module):
    @tf.function(input_signature=[spec("x"), spec("text", dtype=tf.string)])
    def serve(self, x: tf.Tensor, text: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, "x must not be negative")]):
            return {"root": tf.sqrt(x), "number": tf.strings.to_number(text, tf.float64)}


class Echo(tf.Module):
    @tf.function(input_signature=[spec("image", None, None, None)])
    def serve(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"same": tf.identity(image)}


class Bytes(tf.Module):
    @tf.function(input_signature=[spec("image", 16, 24, 3, dtype=tf.uint8)])
    def serve(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"total": tf.reduce_sum(tf.cast(image, tf.int64), axis=[1, 2, 3])}


class Sums(tf.Module):
    @tf.function(input_signature=[spec("x", None)])
    def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        width = tf.fill(tf.shape(x)[:1], tf.shape(x, tf.int64)[1])
        return {"total": tf.reduce_sum(x, axis=1), "width": width}


MODELS: dict[str, Callable[[], tf.Module]] = {
    "mlp": Mlp,
    "two": Two,
    "strings": Strings,
    "ints": Ints,
    "pictures": Pictures,
    "echo": Echo,
    "bytes": Bytes,
    "slow": Slow,
    "nested": Nested,
    "counter": Counter,
    "vocabulary": Vocabulary,
    "mixed": Mixed,
    "loop": Loop,
    "strict": Strict,
    "sums": Sums,
    "meeting": Meeting,
}


def make(out_dir: Path) -> None:
    """Write every model that OUT_DIR lacks."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, build in MODELS.items():
        place = out_dir / name
        if place.exists():
            continue
        module = build()
        signatures = {"serving_default": module.serve}
        for further in ("flipped", "pure"):
            if hasattr(module, further):
                signatures[further] = getattr(module, further)
        beside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out_dir))
        try:
            tf.saved_model.save(module, str(beside), signatures=signatures)
            beside.chmod(0o755)
            beside.rename(place)
        except OSError:
            if not place.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        print(place)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
