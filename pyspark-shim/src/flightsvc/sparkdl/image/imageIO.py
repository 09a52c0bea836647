"""The module ``sparkdl.image.imageIO``: pictures in columns, in arrays and of Pillow.

A picture is Spark's image struct with the fields ``origin``, ``height``, ``width``, ``nChannels``, ``mode``
and ``data``; pixels are blue, green, red. Functions for Pillow need it (``pip install pillow``), also in
workers that run them for :func:`readImagesWithCustomFn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from flightsvc import image
from flightsvc.errors import FlightsvcError, InvalidArgumentError, NotFoundError
from flightsvc.spark.loading import IMAGE_FIELDS
from flightsvc.spark.session import active_session
from flightsvc.sparkdl.removed import removed

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from pyspark import SparkContext
    from pyspark.sql import Column, DataFrame, Row, SparkSession

    Array = np.ndarray[Any, Any]

__all__ = [
    "PIL_decode",
    "PIL_decode_and_resize",
    "PIL_to_imageStruct",
    "createResizeImageUDF",
    "filesToDF",
    "fixColorChannelOrdering",
    "imageArrayToStruct",
    "imageStructToArray",
    "imageStructToPIL",
    "imageTypeByName",
    "imageTypeByOrdinal",
    "readImagesWithCustomFn",
]

_SLICE_BYTES = 16 << 20  # the most bytes of pictures in a record batch, unless it has only one

__getattr__ = removed(__name__)


class ImageType(NamedTuple):
    """The meaning of a picture's ``mode``.

    Attributes:
        name: OpenCV's name.
        ord: OpenCV's number, the struct's ``mode``.
        nChannels: 1, 3 or 4.
        dtype: ``uint8`` or ``float32``.
    """

    name: str
    ord: int
    nChannels: int
    dtype: str


_TYPES = [
    ImageType(f"CV_{short}C{channels}", depth + 8 * (channels - 1), channels, dtype)
    for short, depth, dtype in (("8U", 0, "uint8"), ("32F", 5, "float32"))
    for channels in (1, 3, 4)
]


def imageTypeByOrdinal(ordinal: int) -> ImageType:
    """Return the type of a picture with the mode ``ordinal``.

    Raises:
        NotFoundError: There is no such mode; it is also a KeyError.
    """
    known = {kind.ord: kind for kind in _TYPES}
    if ordinal in known:
        return known[ordinal]
    hint = "; Spark gives -1 to a picture that it cannot read" if ordinal == -1 else ""
    raise NotFoundError(
        f"unsupported image type with ordinal {ordinal!r}; there are {', '.join(map(str, known))}{hint}"
    )


def imageTypeByName(name: str) -> ImageType:
    """Return the type of pictures that OpenCV calls ``name``, such as ``CV_8UC3``.

    Raises:
        NotFoundError: There is no such mode; it is also a KeyError.
    """
    known = {kind.name: kind for kind in _TYPES}
    if name in known:
        return known[name]
    raise NotFoundError(f"unsupported image type with name {name!r}; there are {', '.join(known)}")


def imageArrayToStruct(imgArray: Array, origin: str = "") -> Row:
    """Return an array as a picture for a column of type ``flightsvc.image.schema()``.

    Args:
        imgArray: uint8 or float32, ``[height, width, channels]`` with 1, 3 or 4 channels, a batch of one, or
            ``[height, width]``. The order of channels is not changed.
        origin: The source of the picture.

    Raises:
        InvalidArgumentError: The array has another type or shape; it is also a ValueError.
    """
    if imgArray.ndim == 4:
        if imgArray.shape[0] != 1:
            raise InvalidArgumentError(
                "The first dimension of a 4-d image array is expected to be 1, this array is "
                f"{list(imgArray.shape)}"
            )
        imgArray = imgArray[0]
    return image.to_struct(imgArray, origin)


def imageStructToArray(imageRow: Row | Mapping[str, Any]) -> Array:
    """Return a picture as an array ``[height, width, channels]`` of uint8 or float32.

    The array shares the picture's bytes and order of channels.

    Raises:
        InvalidArgumentError: The picture is null or invalid; it is also a ValueError.
    """
    return image.to_array(imageRow)


def imageStructToPIL(imageRow: Row | Mapping[str, Any]) -> Image.Image:
    """Return a picture of uint8 as one of Pillow: ``L``, ``RGB`` or ``RGBA``.

    Raises:
        InvalidArgumentError: The picture is of float32, null or invalid.
    """
    from PIL import Image

    array = image.to_array(imageRow)
    if array.dtype != "uint8":
        raise InvalidArgumentError(
            f"Can not convert image of type {array.dtype.name} to PIL, can only deal with 8U format"
        )
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else _reversed(array))


def PIL_to_imageStruct(img: Image.Image) -> Array:
    """Return a picture of Pillow as an array ``[height, width, channels]``, uint8, blue first.

    In spite of its name it returns an array, for :func:`imageArrayToStruct`. Grey pictures have one channel,
    pictures with alpha or a transparent colour four, all others three: palettes, CMYK, YCbCr and the like
    become colours. Of 16 bits the upper 8 are kept.

    Raises:
        InvalidArgumentError: The picture's mode is ``F``.
    """
    import numpy as np

    array = np.asarray(_plain(img))
    return array[..., None] if array.ndim == 2 else _reversed(array)


def _plain(img: Image.Image) -> Image.Image:
    """Return a picture of Pillow as one of mode ``L``, ``RGB`` or ``RGBA``."""
    import numpy as np
    from PIL import Image

    if img.mode == "F":
        raise InvalidArgumentError(
            "a picture of Pillow's mode F has no fixed range of values; scale and convert it to L"
        )
    if img.mode == "I" or img.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(img).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if img.mode in ("RGBA", "RGB", "L") and ("transparency" not in img.info):
        return img
    if img.has_transparency_data:
        return img.convert("RGBA")
    return img.convert("L" if img.mode == "1" else "RGB")


def fixColorChannelOrdering(currentOrder: str, imgAry: Array) -> Array:
    """Return an array with channels in ``currentOrder`` in the order of columns: blue, green, red, alpha.

    Args:
        currentOrder: ``RGB``, ``BGR`` or ``L`` (grey).
        imgAry: An array with channels last; for ``L`` with one channel, or without that dimension.

    Raises:
        InvalidArgumentError: There is no such order, or the array has other channels.
    """
    if currentOrder == "RGB":
        return _reversed(imgAry)
    if currentOrder == "BGR":
        return imgAry
    if currentOrder != "L":
        raise InvalidArgumentError(
            f"Unexpected channel order, expected one of L, RGB, BGR but got {currentOrder!r}"
        )
    if len(imgAry.shape) > 2 and imgAry.shape[-1] != 1:
        raise InvalidArgumentError(f"Channel order L expects one channel, this array is {list(imgAry.shape)}")
    return imgAry


def _reversed(array: Array) -> Array:
    """Return colours in the opposite order, and alpha last."""
    return array[..., [2, 1, 0, 3]] if array.shape[-1] == 4 else array[..., ::-1]


def createResizeImageUDF(
    size: tuple[int, int], *, onError: str = "fail", errorCol: str = "error"
) -> Callable[..., Column]:
    """Return a function of columns that stretches pictures to ``size`` in the sidecar.

    ``df.select(createResizeImageUDF((224, 224))("image").alias("image"))``. The column has pictures or
    encoded files. The filter is ``bicubic`` with antialiasing, as Pillow's default; a picture of that size is
    not changed, a null stays null. :func:`flightsvc.image.resize` has more options.

    Args:
        size: Height and width, in pixels.
        onError: As ``on_error`` of :func:`flightsvc.image.decode`.
        errorCol: As ``error_column`` there.

    Raises:
        InvalidArgumentError: ``size`` is not two numbers, or ``onError`` is invalid.
    """
    if len(size) != 2:
        raise InvalidArgumentError(f"New image size should have format [height, width] but got {size}")
    return image.resize(
        (size[0], size[1]),
        resize="bicubic",
        antialias=True,
        fit="stretch",
        on_error=onError,
        error_column=errorCol,
    )


def filesToDF(
    sc: SparkContext | SparkSession | None, path: str, numPartitions: int | None = None
) -> DataFrame:
    """Return the files of a folder: ``filePath``, a string, and ``fileData``, binary.

    Spark's file source ``binaryFile`` reads them lazily and skips empty files.

    Args:
        sc: A session; for a context or ``None``, the active session is used.
        path: A folder, a file or a pattern.
        numPartitions: Number of partitions, made by a shuffle; ``None``: Spark's partitions.

    Raises:
        InvalidArgumentError: There is no session.
    """
    from pyspark.sql.functions import col

    session = _session(sc)
    read = session.read.format("binaryFile").load(path)
    files = read.select(col("path").alias("filePath"), col("content").alias("fileData"))
    return files if numPartitions is None else files.repartition(numPartitions)


def PIL_decode(raw_bytes: bytes) -> Array:
    """Return an encoded file as an array ``[height, width, channels]``, uint8, blue first, by Pillow.

    It is turned upright by EXIF; channels are those of :func:`PIL_to_imageStruct`.

    Raises:
        OSError: Pillow cannot read it.
    """
    return PIL_to_imageStruct(_opened(raw_bytes))


def PIL_decode_and_resize(size: tuple[int, int]) -> Callable[[bytes], Array]:
    """Return :func:`PIL_decode` with a resize to ``size``, by Pillow's ``bicubic``.

    Args:
        size: Width and height, in pixels. This is Pillow's order, unlike all other sizes here.
    """

    def decode(raw_bytes: bytes) -> Array:
        from PIL import Image

        return PIL_to_imageStruct(_plain(_opened(raw_bytes)).resize(size, Image.Resampling.BICUBIC))

    return decode


def _opened(raw_bytes: bytes) -> Image.Image:
    import io

    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(raw_bytes)))


def readImagesWithCustomFn(
    path: str,
    decode_f: Callable[[bytes], Array],
    numPartition: int | None = None,
    *,
    onError: str = "null",
    errorCol: str = "error",
) -> DataFrame:
    """Return the files of a folder as the column ``image``, decoded by a function of the caller.

    :func:`flightsvc.image.read_images` needs no function, and no imaging library in the workers.

    Args:
        path: As in :func:`filesToDF`.
        decode_f: A function of a file's bytes that returns an array for :func:`imageArrayToStruct`, blue
            first. It runs in the workers, which need its imports. :func:`PIL_decode` is one.
        numPartition: As ``numPartitions`` of :func:`filesToDF`.
        onError: For a file that ``decode_f`` cannot decode: make its ``image`` ``null``, as in sparkdl; make
            it null and write path and reason into ``errorCol``, the last column (``column``); or ``fail`` the
            job with the file's name.
        errorCol: Name of the column for the reason.

    Raises:
        InvalidArgumentError: ``onError`` is invalid, ``errorCol`` is ``image``, or there is no session.
    """
    from pyspark.sql.types import StringType, StructType

    if onError not in ("fail", "null", "column"):
        raise InvalidArgumentError(f"onError is {onError!r}; it is one of fail, null, column")
    schema = StructType().add("image", image.schema())
    if onError == "column":
        if errorCol.lower() == "image":
            raise InvalidArgumentError("errorCol is 'image', which names the pictures; choose another")
        schema.add(errorCol, StringType())
    files = filesToDF(None, path, numPartition)
    return files.mapInArrow(_Reader(decode_f, onError, errorCol), schema)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The part of :func:`readImagesWithCustomFn` that runs in the workers; for the attributes see there."""

    decode_f: Callable[[bytes], Array]
    onError: str
    errorCol: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the pictures of files in small record batches."""
        pictures: list[dict[str, Any] | None] = []
        errors: list[str | None] = []
        held = 0
        for batch in batches:
            for path, data in zip(batch.column(0), batch.column(1), strict=True):
                picture, error = self._decoded(path.as_py(), data.as_py())
                pictures.append(picture)
                errors.append(error)
                held += len(picture["data"]) if picture else 0
                if held >= _SLICE_BYTES:
                    yield self._batch(pictures, errors)
                    pictures, errors, held = [], [], 0
        yield self._batch(pictures, errors)

    def _decoded(self, path: str, data: bytes) -> tuple[dict[str, Any] | None, str | None]:
        try:
            array = self.decode_f(data)
            if not hasattr(array, "ndim"):
                raise InvalidArgumentError(f"decode_f returned a {type(array).__name__}, not an array")
            return imageArrayToStruct(array, path).asDict(), None
        except Exception as error:  # any error of the caller's function
            kind = "" if isinstance(error, FlightsvcError) else f"{type(error).__name__}: "
            reason = f"{path}: {kind}{error}"
            if self.onError == "fail":
                raise InvalidArgumentError(
                    f"{reason.rstrip('.')}. To go on without such files: onError='null' or onError='column'"
                ) from error
            return None, reason

    def _batch(self, pictures: list[dict[str, Any] | None], errors: list[str | None]) -> pa.RecordBatch:
        struct = pa.struct([("origin", pa.string()), *IMAGE_FIELDS.items()])
        columns = {"image": pa.array(pictures, struct)}
        if self.onError == "column":
            columns[self.errorCol] = pa.array(errors, pa.string())
        return pa.RecordBatch.from_pydict(columns)


def _session(given: SparkContext | SparkSession | None) -> SparkSession:
    """Return the session that is given, else the active one."""
    session: Any = given if hasattr(given, "read") else active_session()
    if session is None:
        raise InvalidArgumentError("there is no Spark session; create one first")
    found: SparkSession = session
    return found
