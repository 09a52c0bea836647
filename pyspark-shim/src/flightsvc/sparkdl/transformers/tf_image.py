"""The module ``sparkdl.transformers.tf_image``: graphs on columns of pictures."""

from __future__ import annotations

from flightsvc.ml import images


class TFImageTransformer(images.TFImageTransformer):
    """Runs a graph on pictures: :class:`flightsvc.ml.TFImageTransformer`.

    Args:
        channelOrder: Of the graph's input: ``RGB``, ``BGR`` or ``L``.
        inputCol: The column of pictures.
        outputCol: The column that is added.
        graph: A graph of TensorFlow 1, its GraphDef, or a :class:`TFInputGraph`.
        inputTensor: Takes float32 ``[batch, height, width, channels]``; absent: ``sparkdl_image_input:0``.
        outputTensor: Name of the output.
        outputMode: ``vector``, or ``image``: Spark's image struct of float32.
        others: ``batchSize``, ``onError``, ``errorCol``.
    """
