"""Pictures: of a search its lineage, its progress, and where the best algorithm spends the budget; of a comparison
its methods against sparsity."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from autoprune.models.perplexity import perplexity
from autoprune.pipeline.lineage import Candidate, Lineage, paired_difference

# One colour per operator, from the Okabe–Ito palette, which colour-blind readers can tell apart.
COLOURS = {
    "seed": "#000000",
    "explore": "#0072B2",
    "crossover": "#CC79A7",
    "mutate": "#E69F00",
    "tune": "#56B4E9",
    "simplify": "#009E73",
    "repair": "#D55E00",
}
OTHER = "#999999"
QUIET = "#8a8a8a"
COLUMN = 0.9  # inches for each generation
LABEL = 0.75  # inches between the middles of two labels that do not touch
PATH = "#222222"
# Rows of the summary's table drawn as lines, and how: uniform, our allocation, and what nothing is removed of.
REFERENCES = {"wanda": "--", "wanda+sdsa": ":", "dense": "-"}
OUTLIER = 1.4  # candidates above this multiple of the worst that matters are drawn at the upper edge
ALLOCATIONS = ("uniform", "owl", "dlp", "atp", "dsa", "alphapruning", "sdsa")  # coloured as COLOURS, in this order
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))
VARIANTS = {  # of an allocation: its marker, and what it means
    "": ("o", "per block, defaults"),
    "@layer": ("s", "per layer"),
    ":tuned": ("*", "tuned"),
    "@layer:tuned": ("D", "per layer, tuned"),
    ":": ("^", "per block, as given"),
    "@layer:": ("v", "per layer, as given"),
}
HIGHEST = 1000  # times the dense perplexity: lines leave the picture there
HALO = [withStroke(linewidth=3, foreground="white")]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _number(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _perplexity_axis(axes: Axes, values: list[float], keep: list[float], measure: str) -> float:
    """A logarithmic axis with plain numbers; returns the height above which a candidate is drawn at the edge.

    keep: perplexities that must be inside, whatever the others are.
    """
    finite = sorted(v for v in values if math.isfinite(v))
    top = max([*keep, finite[(3 * len(finite)) // 4] if finite else 1.0]) * OUTLIER
    top = min(top, max([*finite, *keep]))
    low = min([*finite, *keep])
    margin = max(top / low, 1.02) ** 0.07
    axes.set_yscale("log")
    axes.set_ylim(low / margin**2, top * margin)  # room for the label below the best
    if top / low < 12:  # too narrow for powers of ten: every nice number in between
        subs = [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9] if top / low < 3 else [1, 1.5, 2, 3, 4, 5, 7]
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.minorticks_off()
    axes.set_ylabel(f"{measure} (log scale)")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return top


def _legend(axes: Axes) -> None:
    """Right of the data, so that it covers none of it."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, borderaxespad=0.0)


def _columns(lineage: Lineage) -> dict[str, float]:
    """x of each candidate: its generation, spread over 0.76 of the column in proposal order."""
    generations: dict[int, list[str]] = {}
    for candidate in lineage:
        generations.setdefault(candidate.generation, []).append(candidate.id)
    return {
        name: generation + (0.76 * ((i + 0.5) / len(names) - 0.5))
        for generation, names in generations.items()
        for i, name in enumerate(names)
    }


def _scatter(axes: Axes, candidates: list[Candidate], x: Callable[[Candidate], float], top: float, size: float) -> None:
    """Measured candidates, one series per operator; those above `top` as triangles at the edge."""
    operators = [*COLOURS, *sorted({c.operator for c in candidates} - set(COLOURS))]
    for operator in operators:
        mine = [c for c in candidates if c.operator == operator]
        inside = [c for c in mine if perplexity(c.fitness) <= top]
        above = [c for c in mine if perplexity(c.fitness) > top]
        style = {"color": COLOURS.get(operator, OTHER), "edgecolor": "white", "linewidth": 0.6, "zorder": 3}
        label = operator if mine else None
        axes.scatter([x(c) for c in inside], [perplexity(c.fitness) for c in inside], size, label=label, **style)
        axes.scatter([x(c) for c in above], [top] * len(above), size, marker="^", **style)
    if any(perplexity(c.fitness) > top for c in candidates):
        axes.scatter([], [], size, marker="^", color=QUIET, label="above the axis")


def lineage_png(lineage: Lineage, best: str, title: str, measure: str) -> bytes:
    """The graph: generation against perplexity, edges from parent to child, the best one's ancestry in bold.

    measure: what fitness is, as a perplexity.
    """
    candidates = list(lineage)
    measured = [c for c in candidates if c.status == "evaluated"]
    path = [c for c in lineage.ancestors_path(best) if c.status == "evaluated"]
    x = _columns(lineage)
    generations = 1 + max(c.generation for c in candidates)

    width = min(17.0, max(8.0, COLUMN * generations))
    figure = Figure(figsize=(width + 1.5, 6.6))
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6.3, 1.2], gridspec_kw={"hspace": 0.06})
    keep = [perplexity(c.fitness) for c in path]
    top = _perplexity_axis(axes, [perplexity(c.fitness) for c in measured], keep, measure)

    def height(candidate: Candidate) -> float:
        return min(perplexity(candidate.fitness), top)

    for child in measured:
        for parent in (lineage[name] for name in child.parents):
            # At the edge no height is a true one, so no slope would be.
            if max(perplexity(parent.fitness), perplexity(child.fitness)) <= top:
                ends = [x[parent.id], x[child.id]], [height(parent), height(child)]
                axes.plot(*ends, color=QUIET, linewidth=0.6, alpha=0.35, zorder=1)
    axes.plot([x[c.id] for c in path], [height(c) for c in path], color=PATH, linewidth=2, zorder=2, label="best path")
    _scatter(axes, measured, lambda c: x[c.id], top, 42 if len(measured) <= 60 else 26)
    axes.scatter([x[path[-1].id]], [height(path[-1])], 190, facecolor="none", edgecolor=PATH, linewidth=1.8, zorder=4)
    _label_path(axes, path, x, height, LABEL * generations / width)
    axes.set_title(title, loc="left", fontsize=12)
    _legend(axes)

    rows = {"screened": 5, "surplus": 4, "repeat": 3, "invalid": 2, "failed": 1, "poison": 0}
    for status, row in rows.items():
        mine = [c for c in candidates if c.status == status]
        colour = "#b2182b" if status in ("failed", "poison") else QUIET
        strip.scatter([x[c.id] for c in mine], [row] * len(mine), 12, color=colour, marker="x", linewidth=0.9)
        strip.text(
            1.01, row, f"{len(mine)}", transform=strip.get_yaxis_transform(), va="center", fontsize=8, color=QUIET
        )
    strip.set_yticks(list(rows.values()), list(rows), fontsize=8, color=QUIET)
    strip.set_ylim(-0.7, len(rows) - 0.3)
    strip.set_xlim(-0.7, generations - 0.5)
    strip.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    strip.set_xlabel("generation (0: the seeds)")
    for side in ("top", "right", "left"):
        strip.spines[side].set_visible(False)
    strip.tick_params(axis="y", length=0)
    return _png(figure)


def _label_path(
    axes: Axes, path: list[Candidate], x: dict[str, float], height: Callable[[Candidate], float], apart: float
) -> None:
    """Names along the best path, from the best backwards: below it, where little lies, or else above, or not at all.

    apart: least distance in x between two labels on the same side.
    """
    nearest = {"below": math.inf, "above": math.inf}  # x of the last label on either side
    for candidate in reversed(path):
        middle = x[candidate.id]
        side = next((side for side, other in nearest.items() if other - middle >= apart), None)
        if side is None:
            continue
        nearest[side] = middle
        axes.annotate(
            f"{candidate.id}\n{_number(perplexity(candidate.fitness))}",
            (middle, height(candidate)),
            xytext=(0, -11 if side == "below" else 11),
            textcoords="offset points",
            ha="center",
            va="top" if side == "below" else "bottom",
            fontsize=8,
            fontweight="bold" if candidate is path[-1] else "normal",
            path_effects=HALO,
            zorder=5,
        )


def progress_png(lineage: Lineage, references: dict[str, float], title: str, measure: str) -> bytes:
    """Perplexity against the number of evaluations: each candidate, the best so far, and the baselines as lines.

    references: method → perplexity on the fitness split. measure: see `lineage_png`. The band about the best so far is
    two standard errors of its paired difference to the best seed: where it holds that seed's level, the gain may be
    noise.
    """
    measured = [c for c in lineage if c.status == "evaluated"]
    values = [perplexity(c.fitness) for c in measured]
    number = {c.id: i for i, c in enumerate(measured, start=1)}
    best = [min(values[:i]) for i in range(1, len(values) + 1)]

    figure = Figure(figsize=(9.5, 5.2))
    axes = figure.subplots()
    top = _perplexity_axis(axes, values, [best[-1], *references.values()], measure)
    for name, value in sorted(references.items(), key=lambda reference: -reference[1]):
        style = {"linestyle": REFERENCES[name], "linewidth": 1.0 if name == "dense" else 1.4}
        axes.axhline(value, color=QUIET, label=f"{name} ({_number(value)})", zorder=1, **style)
    within = [min(b, top) for b in best]
    label = f"best so far ({_number(best[-1])})"
    axes.step(list(number.values()), within, where="post", color=PATH, linewidth=2, zorder=2, label=label)
    low, high = zip(*gain_band(measured), strict=True)
    style = {"step": "post", "color": PATH, "alpha": 0.13, "linewidth": 0, "zorder": 1}
    bounds = [[min(v, top) for v in side] for side in (low, high)]
    axes.fill_between(list(number.values()), *bounds, label="± 2 errors of the gain over the best seed", **style)
    _scatter(axes, measured, lambda c: number[c.id], top, 30)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("evaluations on the target model")
    axes.set_title(title, loc="left", fontsize=12)
    _legend(axes)
    return _png(figure)


def gain_band(measured: list[Candidate]) -> list[tuple[float, float]]:
    """After each evaluation, perplexities two paired standard errors below and above the best so far."""
    rival = min((c for c in measured if c.operator == "seed"), key=lambda c: c.fitness, default=measured[0])
    best, found = measured[0], []
    for candidate in measured:
        best = min(best, candidate, key=lambda c: c.fitness)
        same = len(best.evaluation.window_nlls) == len(rival.evaluation.window_nlls)
        error = paired_difference(best.evaluation, rival.evaluation)[1] if same else math.inf
        margin = 2 * error if math.isfinite(error) else 0.0
        found.append((perplexity(best.fitness - margin), perplexity(best.fitness + margin)))
    return found


def sparsity_png(best: Candidate, others: list[Candidate], target: float, title: str) -> bytes:
    """Sparsity of each decoder block: the best algorithm, seeds with another allocation, and uniform."""
    figure = Figure(figsize=(9.5, 4.4))
    axes = figure.subplots()
    axes.axhline(100 * target, color=QUIET, linestyle="--", linewidth=1.4, label=f"uniform ({100 * target:g}%)")
    colours = itertools.cycle(list(COLOURS.values())[1:])
    for candidate in [*others, best]:
        colour = PATH if candidate is best else next(colours)
        shares = [100 * s for s in candidate.evaluation.block_sparsities]
        style = {"linewidth": 2.4, "marker": "o", "markersize": 4} if candidate is best else {"linewidth": 1.3}
        allocation = str(candidate.algorithm.allocation)
        axes.plot(shares, color=colour, label=f"{candidate.id}\n  {allocation}", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder block (0: nearest to the input)")
    axes.set_ylabel("sparsity, % of prunable weights")
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _legend(axes)
    return _png(figure)


def sensitivity_png(costs: list[float], best: Candidate, title: str) -> bytes:
    """What pruning each decoder block alone costs (nats per token), above the sparsity that the best one gives it."""
    figure = Figure(figsize=(9.5, 4.8))
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4], gridspec_kw={"hspace": 0.12})
    axes.bar(range(len(costs)), costs, color=COLOURS["explore"], width=0.7)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set_ylabel(f"cost of pruning it alone\nby {best.id}, nats per token")
    below.bar(range(len(costs)), [100 * s for s in best.evaluation.block_sparsities], color=QUIET, width=0.7)
    below.set_ylabel(f"sparsity in\n{best.id}, %")
    below.set_ylim(0, 100)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_xlabel("decoder block (0: nearest to the input)")
    axes.set_title(title, loc="left", fontsize=12)
    for one in (axes, below):
        one.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return _png(figure)


def comparison_png(
    panels: dict[str, dict[tuple[str, str], list[tuple[float, float]]]], dense: float, title: str
) -> bytes:
    """Perplexity against sparsity, one line per method; one panel for what may be compared, all on the same axis.

    panels: title → (score, allocation) → (sparsity, perplexity) points in order. The colour tells the rule of the
    allocation, the marker whether it is per layer and where its parameters are from, the line's dashes the score.
    """
    colours = dict(zip(ALLOCATIONS, COLOURS.values(), strict=True))
    allocations = {a: _variant(a) for curves in panels.values() for _, a in curves}
    values = [value for curves in panels.values() for points in curves.values() for _, value in points]
    within, top = [value for value in values if value <= HIGHEST * dense], min(max(values), HIGHEST * dense)

    figure = Figure(figsize=(2.5 + 5.5 * len(panels), 6.0))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        _perplexity_axis(axes, within, [dense, top], "perplexity on the report split")
        if top / dense >= 12:
            axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5], numticks=30))
        axes.axhline(dense, color=QUIET, linestyle="--", linewidth=1.4, zorder=1)
        dashes = dict(zip(dict.fromkeys(score for score, _ in curves), itertools.cycle(DASHES), strict=False))
        for (score, allocation), points in curves.items():
            rule, variant = allocations[allocation]
            style = {"color": colours.get(rule, OTHER), "linestyle": dashes[score], "marker": VARIANTS[variant][0]}
            size = 10 if "*" in style["marker"] else 5
            axes.plot(*zip(*points, strict=True), **style, linewidth=1.6, markersize=size, markeredgecolor="white")
        axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
        axes.set_xlabel("sparsity of the prunable weights")
        axes.set_title(name, fontsize=11)
        handles = [Line2D([], [], color=PATH, linestyle=dash, label=score) for score, dash in dashes.items()]
        axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9, handlelength=3.5)
        if axes is not all_axes[0]:
            axes.set_ylabel("")
    handles = [Line2D([], [], color=QUIET, linestyle="--", label=f"dense ({_number(dense)})")]
    for rule in dict.fromkeys(rule for rule, _ in allocations.values()):
        handles.append(Line2D([], [], color=colours.get(rule, OTHER), linewidth=3, label=rule))
    for marker, meaning in (VARIANTS[variant] for variant in dict.fromkeys(v for _, v in allocations.values())):
        handles.append(Line2D([], [], color=PATH, linestyle="", marker=marker, label=meaning))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.91, 0.88), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.08, ha="left", fontsize=12)
    return _png(figure)


def _variant(allocation: str) -> tuple[str, str]:
    """The rule (or file) of `NAME[@layer][:tuned or parameters]`, and which of VARIANTS it is."""
    rule, layer, settings = re.fullmatch(r"(.+?)(@layer)?(:.*)?", Path(allocation).name).groups(default="")
    by_layer = layer or ("@layer" if "taylor=" in settings else "")
    return rule, by_layer + (":tuned" if settings.endswith(":tuned") else settings[:1])
