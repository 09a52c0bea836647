"""The folded form of a model takes over from the saved one, in the background, if its answers agree.

Fronts of their own with ``--tune=fold``; all other tests switch it off.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from figures import report
from fronts import Front, copied, front
from processes import is_gone, until
from pyarrow import flight

import flightsvc
from flightsvc.server.connection import Connection
from flightsvc.settings import Settings

SECONDS = 60.0
SIZE, CHANNELS = 8, 3
KILLS = 20


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel with variables: two convolutions, each with a normalisation as Keras 3 writes it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    random = np.random.default_rng(1)

    class Network(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = [(3, 3, CHANNELS, 16), (16,), (16,), (3, 3, 16, 4), (4,), (4,)]
            self.all = [tf.Variable(random.normal(size=shape).astype("f4")) for shape in shapes]

        @tf.function(input_signature=[tf.TensorSpec((None, SIZE * SIZE * CHANNELS), tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            x = tf.reshape(x, [-1, SIZE, SIZE, CHANNELS])
            for weights, factor, shift in (self.all[:3], self.all[3:]):
                x = tf.nn.relu(tf.nn.conv2d(x, weights, 1, "SAME") * factor + shift)
            return {"y": tf.reduce_mean(x, [1, 2])}

    folder = tmp_path_factory.mktemp("network") / "network"
    module = Network()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


def rows(count: int, seed: int = 0) -> pa.Table:
    values = np.random.default_rng(seed).normal(size=(count, SIZE * SIZE * CHANNELS)).astype("f4")
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])})


def truth(folder: Path, table: pa.Table) -> np.ndarray:
    import tensorflow as tf

    flat = table["x"].combine_chunks().flatten().to_numpy()
    x = tf.constant(flat.reshape(table.num_rows, -1))
    answer: np.ndarray = tf.saved_model.load(str(folder)).signatures["serving_default"](x=x)["y"].numpy()
    return answer


def answer(it: Front, model: Path, table: pa.Table) -> np.ndarray:
    with flightsvc.connect(it.endpoint) as client:
        return np.array(client.predict(model, table, inputs={"x": "x"})["y"].to_pylist())


def close(left: np.ndarray, right: np.ndarray) -> None:
    """As docs/numerics.md has it."""
    assert left.shape == right.shape
    assert (abs(left - right) <= 1e-4 * abs(right) + 1e-5 * abs(right).max()).all()


def serving(it: Front, model: Path) -> dict[str, Any]:
    """Return the status of the runner that new streams of a model get."""
    [found] = [m for m in it.models() if m["dir"] == str(model) and not m.get("superseded")]
    return found


def until_folded(it: Front, model: Path) -> dict[str, Any]:
    until(lambda: serving(it, model)["form"] == "folded", SECONDS, f"folded form; {serving(it, model)}")
    return serving(it, model)


def until_saved(it: Front, model: Path) -> str:
    """Return why a model stays in its saved form."""
    until(lambda: serving(it, model).get("not_frozen"), SECONDS, "a reason")
    return str(serving(it, model)["not_frozen"])


class Stream:
    """An open stream, without the shim; ``form`` is what its first answer says."""

    def __init__(self, it: Front, model: Path):
        descriptor = {"v": 1, "model": model.as_uri(), "layout": "list"}
        command = flight.FlightDescriptor.for_command(json.dumps(descriptor))
        with flight.connect(it.endpoint) as client:
            [place] = client.get_flight_info(command).endpoints
        self._client = flight.connect(place.locations[0])
        descriptor = flight.FlightDescriptor.for_command(place.ticket.ticket)
        self._writer, self._reader = self._client.do_exchange(descriptor)
        self._begun = False
        self.form = ""

    def ask(self, table: pa.Table) -> np.ndarray:
        [batch] = table.combine_chunks().to_batches()
        if not self._begun:
            self._writer.begin(batch.schema)
            self._begun = True
        self._writer.write_batch(batch)
        chunk = self._reader.read_chunk()
        about = json.loads(chunk.app_metadata.to_pybytes())
        self.form = about.get("form", self.form)
        return np.array(chunk.data.column("y").to_pylist())

    def close(self) -> None:
        self._writer.close()
        self._client.close()


@pytest.mark.slow
def test_the_folded_form_takes_over(network: Path):
    table = rows(5)
    want = truth(network, table)
    with front("--tune=fold") as it:
        before = Stream(it, network)
        close(before.ask(table), want)
        first = serving(it, network)
        assert (before.form, first["form"]) == ("saved", "saved")
        folded = until_folded(it, network)
        assert folded["pid"] != first["pid"]
        assert not list(Path(it.endpoint.removeprefix("grpc+unix://")).parent.glob("sample-*"))
        close(before.ask(table), want)  # it goes on with the runner that it began with
        after = Stream(it, network)
        close(after.ask(table), want)
        assert after.form == "folded"
        after.close()
        before.close()
        until(lambda: not psutil.pid_exists(first["pid"]), SECONDS, "end of the saved form")
        assert it.logged("model unloaded", why="its folded form serves")
        with flightsvc.connect(it.endpoint) as client:
            client.unload(network)
        close(answer(it, network, table), want)
        assert serving(it, network)["form"] == "folded"  # at once
        assert len(it.logged("the folded form serves")) == 1


def test_a_model_that_comes_folded(network: Path, tmp_path: Path):
    """It is known by its graph, so nothing is made or kept for it."""
    from flightsvc.export.freeze import freeze

    freeze(network, tmp_path / "folded")
    table = rows(3)
    with front("--tune=fold") as it:
        close(answer(it, tmp_path / "folded", table), truth(network, table))
        assert serving(it, tmp_path / "folded")["form"] == "folded"
        assert not list(Path(it.endpoint.removeprefix("grpc+unix://")).parent.glob("sample-*"))


@pytest.mark.slow
def test_what_is_never_folded(network: Path, tmp_path: Path):
    import tensorflow as tf

    class Dice(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def serve(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": x + tf.random.uniform(tf.shape(x))}

    module = Dice()
    tf.saved_model.save(module, str(tmp_path / "dice"), signatures={"serving_default": module.serve})
    pinned = copied(network, tmp_path / "pinned")
    (pinned / "flightsvc.json").write_text('{"form": "saved"}')
    asked = {
        tmp_path / "dice": (pa.table({"x": pa.array([1.0], pa.float32())}), "a state (RandomUniform)"),
        pinned: (rows(1), ""),
    }
    with front("--tune=fold") as it, flightsvc.connect(it.endpoint) as client:
        for model, (table, _) in asked.items():
            client.predict(model, table)
        for model, (table, why) in asked.items():
            if why:
                assert why in until_saved(it, model)
            client.predict(model, table)
            assert serving(it, model)["form"] == "saved"


def test_without_python(network: Path, tmp_path: Path):
    """No Python here has TensorFlow and flightsvc, says the status, and what to do."""
    from flightsvc.server import sidecar

    bare = tmp_path / "lib"
    bare.mkdir()
    for library in Path(sidecar._tensorflow()).glob("libtensorflow*"):
        (bare / library.name).symlink_to(library)
    environ = {**os.environ, "PATH": str(tmp_path), "VIRTUAL_ENV": ""}
    with front("--tune=fold", f"--libtensorflow={bare}", "--python=/bin/false", environ=environ) as it:
        answer(it, network, rows(1))
        assert "install both into one environment and set --python" in until_saved(it, network)


def test_no_memory_for_it(network: Path):
    """The model is served as it was saved, and tried again; no runner is ended for it."""
    with front("--tune=fold", "--memory=320MiB") as it:
        answer(it, network, rows(1))
        until(lambda: it.logged("the model is not folded yet"), SECONDS, "that there is no memory")
        assert serving(it, network)["form"] == "saved"
        assert not it.logged("model unloaded")


class Streaming:
    """A client that goes on whatever is killed: it sends record batches until told to stop."""

    def __init__(self, model: Path, fronts: list[Front]):
        settings = Settings(retry_timeout="60s")
        self._connection = Connection(lambda: fronts[-1].endpoint, settings)
        self._request = flightsvc.Model(model).request({"x": "x"})
        self.asked: list[pa.Table] = []

    def run(self, ends: Iterator[bool]) -> list[np.ndarray]:
        def batches() -> Iterator[pa.RecordBatch]:
            for seed, end in enumerate(ends):
                if end:
                    return
                self.asked.append(rows(16, seed))
                [batch] = self.asked[-1].to_batches()
                yield batch

        exchange = self._request.exchange(self._connection, ["x"], {"x": 0})
        return [np.array(a.outputs.column("y").to_pylist()) for a in exchange.answers(batches())]


@pytest.mark.prove
def test_kills_while_freezing_and_swapping(network: Path, tmp_path: Path):
    """Fronts, runners and Pythons are killed meanwhile: all rows are answered right, and nothing is left."""
    chance = random.Random(1)
    victims: dict[str, int] = {}
    for kill in range(KILLS):
        place = tmp_path / str(kill)
        flags = [f"--run-dir={place}/run", f"--cache-dir={place}/cache", "--tune=fold"]
        fronts = [Front(*flags)]
        streaming = Streaming(network, fronts)
        killer = Killer(fronts, flags, chance, swapping=kill % 2 == 1)
        got = streaming.run(killer.ends(network))
        victims[killer.killed] = victims.get(killer.killed, 0) + 1
        assert len(got) == len(streaming.asked) > 0
        for table, ours in list(zip(streaming.asked, got, strict=True))[:: max(len(got) // 50, 1)]:
            close(ours, truth(network, table))
        assert serving_form(fronts[-1], network) == "folded"
        fronts[-1].close()
        left = [str(p) for p in place.rglob("*") if p.name.startswith((".push-", "sample-")) or p.is_socket()]
        assert not left
    report(form_kills=KILLS, form_kills_of=victims)


class Killer:
    """Kills one process of a front while Python freezes a model, or while the folded form is loaded."""

    def __init__(self, fronts: list[Front], flags: list[str], chance: random.Random, swapping: bool):
        self.fronts, self.flags, self.chance, self.swapping = fronts, flags, chance, swapping
        self.killed = ""

    def ends(self, model: Path) -> Iterator[bool]:
        """Yield False until something was killed and the folded form serves, then True."""
        end, delay, begun = time.monotonic() + 2 * SECONDS, self.chance.uniform(0, 3), None
        while not self.killed or serving_form(self.fronts[-1], model) != "folded":
            assert time.monotonic() < end, self.fronts[-1].text()
            yield False
            with contextlib.suppress(psutil.NoSuchProcess):  # a child has ended meanwhile
                if self.killed:
                    continue
                front = psutil.Process(self.fronts[-1].process.pid)
                children = front.children()
                runners = [child.name() for child in children].count("flightsvc-runner")
                if runners > 1 if self.swapping else len(children) > runners:
                    begun = begun or time.monotonic()
                    if self.swapping or time.monotonic() > begun + delay:
                        self.kill(self.chance.choice([front, *children]), children)
        yield True

    def kill(self, victim: psutil.Process, children: list[psutil.Process]) -> None:
        name = victim.name()
        victim.send_signal(signal.SIGKILL)
        self.killed = name
        if victim.pid == self.fronts[-1].process.pid:
            until(lambda: all(map(is_gone, children)), 10, "end of its children")
            self.fronts.append(Front(*self.flags))


def serving_form(it: Front, model: Path) -> str:
    found = [
        m["form"] for m in it.models() if m["dir"] == str(model) and not m.get("superseded") and m.get("pid")
    ]
    return found[0] if found else ""
