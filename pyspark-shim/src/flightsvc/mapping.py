"""How columns and tensors belong together, and what else a request may say."""

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
        shape: One number per dimension, the batch first; -1 is any size. ``None``: the rank is unknown.
    """

    dtype: str
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "[...]" if self.shape is None else f"[{','.join(map(str, self.shape))}]"
        return self.dtype + shape


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How pictures become one input tensor ``[batch, height, width, channels]``, in the sidecar.

    The column holds encoded files (JPEG, PNG, GIF, BMP; binary), their paths or URIs (string), which the
    worker reads, or Spark's image struct. A picture is turned upright,
    fitted, resized, brought to its channels; each value ``v`` of 0..255 then becomes ``v * scale + offset``.

    Attributes:
        size: Height and width of the tensor, in pixels.
        resize: ``bilinear``, ``nearest``, ``bicubic`` or ``area``, as ``tf.image.resize`` does them.
        antialias: Widens the kernel of ``bilinear`` and ``bicubic`` where a picture is made smaller.
        fit: ``crop``: the largest centred box of the tensor's aspect is taken; ``stretch``: all of the
            picture, in another aspect; ``pad``: all of it in its own aspect, in the centre of black.
        channels: ``RGB``, ``BGR`` or ``L``, which is grey.
        scale: One number, or one for each channel in the order of ``channels``.
        offset: One number, or one for each channel in the order of ``channels``.
        dtype: Element type of the tensor; ``None``: that of the input. Whole numbers are rounded.

    Raises:
        InvalidArgumentError: ``size`` is not two whole numbers, or ``scale`` or ``offset`` is not of finite
            numbers; those of NumPy are taken, too.
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
        """Return what ``keras.applications.*.preprocess_input`` does in ``mode``.

        Args:
            mode: ``tf`` (-1 to 1), ``caffe`` (BGR less ImageNet's means) or ``torch`` (less ImageNet's means,
                by its deviations).
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
        """Return the entry of the descriptor's ``preprocess``; defaults are left out."""
        fields: dict[str, Any] = {"size": list(self.size)}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        return fields


@dataclasses.dataclass(frozen=True)
class Input:
    """The column that feeds an input tensor, where its name alone does not say enough.

    Attributes:
        column: Name of the column.
        encoding: ``raw``: a binary column whose cells are exactly the bytes of one row of the tensor, in C
            order and little-endian. ``None``: the type table.
        pad: Fills up lists that differ in length: a number, a string or a bool, as the tensor's dtype is.
            An unknown dimension gets the longest length of the record batch, a known one its own.
        lengths: Name of another input tensor, integer and of rank 1, that receives the true length of each
            row's list; it has no column of its own.
        load: Makes what is sent of each value of the column that is not null. It is called in the worker, a
            few rows at a time, and travels there by cloudpickle. For an input that is made of pictures it
            returns the bytes of a file, or an array ``[height, width]`` or ``[height, width, channels]`` of
            uint8 or float, 0 to 255, in the order RGB(A). For any other input it returns a NumPy array that
            is one row of the tensor, with or without a leading dimension of 1, whose values the input's
            dtype can hold (floats are rounded to it); for an input of strings bytes. A row whose value it
            cannot load is one that cannot be run, and what it raised is the reason. ``None``: the values are
            sent as they are, but paths of pictures, which the worker reads.

    Raises:
        InvalidArgumentError: ``pad`` is not finite, ``load`` cannot be called or has an ``encoding`` beside.
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
        """Return the entry of the descriptor's ``inputs``; what is the worker's and defaults are left out."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "load"}


@dataclasses.dataclass(frozen=True)
class Output:
    """The column that an output tensor becomes, where its name alone does not say enough.

    Attributes:
        column: Name of the column.
        type: ``utf8``: a string tensor becomes text; a row with bytes that are not UTF-8 is refused.
            ``None``: the type table, where it becomes binary.
        shape: The shape of an output whose rank the signature does not tell, the batch first: ``(-1, 3)``.
    """

    column: str
    type: str | None = dataclasses.field(default=None, kw_only=True)
    shape: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    def wire(self) -> dict[str, Any]:
        """Return the entry of the descriptor's ``outputs``; defaults are left out."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        if self.shape is not None:
            fields["shape"] = list(self.shape)
        return fields


class Options(TypedDict, total=False):
    """What a request may say besides its model and its data, as keyword arguments.

    Attributes:
        inputs: Input tensor to column, or to :class:`Input`. Absent: columns of the same names, or the only
            column for the only input. A column of strings that feeds an input made of pictures holds paths
            or URIs of files, which the workers read.
        outputs: Output tensor to column, or to :class:`Output`, in the wanted order. Absent: all, by tensor
            name.
        on_error: What a row that cannot be run does: ``fail`` all, make its outputs ``null``, or null with
            the reason in ``error_column`` (``column``).
        error_column: Name of the column for the reason; ``error`` when absent.
        nulls: What a row with a null in an input is: ``null``, its outputs are null as in SQL, or ``fail``, a
            row that cannot be run.
        run_timeout: Seconds for each run of TensorFlow, 0 for no bound. Absent: 300.
        batching: ``off``: each record batch is one run. A mapping: ``max_batch_size`` in rows and
            ``batch_timeout_micros``, which may only lower the server's. Absent: a record batch is joined with
            what waits while the model is busy.
        device: ``auto``: a GPU if there is any, in a Spark task those that Spark gave it. Or ``cpu``,
            ``gpu``, the UUID of a GPU or of a MIG instance, or numbers as ``nvidia-smi`` prints them:
            ``0`` or ``0,1``.
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
    """Return ``device``, if it is written as one; whether it is there only its host can tell.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise InvalidArgumentError(
            f"device is {device!r}; it is auto, cpu, gpu, a UUID that begins with GPU- or MIG-, "
            "or numbers such as '0' or '0,1'"
        )
    return device


def _numbers(name: str, value: float | Iterable[float]) -> float | tuple[float, ...]:
    """Return a number or several as Python's own.

    Raises:
        InvalidArgumentError: It is something else, or one is not finite.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        many = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0  # an array may be one number
        numbers = tuple(map(float, value)) if many else float(value)  # type: ignore[arg-type]
        if all(map(math.isfinite, numbers if isinstance(numbers, tuple) else [numbers])):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgumentError(f"{name} is {value!r}; it is a finite number, or one for each channel")


def column_of(entry: str | Input | Output) -> str:
    """Return the column that a mapping's entry names."""
    return entry if isinstance(entry, str) else entry.column


def wire(entry: str | Input | Output) -> str | dict[str, Any]:
    """Return a mapping's entry for the descriptor, in its short form where that says all."""
    if isinstance(entry, str):
        return entry
    fields = entry.wire()
    return entry.column if len(fields) == 1 else fields
