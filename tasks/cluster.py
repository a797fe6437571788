"""A Ray cluster at work: shards go to its nodes as Prefect tasks, and come back done or lost.

prefect-ray's task runner carries them, so that every shard is a task run of the same flow run. Ray
is told not to run one again by itself: it would do so without end after an out-of-memory kill, and
nobody could look first at what the lost attempt left behind. A shard whose process or node ended
comes back as `Lost`, and its stage decides what of it is still to be done.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pyarrow as pa
from prefect import Task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from conf.errors import ConfigError, TurnoutError
from conf.schema import Compute

if TYPE_CHECKING:
    from prefect_ray.task_runners import PrefectRayFuture, RayTaskRunner

REACH_S = 5.0  # longest wait for the head to accept a connection
LOOK_S = 10.0  # how often it is looked whether any node is left, while none reports
# The last tasks of a stage, and the longest wait for Prefect to know how they ended.
LAST_TASKS, RECORD_S = 50, 20.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A slice of what is missing, under a hash of its content."""

    address: str
    rows: pa.Table
    losses: int = 0
    """Attempts whose process or node ended."""


@dataclass(frozen=True)
class Lost:
    """What became of a shard whose process or node ended."""

    reason: str


@dataclass(frozen=True)
class Resources:
    """What one shard takes of its node."""

    cpus: int = 1
    gpus: int = 0

    def fit(self, node: Mapping[str, float]) -> int:
        """Return how many shards a node holds at once."""
        counts = [node.get("CPU", 0) // self.cpus]
        if self.gpus:
            counts.append(node.get("GPU", 0) // self.gpus)
        return int(min(counts))


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to."""

    compute: Compute
    runner: "RayTaskRunner[Any]"

    def nodes(self) -> list[dict[str, float]]:
        """Return what each living node has: CPU, GPU."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def whole_node(self) -> Resources:
        """Return what keeps a second shard off a node, where nodes are alike."""
        cpus = [int(node.get("CPU", 0)) for node in self.nodes()]
        return Resources(cpus=min((each for each in cpus if each > 0), default=1))

    def with_gpu(self) -> Resources:
        """Return one GPU where the cluster has any, else one CPU."""
        return Resources(gpus=int(any(node.get("GPU", 0) >= 1 for node in self.nodes())))

    def slots(self, needed: Resources) -> int:
        """Return how many shards run at once; raises TurnoutError where none can."""
        slots = sum(needed.fit(node) for node in self.nodes())
        if slots == 0:
            raise TurnoutError(
                f"No living node of the Ray cluster has {needed.cpus} CPU and {needed.gpus} GPU "
                "for a shard. Expected at least one. Start workers with `ray start`, and run "
                "again: what is finished is kept."
            )
        return slots

    def work_through(
        self,
        submit: "Callable[[Shard, int], PrefectRayFuture[Any]]",
        needed: Resources,
        *,
        slots: int,
        again: deque[Shard],
        shards: Iterator[Shard] | None = None,
    ) -> Iterator[tuple[Shard, Any]]:
        """Yield each shard with what its task returned, or `Lost`, as they end.

        At most ``slots`` run at once; ``submit`` is told which of the slots a shard takes. Shards
        put into ``again`` meanwhile go before the rest of ``shards``. An exception of a task's own
        is raised.
        """
        import ray

        fresh = iter(()) if shards is None else shards
        free = list(range(slots))
        running: dict[Any, tuple[PrefectRayFuture[Any], Shard, int]] = {}
        last: deque[UUID] = deque(maxlen=LAST_TASKS)
        while True:
            while free and (shard := again.popleft() if again else next(fresh, None)) is not None:
                slot = free.pop()
                future = submit(shard, slot)
                running[future.wrapped_future] = (future, shard, slot)
            if not running:
                _until_recorded(last)
                return
            ended, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
            if not ended:
                self.slots(needed)  # with no node left they would never end
            for reference in ended:
                future, shard, slot = running.pop(reference)
                free.append(slot)
                last.append(future.task_run_id)
                yield shard, _outcome(future, shard)

    def submit(
        self, task: Task[..., Any], parameters: dict[str, Any], needed: Resources
    ) -> "PrefectRayFuture[Any]":
        """Hand a task to some node, without retries by Ray."""
        from prefect_ray.context import remote_options

        with remote_options(
            num_cpus=needed.cpus,
            num_gpus=needed.gpus,
            max_retries=0,
            scheduling_strategy="SPREAD",
        ):
            return self.runner.submit(task, parameters)

    def another_try(self, shard: Shard, lost: Lost) -> Shard:
        """Return the shard for its next attempt; raises TurnoutError when there is none left."""
        losses = shard.losses + 1
        if losses > self.compute.retries:
            raise TurnoutError(
                f"The process of shard {shard.address} ended under it {losses} times, the last "
                f"time because: {lost.reason} Expected it to live on one of the nodes. Give the "
                "nodes more memory or make shards smaller (compute.shard_queries, "
                "compute.shard_responses), and run again: what is finished is kept. Or raise "
                f"compute.retries (now {self.compute.retries})."
            )
        _log.warning("Shard %s is run again: %s", shard.address, lost.reason)
        return replace(shard, losses=losses)


def _outcome(future: "PrefectRayFuture[Any]", shard: Shard) -> Any:
    import ray

    try:
        return future.result()
    except ray.exceptions.RayTaskError as error:  # not of the task: from around it
        said = str(error).strip().splitlines()[-1]
        raise TurnoutError(
            f"Shard {shard.address} could not be run on its node: {said}. Expected there "
            "this version of Turnout, and Prefect's server within reach. See to both, and run "
            "again: what is finished is kept."
        ) from error
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split(". ")[0].split()) + "."
        _report_crash(future, reason)
        return Lost(f"{type(error).__name__}: {reason}")


def _report_crash(future: "PrefectRayFuture[Any]", reason: str) -> None:
    """Tell Prefect, whose record would say for ever that the task runs: nobody else can."""
    try:
        with get_client(sync_client=True) as client:
            client.set_task_run_state(future.task_run_id, Crashed(message=reason), force=True)
    except (PrefectException, httpx.HTTPError, OSError) as error:  # no reason to stop the run
        _log.warning("Prefect was not told of a crash: %s", error)


def _until_recorded(task_run_ids: Collection[UUID]) -> None:
    """Wait until Prefect knows that these tasks ended, which it learns by events a little later.

    Ray ends its processes with the stage, and events that are still in them are lost: Prefect's
    page would show such a task as running for ever.
    """
    if not task_run_ids:
        return
    chosen = TaskRunFilter(id=TaskRunFilterId(any_=list(task_run_ids)))
    deadline = time.monotonic() + RECORD_S
    try:
        with get_client(sync_client=True) as client:
            while time.monotonic() < deadline:
                runs = client.read_task_runs(task_run_filter=chosen)
                ended = sum(run.state is not None and run.state.is_final() for run in runs)
                if ended == len(task_run_ids):
                    return
                time.sleep(0.1)
    except (PrefectException, httpx.HTTPError, OSError) as error:  # no reason to stop the run
        _log.warning("Prefect was not asked how the last shards ended: %s", error)


@contextmanager
def connected(compute: Compute) -> Iterator[Cluster]:
    """Connect to the cluster, or start one on this machine, until the block ends.

    A connection that the process has already is used, and left open. Raises ConfigError where Ray
    is not installed, the address does not answer, or the nodes cannot reach Prefect's server.
    """
    _refuse_missing_packages()
    import ray
    from prefect_ray.task_runners import RayTaskRunner

    connects = not ray.is_initialized()
    if connects:
        _connect(compute)
    try:
        with _prefect_within_reach(), RayTaskRunner() as runner:
            yield Cluster(compute, runner)
    finally:
        if connects:
            ray.shutdown()


def check_cluster(compute: Compute) -> str:
    """Return where the cluster is, and of which version of Ray; raises as `connected`."""
    _refuse_missing_packages()
    from importlib.metadata import version

    if compute.address not in (None, "auto"):
        _refuse_dead_address(compute.address)
    return f"{version('ray')}, {compute.address or 'a cluster on this machine'}"


def _refuse_missing_packages() -> None:
    for package in ("ray", "prefect_ray"):
        if find_spec(package) is None:
            raise ConfigError(
                f"compute is ray, and {package} is not installed. Expected Ray here and on every "
                "node. Run `pip install --editable '.[ray]'`, or set compute=local."
            )


def _connect(compute: Compute) -> None:
    import ray

    # Ray would print the nodes' output on standard output, which is for results.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if compute.address is None:
        ray.init(address="local", include_dashboard=False, **options)
        return
    if compute.address != "auto":
        _refuse_dead_address(compute.address)
    try:
        ray.init(address=compute.address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _no_cluster(compute.address, str(error).strip().splitlines()[0]) from error


def _refuse_dead_address(address: str) -> None:
    """Look at the port first: Ray itself takes a minute to find out, or ends the process."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or (10001 if parts.scheme == "ray" else None)
    except ValueError as error:
        raise _no_cluster(address, str(error)) from error
    if not host or port is None:
        raise _no_cluster(address, "it names no host and port")
    try:
        with socket.create_connection((host, port), timeout=REACH_S):
            return
    except OSError as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"No Ray cluster answers at {address!r}: {reason.rstrip('.')}. Expected the head's "
        "address, as host:6379, ray://host:10001 or auto, and its token, where it asks for one. "
        "Run `ray start --head` there, set RAY_AUTH_MODE=token and copy ~/.ray/auth_token, correct "
        "compute.address, or leave it out for a cluster on this machine."
    )


@contextmanager
def _prefect_within_reach() -> Iterator[None]:
    """Give the nodes the address of Prefect's server, which goes along with each task.

    A run without a configured server has one of its own, on loopback: enough for a cluster on this
    machine. Each worker would start one for itself otherwise.
    """
    import ray
    from prefect.server.api.server import SubprocessASGIServer

    url = PREFECT_API_URL.value()
    here = ray.util.get_node_ip_address()
    elsewhere = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} - {here}
    if elsewhere and (not url or urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")):
        raise ConfigError(
            f"Prefect's server is {url or 'one that this run started'}, which the node "
            f"{min(elsewhere)} cannot reach. Expected an address that all nodes of the Ray "
            "cluster reach. Run `prefect server start --host 0.0.0.0`, and set PREFECT_API_URL to "
            "it here."
        )
    with ExitStack() as settings:
        if not url:
            server = SubprocessASGIServer()
            server.start()
            settings.enter_context(temporary_settings({PREFECT_API_URL: server.api_url}))
        yield
