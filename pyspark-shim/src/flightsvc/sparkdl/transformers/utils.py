"""The module ``sparkdl.transformers.utils``: the placeholder of graphs for pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flightsvc.errors import InvalidArgumentError
from flightsvc.export import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

IMAGE_INPUT_PLACEHOLDER_NAME = "sparkdl_image_input"
"""The default input of :class:`TFImageTransformer`."""


class ImageNetConstants:
    """Numbers of all networks of ImageNet."""

    NUM_CLASSES = 1000


class InceptionV3Constants:
    """Numbers of InceptionV3; :func:`flightsvc.ml.networks.network` has all networks."""

    INPUT_SHAPE = (299, 299)
    NUM_OUTPUT_FEATURES = 131072


def imageInputPlaceholder(nChannels: int | None = None) -> tf.Tensor:
    """Return a placeholder for pictures of the default name, float32 ``[batch, height, width, nChannels]``.

    Raises:
        InvalidArgumentError: There is no default graph.
    """
    tf = import_tensorflow()
    if tf.executing_eagerly():
        raise InvalidArgumentError(
            "a placeholder belongs into a graph; make it in `with tf.Graph().as_default():`, or call "
            "tf.compat.v1.disable_v2_behavior() first"
        )
    shape: list[Any] = [None, None, None, nChannels]
    return tf.compat.v1.placeholder(tf.float32, shape, name=IMAGE_INPUT_PLACEHOLDER_NAME)
