"""Which module of the package may import which: no circles, packages look downwards, walls hold.

Imports inside of functions count as others do; those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import flightsvc
from flightsvc.spark.calls import Worker

SOURCE = Path(flightsvc.__file__).parent

# From the bottom: a module imports from rooms above its own line in this table, and from its own room.
ROOMS = (
    ("commandline", "errors", "_version"),
    ("plugin", "tables"),
    ("mapping", "settings"),
    ("server",),
    ("request",),
    ("spark",),
    ("export",),
    ("model",),
    ("client", "image", "predict"),
    ("status",),
    ("",),  # the package's own words
    ("__main__",),
    ("ml",),
    ("sparkdl",),
)


def imports() -> dict[str, set[str]]:
    """Return what each module of the package imports, by full names; names of a package's own are its."""
    modules = {}
    for path in SOURCE.rglob("*.py"):
        parts = ["flightsvc", *path.relative_to(SOURCE).with_suffix("").parts]
        modules[".".join(parts).removesuffix(".__init__")] = path
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{name}: imports are written in full"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in modules else node.module)
    return found


IMPORTS = imports()
OURS = {name: {other for other in found if other in IMPORTS} for name, found in IMPORTS.items()}


def room(module: str) -> int:
    """Return the line of a module's room in the table."""
    first = f"{module}.".split(".")[1]
    lines = [line for line, names in enumerate(ROOMS) if first in names]
    assert len(lines) == 1, f"{module} has no line in ROOMS; add its first name where it belongs"
    return lines[0]


def importers(*packages: str) -> set[str]:
    return {
        name for name, found in IMPORTS.items() if any(other.split(".")[0] in packages for other in found)
    }


def test_no_circle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in OURS[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in OURS:
        visit(module, ())


def test_rooms_look_downwards():
    upwards = [
        f"{module} imports {other}"
        for module, found in OURS.items()
        for other in found
        if room(other) > room(module)
    ]
    assert not upwards


def test_tensorflow_and_keras_are_imported_in_export_alone():
    export = {name for name in IMPORTS if name.startswith("flightsvc.export")}
    assert "flightsvc.export" in importers("tensorflow", "keras") <= export


def test_pandas_and_pillow_have_one_door_each():
    assert importers("pandas") == {"flightsvc.spark.arrays"}
    assert importers("PIL") == {"flightsvc.sparkdl.image.imageIO"}


def test_what_speaks_to_a_front_knows_no_spark():
    """But for shipping, which Spark does for us."""
    low = {name for name in IMPORTS if room(name) <= room("flightsvc.request")}
    assert low & importers("pyspark") == {"flightsvc.server.shipping"}


WORKER = """
import pickle, sys
hidden = dict.fromkeys(("numpy", "pandas", "tensorflow", "keras"))
sys.modules.update(hidden)  # to import one of them raises ModuleNotFoundError
import pyarrow as pa
batch = pa.record_batch([pa.array([[1, 2, 3]], pa.list_(pa.int64()))], ["i"])
mapper, function = pickle.load(sys.stdin.buffer)
answers = [row for answer in mapper(iter([batch])) for row in answer.to_pylist()]
print(answers, function(batch.column(0)).to_pylist())
print("pyspark" in sys.modules)
"""


def test_workers_need_pyarrow_alone(endpoint: str, models: Path):
    model = flightsvc.Model((models / "ints").as_uri())
    mapper = model.mapper(inputs={"i": "i"}, outputs={"total": "t"})
    function = Worker("total", "key", model.request({"i": "i"}, {"total": "t"}), ("i",), {"i": 0}, False, {})
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=pickle.dumps((mapper, function)),
        capture_output=True,
        env={**os.environ, "FLIGHTSVC_ENDPOINT": endpoint},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == ["[{'i': [1, 2, 3], 't': 6}] [6]", "False"]
