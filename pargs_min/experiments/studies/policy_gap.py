"""How far are tokenwise policies from the RLHF policy?"""

from collections.abc import Iterator

from matplotlib.figure import Figure

from pargs_min import plots
from pargs_min.experiments.measure import FULL, PARTIAL, VALUE, Cell
from pargs_min.experiments.report import BETAS, INTERVALS, PARTICLES, Study, curves, reward_against_kl
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import Row
from pargs_min.methods import FINE_TUNED


def cells(lab: Lab, seed: int) -> Iterator[Cell]:
    yield Cell(seed, "plain")
    for beta in BETAS[:3]:
        for method, recipe in (("args", FULL), ("pargs", PARTIAL), ("cd", VALUE)):
            yield Cell(seed, method, beta=beta, recipe=recipe)
        yield Cell(seed, "smc", beta=beta, particles=PARTICLES, recipe=PARTIAL, final=FULL)
    for method in FINE_TUNED:
        yield Cell(seed, method, beta=1.0)


def draw(rows: list[Row], lab: Lab) -> Figure:
    drawing, (left, right) = plots.panels(2, (10.4, 4.2))
    curves(left, rows, lambda row: row.cell.beta, "gap")
    left.set(xlabel=f"beta ({INTERVALS})", ylabel="KL(policy ‖ RLHF policy), nats per text", yscale="log")
    reward_against_kl(right, rows, lab)
    return drawing


STUDY = Study(cells, draw, ("reward", "prompt_error", "rlhf", "kl", "gap", "off_grammar"))
