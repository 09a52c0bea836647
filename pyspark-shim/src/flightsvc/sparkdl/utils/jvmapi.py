"""The way of sparkdl into the JVM; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import removed

_MODELS = "models run in the sidecar, not in the JVM; use flightsvc.Model, or flightsvc.register_udf for SQL"

__getattr__ = removed(
    __name__,
    createTensorFramesModelBuilder=_MODELS,
    default=_MODELS,
    forClass=_MODELS,
    pyUtils=_MODELS,
    listToMLlibVectorUDF="use pyspark.ml.functions.array_to_vector",
    registerPipeline="call one function on the result of another, SELECT g(f(x)), or make that a function: "
    "CREATE TEMPORARY FUNCTION fg(x ...) RETURN g(f(x))",
    registerUDF="use flightsvc.register_udf(spark, name, model), or spark.udf.register",
)
