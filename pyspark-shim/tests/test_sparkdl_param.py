"""flightsvc.sparkdl.param: what converts the values of Params, and the Params that stages share."""

from __future__ import annotations

import os
from typing import Any

import pytest

from flightsvc.sparkdl import param
from flightsvc.sparkdl.param import SparkDLTypeConverters as Convert

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.mark.parametrize(
    ("value", "pairs"),
    [
        ({"a": "x:0"}, [("a", "x:0")]),
        ({"b": "x:0", "a": "y:1"}, [("a", "y:1"), ("b", "x:0")]),
        ({"c": "scope/x:0", "a": "z:0", "b": "y:0"}, [("a", "z:0"), ("b", "y:0"), ("c", "scope/x:0")]),
    ],
)
def test_mappings_become_sorted_pairs(value: dict[str, str], pairs: list[tuple[str, str]]) -> None:
    assert Convert.asColumnToTensorNameMap(value) == pairs
    turned = {tensor: column for column, tensor in value.items()}
    assert Convert.asTensorNameToColumnMap(turned) == sorted((tensor, column) for column, tensor in pairs)


_WRONG = [
    ["a", "x:0"],
    [("a", "x:0")],
    "a",
    None,
    {"a": 1},
    {"a": None},
    {1: "x:0"},
    {"a": "x"},
    {"a": "x y:0"},
]


@pytest.mark.parametrize("value", _WRONG)
def test_what_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        Convert.asColumnToTensorNameMap(value)
    turned = {tensor: column for column, tensor in value.items()} if isinstance(value, dict) else value
    with pytest.raises(TypeError):
        Convert.asTensorNameToColumnMap(turned)


def test_other_converters() -> None:
    import tensorflow as tf

    from flightsvc.sparkdl.graph.input import TFInputGraph

    graph = TFInputGraph(tf.compat.v1.GraphDef())
    assert Convert.toTFInputGraph(graph) is graph
    assert Convert.toTFHParams({"n": 1}) == {"n": 1}
    assert Convert.toChannelOrder("BGR") == "BGR"
    assert Convert.toKerasOptimizer("adam") == "adam"
    assert Convert.toKerasLoss("mse") == "mse"
    assert Convert.buildSupportedItemConverter(["a", "b"])("b") == "b"
    with tf.Graph().as_default() as made:
        x = tf.compat.v1.placeholder(tf.float32, name="x")
    assert Convert.toTFTensorName(x) == "x:0"
    assert Convert.toTFGraph(made) is made
    for convert, value, error, said in (
        (Convert.toTFInputGraph, made, TypeError, "TFInputGraph"),
        (Convert.toTFGraph, "graph", TypeError, "tf.Graph"),
        (Convert.toTFHParams, 5, TypeError, "dict"),
        (Convert.toTFTensorName, 5, TypeError, "int"),
        (Convert.toChannelOrder, "HSV", ValueError, "L, RGB, BGR"),
        (Convert.toKerasOptimizer, "noone", TypeError, "Named optimizer not supported in Keras"),
        (Convert.toKerasOptimizer, 5, TypeError, "Named optimizer not supported in Keras"),
        (Convert.toKerasLoss, "noone", ValueError, "Named loss not supported in Keras"),
        (Convert.buildSupportedItemConverter(["a", "b"]), "c", TypeError, "c is not in the supported list"),
    ):
        with pytest.raises(error, match=said):
            convert(value)


class _Stage(
    param.HasInputCol,
    param.HasOutputCol,
    param.HasLabelCol,
    param.HasKerasModel,
    param.HasKerasOptimizer,
    param.HasKerasLoss,
    param.HasOutputMode,
    param.CanLoadImage,
    param.HasInputMapping,
    param.HasOutputMapping,
    param.HasTFInputGraph,
    param.HasTFHParams,
):
    @param.keyword_only
    def __init__(self, *, inputCol: str | None = None, inputMapping: dict[str, str] | None = None) -> None:
        super().__init__()
        self._set(**{k: v for k, v in self._input_kwargs.items() if v is not None})


def test_mixins_are_params_with_setters_and_getters(spark: Any) -> None:
    stage = _Stage(inputCol="a", inputMapping={"b": "y:0", "a": "x:0"})
    assert stage.getInputCol() == "a" and stage.getInputMapping() == [("a", "x:0"), ("b", "y:0")]
    assert stage.getOutputCol() == f"{stage.uid}__output"
    assert stage.getOutputMode() == "vector" and stage.getKerasFitParams() == {"verbose": 1}
    assert stage.setOutputMode("image").setLabelCol("l").getOutputMode() == "image"
    assert stage.setOutputMapping({"z:0": "c"}).getOutputMapping() == [("z:0", "c")]
    assert stage.setImageLoader(len).getImageLoader() is len
    assert {p.name for p in stage.params} == {
        *("inputCol", "outputCol", "labelCol", "modelFile", "kerasFitParams", "kerasOptimizer", "kerasLoss"),
        *("outputMode", "imageLoader", "inputMapping", "outputMapping", "tfInputGraph", "tfHParams"),
    }
    copy = stage.copy({stage.labelCol: "other"})
    assert copy.getLabelCol() == "other" and copy.getInputMapping() == stage.getInputMapping()
    for change in ({"outputMode": "tensor"}, {"imageLoader": 5}, {"inputMapping": [("a", "x:0")]}):
        with pytest.raises(TypeError):
            stage._set(**change)
    with pytest.raises(TypeError, match="forces keyword arguments"):
        _Stage("a")  # type: ignore[misc]
