"""How far do guides reach, at one call per token, and how far is the RLHF policy?"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pargs_min import plots
from pargs_min.experiments.measure import CAP, Cell, guided
from pargs_min.experiments.recipes import DISTILLED, FULL, PARTIAL, SOFT_LABELS, Recipe
from pargs_min.experiments.report import (
    BETA,
    PARTICLES,
    Row,
    curve,
    grouped,
    intervals_over,
    log_scale,
    reward_against_kl,
)
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import interval
from pargs_min.methods import FINE_TUNED

COLUMNS = ("reward", "rlhf", "share", "kl", "gap", "concordance", "flips", "off_grammar", "calls", "training")
BETAS = (1.0, BETA, 3.0)
ETA = 10.0  # of win: close to its limit, the winner of a pair
FLOOR = 0.003  # candidates are at least as likely to the reference: of rarer tokens the guides have seen too little


def cells(lab: Lab, seed: int) -> list[Cell]:
    found = [Cell(seed, "plain")]
    for beta in BETAS:
        # What a guide may learn is the RLHF policy of this beta, or a reward that any beta weighs.
        of_beta = {method: replace(Recipe(method), beta=beta) for method in ("soft", "reweighted")}
        recipes = [("pargs", PARTIAL), ("pargs", SOFT_LABELS), ("cd", Recipe("value")), *of_beta.items()]
        found += [Cell(seed, m, beta=beta, recipe=recipe, quality=beta == BETA) for m, recipe in recipes]
        found += [Cell(seed, CAP, beta=beta, recipe=FULL)]
    found += guided(seed, ("args", "farma", "genarm"), [BETA], quality=True)
    found += guided(seed, ["win"], [ETA], quality=True)
    found += [Cell(seed, "implicit", beta=BETA, recipe=Recipe("dpo", beta=BETA), quality=True)]
    found += [Cell(seed, "pargs", beta=BETA, recipe=DISTILLED, quality=True)]
    found += [Cell(seed, method, beta=BETA) for method in FINE_TUNED]
    found += guided(seed, ["smc"], [BETA], particles=PARTICLES, final=FULL)
    found += [Cell(seed, "best-of-n", n=16, recipe=FULL)]
    return [replace(cell, min_ref_prob=FLOOR) if cell.writes.guided else cell for cell in found]


def conclude(rows: list[Row]) -> str:
    """Of what the RLHF policy of the learned reward gains at its KL, the share that each guide gains at its own."""
    caps = {row.cell.beta: row.found["share"].seeds for row in rows if row.cell.method == CAP and "share" in row.found}
    lines = [f"Share of RLHF's gain, beside that of the {CAP} of the same beta, and the spread of the reward:"]
    for row in rows:
        if row.cell.writes.guided and row.cell.beta in caps and "share" in row.found:
            ratio = interval(np.divide(row.found["share"].seeds, caps[row.cell.beta]).tolist())
            spread = np.std(row.found["reward"].seeds, ddof=1) if len(row.found["reward"].seeds) > 1 else math.nan
            lines.append(f"- {row.cell}: {row.found['share'].mean:.2f}, {ratio.mean:.2f} of the cap, sd {spread:.2f}")
    return "\n".join(lines)


def passes(row: Row) -> float:
    return row.found["calls"].mean


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    drawing, (left, right) = plots.panels(2, (10.6, 4.2))
    for name, group in grouped(rows, "name").items():
        shown = [row for row in group if "calls" in row.found and row.cell.beta in (None, BETA, ETA)]
        curve(left, shown, passes, "share", str(name), plots.ink(str(name)), linestyle="none")
    left.axhline(1, color=plots.BLACK, linewidth=0.8)
    left.set(xlabel=f"forward passes per text ({intervals_over(rows)})", ylabel="share of RLHF's gain")
    log_scale(left, (50, 100, 200, 500))
    reward_against_kl(right, rows, labs)
    return drawing
