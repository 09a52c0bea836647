"""The same script on every kind of cluster, each started for real; its answers beside TensorFlow's.

What runs in `make test` is small; `make prove` runs all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_script import EVERYWHERE, ROWS, STRICT, TEXTS, pixels, vectors
from clusters import HERE, OLDER, SMALL, Spark, connect_server, standalone, two_networks
from figures import PROVE, report

import flightsvc

QUICK = ("transform", "sql", "sidecars")

pytestmark = [pytest.mark.java, pytest.mark.bar("clusters")]
Check = Callable[[dict[str, Any]], None]


@pytest.fixture
def agree(oracle: Callable[..., dict[str, Any]]) -> Check:
    """Compare what a script printed with TensorFlow's answers."""

    def compare(said: dict[str, Any]) -> None:
        for name, answer in said["answers"].items():
            COMPARE[name](answer, oracle)
        report(**{f"seconds on {said['spark']}": said["seconds"]})

    return compare


def same_vectors(answer: Any, oracle: Callable[..., dict[str, Any]]) -> None:
    expected = oracle("two", **vectors())
    assert [row[0] for row in answer] == list(range(ROWS))
    for position, output in ((1, "logits"), (2, "sum")):
        got = np.array([row[position] for row in answer])
        np.testing.assert_allclose(got, expected[output], rtol=1e-4, atol=1e-6)


def same_sql(answer: Any, oracle: Callable[..., dict[str, Any]]) -> None:
    totals = oracle("ints", i=np.array([[i, 0, 1] for i in range(ROWS)], np.int64))["total"]
    kept = totals[totals > 10]
    assert answer["grouped"] == [
        [k, int((kept % 3 == k).sum()), int(kept[kept % 3 == k].sum())] for k in range(3)
    ]
    texts = [text or "" for text in TEXTS]
    expected = oracle("strings", s=np.array(texts))
    assert answer["upper"] == [
        [i, *((None, None) if text is None else (int(length), upper.decode()))]
        for i, (text, length, upper) in enumerate(
            zip(TEXTS, expected["length"], expected["upper"], strict=True)
        )
    ]
    assert answer["null"] is None
    assert not answer["typed"] or "types needs Spark 4, this is Spark 3.5." in answer["typed"]


def same_pictures(answer: Any, oracle: Callable[..., dict[str, Any]]) -> None:
    assert answer["sums"] == {str(n): int(pixels(n).astype(int).sum()) for n in range(6)}
    assert answer["bad"].startswith("file:") and "6.png: 10 bytes that are no JPEG" in answer["bad"]
    means = oracle("pictures", image=np.array([pixels(n) for n in range(6)], np.float32))["mean"]
    for found in (answer["means"], answer["by_column"]):
        assert sorted(found) == [str(n) for n in range(6)]
        np.testing.assert_allclose([found[str(n)] for n in range(6)], means, rtol=1e-5)


def same_policies(answer: Any, oracle: Callable[..., dict[str, Any]]) -> None:
    good = {row[0]: row for row in STRICT if row[0] in (0, 4)}
    expected = oracle(
        "strict", x=np.float32([r[1] for r in good.values()]), text=[r[2] for r in good.values()]
    )
    rows: list[list[Any]] = [[None, None] for _ in STRICT]
    for at, root, number in zip(good, expected["root"], expected["number"], strict=True):
        rows[at] = [float(root), float(number)]
    assert answer["null"] == rows
    assert [row[:2] for row in answer["column"]] == rows
    assert [row[2] is None for row in answer["column"]] == [True, False, False, True, True]
    for text in (answer["fail"], answer["column"][1][2]):
        assert "x must not be negative" in text
    assert "row 1 of record batch 0" in answer["fail"] and "strict" in answer["fail"]


def same_ints(answer: Any, oracle: Callable[..., dict[str, Any]]) -> None:
    i = np.array([[row[0], 0, 1] for row in answer], np.int64)
    expected = oracle("ints", i=i)
    assert [row[0] for row in answer] == list(range(len(answer))) and len(answer) > 0
    assert [row[1] for row in answer] == expected["total"].tolist()
    if len(answer[0]) == 3 and isinstance(answer[0][2], list):
        assert [row[2] for row in answer] == expected["doubled"].tolist()
    elif len(answer[0]) == 3:
        assert [row[2] for row in answer] == expected["total"].tolist()


def same_sidecars(answer: Any, oracle: Callable[..., dict[str, Any]]) -> None:
    assert len(answer["answered"]) >= 1
    if "status" in answer:
        assert len(answer["status"]) >= len(answer["answered"])


COMPARE: dict[str, Callable[[Any, Callable[..., dict[str, Any]]], None]] = {
    "transform": same_vectors,
    "columns": same_vectors,
    "sql": same_sql,
    "pictures": same_pictures,
    "policies": same_policies,
    "shipped": same_ints,
    "streaming": same_ints,
    "barrier": same_ints,
    "sidecars": same_sidecars,
}
assert set(COMPARE) == set(EVERYWHERE)


def checks() -> tuple[str, ...]:
    return EVERYWHERE if PROVE else QUICK


@pytest.fixture
def older() -> Spark:
    if not OLDER.python.exists():
        pytest.skip("skipped: needs make spark-3.5")
    return OLDER


@pytest.mark.prove
def test_local(models: Path, agree: Check):
    agree(HERE.script(models, ("--master", "local[2]"), *checks()))


@pytest.mark.prove
def test_local_cluster(models: Path, agree: Check, tmp_path: Path):
    environ = HERE.elsewhere(tmp_path / "spark")
    said = HERE.script(models, ("--master", "local-cluster[2,1,768]"), environ=environ)
    agree(said)
    assert len(said["answers"]["sidecars"]["answered"]) == 2


@pytest.mark.prove
def test_standalone(models: Path, agree: Check, tmp_path: Path):
    with standalone(HERE, tmp_path / "standalone") as master:
        said = HERE.script(models, ("--master", master), *checks())
    agree(said)
    assert len(said["answers"]["sidecars"]["answered"]) == 2


@pytest.mark.prove
def test_standalone_on_two_hosts(models: Path, agree: Check, tmp_path: Path):
    with contextlib.ExitStack() as stack:
        try:
            bridge, hosts = stack.enter_context(two_networks())
        except OSError as error:
            pytest.skip(f"skipped: needs root and network namespaces ({error})")
        conf = {**SMALL, "spark.driver.host": bridge, "spark.driver.bindAddress": bridge}
        master = stack.enter_context(standalone(HERE, tmp_path / "two-hosts", master=bridge, hosts=hosts))
        said = HERE.script(models, ("--master", master), conf=conf)
    agree(said)
    assert len(said["answers"]["sidecars"]["answered"]) == 2


def test_connect_from_a_process_without_java(models: Path, agree: Check, tmp_path: Path):
    without = {**HERE.environ(), "PATH": "/nonexistent"}
    without.pop("JAVA_HOME", None)
    with connect_server(HERE, tmp_path / "connect") as remote:
        agree(HERE.script(models, ("--remote", remote), *checks(), conf={}, environ=without))


@pytest.mark.prove
def test_executors_come_and_go(models: Path, tmp_path: Path):
    conf = {
        **SMALL,
        "spark.dynamicAllocation.enabled": "true",
        "spark.dynamicAllocation.shuffleTracking.enabled": "true",
        "spark.dynamicAllocation.minExecutors": "0",
        "spark.dynamicAllocation.initialExecutors": "2",
        "spark.dynamicAllocation.executorIdleTimeout": "2s",
        "spark.locality.wait": "0s",
    }
    with standalone(HERE, tmp_path / "elastic") as master:
        said = HERE.script(models, ("--master", master), "elastic", conf=conf)["answers"]["elastic"]
    assert said["totals"] == [sum(range(1, 41))] * 2
    first, second = said["sidecars"]
    assert first and second and not set(first) & set(second)
    assert said["left"] == [[], []]


@pytest.mark.prove
def test_a_stage_with_a_gpu_that_is_not_there(models: Path, tmp_path: Path):
    script = tmp_path / "gpus.sh"
    script.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["5"]}'\n""")
    script.chmod(0o755)
    there = f"-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript={script}"
    conf = {
        **SMALL,
        "spark.dynamicAllocation.enabled": "true",
        "spark.dynamicAllocation.shuffleTracking.enabled": "true",
        "spark.dynamicAllocation.executorIdleTimeout": "2s",
        "spark.task.maxFailures": "1",
    }
    with standalone(HERE, tmp_path / "gpus", environ={"SPARK_WORKER_OPTS": there}) as master:
        said = HERE.script(models, ("--master", master), "gpus", conf=conf)["answers"]["gpus"]
    assert said["plain"] == 40
    assert 'ints: device "5": no ' in said["refused"] and 'use "auto" or "cpu"' in said["refused"]
    assert said["fallback"] == [[i, i + 1] for i in range(40)]


@pytest.mark.prove
def test_a_slow_task_runs_twice_and_counts_once(models: Path, tmp_path: Path):
    conf = {
        **SMALL,
        "spark.speculation": "true",
        "spark.speculation.interval": "100ms",
        "spark.speculation.quantile": "0.5",
        "spark.speculation.multiplier": "1.1",
        "spark.speculation.minTaskRuntime": "100ms",
    }
    with standalone(HERE, tmp_path / "speculation") as master:
        said = HERE.script(models, ("--master", master), "speculation", conf=conf)["answers"]["speculation"]
    assert {"0-0", "0-1"} <= set(said["attempts"])
    assert said["rows"] == [[i, i + 1] for i in range(40)]


@pytest.mark.prove
@pytest.mark.bar("clusters-3.5")
@pytest.mark.parametrize("master", ["local[2]", "local-cluster[2,1,768]"])
def test_spark_3_5(older: Spark, models: Path, agree: Check, master: str, tmp_path: Path):
    said = older.script(models, ("--master", master), environ=older.elsewhere(tmp_path / "spark"))
    assert said["spark"].startswith("3.5.")
    agree(said)


@pytest.mark.prove
@pytest.mark.bar("clusters-3.5")
def test_spark_3_5_standalone(older: Spark, models: Path, agree: Check, tmp_path: Path):
    with standalone(older, tmp_path / "older") as master:
        said = older.script(models, ("--master", master))
    agree(said)
    assert len(said["answers"]["sidecars"]["answered"]) == 2


@pytest.mark.prove
@pytest.mark.bar("clusters-3.5")
@pytest.mark.parametrize("version", ["4.3", "3.5"])
def test_standalone_with_the_plugin(version: str, models: Path, agree: Check, tmp_path: Path, request: Any):
    spark = HERE if version == "4.3" else request.getfixturevalue("older")
    with standalone(spark, tmp_path / version) as master:
        said = spark.script(models, ("--master", master), conf={**SMALL, **flightsvc.spark_conf()})
    assert said["spark"].startswith(version)
    agree(said)
    answered = said["answers"]["sidecars"]["answered"]
    assert [who.split()[:2] for who in answered] == [["executor", "0"], ["executor", "1"]]
