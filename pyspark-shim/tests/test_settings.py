from __future__ import annotations

from pathlib import Path

import pytest

import flightsvc
from flightsvc.settings import Settings, default_run_dir, seconds, spark_key, variable


def test_version_is_that_of_the_repository():
    assert flightsvc.__version__ == (Path(__file__).parents[2] / "VERSION").read_text().strip()


def test_one_name_in_its_spellings():
    assert variable("retry_timeout") == "FLIGHTSVC_RETRY_TIMEOUT"
    assert spark_key("retry_timeout") == "spark.flightsvc.retryTimeout"
    assert spark_key("endpoint") == "spark.flightsvc.endpoint"
    assert Settings(run_dir="/r", idle_timeout="5m").serve_flags() == ["--run-dir=/r", "--idle-timeout=5m"]


def test_spark_is_over_environment_is_over_default():
    environ = {"FLIGHTSVC_RETRY_TIMEOUT": "10s", "FLIGHTSVC_RUN_DIR": "/env"}
    settings = Settings.read({"spark.flightsvc.retryTimeout": "20s", "spark.app.name": "x"}, environ)
    assert settings == Settings(retry_timeout="20s", run_dir="/env")
    assert settings.retry_seconds == 20.0
    assert Settings().retry_seconds == 120.0
    assert Settings().load_seconds == 300.0


def test_what_is_for_the_shim_alone_is_not_handed_on():
    assert Settings(endpoint="/e", binary="/b", retry_timeout="1s").serve_flags() == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("5m", 300), ("300s", 300), ("1h30m", 5400), ("250ms", 0.25), ("1.5s", 1.5), ("0", 0), ("2m3s", 123)],
)
def test_durations(text: str, value: float):
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "5 m", "m", "-5s", "5m!", "5d"])
def test_not_durations(text: str):
    with pytest.raises(flightsvc.InvalidArgumentError, match="is not a duration; write it as 300s"):
        seconds(text)


def test_a_bad_duration_is_named_by_its_setting():
    with pytest.raises(ValueError, match=r"spark\.flightsvc\.idleTimeout \(FLIGHTSVC_IDLE_TIMEOUT\): '5'"):
        Settings.read({"spark.flightsvc.idleTimeout": "5"}, {})


def test_an_unknown_setting_names_its_neighbour():
    with pytest.raises(ValueError, match=r"no setting spark\.flightsvc\.runDri; did you mean .*\.runDir\?"):
        Settings.read({"spark.flightsvc.runDri": "/x"}, {})


def test_default_run_dir():
    assert default_run_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/flightsvc"
    assert default_run_dir({}).startswith("/tmp/flightsvc-")
