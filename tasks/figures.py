"""Figures: matplotlib pictures of a comparison, made to be read at a glance."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from conf.llms import Pair
from router_models.calibration import reliability
from router_models.frontier import RankedQueries, cost_quality_curve
from router_models.statistics import Estimate, resamples
from tasks.evaluation import CONTROLS, ORACLE, Comparison, groups_of
from tasks.labelling import KINDS, LabelSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; without yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#7f7f7f"
BAND_COSTS = np.arange(101) / 100
# Bands are drawn, not decided by: their ends may be a little rougher than an interval's.
BAND_REPLICATES = 500


def pair_figures(label_set: LabelSet, comparison: Comparison) -> "dict[str, Figure]":
    """Return every figure of one pair by file name."""
    return {
        "cost_quality.png": cost_quality(comparison),
        "relaxation.png": relaxation(label_set),
        "labels.png": label_histogram(label_set),
        "reliability.png": reliability_diagram(label_set, comparison),
        "win_rate_by_domain.png": win_rate_by_domain(comparison),
    }


def cost_quality(comparison: Comparison) -> "Figure":
    """Return all routers' cost-quality curves with random, oracle and both LLMs."""
    table = comparison.table.read()
    apgr = {name: found["apgr"] for name, found in comparison.estimates.items()}
    how = "out-of-fold" if comparison.out_of_fold else "held-out"
    return quality_curves(
        {name: table[name].to_numpy() for name in apgr},
        *(table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy()),
        apgr=apgr,
        kinds={name: name for name in apgr},
        banded=[comparison.best],
        pair=comparison.pair,
        metric=comparison.metric,
        title=f"Cost and quality on {comparison.queries} {how} queries",
        groups=groups_of(table),
    )


def quality_curves(
    win_rates: Mapping[str, np.ndarray],
    weak: np.ndarray,
    strong: np.ndarray,
    *,
    apgr: Mapping[str, Estimate],
    kinds: Mapping[str, str],
    banded: Sequence[str],
    pair: Pair,
    metric: str,
    title: str,
    groups: np.ndarray,
    seed: int = 0,
) -> "Figure":
    """Return cost-quality curves, best APGR first; those ``banded`` thick, with their band.

    kinds: name → kind of router; random, length and oracle are grey. groups: as for `resamples`.
    """
    figure, axes = _figure(8, 5)
    colours = cycle(COLOURS)
    level = next(iter(apgr.values())).interval.level
    percent = f"{100 * level:g} %"
    for name in sorted(apgr, key=lambda name: -np.nan_to_num(apgr[name].value)):
        curve = cost_quality_curve(win_rates[name], weak, strong)
        interval = apgr[name].interval
        colour = GREY if kinds[name] in CONTROLS else next(colours)
        axes.plot(
            100 * curve.cost,
            curve.quality,
            color=colour,
            linestyle={ORACLE: ":", "random": "--", "length": "-."}.get(kinds[name], "-"),
            linewidth=2.4 if name in banded else 1.4,
            label=f"{name}  {apgr[name].value:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
        )
        if name in banded:
            low, high = quality_band(
                win_rates[name], weak, strong, level=level, seed=seed, groups=groups
            )
            axes.fill_between(100 * BAND_COSTS, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot([0, 100], [weak.mean(), strong.mean()], color="black", linewidth=0.8, alpha=0.5)
    _note(axes, f"all {pair.weak}", at=(0, weak.mean()), offset=(10, -5))
    _note(axes, f"all {pair.strong}", at=(100, strong.mean()), offset=(-4, 22))
    axes.set_xlabel(f"queries sent to {pair.strong}, %")
    axes.set_ylabel(f"mean quality ({metric})")
    bands = f"band: {percent} at each cost by itself" if banded else ""
    axes.set_title("\n".join(line for line in (title, bands) if line), fontsize=10)
    axes.legend(title=f"APGR with {percent} interval", loc="lower right", fontsize=8, frameon=False)
    return figure


def quality_band(
    win_rate: np.ndarray,
    weak: np.ndarray,
    strong: np.ndarray,
    *,
    level: float,
    replicates: int = BAND_REPLICATES,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends (101,) of the bootstrap band of a curve at costs 0, 0.01 … 1.

    Pointwise: at each cost by itself the interval has this level; the whole curve lies within the
    band less often.
    """
    ranked = RankedQueries(win_rate, weak, strong)
    drawn = np.array(
        [
            ranked.curve(counts).quality_at(BAND_COSTS)
            for counts in resamples(len(weak), replicates=replicates, seed=seed, groups=groups)
        ]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def arms_figure(
    arms: Mapping[str, np.ndarray],
    weak: np.ndarray,
    strong: np.ndarray,
    *,
    metric: str,
    title: str,
) -> "Figure":
    """Return the gate's arms, name → (N,) win rates, on the queries that all of them have."""
    rows = np.flatnonzero(~np.any([np.isnan(rate) for rate in arms.values()], axis=0))
    if len(rows) == 0:
        return arms_figure(
            {name: rate for name, rate in arms.items() if not np.isnan(rate).all()},
            *(weak, strong),
            metric=metric,
            title=title,
        )
    styles = {"candidate": "-", "champion": "-", "kNN": "-", "random": "--", ORACLE: ":"}
    colours = {"candidate": COLOURS[0], "champion": COLOURS[1], "kNN": COLOURS[2]}
    figure, axes = _figure(8, 5)
    for name, rate in arms.items():
        curve = cost_quality_curve(rate[rows], weak[rows], strong[rows])
        axes.plot(
            100 * curve.cost,
            curve.quality,
            color=colours.get(name, GREY),
            linestyle=styles.get(name, "-"),
            linewidth=2.4 if name == "candidate" else 1.4,
            label=f"{name}  {curve.apgr():.3f}",
        )
    axes.set_xlabel("queries sent to the strong LLM, %")
    axes.set_ylabel(f"mean quality ({metric})")
    axes.set_title(f"{title}\n{len(rows)} queries", fontsize=9, wrap=True)
    axes.legend(title="APGR", loc="lower right", fontsize=8, frameon=False)
    return figure


def relaxation(label_set: LabelSet) -> "Figure":
    """Return f(t) with t*."""
    curve = label_set.curve.read()
    t, objective = curve["t"].to_numpy(), curve["objective"].to_numpy()
    figure, axes = _figure(6, 4)
    axes.step(t, objective, where="post", color=COLOURS[0])
    axes.axvline(label_set.t, color=COLOURS[1], linestyle="--")
    _note(axes, f"t* = {label_set.t:.3g}", at=(label_set.t, 0), offset=(6, 10))
    axes.set_xlabel("relaxation t, in quality units")
    axes.set_ylabel("mean difference of two labels, f(t)")
    degenerate = " (degenerate: equals the probabilistic labels)" if label_set.degenerate else ""
    axes.set_title(f"Choice of the relaxation{degenerate}")
    axes.set_ylim(bottom=0)
    return figure


def label_histogram(label_set: LabelSet) -> "Figure":
    """Return the distribution of the three kinds of labels."""
    labels = label_set.labels.read()
    figure, axes = _figure(6, 4)
    axes.hist(
        [labels[kind].to_numpy() for kind in KINDS],
        bins=11,
        range=(0, 1),
        label=list(KINDS),
        color=COLOURS[: len(KINDS)],
    )
    axes.set_xlabel(f"label: how often {label_set.pair.weak} is enough")
    axes.set_ylabel("queries")
    axes.set_title(f"Labels of {labels.num_rows} queries")
    axes.legend(frameon=False)
    return figure


def reliability_diagram(label_set: LabelSet, comparison: Comparison) -> "Figure":
    """Return predicted against observed win rates, by the labels each router is trained on."""
    labels = label_set.labels.read()
    row_of = {key: row for row, key in enumerate(labels["query_key"].to_pylist())}
    table = comparison.table.read()
    rows = [row_of[key] for key in table["query_key"].to_pylist()]
    return reliability_curves(
        {
            name: (table[name].to_numpy(), 1 - labels[kind].to_numpy()[rows])
            for name, kind in comparison.label_kinds.items()
            if name not in CONTROLS and kind in labels.column_names
        }
    )


def reliability_curves(routers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Figure":
    """Return, for each router, (N,) predicted against (N,) observed win rates, in ten bins."""
    figure, axes = _figure(5, 5)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, alpha=0.5)
    for colour, (name, (rate, observed)) in zip(cycle(COLOURS), routers.items(), strict=False):
        found = reliability(rate, observed, bins=10)
        label = f"{name}, off by {found.ece():.3f}"
        axes.plot(
            found.mean_win_rate, found.mean_outcome, "o-", color=colour, label=label, markersize=4
        )
    axes.set_xlabel("predicted win rate of the strong LLM")
    axes.set_ylabel("observed win rate, by the router's own kind of label")
    axes.set_title("Reliability")
    if routers:
        axes.legend(frameon=False, fontsize=8)
    return figure


def win_rate_by_domain(comparison: Comparison) -> "Figure":
    """Return the best router's win rates, a box for each domain, highest first."""
    table = comparison.table.read()
    domain = [name or "(none)" for name in table["domain"].to_pylist()]
    rate = table[comparison.best].to_numpy()
    return domain_boxes(rate, domain, router=comparison.best, strong=comparison.pair.strong)


def domain_boxes(rate: np.ndarray, domains: Sequence[str], *, router: str, strong: str) -> "Figure":
    """Return (N,) win rates of one router, a box for each domain, highest median first."""
    domain = np.array(domains)
    names = sorted(set(domains), key=lambda name: -np.median(rate[domain == name]))[:20]
    figure, axes = _figure(7, 0.45 * len(names) + 1.5)
    boxes: Sequence[np.ndarray] = [rate[domain == name] for name in names]
    axes.boxplot(boxes, orientation="horizontal", tick_labels=names)
    axes.invert_yaxis()
    axes.set_xlabel(f"win rate by {router}")
    axes.set_title(f"Where {strong} is needed")
    return figure


def _note(axes: "Axes", text: str, *, at: tuple[float, float], offset: tuple[float, float]) -> None:
    """Write beside a point, ``offset`` points away; to the left of it where that is negative."""
    side = "right" if offset[0] < 0 else "left"
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=8, ha=side)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
