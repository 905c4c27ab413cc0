"""Figures that only the notebooks draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pargs_min.plots import BLACK, BLUE, INKS, SKY, figure


def bars(
    axes: Axes, labels: Sequence[str], heights: Mapping[str, Sequence[float]], inks: Sequence[str], digits: int = 0
) -> None:
    """Groups of bars: one group per label, in it one bar for each name of `heights`.

    Args:
        axes: where to draw; inks: a colour for each name.
        digits: decimals of the number written above each bar; 0 writes none.
    """
    width = 0.8 / len(heights)
    for n, ((name, values), ink) in enumerate(zip(heights.items(), inks, strict=True)):
        places = [i + (n - (len(heights) - 1) / 2) * width for i in range(len(labels))]
        drawn = axes.bar(places, values, 0.92 * width, color=ink, edgecolor=BLACK, linewidth=0.6, label=name)
        if digits:
            axes.bar_label(drawn, fmt=f"%.{digits}f", fontsize=7, padding=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(visible=False, axis="x")
    if len(heights) > 1:
        axes.legend(fontsize=8, frameon=False)


def seeds(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], ink: str, mark: str, label: str, **style
) -> None:
    """A thin line per seed, and a thick one for their mean with its 95 % interval.

    Args:
        axes: where to draw.
        x, values: (X,) and (seeds, X).
        style: of the thick line, as matplotlib names it; the thin ones take its linestyle.
    """
    from pargs_min.experiments.sweep import interval  # with all that trains models, which other figures do not need

    axes.plot(x, np.transpose(values), color=ink, linewidth=0.6, alpha=0.5, linestyle=style.get("linestyle"))
    found = interval(values)
    bars = np.subtract(found.mean, found.low), np.subtract(found.high, found.mean)
    axes.errorbar(x, found.mean, bars, color=ink, marker=mark, markersize=5, linewidth=2, label=label, **style)


def curves(
    axes: Axes, points: Mapping[str, tuple[Sequence[float], Sequence[float]]], labels: Mapping[str, str]
) -> None:
    """A curve per method, in its ink; the RLHF policy is a plain line, methods of few settings are marks.

    Args:
        axes: where to draw.
        points: for each method, "rlhf" or one of `INKS`, its x and its y.
        labels: what the legend calls a method; one that is not among them is not named.
    """
    marks = {"linestyle": "", "markersize": 9, "markerfacecolor": "none"}
    styles = {"dpo": marks, "ppo": marks, "best-of-n": {"linestyle": ":"}}
    for method, (x, y) in points.items():
        ink, mark = INKS.get(method, (BLACK, ""))
        style = {"markersize": 5} | styles.get(method, {})
        axes.plot(x, y, color=ink, marker=mark, label=labels.get(method), **style)


def prefix_accuracy(curves: Mapping[str, Sequence[Sequence[float]]], title: str = "") -> Figure:
    """Pair accuracy against prefix length: a thin line per reward model, a thick one for their mean.

    Args:
        curves: for each objective, one list per model: accuracy after 1, 2, ... tokens.
    """
    drawing, axes = figure("prefix length (tokens)", "share of pairs ordered as labelled", title)
    axes.axhline(0.5, color=BLACK, linewidth=0.8, linestyle=":")
    for objective, models in curves.items():
        ink, lengths = INKS[objective][0], range(1, len(models[0]) + 1)
        axes.plot(lengths, np.transpose(models), color=ink, linewidth=0.7, alpha=0.6)
        label = f"trained on {'prefixes' if objective == 'partial' else 'whole texts'}"
        axes.plot(lengths, np.mean(models, 0), color=ink, linewidth=2.2, label=label)
    axes.legend(fontsize=8, frameon=False)
    return drawing


def tree(
    parents: Sequence[Sequence[int]],
    nodes: Sequence[Sequence[str]],
    edges: Sequence[Sequence[str]],
    size: tuple[float, float] = (8.0, 4.6),
) -> Figure:
    """A tree of prefixes, growing to the right, one column per length.

    Args:
        parents: parents[i][n] is the place in column i - 1 of the parent of node n in column i; parents[0] is not read.
        nodes, edges: what stands at a node, and on the edge from its parent, in the same shape.
    """
    heights = [[float(n) for n in range(len(nodes[-1]))]]
    for i in range(len(nodes) - 1, 0, -1):
        families = [
            [h for h, p in zip(heights[0], parents[i], strict=True) if p == n] for n in range(len(nodes[i - 1]))
        ]
        heights.insert(0, [sum(family) / len(family) for family in families])
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.add_subplot()
    for i, column in enumerate(heights):
        for height, parent, node, edge in zip(column, parents[i], nodes[i], edges[i], strict=True):
            if i:
                start = heights[i - 1][parent]
                axes.plot([i - 1, i], [start, height], color="#999999", linewidth=1, zorder=1)
                middle = i - 0.42, start + 0.58 * (height - start)
                axes.text(*middle, edge, fontsize=8, color=BLUE, ha="center", va="center", backgroundcolor="white")
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": BLACK, "linewidth": 0.6}
            inside = "center" if i < len(nodes) - 1 else "left"
            axes.text(i, height, node, fontsize=8, ha=inside, va="center", bbox=box, zorder=2)
    axes.set(
        xlim=(-0.4, len(nodes) - 0.2), ylim=(len(nodes[-1]) - 0.4, -0.6), xlabel="prefix length (tokens)", yticks=[]
    )
    axes.set_xticks(range(len(nodes)))
    axes.spines[["left", "top", "right"]].set_visible(False)
    return drawing


def attention(sees: Sequence[Sequence[bool]], queries: Sequence[str], keys: Sequence[str], new: int) -> Figure:
    """Who sees whom in one forward pass: one row per query token, one column per key token, filled where seen.

    Args:
        sees: (queries, keys).
        new: how many of the last keys are fed in this pass; those before them are in the cache.
    """
    drawing, axes = figure(
        "key: token seen", "query: token fed", size=(1.6 + 0.5 * len(keys), 1.5 + 0.4 * len(queries))
    )
    for i, row in enumerate(sees):
        for j, seen in enumerate(row):
            ink = "#EEEEEE" if not seen else SKY if j < len(keys) - new else BLUE
            axes.add_patch(Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, color=ink))
    axes.axvline(len(keys) - new - 0.5, color=BLACK, linewidth=1, linestyle=":")
    axes.set(xlim=(-0.6, len(keys) - 0.4), ylim=(len(queries) - 0.4, -0.6))
    axes.set_xticks(range(len(keys)), keys, rotation=45, ha="right")
    axes.set_yticks(range(len(queries)), queries)
    axes.grid(visible=False)
    return drawing
