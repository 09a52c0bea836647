# mypy: disable-error-code="import-untyped,import-not-found"
"""Write the golden files of the reader of warm-up requests.

Usage: ``python make_warmup.py``, with TensorFlow and the package tensorflow-serving-api (2.19.1), which is
not needed for anything else: install it with ``pip install --no-deps --target FOLDER`` and put FOLDER on
PYTHONPATH.

``warmup.tfrecord`` is a file of PredictionLog as TF Serving's documentation writes it, ``warmup.json`` what
TensorFlow makes of its tensors: ``tf.make_ndarray``, little endian in hex, strings in hex each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    model_pb2,
    predict_pb2,
    prediction_log_pb2,
)

HERE = Path(__file__).parent


def typed(dtype: tf.DType, shape: list[int], **values: list[Any]) -> tensor_pb2.TensorProto:
    """A tensor whose values are in the field of its type, as clients without numpy write them."""
    shape_proto = tf.TensorShape(shape).as_proto()
    return tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum, tensor_shape=shape_proto, **values)


def main() -> None:
    """Write both files."""
    tensors = {
        "content": tf.make_tensor_proto(np.arange(6, dtype=np.float32).reshape(2, 3) / 7),
        "content_half": tf.make_tensor_proto(np.array([[1.5, -2.0], [0.1, 65504]], np.float16)),
        "content_bool": tf.make_tensor_proto(np.array([True, False, True])),
        "scalar": tf.make_tensor_proto(3.5, dtype=tf.float64),
        "strings": tf.make_tensor_proto([[b"a", b""], [b"\xff\x00", b"long" * 20]]),
        "float": typed(tf.float32, [3], float_val=[1.5, -2.5, 3e38]),
        "broadcast": typed(tf.float32, [2, 2, 3], float_val=[0.25]),
        "last_repeats": typed(tf.int32, [5], int_val=[1, -2, 3]),
        "none": typed(tf.int64, [2, 2]),
        "half": typed(tf.float16, [2, 2], half_val=[0x3C00, 0xC000]),
        "bfloat": typed(tf.bfloat16, [2], half_val=[0x3F80, 0xC000]),
        "double": typed(tf.float64, [2], double_val=[1e300, -0.0]),
        "int8": typed(tf.int8, [2], int_val=[-128, 127]),
        "uint8": typed(tf.uint8, [2], int_val=[0, 255]),
        "int16": typed(tf.int16, [2], int_val=[-32768, 32767]),
        "uint16": typed(tf.uint16, [2], int_val=[0, 65535]),
        "int64": typed(tf.int64, [2], int64_val=[-(2**63), 2**63 - 1]),
        "uint32": typed(tf.uint32, [2], uint32_val=[0, 2**32 - 1]),
        "uint64": typed(tf.uint64, [2], uint64_val=[0, 2**64 - 1]),
        "bool": typed(tf.bool, [3], bool_val=[True, False]),
        "one_string": typed(tf.string, [2], string_val=[b"again"]),
        "empty": typed(tf.float32, [0, 4]),
    }
    first = predict_pb2.PredictRequest(
        model_spec=model_pb2.ModelSpec(name="any", signature_name="other"),
        inputs=tensors,
        output_filter=["y", "z"],
    )
    second = predict_pb2.PredictRequest(inputs={"x": tensors["content"]})
    third = classification_pb2.ClassificationRequest(model_spec=model_pb2.ModelSpec(name="any"))
    logs = [
        prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=first)),
        prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=second)),
        prediction_log_pb2.PredictionLog(classify_log=prediction_log_pb2.ClassifyLog(request=third)),
    ]
    with tf.io.TFRecordWriter(str(HERE / "warmup.tfrecord")) as writer:
        for log in logs:
            writer.write(log.SerializeToString(deterministic=True))
    made = {}
    for name, tensor in tensors.items():
        array = tf.make_ndarray(tensor)
        text = array.dtype == object
        made[name] = {
            "dtype": tf.dtypes.as_dtype(tensor.dtype).name,
            "shape": list(array.shape),
            "data": "" if text else array.tobytes().hex(),
            "strings": [element.hex() for element in array.reshape(-1)] if text else [],
        }
    (HERE / "warmup.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
