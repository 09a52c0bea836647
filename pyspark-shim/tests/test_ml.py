"""Stages of Spark ML against TensorFlow and Keras: alone, in pipelines, saved, streamed, on Connect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import HERE, connect_server
from figures import PROVE, report
from ml_script import COLUMN, answers
from PIL import Image

import flightsvc

SCRIPT = Path(__file__).with_name("ml_script.py")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ROWS = 60
PICTURES = 5
LINEAR = (3.0, -7.0)
LABELS = ["cat", "dog", "cow"]

SAVED = ["keras", "loader", "decoded"]
"""The cases that `make test` saves; `make prove` saves, streams and runs all on Connect, and validates."""
STREAMED = ["keras"]
"""Those that it streams."""


def numbers() -> np.ndarray[Any, Any]:
    return np.random.default_rng(8).normal(size=(ROWS, 4)).round(3)


def pixels(i: int) -> np.ndarray[Any, Any]:
    """A picture of the size that the models take."""
    return np.random.default_rng(i).integers(0, 256, (8, 6, 3), np.uint8)


def loader() -> Any:
    """A loader as users have them: the file as one row, from -1 to 1. It is pickled by value."""

    def load(path: str) -> Any:
        import numpy
        from PIL import Image

        return numpy.asarray(Image.open(path).convert("RGB"), "float64")[None] / 127.5 - 1

    return load


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of Keras as files, and pictures."""
    import keras

    keras.utils.set_random_seed(8)
    folder = tmp_path_factory.mktemp("ml")
    layers = keras.layers
    dense = keras.Sequential(
        [keras.Input((4,), name="x"), layers.Dense(3, "relu", name="dense"), layers.Dense(2, name="dense_1")]
    )
    dense.save(folder / "dense.keras")
    mean = keras.Sequential(
        [keras.Input((8, 6, 3)), layers.Conv2D(4, 3, activation="relu"), layers.GlobalAveragePooling2D()]
    )
    mean.save(folder / "mean.keras")
    keras.Sequential([keras.Input((8, 6, 3)), layers.Conv2D(3, 1)]).save(folder / "picture.keras")
    for i in range(PICTURES):
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
    Image.fromarray(pixels(0)[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([pixels(0), pixels(1)[..., 0]])).save(folder / "alpha.png")
    (folder / "corrupt.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def doubles(spark: Any) -> Any:
    """The numbers, and a label, as columns of several types."""
    rows = [(i, row.tolist(), float(row[0] > 0), i % 2) for i, row in enumerate(numbers())]
    frame = spark.createDataFrame(rows, "id bigint, x array<double>, label double, fold int").coalesce(2)
    return frame.cache()


def cases(spark: Any, files: Path, pictures: Path, models: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each kind of stage, the name of its rows and what TensorFlow says in their order; and the rows.

    The models' files are in ``files``, copied there from ``models`` where need be.
    """
    import tensorflow as tf

    from flightsvc import image
    from flightsvc.ml import (
        DeepImageFeaturizer,
        DeepImagePredictor,
        KerasImageFileTransformer,
        KerasTransformer,
        TFImageTransformer,
        TFTransformer,
    )

    random = np.random.default_rng(1)
    a, b = random.normal(size=(ROWS, 8)), random.normal(size=(ROWS, 4))
    every = [pixels(i) for i in range(PICTURES)]
    odd = [pixels(i)[: 3 + i, i:] for i in range(PICTURES)]
    paths = [str(pictures / f"{i}.png") for i in range(PICTURES)]
    rows = {
        "doubles": spark.createDataFrame(list(enumerate(numbers().tolist())), "id bigint, x array<double>"),
        "pairs": spark.createDataFrame(
            list(zip(range(ROWS), a.tolist(), b.tolist(), strict=True)),
            "id bigint, x array<double>, y array<double>",
        ),
        "paths": spark.createDataFrame(list(enumerate(paths)), "id bigint, path string"),
    }
    for name, arrays in (("structs", every), ("odd", odd)):
        structs = [(i, image.to_struct(array[..., ::-1].copy())) for i, array in enumerate(arrays)]
        rows[name] = spark.createDataFrame(structs, f"id bigint, image {image.schema().simpleString()}")

    mean, picture, dense = (files / f"{name}.keras" for name in ("mean", "picture", "dense"))
    scaled = np.stack(every) / 127.5 - 1
    fields = {"height": 8, "width": 6, "nChannels": 3, "mode": 21}
    two = shutil.copytree(models / "two", files / "two")
    wanted = tf.saved_model.load(str(two)).signatures["serving_default"](
        a=tf.constant(np.float32(a)), b=tf.constant(np.float32(b))
    )
    network, conv = tiny()
    features = np.asarray(conv(scaled)).mean((1, 2))
    probabilities = np.asarray(network(scaled))

    def of_files(model: Path, **params: Any) -> Any:
        return KerasImageFileTransformer(inputCol="path", outputCol=COLUMN, modelFile=str(model), **params)

    def of_graph(size: Any) -> Any:
        return TFImageTransformer(
            channelOrder="RGB",
            inputCol="image",
            outputCol=COLUMN,
            graph=linear([None, *size, 3]),
            inputTensor="given:0",
            outputTensor="result:0",
        )

    def named(kind: Any, **params: Any) -> Any:
        return kind(inputCol="image", outputCol=COLUMN, modelName="Tiny of ml", **params)

    said = {
        "files": (of_files(mean), "paths", of_keras(mean, every)),
        "loader": (of_files(mean, imageLoader=loader(), batchSize=2), "paths", of_keras(mean, scaled)),
        "pictures": (
            of_files(picture, outputMode="image"),
            "paths",
            [
                {"origin": path, **fields, "data": data[..., ::-1].tobytes().hex()}
                for path, data in zip(paths, of_keras(picture, every), strict=True)
            ],
        ),
        "keras": (
            KerasTransformer(inputCol="x", outputCol=COLUMN, modelFile=str(dense)),
            "doubles",
            of_keras(dense, numbers()),
        ),
        "saved_model": (
            TFTransformer(
                model=str(two),
                inputMapping={"x": "a", "y": "b"},
                outputMapping={"logits": COLUMN},
                batchSize=16,
            ),
            "pairs",
            wanted["logits"].numpy(),
        ),
        "frozen": (
            TFTransformer(
                model=frozen(files / "linear.pb"),
                inputMapping={"x": "given:0"},
                outputMapping={"result:0": COLUMN},
            ),
            "doubles",
            np.float32(numbers() * LINEAR[0] + LINEAR[1]),
        ),
        "graph": (of_graph((8, 6)), "structs", [(p * LINEAR[0] + LINEAR[1]).ravel() for p in every]),
        "own_size": (of_graph((None, None)), "odd", [(p * LINEAR[0] + LINEAR[1]).ravel() for p in odd]),
        "predictor": (named(DeepImagePredictor), "structs", probabilities),
        "decoded": (
            named(DeepImagePredictor, decodePredictions=True, topK=2),
            "structs",
            [
                [{"class": LABELS[i], "description": LABELS[i], "probability": row[i]} for i in best]
                for row, best in zip(probabilities, np.argsort(probabilities)[:, :-3:-1], strict=True)
            ],
        ),
        "featurizer": (named(DeepImageFeaturizer), "structs", features),
    }
    return said, rows


def linear(shape: list[int | None]) -> Any:
    """A graph of TensorFlow 1 from ``given`` to ``result``."""
    import tensorflow as tf

    with tf.Graph().as_default() as graph:
        given = tf.compat.v1.placeholder(tf.float32, shape, "given")
        tf.identity(given * LINEAR[0] + LINEAR[1], "result")
    return graph


def frozen(file: Path) -> Any:
    """The graph as a frozen file gives it."""
    from flightsvc.export.graph import TFInputGraph

    file.write_bytes(linear([None, 4]).as_graph_def().SerializeToString())
    return TFInputGraph.fromFrozenFile(file)


def tiny() -> Any:
    """A network of one's own, registered in this process, and the layer that its features come from."""
    import keras

    from flightsvc.ml import register_network

    keras.utils.set_random_seed(1)
    layers = keras.layers
    conv = layers.Conv2D(4, 3, activation="relu")
    model = keras.Sequential(
        [keras.Input((8, 6, 3)), conv, layers.Flatten(), layers.Dense(3, activation="softmax")]
    )
    register_network("Tiny of ml", lambda: model, size=(8, 6), preprocess="tf", labels=LABELS)
    return model, conv


def of_keras(file: Path, rows: np.ndarray[Any, Any]) -> Any:
    """What Keras says on the driver."""
    import keras

    return keras.saving.load_model(file, compile=False).predict(np.float32(rows), verbose=0)


def check(frame: Any, wanted: Any, column: str = COLUMN) -> None:
    found = answers(frame, column)
    assert [i for i, _ in found] == list(range(len(wanted)))
    np.testing.assert_allclose([value for _, value in found], wanted, **CLOSE)


def test_a_graph_becomes_a_model_once(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flightsvc.export.graph import TFInputGraph
    from flightsvc.ml import TFTransformer

    made: list[Any] = []
    saved_model = TFInputGraph.saved_model

    def count(graph: Any, inputs: list[str], outputs: list[str]) -> Path:
        made.append((inputs, outputs))
        return saved_model(graph, inputs, outputs)

    monkeypatch.setattr(TFInputGraph, "saved_model", count)
    frame = spark.createDataFrame([(0, [1.0, 2.0, 3.0, 4.0])], "id bigint, x array<float>")
    graph, mapping = frozen(tmp_path / "linear.pb"), {"x": "given:0"}
    stage = TFTransformer(model=graph, inputMapping=mapping, outputMapping={"result:0": COLUMN})
    for _ in range(3):
        assert COLUMN in stage.transform(frame).columns
    assert made == [(["given:0"], ["result:0"])]
    stage.setOutputMapping({"result": "other"})
    assert "other" in stage.transform(frame).columns
    assert made[1:] == [(["given:0"], ["result"])]


def test_several_inputs_and_outputs(spark: Any, models: Path, oracle: Any) -> None:
    from flightsvc.ml import TFTransformer

    random = np.random.default_rng(1)
    a, b = random.normal(size=(50, 8)), random.normal(size=(50, 4))
    wanted = oracle("two", a=a.astype(np.float32), b=b.astype(np.float32))
    data = [(i, x.tolist(), y.tolist()) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    frame = spark.createDataFrame(data, "id bigint, x array<double>, y array<double>")
    stage = TFTransformer(
        model=str(models / "two"),
        inputMapping={"x": "a", "y": "b"},
        outputMapping={"sum": "s", "logits": "l"},
        batchSize=7,
    )
    result = stage.transform(frame)
    assert result.columns == ["id", "x", "y", "s", "l"]
    assert stage.transformSchema(frame.schema).simpleString() == result.schema.simpleString()
    check(result, wanted["logits"], "l")
    check(result, wanted["sum"], "s")
    assert [row.x for row in result.orderBy("id").collect()] == a.tolist()


@pytest.mark.parametrize("kind", ["array<int>", "array<bigint>", "array<decimal(9,3)>", "vector"])
def test_numbers_are_cast_for_the_input_alone(spark: Any, doubles: Any, files: Path, kind: str) -> None:
    from pyspark.ml.functions import array_to_vector

    from flightsvc.ml import KerasTransformer

    given = numbers().astype(int) if "int" in kind else numbers()
    column = array_to_vector("x") if kind == "vector" else doubles.x.cast(kind)
    frame = doubles.select("id", column.alias("X"), doubles.label.alias("x "))
    stage = KerasTransformer(inputCol="X", outputCol=COLUMN, modelFile=str(files / "dense.keras"))
    result = stage.transform(frame)
    assert result.schema[1] == frame.schema[1]
    check(result, of_keras(files / "dense.keras", given))


def test_columns_of_one_name_and_nulls_stay(spark: Any, files: Path) -> None:
    from flightsvc.ml import KerasTransformer

    rows = [(0, 1, [1, 2, 3, 4]), (2, 3, None)]
    frame = spark.createDataFrame(rows, "a int, b int, x array<int>").toDF("a", "A", "x")
    spark.conf.set("spark.sql.caseSensitive", "false")
    result = KerasTransformer(inputCol="x", outputCol="y", modelFile=str(files / "dense.keras")).transform(
        frame
    )
    assert result.columns == ["a", "A", "x", "y"]
    first, second = sorted(map(tuple, result.collect()))
    assert first[:3] == (0, 1, [1, 2, 3, 4]) and len(first[3]) == 2
    assert second == (2, 3, None, None)


def test_mistakes_are_told_before_a_job(spark: Any, doubles: Any, models: Path, files: Path) -> None:
    from flightsvc.ml import KerasTransformer, TFTransformer

    def of(**params: Any) -> Any:
        given = {"inputCol": "x", "outputCol": "y", "modelFile": str(files / "dense.keras")} | params
        return KerasTransformer(**{name: value for name, value in given.items() if value is not None})

    several = TFTransformer(model=models / "two", inputMapping={"x": "a", "label": "b"})
    wrong = [
        (of(inputCol="nothing"), "there is no column 'nothing'"),
        (of(inputCol="label"), "column 'label' is double.*float32.*array<float>"),
        (of(outputCol="x"), "there is a column 'x' already"),
        (of(onError="column", errorCol="ID"), "there is a column 'ID' already"),
        (of(outputCol="error", onError="column"), "error"),
        (of(inputCol=None), "inputCol is not set"),
        (of(modelFile=None), "nothing is set; set one of modelFile, model"),
        (of(model="other"), "modelFile and model is set|modelFile and model"),
        (of(modelFile=None, model=models / "two"), "2 inputs, a, b; use TFTransformer"),
        (of(modelFile=str(files / "none.keras")), "No such file"),
        (several, "column 'label' is double"),
        (TFTransformer(model=models / "two", signature="none"), "no signature 'none'"),
        (TFTransformer(), "nothing is set"),
    ]
    for stage, text in wrong:
        for call in (lambda s=stage: s.transformSchema(doubles.schema), lambda s=stage: s.transform(doubles)):
            with pytest.raises(flightsvc.FlightsvcError, match=f"(?s)^{stage.uid}: .*({text})") as raised:
                call()
            assert str(raised.value).count(stage.uid) == 1


def test_params(models: Path) -> None:
    from pyspark.ml.param import Param

    from flightsvc.ml import KerasTransformer, TFTransformer

    stage = TFTransformer(inputMapping=[("x", "a")], outputMapping={"sum": "s"})
    assert (stage.getInputMapping(), stage.getOutputMapping()) == ({"x": "a"}, {"sum": "s"})
    assert (stage.getBatchSize(), stage.getOnError(), stage.getErrorCol()) == (None, "fail", "error")
    assert stage.setBatchSize(3).setOnError("null").setErrorCol("e").copy().getBatchSize() == 3
    for name in ("setBatchSize", "setOnError", "setInputMapping"):
        assert getattr(stage, name)
    assert all(param.doc for param in stage.params if isinstance(param, Param))
    for error, call in (
        (TypeError, lambda: KerasTransformer("x", "y")),
        (TypeError, lambda: stage.setParams(inputCol="x")),
        (TypeError, lambda: stage.setBatchSize("many")),
        (flightsvc.InvalidArgumentError, lambda: stage.setBatchSize(0)),
        (flightsvc.InvalidArgumentError, lambda: stage.setOnError("skip")),
        (TypeError, lambda: stage.setInputMapping("x")),
        (TypeError, lambda: stage.setInputMapping({"x": 1})),
        (flightsvc.InvalidArgumentError, lambda: stage.setInputMapping({"x": "a", "y": "a"})),
        (TypeError, lambda: stage.setModel(1.5)),
    ):
        with pytest.raises(error):
            call()


def test_a_damaged_model_is_refused(spark: Any, models: Path, tmp_path: Path) -> None:
    from flightsvc.ml import Stage, TFTransformer
    from flightsvc.server import shipping

    copy = shutil.copytree(models / "two", tmp_path / "two")
    (copy / "weights.txt").write_bytes(os.urandom(9 << 20))  # three chunks, of which no process knows
    TFTransformer(model=copy).save(f"{tmp_path}/stage")
    rows = spark.read.parquet(f"{tmp_path}/stage/model")
    assert rows.count() == 3
    rows.where("index != 1").write.parquet(f"{tmp_path}/less")
    rows.selectExpr(
        "index", "if(index = 1, overlay(piece PLACING X'00' FROM 99), piece) AS piece"
    ).write.parquet(f"{tmp_path}/other")
    for damaged in ("less", "other"):
        shutil.rmtree(tmp_path / "stage" / "model")
        shutil.copytree(tmp_path / damaged, tmp_path / "stage" / "model")
        with pytest.raises(
            flightsvc.InvalidArgumentError, match=r"is damaged: [23] chunks make .*save the stage again"
        ):
            Stage.load(f"{tmp_path}/stage")
    assert not list(shipping.private_folder().glob("*/model.tar"))


@pytest.mark.parametrize("loads", [False, True])
def test_pictures_by_policy(spark: Any, files: Path, loads: bool) -> None:
    from flightsvc.ml import KerasImageFileTransformer

    names = ["0", "grey", "alpha", "corrupt", "missing", None]
    rows = [(i, name and str(files / f"{name}.png")) for i, name in enumerate(names)]
    frame = spark.createDataFrame(rows, "id bigint, path string").coalesce(1)
    grey = np.repeat(pixels(0)[..., :1], 3, axis=2)
    given = np.stack([pixels(0), grey, pixels(0)])
    wanted = [*of_keras(files / "mean.keras", given / 127.5 - 1 if loads else given), None, None, None]
    stage = KerasImageFileTransformer(inputCol="path", outputCol=COLUMN, modelFile=str(files / "mean.keras"))
    if loads:
        stage.setImageLoader(loader())
    with pytest.raises(Exception, match=r"corrupt\.png|missing\.png"):
        stage.transform(frame).collect()
    same([value for _, value in answers(stage.setOnError("null").transform(frame))], wanted)
    told = stage.setOnError("column").setErrorCol("why").transform(frame)
    assert told.columns == ["id", "path", COLUMN, "why"]
    assert told.schema == stage.transformSchema(frame.schema)
    same([value for _, value in answers(told)], wanted)
    reasons = [why for _, why in answers(told, "why")]
    assert [why is not None for why in reasons] == [False, False, False, True, True, False]
    assert "corrupt.png" in reasons[3] and "missing.png" in reasons[4]


@pytest.mark.parametrize("size", [None, (8, 6)])
@pytest.mark.parametrize("mode", ["vector", "image"])
def test_graph_on_pictures(spark: Any, size: Any, mode: str) -> None:
    import tensorflow as tf

    from flightsvc import image
    from flightsvc.ml import TFImageTransformer

    with tf.Graph().as_default() as graph:
        given = tf.compat.v1.placeholder(tf.float32, [None, *(size or (None, None)), 3], "given")
        tf.identity(given * [1.0, 2.0, 3.0] - 7.0, "result")
    structs = [(i, image.to_struct(pixels(i)[..., ::-1].copy(), f"p{i}")) for i in range(PICTURES)]
    structs = [*structs, (PICTURES, None)]
    frame = spark.createDataFrame(structs, image.schema().simpleString().join(["id bigint, image ", ""]))
    stage = TFImageTransformer(channelOrder="RGB", inputCol="image", outputCol=COLUMN, graph=graph)
    stage.setInputTensor("given:0").setOutputTensor("result:0").setOutputMode(mode)
    result = stage.transform(frame)
    assert result.schema.simpleString() == stage.transformSchema(frame.schema).simpleString()
    wanted = [np.float32(pixels(i) * [1.0, 2.0, 3.0] - 7.0) for i in range(PICTURES)]
    if mode == "vector":
        same([value for _, value in answers(result)], [*(one.ravel() for one in wanted), None])
        return
    fields = {"height": 8, "width": 6, "nChannels": 3, "mode": 21}
    pictures = [
        {"origin": f"p{i}", **fields, "data": one[..., ::-1].tobytes().hex()} for i, one in enumerate(wanted)
    ]
    same([value for _, value in answers(result)], [*pictures, None])


def test_wrong_columns_of_pictures(spark: Any, files: Path) -> None:
    from flightsvc.ml import KerasImageFileTransformer

    stage = KerasImageFileTransformer(inputCol="p", outputCol="y", modelFile=str(files / "mean.keras"))
    for given, schema, text in (
        ({}, "p int", "is int.*made from pictures"),
        ({"imageLoader": loader()}, "p binary", "is binary; imageLoader needs paths"),
        ({"outputMode": "image"}, "p string", "a picture is .rows, height, width"),
        ({"modelFile": str(files / "dense.keras")}, "p string", "without an imageLoader"),
    ):
        frame = spark.createDataFrame([], schema)
        with pytest.raises(flightsvc.InvalidArgumentError, match=text):
            stage.copy().setParams(**given).transformSchema(frame.schema)


@pytest.fixture(scope="module")
def saved(spark: Any, doubles: Any, files: Path, models: Path, tmp_path_factory: Any) -> Any:
    """Stages as ``ml_script.py`` wants them, and the right answers; what they were made of is gone."""
    from pyspark.ml import PipelineModel

    folder = tmp_path_factory.mktemp("saved")
    gone = shutil.copytree(files, folder / "files")
    every, rows = cases(spark, gone, files, models)
    every = every if PROVE else {case: every[case] for case in SAVED}
    for name in {name for _, name, _ in every.values()}:
        rows[name].coalesce(1).write.parquet(f"{folder}/data/{name}")
    for case, (stage, _, _) in every.items():
        stage.save(f"{folder}/stages/{case}")
        PipelineModel([stage]).save(f"{folder}/pipelines/{case}")
    (folder / "cases.json").write_text(json.dumps({case: name for case, (_, name, _) in every.items()}))
    wanted = {case: answer for case, (_, _, answer) in every.items()}
    if PROVE:
        wanted |= validated(doubles, gone, folder)
    shutil.rmtree(gone)
    return folder, wanted, [*every]


def validated(doubles: Any, files: Path, folder: Path) -> dict[str, Any]:
    """Save a CrossValidator with a stage of ours, unfitted and fitted, and return what it says."""
    from pyspark.ml import Pipeline
    from pyspark.ml.classification import LogisticRegression
    from pyspark.ml.evaluation import BinaryClassificationEvaluator
    from pyspark.ml.feature import SQLTransformer, VectorAssembler
    from pyspark.ml.tuning import CrossValidator, ParamGridBuilder

    from flightsvc.ml import KerasTransformer

    doubles.write.parquet(f"{folder}/data/labelled")
    stage = KerasTransformer(inputCol="x", outputCol="y", modelFile=str(files / "dense.keras"))
    apart = SQLTransformer(statement="SELECT *, y[0] AS y0, y[1] AS y1 FROM __THIS__")
    together = VectorAssembler(inputCols=["y0", "y1"], outputCol="features")
    regression = LogisticRegression(maxIter=5)
    pipeline = Pipeline(stages=[stage, apart, together, regression])
    grid = ParamGridBuilder().addGrid(regression.regParam, [0.01, 0.5]).build()
    validator = CrossValidator(
        estimator=pipeline,
        estimatorParamMaps=grid,
        evaluator=BinaryClassificationEvaluator(),
        numFolds=2,
        foldCol="fold",  # random folds depend on how the rows are parted
    )
    validator.save(f"{folder}/estimator")
    fitted = validator.fit(doubles)
    fitted.save(f"{folder}/validated")
    answer = [value for _, value in answers(fitted.transform(doubles), "probability")]
    return {"validated": answer, "metrics": fitted.avgMetrics}


def elsewhere(folder: Path, cases: list[str], streamed: list[str], *where: str) -> dict[str, Any]:
    """What the script says in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *where, "--cases", *cases, "--streamed", *streamed],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def agree(said: dict[str, Any], wanted: dict[str, Any], cases: list[str], streamed: list[str]) -> None:
    assert said["modules"] == []
    for how, names in (("stage", cases), ("pipeline", cases), ("stream", streamed)):
        assert set(said[how]) == set(names)
        for case, found in said[how].items():
            assert [i for i, _ in found] == list(range(len(wanted[case]))), (how, case)
            same([value for _, value in found], wanted[case])
    if PROVE:
        same([value for _, value in said["validated"]], wanted["validated"])


def same(found: Any, wanted: Any) -> None:
    """Compare cells: null where null is wanted, pictures and classes by their fields, numbers nearly."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if isinstance(other, dict) and "data" in other:
            pixels = [np.frombuffer(bytes.fromhex(picture["data"]), np.float32) for picture in (one, other)]
            np.testing.assert_allclose(*pixels, **CLOSE)
            assert {**one, "data": ""} == {**other, "data": ""}
        elif isinstance(other, dict):
            np.testing.assert_allclose(one["probability"], other["probability"], **CLOSE)
            assert {**one, "probability": 0} == {**other, "probability": 0}
        elif isinstance(other, list):
            same(one, other)
        elif other is not None:
            np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.java
def test_saved_and_used_in_a_fresh_process(saved: Any) -> None:
    folder, wanted, every = saved
    streamed = every if PROVE else STREAMED
    agree(elsewhere(folder, every, streamed, "--master", "local[2]"), wanted, every, streamed)
    report(ml_stages_saved=len(every), ml_stages_streamed=len(streamed))


@pytest.mark.prove
@pytest.mark.java
def test_connect(saved: Any, tmp_path: Path) -> None:
    folder, wanted, every = saved
    with connect_server(HERE, tmp_path / "connect") as remote:
        said = elsewhere(folder, every, every, "--remote", remote)
    agree(said, wanted, every, every)
    same([value for _, value in said["fitted"]], wanted["validated"])
    np.testing.assert_allclose(said["metrics"], wanted["metrics"], **CLOSE)
    report(ml_stages_connect=len(every))
