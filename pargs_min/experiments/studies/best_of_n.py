"""What does a unit of reward cost, in forward passes and in KL?"""

import math
from collections.abc import Sequence

from pargs_min import plots
from pargs_min.experiments.measure import Cell, guided
from pargs_min.experiments.recipes import FULL, PARTIAL
from pargs_min.experiments.report import BETA, BETAS, Row, curves, intervals_over, log_scale, reward_against_kl
from pargs_min.experiments.setup import Lab

COLUMNS = ("reward", "prompt_error", "rlhf", "kl", "calls", "distinct2")


def cells(lab: Lab, seed: int) -> list[Cell]:
    best = [Cell(seed, "best-of-n", n=n, recipe=FULL) for n in (2, 4, 8, 16, 32)]
    smc = [Cell(seed, "smc", beta=BETA, particles=n, recipe=PARTIAL, final=FULL) for n in (2, 4, 8, 16)]
    return [Cell(seed, "plain"), *best, *guided(seed, ["pargs"], BETAS), *smc]


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    drawing, (left, right) = plots.panels(2, (10.4, 4.2))
    curves(left, rows, lambda row: row.found["calls"].mean, "reward", linestyle="none")
    left.set(xlabel="forward passes of one row by any model, per text", ylabel="reward")
    passes = sorted(row.found["calls"].mean for row in rows)
    log_scale(left, [round(passes[0] * 2**i) for i in range(int(math.log2(passes[-1] / passes[0])) + 1)])
    left.legend(frameon=False, fontsize=8, title=intervals_over(rows))
    reward_against_kl(right, rows, labs)
    return drawing
