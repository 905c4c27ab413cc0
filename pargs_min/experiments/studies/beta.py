"""Does the best beta, and the best k, carry over to other worlds and references?"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

from pargs_min import plots
from pargs_min.experiments.measure import Cell, guided
from pargs_min.experiments.report import BETAS, Row, curve, grouped, intervals_over
from pargs_min.experiments.setup import Lab, embedded
from pargs_min.world.journey import Journey

COLUMNS = ("reward", "prompt_error", "rlhf", "kl", "off_grammar")
OTHERS: dict[str, dict] = {
    "forgiving": {"world": Journey(luck=Fraction(1, 4))},  # a first mistake can be undone
    "early reference": {"steps": 500},  # a sixth of the training
}


def labs(lab: Lab, quick: bool) -> dict[str, Lab]:
    """The lab itself and, if it is the embedded world, others like it."""
    others = OTHERS if lab.world else {}
    folders = {name: lab.file(name.replace(" ", "-")) for name in others}
    return {name: embedded(folders[name], quick=quick, seed=lab.seed, **others[name]) for name in others}


def cells(lab: Lab, seed: int) -> list[Cell]:
    grid = product(("", *(OTHERS if lab.world else ())), (3, 10, 0))
    return [cell for name, k in grid for cell in guided(seed, ["pargs"], (*BETAS, 4.0), lab=name, top_k=k)]


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    worlds, inks = grouped(rows, "lab"), {3: (plots.SKY, "s"), 10: (plots.BLUE, "o"), 0: (plots.ORANGE, "^")}
    drawing, axes = plots.panels(len(worlds), (3.9 * max(len(worlds), 2), 3.8))
    for panel, (name, group) in zip(axes, worlds.items(), strict=True):
        for k, some in grouped(group, "top_k").items():
            label = f"k = {k}" if k else "all tokens"
            curve(panel, some, lambda row: row.cell.beta, "reward", label, inks[k])
        panel.set(xlabel=f"beta ({intervals_over(rows)})", ylabel="reward", title=name or "as usual")
    axes[0].legend(frameon=False, fontsize=8)
    return drawing
