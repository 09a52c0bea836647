"""The command ``flightsvc``: three verbs are answered in Python, all others by the program in ``_bin``.

The script ``flightsvc`` runs this file by its path, so that the package is imported for those three alone.
"""

from __future__ import annotations

import os
import sys

VERBS = {"conf": "flightsvc.plugin", "freeze": "flightsvc.export.freeze", "predict": "flightsvc.predict"}
"""The verbs in Python and the modules that answer them; the program's help lists these verbs, too."""


def main(words: list[str]) -> int:
    """Answer a command line; does not return where the program does."""
    # --config FILE is the only flag with a value that may come before the verb.
    before = 2 if words[:1] == ["--config"] else 1 if words and words[0].startswith("--config=") else 0
    if words[before : before + 1] and words[before] in VERBS:
        return answer(words[before], words[:before] + words[before + 1 :])
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bin", "flightsvc")
    try:
        os.execv(program, [program, *words])
    except FileNotFoundError:
        print(
            f"flightsvc: the program {program} is missing: this package was installed without its programs, "
            f"and only {', '.join(VERBS)} work; install the wheel (make wheel)",
            file=sys.stderr,
        )
        return 1


def answer(verb: str, arguments: list[str]) -> int:
    """Run a verb in Python and return its exit code."""
    from importlib import import_module

    from flightsvc.errors import FlightsvcError

    try:
        code: int = import_module(VERBS[verb]).main(arguments)
        return code
    except (FlightsvcError, OSError) as error:
        print(f"flightsvc: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("flightsvc: interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
