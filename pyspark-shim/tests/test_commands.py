"""The command line: its tables, and files through models, as pyarrow reads them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from figures import PROVE

import flightsvc
from flightsvc import Model
from flightsvc.request import Request
from flightsvc.spark import dataframe

MIB = 1 << 20
GROUPS, ROWS = (4, 50_000) if PROVE else (3, 15_000)
"""Row groups of the large file, and rows of each, of 2 KiB."""
MEMORY = {".parquet": 700 * MIB, ".arrows": 350 * MIB}
"""The most of the command: two record batches of each kind, and an open row group of Parquet with what Go's
collector has not taken. At the full count the large file has 400 MiB, else 90, and this is no proof."""

Predict = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(client: flightsvc.Client) -> Predict:
    """``command("predict", ...)`` runs the program against the front of these tests."""
    client.status()  # it runs

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
        options = {"capture_output": True, "text": True, "timeout": 100, "check": False} | options
        return subprocess.run([os.environ["FLIGHTSVC_BINARY"], *map(str, arguments)], **options)

    return run


def written(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=max(1, table.num_rows // 3))
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".arrows":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=70)
    elif path.suffix == ".feather":
        pa.feather.write_feather(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=70)
    return path


def read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pa.parquet.read_table(path)
    if path.suffix == ".csv":
        return pa.csv.read_csv(path)
    opened = pa.ipc.open_stream if path.suffix == ".arrows" else pa.ipc.open_file
    return opened(path).read_all()


def vectors(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("end", [".parquet", ".arrow", ".arrows"])
@pytest.mark.parametrize("begin", [".parquet", ".arrow", ".arrows", ".feather"])
def test_columns_types_and_rows_are_kept(
    command: Predict, models: Path, oracle: Callable[..., Any], tmp_path: Path, begin: str, end: str
):
    rows = 500
    x = vectors(rows, 512)
    table = pa.table(
        {
            "id": pa.array(range(rows), pa.int16()),
            "when": pa.array([k * 10**9 + 1 for k in range(rows)], pa.timestamp("ns", "UTC")),
            "kind": pa.array(["abc"[k % 3] if k % 7 else None for k in range(rows)]).dictionary_encode(),
            "text": pa.array(["ü" * (k % 5) for k in range(rows)], pa.large_string()),
            "nested": pa.array([{"a": k, "b": [k, None]} if k % 11 else None for k in range(rows)]),
            "money": pa.array([None] * rows, pa.decimal128(20, 3)),
            "f": pa.array(
                [row.tolist() if k != 17 else None for k, row in enumerate(x)], pa.list_(pa.float32())
            ),
        }
    )
    out = tmp_path / f"out{end}"
    done = command(
        "predict", models / "mlp", written(table, tmp_path / f"in{begin}"), out, "--input=x=f", "--output=y=p"
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    got = read(out)
    assert got.column_names == [*table.column_names, "p"]
    assert got.drop_columns("p").cast(table.schema).equals(table)
    assert [got.schema.field(name).type for name in table.column_names] == table.schema.types
    answers = got["p"].to_pylist()
    assert answers.pop(17) is None
    np.testing.assert_allclose(answers, np.delete(oracle("mlp", x=x)["y"], 17, 0), rtol=1e-5, atol=1e-6)


def test_csv_keeps_its_texts(command: Predict, models: Path, tmp_path: Path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('\ufeffs,k\nabc,007\n"b,c",1.50\n,\n"q""x",x\n')
    done = command(
        "predict", models / "strings", source, out, "--input=s=s", "--output=upper=u", "--output=length=n"
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == 's,k,u,n\nabc,007,ABC,3\n"b,c",1.50,"B,C",3\n,,,0\n"q""x",x,"Q""X",3\n'


def test_a_pipe(command: Predict, models: Path):
    sink = io.BytesIO()
    table = pa.table({"i": [[1, 2, 3], [4, 5, 6], None]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    done = command("predict", models / "ints", "-", "-", input=sink.getvalue(), text=False)
    assert done.returncode == 0, done.stderr
    assert pa.ipc.open_stream(done.stdout).read_all()["total"].to_pylist() == [6, 15, None]


@pytest.mark.parametrize("end", [".parquet", ".arrow", ".arrows"])
def test_no_rows(command: Predict, models: Path, tmp_path: Path, end: str):
    table = pa.table({"i": pa.array([], pa.list_(pa.int64()))})
    done = command("predict", models / "ints", written(table, tmp_path / f"in{end}"), tmp_path / f"out{end}")
    assert done.returncode == 0, done.stderr
    got = read(tmp_path / f"out{end}")
    assert (got.num_rows, got.column_names) == (0, ["i", "doubled", "total"])


@pytest.mark.parametrize("policy", ["fail", "null", "column"])
def test_bad_rows(command: Predict, models: Path, tmp_path: Path, policy: str):
    cells = [[k, k, k] if k != 150 else [1] for k in range(200)]
    table = pa.table({"i": pa.array(cells, pa.list_(pa.int64()))})
    source, out = written(table, tmp_path / "in.arrow"), tmp_path / "out.parquet"
    done = command("predict", models / "ints", source, out, f"--on-error={policy}", "--output=total=t")
    if policy == "fail":
        assert done.returncode == 1
        assert "record batch 2, which begins with row 140: " in done.stderr and "row 10 " in done.stderr
        assert list(tmp_path.iterdir()) == [source]
        return
    assert done.returncode == 0, done.stderr
    got = read(out)
    assert got["t"].to_pylist() == [3 * k if k != 150 else None for k in range(200)]
    assert got.column_names == ["i", "t", *(["error"] if policy == "column" else [])]
    if policy == "column":
        errors = got["error"].to_pylist()
        assert errors.pop(150) and not any(errors)


@pytest.mark.parametrize(
    ("model", "source", "out", "options", "code", "words"),
    [
        (
            "strings",
            "in.csv",
            "out.csv",
            ["--input=s=tex"],
            1,
            'no column "tex" for input "s", did you mean ["text"]',
        ),
        ("strings", "in.csv", "out.csv", ["--input=z=text"], 1, 'no input "z"'),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--output=uper=u"], 1, 'did you mean ["upper"]'),
        (
            "strings",
            "in.csv",
            "out.csv",
            ["--input=s=text", "--output=upper=text"],
            1,
            'would be called "text"',
        ),
        ("strings", "in.csv", "out.csv", [], 1, "--input s=COLUMN"),
        ("mlp", "in.csv", "out.csv", ["--input=x=text"], 1, "a cell of a CSV file holds one value"),
        ("strings", "in.parquet", "out.csv", ["--input=s=text"], 1, 'CSV has no place for column "list"'),
        ("none", "in.csv", "out.csv", [], 1, "there is no folder"),
        ("strings", "no.csv", "out.csv", [], 1, "no.csv: no such file"),
        ("strings", "in.txt", "out.csv", [], 2, "the format of a file"),
        ("strings", "in.csv", "no/out.csv", ["--input=s=text"], 1, "no such file or directory"),
        ("strings", "bad.parquet", "out.csv", [], 1, "it is no Parquet file"),
        ("strings", "bad.arrow", "out.csv", [], 1, "neither an Arrow file nor an Arrow stream"),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--device=tpu"], 1, 'device is "tpu"'),
        ("strings", "in.csv", "out.csv", ["--input=text"], 2, "TENSOR=COLUMN"),
    ],
)
def test_mistakes_are_sentences(
    command: Predict,
    models: Path,
    tmp_path: Path,
    model: str,
    source: str,
    out: str,
    options: list[str],
    code: int,
    words: str,
):
    table = pa.table({"text": ["a"], "other": ["b"]})
    written(table, tmp_path / "in.csv")
    written(table.append_column("list", pa.array([[1]])), tmp_path / "in.parquet")
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"no such thing" * 10)
    before = sorted(tmp_path.iterdir())
    done = command("predict", models / model, tmp_path / source, tmp_path / out, *options)
    assert done.returncode == code
    assert words in done.stderr and "panic" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "in.parquet"
    schema = pa.schema({"id": pa.int64(), "x": pa.list_(pa.float32())})
    with pa.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for k in range(GROUPS):
            values = pa.array(vectors(ROWS, 512, k).reshape(-1))
            x = pa.ListArray.from_arrays(np.arange(0, (ROWS + 1) * 512, 512, dtype=np.int32), values)
            writer.write_table(pa.table({"id": range(k * ROWS, (k + 1) * ROWS), "x": x}, schema), ROWS)
    return path


@pytest.mark.parametrize("end", [".parquet", ".arrows"])
def test_memory_is_flat(command: Predict, models: Path, large: Path, tmp_path: Path, end: str):
    out = tmp_path / f"out{end}"
    process = subprocess.Popen([os.environ["FLIGHTSVC_BINARY"], "predict", models / "mlp", large, out])
    most = 0
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            most = max([most, *(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))])
        time.sleep(0.01)
    assert process.returncode == 0
    print(f"{end}: {most // MIB} MiB", file=sys.stderr)
    assert 0 < most < MEMORY[end]
    assert read(out)["id"].to_pylist() == list(range(GROUPS * ROWS))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_file(
    models: Path, client: flightsvc.Client, large: Path, tmp_path: Path, how: int
):
    client.status()
    out = tmp_path / "out.arrows"
    process = subprocess.Popen(
        [os.environ["FLIGHTSVC_BINARY"], "predict", models / "mlp", large, out],
        stderr=subprocess.PIPE,
        text=True,
    )
    part = None
    while process.poll() is None and (part is None or part.stat().st_size < MIB):
        part = next(iter(tmp_path.iterdir()), None)
    process.send_signal(how)
    _, said = process.communicate(timeout=20)
    assert not out.exists()
    if how == signal.SIGTERM:
        assert (process.returncode, said) == (1, "flightsvc: interrupted; nothing was written\n")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("begun", [False, True])
def test_a_silent_pipe_does_not_hold_an_interrupted_run(
    models: Path, client: flightsvc.Client, tmp_path: Path, begun: bool
):
    client.load(models / "ints")
    process = subprocess.Popen(
        [os.environ["FLIGHTSVC_BINARY"], "predict", models / "ints", "-", tmp_path / "out.arrows"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stderr
    if begun:
        table = pa.table({"i": [[1, 2, 3]]})
        stream = pa.ipc.new_stream(process.stdin, table.schema)
        stream.write_table(table)
        process.stdin.flush()
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
    else:
        folder = Path(f"/proc/{process.pid}/fd")
        while [os.readlink(fd) for fd in folder.iterdir()].count(os.readlink(folder / "0")) < 2:
            assert process.poll() is None  # it opens the pipe once more, to be able to stop
            time.sleep(0.01)
    process.terminate()
    assert process.wait(10) == 1
    assert process.stderr.read() == b"flightsvc: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())
    process.stdin.close()
    process.stderr.close()


def test_tables(command: Predict, models: Path, client: flightsvc.Client):
    mlp = (models / "mlp").as_uri()
    assert command("load", models / "mlp").stdout == f"{mlp} version 1: ready\n"
    listed = command("models").stdout.splitlines()
    assert listed[0].split() == ["MODEL", "VERSION", "STATE", "MEMORY", "DEVICE", "REASON"]
    [row] = [line.split() for line in listed if line.startswith(mlp)]
    assert (row[1:3], row[-2]) == (["1", "ready"], "cpu")
    [entry] = [m for m in json.loads(command("models", "--json").stdout) if m["name"] == mlp]
    assert (entry["version"], entry["state"], entry["device"]) == ("1", "ready", "")
    assert mlp in command("status").stdout
    assert json.loads(command("status", "--json").stdout)["pid"] == client.status()["pid"]
    assert json.loads(command("devices", "--json").stdout) == client.devices()
    assert command("unload", models / "mlp").stdout == f"{mlp} version 1: unloaded\n"
    assert not [m for m in client.status()["models"] if m["model"] == mlp]
    assert command("load", models / "none").returncode == 1
    assert command("load").returncode == 2


def test_a_front_is_started_where_one_is_needed(surroundings: Path, models: Path):
    environment = os.environ | {"FLIGHTSVC_RUN_DIR": f"{surroundings}/other"}
    binary = os.environ["FLIGHTSVC_BINARY"]

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binary, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    none = run("status")
    assert none.returncode == 1 and "no flightsvc of yours runs" in none.stderr
    waiting = [
        subprocess.Popen([binary, "models"], env=environment, stdout=subprocess.DEVNULL) for _ in range(5)
    ]
    assert [process.wait(60) for process in waiting] == [0] * 5
    front = json.loads(run("status", "--json").stdout)["pid"]
    try:
        assert len(list(Path(surroundings, "other").iterdir())) == 1
    finally:
        process = psutil.Process(front)
        process.terminate()
        psutil.wait_procs([process], timeout=20)
    assert "no flightsvc of yours runs" in run("unload", models / "mlp").stderr


@dataclasses.dataclass
class Given:
    """What Spark's TaskContext says of a task's resources."""

    addresses: list[str]

    def resources(self) -> dict[str, Given]:
        return {"gpu": self} if self.addresses else {}


@pytest.mark.parametrize(
    ("addresses", "device", "sent"),
    [
        (["1"], "auto", "1"),
        (["0", "3"], "auto", "0,3"),
        (["1"], "cpu", "cpu"),
        ([], "auto", None),
        ([], "gpu", "gpu"),
    ],
)
def test_a_task_has_the_gpus_that_spark_gave_it(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], device: str, sent: str | None
):
    request: Request = Model("lite0").request(device=device)
    assert dataframe.on_task_device(request) is request  # outside of a task
    monkeypatch.setattr(dataframe, "task", lambda: Given(addresses))
    assert dataframe.on_task_device(request).descriptor().get("device") == sent


def test_a_device_is_written_in_its_form():
    for device in ("auto", "cpu", "gpu", "0", "0,1", "GPU-1c2d3e4f-0a1b", "MIG-GPU-1c2d/1/0"):
        assert Model("lite0").request(device=device).device == device
    for device in ("", "tpu", "0,", "gpu,0", "GPU", 0):
        with pytest.raises(flightsvc.InvalidArgumentError, match="device is"):
            Model("lite0").request(device=device)
