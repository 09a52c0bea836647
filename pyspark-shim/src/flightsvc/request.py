"""What is asked of a model: a request, its descriptor, and the columns that feed its inputs."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError, NotFoundError
from flightsvc.mapping import Input, Output, TensorSpec, column_of, wire
from flightsvc.server.stream import Exchange

if TYPE_CHECKING:
    import pyarrow as pa

    from flightsvc.model import Model
    from flightsvc.server.connection import Connection


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a model; empty ``inputs`` or ``outputs`` leave the choice to the rules.

    ``specs`` has the types of the inputs whose rows a function of the user makes; see :meth:`with_specs`.
    """

    model: Model
    inputs: dict[str, str | Input]
    outputs: dict[str, str | Output]
    on_error: str
    error_column: str
    nulls: str
    run_timeout: float | None
    batching: str | dict[str, int] | None
    layout: str
    device: str = "auto"
    specs: dict[str, TensorSpec] = dataclasses.field(default_factory=dict)

    def with_specs(self, inputs: Callable[[], Mapping[str, TensorSpec]]) -> Request:
        """Return this request with ``specs`` out of ``inputs()``, which is asked only if there are any."""
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
        """Return how ``column`` feeds the input ``name``."""
        entry = self.inputs.get(name)
        return dataclasses.replace(entry, column=column) if isinstance(entry, Input) else Input(column)

    def descriptor(self, inputs: Mapping[str, str] | None = None, request_id: str = "") -> dict[str, Any]:
        """Return the descriptor of the wire contract, fields at their default left out.

        Args:
            inputs: Input tensor to column on the wire, once that is settled.
            request_id: Names the stream in all logs.
        """
        if inputs is None:
            inputs = {name: column_of(entry) for name, entry in self.inputs.items()}
        fields: dict[str, Any] = {"v": 1, "model": self.model.reference}
        if self.model.version != "latest":
            fields["version"] = self.model.version
        if self.model.signature != "serving_default":
            fields["signature"] = self.model.signature
        if inputs:
            fields["inputs"] = {name: wire(self.input(name, column)) for name, column in inputs.items()}
        if self.outputs:
            fields["outputs"] = {name: wire(entry) for name, entry in self.outputs.items()}
        if self.model.preprocess:
            fields["preprocess"] = {name: image.wire() for name, image in self.model.preprocess.items()}
        if self.on_error != "fail":
            fields["on_error"] = self.on_error
        if self.on_error == "column" and self.error_column != "error":
            fields["error_column"] = self.error_column
        if self.nulls != "null":
            fields["nulls"] = self.nulls
        if self.run_timeout is not None:
            fields["run_timeout_ms"] = math.ceil(self.run_timeout * 1000)
        if self.batching is not None:
            fields["batching"] = self.batching
        if self.layout != "list":
            fields["layout"] = self.layout
        if self.device != "auto":
            fields["device"] = self.device
        if request_id:
            fields["request_id"] = request_id
        return fields

    def answer_schema(self, inputs: Mapping[str, str]) -> pa.Schema:
        """Return the schema of the answer, asked on the driver without loading the model.

        Args:
            inputs: Input tensor to column on the wire.

        Raises:
            FlightsvcError: The request is wrong, or the front cannot be asked.
        """
        model, connection = self.model.driver()
        with model.naming():
            return connection.answer_schema(dataclasses.replace(self, model=model).descriptor(inputs))

    def columns(self, names: Sequence[str], known: Sequence[str], case_sensitive: bool) -> dict[str, int]:
        """Return the position of the column that feeds each input.

        Args:
            names: The columns that there are; names that nothing asks for may occur twice.
            known: The inputs of the signature; empty if ``inputs`` were given and are to be believed.
            case_sensitive: Whether ``a`` and ``A`` are two columns.

        Raises:
            NotFoundError: An input or a column does not exist, or an input has no column.
            InvalidArgumentError: A column's name occurs twice.
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
            connection: Where the front is.
            names: All columns of the record batches.
            positions: Which of them feeds each input, from :meth:`columns`.
            place: Where this runs, for logs and errors.
        """
        request_id = "-".join([uuid.uuid4().hex[:12], *place.split()])
        descriptor = self.descriptor({name: names[i] for name, i in positions.items()}, request_id)
        return Exchange(connection, descriptor, {names[i]: i for i in positions.values()}, place)


def read_signature(model: Model, connection: Connection) -> dict[str, dict[str, TensorSpec]]:
    """Return the model's ``inputs`` and ``outputs``, as the front at ``connection`` reads them."""
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
    """Tell whether two column names are one to Spark."""
    return one == other if case_sensitive else one.lower() == other.lower()
