"""Random columns for an input: what a cell says, written as any Arrow type that the input takes.

A cell is known before Arrow sees it: a value (nested lists, or raw bytes), null at some depth, bad, which
refuses its row, or one that the model itself refuses. What is expected never comes from reading Arrow back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from property_models import FLOATS, SIGNED, UNSIGNED, Input

Rng = np.random.Generator
OK, NULL, BAD = "ok", "null", "bad"
REFUSED = "refused by the model"
MOST_IN_A_LIST = 4

VECTOR = pa.struct(
    [
        ("type", pa.int8()),
        ("size", pa.int32()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)
INTEGERS = {name: getattr(pa, name)() for name in (*SIGNED, *UNSIGNED)}
INDICES = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()]


@dataclasses.dataclass(frozen=True)
class Cell:
    state: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Elements of a column: their Arrow type, and those values of it that the tensor can hold."""

    type: pa.DataType
    domain: Any  # numpy type of the values; object for strings
    values: Callable[[Rng, int], list[Any]]
    bad: tuple[Any, ...] = ()


def numpy_type(dtype: str) -> Any:
    return object if dtype == "string" else tf.as_dtype(dtype).as_numpy_dtype


def whole_numbers(low: int, high: int) -> Callable[[Rng, int], list[int]]:
    edges = [v for v in (low, high, 0, 1, -1, 7) if low <= v <= high]

    def values(rng: Rng, n: int) -> list[int]:
        kind = np.uint64 if high > 2**63 - 1 else np.int64
        wide = rng.integers(low, high, n, dtype=kind, endpoint=True).tolist()
        return [edges[int(rng.integers(len(edges)))] if rng.random() < 0.3 else v for v in wide]

    return values


def real_numbers(kind: Any, tame: bool, largest: float, special: bool) -> Callable[[Rng, int], list[float]]:
    """Numbers of a float type, none so small that some processors would flush it to zero."""

    def values(rng: Rng, n: int) -> list[float]:
        if tame:
            return list(rng.uniform(0.5, 4, n).astype(kind).tolist())
        signs = rng.choice([-1.0, 1.0], n)
        some = (signs * np.exp(rng.uniform(np.log(1e-3), np.log(largest), n))).astype(kind).tolist()
        odd = [0.0, -0.0, 1.0, *([float("nan"), float("inf"), float("-inf")] if special else [])]
        return [odd[int(rng.integers(len(odd)))] if rng.random() < 0.2 else v for v in some]

    return values


def texts(as_text: bool, numbers: bool, size: int | None = None) -> Callable[[Rng, int], list[Any]]:
    def value(rng: Rng) -> Any:
        if numbers:
            said = str(int(rng.integers(0, 9999)))
            return said if as_text else said.encode()
        if as_text:
            return "".join(rng.choice(list("aZ é水\0"), int(rng.integers(0, 6))))
        return rng.bytes(int(rng.integers(0, 9)) if size is None else size)

    return lambda rng, n: [value(rng) for _ in range(n)]


def leaves(x: Input, spark: bool) -> list[Leaf]:
    """Return the element types of columns that ``x`` takes; for ``spark``, those that Spark has."""
    found = []
    if x.dtype in (*SIGNED, *UNSIGNED):
        wanted = np.iinfo(numpy_type(x.dtype))
        for name, arrow in INTEGERS.items():
            has = np.iinfo(name)
            fits = wanted.min <= has.min and has.max <= wanted.max
            if not fits and x.dtype in SIGNED:
                continue
            low, high = max(int(wanted.min), int(has.min)), min(int(wanted.max), int(has.max))
            bad = [int(v) for v in (has.min, has.max) if not wanted.min <= v <= wanted.max]
            found.append(Leaf(arrow, np.dtype(name), whole_numbers(low, high), tuple(bad)))
        if x.dtype in UNSIGNED:
            low, high = 0, int(wanted.max)
            plain = whole_numbers(low, high)
            found.append(
                Leaf(
                    pa.decimal128(20, 0),
                    np.uint64,
                    lambda rng, n: [Decimal(v) for v in plain(rng, n)],
                    (Decimal(-1), Decimal(2**64), Decimal(10**20 - 1)),
                )
            )
    elif x.dtype in FLOATS:
        special = not x.tame
        if x.dtype == "bfloat16":
            found = [
                Leaf(pa.float32(), np.float32, real_numbers(np.float32, x.tame, 1e30, special), (3.4e38,))
            ]
        elif x.dtype == "float16":
            found = [
                Leaf(pa.float16(), np.float16, real_numbers(np.float16, x.tame, 3e4, special)),
                Leaf(pa.float32(), np.float32, real_numbers(np.float32, x.tame, 3e4, special), (-7e4, 1e38)),
            ]
        else:
            found = [
                Leaf(pa.float16(), np.float16, real_numbers(np.float16, x.tame, 3e4, special)),
                Leaf(pa.float32(), np.float32, real_numbers(np.float32, x.tame, 1e30, special)),
                Leaf(pa.float64(), np.float64, real_numbers(np.float64, x.tame, 1e30, special)),
            ]
            for name in ("int8", "int16", "uint8", "uint16", *(["int32", "uint32"] * (x.dtype == "float64"))):
                has = np.iinfo(name)
                low, high = (0, 4) if x.tame else (int(has.min), int(has.max))
                found.append(Leaf(INTEGERS[name], np.dtype(name), whole_numbers(low, high)))
    elif x.dtype == "bool":
        found = [Leaf(pa.bool_(), np.bool_, lambda rng, n: rng.integers(0, 2, n).astype(bool).tolist())]
    else:
        for arrow in (pa.string(), pa.large_string(), pa.string_view()):
            found.append(Leaf(arrow, object, texts(True, x.numbers)))
        for arrow in (pa.binary(), pa.large_binary(), pa.binary_view()):
            found.append(Leaf(arrow, object, texts(False, x.numbers)))
        if not x.numbers:
            found.append(Leaf(pa.binary(4), object, texts(False, False, 4)))
    if spark:
        known = [*(INTEGERS[name] for name in SIGNED), pa.float32(), pa.float64(), pa.bool_()]
        known += [pa.string(), pa.binary(), pa.decimal128(20, 0)]
        found = [leaf for leaf in found if leaf.type in known]
    return found


@dataclasses.dataclass
class Column:
    """A column for one input of one stream.

    Attributes:
        feeds: The input.
        kind: ``lists``, ``tensor`` (fixed_shape_tensor), ``raw``, ``vector`` or ``null``.
        leaf: What its elements are.
        levels: From outside in, how each level of lists is written.
        sizes: From outside in, the lengths of lists; drawn anew for each record batch where ``varies``.
        entry: What the mapping says of it besides the column.
        padded: Whether lists differ in length.
        null_rate, bad_rate: How many cells are null or bad.
    """

    feeds: Input
    kind: str
    leaf: Leaf
    levels: list[str]
    sizes: list[int]
    varies: bool
    entry: dict[str, Any]
    padded: bool
    null_rate: float
    bad_rate: float
    dictionary: pa.DataType | None
    raw_type: pa.DataType | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.feeds.name} {self.feeds.dtype} {list(self.feeds.dims)}: {self.kind} {self.leaf.type}"
        ]
        parts.append(f"{self.levels} {self.sizes}, nulls {self.null_rate}, bad {self.bad_rate}, {self.entry}")
        parts += [f"dictionary {self.dictionary}"] if self.dictionary else []
        return ", ".join([*parts, *(["varies"] if self.varies else [])])

    # What the cells say.

    def cells(self, rng: Rng, n: int) -> list[Cell]:
        """Return what ``n`` rows of a record batch say."""
        sizes = list(self.sizes)
        if self.varies:
            for i, (level, known) in enumerate(zip(self.levels, self.feeds.dims, strict=True)):
                if known is None and level != "fixed":
                    sizes[i] = int(rng.integers(0 if i == len(sizes) - 1 else 1, MOST_IN_A_LIST + 1))
        few = 0  # a model that refuses rows is asked again and again: such rows are kept few
        cells = []
        for _ in range(n):
            dice = rng.random()
            if dice < self.null_rate or self.kind == "null":
                cells.append(Cell(NULL, self.broken(rng, sizes, null=True)))
            elif dice < self.null_rate + self.bad_rate and (not self.feeds.numbers or few < 1):
                value = self.broken(rng, sizes, null=False)
                state = REFUSED if self.feeds.numbers else BAD
                cells.append(Cell(OK, self.good(rng, sizes)) if value is None else Cell(state, value))
                few += 1
            else:
                cells.append(Cell(OK, self.good(rng, sizes)))
        return cells

    def good(self, rng: Rng, sizes: list[int]) -> Any:
        if self.kind == "raw":
            return self.bytes_of(rng)
        if self.kind == "vector":
            return self.vector(rng, sizes[0])
        if self.padded:
            return self.ragged(rng, 0)
        return nested(self.leaf.values(rng, int(np.prod(sizes))), sizes)

    def ragged(self, rng: Rng, level: int) -> Any:
        if level == len(self.levels):
            return self.leaf.values(rng, 1)[0]
        if self.levels[level] == "fixed":
            length = self.sizes[level]
        else:
            known = self.feeds.dims[level]
            length = int(rng.integers(0, (MOST_IN_A_LIST if known is None else known) + 1))
        return [self.ragged(rng, level + 1) for _ in range(length)]

    def bytes_of(self, rng: Rng) -> bytes:
        return bytes(self.convert(self.leaf.values(rng, int(np.prod(self.sizes)))).tobytes())

    def vector(self, rng: Rng, size: int) -> dict[str, Any]:
        values = self.leaf.values(rng, size)
        if rng.random() < 0.5:
            return {"type": 1, "size": None, "indices": None, "values": values}
        at = sorted(rng.choice(size, int(rng.integers(0, size + 1)), replace=False).tolist())
        return {"type": 0, "size": size, "indices": at, "values": values[: len(at)]}

    def broken(self, rng: Rng, sizes: list[int], null: bool) -> Any:
        """Return a cell with a null in it, or a bad one; None is a null cell, or that no cell can be bad."""
        row = None if self.kind == "null" else self.good(rng, sizes)
        ways: list[Callable[[], Any]] = []
        if null:
            ways = [lambda: None]
            if self.kind == "vector" and row["values"]:
                ways.append(lambda: {**row, "values": [None, *row["values"][1:]]})
            if self.kind in ("lists", "tensor") and (at := places(row, len(self.levels))):
                ways.append(lambda: replaced(row, at[int(rng.integers(len(at)))], None))
                if self.kind == "lists" and len(self.levels) > 1 and row:
                    ways.append(lambda: replaced(row, (int(rng.integers(len(row))),), None))
        elif self.kind == "raw":
            ways = [lambda: row + b"\1", lambda: row[:-1]]
            if self.feeds.dtype == "bool":
                ways.append(lambda: b"\2" + row[1:])
            if self.raw_type is not None and pa.types.is_fixed_size_binary(self.raw_type):
                ways = ways[2:]
        elif self.kind == "vector":
            if self.feeds.dims[0] is not None:
                ways.append(lambda: self.vector(rng, sizes[0] + 1))
            ways.append(lambda: {"type": 0, "size": sizes[0], "indices": [sizes[0]], "values": [1.0]})
            if sizes[0] > 1:
                ways.append(lambda: {"type": 0, "size": sizes[0], "indices": [1, 0], "values": [1.0, 2.0]})
        else:
            at = places(row, len(self.levels))
            if self.feeds.numbers:
                word = "none" if self.leaf.values(rng, 1)[0].__class__ is str else b"none"
                if at:
                    ways.append(lambda: replaced(row, at[int(rng.integers(len(at)))], word))
            elif self.leaf.bad and at:
                bad = self.leaf.bad[int(rng.integers(len(self.leaf.bad)))]
                ways.append(lambda: replaced(row, at[int(rng.integers(len(at)))], bad))
            for i, level in enumerate(self.levels):
                size = self.feeds.dims[i] if i < len(self.feeds.dims) else None
                if self.kind != "lists" or level == "fixed" or size is None or self.feeds.numbers:
                    continue
                lists = places(row, i)
                if lists:
                    ways.append(lambda i=i, size=size, lists=lists: self.stretched(rng, row, lists, i, size))
        return ways[int(rng.integers(len(ways)))]() if ways else None

    def stretched(self, rng: Rng, row: Any, lists: list[tuple[int, ...]], level: int, size: int) -> Any:
        """Return ``row`` with one list of a known length longer, or, where nothing pads it, shorter."""
        at = lists[int(rng.integers(len(lists)))]
        given = row
        for i in at:
            given = given[i]
        inner = Column.ragged if self.padded else Column.inside
        longer = [*given, *(inner(self, rng, level + 1) for _ in range(size + 1 - len(given)))]
        return replaced(row, at, given[:-1] if not self.padded and rng.random() < 0.5 else longer)

    def inside(self, rng: Rng, level: int) -> Any:
        """Return one element of the lists at ``level - 1``, of the same lengths as the others."""
        sizes = self.sizes[level:]
        return nested(self.leaf.values(rng, int(np.prod(sizes))), sizes)

    # What TensorFlow gets of them.

    def convert(self, flat: list[Any]) -> np.ndarray:
        """Return elements of the column as elements of the tensor."""
        if self.leaf.domain is object:
            return np.array([v.encode() if isinstance(v, str) else v for v in flat] + [None], object)[:-1]
        kind = self.leaf.domain
        exact = np.array([int(v) for v in flat] if kind is np.uint64 else flat, kind)
        return exact.astype(numpy_type(self.feeds.dtype))

    def tensor(self, values: list[Any]) -> np.ndarray:
        """Return the tensor of rows that take part in a run."""
        kind = numpy_type(self.feeds.dtype)
        if self.kind == "raw":
            return np.frombuffer(b"".join(values), kind).reshape(len(values), *self.sizes)
        if self.kind == "vector":
            values = [dense(v) for v in values]
        depth = len(self.levels)
        dims = [max((len(v) for v in lists_at(values, i + 1)), default=0) for i in range(depth)]
        for i, known in enumerate(self.feeds.dims):
            if known is not None:
                dims[i] = known
        pad = self.entry.get("pad", 0 if self.leaf.domain is not object else "")
        out = np.empty((len(values), *dims), kind)
        out[...] = pad.encode() if isinstance(pad, str) else np.array(pad, kind)
        at = places(values, depth + 1)
        flat = self.convert([element(values, place) for place in at])
        if at:
            out[tuple(np.array(at).T)] = flat
        return out

    def lengths(self, values: list[Any]) -> list[int]:
        return [len(v) for v in values]

    # How Arrow has them.

    def array(self, rng: Rng, cells: list[Cell]) -> pa.Array:
        rows = [cell.value for cell in cells]
        if self.kind == "null":
            return (
                pa.nulls(len(rows)) if not self.levels else pa.array([None] * len(rows), pa.list_(pa.null()))
            )
        if self.kind == "raw":
            return pa.array(rows, self.raw_type)
        if self.kind == "vector":
            return pa.array(rows, VECTOR)
        if self.kind == "tensor":
            flat = [None if row is None else flattened(row, len(self.levels)) for row in rows]
            stored = pa.array(flat, pa.list_(self.leaf.type, int(np.prod(self.sizes))))
            return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(self.leaf.type, self.sizes), stored)
        return self.nest(rng, rows, 0)

    def nest(self, rng: Rng, rows: list[Any], level: int) -> pa.Array:
        if level == len(self.levels):
            return self.elements(rng, rows)
        kind = self.levels[level]
        mask = pa.array([row is None for row in rows], pa.bool_())
        masked = {"mask": mask} if any(row is None for row in rows) else {}
        if kind == "fixed":
            size = self.sizes[level]
            child = [v for row in rows for v in ([None] * size if row is None else row)]
            return pa.FixedSizeListArray.from_arrays(self.nest(rng, child, level + 1), size, **masked)
        large = kind.startswith("large")
        number = pa.int64() if large else pa.int32()
        if kind.endswith("view"):  # lists may lie in any order
            order, child, offsets = rng.permutation(len(rows)), [], [0] * len(rows)
            for i in order:
                offsets[i] = len(child)
                child += rows[i] or []
            sizes = pa.array([len(row or []) for row in rows], number)
            made = pa.LargeListViewArray if large else pa.ListViewArray
            return made.from_arrays(
                pa.array(offsets, number), sizes, self.nest(rng, child, level + 1), **masked
            )
        child = [v for row in rows for v in row or []]
        offsets = np.cumsum([0, *(len(row or []) for row in rows)]).tolist()
        made = pa.LargeListArray if large else pa.ListArray
        return made.from_arrays(pa.array(offsets, number), self.nest(rng, child, level + 1), **masked)

    def elements(self, rng: Rng, rows: list[Any]) -> pa.Array:
        if self.dictionary is None:
            return pa.array(rows, self.leaf.type)
        distinct = list(dict.fromkeys(v for v in rows if v is not None))
        distinct += self.leaf.values(rng, 1)
        null_entry = rng.random() < 0.3
        where = {v: i for i, v in enumerate(distinct[:-1])}
        words = pa.array([*distinct, *([None] if null_entry else [])], self.leaf.type)
        null = len(distinct) if null_entry else None
        indices = pa.array([null if v is None else where[v] for v in rows], self.dictionary)
        return pa.DictionaryArray.from_arrays(indices, words)


def nested(flat: list[Any], sizes: list[int]) -> Any:
    if not sizes:
        return flat[0]
    step = len(flat) // sizes[0] if sizes[0] else 0
    return [nested(flat[i * step : (i + 1) * step], sizes[1:]) for i in range(sizes[0])]


def dense(vector: dict[str, Any]) -> list[float]:
    if vector["type"] == 1:
        return list(vector["values"])
    out = [0.0] * vector["size"]
    for i, v in zip(vector["indices"], vector["values"], strict=True):
        out[i] = v
    return out


def places(row: Any, depth: int) -> list[tuple[int, ...]]:
    """Return where the elements at a depth of nested lists are."""
    if depth == 0:
        return [()]
    return [(i, *rest) for i, v in enumerate(row) for rest in places(v, depth - 1)]


def element(row: Any, at: tuple[int, ...]) -> Any:
    for i in at:
        row = row[i]
    return row


def lists_at(rows: list[Any], depth: int) -> list[Any]:
    return [element(rows, at) for at in places(rows, depth)]


def flattened(row: Any, depth: int) -> list[Any]:
    return [element(row, at) for at in places(row, depth)]


def replaced(row: Any, at: tuple[int, ...], value: Any) -> Any:
    """Return a copy of nested lists with one element replaced."""
    if not at:
        return value
    return [replaced(v, at[1:], value) if i == at[0] else v for i, v in enumerate(row)]


def random_column(rng: Rng, x: Input, sizes: list[int], lengths: str | None, spark: bool = False) -> Column:
    """Return a column for ``x``, of any type that it takes.

    Args:
        rng: Chooses.
        x: The input to feed.
        sizes: The lengths of lists where nothing else is drawn; the input's own where they are known.
        lengths: The input that is to take the lengths of this one's lists.
        spark: Use types of Spark alone, and no more than it can send.
    """
    choice = leaves(x, spark)
    leaf = choice[int(rng.integers(len(choice)))]
    kinds = ["lists"] * 6
    if not spark:
        kinds += ["tensor"] * (2 if x.dims and not pa.types.is_decimal(leaf.type) else 0)
        kinds += ["raw"] * (2 if None not in x.dims and x.dtype != "string" else 0)
        kinds += ["vector"] * (3 if len(x.dims) == 1 and x.dtype in ("float32", "float64") else 0)
        kinds += ["null"] * (rng.random() < 0.1)
    kind = "lists" if lengths else str(rng.choice(kinds))
    if kind == "vector":
        leaf = next(one for one in leaves(x, False) if one.type == pa.float64())
    if kind == "raw":
        same = numpy_type(x.dtype)
        own = [one for one in leaves(x, False) if one.domain == same]
        leaf = own[0] if own else leaves(x, False)[0]
    padded = kind == "lists" and bool(x.dims) and not spark and (lengths is not None or rng.random() < 0.3)
    names = ["list", "list", "large_list", "fixed", "list_view", "large_list_view"]
    levels = ["list" if spark else str(rng.choice(names)) for _ in x.dims]
    if kind == "vector":
        levels = ["list"]
    if kind == "tensor":
        levels = ["fixed"] * len(x.dims)
    if padded:  # a fixed size is none to pad, and tells the size even where there is no list
        for i, known in enumerate(x.dims):
            if levels[i] == "fixed" and (known is None or i == 0):
                levels[i] = "list"
    entry: dict[str, Any] = {}
    raw_type = None
    if kind == "raw":
        entry["encoding"] = "raw"
        width = int(np.prod(sizes)) * np.dtype(numpy_type(x.dtype)).itemsize
        raw_type = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(width)][int(rng.integers(4))]
    if padded:
        pads: list[Any] = [0, 1, 7] if x.dtype not in FLOATS else [0, -1, 0.5]
        pads = ["", "-"] if x.dtype == "string" else [False, True] if x.dtype == "bool" else pads
        pads = ["0"] if x.numbers else pads
        entry["pad"] = pads[int(rng.integers(len(pads)))]
        if lengths:
            entry["lengths"] = lengths
    dictionary = None
    if kind == "lists" and not spark and rng.random() < 0.2:
        dictionary = INDICES[int(rng.integers(len(INDICES)))]
        words = leaf.values(rng, 20)
        leaf = dataclasses.replace(leaf, values=lambda rng, n: [words[i] for i in rng.integers(0, 20, n)])
    return Column(
        feeds=x,
        kind=kind,
        leaf=leaf,
        levels=levels,
        sizes=sizes,
        varies=bool(kind == "lists" and not padded and not spark and rng.random() < 0.3),
        entry=entry,
        padded=padded,
        null_rate=float(rng.choice([0, 0, 0.1, 0.5])) if rng.random() < 0.97 else 1.0,
        bad_rate=float(rng.choice([0, 0, 0, 0.05, 0.3])),
        dictionary=dictionary,
        raw_type=raw_type,
    )
