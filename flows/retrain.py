"""Retraining, the deployed flow: new data in; train, compare, judge; promote or reject.

It is the pipeline under a name and a schedule of its own. What has been asked, scored and trained
before is not done again. Rejecting is a normal outcome: the flow run is completed either way, and
its state says in its name and message what came of it.
"""

from prefect import flow
from prefect.states import Completed, State

from conf.schema import Experiment
from flows.pipeline import pipeline
from tasks.reporting import RunReport


@flow(name="retrain", flow_run_name="retrain {experiment.name}", validate_parameters=True)
def retrain(experiment: Experiment) -> RunReport:
    """Run the chain on what there is now, and put the best router into service if it earns it."""
    return outcome(pipeline(experiment))  # type: ignore[return-value]  # Prefect hands on its data


def outcome(report: RunReport) -> State[RunReport]:
    """Return the report as a state that a person, or an automation, can tell apart by name."""
    receipts = [pair.receipt for pair in report.pairs]
    promoted = any(receipt.passed() for receipt in receipts)
    return Completed(
        name="Promoted" if promoted else "Rejected",
        message="; ".join(receipt.title() for receipt in receipts),
        data=report,
    )
