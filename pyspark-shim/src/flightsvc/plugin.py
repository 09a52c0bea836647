"""The configuration of the Spark plugin in this package, which runs a server beside each executor."""

from __future__ import annotations

from pathlib import Path

from flightsvc.commandline import Parser
from flightsvc.errors import NotFoundError

_CLASS = "io.flightsvc.spark.FlightsvcPlugin"
_JAR = Path(__file__).parent / "_jars" / "flightsvc-spark-plugin.jar"


def spark_conf() -> dict[str, str]:
    """Return the configuration with which Spark loads the plugin, in the driver and in each executor.

        SparkSession.builder.config(map=flightsvc.spark_conf()).getOrCreate()

    The command ``flightsvc conf`` prints the same as lines of a ``spark-defaults.conf``. If your
    configuration already has ``spark.plugins``, ``spark.jars`` or ``spark.driver.extraClassPath``, join both
    values: with a comma, but the class path with a colon.

    Raises:
        NotFoundError: The plugin's jar is not installed.
    """
    if not _JAR.is_file():
        raise NotFoundError(
            f"the Spark plugin is not in this installation: {_JAR} is missing; install the wheel, which "
            "`make wheel` writes into dist"
        )
    return {"spark.plugins": _CLASS, "spark.jars": str(_JAR), "spark.driver.extraClassPath": str(_JAR)}


def main(arguments: list[str]) -> int:
    """Answer ``flightsvc conf``: print the configuration, a key and its value a line."""
    Parser("conf", "", "Print the configuration of the Spark plugin.").parse_args(arguments)
    for key, value in spark_conf().items():
        print(key, value)
    return 0
