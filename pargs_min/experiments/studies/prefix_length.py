"""At which lengths does a reward model know anything, and does it generalise to others?"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pargs_min import plots
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import FULL, PARTIAL, VALUE
from pargs_min.experiments.report import MEASURES, Row
from pargs_min.experiments.setup import Lab

COLUMNS = ("whole", "concordance", "gain", "ceiling")


def cells(lab: Lab, seed: int) -> list[Cell]:
    third = lab.max_new_tokens // 3
    short, long = replace(PARTIAL, lengths=(1, third)), replace(PARTIAL, lengths=(third + 1, None))
    return [Cell(seed, recipe=recipe, quality=True) for recipe in (FULL, VALUE, PARTIAL, short, long)]


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    drawing, axes = plots.panels(3, (12.6, 4.2))
    inks = (plots.RED, plots.GREEN, plots.BLUE, plots.SKY, plots.ORANGE)
    for panel, measure in zip(axes, ("accuracy", "final", "gold"), strict=True):
        for row, ink in zip(rows, inks, strict=True):
            values = np.array(row.found[measure].seeds, dtype=float)
            lengths = range(1, values.shape[1] + 1)
            panel.plot(lengths, values.mean(0), color=ink, linewidth=2, label=str(row.cell.recipe))
            panel.fill_between(lengths, values.min(0), values.max(0), color=ink, alpha=0.15, linewidth=0)
        panel.axhline(0.5 if measure == "accuracy" else 0, color=plots.BLACK, linewidth=0.8, linestyle=":")
        panel.set(xlabel="prefix length (tokens; band: all seeds)", ylabel=MEASURES[measure]["says"])
    axes[0].legend(frameon=False, fontsize=8)
    return drawing
