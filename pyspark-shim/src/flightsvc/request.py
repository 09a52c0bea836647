"""A request to a model: its descriptor, and the columns that feed the inputs."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.mapping import Input, Output, TensorSpec, check_device, column_of, wire
from flightsvc.server.stream import Exchange

if TYPE_CHECKING:
    import pyarrow as pa

    from flightsvc.model import Model
    from flightsvc.server.connection import Connection


_CHOICES = {
    "on_error": ("fail", "null", "column"),
    "nulls": ("null", "fail"),
    "layout": ("list", "tensor"),
}

# Values of a descriptor's fields that are left out.
_DEFAULTS = {
    "version": "latest",
    "signature": "serving_default",
    "on_error": "fail",
    "error_column": "error",
    "nulls": "null",
    "layout": "list",
    "device": "auto",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A model with the options of :class:`Options`; empty ``inputs`` or ``outputs`` mean the defaults.

    ``specs`` has the types of the inputs that have a function ``load``; see :meth:`with_specs`.
    """

    model: Model
    inputs: dict[str, str | Input]
    outputs: dict[str, str | Output]
    on_error: str = "fail"
    error_column: str = "error"
    nulls: str = "null"
    run_timeout: float | None = None
    batching: str | Mapping[str, int] | None = None
    layout: str = "list"
    device: str = "auto"
    specs: dict[str, TensorSpec] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InvalidArgumentError(f"{name} is {value!r}; it is one of {', '.join(choices)}")
        if self.run_timeout is not None and not 0 <= self.run_timeout < math.inf:
            raise InvalidArgumentError(
                f"run_timeout is {self.run_timeout!r}; give seconds, or 0 for no limit"
            )
        check_device(self.device)

    def with_specs(self, inputs: Callable[[], Mapping[str, TensorSpec]]) -> Request:
        """Return this request with ``specs`` from ``inputs()``, called only if an input has ``load``."""
        loaded = [
            name
            for name, entry in self.inputs.items()
            if isinstance(entry, Input) and entry.load is not None and not self.model.is_picture(name)
        ]
        if not loaded:
            return self
        known = inputs()
        return dataclasses.replace(self, specs={name: known[name] for name in loaded if name in known})

    def input(self, name: str, column: str) -> Input:
        """Return the :class:`Input` of the input ``name``, with ``column`` as its column."""
        entry = self.inputs.get(name)
        return dataclasses.replace(entry, column=column) if isinstance(entry, Input) else Input(column)

    def descriptor(self, inputs: Mapping[str, str] | None = None, request_id: str = "") -> dict[str, Any]:
        """Return the descriptor of docs/protocol.md, without defaults.

        Args:
            inputs: Input tensor to column on the wire; ``None``: as in ``inputs``.
            request_id: Identifies the stream in all logs.
        """
        if inputs is None:
            inputs = {name: column_of(entry) for name, entry in self.inputs.items()}
        model = self.model
        fields: dict[str, Any] = {
            "version": model.version,
            "signature": model.signature,
            "inputs": {name: wire(self.input(name, column)) for name, column in inputs.items()},
            "outputs": {name: wire(entry) for name, entry in self.outputs.items()},
            "preprocess": {name: image.wire() for name, image in model.preprocess.items()},
            "on_error": self.on_error,
            "error_column": self.error_column if self.on_error == "column" else "error",
            "nulls": self.nulls,
            "run_timeout_ms": None if self.run_timeout is None else math.ceil(self.run_timeout * 1000),
            "batching": dict(self.batching) if isinstance(self.batching, Mapping) else self.batching,
            "layout": self.layout,
            "device": self.device,
            "request_id": request_id,
        }
        given = {n: v for n, v in fields.items() if v not in (None, "", {}, _DEFAULTS.get(n))}
        return {"v": 1, "model": model.reference} | given

    def answer_schema(self, inputs: Mapping[str, str]) -> pa.Schema:
        """Ask the driver's front for the schema of the answer; it does not load the model.

        Args:
            inputs: Input tensor to column on the wire.

        Raises:
            FlightsvcError: The request is invalid, or the front cannot be reached.
        """
        model, connection = self.model.driver()
        with model.naming():
            return connection.answer_schema(dataclasses.replace(self, model=model).descriptor(inputs))

    def columns(self, names: Sequence[str], known: Sequence[str], case_sensitive: bool) -> dict[str, int]:
        """Return the position of the column that feeds each input.

        Args:
            names: The names of the columns. Names that feed no input may occur twice.
            known: The inputs of the signature; empty: ``inputs`` is not checked.
            case_sensitive: Whether ``a`` and ``A`` are different names.

        Raises:
            NotFoundError: There is no such input or column, or an input has no column.
            InvalidArgumentError: Two columns have the name of one that is needed.
        """
        where = f"model {self.model.name}, signature {self.model.signature}"
        wanted = {name: column_of(entry) for name, entry in self.inputs.items()}
        if not wanted:
            only = len(known) == 1 and len(names) == 1
            wanted = {known[0]: names[0]} if only else {name: name for name in known}
        elif known:
            entries = self.inputs.values()
            lengths = [e.lengths for e in entries if isinstance(e, Input) and e.lengths is not None]
            for name in (*wanted, *lengths):
                if name not in known:
                    raise NotFoundError(f"{where}: there is no input {name!r}; inputs: {', '.join(known)}")
            for name in known:
                if name not in wanted and name not in lengths:
                    raise NotFoundError(
                        f"{where}: input {name!r} has no column; add it: inputs={{{name!r}: <column>, ...}}"
                    )
        positions: dict[str, int] = {}
        for name, column in wanted.items():
            found = [i for i, other in enumerate(names) if same_name(column, other, case_sensitive)]
            if not found:
                hint = "" if self.inputs else f"; say which one it is: inputs={{{name!r}: <column>}}"
                raise NotFoundError(
                    f"{where}: there is no column {column!r} for input {name!r}{hint}; "
                    f"columns: {', '.join(names)}"
                )
            if len(found) > 1:
                raise InvalidArgumentError(
                    f"{where}: {len(found)} columns are named {column!r}, ambiguous for input {name!r}; "
                    "rename them"
                )
            positions[name] = found[0]
        return positions

    def exchange(
        self, connection: Connection, names: Sequence[str], positions: Mapping[str, int], place: str = ""
    ) -> Exchange:
        """Return an exchange for record batches with the columns ``names``.

        Args:
            connection: The connection to the front.
            names: The names of all columns of the record batches.
            positions: The position of the column for each input, from :meth:`columns`.
            place: The caller's place, for logs and errors.
        """
        request_id = "-".join([uuid.uuid4().hex[:12], *place.split()])
        descriptor = self.descriptor({name: names[i] for name, i in positions.items()}, request_id)
        return Exchange(connection, descriptor, {names[i]: i for i in positions.values()}, place)


def read_signature(model: Model, connection: Connection) -> dict[str, dict[str, TensorSpec]]:
    """Return the ``inputs`` and ``outputs`` of the model's signature, as the front reads them."""
    about = connection.action("model.metadata", {"model": model.reference, "version": model.version})
    signatures = about["signatures"]
    if model.signature not in signatures:
        raise NotFoundError(
            f"model {model.name} has no signature {model.signature!r}; it has {', '.join(signatures)}"
        )
    return {
        side: {
            spec["name"]: TensorSpec(spec["dtype"], None if spec["shape"] is None else tuple(spec["shape"]))
            for spec in signatures[model.signature][side]
        }
        for side in ("inputs", "outputs")
    }


def same_name(one: str, other: str, case_sensitive: bool) -> bool:
    """Tell whether Spark takes two names for the same column."""
    return one == other if case_sensitive else one.lower() == other.lower()
