"""What does a unit of reward cost, in forward passes and in KL?"""

import math
from collections.abc import Iterator

from matplotlib.figure import Figure

from pargs_min import plots
from pargs_min.experiments.measure import FULL, PARTIAL, Cell
from pargs_min.experiments.report import BETA, BETAS, INTERVALS, Study, curves, log_scale, reward_against_kl
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import Row


def cells(lab: Lab, seed: int) -> Iterator[Cell]:
    yield Cell(seed, "plain")
    for n in (2, 4, 8, 16, 32):
        yield Cell(seed, "best-of-n", n=n, recipe=FULL)
    for beta in BETAS:
        yield Cell(seed, "pargs", beta=beta, recipe=PARTIAL)
    for particles in (2, 4, 8, 16):
        yield Cell(seed, "smc", beta=BETA, particles=particles, recipe=PARTIAL, final=FULL)


def draw(rows: list[Row], lab: Lab) -> Figure:
    drawing, (left, right) = plots.panels(2, (10.4, 4.2))
    curves(left, rows, lambda row: row.found["calls"].mean, "reward", linestyle="none")
    left.set(xlabel="forward passes of one row by any model, per text", ylabel="reward")
    passes = sorted(row.found["calls"].mean for row in rows)
    log_scale(left, [round(passes[0] * 2**i) for i in range(int(math.log2(passes[-1] / passes[0])) + 1)])
    left.legend(frameon=False, fontsize=8, title=INTERVALS)
    reward_against_kl(right, rows, lab)
    return drawing


STUDY = Study(cells, draw, ("reward", "prompt_error", "rlhf", "kl", "calls", "distinct2"))
