"""Pipeline runs with invented outcomes, logged to a real store as the pipeline logs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.llms import Pair
from conf.load import load_experiment
from conf.schema import Experiment
from tasks import gate, tracking
from tasks.receipt import Check, Receipt

PAIR = Pair(weak="small", strong="large")
KINDS = {"oracle": "oracle", "random": "random", "knn": "knn"}


@dataclass(frozen=True)
class LoggedRun:
    """A finished run and its routers' runs."""

    run_id: str
    routers: Mapping[str, str]


def experiment(directory: Path, name: str = "tiny", replicates: int = 200) -> Experiment:
    loaded = load_experiment(
        overrides=(f"store.directory={directory}", f"evaluation.replicates={replicates}")
    )
    llms = [
        loaded.llms[0].model_copy(update={"name": PAIR.weak}),
        loaded.llms[1].model_copy(update={"name": PAIR.strong}),
    ]
    return loaded.model_copy(update={"name": name, "pairs": (PAIR,), "llms": tuple(llms)})


def queries(count: int, *, seed: int = 0, first: int = 0) -> pa.Table:
    """Return evaluated queries: the strong LLM is better on the hard ones, and costs more."""
    rng = np.random.default_rng(seed)
    numbers = range(first, first + count)
    hard = rng.random(count)
    return pa.table(
        {
            "query_key": [f"key {number}" for number in numbers],
            "query_id": [f"{number:04}" for number in numbers],
            "text": [f"question {number}" for number in numbers],
            "domain": [("maths", "law", "a & b")[min(number % 10 // 4, 2)] for number in numbers],
            "weak_quality": 1 - hard,
            "strong_quality": 0.9 - 0.2 * hard + 0.1 * rng.random(count),
            "weak_cost_usd": np.full(count, 1e-6),
            "strong_cost_usd": 1e-5 * (1 + rng.random(count)),
        }
    )


def rates(table: pa.Table, noise: float, *, seed: int) -> np.ndarray:
    """Return win rates that know how hard a query is, up to some noise."""
    hard = 1 - table["weak_quality"].to_numpy()
    drawn = np.random.default_rng(seed).random(len(hard))
    return np.asarray((1 - noise) * hard + noise * drawn)


def log_run(
    settings: Experiment,
    table: pa.Table,
    routers: Mapping[str, np.ndarray],
    *,
    pairs: Sequence[str] = (PAIR.name(),),
    labels: bool = True,
) -> LoggedRun:
    """Log a finished run with these routers' win rates for each of the pairs."""
    store, client = settings.store, tracking.client(settings.store)
    for name, win_rate in routers.items():
        table = table.append_column(name, pa.array(win_rate))
    label = pa.table(
        {"query_key": table["query_key"], "probabilistic": table["weak_quality"].to_numpy()}
    )
    logged = {"win_rates": table} | ({"labels": label} if labels else {})
    ids = {}
    with tracking.parent_run(settings) as parent:
        for pair in pairs:
            for name in routers:
                tags = {tracking.PAIR_TAG: pair, "turnout.kind": KINDS.get(name, "mf")}
                with tracking.child_run(store, parent, name, tags=tags) as child:
                    ids[name] = child
                    if name != "oracle":
                        tracking.log_params(store, child, {"labels": "probabilistic"})
            with TemporaryDirectory() as folder:
                for name, rows in logged.items():
                    file = Path(folder, f"{name}.parquet")
                    pq.write_table(rows, file)
                    client.log_artifact(parent, str(file), f"{pair}/{name}")
    return LoggedRun(parent, ids)


def make_champion(settings: Experiment, router_run: str, directory: Path) -> None:
    """Register a version that came of a router's run, and point the alias at it."""
    client = tracking.client(settings.store)
    if not client.search_registered_models(f"name = '{PAIR.name()}'"):
        client.create_registered_model(PAIR.name())
    version = client.create_model_version(PAIR.name(), str(directory), run_id=router_run)
    client.set_registered_model_alias(PAIR.name(), "champion", str(version.version))


def log_receipt(settings: Experiment, router_run: str) -> Receipt:
    """Log what the gate said of a router: one check met, one not."""
    checks = (
        Check("APGR above chance", "0.6 [0.55, 0.65]", "interval above 0.5", passed=True),
        gate.champion_check("no query that the champion was not trained on", passed=False),
    )
    receipt = Receipt(*(PAIR.name(), "3", "mf", "bartscore", "abc", 120), checks, notes=("Note.",))
    client = tracking.client(settings.store)
    client.log_text(router_run, receipt.to_json(), "gate/receipt.json")
    return receipt
