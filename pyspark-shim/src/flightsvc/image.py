"""Pictures in DataFrames: reading and resizing them in the sidecar, converting them from and to NumPy.

A picture in a column is Spark's image struct, as ``spark.read.format("image")`` makes it: ``origin``,
``height``, ``width``, ``nChannels``, ``mode`` and ``data``. The bytes of ``data`` are rows from the top; a
pixel is blue, green, red and alpha, or one grey value. The sidecar decodes pictures with its built-in model
``image``, so workers need no imaging library.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from flightsvc.errors import InvalidArgumentError
from flightsvc.mapping import ImageInput
from flightsvc.model import Model
from flightsvc.request import Request, same_name
from flightsvc.server.connection import IMAGE_MODEL
from flightsvc.server.stream import ROW_BYTES
from flightsvc.spark import arrays
from flightsvc.spark.dataframe import worker_connection
from flightsvc.spark.loading import DEPTHS, IMAGE_FIELDS, image_fields
from flightsvc.spark.session import acting_for, active_conf, place, quoted, settings_of
from flightsvc.spark.types import image_type
from flightsvc.spark.verdicts import IMAGES, of_type

if TYPE_CHECKING:
    import numpy as np
    from pyspark.sql import Column, DataFrame, Row, SparkSession
    from pyspark.sql.types import StructType

SLICE_ROWS = 64
"""The most pictures that are sent together, with at most SLICE_BYTES, to bound memory."""
SLICE_BYTES = 4 << 20

_COLUMN = "picture"  # on the wire
_POLICIES = ("fail", "null", "column")
_FILE_COLUMNS = {"path": "string", "modificationTime": "timestamp", "length": "bigint", "content": "binary"}
_PICTURES = "pictures are binary (files) or Spark's image struct"
_ORIGINS = "the origin of pictures is text; leave it out, or use CAST(... AS STRING)"


def schema() -> StructType:
    """Return the type of Spark's image struct."""
    return image_type()


def read_images(
    spark: SparkSession,
    path: str | Sequence[str],
    *,
    on_error: str = "fail",
    error_column: str = "error",
    stream: bool = False,
    **options: Any,
) -> DataFrame:
    """Return the picture files below ``path``: the column ``image``, then one for each partition folder.

    A folder ``label=1`` makes a column ``label``. Only the list of files is read at once; pictures are read
    by Spark's tasks. JPEG, PNG, GIF (its first frame) and BMP are decoded and turned upright. Grey pictures
    have one channel, coloured ones three, those with alpha four.

    Args:
        spark: A session, classic or Connect.
        path: A folder, a file, a pattern, or several of them; with ``stream`` one folder or pattern.
        on_error: For a file that is not a picture: ``fail`` the job with the file's name; make its ``image``
            ``null``; or make it null and write path and reason into ``error_column``, the last column
            (``column``).
        error_column: Name of the column for the reason.
        stream: Return a streaming DataFrame, which also reads files that are added later.
        **options: Options of Spark's file source, such as ``recursiveFileLookup=True``,
            ``pathGlobFilter="*.jpg"``, ``basePath`` or ``maxFilesPerTrigger``.

    Raises:
        InvalidArgumentError: ``on_error`` is invalid, or two columns have one name.
    """
    from pyspark.sql.functions import col

    if stream and not isinstance(path, str):
        raise InvalidArgumentError("read_images with stream=True takes one path, which may be a glob pattern")
    paths: Any = path if isinstance(path, str) else list(path)
    # With the columns of the source given, Spark moves one behind the others if a folder has its name. It
    # cannot move content, the last one; then Spark refuses the job when it plans it.
    columns = ", ".join(map(" ".join, _FILE_COLUMNS.items()))
    reader: Any = spark.readStream if stream else spark.read
    files: DataFrame = reader.format("binaryFile").schema(columns).options(**options).load(paths)
    for own, found in zip(_FILE_COLUMNS, files.columns, strict=False):
        if own != found:
            raise InvalidArgumentError(
                f"read_images: a folder is named {own}=..., but {own} is a column of Spark's file source; "
                "rename the folder, or set recursiveFileLookup=True, which makes no partition columns"
            )
    folders = files.columns[len(_FILE_COLUMNS) :]
    added = ["image", error_column] if on_error == "column" else ["image"]
    names = [*added, *folders]
    for i, name in enumerate(names):
        if any(same_name(name, other, case_sensitive=False) for other in names[:i]):
            raise InvalidArgumentError(
                f"read_images: the result would have two columns {name!r}; set another error_column, or set "
                "recursiveFileLookup=True, which makes no partition columns"
            )
    with acting_for(spark):
        picture = decode(on_error=on_error, error_column=error_column)(files["content"], files["path"])
    kept = [files[quoted(name)] for name in folders]
    if on_error != "column":
        return files.select(picture.alias("image"), *kept)
    pair = "_" + max(names, key=len)  # longer than all names, so unlike them
    both = files.select(picture.alias(pair), *kept)
    image, error = (col(f"{quoted(pair)}.{quoted(name)}").alias(name) for name in ("image", error_column))
    return both.select(image, *(both[quoted(name)] for name in folders), error)


def decode(*, on_error: str = "fail", error_column: str = "error") -> Callable[..., Column]:
    """Return a function of columns that decodes picture files without resizing them.

    ``decode()("content", "path")``: the first column has the files (binary); the second is optional and
    becomes the ``origin`` of the pictures (string). Formats, channels and ``on_error`` are those of
    :func:`read_images`; with ``column`` the function returns a struct of ``image`` and ``error_column``. A
    null stays null. Columns of other types are refused when Spark analyses the query. The function uses the
    settings of the active session.

    Raises:
        InvalidArgumentError: ``on_error`` is invalid, or ``error_column`` is ``image``.
    """
    return _function("decode", None, on_error, error_column)


def resize(
    size: tuple[int, int],
    *,
    resize: str = "bilinear",
    antialias: bool = False,
    fit: str = "crop",
    channels: str | None = None,
    on_error: str = "fail",
    error_column: str = "error",
) -> Callable[..., Column]:
    """Return a function of columns that resizes pictures in the sidecar.

    ``resize((224, 224))("image")``: the column has pictures (Spark's image struct) or encoded files (binary);
    a second column is optional and becomes their ``origin``. Pictures of float32 keep that type. It replaces
    ``sparkdl.image.imageIO.createResizeImageUDF``.

    Args:
        size: Height and width, in pixels.
        resize: As in :class:`ImageInput`.
        antialias: As in :class:`ImageInput`.
        fit: As in :class:`ImageInput`.
        channels: ``BGR``, ``L`` (grey), or ``None`` for the channels that each picture has.
        on_error: As in :func:`decode`.
        error_column: As in :func:`decode`.

    Raises:
        InvalidArgumentError: An argument is invalid.
        FlightsvcError: No front could be reached, which checks the arguments.
    """
    if channels not in (None, "BGR", "L"):
        raise InvalidArgumentError(f"channels is {channels!r}; it is BGR or L, or None to keep its own")
    # RGB is the default and not sent; the built-in model then keeps the channels of each picture.
    how = ImageInput(size, resize=resize, antialias=antialias, fit=fit, channels=channels or "RGB")
    return _function("resize", how, on_error, error_column)


def to_struct(array: np.ndarray[Any, Any], origin: str = "") -> Row:
    """Return an array as a picture for a column of type :func:`schema`.

    It replaces ``sparkdl.image.imageIO.imageArrayToStruct``.

    Args:
        array: uint8 or float32, ``[height, width]`` or ``[height, width, channels]`` with 1, 3 or 4 channels.
            They are stored in this order; Spark takes it for blue, green, red, alpha.
        origin: The source of the picture.

    Raises:
        InvalidArgumentError: The array has another type or shape.
    """
    from pyspark.sql import Row

    return Row(origin=origin, **image_fields(array))


def to_array(picture: Row | Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return a picture as an array ``[height, width, channels]`` of uint8 or float32.

    The array shares the picture's bytes and is read-only if they are. Channels keep their order: blue, green,
    red, alpha. It replaces ``sparkdl.image.imageIO.imageStructToArray``.

    Raises:
        InvalidArgumentError: The picture is null, Spark could not read it, or its fields contradict each
            other.
    """
    import numpy as np

    if picture is None:
        raise InvalidArgumentError("the picture is null")
    height, width, channels = (picture[name] for name in ("height", "width", "nChannels"))
    mode, data = picture["mode"], picture["data"]
    if mode == -1:
        raise InvalidArgumentError("the picture has mode -1: Spark could not read it")
    dtypes = {depth + 8 * (n - 1): (name, n) for name, depth in DEPTHS.items() for n in (1, 3, 4)}
    if mode not in dtypes:
        raise InvalidArgumentError(f"the picture has mode {mode}; modes are {sorted(dtypes)}")
    name, wanted = dtypes[mode]
    dtype = np.dtype(name).newbyteorder("<")
    if channels != wanted or min(height, width) < 1 or len(data) != height * width * wanted * dtype.itemsize:
        raise InvalidArgumentError(
            f"the picture's fields do not match: mode {mode} ({wanted} x {name}), {height} x {width} "
            f"pixels, {channels} channels, {len(data)} bytes"
        )
    return np.frombuffer(data, dtype).reshape(height, width, wanted)


def of_tensor(tensor: Column, source: Column) -> Column:
    """Return a column of tensors as pictures of float32, without reordering channels.

    Args:
        tensor: A column of numbers, ``[height, width, channels]`` as nested arrays.
        source: A column of pictures or paths, for ``origin``; columns of other types give no origin.
    """
    from pyspark.sql import functions as F

    # pandas makes a struct of nulls of a null struct.
    return F.when(tensor.isNotNull(), arrays.scalar(_of_tensor, schema(), ())(tensor, source))


def _of_tensor(tensors: pa.Array, source: pa.Array) -> pa.Array:
    origins: list[str | None] = [""] * len(tensors)
    if pa.types.is_struct(source.type) and "origin" in {field.name for field in source.type}:
        origins = source.field("origin").to_pylist()
    elif pa.types.is_string(source.type) or pa.types.is_large_string(source.type):
        origins = source.to_pylist()
    pictures: list[dict[str, Any] | None] = []
    for i, origin in enumerate(origins):
        if not tensors[i].is_valid:
            pictures.append(None)
            continue
        lines = tensors.slice(i, 1).flatten()
        pixels = lines.flatten()
        values = pixels.flatten().cast(pa.float32())
        at = values.offset * 4
        pictures.append(
            {
                "origin": origin,
                "height": len(lines),
                "width": len(pixels) // max(1, len(lines)),
                "nChannels": len(values) // max(1, len(pixels)),
                "mode": DEPTHS["float32"] + 8 * (len(values) // max(1, len(pixels)) - 1),
                "data": values.buffers()[1].slice(at, 4 * len(values)).to_pybytes(),
            }
        )
    return pa.array(pictures, pa.struct([("origin", pa.string()), *IMAGE_FIELDS.items()]))


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """The part of :func:`decode` and :func:`resize` that runs in the workers.

    Attributes:
        request: The request to the sidecar, always with ``on_error="column"``; ``on_error`` is applied here.
        on_error: As in :func:`decode`.
        error_column: Name of the column for the reason.
        conf: ``spark.flightsvc.*`` of the driver's session.
    """

    request: Request
    on_error: str
    error_column: str
    conf: dict[str, str]

    def __call__(self, columns: Iterable[Any]) -> Iterator[pa.Array]:
        """Yield the pictures for each array of ``columns``, or for each pair of arrays with origins."""
        connection = worker_connection(self.request, self.conf)
        exchange = self.request.exchange(connection, [_COLUMN], {"image": 0}, place())
        answers = exchange.answers(rows for column in columns for rows in _slices(column))
        try:
            for answer in answers:
                yield self._result(answer.batch, answer.outputs)
        finally:
            answers.close()

    def _result(self, asked: pa.RecordBatch, outputs: pa.RecordBatch) -> pa.Array:
        origin = asked.column("origin")
        # The server's text begins with the column's name on the wire, which the caller does not know.
        said = pc.replace_substring_regex(outputs.column("error"), f'^column "{_COLUMN}": ', "")
        reason = pc.coalesce(asked.column("error"), said)
        named = pc.if_else(pc.equal(origin, ""), "", pc.binary_join_element_wise(origin, "", ": "))
        error = pc.binary_join_element_wise(pc.fill_null(named, ""), reason, "")
        if self.on_error == "fail" and error.null_count < len(error):
            first = error.drop_null()[0].as_py().rstrip(".")
            raise InvalidArgumentError(
                f"{first}. To go on without such pictures: on_error='null' or on_error='column'"
            )
        image = pa.StructArray.from_arrays(
            [origin, *map(outputs.column, IMAGE_FIELDS)],
            names=["origin", *IMAGE_FIELDS],
            mask=outputs.column("height").is_null(),
        )
        if self.on_error != "column":
            return image
        return pa.StructArray.from_arrays([image, error], names=["image", self.error_column])


def _function(
    name: str, preprocess: ImageInput | None, on_error: str, error_column: str
) -> Callable[..., Column]:
    """Return the function of columns that runs a :class:`_Decoder`."""
    from pyspark.sql.types import StringType, StructType

    if on_error not in _POLICIES:
        raise InvalidArgumentError(f"on_error is {on_error!r}; it is one of {', '.join(_POLICIES)}")
    if on_error == "column" and same_name(error_column, "image", case_sensitive=False):
        raise InvalidArgumentError("error_column is 'image', which names the pictures; choose another")
    model = Model(IMAGE_MODEL, preprocess={} if preprocess is None else {"image": preprocess})
    request = model.request(on_error="column")
    if preprocess is not None:  # the driver's front checks it
        request.answer_schema({"image": _COLUMN})
    decoder = _Decoder(request, on_error, error_column, settings_of(active_conf()))

    struct = schema()
    if on_error == "column":
        struct = StructType().add("image", struct).add(error_column, StringType())
    function, call = arrays.iterator(decoder, name, struct)

    @functools.wraps(function)  # keeps the attributes with which Spark registers it
    def checked(*columns: Column | str) -> Column:
        if len(columns) not in (1, 2):
            raise InvalidArgumentError(
                f"{name} takes a column of pictures and perhaps one of origins; it got {len(columns)} columns"
            )
        given = [of_type(name, columns[0], f"^binary$|{IMAGES}", _PICTURES)]
        given += [of_type(name, column, "^(string|char|varchar|void)", _ORIGINS) for column in columns[1:]]
        return call(*given)

    return checked


def _slices(column: pa.Array | tuple[pa.Array, ...]) -> Iterator[pa.RecordBatch]:
    """Yield a column of pictures in small record batches, with the columns ``origin`` and ``error``.

    Pictures that are too large to be sent are null and have a reason in ``error``.

    Raises:
        InvalidArgumentError: A column has another type, which Spark does not check in SQL.
    """
    picture, *origins = column if isinstance(column, tuple) else (column,)
    if len(origins) > 1:
        raise InvalidArgumentError(
            f"there are {1 + len(origins)} columns; give one of pictures and perhaps one of origins"
        )
    data = picture
    if pa.types.is_struct(picture.type):
        fields = {field.name: i for i, field in enumerate(picture.type)}
        data = picture.field(fields["data"]) if "data" in fields else data
        if not origins and "origin" in fields:
            origins = [picture.field(fields["origin"])]
    if not pa.types.is_binary(data.type) and not pa.types.is_large_binary(data.type):
        raise InvalidArgumentError(f"{_PICTURES}; this column is {picture.type}")
    origin = origins[0] if origins else pa.repeat("", len(picture))
    if not (
        pa.types.is_string(origin.type) or pa.types.is_large_string(origin.type) or origin.type == pa.null()
    ):
        raise InvalidArgumentError(f"{_ORIGINS}; this column is {origin.type}")
    origin = origin.cast(pa.string())  # Spark may send large ones
    sizes = pc.fill_null(pc.binary_length(data), 0)
    large = pc.greater(sizes, ROW_BYTES - (1 << 20))
    if large.true_count:
        picture = pc.if_else(large, pa.scalar(None, picture.type), picture)
    reason = pa.scalar(f"it is larger than {(ROW_BYTES >> 20) - 1} MiB", pa.string())
    error = pc.if_else(large, reason, pa.scalar(None, pa.string()))
    rows = pa.RecordBatch.from_arrays([picture, origin, error], [_COLUMN, "origin", "error"])
    start = held = 0
    for end, size in enumerate(sizes.to_pylist()):
        if end > start and (end - start == SLICE_ROWS or held + size > SLICE_BYTES):
            yield rows.slice(start, end - start)
            start, held = end, 0
        held += size
    if start < len(rows):
        yield rows.slice(start)
