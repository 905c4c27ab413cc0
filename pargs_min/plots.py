"""Every figure of the project, in one style: few inks, told apart by shape as well as by colour."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; a method keeps its ink in every figure.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
INKS = {
    "plain": (BLACK, "X"),
    "pargs": (BLUE, "o"),
    "pargs-greedy": (SKY, "s"),
    "args": (RED, "^"),
    "args-greedy": (ORANGE, "v"),
    "pargs (soft labels)": (SKY, "o"),
    "pargs (soft labels, vocabulary head)": (SKY, "s"),
    "best-of-n": (GREEN, "D"),
    "cd": (PINK, "P"),
    "smc": ("#004B75", "*"),
    "soft": ("#8C510A", "h"),
    "reweighted": ("#B39B00", "s"),
    "win": ("#7A378B", "v"),
    "genarm": (ORANGE, "<"),
    "farma": (ORANGE, ">"),
    "implicit": ("#7F7F7F", "p"),
    "learned RLHF": (BLACK, "+"),
    "dpo": ("#7F7F7F", "<"),
    "ppo": ("#7F7F7F", ">"),
    "partial": (BLUE, "o"),
    "full": (RED, "^"),
}


def ink(name: str) -> tuple[str, str]:
    """The colour and the mark of a method, or of a variant of it: "method (variant)".

    >>> ink("smc (soft labels)") == INKS["smc"]
    True
    """
    return INKS.get(name) or INKS[name.partition(" (")[0]]


STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}


def figure(xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = (6.4, 4.4)) -> tuple[Figure, Axes]:
    """An empty figure in the project's style; drawn without a window, so it works where there is no screen."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=size)
        axes = drawing.add_subplot(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left", fontsize=10)
    return drawing, axes


def panels(count: int, size: tuple[float, float] = (9.6, 4.0)) -> tuple[Figure, list[Axes]]:
    """Empty axes side by side, in the same style."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=size)
        return drawing, list(drawing.subplots(1, count, squeeze=False)[0])


def save(drawing: Figure, path: str | Path) -> None:
    """Write a figure as PNG, at a resolution fit for print."""
    drawing.savefig(path, dpi=150)


def root_scale(axes: Axes, largest: float) -> None:
    """Make the first axis one of the root of KL, up to a little more than the largest."""
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    axes.set_xticks(ticks := [0, 0.1, 0.5, 1, 2, 3, 5, 10, 20, 30], [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0, 1.15 * largest)


def intervals(panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """Estimates with their intervals: one panel per measure, one line per file.

    Args:
        panels: measure -> file -> (value, low, high); the first panel's files come first, from the top.
    """
    files = list(dict.fromkeys(file for panel in panels.values() for file in panel))
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(1.5 + 2.8 * len(panels), 1.0 + 0.4 * len(files)))
        row = drawing.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, panel) in zip(row, panels.items(), strict=True):
        for file, (value, low, high) in panel.items():
            axes.hlines(files.index(file), low, high, color=BLUE)
            axes.plot(value, files.index(file), color=BLUE, marker="o", markersize=5)
        if measure.startswith("share won"):
            axes.axvline(0.5, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(measure)
    row[0].set_yticks(range(len(files)), files)
    row[0].set_ylim(len(files) - 0.5, -0.5)
    return drawing
