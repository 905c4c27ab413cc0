"""How much data does a reward model of prefixes need?"""

from dataclasses import replace

from pargs_min import plots
from pargs_min.experiments.measure import FULL, PARTIAL, Cell, Lab
from pargs_min.experiments.report import BETA, INTERVALS, RANKED, Row, curves, log_scale
from pargs_min.records import read_preferences

COLUMNS = ("reward", "kl", "whole", "concordance", "gain", "ceiling")


def pairs_of(lab: Lab) -> int:
    """How many pairs a lab has to train on."""
    return round(len(read_preferences(lab.pairs)) * (0.9 if lab.held_out is None else 1))


def cells(lab: Lab, seed: int) -> list[Cell]:
    every = pairs_of(lab)
    return [
        Cell(seed, method, beta=BETA, recipe=replace(recipe, pairs=pairs), quality=True)
        for method, recipe in (("args", FULL), ("pargs", PARTIAL))
        for pairs in (every // 16, every // 8, every // 4, every // 2, None)
    ]


def draw(rows: list[Row], lab: Lab) -> plots.Figure:
    every = pairs_of(lab)

    def pairs(row: Row) -> int:
        return (row.cell.recipe and row.cell.recipe.pairs) or every

    drawing, axes = plots.panels(3, (11.4, 3.8))
    measures = {"reward": f"reward at beta = {BETA:g}", "whole": "accuracy on whole held-out pairs", "gain": RANKED}
    for panel, (measure, label) in zip(axes, measures.items(), strict=True):
        curves(panel, rows, pairs, measure)
        panel.set(xlabel=f"training pairs ({INTERVALS})", ylabel=label)
        log_scale(panel, sorted(set(map(pairs, rows))))
    axes[0].legend(frameon=False, fontsize=8)
    return drawing
