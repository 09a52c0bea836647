"""Many models and little memory: one load for all who ask, and eviction of what nobody uses."""

from __future__ import annotations

import collections
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from figures import count, report
from fronts import Front, Sampler, front, host_memory_but, lost_streams, make_scaled, own_memory
from processes import is_gone, until

import flightsvc
from flightsvc.server.connection import Connection
from flightsvc.server.stream import Exchange
from flightsvc.settings import Settings

REQUESTS = 200  # at once, for one model
MODELS, FIT = count(5, 8), 3  # so many at a time
SECONDS = count(8, 600)
CLIENTS = 8
REST = 5.0  # seconds after which a stream on which nothing moves does not keep its model
PAUSE = REST + 1.5
LOAD_TIMEOUT = 120
SELECT_ROWS = count(100, 600)
SELECT_SECONDS = count(120, 300)
LARGE_MB = count(200, 600)
BACK_SECONDS = 2.0


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of different sizes: number i multiplies by i + 1."""
    folder = tmp_path_factory.mktemp("scaled")
    return [make_scaled(folder / f"times{i + 1}", i + 1, 80 + 3 * i) for i in range(MODELS)]


def batch(*values: float) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array(values, pa.float32())})


def test_one_load_for_all_who_ask(scaled: list[Path]):
    model = scaled[0]
    with front() as it, Sampler(it) as sampler:
        ready = threading.Barrier(REQUESTS)

        def ask(i: int) -> list[float]:
            with flightsvc.connect(it.endpoint) as client:
                ready.wait()
                answer = client.predict(model, pa.table(batch(i, i + 0.5).to_pydict()), inputs={"x": "x"})
                return answer["y"].to_pylist()

        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = list(pool.map(ask, range(REQUESTS)))
        assert answers == [[i, i + 0.5] for i in range(REQUESTS)]
        assert len(it.logged("model ready")) == 1
        assert len(sampler.pids()) == 1
    report(concurrent_requests=REQUESTS, concurrent_requests_loads=1)


# A random workload.


def measured(models: list[Path], cache: Path) -> list[int]:
    """Load all models once, and return the bytes that each is counted with."""
    with front(f"--cache-dir={cache}") as it, flightsvc.connect(it.endpoint) as client:
        for factor, model in enumerate(models, 1):
            table = pa.Table.from_batches([batch(*range(50))] * 50)
            assert client.predict(model, table)["y"][7].as_py() == 7 * factor
        until(lambda: all((it.model(model) or {}).get("memory") for model in models), 10, "measurements")
        time.sleep(1.0)  # two more
        return [it.model(model)["reserved"] for model in models]


class Work:
    """One client: it opens streams of every kind to models at random, and checks each answer."""

    def __init__(self, number: int, it: Front, models: list[Path], end: float):
        self.random, self.number, self.models, self.end = random.Random(number), number, models, end
        location = it.endpoint
        self.connection = Connection(lambda: location, Settings.read())
        self.done: collections.Counter[str] = collections.Counter()
        self.rested: set[str] = set()  # requests whose streams may have been taken away
        self.longest = 0.0  # seconds until a first answer

    def run(self) -> None:
        kinds = [self.whole] * 10 + [self.paused] * 2 + [self.early] * 3 + [self.leased] * 2
        for turn in itertools.count():
            if time.monotonic() > self.end:
                return
            index = self.random.randrange(len(self.models))
            self.request = f"{self.number}-{turn}"
            kind = self.random.choice(kinds)
            kind(self.models[index], index + 1)
            self.done[kind.__name__] += 1

    def batches(self, n: int, pause_at: int = -1) -> Iterator[pa.RecordBatch]:
        for i in range(n):
            if i == pause_at:
                time.sleep(PAUSE)
            yield batch(*(self.random.uniform(-100, 100) for _ in range(self.random.randint(1, 50))))

    def answers(self, model: Path, factor: int, batches: Iterator[pa.RecordBatch]) -> Iterator[int]:
        """Check answers as they come; a model's factor is its own, so another model's answer is wrong."""
        descriptor = {"v": 1, "model": str(model), "inputs": {"x": "x"}, "request_id": self.request}
        started = time.monotonic()
        for number, answer in enumerate(Exchange(self.connection, descriptor, {"x": 0}).answers(batches)):
            if number == 0:
                self.longest = max(self.longest, time.monotonic() - started)
            want = answer.batch["x"].to_numpy() * np.float32(factor)
            np.testing.assert_array_equal(answer.outputs["y"].to_numpy(), want)
            self.done["batches"] += 1
            yield number

    def whole(self, model: Path, factor: int) -> None:
        n = self.random.randint(1, 60)
        assert sum(1 for _ in self.answers(model, factor, self.batches(n))) == n

    def paused(self, model: Path, factor: int) -> None:
        """Nothing moves for so long that the model may go; the stream is resumed."""
        self.rested.add(self.request)
        n = self.random.randint(6, 30)
        assert sum(1 for _ in self.answers(model, factor, self.batches(n, n // 2))) == n

    def early(self, model: Path, factor: int) -> None:
        answers = self.answers(model, factor, self.batches(40))
        for _ in zip(answers, range(self.random.randint(1, 5)), strict=False):
            pass
        answers.close()

    def leased(self, model: Path, factor: int) -> None:
        """A lease keeps the model until its stream opens."""
        body = {"v": 1, "model": str(model), "request_id": self.request}
        command = flight.FlightDescriptor.for_command(json.dumps(body))
        [endpoint] = self.connection.front().get_flight_info(command).endpoints
        time.sleep(self.random.uniform(0, 3))
        runner = self.connection.runner(endpoint.locations[0].uri.decode())
        writer, reader = runner.do_exchange(flight.FlightDescriptor.for_command(endpoint.ticket.ticket))
        sent = batch(1, 2, 3)
        writer.begin(sent.schema)
        writer.write_batch(sent)
        writer.done_writing()
        assert reader.read_all()["y"].to_pylist() == [factor, 2 * factor, 3 * factor]
        writer.close()


@pytest.mark.slow
def test_a_random_workload_in_little_memory(scaled: list[Path], tmp_path: Path):
    cache = tmp_path / "cache"
    sizes = sorted(measured(scaled, cache))
    budget = (sum(sizes[-FIT:]) + sum(sizes[: FIT + 1])) // 2
    assert sum(sizes[-FIT:]) < budget < sum(sizes[: FIT + 1])
    flags = (f"--cache-dir={cache}", f"--memory={budget}", f"--load-timeout={LOAD_TIMEOUT}s")
    with front(*flags) as it, Sampler(it) as sampler, lost_streams() as lost:
        work = [Work(number, it, scaled, time.monotonic() + SECONDS) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(client.run) for client in work]
            for job in running:
                job.result(SECONDS + 2 * LOAD_TIMEOUT)  # raises what a client saw; no deadlock
        assert sampler.most() <= budget, sampler.most() / budget
        most_ready = max(len([pid for pid, own in sample.items() if own]) for _, sample in sampler.samples)
        assert most_ready <= FIT + 1  # one may be ending, or begin small
        rested = set().union(*(client.rested for client in work))
        assert set(lost) <= rested
        unloaded = it.logged("model unloaded")
        assert {line["why"] for line in unloaded} == {"others need its memory"}
        loads = it.logged("model ready")
        assert not it.logged("model failed")
        assert len(loads) > MODELS
        assert len(loads) - len(unloaded) <= FIT
    done = sum((client.done for client in work), collections.Counter[str]())
    for kind in ("whole", "paused", "early", "leased"):
        assert done[kind] > 0
    report(
        pool_seconds=SECONDS,
        pool_seconds_wanted=600,
        pool_budget_mib=budget >> 20,
        pool_most_mib=sampler.most() >> 20,
        pool_loads=len(loads),
        pool_evictions=len(unloaded),
        pool_streams={kind: done[kind] for kind in ("whole", "paused", "early", "leased")},
        pool_batches=done["batches"],
        pool_wrong_answers=0,
        pool_resting_streams_resumed=len(lost),
        pool_longest_wait_seconds=round(max(client.longest for client in work), 1),
    )


# Two models, and memory for one.


@pytest.fixture
def small(scaled: list[Path], spark: Any) -> Iterator[Front]:
    """A front with memory for one model at a time, used by Spark."""
    with front("--memory=220MiB", "--load-timeout=20s") as it:
        spark.conf.set("spark.flightsvc.endpoint", it.endpoint)
        yield it
        spark.conf.unset("spark.flightsvc.endpoint")


def ends_right_or_says_who(collect: Any, wanted: list[float], one: Path, other: Path) -> str:
    started = time.monotonic()
    try:
        assert sorted(row.z for row in collect()) == wanted
        ended = "right"
    except AssertionError:
        raise
    except Exception as error:
        said = str(error)
        assert "of this host's memory and has waited 20s for it" in said, said
        assert any(f"{model.as_uri()} version 1 (" in said for model in (one, other)), said
        assert " streams, " in said
        ended = "with an error"
    assert time.monotonic() - started < SELECT_SECONDS
    return ended


@pytest.mark.prove  # make test has streams that rest
def test_two_models_in_one_select_with_room_for_one(spark: Any, small: Front, scaled: list[Path]):
    one, other = scaled[1], scaled[2]
    frame = spark.range(SELECT_ROWS).selectExpr("cast(id AS float) AS x").repartition(2)
    wanted = [6.0 * i for i in range(SELECT_ROWS)]
    first, second = flightsvc.Model(one), flightsvc.Model(other)
    nested = second.transform(
        first.transform(frame, outputs={"y": "y"}), inputs={"x": "y"}, outputs={"y": "z"}
    )
    frames = ends_right_or_says_who(nested.collect, wanted, one, other)
    flightsvc.register_udf(spark, "first_model", first)
    flightsvc.register_udf(spark, "second_model", second)
    frame.createOrReplaceTempView("numbers")
    query = spark.sql("SELECT second_model(first_model(x)) AS z FROM numbers")
    sql = ends_right_or_says_who(query.collect, wanted, one, other)
    evicted = len(small.logged("model unloaded", why="others need its memory"))
    assert evicted >= 1  # there is room for one
    report(select_of_frames=frames, select_of_sql=sql, select_evictions=evicted)


# Memory comes back.


def resident(it: Front) -> int:
    """Return the bytes that a front and its runners have for themselves."""
    return sum(own_memory(pid) for pid in (it.process.pid, *it.runners()))


@pytest.mark.slow
def test_after_an_unload_the_memory_is_back(tmp_path: Path):
    model = make_scaled(tmp_path / "large", 2, LARGE_MB)
    backs = []
    with front() as it, flightsvc.connect(it.endpoint) as client:
        for _ in range(5):
            answer = client.predict(model, pa.table(batch(1, 2).to_pydict()), inputs={"x": "x"})
            assert answer["y"].to_pylist() == [2, 4]
            pid = it.model(model)["pid"]
            runner, held = psutil.Process(pid), own_memory(pid)
            assert held > LARGE_MB * 1_000_000
            rest = resident(it) - held
            taken = host_memory_but(pid)
            started = time.monotonic()
            client.unload(model)
            until(lambda: is_gone(runner), BACK_SECONDS, "end of the runner")  # noqa: B023
            gone = time.monotonic() - started
            assert resident(it) <= rest + (8 << 20)
            time.sleep(max(0.0, BACK_SECONDS - gone))
            backs.append(taken - host_memory_but(pid))
            assert it.model(model) is None
            if len(backs) >= count(1, 5) and max(backs) > 0.8 * held:
                break
    assert max(backs) > 0.8 * held  # other programs of this host take and give back memory, too
    report(
        unload_mb=held // 10**6,
        unload_seconds_until_gone=round(gone, 2),
        unload_host_mb_back_after_2_seconds=[back // 10**6 for back in backs],
    )
