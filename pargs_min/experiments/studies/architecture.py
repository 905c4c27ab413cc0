"""Do reward models of other shapes and sizes work?"""

from collections.abc import Sequence
from dataclasses import replace

from pargs_min import plots
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import PARTIAL
from pargs_min.experiments.report import BETA, RANKED, Row
from pargs_min.experiments.setup import Lab

COLUMNS = ("reward", "kl", "calls", "whole", "concordance", "gain", "ceiling")
SHAPES = ("gpt2", 1, 32), ("gpt2", 2, 64), ("gpt2", 4, 64), ("llama", 2, 64)  # family, layers, width


def cells(lab: Lab, seed: int) -> list[Cell]:
    shapes = SHAPES if lab.world else ()  # for its short texts
    recipes = [PARTIAL, *(replace(PARTIAL, start=shape) for shape in shapes)]
    return [Cell(seed, "pargs", beta=BETA, recipe=recipe, quality=True) for recipe in recipes]


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    measures = {"reward": f"reward at beta = {BETA:g}", "whole": "accuracy", "gain": RANKED}
    shown = {
        label: {str(row.cell.recipe): (found.mean, found.low, found.high) for row in rows if (found := row.found[name])}
        for name, label in measures.items()
    }
    return plots.intervals(shown)
