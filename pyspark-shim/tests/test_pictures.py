"""A thousand files of which 7 % are no pictures: the right rows under each policy, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from figures import PROVE, count, report
from make_pictures import ORIENTATION, SIDE, black
from PIL import Image

import flightsvc
from flightsvc import image

COUNT = count(100, 1000)
SHARE = 0.07  # of the files are no pictures

MIB = 1 << 20
# What pictures in work take together, and, for each of the two tasks, the record batch that is read, its
# tensors and its answer; all beyond what the runner holds once it has answered its first picture.
WORKING, PER_TASK, TASKS = 512 * MIB, 3 * 64 * MIB, 2
RUNNER_GROWTH = WORKING + TASKS * PER_TASK
FRONT_GROWTH = 64 * MIB  # no picture passes through it


class Corpus:
    """The files, what they are, and what they look like."""

    def __init__(self, folder: Path):
        self.files = folder / "files"
        self.about = {entry["path"]: entry for entry in json.loads((folder / "manifest.json").read_text())}
        self.good = {path for path, about in self.about.items() if "format" in about}
        self.bad = set(self.about) - self.good
        # No file source of Spark lists empty files; as rows of a table they are bad.
        self.listed = {path for path, about in self.about.items() if about["kind"] != "empty"}

    def name(self, origin: str) -> str:
        """Return the name in the manifest of a path that Spark gives."""
        return origin[origin.index("label=") :]

    def pixels(self, name: str) -> np.ndarray:
        """Return the picture [height, width, channels], BGR(A), as TensorFlow or Pillow decode it."""
        import tensorflow as tf

        about, path = self.about[name], self.files / name
        with Image.open(path) as opened:
            if about["format"] == "JPEG":
                picture = tf.io.decode_jpeg(path.read_bytes(), channels=about["channels"]).numpy()
                return upright(picture, opened.getexif().get(ORIENTATION, 1))[:, :, ::-1]
            if opened.mode.startswith("I"):  # 16 bits
                return (np.asarray(opened).astype(np.uint32) >> 8).astype(np.uint8)[:, :, None]
            picture = np.asarray(opened.convert({1: "L", 3: "RGB", 4: "RGBA"}[about["channels"]]))
        if picture.ndim == 2:
            return picture[:, :, None]
        return picture[:, :, [2, 1, 0, 3][: about["channels"]]]


def upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """Return a picture as EXIF's orientation says that it is shown."""
    turns = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}
    picture = np.rot90(picture, turns.get(orientation, 0))
    return picture[:, ::-1] if orientation in (2, 4, 5, 7) else picture


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    script = Path(__file__).with_name("make_pictures.py")
    folder = script.parents[2] / "build" / f"pictures-{COUNT}"
    subprocess.run([sys.executable, script, folder, str(COUNT)], check=True)
    corpus = Corpus(folder)
    assert len(corpus.about) == COUNT and len(corpus.bad) == round(COUNT * SHARE)
    assert not PROVE or COUNT == 1000
    return corpus


class Memory:
    """The most that the runners of the Spark session were seen to hold, by how much fronts grew; bytes."""

    def __init__(self, run_dir: Path):
        self.front = 0
        self._fronts_first: dict[int, int] = {}  # by pid; other tests may have used it before
        self.runners: dict[int, int] = {}  # by pid
        self.first: dict[int, int] = {}  # what they held when a test last asked
        self._run_dir = run_dir
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Note what each runner holds now, as that from which growth is counted."""
        for front in self._fronts():
            for runner in front.children():
                self.first.setdefault(runner.pid, runner.memory_info().rss)

    def growth(self) -> int:
        """Return by how much a runner grew at most since it was first noted."""
        return max(most - self.first[pid] for pid, most in self.runners.items() if pid in self.first)

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _fronts(self) -> list[psutil.Process]:
        found = []
        for file in self._run_dir.glob("*/front"):
            with contextlib.suppress(psutil.NoSuchProcess):  # one that a test has killed
                if file.parent.name != "user":
                    found.append(psutil.Process(json.loads(file.read_text())["pid"]))
        return found

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            try:
                for front in self._fronts():
                    about = front.memory_info()
                    held = about.rss - about.shared  # its program's file is shared
                    self.front = max(self.front, held - self._fronts_first.setdefault(front.pid, held))
                    for runner in front.children():
                        held = runner.memory_info().rss
                        self.runners[runner.pid] = max(held, self.runners.get(runner.pid, 0))
            except (psutil.Error, OSError, ValueError):
                continue  # it is starting or ending


@pytest.fixture(scope="module")
def memory(surroundings: Path, spark: Any) -> Iterator[Memory]:
    memory = Memory(surroundings / "run")
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def model(models: Path) -> flightsvc.Model:
    how = flightsvc.ImageInput(size=(32, 32), fit="stretch", resize="area", scale=1 / 255)
    return flightsvc.Model(models / "pictures", preprocess={"image": how})


@pytest.fixture(scope="module")
def settled(spark: Any, corpus: Corpus, memory: Memory, model: flightsvc.Model) -> None:
    """Both models are loaded and have answered a row."""
    first = min(corpus.good)
    assert image.read_images(spark, str(corpus.files / first)).first().image.height > 0
    assert model.transform(table(spark, corpus, {first}), inputs={"image": "content"}).first().mean
    memory.settle()
    assert len(memory.first) >= 2  # and those of other tests


def table(spark: Any, corpus: Corpus, names: set[str]) -> Any:
    rows = [(name, (corpus.files / name).read_bytes()) for name in sorted(names)]
    return spark.createDataFrame(rows, "name string, content binary").repartition(TASKS)


def test_read_images_makes_bad_files_null(spark: Any, corpus: Corpus, settled: None):
    frame = image.read_images(spark, str(corpus.files), on_error="null")
    assert frame.columns == ["image", "label"]
    rows = frame.collect()
    assert len(rows) == len(corpus.listed)
    assert {corpus.name(row.image.origin) for row in rows if row.image} == corpus.good


def test_read_images_says_why(spark: Any, corpus: Corpus, settled: None):
    frame = image.read_images(spark, str(corpus.files), on_error="column")
    assert frame.columns == ["image", "label", "error"]
    rows = frame.collect()
    assert len(rows) == len(corpus.listed)
    for row in rows:
        assert (row.image is None) == (row.error is not None)
    errors = [row.error for row in rows if row.error is not None]
    assert {corpus.name(error.split(": ")[0]) for error in errors} == corpus.bad & corpus.listed
    seen = set()
    for row in rows:
        if row.image is not None:
            name = corpus.name(row.image.origin)
            want = corpus.pixels(name)
            got = image.to_array(row.image)
            about = corpus.about[name]
            assert got.shape == want.shape == (about["height"], about["width"], about["channels"]), about
            np.testing.assert_array_equal(got, want, about["kind"])
            assert row.label == int(name[6])
            seen.add(name)
    assert seen == corpus.good


def test_bad_files_fail_the_job_by_name(spark: Any, corpus: Corpus, settled: None, tmp_path: Path):
    with pytest.raises(Exception, match=r"InvalidArgumentError: file:.*on_error='null'") as failed:
        image.read_images(spark, str(corpus.files)).collect()
    assert any(f"{corpus.files}/{name}: " in str(failed.value) for name in corpus.bad)
    for name in corpus.good:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(corpus.files / name, tmp_path / name)
    rows = image.read_images(spark, str(tmp_path)).collect()
    assert {corpus.name(row.image.origin) for row in rows} == corpus.good


def test_a_model_answers_the_good_ones(
    spark: Any, corpus: Corpus, model: flightsvc.Model, settled: None, oracle: Any
):
    frame = table(spark, corpus, set(corpus.about))
    null = model.transform(frame, inputs={"image": "content"}, outputs={"mean": "m"}, on_error="null")
    rows = null.select("name", "m").collect()
    assert {row.name for row in rows if row.m is not None} == corpus.good
    assert {row.name for row in rows if row.m is None} == corpus.bad

    said = model.transform(frame, inputs={"image": "content"}, outputs={"mean": "m"}, on_error="column")
    rows = said.select("name", "m", "error").collect()
    assert {row.name for row in rows if row.error is not None} == corpus.bad
    import tensorflow as tf

    for row in rows:
        if row.m is not None:
            pixels = corpus.pixels(row.name)
            rgb = pixels[:, :, [2, 1, 0]] if pixels.shape[2] > 1 else np.repeat(pixels, 3, 2)
            tensor = tf.image.resize(rgb, (32, 32), "area") / 255
            want = oracle("pictures", image=tensor[None])["mean"][0]
            np.testing.assert_allclose(row.m, want, 1e-4, 1e-5, err_msg=row.name)

    wanted = r"InvalidArgumentError: model .*/pictures, .*row \d+ of record batch \d+: .*content.*on_error"
    with pytest.raises(Exception, match=wanted):
        model.transform(frame, inputs={"image": "content"}, outputs={"mean": "m"}).collect()


def test_sql_answers_the_good_ones(spark: Any, corpus: Corpus, model: flightsvc.Model, settled: None):
    table(spark, corpus, set(corpus.about)).createOrReplaceTempView("files")
    for policy, answer in (("null", "mean_of(content)"), ("column", "mean_of(content).mean")):
        flightsvc.register_udf(spark, "mean_of", model, on_error=policy)
        rows = spark.sql(f"SELECT name, {answer} AS m FROM files").collect()
        assert {row.name for row in rows if row.m is not None} == corpus.good
        assert {row.name for row in rows if row.m is None} == corpus.bad
    flightsvc.register_udf(spark, "mean_of", model)
    with pytest.raises(Exception, match="InvalidArgumentError"):
        spark.sql("SELECT mean_of(content) AS m FROM files").collect()
    spark.sql("DROP TEMPORARY FUNCTION mean_of")


def test_large_pictures_are_decoded_within_the_budget(
    spark: Any, corpus: Corpus, model: flightsvc.Model, settled: None, memory: Memory
):
    """Pictures of 64 million points, each 192 MB as RGB and as much again for a box of it."""
    bomb, large = black(SIDE), black(8_000)
    assert max(len(bomb), len(large)) < MIB
    good = set(range(1, count(4, 8)))
    rows = [(0, bomb), *((i, large) for i in good)]
    frame = spark.createDataFrame(rows, "id int, content binary").repartition(TASKS)
    crop = flightsvc.Model(
        model.reference, preprocess={"image": flightsvc.ImageInput(size=(32, 32), scale=1 / 255)}
    )
    answered = crop.transform(frame, inputs={"image": "content"}, on_error="column").collect()
    assert {row.id for row in answered if row.error is None} == good
    assert all(row.mean == [0, 0, 0] for row in answered if row.error is None)
    small = frame.select("id", image.resize((32, 32), on_error="null")("content").alias("image"))
    assert {row.id for row in small.collect() if row.image is not None} == good


def test_memory_stayed_within_its_limit(corpus: Corpus, settled: None, memory: Memory):
    """Over all of the above."""
    report(
        pictures=COUNT,
        pictures_bad=len(corpus.bad),
        runner_mb_first=round(max(memory.first.values()) / 1e6),
        runner_mb_most=round(max(memory.runners.values()) / 1e6),
        runner_mb_growth=round(memory.growth() / 1e6),
        runner_mb_growth_allowed=round(RUNNER_GROWTH / 1e6),
        front_mb_growth=round(memory.front / 1e6),
    )
    assert memory.growth() < RUNNER_GROWTH
    assert memory.front < FRONT_GROWTH
