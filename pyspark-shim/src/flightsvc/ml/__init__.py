"""Models as stages of Spark ML, for pipelines, tuning, streaming and Connect.

    from flightsvc.ml import TFTransformer
    stage = TFTransformer(model="models/lite0", inputMapping={"pixels": "image"},
                          outputMapping={"probabilities": "p"})
    Pipeline(stages=[stage, LogisticRegression(featuresCol="p")]).fit(df).save("hdfs:///pipelines/birds")

A saved stage includes its model, so loading it needs neither TensorFlow nor the model's original folder.
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
