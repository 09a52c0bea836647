"""Graphs of TensorFlow 1 that run on Spark's image structs, each picture in its own size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError
from flightsvc.export import import_tensorflow
from flightsvc.export.graph import Subgraph, TFInputGraph

if TYPE_CHECKING:
    import tensorflow as tf


def picture_model(
    graph: TFInputGraph, inputTensor: str, outputTensor: str, channelOrder: str, outputMode: str
) -> Path:
    """Return the folder of a SavedModel that runs a graph on each picture in the picture's own size.

    Its inputs are the fields of Spark's image struct: ``data`` (string), ``height``, ``width``, ``nChannels``
    and ``mode`` (int32). The graph gets ``[1, height, width, channels]`` with the values of ``data``. If it
    takes 3 channels, grey becomes three equal channels; if it takes 1, colours become grey; if its channels
    are unknown, grey stays grey. Alpha is dropped.

    In mode ``vector`` the output is ``vector`` (float32), all values of the row's output. If their number is
    not fixed, rows are filled up with zeros, and ``length`` (int32) has the number of values. In mode
    ``image`` the outputs are the fields of a picture, of uint8 if the graph's output is, else of float32,
    with colours in the order blue, green, red.

    Args:
        graph: The graph.
        inputTensor: The tensor for the picture.
        outputTensor: The tensor of the result; in mode ``image`` ``[1, height, width, channels]``.
        channelOrder: The order of channels in the graph: ``RGB``, ``BGR`` or ``L``.
        outputMode: ``vector`` or ``image``.

    Raises:
        NotFoundError: The graph has no such tensor.
        InvalidArgumentError: The graph does not take pictures of that order or does not return pictures, or
            an argument is invalid.
    """
    for name, value, known in (
        ("channelOrder", channelOrder, ("RGB", "BGR", "L")),
        ("outputMode", outputMode, ("vector", "image")),
    ):
        if value not in known:
            raise InvalidArgumentError(f"{name} is {value!r}; it is one of {', '.join(known)}")
    tf = import_tensorflow()

    def build() -> tuple[dict[str, Any], dict[str, Any]]:
        part = Subgraph(graph, [inputTensor], [outputTensor])
        [feed], [fetch] = part.feeds, part.fetches
        channels = _channels(feed, channelOrder)
        if outputMode == "image" and fetch.shape.rank not in (None, 3, 4):
            raise InvalidArgumentError(
                f"output {outputTensor!r} is {fetch.shape}, not a picture; it must be [1, height, width, "
                "channels]; or set outputMode to 'vector'"
            )

        def row(fields: dict[str, Any]) -> dict[str, Any]:
            picture = tf.cast(_in_order(_pixels(**fields), channelOrder, channels), feed.dtype)[None]
            picture.set_shape([1, None, None, channels])
            [made] = part([picture])
            if made.dtype != tf.uint8 or outputMode == "vector":
                made = tf.cast(made, tf.float32)
            if outputMode == "vector":
                return {"data": _raw(made)}
            return _struct(made, channelOrder)

        width = None if fetch.shape.rank is None else fetch.shape[1:].num_elements()
        names = ("height", "width", "nChannels", "mode")
        inputs = {"data": tf.compat.v1.placeholder(tf.string, [None])}
        inputs |= {name: tf.compat.v1.placeholder(tf.int32, [None]) for name in names}
        specs = {"data": tf.TensorSpec([], tf.string)}
        if outputMode == "image":
            specs |= {name: tf.TensorSpec([], tf.int32) for name in names}

        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def rows(fields: dict[str, Any]) -> dict[str, Any]:
            made: dict[str, Any] = tf.map_fn(row, fields, fn_output_signature=specs)
            if outputMode == "image":
                return made
            sizes = tf.strings.length(made["data"])
            longest = tf.maximum(tf.reduce_max(sizes), 4)
            vector = tf.io.decode_raw(made["data"], tf.float32, fixed_length=longest)
            if width:
                return {"vector": tf.ensure_shape(vector, [None, width])}
            return {"vector": vector, "length": sizes // 4}

        return inputs, rows(inputs)

    return graph.exported(("pictures", inputTensor, outputTensor, channelOrder, outputMode), build)


def _channels(feed: tf.Tensor, channelOrder: str) -> int | None:
    """Return how many channels the graph takes; ``None``: unknown."""
    shape = None if feed.shape.rank is None else feed.shape.as_list()
    if shape is not None and (len(shape) != 4 or shape[0] not in (None, 1)):
        raise InvalidArgumentError(
            f"input {feed.name!r} is {feed.shape}; for pictures it must be [None, height, width, channels]"
        )
    channels: int | None = shape[3] if shape else None
    if channelOrder == "L":
        channels = channels or 1
    if channels not in (None, 1, 3) or (channelOrder == "L" and channels != 1):
        raise InvalidArgumentError(
            f"input {feed.name!r} takes {channels} channels, channelOrder {channelOrder!r} "
            f"has {1 if channelOrder == 'L' else 3}"
        )
    return channels


def _pixels(
    data: tf.Tensor, height: tf.Tensor, width: tf.Tensor, nChannels: tf.Tensor, mode: tf.Tensor
) -> tf.Tensor:
    """Return the pixels of an image struct as float32 [height, width, nChannels], in the struct's order."""
    tf = import_tensorflow()
    count = tf.cast(height, tf.int64) * tf.cast(width, tf.int64) * tf.cast(nChannels, tf.int64)
    size = tf.strings.length(data)
    floats = tf.equal(mode % 8, 5)
    known = tf.reduce_any(tf.equal(mode, [0, 16, 24, 5, 21, 29])) & tf.equal(nChannels, mode // 8 + 1)
    fits = tf.equal(tf.cast(size, tf.int64), count * tf.where(floats, tf.constant(4, tf.int64), 1))
    checks = [
        tf.debugging.Assert(known, ["the picture is invalid, or its mode and nChannels do not agree:", mode]),
        tf.debugging.Assert(
            (height > 0) & (width > 0) & fits,
            ["height, width and nChannels do not agree with the bytes of data:", height, width, size],
        ),
    ]
    with tf.control_dependencies(checks):
        data = tf.identity(data)
    values = tf.cond(
        floats,
        lambda: tf.io.decode_raw(data, tf.float32),
        lambda: tf.cast(tf.io.decode_raw(data, tf.uint8), tf.float32),
    )
    return tf.reshape(values, tf.stack([height, width, nChannels]))


def _in_order(picture: tf.Tensor, channelOrder: str, channels: int | None) -> tf.Tensor:
    """Return the pixels of an image struct in the channels of the graph."""
    tf = import_tensorflow()
    grey = tf.equal(tf.shape(picture)[2], 1)
    if channels == 1:
        weights = tf.constant([0.114, 0.587, 0.299])
        return tf.cond(
            grey,
            lambda: picture,
            lambda: tf.reduce_sum(picture[..., :3] * weights, axis=-1, keepdims=True),
        )
    if channels == 3:
        picture = tf.cond(grey, lambda: tf.repeat(picture, 3, axis=-1), lambda: picture)
    picture = picture[..., :3]
    return tf.reverse(picture, [-1]) if channelOrder == "RGB" else picture


def _struct(picture: tf.Tensor, channelOrder: str) -> dict[str, tf.Tensor]:
    """Return the fields of an image struct for an output of the graph."""
    tf = import_tensorflow()
    rank = tf.rank(picture)
    shape = tf.shape(picture)
    alone = tf.equal(rank, 3) | (tf.equal(rank, 4) & tf.equal(shape[0], 1))
    check = tf.debugging.Assert(alone, ["the output is no picture [1, height, width, channels]:", shape])
    with tf.control_dependencies([check]):
        picture = tf.reshape(picture, shape[-3:])
    height, width, channels = tf.unstack(tf.shape(picture), num=3)
    check = tf.debugging.Assert(
        tf.reduce_any(tf.equal(channels, [1, 3, 4])),
        ["the output is a picture of other than 1, 3 or 4 channels:", channels],
    )
    with tf.control_dependencies([check]):
        picture = tf.identity(picture)
    if channelOrder == "RGB":
        order = tf.range(channels)
        order = tf.where((channels >= 3) & (order < 3), 2 - order, order)
        picture = tf.gather(picture, order, axis=-1)
    mode = (channels - 1) * 8 + (0 if picture.dtype == tf.uint8 else 5)
    return {"data": _raw(picture), "height": height, "width": width, "nChannels": channels, "mode": mode}


def _raw(tensor: tf.Tensor) -> tf.Tensor:
    """Return the bytes of a tensor's values, which are the end of a serialized tensor."""
    tf = import_tensorflow()
    size = tf.size(tensor) * tensor.dtype.size
    return tf.strings.substr(tf.io.serialize_tensor(tensor), -size, size)
