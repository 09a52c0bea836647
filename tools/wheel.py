"""Makes the wheel and checks that no program in it needs a newer glibc than its tag says.

    python tools/wheel.py DIST TENSORFLOW

DIST is the folder for the wheel. TENSORFLOW is the folder of the libraries that the runner is linked with;
they come from another wheel, which must run on the same systems.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyspark-shim"
PROGRAMS = ("flightsvc", "flightsvc-runner")

ELSEWHERE = re.compile(r"nvml|TF_|__gmon_start__$")
"""Symbols of libraries outside the wheel: NVIDIA's, which is loaded if there is one, and TensorFlow's."""


def main(dist: Path, tensorflow: Path) -> None:
    """Make the wheel and check it; exits with one sentence if it must not be published."""
    shutil.rmtree(PACKAGE / "build", ignore_errors=True)  # setuptools would package what is left there
    with tempfile.TemporaryDirectory() as folder:
        command = ["build/uv/bin/uv", "build", "--quiet", "--wheel", "--no-build-isolation"]
        subprocess.run(
            [*command, "--python", sys.executable, "--out-dir", folder, str(PACKAGE)], cwd=ROOT, check=True
        )
        (made,) = Path(folder).glob("*.whl")
        allowed = tagged(made)
        with zipfile.ZipFile(made) as wheel:
            for program in PROGRAMS:
                check(Path(wheel.extract(f"flightsvc/_bin/{program}", folder)), allowed)
        for library in sorted(tensorflow.glob("libtensorflow*.so.2")):
            check(library, allowed)
        dist.mkdir(exist_ok=True)
        shutil.copyfile(made, dist / made.name)
    shutil.rmtree(PACKAGE / "build")
    print(f"{dist / made.name}: {(dist / made.name).stat().st_size / 1e6:.0f} MB")


def tagged(wheel: Path) -> tuple[int, int]:
    """Return the version of glibc in a wheel's tag."""
    found = re.search(r"manylinux_(\d+)_(\d+)_x86_64\.whl$", wheel.name)
    if found is None:
        sys.exit(f"wheel: {wheel.name} has no tag manylinux_2_NN_x86_64")
    return int(found[1]), int(found[2])


def check(file: Path, allowed: tuple[int, int]) -> None:
    """Check that a file needs no newer glibc and, if it is a program, no symbol of an unknown library."""
    tag = "glibc {}.{}".format(*allowed)
    needed = max(glibc(file))
    if needed > allowed:
        sys.exit(f"wheel: {file.name} needs glibc {needed[0]}.{needed[1]}, the tag says {tag}")
    if file.name in PROGRAMS and (unknown := unversioned(file)):
        sys.exit(f"wheel: {file.name} needs symbols that no library of {tag} has: {unknown}")
    print(f"{file.name} needs glibc {needed[0]}.{needed[1]}")


def glibc(file: Path) -> set[tuple[int, int]]:
    """Return the versions of glibc's functions that a file names."""
    found = re.findall(r"\bGLIBC_(\d+)\.(\d+)", readelf("-V", file))
    return {(int(major), int(minor)) for major, minor in found}


def unversioned(file: Path) -> list[str]:
    """Return the symbols that the linker found in no library."""
    rows = (line.split() for line in readelf("--dyn-syms", file).splitlines())
    names = (row[7] for row in rows if len(row) == 8 and row[6] == "UND")
    return [name for name in names if "@" not in name and not ELSEWHERE.match(name)]


def readelf(option: str, file: Path) -> str:
    """Return the output of ``readelf``."""
    return subprocess.run(["readelf", "-W", option, file], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
