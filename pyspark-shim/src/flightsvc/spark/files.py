"""Reading files in a worker, by paths or by URIs that pyarrow knows."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from flightsvc.errors import InvalidArgumentError
from flightsvc.server.stream import ROW_BYTES

_URI = re.compile(r"(?P<root>(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(//[^/]*)?)(?P<path>/.*|$)", re.DOTALL)
_LENGTH = 300  # the longest reason from another library


def read(path: str) -> bytes:
    """Return the bytes of a file, by its path on this host or by a URI that pyarrow knows.

    ``file:/x`` and ``file:///x`` are paths. The text is used literally, as in the column ``path`` of Spark's
    file sources. If there is no such file, it is decoded from percent-encoding, as of ``input_file_name()``.

    Raises:
        InvalidArgumentError: There is no such file, or it cannot be read, or it is too large.
    """
    match = _URI.fullmatch(path)
    scheme = match["scheme"].lower() if match else ""
    if not path or "\0" in path:
        raise InvalidArgumentError("it is not a path")
    try:
        if match is None:
            return _read_local(path)
        if scheme == "file":
            return _first(_read_local, match["path"])
        system, base = _file_system(match["root"])
        return _first(functools.partial(_read_remote, system), base + match["path"])
    except FileNotFoundError:
        hint = "; workers read it, so each of their hosts needs it" if scheme in ("", "file") else ""
        raise InvalidArgumentError(f"there is no such file{hint}") from None
    except IsADirectoryError:
        raise InvalidArgumentError("it is a folder, not a file") from None
    except NotADirectoryError:
        raise InvalidArgumentError("there is no such file: a part of its path is not a folder") from None
    except PermissionError:
        raise InvalidArgumentError("the worker has no permission to read it") from None
    except (OSError, pa.ArrowException) as error:
        raise InvalidArgumentError(f"it cannot be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return the text of an exception, in one line."""
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return " ".join(text.split())[:_LENGTH]


def _first(read: Callable[[str], bytes], path: str) -> bytes:
    """Read a path literally, else decoded from percent-encoding."""
    try:
        return read(path)
    except FileNotFoundError:
        if unquote(path) == path:
            raise
        return read(unquote(path))


def _read_local(path: str) -> bytes:
    about = os.stat(path)
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(about.st_mode):
        raise InvalidArgumentError("it is a device, a pipe or a socket, not a file")
    with open(path, "rb") as file:
        return _bounded(file, about.st_size)


def _read_remote(system: Any, path: str) -> bytes:
    from pyarrow import fs

    about = system.get_file_info(path)
    if about.type == fs.FileType.NotFound:
        raise FileNotFoundError
    if about.type == fs.FileType.Directory:
        raise IsADirectoryError
    with system.open_input_stream(path) as file:
        return _bounded(file, about.size or 0)


def _bounded(file: Any, size: int) -> bytes:
    data: bytes = b"" if size > VALUE_BYTES else file.read(VALUE_BYTES + 1)
    if max(size, len(data)) > VALUE_BYTES:
        raise InvalidArgumentError(f"it is larger than {VALUE_BYTES >> 20} MiB")
    return data


@functools.lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[Any, str]:
    """Return pyarrow's file system for the root of a URI, ``scheme://host``, and the path of the root in it.

    Raises:
        InvalidArgumentError: pyarrow knows no such scheme.
    """
    from pyarrow import fs

    try:
        system, base = fs.FileSystem.from_uri(f"{root}/")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        scheme = root.partition(":")[0]
        raise InvalidArgumentError(
            f"workers cannot read {scheme}: URIs ({one_line(error)}); read such files with Spark's "
            "binaryFile source, or load them by a function: Input(<column>, load=...)"
        ) from error
    return system, base.rstrip("/")


VALUE_BYTES = ROW_BYTES - (1 << 20)
"""The largest value that is loaded."""
