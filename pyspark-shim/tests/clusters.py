"""Clusters of Spark, started for a test: Standalone's master and workers, a server of Connect; small JVMs.

Each is a process of its own that ends with the test, by its pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT

from flightsvc.server import sidecar

_START_SECONDS = 120
_SCRIPT_SECONDS = 300
_JAVA = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
SMALL = {
    "spark.driver.memory": "512m",
    "spark.executor.memory": "512m",
    "spark.executor.cores": "1",
    "spark.driver.extraJavaOptions": _JAVA,
    "spark.executor.extraJavaOptions": _JAVA,
    "spark.flightsvc.retryTimeout": "60s",
}


@dataclass(frozen=True)
class Spark:
    """One version of Spark.

    Attributes:
        python: The Python of its environment.
    """

    python: Path

    @property
    def home(self) -> Path:
        """The folder of its package, which is what Spark calls SPARK_HOME."""
        return self.python.parents[1] / "lib" / "python3.11" / "site-packages" / "pyspark"

    def elsewhere(self, folder: Path) -> dict[str, str]:
        """The environment with SPARK_HOME in a folder, below which ``local-cluster`` leaves its work."""
        folder.mkdir()
        for name in ("bin", "jars"):
            (folder / name).symlink_to(self.home / name)
        return self.environ(SPARK_HOME=str(folder))

    def environ(self, **more: str) -> dict[str, str]:
        """The environment of its processes: the package of this folder, TensorFlow from where it is."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPARK_")}
        return {
            **inherited,
            "PYTHONPATH": str(ROOT / "pyspark-shim" / "src"),
            "PYSPARK_PYTHON": str(self.python),
            "SPARK_HOME": str(self.home),
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_DAEMON_JAVA_OPTS": _JAVA,
            "SPARK_NO_DAEMONIZE": "1",
            "FLIGHTSVC_LIBTENSORFLOW": str(sidecar._tensorflow()),
            **more,
        }

    def script(
        self,
        models: Path,
        where: Sequence[str],
        *checks: str,
        conf: Mapping[str, str] = SMALL,
        environ: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run cluster_script.py as a process of its own and return what it printed.

        Args:
            models: The folder of the small models.
            where: ``--master URL`` or ``--remote URL``.
            checks: Which; none are those that run everywhere.
            conf: The session's.
            environ: The driver's environment.
        """
        given = [part for pair in conf.items() for part in ("--conf", "=".join(pair))]
        done = subprocess.run(
            [self.python, Path(__file__).with_name("cluster_script.py"), models, *checks, *where, *given],
            env=self.environ() if environ is None else environ,
            capture_output=True,
            text=True,
            timeout=_SCRIPT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


HERE = Spark(Path(sys.executable))
OLDER = Spark(ROOT / "build" / "spark-3.5" / "bin" / "python")


class Daemon:
    """A JVM of Spark's in the foreground, and its log."""

    def __init__(
        self, spark: Spark, log: Path, *command: str, environ: Mapping[str, str], inside: Sequence[str] = ()
    ):
        """Start it.

        Args:
            spark: Which Spark.
            log: The file for what it says.
            command: A class and its arguments.
            environ: Its environment.
            inside: What goes before the command, such as ``ip netns exec NAME``.
        """
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*inside, spark.home / "bin" / "spark-class", *command],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=log.parent,
            )

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until its log has the pattern, and return where."""
        end = time.monotonic() + _START_SECONDS
        while (found := re.search(pattern, self.log.read_text(errors="replace"))) is None:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < end, f"not within {_START_SECONDS} s: {pattern}\n{self.log.read_text()}"
            time.sleep(0.05)
        return found

    def end(self) -> None:
        """End it and wait for that."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Host:
    """Where a worker lives.

    Attributes:
        address: The address that others reach it by.
        inside: What goes before its command.
    """

    address: str
    inside: tuple[str, ...] = ()


# Spark takes addresses for hosts: only with two of them does it run a task twice, or lose a host.
TWO_HOSTS = (Host("127.0.0.1"), Host("127.0.0.2"))


@contextlib.contextmanager
def standalone(
    spark: Spark,
    folder: Path,
    *,
    master: str = "127.0.0.1",
    hosts: Sequence[Host] = TWO_HOSTS,
    environ: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A Standalone master and a worker of one core on each host; gives the master's URL.

    The workers share no folder of ours: what one has, the other has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:

        def start(name: str, kind: str, *arguments: str, host: Host, **more: str) -> Daemon:
            daemon = Daemon(
                spark,
                folder / f"{name}.log",
                f"org.apache.spark.deploy.{kind}",
                *("--host", host.address, "--port", "0", "--webui-port", "0", *arguments),
                environ={**spark.environ(**more), **(environ or {})},
                inside=host.inside,
            )
            stack.callback(daemon.end)
            return daemon

        head = start("master", "master.Master", host=Host(master))
        port = head.says(r"service .sparkMaster. on port (\d+)")[1]
        url = f"spark://{master}:{port}"
        workers = []
        for i, host in enumerate(hosts):
            short = os.environ["FLIGHTSVC_RUN_DIR"]  # the path of a socket has at most 107 bytes
            more = {
                "FLIGHTSVC_RUN_DIR": f"{short}-{folder.name[-12:]}-{i}",
                "FLIGHTSVC_CACHE_DIR": f"{folder}/cache-{i}",
            }
            place = f"--cores=1 --memory=700m --work-dir={folder}/work-{i}".replace("=", " ").split()
            workers.append(start(f"worker-{i}", "worker.Worker", *place, url, host=host, **more))
        for worker in workers:
            worker.says("Successfully registered with master")
        yield url


@contextlib.contextmanager
def connect_server(spark: Spark, folder: Path, conf: Mapping[str, str] = SMALL) -> Iterator[str]:
    """A server of Spark Connect with two cores of its own; gives its address."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "spark.master": "local[2]",
        "spark.ui.enabled": "false",
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": "0",
        "spark.sql.warehouse.dir": f"{folder}/warehouse",
        **conf,
    }
    daemon = Daemon(
        spark,
        folder / "connect.log",
        "org.apache.spark.deploy.SparkSubmit",
        *("--class", "org.apache.spark.sql.connect.service.SparkConnectServer"),
        *(part for pair in given.items() for part in ("--conf", "=".join(pair))),
        environ=spark.environ(SPARK_DAEMON_MEMORY="512m"),  # to Spark it is a daemon, like the Thrift server
    )
    try:
        port = daemon.says(r"Spark Connect server started at: \S*?:(\d+)")[1]
        yield f"sc://127.0.0.1:{port}"
    finally:
        daemon.end()


@contextlib.contextmanager
def two_networks() -> Iterator[tuple[str, tuple[Host, Host]]]:
    """Two network namespaces on a bridge, as two hosts on a network; gives its address and the hosts.

    Needs root and the program ip.

    Raises:
        OSError: This machine has no such program, or does not let us.
    """
    name = f"fs{os.getpid() % 100_000}"
    net = f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}"

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def gone(*arguments: str) -> None:
        with contextlib.suppress(OSError):
            ip(*arguments)

    with contextlib.ExitStack() as stack:
        ip("link", "add", name, "type", "bridge")
        stack.callback(gone, "link", "del", name)
        ip("addr", "add", f"{net}.1/24", "dev", name)
        ip("link", "set", name, "up")
        hosts = []
        for i in (2, 3):
            space, outer, inner = f"{name}-{i}", f"{name}o{i}", f"{name}i{i}"
            ip("netns", "add", space)
            stack.callback(gone, "netns", "del", space)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
            ip("link", "set", outer, "master", name, "up")
            ip("-n", space, "addr", "add", f"{net}.{i}/24", "dev", inner)
            for link in ("lo", inner):
                ip("-n", space, "link", "set", link, "up")
            hosts.append(Host(f"{net}.{i}", ("ip", "netns", "exec", space)))
        yield f"{net}.1", (hosts[0], hosts[1])
