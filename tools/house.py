"""Checks the house rules that gofmt, go vet, ruff and mypy do not know; ``make lint`` calls it.

It reads all tracked files and prints ``file:line: what is wrong; what to write`` for each finding. The rules
are in RULES, the words that must not come back in words.tsv beside this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = "tools/words.tsv"

COLUMNS = 120
TAB = 4
LONG_FILE = 100  # lines from which a file opens with a sentence
FILE_LINES = 550
PACKAGE_LINES = 3300
LARGE_FILES = ("internal/batch/scheduler.go",)
"""Files that may have more than FILE_LINES."""

TEST = re.compile(r"_test\.go$|(^|/)(tests|testdata|fakenvml|fuzztest|expect|benchmarks|examples|tools)/")
CODE = re.compile(r"\.(go|py|java)$")

Finding = tuple[str, int, str]
Files = dict[str, str]


def columns(files: Files) -> Iterator[Finding]:
    """Find lines of Go that are too long; the tag of a struct's field cannot be wrapped."""
    for path, text in files.items():
        for number, line in enumerate(text.splitlines() if path.endswith(".go") else (), 1):
            if (width := len(line.expandtabs(TAB))) > COLUMNS and not line.endswith('"`'):
                yield path, number, f"{width} columns; wrap the line at {COLUMNS} (a tab has {TAB})"


def opens(files: Files) -> Iterator[Finding]:
    """Find long files that do not say first what they are for, and Go packages without a comment."""
    packages = defaultdict(list)
    for path, text in files.items():
        if not CODE.search(path):
            continue
        if path.endswith(".go"):
            packages[Path(path).parent.as_posix()].append(text)
        if len(text.splitlines()) > LONG_FILE and not re.search(r"\w[.:]\W", opening(path, text)):
            yield (
                path,
                1,
                f"more than {LONG_FILE} lines; begin with a sentence that says what it is for",
            )
    for folder, texts in packages.items():
        if not any(re.search(r"^(//.*|\*/)\npackage ", text, re.MULTILINE) for text in texts):
            yield folder, 1, "a package without a comment; say in doc.go what it is for and what may enter"


def opening(path: str, text: str) -> str:
    """Return the comments that a file begins with, up to its first declaration."""
    if path.endswith(".py"):
        found = re.match(r'(#.*\n)*\s*r?"""(.*?)"""', text, re.DOTALL)
        return f"{found[2]} " if found else ""
    if path.endswith(".go"):
        head = re.split(r"^(?:import|const|var|type|func)\b", text, maxsplit=1, flags=re.MULTILINE)[0]
        return "\n".join(re.findall(r"^//(?!go:| *\+build)(.*)$", head, re.MULTILINE)) + "\n"
    head = re.split(r"^[\w ]*\b(?:class|interface|enum|record)\b", text, maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(re.findall(r"/\*\*(.*?)\*/", head, re.DOTALL)) + " "


def sizes(files: Files) -> Iterator[Finding]:
    """Find product files and Go packages that are too large."""
    packages: dict[str, int] = defaultdict(int)
    for path, text in files.items():
        if not CODE.search(path) or TEST.search(path):
            continue
        lines = len(text.splitlines())
        if path.endswith(".go"):
            packages[Path(path).parent.as_posix()] += lines
        if lines > FILE_LINES and path not in LARGE_FILES:
            yield path, lines, f"{lines} lines; split it by subject below {FILE_LINES}"
    for folder, lines in packages.items():
        if lines > PACKAGE_LINES:
            yield folder, lines, f"a package of {lines} lines without tests; split it below {PACKAGE_LINES}"


def words(files: Files) -> Iterator[Finding]:
    """Find the words of words.tsv: where, a pattern, and what to write."""
    table = [line.split("\t") for line in files[WORDS].splitlines() if line and line[0] != "#"]
    for where, pattern, instead in table:
        for path, text in files.items():
            if not re.search(where, path) or path == WORDS:
                continue
            for number, line in enumerate(text.splitlines(), 1):
                if found := re.search(pattern, line):
                    yield path, number, f'"{found[0].strip()}" is an old word; write {instead}'


RULES: list[Callable[[Files], Iterator[Finding]]] = [columns, opens, sizes, words]


def main() -> int:
    """Print the findings of all rules; 1 if there are any."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = {}
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and b"\0" not in (content := path.read_bytes()):
            files[name] = content.decode(errors="replace")
    found = 0
    for rule in RULES:
        for path, line, text in rule(files):
            print(f"{path}:{line}: {text}")
            found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
