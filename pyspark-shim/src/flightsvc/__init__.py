"""Deep learning on Spark DataFrames through an Arrow Flight sidecar.

The sidecar ``flightsvc`` runs TensorFlow models beside each executor; this package sends it record batches.
Workers need only pyarrow.

    m = flightsvc.Model("models/lite0", preprocess={"image": flightsvc.ImageInput(size=(224, 224))})
    m.transform(df, inputs={"image": "content"}, outputs={"probabilities": "p"})
"""

from flightsvc import image
from flightsvc._version import __version__
from flightsvc.client import Client, connect
from flightsvc.errors import (
    DeadlineExceededError,
    FlightsvcError,
    InvalidArgumentError,
    NotFoundError,
    SidecarError,
    UnavailableError,
)
from flightsvc.mapping import ImageInput, Input, Options, Output, TensorSpec
from flightsvc.model import Model
from flightsvc.plugin import spark_conf
from flightsvc.spark.functions import register_udf
from flightsvc.status import status

__all__ = [
    "Client",
    "DeadlineExceededError",
    "FlightsvcError",
    "ImageInput",
    "Input",
    "InvalidArgumentError",
    "Model",
    "NotFoundError",
    "Options",
    "Output",
    "SidecarError",
    "TensorSpec",
    "UnavailableError",
    "__version__",
    "connect",
    "image",
    "register_udf",
    "spark_conf",
    "status",
]
