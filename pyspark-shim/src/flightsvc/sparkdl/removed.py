"""Names of sparkdl that are not available, with what to use instead.

Modules of sparkdl without any available name have no file: a finder makes them from the table below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from flightsvc.errors import FlightsvcError

_PACKAGE = "flightsvc.sparkdl"
_TRAINING = "training is not in this version"
_MODELS = "models run in the sidecar, not in the JVM; use flightsvc.Model, or flightsvc.register_udf for SQL"
_FILES = "use model.save and keras.saving.load_model; stages and flightsvc.Model take a Keras model as it is"

_ESTIMATOR = {
    "KerasImageFileEstimator": f"{_TRAINING}; fit the model with Keras on the driver and give it to "
    "KerasImageFileTransformer, or fit an estimator of Spark ML to DeepImageFeaturizer's features",
}
_GRAPHS = {
    "GraphFunction": "give flightsvc.Model a SavedModel or a Keras model, or make a TFInputGraph",
    "IsolatedSession": "make the graph in `with tf.Graph().as_default()` and give TFInputGraph.fromGraph its "
    "session",
}
_HOROVOD = {
    "HorovodRunner": f"{_TRAINING}; pyspark.ml.torch.distributor.TorchDistributor runs a function on all "
    "executors",
}
_IMAGES = {
    "imageSchema": "use flightsvc.image.schema()",
    "imageType": "use flightsvc.sparkdl.image.imageIO.imageTypeByOrdinal(image.mode)",
    "readImages": "use flightsvc.image.read_images(spark, folder); the path is in image.origin",
}

_REMOVED: dict[str, dict[str, str]] = {
    "": {
        **_ESTIMATOR,
        **_GRAPHS,
        **_HOROVOD,
        **_IMAGES,
        "stripAndFreezeGraph": "use strip_and_freeze_until of flightsvc.sparkdl.graph.utils",
    },
    "estimators": _ESTIMATOR,
    "estimators.keras_image_file_estimator": _ESTIMATOR,
    "graph.builder": _GRAPHS,
    "graph.pieces": {
        "buildFlattener": "stages flatten by themselves; in a graph of your own use tf.reshape",
        "buildSpImageConverter": "TFImageTransformer converts pictures by itself, and so does "
        "flightsvc.ImageInput",
    },
    "horovod": {
        **_HOROVOD,
        "log_to_driver": "print in the function that trains: what it prints is in the logs of its executor",
    },
    "horovod.runner_base": _HOROVOD,
    "horovod.tensorflow": {},
    "horovod.tensorflow.keras": {"LogCallback": f"{_TRAINING}; Keras has keras.callbacks.CSVLogger"},
    "image.imageIO": {
        **_IMAGES,
        "SparkMode": "modes are OpenCV's numbers; see flightsvc.sparkdl.image.imageIO.imageTypeByName",
        "resizeImage": "use flightsvc.sparkdl.image.imageIO.createResizeImageUDF((height, width))",
    },
    "utils": {},
    "utils.jvmapi": {
        **dict.fromkeys(("createTensorFramesModelBuilder", "default", "forClass", "pyUtils"), _MODELS),
        "listToMLlibVectorUDF": "use pyspark.ml.functions.array_to_vector",
        "registerPipeline": "call one function on the result of another, SELECT g(f(x)), or make that a "
        "function: CREATE TEMPORARY FUNCTION fg(x ...) RETURN g(f(x))",
        "registerUDF": "use flightsvc.register_udf(spark, name, model), or spark.udf.register",
    },
    "utils.keras_model": {
        **dict.fromkeys(("bytes_to_h5file", "bytes_to_model", "model_to_bytes"), _FILES),
        "is_valid_loss_function": f"{_TRAINING}; keras.losses.get(name) refuses what Keras does not know",
        "is_valid_optimizer": f"{_TRAINING}; keras.optimizers.get(name) refuses what Keras does not know",
    },
    "xgboost": {
        f"Xgboost{name}": f"XGBoost has stages for Spark ML of its own; use xgboost.spark.SparkXGB{name}"
        for name in ("Classifier", "ClassifierModel", "Regressor", "RegressorModel")
    },
}
"""What to use instead, by module of sparkdl and by name."""


class RemovedError(FlightsvcError, ImportError):
    """A name of sparkdl that is not available; the text says what to use instead."""


def removed(module: str) -> Callable[[str], NoReturn]:
    """Return a ``__getattr__`` for ``module`` that raises RemovedError for names in the table."""
    instead = _REMOVED[module.removeprefix(_PACKAGE).removeprefix(".")]

    def get(name: str) -> NoReturn:
        if name in instead:
            old = f"{module}.{name}".removeprefix("flightsvc.")
            raise RemovedError(f"{old} is not in flightsvc.sparkdl: {instead[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


class _Finder(MetaPathFinder, Loader):
    """Finds the modules in the table that have no file; the last finder in sys.meta_path."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{_PACKAGE}.")
        if old == name or old not in _REMOVED:
            return None
        return ModuleSpec(name, self, is_package=any(other.startswith(f"{old}.") for other in _REMOVED))

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"A module of sparkdl without available names; see {__name__}."
        module.__dict__["__getattr__"] = removed(module.__name__)


sys.meta_path.append(_Finder())
