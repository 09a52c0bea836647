"""The notebook in examples/, run as a reader runs it; it reaches what it promises and keeps its outputs.

python test_notebook.py        runs it and writes its outputs into the file
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from figures import report

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "deep_learning_pipelines.ipynb"
ACCURACY = 0.985
"""Of 5 folds; raw pixels reach 0.96."""


def run(folder: Path) -> dict[str, Any]:
    """Return the notebook with the outputs that it has when it is run in ``folder``.

    Left out are standard error and pictures as JPEG, which Pillow gives besides PNG.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # when it was run
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    notebook.metadata.get("language_info", {}).clear()
    notebook.metadata.language_info = {"name": "python"}
    result: dict[str, Any] = json.loads(nbformat.writes(notebook))
    return result


def shown(notebook: dict[str, Any]) -> list[list[str]]:
    """Return the kinds of outputs of each cell."""
    return [
        sorted({output.get("name", "picture") for output in cell.get("outputs", [])})
        for cell in notebook["cells"]
    ]


def said(notebook: dict[str, Any]) -> str:
    """Return all that was printed."""
    return "".join(
        text
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for text in output.get("text", [])
    )


def check(notebook: dict[str, Any]) -> float:
    """Assert that the notebook says what it promises, and return the accuracy that it reached."""
    assert ["picture"] in shown(notebook)
    text = said(notebook)
    accuracy = float(re.search(r"5-fold accuracy ([0-9.]+)", text)[1])
    assert accuracy >= ACCURACY
    assert re.search(r"chelsea.png +Egyptian_cat 0\.\d\d, tiger_cat", text)
    assert re.search(r"coffee.png +espresso 0\.\d\d", text)
    same, of = map(int, re.search(r"(\d+) of (\d+) predictions are the same", text).groups())
    assert same == of > 20
    assert float(re.search(r"difference to Keras on the driver: (\S+)", text)[1]) < 1e-5
    assert "missing.jpg: the loader raised FileNotFoundError" in text
    assert re.search(r"\n\| *lite0\|\n", text)
    return accuracy


def test_the_kept_outputs():
    check(json.loads(NOTEBOOK.read_text()))


@pytest.mark.prove  # minutes
@pytest.mark.java
def test_the_notebook_is_as_it_was_kept(tmp_path: Path):
    now = run(tmp_path)
    assert shown(now) == shown(json.loads(NOTEBOOK.read_text()))
    report(transfer_learning_5_fold_accuracy=check(now))


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    NOTEBOOK.write_text(json.dumps(run(here), indent=1, ensure_ascii=False, sort_keys=True) + "\n")
