"""Stages of Spark ML against TensorFlow and Keras: alone, in pipelines, saved, streamed, on Connect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of Keras as files."""
    import keras

    keras.utils.set_random_seed(8)
    folder = tmp_path_factory.mktemp("ml")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(2)]).save(
        folder / "dense.keras"
    )
    return folder


@pytest.fixture(scope="module")
def rows() -> list[list[float]]:
    return np.random.default_rng(8).normal(size=(60, 4)).round(3).tolist()


@pytest.fixture(scope="module")
def dense(made: Path, rows: list[list[float]]) -> Any:
    import keras

    return keras.saving.load_model(made / "dense.keras").predict(np.array(rows, np.float32), verbose=0)


def test_several_inputs_and_outputs(spark: Any, models: Path, oracle: Any, tmp_path: Path) -> None:
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
    found = result.orderBy("id").collect()
    np.testing.assert_allclose([row.l for row in found], wanted["logits"], **CLOSE)
    np.testing.assert_allclose([row.s for row in found], wanted["sum"], **CLOSE)
    assert [row.x for row in found] == a.tolist()
    stage.save(f"{tmp_path}/stage")
    with pytest.raises(Exception, match="exists"):
        stage.save(f"{tmp_path}/stage")
    stage.setBatchSize(5).write().overwrite().save(f"{tmp_path}/stage")
    loaded = TFTransformer.load(f"{tmp_path}/stage")
    assert (loaded.uid, loaded.getBatchSize(), loaded.getInputMapping()) == (
        stage.uid,
        5,
        {"x": "a", "y": "b"},
    )
    again = loaded.transform(frame).orderBy("id").collect()
    np.testing.assert_allclose([row.l for row in again], wanted["logits"], **CLOSE)
