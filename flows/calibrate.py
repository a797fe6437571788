"""Calibration: from a trained router to the threshold it is served with."""

from collections.abc import Sequence
from pathlib import Path

from prefect import flow

from conf.errors import ConfigError
from conf.schema import AnyExperiment, ThresholdRequest
from tasks.calibration_data import BENCHMARK, PIPELINE, logged_router
from tasks.thresholds import ChosenThreshold, choose_threshold, store_threshold


@flow(name="turnout-calibrate", flow_run_name="{request.router}", validate_parameters=True)
def calibrate(experiment: AnyExperiment, request: ThresholdRequest) -> ChosenThreshold:
    """Choose a router's threshold and store it where a gateway looks for it."""
    store = experiment.store
    # A router of the last finished run, or the promoted one.
    router = logged_router(store, request.router, pair=request.pair, kinds=(PIPELINE, BENCHMARK))

    # Queries it has not seen say which thresholds keep the promise; the cheapest is taken.
    found = choose_threshold(store, router, request, seed=experiment.seed)

    # On the router's run and its registered version, under the same names.
    store_threshold(store, router, found)
    return found


def threshold_request(
    router: str,
    *,
    pair: str | None = None,
    max_drop: str | None = None,
    confidence: str = "0.95",
    strong_share: str | None = None,
    data: str | None = None,
    quality_range: Sequence[str] | None = None,
) -> ThresholdRequest:
    """Return the request that the command line's words make; a drop in % is a relative one.

    >>> threshold_request("knn", max_drop="1%").max_drop_percent
    1.0
    >>> threshold_request("knn", strong_share="30%").strong_share
    0.3
    """
    relative = max_drop is not None and max_drop.strip().endswith("%")
    drop = None if max_drop is None else number("--max-drop", max_drop)
    return ThresholdRequest(
        router=router,
        pair=pair,
        max_drop=None if relative else drop,
        max_drop_percent=None if drop is None or not relative else round(100 * drop, 12),
        confidence=number("--confidence", confidence),
        strong_share=None if strong_share is None else number("--strong-share", strong_share),
        data=None if data is None else Path(data),
        quality_range=None if quality_range is None else _range(quality_range),
    )


def _range(words: Sequence[str]) -> tuple[float, float]:
    low, high = (number("--quality-range", word) for word in words)
    return low, high


def number(option: str, word: str) -> float:
    """Read 0.01 or 1% as a number."""
    digits = word.strip().removesuffix("%")
    try:
        return float(digits) / (100 if digits != word.strip() else 1)
    except ValueError:
        raise ConfigError(
            f"{option} is {word!r}. Expected a number such as 0.01, or a percentage such as 1%. "
            "Correct it."
        ) from None
