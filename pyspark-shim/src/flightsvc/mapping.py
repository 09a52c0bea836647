"""The public types of a request: how columns feed inputs, what outputs become, and further options."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from flightsvc.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """The type of one input or output tensor of a signature.

    Attributes:
        dtype: TensorFlow's name of the element type, such as ``float32`` or ``string``.
        shape: The size of each dimension, batch first; -1: any size. ``None``: the rank is unknown.
    """

    dtype: str
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "[...]" if self.shape is None else f"[{','.join(map(str, self.shape))}]"
        return self.dtype + shape


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How the sidecar makes an input tensor ``[batch, height, width, channels]`` of pictures.

    The column has encoded files (JPEG, PNG, GIF, BMP; binary), paths or URIs of such files (string), which
    the worker reads, or Spark's image structs. A picture is turned upright, fitted, resized and converted to
    ``channels``. Then each value ``v`` from 0 to 255 becomes ``v * scale + offset``.

    Attributes:
        size: Height and width of the tensor, in pixels.
        resize: ``bilinear``, ``nearest``, ``bicubic`` or ``area``, as in ``tf.image.resize``.
        antialias: Whether the kernel of ``bilinear`` and ``bicubic`` is widened when a picture shrinks.
        fit: ``crop``: the largest centred box with the tensor's aspect ratio; ``stretch``: the whole
            picture, distorted; ``pad``: the whole picture, undistorted, centred on black.
        channels: ``RGB``, ``BGR`` or ``L`` (grey).
        scale: One number, or one for each channel in the order of ``channels``.
        offset: One number, or one for each channel in the order of ``channels``.
        dtype: Element type of the tensor; ``None``: that of the input. Values for integer types are rounded.

    Raises:
        InvalidArgumentError: ``size`` is not two integers, or ``scale`` or ``offset`` is not finite. Numbers
            of NumPy are accepted.
    """

    size: tuple[int, int]
    resize: str = dataclasses.field(default="bilinear", kw_only=True)
    antialias: bool = dataclasses.field(default=False, kw_only=True)
    fit: str = dataclasses.field(default="crop", kw_only=True)
    channels: str = dataclasses.field(default="RGB", kw_only=True)
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0
    dtype: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        try:
            height, width = map(operator.index, self.size)
        except (TypeError, ValueError):
            raise InvalidArgumentError(
                f"size is {self.size!r}; it is height and width in whole pixels, such as (224, 224)"
            ) from None
        object.__setattr__(self, "size", (height, width))
        for name in ("scale", "offset"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if self.dtype is not None and not isinstance(self.dtype, str):
            raise InvalidArgumentError(f"dtype is {self.dtype!r}; it is a name, such as 'float32'")

    @classmethod
    def keras(cls, mode: str, size: tuple[int, int], **how: Any) -> ImageInput:
        """Return the preprocessing of ``keras.applications.*.preprocess_input`` in ``mode``.

        Args:
            mode: ``tf`` (-1 to 1), ``caffe`` (BGR minus ImageNet's means) or ``torch`` (minus ImageNet's
                means, divided by its standard deviations).
            size: Height and width of the tensor, in pixels.
            **how: Further attributes: ``resize``, ``antialias``, ``fit``, ``dtype``.

        Raises:
            InvalidArgumentError: There is no such mode.
        """
        if mode == "tf":
            return cls(size, scale=1 / 127.5, offset=-1.0, **how)
        if mode == "caffe":
            return cls(size, channels="BGR", offset=(-103.939, -116.779, -123.68), **how)
        if mode == "torch":
            mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            scale = tuple(1 / (255 * d) for d in deviation)
            return cls(
                size, scale=scale, offset=tuple(-m / d for m, d in zip(mean, deviation, strict=True)), **how
            )
        raise InvalidArgumentError(f"mode is {mode!r}; it is one of tf, caffe, torch")

    def wire(self) -> dict[str, Any]:
        """Return the entry of the descriptor's ``preprocess``, without defaults."""
        fields: dict[str, Any] = {"size": list(self.size)}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        return fields


@dataclasses.dataclass(frozen=True)
class Input:
    """The column that feeds an input tensor, with options.

    Attributes:
        column: Name of the column.
        encoding: ``raw``: each cell of a binary column has the bytes of one row of the tensor, in C order and
            little-endian. ``None``: values are converted by the table of types.
        pad: Value with which shorter lists are filled up, of the tensor's dtype. An unknown dimension becomes
            as long as the longest list of the record batch.
        lengths: Name of another input tensor, of integers and rank 1, which gets the length of each row's
            list before padding. That input has no column.
        load: A function that the worker calls with each value that is not null; its result is sent instead
            of the value. It is pickled by cloudpickle. For an input that is made from pictures it returns the
            bytes of a file, or an array ``[height, width]`` or ``[height, width, channels]`` of uint8 or
            float, 0 to 255, in the order RGB(A); for an input of strings, bytes; for any other input, a NumPy
            array that is one row of the tensor, with or without a leading dimension of 1. Floats are rounded
            to the input's dtype; other values must fit it. If it raises an error, the row cannot be run, and
            the error is the reason. ``None``: values are sent as they are, except paths of pictures, which
            the worker reads.

    Raises:
        InvalidArgumentError: ``pad`` is not finite, ``load`` is not callable, or ``encoding`` is set, too.
    """

    column: str
    encoding: str | None = dataclasses.field(default=None, kw_only=True)
    pad: bool | int | float | str | None = dataclasses.field(default=None, kw_only=True)
    lengths: str | None = dataclasses.field(default=None, kw_only=True)
    load: Callable[[Any], Any] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.pad, float) and not math.isfinite(self.pad):
            raise InvalidArgumentError(f"pad of column {self.column!r} is {self.pad}; it must be finite")
        if self.load is not None and not callable(self.load):
            raise InvalidArgumentError(
                f"load of column {self.column!r} is {self.load!r}; it is a function of one value"
            )
        if self.load is not None and self.encoding is not None:
            raise InvalidArgumentError(
                f"column {self.column!r} has load, whose values are not encoded, and the encoding "
                f"{self.encoding!r}; leave out one"
            )

    def wire(self) -> dict[str, Any]:
        """Return the entry of the descriptor's ``inputs``, without ``load`` and defaults."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "load"}


@dataclasses.dataclass(frozen=True)
class Output:
    """The column that an output tensor becomes, with options.

    Attributes:
        column: Name of the column.
        type: ``utf8``: a string tensor becomes text, and a row with other bytes than UTF-8 is refused.
            ``None``: it becomes binary.
        shape: The shape of an output of unknown rank, batch first: ``(-1, 3)``.
    """

    column: str
    type: str | None = dataclasses.field(default=None, kw_only=True)
    shape: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    def wire(self) -> dict[str, Any]:
        """Return the entry of the descriptor's ``outputs``, without defaults."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        if self.shape is not None:
            fields["shape"] = list(self.shape)
        return fields


class Options(TypedDict, total=False):
    """The options of a request, as keyword arguments.

    Attributes:
        inputs: Input tensor to column, or to :class:`Input`. Default: columns with the inputs' names, or the
            only column for the only input. A column of strings that feeds an input made from pictures has
            paths or URIs of files, which the workers read.
        outputs: Output tensor to column, or to :class:`Output`, in the wanted order. Default: all outputs,
            sorted by name.
        on_error: For a row that cannot be run: ``fail`` the call, make its outputs ``null``, or make them
            null and write the reason into ``error_column`` (``column``).
        error_column: Name of the column for the reason. Default: ``error``.
        nulls: For a row with a null in an input: ``null`` makes its outputs null, as in SQL; ``fail`` makes
            it a row that cannot be run.
        run_timeout: Seconds for each run of TensorFlow, 0 for no limit. Default: 300.
        batching: ``off``: each record batch is a run of its own. A mapping with ``max_batch_size``, in rows,
            and ``batch_timeout_micros``, which can only lower the server's values. Default: record batches
            that wait while the model is busy are joined.
        device: ``auto``: a GPU if there is one; in a Spark task, the GPUs that Spark has assigned to it. Or
            ``cpu``, ``gpu``, the UUID of a GPU or of a MIG instance, or the numbers that ``nvidia-smi``
            prints: ``0`` or ``0,1``.
    """

    inputs: Mapping[str, str | Input] | None
    outputs: Mapping[str, str | Output] | None
    on_error: str
    error_column: str
    nulls: str
    run_timeout: float | None
    batching: str | Mapping[str, int] | None
    device: str


_DEVICE = re.compile(r"auto|cpu|gpu|((GPU|MIG)-[0-9A-Za-z/-]+|[0-9]+)(,((GPU|MIG)-[0-9A-Za-z/-]+|[0-9]+))*")


def check_device(device: str) -> str:
    """Return ``device`` if its syntax is valid; only the server knows whether the device exists.

    Raises:
        InvalidArgumentError: It is invalid.
    """
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise InvalidArgumentError(
            f"device is {device!r}; it is auto, cpu, gpu, a UUID that begins with GPU- or MIG-, "
            "or numbers such as '0' or '0,1'"
        )
    return device


def _numbers(name: str, value: float | Iterable[float]) -> float | tuple[float, ...]:
    """Return a number as a float, several numbers as a tuple of floats.

    Raises:
        InvalidArgumentError: ``value`` is something else, or a number is not finite.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        many = (
            isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
        )  # an array of NumPy may be one number
        numbers = tuple(map(float, value)) if many else float(value)  # type: ignore[arg-type]
        if all(map(math.isfinite, numbers if isinstance(numbers, tuple) else [numbers])):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgumentError(f"{name} is {value!r}; it is a finite number, or one for each channel")


def column_of(entry: str | Input | Output) -> str:
    """Return the name of the column of an entry of ``inputs`` or ``outputs``."""
    return entry if isinstance(entry, str) else entry.column


def wire(entry: str | Input | Output) -> str | dict[str, Any]:
    """Return an entry of ``inputs`` or ``outputs`` for the descriptor: only the name if it has no options."""
    if isinstance(entry, str):
        return entry
    fields = entry.wire()
    return entry.column if len(fields) == 1 else fields
