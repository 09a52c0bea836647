"""Parses the arguments of a verb in Python; help and errors look like those of the program in Go."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """The parser of one verb: ``flightsvc VERB ARGUMENTS [flags]``."""

    def __init__(self, verb: str, arguments: str, description: str):
        usage = " ".join(filter(None, ("%(prog)s", arguments, "[flags]")))
        super().__init__(
            prog=f"flightsvc {verb}",
            usage=usage,
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self._positionals.title, self._optionals.title = "Arguments", "Flags"
        self.add_argument("-h", "--help", action="help", help="Show context-sensitive help.")

    def error(self, message: str) -> NoReturn:
        """End the process: the command line is wrong."""
        self.exit(2, f"flightsvc: error: {message}\n")


class _Formatter(argparse.HelpFormatter):
    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        super().add_usage(usage, actions, groups, "Usage: ")
