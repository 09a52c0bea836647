"""The command line: its tables, and files through models, as pyarrow and TensorFlow read and run them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.json
import pyarrow.parquet
import pytest
import skimage
from figures import PROVE
from fronts import copied

import flightsvc
from flightsvc import Model, __main__, predict, tables
from flightsvc.request import Request
from flightsvc.spark import dataframe

COMMAND = Path(sys.executable).with_name("flightsvc")
"""The installed script."""
MIB = 1 << 20
GROUPS, ROWS = (4, 50_000) if PROVE else (3, 15_000)
"""Row groups of the large file, and rows of each, of 2 KiB."""
MEMORY = {".parquet": 450 * MIB, ".arrows": 350 * MIB}
"""The most of the command: pyarrow itself, a few record batches, and an open row group of Parquet. At the
full count the large file has 400 MiB, else 90, and this is no proof."""

Run = Callable[..., subprocess.CompletedProcess[Any]]
Predict = Callable[..., tuple[int, str]]


@pytest.fixture
def command(client: flightsvc.Client) -> Run:
    """``command("status", ...)`` runs the installed command against the front of these tests."""
    client.status()  # it runs

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
        options = {"capture_output": True, "text": True, "timeout": 100, "check": False} | options
        return subprocess.run([COMMAND, *map(str, arguments)], **options)

    return run


@pytest.fixture
def run(
    client: flightsvc.Client, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Predict]:
    """``run(model, source, out, ...)`` is ``flightsvc predict`` here: its exit code and standard error."""
    client.status()
    before = signal.getsignal(signal.SIGTERM)
    for name in ("ENDPOINT", "CORES", "LOAD_TIMEOUT"):  # what is set goes with the test
        monkeypatch.setenv(f"FLIGHTSVC_{name}", "")
        monkeypatch.delenv(f"FLIGHTSVC_{name}")

    def run(*arguments: Any) -> tuple[int, str]:
        try:
            code = __main__.main(["predict", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        assert not said.out
        return code, said.err

    yield run
    signal.signal(signal.SIGTERM, before)


def written(table: pa.Table, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=max(1, table.num_rows // 3))
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
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
    if path.suffix == ".jsonl":
        return pa.json.read_json(path)
    opened = pa.ipc.open_stream if path.suffix == ".arrows" else pa.ipc.open_file
    return opened(path).read_all()


def vectors(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("end", [".parquet", ".arrow", ".arrows"])
@pytest.mark.parametrize("begin", [".parquet", ".arrow", ".arrows", ".feather"])
def test_columns_types_and_rows_are_kept(
    run: Predict, models: Path, oracle: Callable[..., Any], tmp_path: Path, begin: str, end: str
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
    source, out = written(table, tmp_path / f"in{begin}"), tmp_path / f"out{end}"
    assert run(models / "mlp", source, out, "--input=x=f", "--output=y=p") == (0, "")
    got = read(out)
    assert got.column_names == [*table.column_names, "p"]
    assert got.drop_columns("p").cast(table.schema).equals(table)
    assert [got.schema.field(name).type for name in table.column_names] == table.schema.types
    answers = got["p"].to_pylist()
    assert answers.pop(17) is None
    np.testing.assert_allclose(answers, np.delete(oracle("mlp", x=x)["y"], 17, 0), rtol=1e-5, atol=1e-6)


def test_csv_keeps_its_texts(run: Predict, models: Path, tmp_path: Path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('\ufeffs,k\nabc,007\n"b,c",1.50\n,\n"q""x","1\n2"\n')
    assert (
        run(models / "strings", source, out, "--input=s=s", "--output=upper=u", "--output=length=n")[0] == 0
    )
    assert out.read_text() == (
        '"s","k","u","n"\n"abc","007","ABC",3\n"b,c","1.50","B,C",3\n"","","",0\n"q""x","1\n2","Q""X",3\n'
    )


def test_cells_of_csv_become_the_inputs_types(
    run: Predict, models: Path, oracle: Callable[..., Any], tmp_path: Path
):
    source, out = tmp_path / "in.csv", tmp_path / "out.parquet"
    source.write_text("f,s\n 2.25 ,1\n,2\n1e3,-0.5\n")
    assert run(models / "strict", source, out, "--input=x=f", "--input=text=s") == (0, "")
    got = read(out)
    assert (got["f"].to_pylist(), got["s"].to_pylist()) == ([" 2.25 ", "", "1e3"], ["1", "2", "-0.5"])
    want = oracle("strict", x=np.float32([2.25, 1e3]), text=["1", "-0.5"])
    for name in ("root", "number"):
        assert got[name].to_pylist() == [want[name][0], None, want[name][1]]


@pytest.mark.parametrize("end", [".jsonl", ".parquet"])
def test_json_lines(
    run: Predict,
    models: Path,
    oracle: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
):
    """Whole numbers feed floats, texts that look like times are left alone, a missing field is null."""
    monkeypatch.setattr(tables, "_JSON_BYTES", 300)  # so that there are many record batches
    rng = np.random.default_rng(3)
    inputs = {
        "a": np.round(rng.normal(size=(40, 4)), 3).astype(np.float32),
        "b": rng.integers(-9, 9, 40).astype(np.int32),
        "c": rng.integers(0, 2, (40, 2)).astype(bool),
        "d": np.array([f"ü{k}" for k in range(40)]),
        "e": rng.normal(size=(40, 2, 2)),
    }
    inputs["a"][:7] = [1, 2, 3, 4]
    rows = [{name: of[k].tolist() for name, of in inputs.items()} for k in range(40)]
    rows = [{**row, "a": [int(v) if v % 1 == 0 else v for v in row["a"]]} for row in rows]
    rows = [{**row, "at": "2020-01-01", "n": k} for k, row in enumerate(rows)]
    source, out = tmp_path / "in.jsonl", tmp_path / f"out{end}"
    absent = rows[3].pop("b")
    source.write_text("\n\n".join(map(json.dumps, rows)))
    rows[3]["b"] = None
    assert run(models / "mixed", source, out) == (0, "")
    got = [json.loads(line) for line in out.open()] if end == ".jsonl" else read(out).to_pylist()
    assert [{name: row[name] for name in rows[0]} for row in got] == rows
    assert absent is not None
    for name, want in oracle("mixed", **inputs).items():
        answers = [row[name] for row in got]
        assert answers.pop(3) is None
        if want.dtype == object:
            want = np.array([[b.decode() for b in row] for row in want])
            answers = [[b if end == ".jsonl" else b.decode() for b in row] for row in answers]
        if want.dtype == np.float32:
            np.testing.assert_allclose(answers, np.delete(want, 3, 0), 1e-5, 1e-6)
        else:
            np.testing.assert_array_equal(answers, np.delete(want, 3, 0))


def test_a_pipe(command: Run, models: Path):
    sink = io.BytesIO()
    table = pa.table({"i": [[1, 2, 3], [4, 5, 6], None]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    done = command("predict", models / "ints", "-", "-", input=sink.getvalue(), text=False)
    assert done.returncode == 0, done.stderr
    assert pa.ipc.open_stream(done.stdout).read_all()["total"].to_pylist() == [6, 15, None]


@pytest.mark.parametrize("end", [".parquet", ".arrow", ".arrows"])
def test_no_rows(run: Predict, models: Path, tmp_path: Path, end: str):
    table = pa.table({"i": pa.array([], pa.list_(pa.int64()))})
    assert run(models / "ints", written(table, tmp_path / f"in{end}"), tmp_path / f"out{end}") == (0, "")
    got = read(tmp_path / f"out{end}")
    assert (got.num_rows, got.column_names) == (0, ["i", "doubled", "total"])


@pytest.mark.parametrize("end", [".parquet", ".csv", ".jsonl", ".arrow", ".arrows"])
def test_folders_and_files(run: Predict, models: Path, tmp_path: Path, end: str):
    """Files by their names, what Spark leaves beside them ignored; then the next argument."""
    folder, more, out = tmp_path / "in", tmp_path / "more", tmp_path / "out.jsonl"
    for name in ("b", "a"):
        written(pa.table({"s": [name, name * 2]}), folder / "sub" / f"part-{name}{end}")
    for name in ("_SUCCESS", ".part-a.crc"):
        (folder / "sub" / name).touch()
    written(pa.table({"s": ["c"]}), more / f"1{end}")
    assert run(models / "strings", folder, more / f"1{end}", out, "--output=upper=u") == (0, "")
    got = [json.loads(line) for line in out.open()]
    assert got == [{"s": s, "u": s.upper()} for s in ("a", "aa", "b", "bb", "c")]


@pytest.mark.parametrize("end", [".parquet", ".csv", ".jsonl", ".arrow", ".arrows"])
def test_folders_that_are_named_after_columns(run: Predict, models: Path, tmp_path: Path, end: str):
    table, out = pa.table({"s": ["x", "y"]}), tmp_path / "out.parquet"
    for name in ("day=1/of=%2Fa", "day=2/of=__HIVE_DEFAULT_PARTITION__"):
        written(table, tmp_path / "in" / name / f"part{end}")
    assert run(models / "strings", tmp_path / "in", out, "--input=s=s", "--output=length=n") == (0, "")
    got = read(out)
    assert got.to_pydict() == {
        "s": ["x", "y"] * 2,
        "day": ["1", "1", "2", "2"],
        "of": ["/a", "/a", None, None],
        "n": [1, 1, 1, 1],
    }


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"s": ["a"]}, {"s": ["b"], "k": [1]}, "'k' is {0} here and missing there"),
        ({"s": ["a"], "k": [1]}, {"s": ["b"]}, "'k' is missing here and {0} there"),
        ({"s": ["a"], "k": [1]}, {"s": ["b"], "k": ["x"]}, "'k' is string here and int64 there"),
    ],
)
@pytest.mark.parametrize("end", [".parquet", ".csv", ".arrow", ".arrows"])
def test_files_with_other_columns(
    run: Predict, models: Path, tmp_path: Path, end: str, first: Any, second: Any, words: str
):
    paths = [
        written(pa.table(of), tmp_path / "in" / f"{name}{end}") for name, of in (("a", first), ("b", second))
    ]
    code, said = run(models / "strings", tmp_path / "in", tmp_path / "out.parquet", "--input=s=s")
    if end == ".csv" and "string" in words:  # all are texts there
        assert code == 0
        return
    words = words.format("text" if end == ".csv" else "int64")
    assert (code, said) == (
        1,
        f"flightsvc: {paths[1]} has other columns than {paths[0]}: {words}; "
        "run files with the same columns together\n",
    )
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("policy", ["fail", "null", "column"])
@pytest.mark.parametrize("end", [".arrow", ".parquet", ".jsonl"])
def test_bad_rows(run: Predict, models: Path, tmp_path: Path, end: str, policy: str):
    cells = [[k, k, k] if k != 150 else [1] for k in range(200)]
    table = pa.table({"i": pa.array(cells, pa.list_(pa.int64()))})
    written(table.slice(0, 5), tmp_path / "in" / f"a{end}")
    source, out = written(table, tmp_path / "in" / f"b{end}"), tmp_path / "out.parquet"
    code, said = run(
        models / "ints", source.parent, out, f"--on-error={policy}", "--output=total=t", "--batch-rows=70"
    )
    if policy == "fail":
        assert code == 1
        assert said.startswith(f"flightsvc: {source}: row 150: ") and "--on-error null" in said
        assert list(tmp_path.iterdir()) == [source.parent]
        return
    assert (code, said) == (0, "")
    got = read(out).slice(5)
    assert got["t"].to_pylist() == [3 * k if k != 150 else None for k in range(200)]
    assert got.column_names == ["i", "t", *(["error"] if policy == "column" else [])]
    if policy == "column":
        errors = got["error"].to_pylist()
        assert errors.pop(150) and not any(errors)


def test_rows_that_the_model_refuses(run: Predict, models: Path, tmp_path: Path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("x,text\n4,1\n-4,2\n9,three\n")
    code, said = run(models / "strict", source, out)
    assert code == 1 and said.startswith(f"flightsvc: {source}: row 1: ") and "x must not be negative" in said
    assert run(models / "strict", source, out, "--on-error=column", "--error-column=why") == (0, "")
    got = read(out).to_pydict()
    assert (got["root"], got["number"]) == ([2, None, None], [1, None, None])
    assert [re.search("negative|ToNumber|$", why)[0] for why in got["why"]] == ["", "negative", "ToNumber"]


def test_pictures_by_their_paths(run: Predict, models: Path, tmp_path: Path):
    """This process reads the files, in parts of a record batch; rows keep their numbers all the same."""
    photo = Path(skimage.__file__).parent / "data" / "coffee.png"
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("path\n" + f"{photo}\n" * 70 + "/none.png\n")
    sizes = ("--output=height=h", "--output=width=w")
    code, said = run("image", source, out, *sizes)
    assert code == 1 and said.startswith(f"flightsvc: {source}: row 70: /none.png: there is no such file")
    assert run("image", source, out, *sizes, "--on-error=null") == (0, "")
    assert list(zip(*read(out).to_pydict().values(), strict=True)) == [(str(photo), 400, 600)] * 70 + [
        ("/none.png", None, None)
    ]


def test_what_concerns_a_record_batch(run: Predict, models: Path, tmp_path: Path):
    table = pa.table({"x": pa.array([[1.0]] * 5 + [[1.0, 2.0]] * 3, pa.list_(pa.float32()))})
    source = written(table, tmp_path / "in.parquet")
    code, said = run(models / "sums", source, tmp_path / "out.parquet", "--batch-rows=2", "--on-error=null")
    assert code == 1 and said.startswith(f"flightsvc: {source}: rows 4 to 5: ") and "pad" in said
    assert list(tmp_path.iterdir()) == [source]


LINES, LONG = 40_000, "1,222222222222222222222222222222\n"
OBJECT = '{"x":1,"text":"222222222222222222222222222222"}\n'
"""So many lines of a file are several blocks for pyarrow, which reads one at a time."""


@pytest.mark.parametrize(
    ("name", "text", "row", "said"),
    [
        ("in.csv", "x,text\n1,2\nno,3\n", 1, "column 'x' holds no float; correct the cell"),
        ("in.csv", "x,text\n1,2\n1,2,3\n", 1, "Expected 2 columns, got 3"),
        ("in.csv", "x,text\n" + LONG * LINES + "1\n", LINES, "Expected 2"),
        (
            "in.csv",
            "x,text\n" + LONG * LINES + "x,1\n",
            LINES,
            "holds no float",
        ),
        ("in.jsonl", '{"x":1,"text":"2"}\n{"x":"1","text":"2"}\n', 1, "changed from number to string"),
        ("in.jsonl", '{"x":1,"text":"2"}\n\n{"x":1,"text":\n', 1, "Invalid value"),
        ("in.jsonl", OBJECT * 3 * LINES + '{"x":[1],"text":"1"}\n', 3 * LINES, "Column(/x)"),
        ("in.jsonl", OBJECT * 3 * LINES + '{"x":1,"text":"1","y":2}\n', 3 * LINES, "unexpected field"),
    ],
)
def test_a_bad_cell(run: Predict, models: Path, tmp_path: Path, name: str, text: str, row: int, said: str):
    source = tmp_path / name
    source.write_text(text)
    code, told = run(models / "strict", source, tmp_path / "out.parquet", "--on-error=null")
    assert code == 1 and told.startswith(f"flightsvc: {source}: row {row}: ") and said in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("model", "source", "out", "options", "code", "words"),
    [
        (
            "strings",
            "in.csv",
            "out.csv",
            ["--input=s=tex"],
            1,
            "no column 'tex' for input 's'; columns: t",
        ),
        ("strings", "in.csv", "out.csv", ["--input=z=text"], 1, "input 's' has no column; add --input s="),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--input=z=text"], 1, "there is no input 'z'"),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--input=s=other"], 2, "names 's' twice"),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--output=uper=u"], 1, 'no output "uper"'),
        (
            "strings",
            "in.csv",
            "out.csv",
            ["--input=s=text", "--output=upper=text"],
            1,
            "have the name of a column of",
        ),
        ("strings", "in.csv", "out.csv", [], 1, "add --input s=COLUMN"),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--signature=x"], 1, "has no signature 'x'"),
        ("mlp", "in.csv", "out.csv", ["--input=x=text"], 1, "a cell of a CSV file holds one value"),
        ("strings", "in.parquet", "out.csv", ["--input=s=text"], 1, "CSV has no place for column 'list'"),
        ("strings", "in.arrow", "out.jsonl", ["--input=s=text"], 1, "JSON has no place for column 'bytes'"),
        (
            "strings",
            "span.arrow",
            "out.parquet",
            ["--input=s=text"],
            1,
            "out.parquet: Unhandled type for Arrow",
        ),
        ("none", "in.csv", "out.csv", [], 1, "there is no folder"),
        ("strings", "no.csv", "out.csv", [], 1, "no.csv: no such file"),
        ("strings", "empty", "out.csv", [], 1, "empty: this folder holds no files"),
        (
            "strings",
            "empty.jsonl",
            "out.csv",
            [],
            1,
            "empty.jsonl: the file is empty, so its columns are not",
        ),
        ("strings", "in.txt", "out.csv", [], 2, "the format of a file"),
        ("strings", "in.csv", "out.txt", [], 2, "the format of a file"),
        ("strings", "texts", "out.csv", [], 1, "the format of a file"),
        ("strings", "both", "out.csv", [], 1, "run files of one format at a time"),
        ("strings", "twice.csv", "out.csv", [], 1, "multiple columns named a"),
        ("strings", "in.csv", "no/out.csv", ["--input=s=text"], 1, "out.csv: No such file or directory"),
        ("strings", "in.csv", "folder.csv", ["--input=s=text"], 1, "folder.csv is a folder; name a file"),
        ("strings", "bad.parquet", "out.csv", [], 1, "bad.parquet: Parquet magic bytes not found"),
        ("strings", "bad.arrow", "out.csv", [], 1, "bad.arrow: "),
        ("strings", "in.csv", "out.csv", ["--input=s=text", "--device=tpu"], 1, "device is 'tpu'"),
        ("strings", "in.csv", "out.csv", ["--input=text"], 2, "'text' is not TENSOR=COLUMN"),
        ("strings", "in.csv", "out.csv", ["--on-error=skip"], 2, "invalid choice: 'skip'"),
        ("strings", "in.csv", "out.csv", ["--batch-rows=0"], 2, "--batch-rows is 0"),
        ("strings", "in.csv", "out.csv", ["--inputs=s=text"], 2, "unrecognized arguments: --inputs"),
        ("strings", "in.csv", "-", ["-"], 2, "- is read alone"),
        (
            "strings",
            "in.csv",
            "out.csv",
            ["--config=bad.json"],
            1,
            "has an unknown setting 'modelroot'",
        ),
    ],
)
def test_mistakes_are_sentences(
    run: Predict,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    source: str,
    out: str,
    options: list[str],
    code: int,
    words: str,
):
    table = pa.table({"text": ["a"], "other": ["b"]})
    monkeypatch.chdir(tmp_path)
    written(table, tmp_path / "in.csv")
    written(table.append_column("list", pa.array([[1]])), tmp_path / "in.parquet")
    written(table.append_column("bytes", pa.array([[b"1"]])), tmp_path / "in.arrow")
    written(table.append_column("span", pa.array([pa.MonthDayNano([1, 2, 3])])), tmp_path / "span.arrow")
    written(table, tmp_path / "both" / "a.csv")
    written(table, tmp_path / "both" / "b.parquet")
    written(table, tmp_path / "texts" / "a.csv").with_name("readme.txt").touch()
    for name in ("empty", "folder.csv"):
        (tmp_path / name).mkdir()
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"no such thing" * 10)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "bad.json").write_text('{"modelroot": "/models"}')
    before = sorted(tmp_path.rglob("*"))
    got, said = run(models / model, source, out, *options)
    assert got == code, said
    assert words in said and said.startswith("flightsvc: ") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("end", [".csv", ".jsonl"])
def test_a_file_of_a_folder_is_empty(run: Predict, models: Path, tmp_path: Path, end: str):
    """So Spark writes a partition without rows."""
    written(pa.table({"s": ["a"]}), tmp_path / "in" / f"part-1{end}")
    (tmp_path / "in" / f"part-0{end}").touch()
    out = tmp_path / "out.jsonl"
    assert run(models / "strings", tmp_path / "in", out) == (0, "")
    assert [json.loads(line)["upper"] for line in out.read_text().splitlines()] == ["A"]


def test_settings_of_a_file_are_under_the_environment(
    run: Predict, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Flags go over the environment, and that over the file; both orders of the words are one."""
    source = written(pa.table({"s": ["a"]}), tmp_path / "in.csv")
    config, out = tmp_path / "config.json", tmp_path / "out.csv"
    config.write_text('{"load_timeout": "no duration", "cores": 2}')
    code, said = run(models / "strings", source, out, f"--config={config}")
    assert code == 1 and "FLIGHTSVC_LOAD_TIMEOUT" in said and os.environ["FLIGHTSVC_CORES"] == "2"
    monkeypatch.setenv("FLIGHTSVC_LOAD_TIMEOUT", "5m")
    assert run(models / "strings", source, out, f"--config={config}") == (0, "")
    code, said = run(models / "strings", source, out, "--endpoint", "nowhere")
    assert code == 1 and "endpoint 'nowhere' is neither a URI nor an absolute path" in said


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
def test_memory_is_flat(client: flightsvc.Client, models: Path, large: Path, tmp_path: Path, end: str):
    client.status()
    out = tmp_path / f"out{end}"
    process = subprocess.Popen([COMMAND, "predict", models / "mlp", large, out])
    most = 0
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            most = max([most, *(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))])
        time.sleep(0.01)
    assert process.returncode == 0
    print(f"{end}: {most // MIB} MiB", file=sys.stderr)
    assert 0 < most < MEMORY[end]
    assert read(out)["id"].to_pylist() == list(range(GROUPS * ROWS))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_file(
    models: Path, client: flightsvc.Client, large: Path, tmp_path: Path, how: int
):
    client.status()
    out = tmp_path / "out.arrows"
    out.write_bytes(b"an older file")
    process = subprocess.Popen(
        [COMMAND, "predict", models / "mlp", "-", out], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stderr
    table = pa.parquet.ParquetFile(large).read_row_group(0)
    stream = pa.ipc.new_stream(process.stdin, table.schema)

    def feed() -> None:
        with contextlib.suppress(OSError, pa.ArrowException):  # its reader has ended
            while True:
                stream.write_table(table)

    feeding = threading.Thread(target=feed)
    feeding.start()
    part = None
    while part is None or part.stat().st_size < MIB:
        assert process.poll() is None
        part = next(iter(tmp_path.glob(".out.*")), None)
    process.send_signal(how)
    said = process.stderr.read().decode()
    process.wait(20)
    feeding.join(20)
    assert out.read_bytes() == b"an older file"
    if how != signal.SIGKILL:
        assert (process.returncode, said) == (1, "flightsvc: interrupted; nothing was written\n")
        assert list(tmp_path.iterdir()) == [out]


def test_a_run_that_waits_for_the_model_is_interrupted(
    models: Path, client: flightsvc.Client, tmp_path: Path
):
    model = copied(models / "slow", tmp_path / "model")  # nobody else has a stream of it
    client.load(model)
    source = written(pa.table({"x": pa.array([[1e9]], pa.list_(pa.float32()))}), tmp_path / "in.parquet")
    process = subprocess.Popen(
        [COMMAND, "predict", model, source, tmp_path / "out.parquet"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not [m for m in client.status()["models"] if m["dir"] == str(model) and m["streams"]]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert (process.returncode, said) == (1, "flightsvc: interrupted; nothing was written\n")
    assert set(tmp_path.iterdir()) == {model, source}


@pytest.mark.parametrize("begun", [False, True])
def test_a_silent_pipe_does_not_hold_an_interrupted_run(
    models: Path, client: flightsvc.Client, tmp_path: Path, begun: bool
):
    client.load(models / "ints")
    process = subprocess.Popen(
        [COMMAND, "predict", models / "ints", "-", tmp_path / "out.arrows"],
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
        caught = re.compile(r"^SigCgt:\t(\w+)$", re.MULTILINE)
        status = Path(f"/proc/{process.pid}/status")
        while not int(caught.search(status.read_text())[1], 16) >> signal.SIGTERM - 1 & 1:
            assert process.poll() is None
            time.sleep(0.01)
    process.terminate()
    assert process.wait(10) == 1
    assert process.stderr.read() == b"flightsvc: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())
    process.stdin.close()
    process.stderr.close()


def on_a_terminal(*command: Any) -> str:
    """Run a command whose standard error is a terminal, and return what was written there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the other side has closed it
        while some := os.read(ours, 4096):
            said += some
    os.close(ours)
    assert process.wait(60) == 0
    return said.decode()


def test_progress_on_a_terminal(models: Path, client: flightsvc.Client, large: Path, tmp_path: Path):
    client.load(models / "mlp")
    out, rows = tmp_path / "out.arrows", GROUPS * ROWS
    said = on_a_terminal(COMMAND, "predict", models / "mlp", large, out)
    *bars, last = said.split("\r\x1b[K")
    bar = re.compile(rf"\r\[#* *\] +\d+%  [\d,]+ of {rows:,} rows, [\d,]+ rows/s, [\d,]+ s left\x1b\[K")
    assert bar.match(bars[0])
    assert re.fullmatch(rf"{rows:,} rows in \d+\.\d s, [\d,]+ rows/s: {out}\r\n", last)


def test_progress_where_there_is_no_terminal(
    run: Predict, models: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(predict, "_LINE_SECONDS", 0.05)
    out, rows = tmp_path / "out.arrows", GROUPS * ROWS
    code, said = run(models / "mlp", large, out)
    assert code == 0
    *lines, last = said.splitlines()
    line = re.compile(rf"flightsvc: [\d,]+ of {rows:,} rows, [\d,]+ rows/s, [\d,]+ s left")
    assert lines and all(line.fullmatch(text) for text in lines)
    assert re.fullmatch(rf"{rows:,} rows in \d+\.\d s, [\d,]+ rows/s: {out}", last)


def test_one_list_of_verbs(command: Run, run: Predict, capfd: pytest.CaptureFixture[str]):
    """The program lists the verbs in Python with the words of their own help, and says where they are."""
    listed = command("--help").stdout
    assert command().stdout == listed == command("-h").stdout
    for verb in ("serve", "models", "load", "unload", "status", "devices", "tune"):
        assert re.search(rf"^  {verb} ", listed, re.MULTILINE)
    for verb in __main__.VERBS:
        own = command(verb, "--help")
        assert own.returncode == 0 and own.stdout.startswith(f"Usage: flightsvc {verb} ")
        about = own.stdout.split("\n\n")[1]
        assert re.search(rf"^  {verb} .*\n    {re.escape(about)}$", listed, re.MULTILINE)
        program = subprocess.run(
            [os.environ["FLIGHTSVC_BINARY"], verb, "a", "--b=c"], capture_output=True, text=True, check=False
        )
        assert program.returncode == 1 and program.stderr.count("\n") == 1
        assert program.stderr.endswith(f"then run flightsvc {verb}\n")


@pytest.mark.parametrize("words", [["--version"], ["conf"], ["nonsense"]])
def test_the_module_is_the_command(command: Run, words: list[str]):
    module = subprocess.run(
        [sys.executable, "-m", "flightsvc", *words], capture_output=True, text=True, check=False
    )
    script = command(*words)
    assert (module.returncode, module.stdout, module.stderr) == (
        script.returncode,
        script.stdout,
        script.stderr,
    )


def test_verbs_of_the_program_import_nothing(command: Run, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "execv = os.execv\n"
        "def told(*args):\n"
        "    print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr, flush=True)\n"
        "    execv(*args)\n"
        "os.execv = told\n"
    )
    done = command("status", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0
    assert "sys" in done.stderr.split() and not {"flightsvc", "pyarrow", "argparse"} & set(
        done.stderr.split()
    )


def test_a_package_without_its_programs(tmp_path: Path):
    (tmp_path / "__main__.py").write_bytes(Path(__main__.__file__).read_bytes())
    done = subprocess.run(
        [sys.executable, tmp_path / "__main__.py", "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith(
        f"flightsvc: the program {tmp_path}/_bin/flightsvc is missing: this package was installed without"
    )


def test_tables(command: Run, models: Path, client: flightsvc.Client):
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
