# mypy: disable-error-code="import-untyped,misc,untyped-decorator"
"""Random SavedModels whose outputs can be computed row by row, with TensorFlow in Python beside them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = (*SIGNED, *UNSIGNED, *FLOATS, "bool", "string")
DENSE = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Input:
    """An input: its element type, and the dimensions after the first, ``None`` where unknown.

    ``tame`` inputs feed sums of floats, so their values are positive and small. ``numbers`` are texts that
    the model reads as numbers: it refuses other texts. ``lengths_of`` names the input whose lengths it takes.
    """

    name: str
    dtype: str
    dims: tuple[int | None, ...]
    tame: bool = False
    numbers: bool = False
    lengths_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """An output: ``rank_known`` is whether the SavedModel says how many dimensions it has."""

    name: str
    dtype: str
    dims: tuple[int | None, ...]
    op: str
    exact: bool
    rank_known: bool


@dataclasses.dataclass(frozen=True)
class Made:
    """A model that was written to ``folder``; ``run`` is TensorFlow in Python."""

    folder: Path
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Op:
    """What an output may do with one input."""

    name: str
    fits: Callable[[Input], bool]
    build: Callable[[tf.Tensor], tf.Tensor]
    exact: bool = True
    rank_known: bool = True


def whole(x: Input) -> bool:
    return x.dtype in (*SIGNED, *UNSIGNED)


def text(x: Input) -> bool:
    return x.dtype == "string"


def total(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(x, tf.int64), axis=list(range(1, len(x.shape))))


def dense(x: tf.Tensor) -> tf.Tensor:
    width = int(np.prod(x.shape[1:]))
    kernel = np.linspace(0.1, 1.0, width * 3).reshape(width, 3)
    return tf.reshape(x, (-1, width)) @ tf.constant(kernel, x.dtype)


def casts() -> list[Op]:
    """Casts that are defined for every value: between integers and to floats, and between floats."""
    ops = []
    for to in (*SIGNED, *UNSIGNED, *FLOATS, "bool"):
        fits: Callable[[Input], bool] = lambda x: whole(x) or x.dtype == "bool"  # noqa: E731
        if to in FLOATS:
            fits = lambda x: x.dtype != "string"  # noqa: E731
        ops.append(Op(f"to {to}", fits, lambda x, to=to: tf.cast(x, to)))
    return ops


OPS = (
    Op("same", lambda _: True, tf.identity),
    Op("same, rank unknown", lambda _: True, lambda x: tf.compat.v1.placeholder_with_default(x, None),
       rank_known=False),
    Op("transposed", lambda x: len(x.dims) >= 2,
       lambda x: tf.transpose(x, [0, *reversed(range(1, len(x.shape)))])),
    Op("reversed", lambda x: len(x.dims) >= 1, lambda x: tf.reverse(x, [1])),
    Op("deeper", lambda x: len(x.dims) < 3, lambda x: tf.expand_dims(x, -1)),
    Op("total", lambda x: whole(x) or x.dtype == "bool", total),
    Op("largest", lambda x: whole(x) and len(x.dims) >= 1, lambda x: tf.reduce_max(x, axis=1)),
    Op("not zero", lambda _: True, lambda x: tf.not_equal(x, tf.zeros_like(x))),
    Op("width", lambda x: len(x.dims) >= 1, lambda x: tf.fill(tf.shape(x)[:1], tf.shape(x)[1])),
    Op("as text", whole, tf.strings.as_string),
    Op("upper", text, tf.strings.upper),
    Op("size", text, tf.strings.length),
    Op("twice", text, lambda x: tf.strings.join([x, x])),
    Op("bucket", text, lambda x: tf.strings.to_hash_bucket_fast(x, 1000)),
    Op("dense", lambda x: x.tame and len(x.dims) >= 1 and None not in x.dims, dense, exact=False),
    Op("mean", lambda x: x.tame and len(x.dims) >= 1, lambda x: tf.reduce_mean(x, axis=-1), exact=False),
    Op("softmax", lambda x: x.tame and len(x.dims) >= 1, tf.nn.softmax, exact=False),
    *casts(),
)  # fmt: skip
NUMBER = Op("number", lambda x: x.numbers, lambda x: tf.strings.to_number(x, tf.float64))


def random_dims(rng: np.random.Generator) -> tuple[int | None, ...]:
    return tuple(None if rng.random() < 0.25 else int(rng.integers(1, 5)) for _ in range(rng.integers(0, 4)))


def random_inputs(rng: np.random.Generator, number: int) -> list[Input]:
    inputs = []
    for i in range(int(rng.integers(1, 5))):
        dtype = DTYPES[number % len(DTYPES)] if i == 0 else str(rng.choice(DTYPES))
        dims = random_dims(rng)
        tame = dtype in DENSE and bool(rng.random() < 0.5)
        numbers = dtype == "string" and bool(rng.random() < 0.4)
        inputs.append(Input(f"i{i}", dtype, dims, tame, numbers))
    deep = [x for x in inputs if x.dims and not x.numbers]
    if deep and len(inputs) < 4 and rng.random() < 0.5:
        of = deep[int(rng.integers(len(deep)))].name
        inputs.append(Input("n", str(rng.choice(["int32", "int64"])), (), lengths_of=of))
    return inputs


def make(rng: np.random.Generator, number: int, folder: Path) -> Made:
    """Write model ``number`` to ``folder``: 1 to 4 inputs of any type, 1 to 4 outputs."""
    inputs = random_inputs(rng, number)
    chosen: list[tuple[Input, Op]] = [(x, NUMBER) for x in inputs if x.numbers]
    while len(chosen) < int(rng.integers(1, 5)):
        x = inputs[int(rng.integers(len(inputs)))]
        fitting = [op for op in OPS if op.fits(x)]
        chosen.append((x, fitting[int(rng.integers(len(fitting)))]))

    specs = [tf.TensorSpec((None, *x.dims), x.dtype, name=x.name) for x in inputs]

    @tf.function(input_signature=specs, autograph=False)
    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        given = dict(zip((x.name for x in inputs), tensors, strict=True))
        return {f"o{i}": op.build(given[x.name]) for i, (x, op) in enumerate(chosen)}

    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})
    shapes = serve.get_concrete_function().structured_outputs
    outputs = tuple(
        Output(
            name=f"o{i}",
            dtype=shapes[f"o{i}"].dtype.name,
            dims=tuple(shapes[f"o{i}"].shape[1:]) if op.rank_known else x.dims,
            op=f"{op.name} of {x.name}",
            exact=op.exact,
            rank_known=op.rank_known,
        )
        for i, (x, op) in enumerate(chosen)
    )

    def run(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        got = serve(*(tf.constant(tensors[x.name], x.dtype) for x in inputs))
        return {name: value.numpy() for name, value in got.items()}

    return Made(folder, tuple(inputs), outputs, run)
