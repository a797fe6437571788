"""Deployment: put `retrain` on a schedule, on the Prefect server that is configured.

`prefect.yaml` says how (cron, one at a time, work pool); the command line may say otherwise. The
experiment is checked here and becomes the deployment's parameters, so that the server's form shows
it and refuses a bad change. Deploying again replaces what was there.

A run does again nothing that is finished, and so there are no results to persist: responses and
scores are in the warehouse, trained routers in folders named by the digest of all that made them,
versions in the registry. Requests are retried one by one, with backoff, where they are made; a task
or flow that fails is not retried by itself, for what fails after that (a refused key, a budget, a
training) would fail again, and a budget would count anew. Retry it by hand, or wait for the
schedule: either goes on where the run stopped.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import available_timezones

import yaml

from conf.errors import ConfigError, EndpointError
from conf.load import standard_gate
from conf.schema import AnyExperiment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.client.schemas.schedules import CronSchedule

ROOT = Path(__file__).parent.parent
PREFECT_YAML = ROOT / "prefect.yaml"
NAME = "retrain"
FULL_NAME = f"{NAME}/{NAME}"
WORKER_TYPE = "process"
DRIFT_TAG = "drift"


@dataclass(frozen=True)
class Deployed:
    """What `turnout deploy` did."""

    deployment: str
    server: str
    experiment: str
    replaced: str | None
    """The experiment that was deployed before; None on the first time."""
    cron: str
    timezone: str
    one_at_a_time: str
    """What becomes of a run that falls due while another one is under way."""
    pool: str
    pool_type: str
    pool_created: bool
    directory: str
    """Where the worker runs it: relative paths of the experiment mean this folder."""
    max_hours: float
    """After which a run is ended and has failed."""
    gate: str
    """Where a run's gate comes from."""

    def worker_command(self) -> str:
        """Return what starts a worker for it."""
        return (
            f"PREFECT_API_URL={self.server} prefect worker start --pool {self.pool} "
            f"--type {self.pool_type} --limit 1"
        )

    def lines(self) -> list[str]:
        """Return what was done, for people."""
        done = "created" if self.replaced is None else "replaced"
        before = "" if self.replaced in (None, self.experiment) else f" (before: {self.replaced})"
        pool = "created" if self.pool_created else "was there"
        return [
            f"{done} deployment {self.deployment} of experiment {self.experiment}{before} "
            f"on {self.server}",
            f"schedule: {self.cron} ({self.timezone}); one at a time: {self.one_at_a_time}",
            f"a run that takes more than {self.max_hours:g} hours is ended",
            f"gate: {self.gate}",
            f"work pool {self.pool} ({self.pool_type}) {pool}; runs in {self.directory}",
        ]


def deploy(
    experiment: AnyExperiment,
    *,
    cron: str | None = None,
    timezone: str | None = None,
    pool: str | None = None,
    max_hours: float | None = None,
) -> Deployed:
    """Create or replace the deployment, and the work pool if it is missing.

    What is not given is as `prefect.yaml` has it. Raises ConfigError for a cron expression or time
    zone that is none and where no server is configured, EndpointError where it does not answer.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

    from flows.retrain import retrain

    plan = planned()
    (planned_schedule,) = plan["schedules"]
    schedule = checked_schedule(
        cron or planned_schedule["cron"], timezone or planned_schedule["timezone"]
    )
    pool = pool or plan["work_pool"]["name"]
    hours = plan["parameters"]["max_hours"] if max_hours is None else max_hours
    if not hours > 0:
        raise ConfigError(
            f"A run may take {hours:g} hours. Expected more than 0. Correct --max-hours."
        )
    settings = given(experiment)
    limit = plan["concurrency_limit"]
    directory = str(Path.cwd())
    with server() as client:
        before = deployed(client)
        pool_type, pool_created = _pool(client, pool)
        client.create_deployment(
            flow_id=client.create_flow(retrain),
            name=NAME,
            description=plan["description"],
            tags=plan["tags"],
            # By its whole path, so that the working directory may be any.
            entrypoint=str(ROOT / plan["entrypoint"]),
            pull_steps=[
                {"prefect.deployments.steps.set_working_directory": {"directory": directory}}
            ],
            work_pool_name=pool,
            schedules=[
                DeploymentScheduleCreate(
                    schedule=schedule, active=True, slug=planned_schedule["slug"]
                )
            ],
            concurrency_limit=limit["limit"],
            concurrency_options=ConcurrencyOptions(
                collision_strategy=ConcurrencyLimitStrategy(limit["collision_strategy"])
            ),
            parameters={"experiment": settings, "max_hours": hours},
            parameter_openapi_schema=form(experiment),
            enforce_parameter_schema=True,
            paused=False,
        )
        return Deployed(
            deployment=FULL_NAME,
            server=str(client.api_url).rstrip("/"),
            experiment=experiment.name,
            replaced=None if before is None else _experiment_name(before),
            cron=schedule.cron,
            timezone=str(schedule.timezone),
            one_at_a_time=limit["collision_strategy"].lower(),
            pool=pool,
            pool_type=pool_type,
            pool_created=pool_created,
            directory=directory,
            max_hours=hours,
            gate="as conf/gate.yaml has it when a run starts"
            if "gate" not in settings
            else f"deployed with the experiment: {settings['gate']}",
        )


def given(experiment: AnyExperiment) -> dict[str, Any]:
    """Return the settings that a deployment keeps.

    Without what is derived from them, which the server would refuse, and without the gate where it
    is that of conf/gate.yaml: a run reads the file, so that a later change of it counts.
    """
    settings = experiment.model_dump(mode="json", round_trip=True)
    if experiment.gate == standard_gate():
        del settings["gate"]
    return settings


def enter_checkout() -> dict[str, str]:
    """Go to the folder of the code that is installed here: the pull step of `prefect.yaml`.

    The worker's process calls it, so it is right wherever the deployment was made.
    """
    os.chdir(ROOT)
    return {"directory": str(ROOT)}


@dataclass(frozen=True)
class DriftRun:
    """A run of the deployment that drift has started, now or before."""

    name: str
    is_new: bool


def start_retrain(experiment: AnyExperiment) -> DriftRun | None:
    """Start a run of the deployment, unless one that drift started has not ended yet.

    None where there is no deployment.

    Raises ConfigError where another experiment is deployed.
    """
    if api_url() is None:
        return None
    with server() as client:
        found = deployed(client)
        if found is None:
            return None
        if _experiment_name(found) != experiment.name:
            raise ConfigError(
                f"{FULL_NAME} is deployed for the experiment {_experiment_name(found)!r}. Expected "
                f"{experiment.name!r}, whose queries have drifted. Deploy it with `turnout deploy` "
                "first, or name the other experiment with --config."
            )
        waiting = _waiting_run(client, found)
        if waiting is not None:
            return DriftRun(waiting, is_new=False)
        started = client.create_flow_run_from_deployment(found.id, tags=[DRIFT_TAG])
        return DriftRun(started.name, is_new=True)


def _waiting_run(client: "SyncPrefectClient", found: "DeploymentResponse") -> str | None:
    """Return the name of a run that drift has started and that has not ended."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import TERMINAL_STATES

    wanted = FlowRunFilter.model_validate(
        {
            "deployment_id": {"any_": [found.id]},
            "tags": {"all_": [DRIFT_TAG]},
            "state": {"type": {"not_any_": [state.value for state in TERMINAL_STATES]}},
        }
    )
    runs = client.read_flow_runs(flow_run_filter=wanted, limit=1)
    return runs[0].name if runs else None


def form(experiment: AnyExperiment) -> dict[str, Any]:
    """Return the form of the deployment's parameters, as a JSON schema.

    `retrain` takes either kind of experiment. The form is narrowed to the kind that is deployed, or
    a bad value would be "not valid under any of the given schemas", and not named.
    """
    from prefect.utilities.callables import parameter_schema

    from flows.retrain import retrain

    schema = parameter_schema(retrain).model_dump_for_openapi()
    kind = {"$ref": f"#/definitions/{type(experiment).__name__}"}
    either = schema["properties"]["experiment"]
    kept = {key: either[key] for key in ("title", "position") if key in either}
    schema["properties"]["experiment"] = {**kept, "allOf": [kind]}
    return schema


def planned() -> dict[str, Any]:
    """Return the deployment as `prefect.yaml` has it."""
    plan = yaml.safe_load(PREFECT_YAML.read_text(encoding="utf-8"))
    found: dict[str, Any] = next(one for one in plan["deployments"] if one["name"] == NAME)
    return found


def checked_schedule(cron: str, timezone: str) -> "CronSchedule":
    """Return the schedule; raises ConfigError for a cron expression or time zone that is none."""
    from prefect.client.schemas.schedules import CronSchedule

    known = available_timezones()
    if timezone not in known:
        near = get_close_matches(timezone, known, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"Unknown time zone {timezone!r}.{guess} Expected a name of the IANA database, such as "
            "Europe/Berlin or UTC. Correct --timezone."
        )
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValueError as error:  # pydantic's is one
        raise ConfigError(
            f"{cron!r} is no cron expression. Expected minute, hour, day, month and weekday, such "
            'as "0 3 * * *" for every night at 3. Correct --cron.'
        ) from error


def api_url() -> str | None:
    """Return the address of the configured Prefect server, None for none."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


@contextmanager
def server() -> "Iterator[SyncPrefectClient]":
    """Open a client of the configured server.

    Raises ConfigError where none is configured, EndpointError where it does not answer.
    """
    from prefect.client.orchestration import get_client

    url = api_url()
    if url is None:
        raise ConfigError(
            "No Prefect server is configured. Expected its address in $PREFECT_API_URL: a schedule "
            "needs a server that stays up. Start one with `prefect server start` and "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api`."
        )
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is not None:
            raise EndpointError(
                f"The Prefect server {url} does not answer: {problem}. Expected a running one. "
                "Start it with `prefect server start`, or correct $PREFECT_API_URL."
            )
        yield client


def deployed(client: "SyncPrefectClient") -> "DeploymentResponse | None":
    """Return the deployment that is on the server, if any."""
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(FULL_NAME)
    except ObjectNotFound:
        return None


def _pool(client: "SyncPrefectClient", name: str) -> tuple[str, bool]:
    """Return the type of the work pool, and whether it had to be created."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        return client.read_work_pool(name).type, False
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        wanted = WorkPoolCreate(name=name, type=WORKER_TYPE, base_job_template=template)
    try:
        return client.create_work_pool(wanted).type, True
    except ObjectAlreadyExists:  # a worker that started this moment was quicker
        return client.read_work_pool(name).type, False


def _experiment_name(found: "DeploymentResponse") -> str:
    return str((found.parameters.get("experiment") or {}).get("name", "unknown"))
