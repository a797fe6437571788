"""Task runs as Prefect's server has them: tasks report by events, which arrive a little later."""

import time
from collections import Counter
from collections.abc import Mapping
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId


def recorded_tasks(
    flow_run_id: UUID | str, expected: Mapping[tuple[str, str], int], *, seconds: float = 60
) -> Counter[tuple[str, str]]:
    """Return how many task runs a flow run has of each name and state, once ``expected`` are there.

    After ``seconds`` what is there is returned all the same. A name is without its last word, which
    is a shard's number.
    """
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(str(flow_run_id))]))
    deadline = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=chosen, limit=200)
            found = Counter((run.name.rpartition(" ")[0], str(run.state_name)) for run in runs)
            if all(found[kind] >= count for kind, count in expected.items()):
                return found
            if time.monotonic() > deadline:
                return found
            time.sleep(0.2)
