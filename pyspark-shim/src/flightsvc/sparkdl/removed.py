"""Names of sparkdl that are not here: each says what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from flightsvc.errors import FlightsvcError

TRAINING = "training is not in this version"

INSTEAD = {
    "GraphFunction": "give flightsvc.Model a SavedModel or a Keras model, or make a TFInputGraph",
    "HorovodRunner": f"{TRAINING}; pyspark.ml.torch.distributor.TorchDistributor runs a function on all "
    "executors",
    "IsolatedSession": "make the graph in `with tf.Graph().as_default()` and give TFInputGraph.fromGraph its "
    "session",
    "KerasImageFileEstimator": f"{TRAINING}; fit the model with Keras on the driver and give it to "
    "KerasImageFileTransformer, or fit an estimator of Spark ML to DeepImageFeaturizer's features",
    "SparkMode": "modes are OpenCV's numbers; see flightsvc.sparkdl.image.imageIO.imageTypeByName",
    "imageSchema": "use flightsvc.image.schema()",
    "imageType": "use flightsvc.sparkdl.image.imageIO.imageTypeByOrdinal(image.mode)",
    "readImages": "use flightsvc.image.read_images(spark, folder); the path is in image.origin",
    "resizeImage": "use flightsvc.sparkdl.image.imageIO.createResizeImageUDF((height, width))",
    "stripAndFreezeGraph": "use strip_and_freeze_until of flightsvc.sparkdl.graph.utils",
}
"""What to use in place of names that several modules had."""


class RemovedError(FlightsvcError, ImportError):
    """A name of sparkdl that is not carried over; the text says what to use instead."""


def removed(module: str, *names: str, **instead: str) -> Callable[[str], NoReturn]:
    """Return the ``__getattr__`` of a module that had names which are not carried over.

    Args:
        module: The module's ``__name__``.
        *names: Names that are in :data:`INSTEAD`.
        **instead: What to use in place of others.
    """
    instead |= {name: INSTEAD[name] for name in names}

    def get(name: str) -> NoReturn:
        if name in instead:
            old = f"{module}.{name}".removeprefix("flightsvc.")
            raise RemovedError(f"{old} is not in flightsvc.sparkdl: {instead[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get
