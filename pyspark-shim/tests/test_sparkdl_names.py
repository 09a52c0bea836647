"""Every name of sparkdl 0.1 to 1.6: it is here, or says what to use instead."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import flightsvc
from flightsvc.sparkdl import RemovedError

HERE = {
    "": "DeepImageFeaturizer DeepImagePredictor KerasImageFileTransformer KerasTransformer "
    "TFImageTransformer TFInputGraph TFTransformer imageInputPlaceholder makeGraphUDF registerKerasImageUDF",
    "image.imageIO": "PIL_decode PIL_decode_and_resize PIL_to_imageStruct createResizeImageUDF filesToDF "
    "fixColorChannelOrdering imageArrayToStruct imageStructToArray imageStructToPIL imageTypeByName "
    "imageTypeByOrdinal readImagesWithCustomFn",
    "transformers.named_image": "DeepImageFeaturizer DeepImagePredictor SUPPORTED_MODELS",
    "transformers.tf_image": "TFImageTransformer",
    "transformers.keras_image": "KerasImageFileTransformer",
    "transformers.keras_tensor": "KerasTransformer",
    "transformers.tf_tensor": "TFTransformer",
    "transformers.utils": "IMAGE_INPUT_PLACEHOLDER_NAME ImageNetConstants InceptionV3Constants "
    "imageInputPlaceholder",
    "transformers.keras_applications": "KERAS_APPLICATION_MODELS getKerasApplicationModel",
    "transformers.keras_utils": "KSessionWrap",
    "udf.keras_image_model": "registerKerasImageUDF",
    "graph.input": "TFInputGraph",
    "graph.utils": "add_scope_to_name get_op get_shape get_tensor op_name strip_and_freeze_until tensor_name "
    "validated_graph validated_input validated_output",
    "graph.tensorframes_udf": "makeGraphUDF",
    "param": "CanLoadImage HasInputCol HasInputMapping HasKerasModel HasLabelCol HasOutputCol "
    "HasOutputMapping HasOutputMode HasTFInputGraph SparkDLTypeConverters keyword_only",
}
GONE = {
    "": "GraphFunction HorovodRunner IsolatedSession KerasImageFileEstimator imageSchema imageType "
    "readImages stripAndFreezeGraph",
    "image.imageIO": "SparkMode imageSchema imageType readImages resizeImage",
    "estimators": "KerasImageFileEstimator",
    "estimators.keras_image_file_estimator": "KerasImageFileEstimator",
    "graph.builder": "GraphFunction IsolatedSession",
    "graph.pieces": "buildFlattener buildSpImageConverter",
    "horovod": "HorovodRunner log_to_driver",
    "horovod.runner_base": "HorovodRunner",
    "horovod.tensorflow.keras": "LogCallback",
    "utils.jvmapi": "createTensorFramesModelBuilder default forClass listToMLlibVectorUDF pyUtils "
    "registerPipeline registerUDF",
    "utils.keras_model": "bytes_to_h5file bytes_to_model is_valid_loss_function is_valid_optimizer "
    "model_to_bytes",
    "xgboost": "XgboostClassifier XgboostClassifierModel XgboostRegressor XgboostRegressorModel",
}


def pairs(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(module, name) for module, names in table.items() for name in names.split()]


def imported(module: str) -> object:
    return importlib.import_module(f"flightsvc.sparkdl.{module}".rstrip("."))


@pytest.mark.parametrize(("module", "name"), pairs(HERE))
def test_names_that_are_here(module: str, name: str):
    found = getattr(imported(module), name)
    if callable(found):
        assert found.__doc__


@pytest.mark.parametrize(("module", "name"), pairs(GONE))
def test_names_that_say_what_to_use(module: str, name: str):
    where = f"sparkdl.{module}".rstrip(".")
    with pytest.raises(RemovedError) as error:
        exec(f"from flightsvc.{where} import {name}", {})
    said = str(error.value)
    assert said.startswith(f"{where}.{name} is not in flightsvc.sparkdl: ")
    assert len(said.partition(": ")[2]) > 20
    assert isinstance(error.value, flightsvc.FlightsvcError)
    assert isinstance(error.value, ImportError)


def test_a_name_that_never_was():
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from flightsvc.sparkdl import Nothing", {})
    assert not hasattr(imported("utils.jvmapi"), "nothing")


def test_import_needs_neither_tensorflow_nor_spark():
    code = (
        "import sys, flightsvc.sparkdl, flightsvc.sparkdl.image.imageIO, "
        "flightsvc.sparkdl.udf.keras_image_model\n"
        "print([name for name in ('pyspark', 'tensorflow', 'keras', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_star_imports_what_is_here():
    names: dict[str, object] = {}
    exec("from flightsvc.sparkdl import *", names)
    assert set(HERE[""].split()) <= names.keys()
