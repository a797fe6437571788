"""`turnout compare`: routers of several runs, side by side on the queries that they share.

A plain function and not a Prefect flow: it reads what was logged, decides nothing and changes
nothing, so there is nothing to retry or to look up later, and it should answer at once.
"""

from collections.abc import Sequence
from pathlib import Path

from conf.schema import AnyExperiment
from tasks import tracking
from tasks.comparison_report import write_report
from tasks.judged_runs import champion_run, judged_run, last_run, named_run, parent_of
from tasks.run_comparison import RunComparison, compare_runs


def compare(
    experiment: AnyExperiment,
    asked: Sequence[str] = (),
    *,
    pair: str | None = None,
    report: Path | None = None,
) -> RunComparison:
    """Compare the routers of these runs, by default the last run's and the champion's run's.

    asked: names of runs, or beginnings of their ids. report: file that the HTML report goes to.
    """
    store = experiment.store
    if asked:
        runs = list(dict.fromkeys(named_run(store, one) for one in asked))
    else:
        newest = judged_run(store, last_run(store), pair)
        champions = parent_of(store, champion_run(store, newest.pair.name()))
        runs = list(dict.fromkeys([newest.run_id, champions or newest.run_id]))
    found = compare_runs(
        store, runs, pair=pair, evaluation=experiment.evaluation, seed=experiment.seed
    )
    if report is not None:
        write_report(found, report)
    return found


def compare_url(experiment: AnyExperiment, found: RunComparison) -> str:
    """Return MLflow's page on which the compared routers' runs stand side by side."""
    ids = [run_id for one in found.contenders for run_id in one.run_ids]
    return tracking.compare_url(experiment.store, ids)
