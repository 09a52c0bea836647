"""``flightsvc predict``: runs a model over the rows of files."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flightsvc import tables
from flightsvc.commandline import Parser
from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.mapping import Output, TensorSpec
from flightsvc.model import Model
from flightsvc.request import Request, read_signature
from flightsvc.server import sidecar
from flightsvc.server.connection import Connection, shared
from flightsvc.settings import Settings, variable
from flightsvc.spark import loading

_LINE_SECONDS = 10.0  # between two lines on progress where nobody sits before a terminal
_BAR_SECONDS = 0.1
_REASON = "_flightsvc_error"  # the column for reasons on the wire, where the caller asks for none

# What a value of CSV or JSON lines is sent as, by the dtype of the input that it feeds.
_SENT = {
    "float16": pa.float32(),
    "bfloat16": pa.float32(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    **{str(kind()): kind() for kind in (pa.int8, pa.int16, pa.int32, pa.int64)},
    **{str(kind()): kind() for kind in (pa.uint8, pa.uint16, pa.uint32, pa.uint64)},
}


def main(arguments: list[str]) -> int:
    """Answer ``flightsvc predict``."""
    given = _parsed(arguments)
    begun: list[tables.Writer] = []
    ending = threading.Lock()  # held while the file is begun or ended
    done: Future[None] = Future()

    def work() -> None:
        try:
            _predict(given, begun, ending)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    # In a thread of its own, since signals wait for the end of a call into Arrow.
    thread = threading.Thread(target=work, name="flightsvc-predict", daemon=True)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        thread.start()
        done.result()
    except KeyboardInterrupt:
        ending.acquire()  # for good: from now on no file appears
        if not any(writer.whole for writer in begun):
            for writer in begun:
                writer.abort()
            what = "" if given.out == tables.STANDARD else "; nothing was written"
            print(f"flightsvc: interrupted{what}", file=sys.stderr, flush=True)
            os._exit(1)
    return 0


def _predict(given: argparse.Namespace, begun: list[tables.Writer], ending: threading.Lock) -> None:
    """Run the model; the file is added to ``begun``, and begun and ended while ``ending`` is held."""
    reader = tables.Reader(given.sources, given.batch_rows)
    connection = shared(sidecar.for_user, Settings.read())
    model = Model(given.model, signature=given.signature, version=given.model_version)
    signature = read_signature(model, connection)
    feeds = _feeds(given, model, list(signature["inputs"]), reader.schema.names)
    # Always with the reasons, so that a row that is refused is known by its place.
    reason = given.error_column if given.on_error == "column" else _REASON
    outputs = _outputs(given, signature["outputs"])
    options = {"on_error": "column", "error_column": reason, "device": given.device}
    request = model.request(feeds, outputs, **options)
    request.columns(reader.schema.names, tuple(signature["inputs"]), case_sensitive=True)
    rows = _Rows(reader, _sent(model, signature["inputs"], feeds, reader))
    made = [field for field in connection.answer_schema(request.descriptor(feeds)) if field.name != _REASON]
    for field in made:
        if field.name in reader.schema.names:
            raise InvalidArgumentError(
                f"an output would have the name of a column of {given.sources[0]}, {field.name!r}; give it "
                "another name: --output TENSOR=COLUMN, or --error-column for the reason"
            )
    schema = pa.schema([*reader.schema, *made], reader.schema.metadata)
    with ending:
        writer = tables.Writer(given.out, schema)
        begun.append(writer)
    progress = Progress(reader.rows)
    try:
        for piece, answer in rows.answers(request, connection, feeds):
            reasons = answer.column(answer.num_columns - 1)
            if given.on_error == "fail" and reasons.null_count < len(reasons):
                row = reasons.is_valid().index(True).as_py()
                raise InvalidArgumentError(
                    f"{piece.path}: row {piece.first + row}: {reasons[row]}; to go on without such rows: "
                    "--on-error null, or column"
                )
            columns = [*piece.batch.columns, *answer.columns[: len(made)]]
            writer.write(pa.RecordBatch.from_arrays(columns, schema=schema))
            progress.add(len(reasons))
        with ending:
            writer.commit()
    finally:
        progress.clear()
        with ending:
            writer.abort()
    progress.say_done(given.out)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of one file; ``first`` is the number of the first of them there."""

    path: str
    first: int
    batch: pa.RecordBatch


class _Rows:
    """The rows of a table on their way through a model."""

    def __init__(self, reader: tables.Reader, sent: pa.Schema):
        """Take the columns to send, with the types that they are sent as."""
        self._reader = reader
        self._sent = sent
        self._due: collections.deque[_Piece] = collections.deque()  # read and not answered
        self._unread: FlightsvcError | None = None  # why reading has ended early

    def answers(
        self, request: Request, connection: Connection, feeds: Mapping[str, str]
    ) -> Iterator[tuple[_Piece, pa.RecordBatch]]:
        """Yield rows as they were read, and the answer to them.

        Raises:
            InvalidArgumentError: A cell or a file cannot be read; the text names the file and the row.
            FlightsvcError: The request was refused or the server failed; where rows may be the reason, the
                text names the file and those that were due.
        """
        positions = {name: self._sent.names.index(column) for name, column in feeds.items()}
        begun = False
        try:
            for answer in loading.answers(request, connection, self._sent, positions, self._read()):
                begun = True
                piece = self._due.popleft()
                rest = piece.batch.num_rows - answer.outputs.num_rows
                if rest:  # pictures that are read here are answered in parts
                    number = answer.outputs.num_rows
                    self._due.appendleft(_Piece(piece.path, piece.first + number, piece.batch.slice(number)))
                    piece = dataclasses.replace(piece, batch=piece.batch.slice(0, number))
                yield piece, answer.outputs
        except FlightsvcError as error:
            of_rows = begun or isinstance(error, InvalidArgumentError)
            if error is self._unread or not self._due or not of_rows:
                raise
            piece = self._due[0]
            last = piece.first + piece.batch.num_rows - 1
            raise type(error)(f"{piece.path}: rows {piece.first} to {last}: {error}") from error

    def _read(self) -> Iterator[pa.RecordBatch]:
        try:
            for path, first, batch in self._reader.batches():
                piece = _Piece(path, first, batch)
                columns = [_cells(piece, field) for field in self._sent]
                self._due.append(piece)
                yield pa.RecordBatch.from_arrays(columns, schema=self._sent)
        except FlightsvcError as error:
            self._unread = error
            raise


def _cells(piece: _Piece, field: pa.Field) -> pa.Array:
    """Return a column as it is sent: the values of a text format in the type of the input.

    Raises:
        InvalidArgumentError: A cell holds no such value.
    """
    column = piece.batch.column(field.name)
    if column.type == field.type:
        return column
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid:
        for row, cell in enumerate(column):
            try:
                cell.cast(field.type)
            except pa.ArrowInvalid as error:
                raise InvalidArgumentError(
                    f"{piece.path}: row {piece.first + row}: column {field.name!r} holds no {field.type}; "
                    "correct the cell, or leave it empty, which is null"
                ) from error
        raise


def _feeds(
    given: argparse.Namespace, model: Model, inputs: Sequence[str], columns: Sequence[str]
) -> dict[str, str]:
    """Return the column of each input, as far as the flags say or the names do.

    Raises:
        NotFoundError: An input has no column.
    """
    if not given.input and len(inputs) == len(columns) == 1:
        return {inputs[0]: columns[0]}
    feeds = given.input or {name: name for name in inputs if name in columns}
    for name in inputs:
        if name not in feeds:
            raise NotFoundError(
                f"model {model.name}, signature {model.signature}: input {name!r} has no column; add "
                f"--input {name}=COLUMN; columns: {', '.join(columns)}"
            )
    return dict(feeds)


def _outputs(given: argparse.Namespace, specs: Mapping[str, TensorSpec]) -> dict[str, str | Output]:
    """Return the columns of the outputs, strings as texts where the format of OUT has no bytes."""
    kind = tables.format_of(given.out)
    if kind not in ("csv", "json"):
        return dict(given.output)
    wanted = given.output or {name: name for name in sorted(specs)}
    texts = [name for name, spec in specs.items() if spec.dtype == "string"]
    return {n: Output(column, type="utf8") if n in texts else column for n, column in wanted.items()}


def _sent(
    model: Model, specs: Mapping[str, TensorSpec], feeds: Mapping[str, str], reader: tables.Reader
) -> pa.Schema:
    """Return the columns to send. JSON lines are then read as what their inputs need.

    Raises:
        InvalidArgumentError: The format has no place for the values of an input.
    """
    sent: dict[str, pa.Field] = {}
    for name, column in feeds.items():
        field = reader.schema.field(column)
        if reader.format in ("csv", "json") and not model.is_picture(name):
            field = pa.field(column, _typed(model, name, specs[name], reader.format))
        if sent.setdefault(column, field) != field:
            raise InvalidArgumentError(
                f"model {model.name}, signature {model.signature}: column {column!r} feeds two inputs of "
                "different types; write it twice"
            )
    if reader.format == "json":
        reader.read_as({column: _wide(field.type) for column, field in sent.items()})
    return pa.schema(list(sent.values()))


def _typed(model: Model, name: str, spec: TensorSpec, kind: str) -> pa.DataType:
    """Return the type that values of a text format are sent as."""
    rank = None if spec.shape is None else len(spec.shape)
    if (kind == "csv" and rank != 1) or rank is None or spec.dtype not in _SENT:
        holds = "a cell of a CSV file holds one value" if kind == "csv" else "JSON does not say its type"
        raise InvalidArgumentError(
            f"model {model.name}, signature {model.signature}: input {name!r} is {spec}, and {holds}; "
            "bring it in Parquet or Arrow"
        )
    typed = _SENT[spec.dtype]
    for _ in range(rank - 1):
        typed = pa.list_(typed)
    return typed


def _wide(kind: pa.DataType) -> pa.DataType:
    """Return the type in which JSON lines keep the values of a column that feeds an input."""
    if pa.types.is_list(kind):
        return pa.list_(_wide(kind.value_type))
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_integer(kind):
        return pa.uint64() if kind == pa.uint64() else pa.int64()
    return kind


class Progress:
    """A bar on standard error where that is a terminal, else a line every ten seconds."""

    def __init__(self, total: int | None):
        """Take how many rows there are, ``None`` if that is not known."""
        self._total = total
        self._rows = 0
        self._terminal = sys.stderr.isatty()
        self._begun = self._shown = time.monotonic()
        self._lines = 0

    def add(self, rows: int) -> None:
        """Say that so many rows more are done."""
        self._rows += rows
        now = time.monotonic()
        if now - self._shown < (_BAR_SECONDS if self._terminal else _LINE_SECONDS):
            return
        self._shown = now
        rate = self._rows / (now - self._begun)
        text = f"{self._rows:,} rows, {rate:,.0f} rows/s"
        if self._total:
            share, left = self._rows / self._total, (self._total - self._rows) / rate
            text = f"{self._rows:,} of {self._total:,} rows, {rate:,.0f} rows/s, {left:,.0f} s left"
            if self._terminal:
                text = f"[{'#' * int(20 * share):20}] {share:4.0%}  {text}"
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(f"flightsvc: {text}", file=sys.stderr, flush=True)
            self._lines += 1

    def clear(self) -> None:
        """Take the bar away."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def say_done(self, out: str) -> None:
        """Say what was done, unless nobody has been told of it so far."""
        if self._terminal or self._lines:
            took = time.monotonic() - self._begun
            rate = self._rows / max(took, 1e-9)
            print(f"{self._rows:,} rows in {took:.1f} s, {rate:,.0f} rows/s: {out}", file=sys.stderr)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Return the command line; the process ends where it is wrong."""
    parser = Parser("predict", "<model> <in> ... <out>", "Run a model over the rows of files.")
    add = parser.add_argument
    formats = ".parquet, .csv, .jsonl, .arrow or .feather (an Arrow file), .arrows (an Arrow stream)"
    add(
        "model",
        metavar="<model>",
        help="A name in the front's repository, a folder with a SavedModel or with its numbered versions, a "
        "URI, or a digest.",
    )
    add(
        "files",
        metavar="<in> ... <out>",
        nargs="+",
        help=f"Files to read, or folders of such: {formats}, or - for an Arrow stream on standard input. "
        "Then the file to write, with their columns and the model's outputs; - for standard output. It "
        "appears once it is whole.",
    )
    add("--config", metavar="FILE", help='JSON file with settings, for instance {"model_root": "/models"}.')
    add(
        "--endpoint",
        metavar="grpc+unix:///PATH",
        help="The front to ask. Default: this user's own, in the folder user of the run-dir "
        "($FLIGHTSVC_ENDPOINT).",
    )
    add(
        "--run-dir",
        metavar="DIR",
        help="Folder for sockets. Default: $XDG_RUNTIME_DIR/flightsvc, else /tmp/flightsvc-UID "
        "($FLIGHTSVC_RUN_DIR).",
    )
    add(
        "--model-version",
        metavar="VERSION",
        default="latest",
        help="A number, a label, or latest. Default: latest.",
    )
    add("--signature", default="serving_default", help="Which signature to run. Default: serving_default.")
    add(
        "--input",
        metavar="TENSOR=COLUMN",
        type=_pair,
        action=_Pairs,
        default={},
        help="The column that feeds an input; once for each. Default: columns of the same names, or the only "
        "column for the only input.",
    )
    add(
        "--output",
        metavar="TENSOR=COLUMN",
        type=_pair,
        action=_Pairs,
        default={},
        help="An output and the name of its column; once for each, in the wanted order. Default: all.",
    )
    add(
        "--on-error",
        choices=("fail", "null", "column"),
        default="fail",
        help="What a row that cannot be run does: fail all, make its outputs null, or null with the reason "
        "in a column (column). Default: fail.",
    )
    add(
        "--error-column",
        metavar="COLUMN",
        default="error",
        help="Name of the column for the reason. Default: error.",
    )
    add(
        "--device",
        default="auto",
        help="auto, cpu, gpu, a UUID, or numbers as nvidia-smi prints them. Default: auto.",
    )
    add(
        "--batch-rows",
        metavar="ROWS",
        type=int,
        default=4096,
        help="Most rows of a record batch that is sent. Default: 4096, fewer where rows are large.",
    )
    given = parser.parse_intermixed_args(arguments)
    *given.sources, given.out = given.files
    if not given.sources:
        parser.error("give files to read, and one to write")
    if given.batch_rows < 1:
        parser.error(f"--batch-rows is {given.batch_rows}; want 1 or more")
    if tables.STANDARD in given.sources and len(given.sources) > 1:
        parser.error("- is read alone")
    try:
        for path in (given.out, *(path for path in given.sources if not os.path.isdir(path))):
            tables.format_of(path)
    except InvalidArgumentError as error:
        parser.error(str(error))
    if given.out == tables.STANDARD and sys.stdout.isatty():
        parser.error("an Arrow stream is nothing for a terminal; name a file, or pipe it into a program")
    _set(given)
    return given


def _pair(text: str) -> tuple[str, str]:
    tensor, equals, column = text.partition("=")
    if not (tensor and equals and column):
        raise argparse.ArgumentTypeError(f"{text!r} is not TENSOR=COLUMN")
    return tensor, column


class _Pairs(argparse.Action):
    """Collects pairs into a mapping."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        known, (name, column) = getattr(namespace, self.dest), values
        if name in known:
            parser.error(f"{option_string} names {name!r} twice")
        setattr(namespace, self.dest, {**known, name: column})


def _set(given: argparse.Namespace) -> None:
    """Make settings of flags, which go over the environment, and of a file, which does not.

    Raises:
        InvalidArgumentError: The file has a setting that there is not.
    """
    for name in ("endpoint", "run_dir"):
        if (value := getattr(given, name)) is not None:
            os.environ[variable(name)] = value
    if given.config is None:
        return
    with open(given.config, encoding="utf-8") as file:
        settings = json.load(file)
    known = [field.name for field in dataclasses.fields(Settings)]
    for name, value in settings.items():
        if name not in known:
            raise InvalidArgumentError(
                f"{given.config} has an unknown setting {name!r}; the settings are {', '.join(known)}"
            )
        os.environ.setdefault(variable(name), value if isinstance(value, str) else json.dumps(value))
