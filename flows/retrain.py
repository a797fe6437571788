"""Retraining, the deployed flow: new data in; train, compare, judge; promote or reject.

It is the experiment's own pipeline, of either kind, under a name and a schedule of its own. What
has been asked, scored and trained before is not done again. Rejecting is a normal outcome: the flow
run is completed either way, and its state says in its name and message what came of it.
"""

from prefect import flow
from prefect.states import Completed, State

from conf.schema import AnyExperiment, PreferenceExperiment
from tasks.benchmark import PreferenceReport
from tasks.gate import Receipt
from tasks.reporting import RunReport


@flow(name="retrain", flow_run_name="retrain {experiment.name}", validate_parameters=True)
def retrain(experiment: AnyExperiment) -> RunReport | PreferenceReport:
    """Run the chain on what there is now, and put the best router into service if it earns it."""
    # Prefect hands on the state's data.
    return outcome(_report(experiment))  # type: ignore[return-value]


def _report(experiment: AnyExperiment) -> RunReport | PreferenceReport:
    """Run the experiment; the stages of the other kind are not even imported."""
    if isinstance(experiment, PreferenceExperiment):
        from flows.preference_pipeline import preference_pipeline

        return preference_pipeline(experiment)
    from flows.pipeline import pipeline

    return pipeline(experiment)


def receipts_of(report: RunReport | PreferenceReport) -> list[Receipt]:
    """Return the gate's receipts: of each pair, and of the pool where there is one."""
    if isinstance(report, PreferenceReport):
        return [report.receipt]
    pool = [] if report.pool is None else [report.pool.receipt]
    return [*(pair.receipt for pair in report.pairs), *pool]


def outcome(report: RunReport | PreferenceReport) -> State[RunReport | PreferenceReport]:
    """Return the report as a state that a person, or an automation, can tell apart by name."""
    receipts = receipts_of(report)
    promoted = any(receipt.passed() for receipt in receipts)
    return Completed(
        name="Promoted" if promoted else "Rejected",
        message="; ".join(receipt.title() for receipt in receipts),
        data=report,
    )
