"""Drift: are the queries that come in still those that the champion was trained for?"""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from conf.errors import ConfigError
from conf.schema import AnyExperiment, DriftRequest, Experiment
from flows.calibrate import number
from flows.deploy import FULL_NAME, start_retrain
from tasks import tracking
from tasks.calibration_data import PIPELINE, logged_router
from tasks.drift import DriftReport, measure_drift
from tasks.judged_runs import KIND_TAG
from tasks.queries import query_table
from tasks.warehouse import table_digest


@flow(name="drift", flow_run_name="drift of {request.router}", validate_parameters=True)
def drift(experiment: AnyExperiment, request: DriftRequest) -> DriftReport:
    """Compare recent queries with those of the router's own run."""
    store = experiment.store
    # A router of the last finished run, or the promoted one.
    router = logged_router(store, request.router, pair=request.pair)

    # What it knew, by embedding and by win rate, against what came in since.
    report = measure_drift(store, router, request, seed=experiment.seed)

    create_markdown_artifact(key="drift", markdown=report.to_markdown(), description=report.pair)
    return report


def retrained(experiment: AnyExperiment) -> str:
    """Retrain, on a worker where there is a deployment and else here; return what was done.

    Nothing is done where there is nothing new to learn from, or a run that drift started is still
    to come: each later call would find the same drift.
    """
    if (known := learnt_by(experiment)) is not None:
        return (
            f"Nothing new to learn from: run {known[:8]} had exactly these queries. The drifted "
            f"ones have to be among them first: add them to {_source(experiment)}."
        )
    run = start_retrain(experiment)
    if run is not None and not run.is_new:
        return f"Flow run {run.name}, which drift has started before, has not ended: none is added."
    if run is not None:
        return f"Started {FULL_NAME} as flow run {run.name}: a worker takes it up."
    from flows.retrain import receipts_of, retrain

    receipts = receipts_of(retrain(experiment))
    return "Retrained here. " + " ".join(receipt.summary() for receipt in receipts)


def learnt_by(experiment: AnyExperiment) -> str | None:
    """Return a finished run that had exactly the experiment's present queries; None for none.

    An experiment on battles asks no queries: whether its battles are new shows when it runs.
    """
    store = experiment.store
    if not isinstance(experiment, Experiment) or (
        store.is_local() and not (store.directory / "mlflow.db").exists()
    ):
        return None
    digest = table_digest(query_table(experiment.queries))
    found = tracking.client(store).search_runs(
        [tracking.experiment_id(store)],
        f"tags.`{KIND_TAG}` = '{PIPELINE}' AND attributes.status = 'FINISHED' "
        f"AND dataset.digest = '{digest}'",
        max_results=1,
    )
    return found[0].info.run_id if found else None


def _source(experiment: AnyExperiment) -> str:
    if isinstance(experiment, Experiment) and experiment.queries.source == "file":
        return f"{experiment.queries.path} (queries.path)"
    return "a file or folder of your own, and set queries.source=file and queries.path to it"


def drift_request(
    queries: Path,
    *,
    router: str,
    pair: str | None = None,
    false_alarm_rate: str = "0.01",
    smallest_shift: str = "0.25",
) -> DriftRequest:
    """Return the request that the command line's words make.

    >>> drift_request(Path("log"), router="champion", false_alarm_rate="5%").false_alarm_rate
    0.05
    """
    rate = _share("--false-alarm-rate", false_alarm_rate, below=0.5)
    shift = _share("--smallest-shift", smallest_shift, below=1.0)
    return DriftRequest(
        queries=queries,
        router=router,
        pair=pair,
        false_alarm_rate=rate,
        smallest_shift=shift,
    )


def _share(option: str, word: str, *, below: float) -> float:
    """Read 0.01 or 1% as a share above 0 and below a bound."""
    share = number(option, word)
    if not 0 < share < below:
        raise ConfigError(
            f"{option} is {word!r}. Expected a share above 0 and below {below:g}, such as 0.01 or "
            "1%. Correct it."
        )
    return share
