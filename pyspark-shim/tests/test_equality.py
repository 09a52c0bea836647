"""Outputs equal those of TensorFlow in Python, over batch sizes, partitionings and ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from figures import PROVE, count, report

import flightsvc
from flightsvc.ml.networks import lite0

RTOL, ATOL = 1e-4, 1e-6  # over batch sizes
SAME_RTOL = 1e-5  # where the graph form and the batch size are the same

SIZES = [1, 2, 7, 64, 1000] if PROVE else [1, 7, 64]
PARTITIONS = [1, 2, 5] if PROVE else [3]


def share(got: np.ndarray, want: np.ndarray) -> float:
    """Return how much of the tolerance the largest difference uses up."""
    return round(float(np.max(np.abs(got - want) / (ATOL + RTOL * np.abs(want)))), 3)


def column(table: pa.Table, name: str) -> np.ndarray:
    chunks = [np.stack(chunk.to_numpy(zero_copy_only=False)) for chunk in table.column(name).chunks]
    return np.concatenate(chunks)


def lists(array: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


@pytest.fixture(scope="module")
def two_rows():
    rng = np.random.default_rng(7)
    n = count(300, 5_000)
    return rng.standard_normal((n, 8), dtype=np.float32), rng.standard_normal((n, 4), dtype=np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_two_inputs_and_two_outputs_over_batch_sizes(client, models, oracle, two_rows, size):
    a, b = two_rows
    table = pa.table({"a": lists(a), "b": lists(b)})
    got = client.predict(f"file://{models}/two", pa.Table.from_batches(table.to_batches(size)))
    differences = {}
    for name in ("sum", "logits"):
        ours = column(got, name)
        whole = oracle("two", a=a, b=b)[name]
        same = np.concatenate(
            [oracle("two", a=a[i : i + size], b=b[i : i + size])[name] for i in range(0, len(a), size)]
        )
        np.testing.assert_allclose(ours, whole, RTOL, ATOL)
        np.testing.assert_allclose(ours, same, SAME_RTOL, ATOL)
        np.testing.assert_array_equal(ours.argmax(1), whole.argmax(1))
        differences[name] = share(ours, whole)
    report(**{f"two_batch_{size}_share_of_tolerance": max(differences.values())})


@pytest.mark.parametrize("partitions", PARTITIONS)
def test_two_inputs_and_two_outputs_over_partitions(spark, models, oracle, two_rows, partitions):
    a, b = two_rows
    rows = [(i, a[i].tolist(), b[i].tolist()) for i in range(len(a))]
    df = spark.createDataFrame(rows, "id long, a array<float>, b array<float>").repartition(partitions)
    got = flightsvc.Model(models / "two").transform(df).orderBy("id").collect()
    want = oracle("two", a=a, b=b)
    assert [row.id for row in got] == list(range(len(a)))
    for name in ("sum", "logits"):
        ours = np.array([row[name] for row in got], dtype=np.float32)
        np.testing.assert_allclose(ours, want[name], RTOL, ATOL)
        np.testing.assert_array_equal(ours.argmax(1), want[name].argmax(1))


@pytest.fixture(scope="module")
def lite0_folder():
    return lite0.cached()


@pytest.fixture(scope="module")
def lite0_network(lite0_folder):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(lite0_folder))
    network = loaded.signatures["serving_default"]

    def run(images: np.ndarray) -> np.ndarray:
        return network(image=tf.constant(images))["probabilities"].numpy()

    run.keep = loaded  # the signature holds its variables weakly
    return run


@pytest.fixture(scope="module")
def pictures():
    """The photographs of scikit-image as bytes, with the tensor that TensorFlow in Python makes of each."""
    import skimage
    import tensorflow as tf

    folder = Path(skimage.__file__).parent / "data"
    names = ["chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png"]
    encoded, tensors = [], []
    for name in names:
        content = (folder / name).read_bytes()
        image = tf.io.decode_image(content, channels=3, expand_animations=False)
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = tf.image.resize(image[top : top + side, left : left + side], (224, 224), antialias=False)
        encoded.append(content)
        tensors.append(((image - 127) / 128).numpy())
    return encoded, np.stack(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 16] if PROVE else [1, 4])
def test_lite0_on_photographs_over_batch_sizes(client, lite0_folder, lite0_network, pictures, size):
    encoded, tensors = pictures
    n = count(8, 48)
    encoded = [encoded[i % len(encoded)] for i in range(n)]
    tensors = tensors[[i % len(tensors) for i in range(n)]]
    model = flightsvc.Model(
        lite0_folder,
        preprocess={"image": flightsvc.ImageInput(size=(224, 224), scale=1 / 128, offset=-127 / 128)},
    )
    table = pa.table({"content": pa.array(encoded, pa.binary())})
    got = client.predict(model, pa.Table.from_batches(table.to_batches(size)), inputs={"image": "content"})
    ours, want = column(got, "probabilities"), lite0_network(tensors)
    same = np.concatenate([lite0_network(tensors[i : i + size]) for i in range(0, n, size)])
    report(
        **{
            f"lite0_batch_{size}_share_of_tolerance": share(ours, want),
            f"lite0_batch_{size}_share_of_tolerance_same_batch": share(ours, same),
        }
    )
    np.testing.assert_allclose(ours, want, RTOL, ATOL)
    np.testing.assert_allclose(ours, same, SAME_RTOL, ATOL)
    np.testing.assert_array_equal(ours.argmax(1), want.argmax(1))


@pytest.mark.parametrize("partitions", [1, 4] if PROVE else [2])
def test_lite0_on_photographs_over_partitions(
    spark, lite0_folder, lite0_network, pictures, tmp_path, partitions
):
    encoded, tensors = pictures
    for i, content in enumerate(encoded):
        (tmp_path / f"{i}.bin").write_bytes(content)
    model = flightsvc.Model(
        lite0_folder,
        preprocess={"image": flightsvc.ImageInput(size=(224, 224), scale=1 / 128, offset=-127 / 128)},
    )
    df = spark.read.format("binaryFile").load(str(tmp_path)).select("path", "content").repartition(partitions)
    got = model.transform(df, inputs={"image": "content"}, outputs={"probabilities": "p"}).collect()
    assert len(got) == len(encoded)
    want = lite0_network(tensors)
    for row in got:
        expected = want[int(Path(row.path).stem)]
        np.testing.assert_allclose(np.array(row.p, np.float32), expected, RTOL, ATOL)
        assert int(np.argmax(row.p)) == int(expected.argmax())
