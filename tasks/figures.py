"""Figures: matplotlib pictures of a comparison, made to be read at a glance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from router_models.calibration import reliability
from router_models.frontier import cost_quality_curve
from tasks.evaluation import CONTROLS, ORACLE, Comparison
from tasks.labelling import KINDS, LabelSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
GREY = "#7f7f7f"


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
    weak, strong = table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy()
    figure, axes = _figure(8, 5)
    apgr = {name: found["apgr"] for name, found in comparison.estimates.items()}
    colours = iter(COLOURS * 3)
    for name in sorted(apgr, key=lambda name: -np.nan_to_num(apgr[name].value)):
        curve = cost_quality_curve(table[name].to_numpy(), weak, strong)
        control = name in CONTROLS
        interval = apgr[name].interval
        axes.plot(
            100 * curve.cost,
            curve.quality,
            color=GREY if control else next(colours),
            linestyle={ORACLE: ":", "random": "--", "length": "-."}.get(name, "-"),
            linewidth=2.4 if name == comparison.best else 1.4,
            label=f"{name}  {apgr[name].value:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
        )
    axes.plot([0, 100], [weak.mean(), strong.mean()], color="black", linewidth=0.8, alpha=0.5)
    _note(axes, f"all {comparison.pair.weak}", at=(0, weak.mean()), offset=(10, -5))
    _note(axes, f"all {comparison.pair.strong}", at=(100, strong.mean()), offset=(-4, 8))
    axes.set_xlabel(f"queries sent to {comparison.pair.strong}, %")
    axes.set_ylabel(f"mean quality ({comparison.metric})")
    how = "out-of-fold" if comparison.out_of_fold else "held-out"
    axes.set_title(f"Cost and quality on {comparison.queries} {how} queries")
    axes.legend(title="APGR with 95 % interval", loc="lower right", fontsize=8, frameon=False)
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
    figure, axes = _figure(5, 5)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, alpha=0.5)
    learned = [name for name in comparison.label_kinds if name not in CONTROLS]
    for colour, name in zip(COLOURS, learned, strict=False):
        observed = 1 - labels[comparison.label_kinds[name]].to_numpy()[rows]
        found = reliability(table[name].to_numpy(), observed, bins=10)
        label = f"{name}, off by {found.ece():.3f}"
        axes.plot(
            found.mean_win_rate, found.mean_outcome, "o-", color=colour, label=label, markersize=4
        )
    axes.set_xlabel("predicted win rate of the strong LLM")
    axes.set_ylabel("observed win rate, by the router's own kind of label")
    axes.set_title("Reliability")
    axes.legend(frameon=False, fontsize=8)
    return figure


def win_rate_by_domain(comparison: Comparison) -> "Figure":
    """Return the best router's win rates, a box for each domain, highest first."""
    table = comparison.table.read()
    domain = np.array([name or "(none)" for name in table["domain"].to_pylist()])
    rate = table[comparison.best].to_numpy()
    names = sorted(set(domain), key=lambda name: -np.median(rate[domain == name]))[:20]
    figure, axes = _figure(7, 0.45 * len(names) + 1.5)
    boxes: Sequence[np.ndarray] = [rate[domain == name] for name in names]
    axes.boxplot(boxes, orientation="horizontal", tick_labels=names)
    axes.invert_yaxis()
    axes.set_xlabel(f"win rate by {comparison.best}")
    axes.set_title(f"Where {comparison.pair.strong} is needed")
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
