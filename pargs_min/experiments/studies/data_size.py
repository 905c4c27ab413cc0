"""How much data does a reward model of prefixes need?"""

import math
from collections.abc import Sequence
from dataclasses import replace

from pargs_min import plots
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import FULL, PARTIAL
from pargs_min.experiments.report import BETA, RANKED, Row, curves, intervals_over, log_scale
from pargs_min.experiments.setup import Lab
from pargs_min.records import read_preferences

COLUMNS = ("reward", "kl", "whole", "concordance", "gain", "ceiling")


def pairs_of(lab: Lab) -> int:
    """How many pairs a lab has to train on."""
    return round(len(read_preferences(lab.pairs)) * (0.9 if lab.held_out is None else 1))


def cells(lab: Lab, seed: int) -> list[Cell]:
    if (there := pairs_of(lab)) < 17:
        raise ValueError(f"data-size takes at least 17 training pairs, got {there}")
    most = 2 ** int(math.log2(there - 1))  # so worlds that differ by a few pairs are compared at equal sizes
    return [
        Cell(seed, method, beta=BETA, recipe=replace(recipe, pairs=pairs), quality=True)
        for method, recipe in (("args", FULL), ("pargs", PARTIAL))
        for pairs in (most // 8, most // 4, most // 2, most, None)
    ]


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    every = pairs_of(labs[0])

    def pairs(row: Row) -> int:
        return (row.cell.recipe and row.cell.recipe.pairs) or every

    drawing, axes = plots.panels(3, (11.4, 3.8))
    measures = {"reward": f"reward at beta = {BETA:g}", "whole": "accuracy on whole held-out pairs", "gain": RANKED}
    for panel, (measure, label) in zip(axes, measures.items(), strict=True):
        curves(panel, rows, pairs, measure)
        panel.set(xlabel=f"training pairs ({intervals_over(rows)})", ylabel=label)
        log_scale(panel, sorted(set(map(pairs, rows))))
    axes[0].legend(frameon=False, fontsize=8)
    return drawing
