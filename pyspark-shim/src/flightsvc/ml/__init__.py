"""Models as stages of Spark ML: in a ``Pipeline``, tuned, saved, streamed, on Connect.

    from flightsvc.ml import TFTransformer
    stage = TFTransformer(model="models/lite0", inputMapping={"pixels": "image"},
                          outputMapping={"probabilities": "p"})
    Pipeline(stages=[stage, LogisticRegression(featuresCol="p")]).fit(df).save("hdfs:///pipelines/birds")

A saved stage holds its model: whoever loads it needs neither TensorFlow nor the folder that it came from.
"""

from flightsvc.ml.deep_image import DeepImageFeaturizer, DeepImagePredictor
from flightsvc.ml.images import KerasImageFileTransformer, TFImageTransformer
from flightsvc.ml.networks import register_network
from flightsvc.ml.stage import Stage
from flightsvc.ml.tensors import KerasTransformer, TFTransformer

__all__ = [
    "DeepImageFeaturizer",
    "DeepImagePredictor",
    "KerasImageFileTransformer",
    "KerasTransformer",
    "Stage",
    "TFImageTransformer",
    "TFTransformer",
    "register_network",
]
