"""Names of sparkdl for XGBoost; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import removed

_INSTEAD = "XGBoost has stages for Spark ML of its own; use xgboost.spark."

__getattr__ = removed(
    __name__,
    **{
        f"Xgboost{kind}{model}": f"{_INSTEAD}SparkXGB{kind}{model}"
        for kind in ("Classifier", "Regressor")
        for model in ("", "Model")
    },
)
