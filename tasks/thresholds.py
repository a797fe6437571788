"""Thresholds: choose the win rate from which the strong LLM is called, and store it.

The mathematics is `router_models.calibration`, the data `tasks.calibration_data`. Here is what is
asked, what is answered, and what is said when nothing can be promised. Longer than most files for
the messages: a promise that cannot be had should come with one that can.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from prefect import task

from conf.errors import DataError
from conf.schema import Store, ThresholdRequest
from router_models.calibration import (
    FEWEST_FOR_T_TEST,
    DropBound,
    drop_upper_bound,
    threshold_for_strong_share,
    threshold_naive,
    threshold_with_guarantee,
)
from tasks import tracking
from tasks.calibration_data import CalibrationRows, LoggedRouter, file_rows, logged_rows

LEVEL = 0.95


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold, what to expect of it, and what its promise rests on."""

    router: str
    pair: str
    metric: str
    run_id: str
    model_version: str | None
    model: str
    """`router-<name>-<threshold>`, as a gateway is asked for it."""
    threshold: float
    """The strong LLM is called iff win rate ≥ threshold."""
    source: str
    queries: int
    left_out: int
    wanted_strong_share: float | None
    strong_share: float
    strong_share_low: float
    """Ends of the exact 95 % interval for further traffic of this kind (Clopper-Pearson)."""
    strong_share_high: float
    max_drop: float | None
    """ε in quality units."""
    confidence: float | None
    drop: float | None
    """Mean quality lost against all-strong on these queries; None without qualities."""
    drop_upper: float | None
    """Upper bound of the mean loss: ε where promised, else a 95 % one. None where nothing can be
    said, for want of qualities or of queries."""
    method: str
    p_value: float | None
    assumption: str
    naive: Mapping[str, float] | None
    """What picking by these queries alone would give: threshold, strong_share, drop. No promise."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return (what, value) lines for people."""
        kept = f", {self.left_out} left out that it was trained on" if self.left_out else ""
        wanted = ""
        if self.wanted_strong_share is not None:
            # Equal win rates cannot be split: the share may fall short, and that should be seen.
            wanted = f", wanted at most {_percent(self.wanted_strong_share)}"
        lines = [
            ("model", self.model),
            ("threshold", f"{self.threshold:g}: strong LLM from this win rate on"),
            ("calibrated on", f"{self.queries} queries of {self.source}{kept}"),
            (
                "strong share",
                f"{_percent(self.strong_share)} "
                f"[{_percent(self.strong_share_low)}, {_percent(self.strong_share_high)}]{wanted}",
            ),
        ]
        if self.drop is not None:
            level = f"{100 * (self.confidence or LEVEL):g} %"
            bound = "too few queries, or losses, to bound it for others"
            if self.drop_upper is not None:
                bound = f"at most {self.drop_upper:.4g} with {level} confidence"
            lines.append((f"drop of {self.metric}", f"{self.drop:.4g} here, {bound}"))
        lines += [("method", self.method), ("holds if", self.assumption)]
        if self.naive is not None:
            lines.append(
                (
                    "naive choice",
                    f"{self.naive['threshold']:g}, strong share "
                    f"{_percent(self.naive['strong_share'])}: without any guarantee",
                )
            )
        return lines


@task(task_run_name="calibrate {router.name}")
def choose_threshold(
    store: Store, router: LoggedRouter, request: ThresholdRequest, *, seed: int
) -> ChosenThreshold:
    """Choose a router's threshold on its logged unseen queries, or on a file's."""
    promised = request.strong_share is None
    if request.data is None:
        rows = logged_rows(store, router, labelled=promised)
    else:
        rows = file_rows(store, router, request.data, labelled=promised)
    if request.quality_range is not None:
        rows = replace(rows, quality_range=request.quality_range)
    return chosen(router, rows, request, seed=seed)


@task(task_run_name="store the threshold of {router.name}")
def store_threshold(store: Store, router: LoggedRouter, found: ChosenThreshold) -> None:
    """Write the threshold to the router's run and, if it is registered, to its version."""
    client = tracking.client(store)
    tags = threshold_tags(found)
    stale = [key for key, value in tags.items() if value is None]
    logged = client.get_run(router.run_id).data.tags
    for key, value in tags.items():
        if value is not None:
            client.set_tag(router.run_id, key, value)
    for key in stale:
        if key in logged:
            client.delete_tag(router.run_id, key)
    client.log_text(router.run_id, json.dumps(found.to_json(), indent=2), "threshold.json")
    if router.version is None:
        return
    model, version = router.version.model, router.version.version
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(model, version, key, value)
    for key in stale:
        client.delete_model_version_tag(model, version, key)


def threshold_tags(found: ChosenThreshold) -> dict[str, str | None]:
    """Return the tags that tell a gateway the threshold; None for what does not apply."""
    values = {
        "threshold": found.threshold,
        "threshold_max_drop": found.max_drop,
        "threshold_confidence": found.confidence,
        "threshold_strong_share": found.wanted_strong_share,
        "threshold_queries": found.queries,
        "threshold_method": found.method,
        "threshold_assumption": found.assumption,
    }
    return {key: None if value is None else str(value) for key, value in values.items()}


def chosen(
    router: LoggedRouter, rows: CalibrationRows, request: ThresholdRequest, *, seed: int
) -> ChosenThreshold:
    """Choose the threshold that ``request`` asks for; one that cannot be had is an error."""
    from scipy.stats import binomtest

    rate, queries = rows.win_rate, len(rows.win_rate)
    if request.strong_share is not None:
        alpha = threshold_for_strong_share(rate, request.strong_share)
        bound = _share_drop_bound(rows, alpha, seed)
        about: dict[str, Any] = {
            "method": "quantile of win rates",
            "p_value": None,
            "max_drop": None,
            "confidence": None,
            "assumption": "; ".join(
                ["further traffic is like this", *([bound.assumption] if bound else [])]
            ),
            "naive": None,
        }
        upper = bound.upper if bound and np.isfinite(bound.upper) else None
    else:
        alpha, about = _promised(router, rows, request, seed=seed)
        upper = about["max_drop"]
    threshold = readable_threshold(alpha, rate)
    to_strong = rate >= threshold
    interval = binomtest(int(to_strong.sum()), queries).proportion_ci(LEVEL, method="exact")
    drop = None
    if rows.weak_quality is not None and rows.strong_quality is not None:
        drop = float(((rows.strong_quality - rows.weak_quality) * ~to_strong).mean())
    return ChosenThreshold(
        router=router.name,
        pair=router.pair.name(),
        metric=router.metric,
        run_id=router.run_id,
        model_version=None if router.version is None else router.version.version,
        model=f"router-{router.name}-{_decimal(threshold)}",
        threshold=threshold,
        source=rows.source,
        queries=queries,
        left_out=rows.left_out,
        wanted_strong_share=request.strong_share,
        strong_share=float(to_strong.mean()),
        strong_share_low=float(interval.low),
        strong_share_high=float(interval.high),
        drop=drop,
        drop_upper=upper,
        **about,
    )


def _promised(
    router: LoggedRouter, rows: CalibrationRows, request: ThresholdRequest, *, seed: int
) -> tuple[float, dict[str, Any]]:
    """Return the cheapest α whose drop is promised to be small, and what is said about it."""
    rate, weak, strong = rows.win_rate, rows.weak_quality, rows.strong_quality
    assert weak is not None
    assert strong is not None
    max_drop, confidence = _largest_drop(request, strong), request.confidence
    _refuse_one_class(weak, strong, rows.source)
    found = threshold_with_guarantee(
        rate,
        weak,
        strong,
        max_drop=max_drop,
        confidence=confidence,
        quality_range=rows.quality_range,
        seed=seed,
    )
    exact = "exact" in found.assumption
    if found.p_value is None or (not exact and len(rate) < FEWEST_FOR_T_TEST):
        raise _too_few(rows, max_drop, confidence, exact=exact)
    if found.strong_share == 1.0:
        raise _unattainable(router.name, rows, max_drop, confidence, seed=seed)
    naive = threshold_naive(rate, weak, strong, max_drop=max_drop)
    conditions = [found.assumption, rows.condition]
    if request.max_drop_percent is not None:
        conditions.append(
            f"{request.max_drop_percent:g} % of the mean strong quality measured here"
        )
    return found.threshold, {
        "method": f"Learn then Test, {'betting' if exact else 't-test'}",
        "p_value": found.p_value,
        "max_drop": max_drop,
        "confidence": confidence,
        "assumption": "; ".join(condition for condition in conditions if condition),
        "naive": {
            "threshold": naive.threshold,
            "strong_share": naive.strong_share,
            "drop": naive.drop,
        },
    }


def _largest_drop(request: ThresholdRequest, strong: np.ndarray) -> float:
    if request.max_drop is not None:
        return request.max_drop
    assert request.max_drop_percent is not None
    largest = request.max_drop_percent / 100 * abs(float(strong.mean()))
    if largest == 0.0:
        raise DataError(
            f"The strong LLM's mean quality is 0, so {request.max_drop_percent:g} % of it is no "
            "drop at all. Expected a quality to take a share of. Give --max-drop in quality units."
        )
    return largest


def _share_drop_bound(rows: CalibrationRows, alpha: float, seed: int) -> DropBound | None:
    """Return the one-sided bound of the drop; α did not look at qualities, so it is an honest one.

    None without qualities.
    """
    if rows.weak_quality is None or rows.strong_quality is None:
        return None
    return drop_upper_bound(
        rows.win_rate,
        rows.weak_quality,
        rows.strong_quality,
        threshold=alpha,
        confidence=LEVEL,
        quality_range=rows.quality_range,
        seed=seed,
    )


def readable_threshold(alpha: float, win_rate: np.ndarray) -> float:
    """Return the shortest decimal ≤ α, of at least two places, that splits the win rates alike.

    What is promised for α is promised for everything below it, and a number between two win rates
    decides alike on a machine that rounds differently.

    >>> readable_threshold(0.4567891, np.array([0.1, 0.45612, 0.4567891]))
    0.4567
    """
    below = win_rate[win_rate < alpha]
    floor = Decimal(float(below.max())) if len(below) else Decimal(-1)
    exact = Decimal(float(alpha))
    for places in range(2, 18):
        rounded = exact.quantize(Decimal(1).scaleb(-places), rounding=ROUND_FLOOR)
        if rounded > floor:
            return float(rounded)
    return float(alpha)


def _decimal(threshold: float) -> str:
    """Write a threshold without an exponent, so that it can stand in a model's name."""
    return f"{Decimal(repr(threshold)):f}"


def _refuse_one_class(weak: np.ndarray, strong: np.ndarray, source: str) -> None:
    gaps = np.unique(strong - weak)
    if len(gaps) == 1:
        raise DataError(
            f"In all {len(weak)} rows of {source} strong − weak quality is {gaps[0]:g}. Expected "
            "rows in which it differs, or there is nothing to decide by. Check the columns, or "
            "use --strong-share."
        )


def _too_few(
    rows: CalibrationRows, max_drop: float, confidence: float, *, exact: bool
) -> DataError:
    queries, quality_range = len(rows.win_rate), rows.quality_range
    if not exact:
        return DataError(
            f"{queries} queries are too few for a t-test on an unbounded quality. Expected at "
            f"least {FEWEST_FOR_T_TEST}, better hundreds. Add queries to --data."
        )
    fewest = _smallest(
        lambda size: _certifiable(size, max_drop, confidence, quality_range), queries
    )
    largest = 1.0 if quality_range is None else quality_range[1] - quality_range[0]
    least = largest
    while least > 1e-4 * largest and _certifiable(queries, 0.95 * least, confidence, quality_range):
        least *= 0.95
    possible = (
        f"or allow a drop of {least:.2g}, the smallest that can be certified with these"
        if least < largest
        else "for with these no drop can be certified"
    )
    return DataError(
        f"{queries} queries are too few to certify a drop of at most {max_drop:.4g} with "
        f"confidence {confidence:g}. Expected at least {fewest}, and more where quality is lost. "
        f"Add queries to --data, {possible}."
    )


def _certifiable(
    queries: int,
    max_drop: float,
    confidence: float,
    quality_range: tuple[float, float] | None,
) -> bool:
    """Tell whether so many queries could certify anything, were nothing lost at all."""
    same = np.full(queries, 1.0 if quality_range is None else quality_range[1])
    found = threshold_with_guarantee(
        np.zeros(queries),
        same,
        same,
        max_drop=max_drop,
        confidence=confidence,
        quality_range=quality_range,
    )
    return found.p_value is not None


def _smallest(holds: Callable[[int], bool], start: int) -> int:
    """Return the smallest number above ``start`` for which a growing condition holds."""
    low, high = start, 2 * start
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _unattainable(
    name: str, rows: CalibrationRows, max_drop: float, confidence: float, *, seed: int
) -> DataError:
    assert rows.weak_quality is not None
    assert rows.strong_quality is not None
    columns = (rows.win_rate, rows.weak_quality, rows.strong_quality)
    largest = float(np.abs(rows.strong_quality - rows.weak_quality).max())
    advice, larger = "Use more queries or a better router", max_drop
    while (larger := float(f"{1.25 * larger:.2g}")) < largest:
        saving = threshold_with_guarantee(
            *columns,
            max_drop=larger,
            confidence=confidence,
            quality_range=rows.quality_range,
            seed=seed,
        )
        if saving.strong_share < 1.0:
            share = _percent(saving.strong_share)
            advice += f", or allow {larger:g}, which would need the strong LLM for {share}"
            break
    return DataError(
        f"No threshold of {name} is shown to keep the drop within {max_drop:.4g} with confidence "
        f"{confidence:g} on {len(rows.win_rate)} queries. Expected one that sends some of them to "
        f"the weak LLM. {advice}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
