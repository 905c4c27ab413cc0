"""Do reward models of other shapes and sizes work?"""

from collections.abc import Iterator
from dataclasses import replace

from matplotlib.figure import Figure

from pargs_min import plots
from pargs_min.experiments.measure import PARTIAL, Cell, Shape
from pargs_min.experiments.report import BETA, RANKED, Study
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import Row

SHAPES = (Shape("gpt2", 1, 32), Shape("gpt2", 2, 64), Shape("gpt2", 4, 64), Shape("llama", 2, 64))


def cells(lab: Lab, seed: int) -> Iterator[Cell]:
    shapes = SHAPES if lab.world else ()  # for its short texts
    for recipe in (PARTIAL, replace(PARTIAL, head="vocab"), *(replace(PARTIAL, start=shape) for shape in shapes)):
        yield Cell(seed, "pargs", beta=BETA, recipe=recipe, quality=True)


def draw(rows: list[Row], lab: Lab) -> Figure:
    measures = {"reward": f"reward at beta = {BETA:g}", "whole": "accuracy", "gain": RANKED}
    shown = {
        label: {str(row.cell.recipe): (found.mean, found.low, found.high) for row in rows if (found := row.found[name])}
        for name, label in measures.items()
    }
    return plots.intervals(shown)


STUDY = Study(cells, draw, ("reward", "kl", "calls", "whole", "concordance", "gain", "ceiling"))
