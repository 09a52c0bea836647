"""Writes golden/: bytes of the protocol, for tests in Go, Python and any other language.

    python testdata/make_golden.py

The expected values are computed here, in Python and numpy, not by the server. ``docs/protocol.md`` explains
them. The files:

    descriptors.json         valid descriptors with their meaning after defaults are set; invalid ones, and
                             those that do not fit the tiny model below, with texts that the error contains
    app_metadata.json        metadata of answered record batches
    status.json              an answer of the action status
    schema_metadata.json     metadata of the schema of an answer
    columns.arrows           an IPC stream of record batches with a column of every accepted type
    columns.json             the tensors that these columns become
    questions-*.arrows       record batches for the test models ``ints`` and ``strings``
    answers-*.arrows         their answers
    model/, model.tar        a tiny SavedModel, which cannot run, as a folder and as the archive of a DoPut
    digest.json              its digest, step by step
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

GOLDEN = Path(__file__).parent / "golden"

MODEL = "file:///models/m"
DEFAULTS: dict[str, Any] = {
    "v": 1,
    "model": MODEL,
    "version": "latest",
    "signature": "serving_default",
    "on_error": "fail",
    "error_column": "error",
    "nulls": "null",
    "device": "auto",
    "layout": "list",
}
PICTURE = {"size": [2, 3], "resize": "bilinear", "fit": "crop", "channels": "RGB"}


def descriptors() -> dict[str, Any]:
    """Valid descriptors as text with their meaning, and invalid ones."""

    def good(name: str, sent: dict[str, Any] | str, **means: Any) -> dict[str, Any]:
        text = sent if isinstance(sent, str) else json.dumps({"v": 1, "model": MODEL, **sent})
        return {"name": name, "text": text, "means": {**DEFAULTS, **means}}

    def same(name: str, **fields: Any) -> dict[str, Any]:
        return good(name, fields, **fields)

    def bad(name: str, text: str, *says: str) -> dict[str, Any]:
        return {"name": name, "text": text, "says": list(says)}

    def wrong(name: str, fields: str, *says: str) -> dict[str, Any]:
        return bad(name, f'{{"v":1,"model":"m",{fields}}}', *says)

    def unfit(name: str, fields: dict[str, Any], *says: str) -> dict[str, Any]:
        return {
            "name": name,
            "text": json.dumps({"v": 1, "model": digest()["digest"], **fields}),
            "says": list(says),
        }

    inputs = {"x": "f", "words": "w", "len": "n"}
    every = {
        "version": "7",
        "signature": "embed",
        "inputs": {"image": "content", "x": {"column": "f", "pad": 0, "lengths": "len"}},
        "outputs": {"y": {"column": "p", "shape": [-1, 3]}, "a": "q"},
        "on_error": "column",
        "error_column": "why",
        "nulls": "fail",
        "device": "cpu",
        "layout": "tensor",
        "plane": "flight",
        "batching": {"max_batch_size": 64, "batch_timeout_micros": 1000},
        "run_timeout_ms": 0,
        "request_id": "0123456789ab-partition-3",
        "redirect": False,
    }
    return {
        "taken": [
            good("the least", {}),
            good("white space around", f' {{"v": 1,\n"model": "{MODEL}"}}\n'),
            good("a version by number", {"version": 7}, version="7"),
            same("a version by text", version="7"),
            same("another signature", signature="embed"),
            same("a GPU of those that Spark gave", device="0,1"),
            same("a GPU by its UUID", device="GPU-1c2d3e4f-0a1b-2c3d-4e5f-60718293a4b5"),
            same("inputs", inputs={"x": "f"}),
            same("inputs in their order", inputs={"z": "1", "a": "2", "m": "3"}),
            good("the long form of a column", {"inputs": {"x": {"column": "f"}}}, inputs={"x": "f"}),
            same("raw cells", inputs={"x": {"column": "f", "encoding": "raw"}}),
            same("padded lists", inputs={"x": {"column": "f", "pad": 0}}),
            same("padded lists with lengths", inputs={"x": {"column": "f", "pad": -1.5, "lengths": "len"}}),
            same("padded strings", inputs={"x": {"column": "f", "pad": ""}}),
            same("padded bools", inputs={"x": {"column": "f", "pad": False}}),
            same("outputs in their order", outputs={"z": "1", "a": "2", "m": "3"}),
            same("an output as text", outputs={"y": {"column": "p", "type": "utf8"}}),
            same("an output's shape", outputs={"y": {"column": "p", "shape": [-1, 3]}}),
            good("pictures", {"preprocess": {"image": {"size": [2, 3]}}}, preprocess={"image": PICTURE}),
            good(
                "pictures, scaled",
                {"preprocess": {"image": {"size": [2, 3], "scale": 0.5, "offset": [1.5, 2.5, 3.5]}}},
                preprocess={"image": {**PICTURE, "scale": [0.5, 0.5, 0.5], "offset": [1.5, 2.5, 3.5]}},
            ),
            same("on_error null", on_error="null"),
            same("on_error column", on_error="column"),
            same("another error column", on_error="column", error_column="why"),
            same("nulls fail", nulls="fail"),
            same("layout tensor", layout="tensor"),
            same("no run timeout", run_timeout_ms=0),
            same("a run timeout", run_timeout_ms=1500),
            same("batching off", batching="off"),
            same("batching limits", batching={"max_batch_size": 64, "batch_timeout_micros": 1000}),
            same("a plane that is not there", plane="shm"),
            same("relayed", redirect=False),
            same("a request id", request_id="0123456789ab"),
            same("a lease", lease={"id": "ID", "expires": 1790000000000, "mac": "MAC"}),
            same("everything", **every),
        ],
        "refused": [
            bad("nothing", "", "descriptor"),
            bad("no JSON", "model", "descriptor"),
            bad("a list", "[1]", "descriptor", "object"),
            bad("half of it", '{"v":1,"model":"m"', "descriptor", "EOF"),
            bad("text behind it", '{"v":1,"model":"m"} {}', "text after the object"),
            bad("no v", '{"model":"m"}', "v is 0", "speaks 1"),
            bad("a later v", '{"v":2,"model":"m"}', "v is 2", "speaks 1"),
            bad("no model", '{"v":1}', "model is missing"),
            wrong("an unknown field", '"colour":"red"', 'unknown field "colour"'),
            wrong("a field in capitals", '"Version":"1"', 'unknown field "Version"'),
            wrong("a field twice", '"version":"1","version":"2"', '"version"', "twice"),
            wrong("a negative version", '"version":-1', "version"),
            wrong("a fraction as version", '"version":1.5', "version"),
            wrong("no such policy", '"on_error":"skip"', "on_error", '"skip"', '"fail" "null" "column"'),
            wrong("no such way with nulls", '"nulls":"skip"', "nulls", '"skip"'),
            wrong("no such device", '"device":"tpu"', "device", '"tpu"'),
            wrong("no such layout", '"layout":"rows"', "layout", '"rows"', '"list" "tensor"'),
            wrong("a negative timeout", '"run_timeout_ms":-1', "run_timeout_ms", "-1"),
            wrong("inputs as a list", '"inputs":["x"]', "must be an object"),
            wrong("an input twice", '"inputs":{"x":"a","x":"b"}', 'tensor "x"', "twice"),
            wrong("an input without a column", '"inputs":{"x":{"pad":0}}', 'tensor "x"', "no column"),
            wrong("an input with no column", '"inputs":{"x":null}', 'tensor "x"'),
            wrong(
                "an unknown field of an input", '"inputs":{"x":{"column":"f","colour":1}}', '"x"', '"colour"'
            ),
            wrong("a pad that is null", '"inputs":{"x":{"column":"f","pad":null}}', '"x"', "pad"),
            wrong("an unknown word of batching", '"batching":"on"', "batching", '"on"', '"off"'),
            wrong("an unknown field of batching", '"batching":{"size":1}', "batching", '"size"'),
            wrong("a negative batch", '"batching":{"max_batch_size":-1}', "max_batch_size", "negative"),
            wrong("a picture without a size", '"preprocess":{"image":{}}', '"image"', "size"),
            wrong("a picture of no size", '"preprocess":{"image":{"size":[0,3]}}', '"image"', "size"),
            wrong(
                "an unknown resize",
                '"preprocess":{"image":{"size":[2,3],"resize":"lanczos"}}',
                '"image"',
                '"lanczos"',
            ),
            wrong(
                "two scales",
                '"preprocess":{"image":{"size":[2,3],"scale":[1,2]}}',
                "scale",
                "one for each channel",
            ),
            wrong("an unknown field of a lease", '"lease":{"id":"ID","key":1}', '"key"'),
        ],
        # Refused for the tiny model, whose digest stands in for the model's name.
        "unfit": [
            unfit("no such input", {"inputs": {**inputs, "z": "f"}}, '"z"', "float32 [?,2,3]"),
            unfit("an input that is not mapped", {"inputs": {"x": "f", "len": "len"}}, '"words"'),
            unfit("no such output", {"outputs": {"z": "p"}}, '"z"', "float32 [?,3]"),
            unfit("no such signature", {"signature": "embed"}, "embed", "serving_default"),
            unfit(
                "two columns of a name", {"on_error": "column", "error_column": "y"}, '"y"', "error_column"
            ),
            unfit(
                "an unknown encoding",
                {"inputs": {**inputs, "x": {"column": "f", "encoding": "zip"}}},
                "zip",
                "raw",
            ),
            unfit(
                "raw strings",
                {"inputs": {**inputs, "words": {"column": "w", "encoding": "raw"}}},
                '"words"',
                "raw",
            ),
            unfit(
                "a pad that is a list", {"inputs": {**inputs, "x": {"column": "f", "pad": [0]}}}, '"x"', "pad"
            ),
            unfit(
                "a pad of another type",
                {"inputs": {**inputs, "words": {"column": "w", "pad": 0}}},
                '"words"',
                "pad",
            ),
            unfit("no such lengths", {"inputs": {**inputs, "words": {"column": "w", "lengths": "n"}}}, '"n"'),
            unfit(
                "lengths that are mapped",
                {"inputs": {**inputs, "words": {"column": "w", "lengths": "len"}}},
                '"len"',
            ),
            unfit(
                "lengths of rank 3",
                {"inputs": {"words": {"column": "w", "lengths": "x"}, "len": "n"}},
                '"x"',
                "lengths",
            ),
            unfit(
                "an unknown type", {"outputs": {"y": {"column": "p", "type": "json"}}}, '"y"', "json", "utf8"
            ),
            unfit("numbers as text", {"outputs": {"y": {"column": "p", "type": "utf8"}}}, '"y"', "utf8"),
            unfit(
                "a shape without a batch", {"outputs": {"y": {"column": "p", "shape": [3]}}}, '"y"', "shape"
            ),
            unfit(
                "a shape that is not so",
                {"outputs": {"y": {"column": "p", "shape": [-1, 4]}}},
                '"y"',
                "shape",
            ),
            unfit("pictures for text", {"preprocess": {"words": {"size": [2, 3]}}}, '"words"', "preprocess"),
        ],
    }


def app_metadata() -> list[dict[str, Any]]:
    """Metadata of answers: the text as it is sent, and its meaning."""

    def about(**fields: Any) -> dict[str, Any]:
        return {"text": json.dumps(fields, separators=(",", ":")), "says": fields}

    return [
        about(
            batch=0,
            last=True,
            queue_us=12,
            run_us=3400,
            total_us=3600,
            tf_rows=64,
            server="host:1234",
            form="folded",
        ),
        about(batch=1, last=False, queue_us=0, run_us=0, total_us=10, tf_rows=0),
        about(batch=1, last=True, queue_us=0, run_us=0, total_us=20, tf_rows=0),
    ]


def status() -> dict[str, Any]:
    """An answer of the action status: a front with a model in memory."""
    model = {
        "model": MODEL,
        "version": "7",
        "dir": "/models/m/7",
        "digest": "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "state": "ready",
        "pid": 1235,
        "device": "",
        "streams": 2,
        "resting": 0,
        "leases": 1,
        "memory": 314572800,
        "reserved": 353894400,
        "rows": 40_000,
        "errors": 3,
        "runs": 310,
        "joined_runs": 12,
        "queued": 0,
        "queue_seconds": 0.5,
        "run_seconds": 2.25,
        "form": "saved",
    }
    return {
        "flightsvc": "0.1.0",
        "build": "0123456789ab-01234567",
        "v": 1,
        "server": "host:1234",
        "pid": 1234,
        "models": [model],
        "memory": {"budget": 4294967296, "reserved": 353894400},
        "devices": [],
        "totals": {
            "rows": 40_000,
            "batches": 310,
            "errors": 3,
            "queued": 0,
            "queue_seconds": 0.5,
            "run_seconds": 2.25,
            "streams": 2,
            "models": 1,
            "memory": 345_000_000,
            "device_memory": 0,
        },
    }


# The tiny SavedModel. Its protocol buffer is written by hand: field numbers from TensorFlow's
# saved_model.proto, meta_graph.proto and tensor_shape.proto.

FLOAT32, INT32, STRING = 1, 3, 7  # of types.proto
NAMES = {FLOAT32: "float32", INT32: "int32", STRING: "string"}
Signature = dict[str, tuple[int, list[int]]]
INPUTS: Signature = {"len": (INT32, [-1]), "words": (STRING, [-1, -1]), "x": (FLOAT32, [-1, 2, 3])}
OUTPUTS: Signature = {"y": (FLOAT32, [-1, 3])}


def varint(number: int) -> bytes:
    """A number as protocol buffers write it."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def number_field(field: int, number: int) -> bytes:
    """A field that is a number."""
    return varint(field << 3) + varint(number)


def bytes_field(field: int, *parts: bytes) -> bytes:
    """A field that is text, bytes or a message."""
    value = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(value)) + value


def saved_model() -> bytes:
    """The file saved_model.pb."""

    def tensors(field: int, specs: Signature) -> bytes:
        out = b""
        for name, (dtype, shape) in specs.items():
            dims = [bytes_field(2, number_field(1, size)) for size in shape]
            info = bytes_field(1, f"{name}:0".encode()) + number_field(2, dtype) + bytes_field(3, *dims)
            out += bytes_field(field, bytes_field(1, name.encode()), bytes_field(2, info))
        return out

    signature = tensors(1, INPUTS) + tensors(2, OUTPUTS)
    meta_info = bytes_field(4, b"serve")
    entry = bytes_field(1, b"serving_default") + bytes_field(2, signature)
    return number_field(1, 1) + bytes_field(2, bytes_field(1, meta_info), bytes_field(5, entry))


def model_files() -> dict[str, bytes]:
    """The files of the folder."""
    return {
        "saved_model.pb": saved_model(),
        "assets/words.txt": b"one\ntwo\n",
        "assets.extra/note": b"",
        "variables/variables.index": bytes(range(16)),
    }


def digest() -> dict[str, Any]:
    """The digest of the folder, step by step."""
    lines = [
        f"{path} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
        for path, data in sorted(model_files().items(), key=lambda entry: entry[0].encode())
    ]
    return {"lines": lines, "digest": "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()}


def archive() -> bytes:
    """The folder as the archive of a DoPut: a POSIX tar, with entries for folders and not sorted."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for folder in ("variables", "assets.extra", "assets"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for path, data in model_files().items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def schema_metadata() -> dict[str, Any]:
    """The metadata of an answer of the tiny model, for a descriptor with the model left open."""
    inputs = {"x": "f", "words": {"column": "w", "pad": "", "lengths": "len"}}
    columns = {"x": {"column": "f"}, "words": {"column": "w"}, "len": {}}
    about = [
        {"name": name, "dtype": NAMES[dtype], "shape": shape, **columns[name]}
        for name, (dtype, shape) in INPUTS.items()
    ]
    return {
        "descriptor": {"v": 1, "inputs": inputs},
        "flightsvc.v": "1",
        "flightsvc.inputs": about,
    }


# The columns. Each has a name, a type, and one Python value for each row of all record batches; asks say for
# which inputs it is used and what becomes of its rows.

SIZES = (5, 0, 2)
ROWS = sum(SIZES)
VIEWS = ((0, 0, 5), (0, 1, 3), (0, 4, 1), (1, 0, 0), (2, 0, 2))  # record batch, offset, length

DTYPES = {
    **{
        f"{sign}int{bits}": f"<{sign[:1] or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)
    },
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "bool": "?",
}
VECTOR = pa.struct(
    [
        ("type", pa.int8()),
        ("size", pa.int32()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)


def has_null(value: Any) -> bool:
    """Return whether a row is null at any depth."""
    return value is None or (isinstance(value, list) and any(has_null(element) for element in value))


def encode(values: list[Any], dtype: str) -> Any:
    """The elements of a tensor in hexadecimal: their bytes, little endian, or those of each string."""
    if dtype == "string":
        return [(v.encode() if isinstance(v, str) else v).hex() for v in np.ravel(np.array(values, object))]
    if dtype == "bfloat16":
        bits = np.array(values, "<f4").view("<u4")
        rounded = bits + 0x7FFF + (bits >> 16 & 1)  # to the nearest, ties to even
        return (rounded >> 16).astype("<u2").tobytes().hex()
    return np.array(values, DTYPES[dtype]).tobytes().hex()


class Columns:
    """The columns, and the inputs that they feed."""

    def __init__(self) -> None:
        self.fields: list[pa.Field] = []
        self.arrays: list[pa.Array] = []
        self.values: dict[str, list[Any]] = {}
        self.asks: list[dict[str, Any]] = []

    def column(self, name: str, kind: pa.DataType, values: list[Any], array: pa.Array | None = None) -> None:
        """Adds a column with the values of all rows; ``array`` if pyarrow cannot infer it from them."""
        assert len(values) == ROWS, name
        self.fields.append(pa.field(name, kind))
        self.arrays.append(pa.array(values, kind) if array is None else array)
        self.values[name] = values

    def ask(
        self,
        name: str,
        dtype: str,
        *shape: int,
        rows: list[Any] | None = None,
        refused: tuple[int, ...] = (),
        **entry: Any,
    ) -> None:
        """Feeds a column to an input.

        Args:
            name: The column.
            dtype: The input's.
            shape: The input's, after the first dimension.
            rows: The rows as nested lists where they are not the column's own.
            refused: Rows that are refused.
            entry: Further fields of the descriptor's entry.
        """
        rows = self.values[name] if rows is None else rows
        pad, lengths = entry.get("pad"), entry.get("lengths")
        views = []
        for batch, offset, length in VIEWS:
            start = sum(SIZES[:batch]) + offset
            numbers = range(start, start + length)
            null = [i - start for i in numbers if has_null(rows[i])]
            bad = [i - start for i in numbers if i in refused and i - start not in null]
            kept = [rows[i] for i in numbers if i - start not in null and i - start not in bad]
            view: dict[str, Any] = {
                "batch": batch,
                "offset": offset,
                "length": length,
                "null": null,
                "refused": bad,
            }
            if kept:
                if lengths is not None:
                    view["lengths"] = encode([len(row) for row in kept], "int32")
                if "pad" in entry:
                    longest = max(len(row) for row in kept) if shape[0] < 0 else shape[0]
                    kept = [row + [pad] * (longest - len(row)) for row in kept]
                view["shape"] = list(np.array(kept, object if dtype == "string" else None).shape)
                view["elements"] = encode(kept, dtype)
            views.append(view)
        self.asks.append(
            {"entry": {"column": name, **entry}, "dtype": dtype, "shape": [-1, *shape], "views": views}
        )


def columns() -> Columns:
    """All columns, and the inputs that they feed."""
    c = Columns()
    limits = {name: np.iinfo(code) for name, code in DTYPES.items() if "int" in name}
    for name, limit in limits.items():
        c.column(name, getattr(pa, name)(), [0, 1, int(limit.min), None, int(limit.max), 7, 100])
        c.ask(name, name)
    c.column("float16", pa.float16(), [0.0, -0.0, 65504.0, None, float("inf"), 2.0**-24, float("nan")])
    c.column("float32", pa.float32(), [0.1, -0.0, 3e38, None, float("-inf"), 1e-45, float("nan")])
    c.column("float64", pa.float64(), [0.1, -0.0, 1e300, None, float("-inf"), 1e-320, float("nan")])
    c.column("bool", pa.bool_(), [True, False, True, None, False, False, True])
    for name in ("float16", "float32", "float64", "bool"):
        c.ask(name, name)

    # Casts: exact ones and float64 to float32 unconditionally, others with a check of each value.
    c.ask("int8", "int16")
    c.ask("int8", "float32")
    c.ask("uint8", "int16")
    c.ask("int16", "float32")
    c.ask("int32", "int64")
    c.ask("int32", "float64")
    c.ask("uint32", "int64")
    c.ask("float16", "float32")
    singles = [None if v is None else float(np.float32(v)) for v in c.values["float32"]]
    c.ask("float32", "float64", rows=singles)
    c.column("short", pa.float64(), [0.5, 0.1, -1e30, None, float("inf"), 1.0, 2.0])
    c.ask("short", "float32")
    c.column("checked", pa.int64(), [0, 255, 256, None, -1, 65535, 2**32])
    c.ask("checked", "uint8", refused=(2, 4, 5, 6))
    c.ask("checked", "uint16", refused=(4, 6))
    c.ask("checked", "uint32", refused=(4, 6))
    c.ask("checked", "uint64", refused=(4,))
    large = [0, 2**64 - 1, 2**64, None, -1, 1, 2**63]
    c.column("decimal", pa.decimal128(20, 0), [None if v is None else Decimal(v) for v in large])
    c.ask(
        "decimal", "uint64", rows=[v if i not in (2, 4) else 0 for i, v in enumerate(large)], refused=(2, 4)
    )
    c.column("narrowed", pa.float32(), [1.0, 65519.0, 65520.0, None, float("inf"), -1 / 3, 3.4e38])
    c.ask("narrowed", "float16", rows=[1.0, 65519.0, 0.0, None, float("inf"), -1 / 3, 0.0], refused=(2, 6))
    c.ask("narrowed", "bfloat16", rows=[1.0, 65519.0, 65520.0, None, float("inf"), -1 / 3, 0.0], refused=(6,))

    # Strings.
    text = ["abc", "", "a text that is longer than twelve bytes", None, "grün", "x\0y", "abc"]
    data = [None if t is None else t.encode("latin-1") for t in text]
    for name, kind in (
        ("utf8", pa.utf8()),
        ("large_utf8", pa.large_utf8()),
        ("utf8_view", pa.string_view()),
        ("dictionary_of_utf8", pa.dictionary(pa.int8(), pa.utf8())),
    ):
        c.column(name, kind, text)
        c.ask(name, "string")
    for name, kind in (
        ("binary", pa.binary()),
        ("large_binary", pa.large_binary()),
        ("binary_view", pa.binary_view()),
    ):
        c.column(name, kind, data)
        c.ask(name, "string")
    c.column("fixed_size_binary", pa.binary(2), [b"ab", b"\0\0", b"cd", None, b"ef", b"gh", b"\xff\xfe"])
    c.ask("fixed_size_binary", "string")
    c.column("dictionary_of_int64", pa.dictionary(pa.int16(), pa.int64()), [3, 3, -1, None, 2**40, -1, 3])
    c.ask("dictionary_of_int64", "int64")

    # Lists: one more dimension for each level. A null at any depth makes a null row.
    lists = [[1.0, 2.0], [3.0, 4.0], [5.0, None], None, [6.0, 7.0], [8.0, 9.0], [10.0, 11.0]]
    for name, kind in (
        ("list", pa.list_(pa.float32())),
        ("large_list", pa.large_list(pa.float32())),
        ("list_view", pa.list_view(pa.float32())),
        ("large_list_view", pa.large_list_view(pa.float32())),
        ("fixed_size_list", pa.list_(pa.float32(), 2)),
    ):
        c.column(name, kind, lists)
        c.ask(name, "float32", 2)
    c.ask("list", "float64", -1)
    nested = [[[i, i + 1, i + 2], [-i, 0, i]] for i in range(ROWS)]
    nested[1] = [[1, 2, 3], [4, None, 6]]  # type: ignore[list-item]
    nested[3] = [[1, 2, 3], None]  # type: ignore[list-item]
    c.column("list_of_lists", pa.list_(pa.list_(pa.int32())), nested)
    c.ask("list_of_lists", "int32", 2, 3)
    c.ask("list_of_lists", "int64", -1, -1)
    words = [["a", "b"], ["", "grün"], ["c", None], None, ["d", "d"], ["a", "a"], ["e", "f"]]
    c.column("list_of_dictionary", pa.list_(pa.dictionary(pa.int8(), pa.utf8())), words)
    c.ask("list_of_dictionary", "string", 2)
    tensors = [None if i == 3 else (np.arange(6) + i).reshape(2, 3).tolist() for i in range(ROWS)]
    flat = [None if t is None else [float(v) for row in t for v in row] for t in tensors]
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3])
    storage = pa.array(flat, kind.storage_type)
    c.column("fixed_shape_tensor", kind, tensors, pa.ExtensionArray.from_storage(kind, storage))
    c.ask("fixed_shape_tensor", "float32", 2, 3)

    # Cells that hold the bytes of a row.
    triples = [
        [1.5, 2.5, 3.5],
        [0.0, 0.0, 0.0],
        None,
        None,
        [-1.0, float("inf"), 4.0],
        [7.0, 8.0, 9.0],
        [1.0, 1.0, 1.0],
    ]
    cells = [None if t is None else struct.pack("<3f", *t) for t in triples]
    c.column("cells", pa.binary(), [*cells[:2], b"short", *cells[3:]])
    zeros = [0.0, 0.0, 0.0]
    c.ask("cells", "float32", 3, rows=[*triples[:2], zeros, *triples[3:]], refused=(2,), encoding="raw")

    # Spark ML vectors.
    dense = {"type": 1, "size": None, "indices": None, "values": [1.0, 0.0, 2.5]}
    sparse = {"type": 0, "size": 3, "indices": [0, 2], "values": [1.0, 2.5]}
    empty = {"type": 0, "size": 3, "indices": [], "values": []}
    broken = {"type": 0, "size": 3, "indices": [0, 3], "values": [1.0, 2.5]}
    full = [1.0, 0.0, 2.5]
    c.column("vector", VECTOR, [dense, sparse, broken, None, empty, sparse, dense])
    c.ask("vector", "float64", 3, rows=[full, full, zeros, None, zeros, full, full], refused=(2,))
    c.ask("vector", "float32", 3, rows=[full, full, zeros, None, zeros, full, full], refused=(2,))

    # Lists of different lengths, padded.
    c.column("ragged", pa.list_(pa.int64()), [[1], [2, 3, 4], [], None, [5, 6], [7, 8, 9, 10], [11]])
    c.ask("ragged", "int64", -1, pad=0)
    c.ask("ragged", "int64", -1, pad=-7, lengths="len")
    c.ask("ragged", "int64", 3, pad=0, refused=(5,))
    c.column("ragged_words", pa.list_(pa.utf8()), [["a"], ["b", "c"], [], None, ["d"], ["e", "f", "g"], [""]])
    c.ask("ragged_words", "string", -1, pad="-")

    c.column("void", pa.null(), [None] * ROWS)
    c.ask("void", "float32")
    return c


def write_columns() -> list[dict[str, Any]]:
    """Writes columns.arrows and returns the asks."""
    c = columns()
    schema = pa.schema(c.fields)
    # Slices of one array each, as a client has that cuts a large record batch.
    with pa.ipc.new_stream(GOLDEN / "columns.arrows", schema) as writer:
        start = 0
        for size in SIZES:
            rows = [array.slice(start, size) for array in c.arrays]
            writer.write_batch(pa.RecordBatch.from_arrays(rows, schema=schema))
            start += size
    return c.asks


def write_exchange(name: str, questions: list[pa.RecordBatch], answers: list[pa.RecordBatch]) -> None:
    """Writes a golden conversation."""
    for file, batches in (("questions", questions), ("answers", answers)):
        with pa.ipc.new_stream(GOLDEN / f"{file}-{name}.arrows", batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)


def write_exchanges() -> None:
    """Writes the conversations with the test models: their functions are simple enough to be done by hand."""
    numbers = pa.schema([("i", pa.list_(pa.int64()))])
    doubled = pa.schema([("doubled", pa.list_(pa.int64())), ("total", pa.int64())])
    batches = [[[1, 2, 3], None, [-(2**40), 0, 2**40]], [], [[7, None, 9], [4, 5, 6]]]
    write_exchange(
        "ints",
        [pa.record_batch([rows], schema=numbers) for rows in batches],
        [
            pa.record_batch(
                [
                    [None if has_null(row) else [2 * v for v in row] for row in rows],
                    [None if has_null(row) else sum(row) for row in rows],
                ],
                schema=doubled,
            )
            for rows in batches
        ],
    )
    question = pa.schema([("s", pa.string_view())])
    answer = pa.schema([("length", pa.int64()), ("upper", pa.binary())])
    texts = [["abc", "", None], ["straight through", "a\0b"]]
    write_exchange(
        "strings",
        [pa.record_batch([pa.array(rows, pa.string_view())], schema=question) for rows in texts],
        [
            pa.record_batch(
                [
                    [None if t is None else len(t.encode()) for t in rows],
                    [None if t is None else t.upper().encode() for t in rows],
                ],
                schema=answer,
            )
            for rows in texts
        ],
    )


def main() -> None:
    """Writes all files."""
    GOLDEN.mkdir(exist_ok=True)
    documents = {
        "descriptors": descriptors(),
        "app_metadata": app_metadata(),
        "status": status(),
        "schema_metadata": schema_metadata(),
        "digest": digest(),
        "columns": write_columns(),
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=1, ensure_ascii=False)
        (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for path, data in model_files().items():
        file = GOLDEN / "model" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (GOLDEN / "model.tar").write_bytes(archive())
    write_exchanges()


if __name__ == "__main__":
    main()
