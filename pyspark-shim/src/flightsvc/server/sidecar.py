"""Finding the front that a process uses, and starting one if there is none.

A front that is started here ends with its owner (the executor's JVM, or the driver's Python process), or when
it is idle. Its files lie in one private folder, ``<run-dir>/<name>/``. Whoever starts a front, and a front
that removes its folder, locks that folder first; so many workers start only one front.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import resource
import select
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight

from flightsvc._version import __version__
from flightsvc.errors import InvalidArgumentError, SidecarError
from flightsvc.settings import Settings, default_run_dir, spark_key, variable

log = logging.getLogger("flightsvc")

_SCHEME = "grpc+unix://"
_SOCKET = "front.sock"
_SOCKET_BYTES = 107  # sun_path of sockaddr_un without the final zero
_START_SECONDS = 30.0
_READY_SECONDS = 5.0
_LOCK_ATTEMPTS = 100
_END_SECONDS = 5.0  # for a front to end after its streams have been drained

# Clients share no subchannels: a client for a new front must not wait for the back-off of a lost one. The
# server quotes the user agent when it refuses an unknown field of a request.
_CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.primary_user_agent", f"flightsvc-python/{__version__}"),
]


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process whose end ends a front.

    Attributes:
        pid: Its process id.
        start: Its start time in clock ticks after boot (field 22 of ``/proc/<pid>/stat``). A pid can be
            used again, but not with the same start time.
    """

    pid: int
    start: int

    @property
    def folder(self) -> str:
        """The name of the folder of its front: eight hexadecimal digits."""
        return hashlib.sha256(f"{self.pid} {self.start}".encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class _Process:
    pid: int
    command: str
    state: str
    parent: int
    start: int


def _process(pid: int) -> _Process:
    """Read ``/proc/<pid>/stat``; the command, in parentheses, may contain spaces and parentheses."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    command = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()  # from field 3, the state
    return _Process(pid, command, state=fields[0], parent=int(fields[1]), start=int(fields[19]))


def this_process() -> Owner:
    """Return this process as an owner."""
    process = _process(os.getpid())
    return Owner(process.pid, process.start)


def executor() -> Owner:
    """Return the executor's JVM above this Python worker: the first ``java`` among its ancestors.

    The result is cached, because the daemon between the two may end before the worker.

    Raises:
        SidecarError: There is none, so a front started here would never end.
    """
    return _executor_above(os.getpid())


@functools.cache
def _executor_above(pid: int) -> Owner:
    try:
        process = _process(_process(pid).parent)
        while process.command != "java":
            process = _process(process.parent)
    except OSError:
        raise SidecarError(
            "no java process started this worker, so a flightsvc started here would never end; "
            f"start one beside the executor and set {variable('endpoint')} to its endpoint"
        ) from None
    return Owner(process.pid, process.start)


def address(endpoint: str) -> str:
    """Return the Flight location of an endpoint; an absolute path is that of a Unix socket.

    Raises:
        InvalidArgumentError: It is neither a URI nor an absolute path.
    """
    if "://" in endpoint:
        return endpoint
    if endpoint.startswith("/"):
        return _SCHEME + endpoint
    raise InvalidArgumentError(
        f"endpoint {endpoint!r} is neither a URI nor an absolute path; "
        f"write it as {_SCHEME}/run/flightsvc/front.sock"
    )


def client(location: str) -> flight.FlightClient:
    """Return a new Flight client; its first call connects."""
    return flight.FlightClient(location, generic_options=_CHANNEL)


def for_worker(settings: Settings, environ: Mapping[str, str] | None = None) -> str:
    """Return the location of this worker's front, which is started if there is none.

    The first of these counts: the endpoint in the worker's environment, the endpoint in ``settings``, the
    file ``flightsvc.endpoint`` in the executor's first local folder, the front of the executor's JVM.
    """
    given = _given_to_worker(settings, environ)
    return given or start(settings, executor())


def running_for_worker(settings: Settings, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the location that :func:`for_worker` returns, if a front answers there; start none."""
    location = _given_to_worker(settings, environ)
    if location is None:
        try:
            location = _SCHEME + os.path.join(_run_dir(settings), executor().folder, _SOCKET)
        except SidecarError:  # without a java process above, no front was started for this worker
            return None
    return location if _ready(location.removeprefix(_SCHEME)) else None


def for_driver(settings: Settings) -> str:
    """Return the location of the driver's front: the endpoint in ``settings``, else this process's own."""
    return address(settings.endpoint) if settings.endpoint else start(settings, this_process())


def for_user(settings: Settings) -> str:
    """Return the location of the user's front: the endpoint in ``settings``, else the user's own."""
    return address(settings.endpoint) if settings.endpoint else start(settings, None)


def _given_to_worker(settings: Settings, environ: Mapping[str, str] | None) -> str | None:
    """Return the location that is configured for this worker; see :func:`for_worker`."""
    environ = os.environ if environ is None else environ
    given = environ.get(variable("endpoint")) or settings.endpoint or _written(environ)
    return address(given) if given else None


def _written(environ: Mapping[str, str]) -> str | None:
    first = environ.get("SPARK_LOCAL_DIRS", "").split(",")[0]
    if not first:
        return None
    try:
        return Path(first, "flightsvc.endpoint").read_text().strip() or None
    except FileNotFoundError:
        return None


def start(settings: Settings, owner: Owner | None) -> str:
    """Return the location of the front of ``owner``, or of the user if ``None``; start it if there is none.

    Raises:
        SidecarError: The front cannot be started.
    """
    run_dir = _run_dir(settings)
    folder = os.path.join(run_dir, owner.folder if owner else "user")
    path = os.path.join(folder, _SOCKET)
    if len(os.fsencode(path)) > _SOCKET_BYTES:
        raise SidecarError(
            f"the socket {path} has a path of {len(os.fsencode(path))} bytes, Linux allows {_SOCKET_BYTES}; "
            f"set {spark_key('run_dir')} or {variable('run_dir')} to a shorter folder"
        )
    try:
        _ensure(run_dir)
        while True:
            with _locked(folder):
                if _ready(path):
                    return _SCHEME + path
                other = _occupant(folder)
                if other is None:
                    return _serve(settings, owner, _SCHEME + path)
            _wait_for_end(other, folder, settings.drain_seconds + _END_SECONDS)
    except OSError as error:
        raise _unusable(folder, error) from error


@contextlib.contextmanager
def locked(settings: Settings, name: str) -> Iterator[None]:
    """Wait for and hold the lock ``name``, which all processes of this user on this host share.

    Raises:
        SidecarError: The run-dir cannot be used.
    """
    folder = os.path.join(_run_dir(settings), name)
    with contextlib.ExitStack() as stack:
        try:
            _ensure(_run_dir(settings))
            stack.enter_context(_locked(folder))
        except OSError as error:
            raise _unusable(folder, error) from error
        yield


def _run_dir(settings: Settings) -> str:
    return os.path.abspath(settings.run_dir or default_run_dir())


def _ensure(run_dir: str) -> None:
    os.makedirs(os.path.dirname(run_dir), exist_ok=True)
    _private(run_dir)


def _unusable(folder: str, error: OSError) -> SidecarError:
    return SidecarError(
        f"{error.filename or folder}: {error.strerror}; "
        f"set {spark_key('run_dir')} or {variable('run_dir')} to a folder of your own"
    )


def _private(folder: str) -> None:
    """Make ``folder`` if needed; refuse a link, another user's folder and one that others can open."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise SidecarError(f"{folder} is not a folder (a link is not followed here); remove it")
    if found.st_uid != os.geteuid():
        raise SidecarError(
            f"{folder} belongs to user {found.st_uid}, not to user {os.geteuid()}; "
            f"set {spark_key('run_dir')} or {variable('run_dir')} to a folder of your own"
        )
    if found.st_mode & 0o077:
        raise SidecarError(f"{folder} is open to other users; run: chmod 700 {folder}")


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made if needed and removed afterwards if it is empty."""
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):  # a front has removed the folder
            _private(folder)
            if (descriptor := lock(folder, wait=True)) is not None:
                break
    else:
        raise SidecarError(f"{folder} is removed whenever it is created; does another program clean up?")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # empty if no front was started
        os.close(descriptor)


def lock(folder: str | os.PathLike[str], *, wait: bool) -> int | None:
    """Return a descriptor that holds the lock of a folder of this user.

    ``None``: the folder is gone, a link or another user's; or, without ``wait``, another process has the
        lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        about = os.fstat(descriptor)
        if about.st_uid == os.geteuid() and os.path.samestat(about, os.lstat(folder)):
            return descriptor
    os.close(descriptor)
    return None


def _ready(path: str) -> bool:
    """Tell whether a front answers on the socket ``path``."""
    if not os.path.exists(path):
        return False
    try:
        options = flight.FlightCallOptions(timeout=_READY_SECONDS)
        with client(_SCHEME + path) as front:
            list(front.do_action(flight.Action("server.ready", b"{}"), options))
    except (pa.ArrowException, OSError) as error:
        log.info("the front at %s does not answer: %s", path, error)
        return False
    return True


def _occupant(folder: str) -> Owner | None:
    """Return the front that the file ``front`` in the folder names, if its process runs."""
    try:
        named = json.loads(Path(folder, "front").read_text())
        owner = Owner(named["pid"], named["start"])
        process = _process(owner.pid)
    except (OSError, ValueError, KeyError):
        return None
    return owner if process.start == owner.start and process.state not in "ZX" else None


def _wait_for_end(front: Owner, folder: str, patience: float) -> None:
    """Wait for the end of a front that no longer answers; it locks its folder to remove it."""
    log.info("waiting for the front of %s, process %d, to end", folder, front.pid)
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(front.pid)
        try:
            ended, _, _ = select.select([descriptor], [], [], patience)
        finally:
            os.close(descriptor)
        if not ended:
            raise SidecarError(
                f"the flightsvc of {folder}, process {front.pid}, neither answers nor ends; "
                f"its log says why; to start another: kill -9 {front.pid}"
            )


def _serve(settings: Settings, owner: Owner | None, endpoint: str) -> str:
    """Start a detached front and return the location in its first line of output."""
    if resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        raise SidecarError(
            "the address space of this worker is limited (spark.executor.pyspark.memory) and flightsvc would "
            "inherit that limit; start flightsvc outside the worker and set "
            f"{spark_key('endpoint')}, or leave spark.executor.pyspark.memory unset"
        )
    if settings.libtensorflow is None and settings.python is None:
        settings = dataclasses.replace(settings, libtensorflow=_tensorflow())
    command = [_binary(settings), "serve", f"--endpoint={endpoint}", "--detach", *settings.serve_flags()]
    with contextlib.ExitStack() as stack:
        descriptors: list[int] = []
        if owner is not None:
            descriptor = _watch(owner)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
            command += [f"--owner={owner.pid}:{owner.start}", f"--owner-fd={descriptor}"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_START_SECONDS,
                pass_fds=descriptors,
                start_new_session=True,
                check=False,
            )
        except OSError as error:
            raise SidecarError(f"{command[0]} cannot be run: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise SidecarError(
                f"flightsvc was not ready after {_START_SECONDS:.0f} s; see its log"
            ) from error
    if done.returncode != 0:
        raise SidecarError(
            f"flightsvc did not start: {done.stderr.strip() or f'exit code {done.returncode}'}"
        )
    try:
        handshake = json.loads(done.stdout.splitlines()[0])
        location = str(handshake["endpoint"])
    except (IndexError, KeyError, ValueError):
        raise SidecarError(f"{command[0]} started but said {done.stdout[:200]!r}; is it flightsvc?") from None
    log.info("started flightsvc %s, pid %s, at %s", handshake["flightsvc"], handshake["pid"], location)
    return location


def _watch(owner: Owner) -> int:
    """Return a pidfd of ``owner``; the caller closes it."""
    try:
        descriptor = os.pidfd_open(owner.pid)
        if _process(owner.pid).start == owner.start:
            return descriptor
        os.close(descriptor)
        reason = "it has ended"
    except OSError as error:
        reason = str(error.strerror)
    raise SidecarError(
        f"process {owner.pid} cannot be watched ({reason}), so a flightsvc started for it might never end; "
        f"start one yourself and set {variable('endpoint')} to its endpoint"
    )


def _binary(settings: Settings) -> str:
    if settings.binary is not None:
        return settings.binary
    bundled = Path(__file__).parents[1] / "_bin" / "flightsvc"
    found = str(bundled) if bundled.exists() else shutil.which("flightsvc")
    if found is None:
        raise SidecarError(
            "the program flightsvc is neither in this package nor on PATH; "
            f"set {spark_key('binary')} or {variable('binary')} to its path"
        )
    return found


def _tensorflow() -> str | None:
    """Return the folder of the libraries in the tensorflow wheel, which is not imported."""
    spec = importlib.util.find_spec("tensorflow")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.exists(os.path.join(folder, "libtensorflow_cc.so.2")):
            return folder
    return None
