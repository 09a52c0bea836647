"""Shipping models from folders of the driver to the fronts of the executors.

The driver writes one archive for each digest and gives it to Spark, which distributes it to all executors. A
worker asks its front for the digest and pushes the archive if the front does not have it. That happens once a
host, because fronts keep pushed models and workers wait for each other.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import pyarrow as pa
import pyarrow.flight as flight

from flightsvc.errors import FLIGHT_ERRORS, InvalidArgumentError, NotFoundError
from flightsvc.server import archive
from flightsvc.server.connection import Connection
from flightsvc.server.sidecar import lock, locked, this_process

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.connect import session as connect

_LATEST = "latest"
_FOLDER = "flightsvc-driver-"  # the start of the names of private folders
_CHUNKS = pa.schema([pa.field("chunk", pa.binary())])

# Path, size and time of change of each file; an equal stamp means an unchanged model.
_Stamp = tuple[tuple[str, int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Reading:
    stamp: _Stamp
    digest: str


_mutex = threading.Lock()  # guards what follows; held while an archive is written
_readings: dict[Path, _Reading] = {}
_added: set[tuple[str, str]] = set()  # application of Spark or session of Connect, with a digest


def version_folder(folder: Path, version: str) -> Path:
    """Return the folder of one SavedModel: ``folder`` itself, or a numbered folder below it.

    Args:
        folder: A SavedModel, or a folder of numbered SavedModels, as for TensorFlow Serving.
        version: A number, or ``latest`` for the highest.

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
    """Return the digest of a SavedModel's folder, which is read again only after a file has changed.

    Raises:
        NotFoundError: The folder holds no SavedModel.
        InvalidArgumentError: It contains something other than files and folders.
    """
    with _mutex:
        return _read(folder).digest


def add(session: SparkSession, folder: Path) -> str:
    """Give the archive of ``folder`` to Spark, once for each session and digest, and return the digest.

    The archive stays in a private folder of this process, because Spark reads it when an executor first needs
    it.

    Raises:
        NotFoundError, InvalidArgumentError: As :func:`digest`; or a file changed meanwhile.
        OSError: There is no room for the archive.
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
class Chunks:
    """A function for ``mapInArrow``: yields the archive of a model that :func:`add` has given to Spark.

    A partition with rows becomes the rows ``index`` and ``piece``, one for each chunk of the archive.

    Attributes:
        digest: The digest of the model.
    """

    digest: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield one record batch for each chunk, in a worker."""
        from pyspark import SparkFiles

        if not any(len(batch) for batch in batches):
            return
        with open(SparkFiles.get(_file_name(self.digest)), "rb") as archived:
            for index, chunk in enumerate(_chunks(archived)):
                columns = [pa.array([index], pa.int64()), pa.array([chunk], pa.binary())]
                yield pa.record_batch(columns, names=["index", "piece"])


def send(connection: Connection, folder: Path) -> str:
    """Push the model in ``folder`` unless the front has it; return its digest.

    Raises:
        NotFoundError: The folder holds no SavedModel.
        InvalidArgumentError: It contains something other than files and folders, or the front refuses it.
        FlightsvcError: The front could not be reached.
    """
    sent = digest(folder)
    if not known(connection, sent):
        push(connection, sent, lambda: archive.chunks(folder))
    return sent


def receive(connection: Connection, digest: str, name: str) -> None:
    """Make sure that the front has a model that :func:`add` has given to Spark.

    Args:
        connection: The connection of a Spark worker.
        digest: The digest of the model.
        name: The model's name, for errors.

    Raises:
        NotFoundError: Neither the front nor Spark has it.
        InvalidArgumentError: The archive is damaged, or there is no room for it.
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

        def chunks() -> Iterator[bytes]:
            with open(file, "rb") as archived:
                yield from _chunks(archived)

        try:
            push(connection, digest, chunks)
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


def push(connection: Connection, digest: str, chunks: Callable[[], Iterator[bytes]]) -> None:
    """Push a model to the front.

    Args:
        connection: Where the front is.
        digest: The digest of the model; the front checks it.
        chunks: Returns the archive as :func:`archive.chunks` does; called for each attempt.

    Raises:
        InvalidArgumentError: The front cannot read the archive, or has no room for it.
        FlightsvcError: It could not be reached.
        OSError: The archive cannot be read.
    """
    command = json.dumps({"v": 1, "put": "model", "digest": digest})

    def send() -> None:
        descriptor = flight.FlightDescriptor.for_command(command)
        writer, results = connection.front().do_put(descriptor, _CHUNKS)
        try:
            with writer:
                for chunk in chunks():
                    writer.write_batch(pa.record_batch([pa.array([chunk], pa.binary())], schema=_CHUNKS))
                writer.done_writing()
                results.read()  # the front answers once, when the model is in its place
        except FLIGHT_ERRORS:
            # The front ends this push early when another push of the same model was faster.
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
    """Return the archive of a folder, which is written if needed. It is renamed only when complete."""
    file = private_folder() / _file_name(digest)
    if not file.exists():
        part = file.with_suffix(".part")
        try:
            with open(part, "wb") as out:
                out.writelines(archive.chunks(folder))
            if _read(folder).digest != digest:
                raise InvalidArgumentError(f"{folder} changed while it was read; try again when it is copied")
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)
    return file


@functools.cache
def private_folder() -> Path:
    """Return a folder that only this user can open; it is removed when this process ends.

    It lies below the folder for temporary files, because the run-dir may be in memory. If this process is
    killed, its front removes the folder, which carries the process's name. If that front has ended before,
    the next process does, which finds that nobody holds the folder's lock.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        if (descriptor := lock(old, wait=False)) is not None:
            shutil.rmtree(old, ignore_errors=True)
            os.close(descriptor)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{this_process().folder}-"))
        pid = os.getpid()
        if lock(folder, wait=False) is not None:  # another process took it for a leftover
            break

    def remove() -> None:
        if os.getpid() == pid:  # a forked child must not remove its parent's folder
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(archive.CHUNK_BYTES):
        yield chunk


def _file_name(digest: str) -> str:
    return f"flightsvc-{_hex(digest)}.model"  # not .tar, which Spark would unpack


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
