"""The names of sparkdl, Databricks' Deep Learning Pipelines 0.1 to 1.6, implemented by this package.

To move a notebook, replace ``sparkdl`` by ``flightsvc.sparkdl`` in its imports. Importing a name that is not
available raises :class:`RemovedError`, which says what to use instead.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flightsvc.sparkdl.removed import RemovedError, removed

if TYPE_CHECKING:
    from flightsvc.sparkdl.graph.input import TFInputGraph
    from flightsvc.sparkdl.graph.tensorframes_udf import makeGraphUDF
    from flightsvc.sparkdl.transformers.keras_image import KerasImageFileTransformer
    from flightsvc.sparkdl.transformers.keras_tensor import KerasTransformer
    from flightsvc.sparkdl.transformers.named_image import DeepImageFeaturizer, DeepImagePredictor
    from flightsvc.sparkdl.transformers.tf_image import TFImageTransformer
    from flightsvc.sparkdl.transformers.tf_tensor import TFTransformer
    from flightsvc.sparkdl.transformers.utils import imageInputPlaceholder
    from flightsvc.sparkdl.udf.keras_image_model import registerKerasImageUDF

__all__ = [
    "DeepImageFeaturizer",
    "DeepImagePredictor",
    "KerasImageFileTransformer",
    "KerasTransformer",
    "RemovedError",
    "TFImageTransformer",
    "TFInputGraph",
    "TFTransformer",
    "imageInputPlaceholder",
    "makeGraphUDF",
    "registerKerasImageUDF",
]

# Imported on first use, because workers that import a module of this package need no pyspark.ml.
_MODULES = {
    "DeepImageFeaturizer": "transformers.named_image",
    "DeepImagePredictor": "transformers.named_image",
    "KerasImageFileTransformer": "transformers.keras_image",
    "KerasTransformer": "transformers.keras_tensor",
    "TFImageTransformer": "transformers.tf_image",
    "TFInputGraph": "graph.input",
    "TFTransformer": "transformers.tf_tensor",
    "imageInputPlaceholder": "transformers.utils",
    "makeGraphUDF": "graph.tensorframes_udf",
    "registerKerasImageUDF": "udf.keras_image_model",
}

_removed = removed(__name__)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return _removed(name)
