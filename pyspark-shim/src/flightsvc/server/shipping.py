"""Models that lie in a folder of the driver, on their way to the executors.

The driver writes one archive for each digest and hands it to Spark, which brings it to every executor. A
worker asks its front for the digest and pushes the archive where it is not known: once per host, since fronts
keep what was pushed and workers wait for each other.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.flight as flight

from flightsvc.errors import FLIGHT_ERRORS, InvalidArgumentError, NotFoundError
from flightsvc.server import archive
from flightsvc.server.connection import Connection
from flightsvc.server.sidecar import locked, this_process

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.connect import session as connect

_LATEST = "latest"
_FOLDER = "flightsvc-driver-"  # begins the name of a private folder
_CHUNKS = pa.schema([pa.field("chunk", pa.binary())])

# A file's path, size and time of its last change; the same for all files says: the same model.
_Stamp = tuple[tuple[str, int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Reading:
    stamp: _Stamp
    digest: str


_mutex = threading.Lock()  # guards what follows, and is held while an archive is made
_readings: dict[Path, _Reading] = {}
_added: set[tuple[str, str]] = set()  # Spark application or Connect session, digest


def version_folder(folder: Path, version: str) -> Path:
    """Return the folder of one SavedModel: ``folder`` itself, or the numbered folder below it.

    Args:
        folder: A SavedModel, or numbered folders of SavedModels, as TensorFlow Serving has them.
        version: A number, or ``latest``, which is the highest.

    Raises:
        NotFoundError: There is no such folder or version.
    """
    if not folder.is_dir():
        raise NotFoundError(f"model {folder}: there is no such folder on this host")
    if (folder / archive.SAVED_MODEL).exists():
        if version not in (_LATEST, "1"):
            raise NotFoundError(f"model {folder}: no version {version}; it is a SavedModel without versions")
        return folder
    found = [
        entry
        for entry in folder.iterdir()
        if entry.name.isascii() and entry.name.isdigit() and (entry / archive.SAVED_MODEL).exists()
    ]
    if version != _LATEST:
        found = [entry for entry in found if entry.name == version]
    if not found:
        raise NotFoundError(
            f"model {folder}: it holds no {archive.SAVED_MODEL} and no folder of version {version} with one"
        )
    return max(found, key=lambda entry: (int(entry.name), -len(entry.name)))


def digest(folder: Path) -> str:
    """Return the digest of a SavedModel's folder, read anew only where a file has changed.

    Raises:
        NotFoundError: The folder holds no SavedModel.
        InvalidArgumentError: It holds something else than files and folders.
    """
    with _mutex:
        return _read(folder).digest


def add(session: SparkSession, folder: Path) -> str:
    """Hand the model in ``folder`` to Spark, once per session and digest, and return its digest.

    The archive stays in a private folder of this process until its end, since Spark reads it when an
    executor first needs it.

    Raises:
        NotFoundError, InvalidArgumentError: See :func:`digest`; or a file changed meanwhile.
        OSError: There is no space for the archive.
    """
    from pyspark.sql.utils import is_remote

    remote = cast("connect.SparkSession", session) if is_remote() else None
    to = remote.session_id if remote is not None else session.sparkContext.applicationId
    with _mutex:
        sent = _read(folder).digest
        if (to, sent) not in _added:
            file = str(_archive(folder, sent))
            if remote is not None:
                remote.addArtifact(file, file=True)
            else:
                session.sparkContext.addFile(file)
            _added.add((to, sent))
    return sent


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The function for ``mapInArrow`` that yields the archive of a model which :func:`add` handed to Spark.

    Its rows are ``index`` and ``piece``, ``archive.PIECE_BYTES`` each, once for a partition that has rows.

    Attributes:
        digest: The model's.
    """

    digest: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Run in a worker, in a record batch for each piece."""
        from pyspark import SparkFiles

        if not any(len(batch) for batch in batches):
            return
        with open(SparkFiles.get(_file_name(self.digest)), "rb") as archived:
            index = 0
            while piece := archived.read(archive.PIECE_BYTES):
                columns = [pa.array([index], pa.int64()), pa.array([piece], pa.binary())]
                yield pa.record_batch(columns, names=["index", "piece"])
                index += 1


def send(connection: Connection, folder: Path) -> str:
    """Push the model in ``folder`` to a front that does not know it, and return its digest.

    Raises:
        NotFoundError: The folder holds no SavedModel.
        InvalidArgumentError: It holds something else than files and folders, or the front refuses it.
        FlightsvcError: The front could not be reached.
    """
    sent = digest(folder)
    if not known(connection, sent):
        push(connection, sent, lambda: archive.pieces(folder))
    return sent


def receive(connection: Connection, digest: str, name: str) -> None:
    """Make sure that the front of ``connection`` has the model which :func:`add` handed to Spark.

    Args:
        connection: The connection of a Spark worker.
        digest: The model's.
        name: What people call the model.

    Raises:
        NotFoundError: Neither the front nor Spark has it.
        InvalidArgumentError: The archive is not what the driver sent, or there is no space for it.
    """
    if known(connection, digest):
        return
    with locked(connection.settings, f"push-{_hex(digest)[:16]}"):
        if known(connection, digest):
            return
        from pyspark import SparkFiles

        file = SparkFiles.get(_file_name(digest))

        if not os.path.exists(file):
            raise NotFoundError(
                f"model {name}: its archive {file} has not reached this worker, and the server does not know "
                f"{digest}; create the DataFrame or function again in the session that runs it"
            )

        def pieces() -> Iterator[bytes]:
            with open(file, "rb") as archived:
                while piece := archived.read(archive.PIECE_BYTES):
                    yield piece

        try:
            push(connection, digest, pieces)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"model {name}: its archive {file} was refused: {error}") from error


def known(connection: Connection, digest: str) -> bool:
    """Tell whether the front has the model of ``digest``.

    Raises:
        FlightsvcError: It could not be asked.
    """
    try:
        connection.action("model.metadata", {"model": digest}, connection.settings.retry_seconds)
    except NotFoundError:
        return False
    return True


def push(connection: Connection, digest: str, pieces: Callable[[], Iterator[bytes]]) -> None:
    """Send the front a model that it does not know.

    Args:
        connection: Where the front is.
        digest: The model's; the front checks it.
        pieces: Returns the archive, see :func:`archive.pieces`; called for each attempt.

    Raises:
        InvalidArgumentError: The front cannot read the archive, or has no space for it.
        FlightsvcError: It could not be reached.
        OSError: The archive cannot be read.
    """
    command = json.dumps({"v": 1, "put": "model", "digest": digest})

    def send() -> None:
        descriptor = flight.FlightDescriptor.for_command(command)
        writer, results = connection.front().do_put(descriptor, _CHUNKS)
        try:
            with writer:
                for piece in pieces():
                    writer.write_batch(pa.record_batch([pa.array([piece], pa.binary())], schema=_CHUNKS))
                writer.done_writing()
                results.read()  # there is one answer, once the model has its place
        except FLIGHT_ERRORS:
            # Somebody else's push of the same model was faster: the front answers and reads no further.
            if not known(connection, digest):
                raise

    connection.retry(send, connection.settings.retry_seconds)


def _read(folder: Path) -> _Reading:
    folder = Path(os.path.abspath(folder))
    stamp = _stamp(folder)
    reading = _readings.get(folder)
    if reading is None or reading.stamp != stamp:
        reading = _readings[folder] = _Reading(stamp, archive.digest(folder))
    return reading


def _stamp(folder: Path) -> _Stamp:
    found = [(path, os.stat(folder / path)) for path in archive.files(folder)]
    return tuple((path, about.st_size, about.st_mtime_ns) for path, about in found)


def _archive(folder: Path, digest: str) -> Path:
    """Return the archive of a folder, made if it is not there; one that is there is whole."""
    file = private_folder() / _file_name(digest)
    if not file.exists():
        part = file.with_suffix(".part")
        try:
            with open(part, "wb") as out:
                for piece in archive.pieces(folder):
                    out.write(piece)
            if _read(folder).digest != digest:
                raise InvalidArgumentError(f"{folder} changed while it was read; try again when it is copied")
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)
    return file


@functools.cache
def private_folder() -> Path:
    """Return a folder that only this user can open; it goes with this process.

    It lies among the temporary files, since the run-dir may be memory. Of a process that was killed the front
    that it owns removes it, which knows it by its name. Its process holds its lock, so that the next one
    finds, and removes, what is left where that front had ended before.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        if (descriptor := _lock(old)) is not None:
            shutil.rmtree(old, ignore_errors=True)
            os.close(descriptor)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{this_process().folder}-"))
        pid = os.getpid()
        if _lock(folder) is not None:  # else another process took it for an old one
            break

    def remove() -> None:
        if os.getpid() == pid:  # a fork of us has not made it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of ``folder``; ``None``: it is gone, another's, or in use."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        about = os.fstat(descriptor)
        if about.st_uid == os.geteuid() and os.path.samestat(about, os.lstat(folder)):
            return descriptor
    os.close(descriptor)
    return None


def _file_name(digest: str) -> str:
    return f"flightsvc-{_hex(digest)}.model"  # not .tar: Spark would unpack it beside all other files


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
