"""Retraining, the deployed flow: new data in; train, compare, judge; promote or reject.

It is the experiment's own pipeline, of either kind, under a name and a schedule of its own. What
has been asked, scored and trained before is not done again. Rejecting is a normal outcome: the flow
run is completed either way, and its state says in its name and message what came of it.
"""

from typing import Annotated

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from conf.load import standard_gate
from conf.schema import AnyExperiment, PreferenceExperiment
from tasks.benchmark import PreferenceReport
from tasks.receipt import Receipt
from tasks.reporting import RunReport


@flow(name="retrain", flow_run_name="retrain {experiment.name}", validate_parameters=True)
def retrain(
    experiment: AnyExperiment, max_hours: Annotated[float, Field(gt=0)] | None = None
) -> RunReport | PreferenceReport:
    """Run the chain on what there is now, and put the best router into service if it earns it.

    After ``max_hours`` it is ended and has failed, so that later runs do not wait for it for ever.
    """
    # Prefect hands on the state's data.
    return outcome(_report(with_gate(experiment), max_hours))  # type: ignore[return-value]


def with_gate(experiment: AnyExperiment) -> AnyExperiment:
    """Return the experiment with the gate of conf/gate.yaml as it is now, unless it has its own."""
    if "gate" in experiment.model_fields_set:
        return experiment
    return experiment.model_copy(update={"gate": standard_gate()})


def _report(experiment: AnyExperiment, max_hours: float | None) -> RunReport | PreferenceReport:
    """Run the experiment; the stages of the other kind are not even imported."""
    seconds = None if max_hours is None else 3600 * max_hours
    if isinstance(experiment, PreferenceExperiment):
        from flows.preference_pipeline import preference_pipeline

        return preference_pipeline.with_options(timeout_seconds=seconds)(experiment)
    from flows.pipeline import pipeline

    return pipeline.with_options(timeout_seconds=seconds)(experiment)


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
