"""The archive of a SavedModel's folder, and the digest that identifies its content."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from flightsvc.errors import InvalidArgumentError, NotFoundError

CHUNK_BYTES = 4 << 20
SAVED_MODEL = "saved_model.pb"


def files(folder: Path) -> list[str]:
    """Return the regular files below a SavedModel's folder: relative paths with ``/``, sorted by their bytes.

    Raises:
        NotFoundError: The folder holds no ``saved_model.pb``.
        InvalidArgumentError: An entry is neither a regular file nor a folder, or its name is not UTF-8 or has
            control characters.
    """
    if not (folder / SAVED_MODEL).exists():
        raise NotFoundError(f"{folder} holds no {SAVED_MODEL}; give the folder of one SavedModel")
    found = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        for name in folders + names:
            path = os.path.join(place, name)
            relative = os.path.relpath(path, folder)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise InvalidArgumentError(f"{path} is {kind}; a model holds regular files and folders alone")
            if not _plain(relative):
                raise InvalidArgumentError(f"the name {relative!r} holds control characters, or is not UTF-8")
            if stat.S_ISREG(mode):
                found.append(relative)
    return sorted(found, key=os.fsencode)


def digest(folder: Path) -> str:
    """Return ``sha256:`` and the SHA-256 over lines ``<path> <size> <sha256>`` of all files.

    Raises as :func:`files` does.
    """
    lines = hashlib.sha256()
    for path in files(folder):
        with open(folder / path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            lines.update(f"{path} {size} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{lines.hexdigest()}"


def chunks(folder: Path) -> Iterator[bytes]:
    """Yield a POSIX tar of the folder in chunks of ``CHUNK_BYTES``; the last one is shorter.

    The same files give the same bytes, because owners, times and modes are left out. Raises as :func:`files`
    does, and :class:`InvalidArgumentError` if a file changes its size meanwhile.
    """
    held = bytearray()
    for block in _blocks(folder):
        held += block
        while len(held) >= CHUNK_BYTES:
            yield bytes(held[:CHUNK_BYTES])
            del held[:CHUNK_BYTES]
    yield bytes(held)


def _blocks(folder: Path) -> Iterator[bytes]:
    for path in files(folder):
        with open(folder / path, "rb") as file:
            entry = tarfile.TarInfo(path)
            entry.size = left = os.fstat(file.fileno()).st_size
            yield entry.tobuf(tarfile.PAX_FORMAT)
            while block := file.read(min(left, CHUNK_BYTES)):
                left -= len(block)
                yield block
            if left or file.read(1):
                raise InvalidArgumentError(f"{folder / path} changed while it was sent")
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _plain(name: str) -> bool:
    """Tell whether a path is UTF-8 without control characters, so that it fits into a line of the digest."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in name)


def _raise(error: OSError) -> None:
    raise error
