"""Promotion and rollback by hand: `turnout promote VERSION` and `turnout rollback`."""

from prefect import flow

from conf.errors import ConfigError, unknown_name
from conf.schema import AnyExperiment, Experiment
from tasks import promotion
from tasks.pool import pool_model
from tasks.promotion import Aliases


@flow(name="promote", flow_run_name="promote version {version}", validate_parameters=True)
def promote(
    experiment: AnyExperiment, version: str, model: str | None = None, force: str | None = None
) -> Aliases:
    """Make a registered version the champion of its pair.

    force: why a version is promoted that the gate has not passed.
    """
    store, name = experiment.store, registered_model(experiment, model)
    why = promotion.check_may_be_promoted(store, name, version, force)
    return promotion.promote(store, name, version, why=why, forced=force is not None)


@flow(name="rollback", validate_parameters=True)
def rollback(experiment: AnyExperiment, model: str | None = None) -> Aliases:
    """Make the previous champion the champion again, and the champion the previous one.

    The version it leaves is not promoted again by a retraining, only by `promote` with ``force``.
    """
    return promotion.rollback(experiment.store, registered_model(experiment, model))


def registered_model(experiment: AnyExperiment, model: str | None) -> str:
    """Return the registered model that is meant: the one named, or that of the only pair.

    A pool, which chooses among all LLMs, has a model too and is meant by its name only.
    """
    known = registered_models(experiment)
    if model is None and len(experiment.pairs) == 1:
        return known[0]
    if model is None:
        raise ConfigError(
            f"The experiment has {len(known)} registered models: {', '.join(known)}. Expected one "
            "to be named. Choose it with --pair."
        )
    if model not in known:
        raise ConfigError(unknown_name("pair", model, known) + " Choose one with --pair.")
    return model


def registered_models(experiment: AnyExperiment) -> list[str]:
    """Return the names of all its registered models: of its pairs, then of its pool."""
    known = [pair.name() for pair in experiment.pairs]
    if isinstance(experiment, Experiment) and experiment.pool is not None:
        known.append(pool_model(experiment))
    return known


def settle_promotions(experiment: AnyExperiment) -> None:
    """Finish or undo what killed promotions left, before a run spends time and money."""
    for model in registered_models(experiment):
        promotion.settle(experiment.store, model)
