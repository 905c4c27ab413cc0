"""What may be left out of guidance, and how much of its gain goes with it?"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pargs_min import plots
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import DISTILLED, PARTIAL, SOFT_LABELS, Recipe
from pargs_min.experiments.report import BETA, Row
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.studies.real import BETAS
from pargs_min.experiments.sweep import Estimate, interval
from pargs_min.models import load_config

COLUMNS = ("reward", "share", "kl", "asked", "time", "memory", "training")
GATES = (0.95, 0.9, 0.8, 0.7)


def cells(lab: Lab, seed: int) -> list[Cell]:
    beta, layers = BETA if lab.world else BETAS[-1], load_config(lab.model).get_text_config().num_hidden_layers
    above = {"shared_layers": max(1, layers * 4 // 5)}
    soft, reweighted = (Recipe(objective, beta=beta) for objective in ("soft", "reweighted"))
    ways: list[tuple[str, Recipe, float | None]] = [("soft", soft, gate) for gate in (None, *GATES)]
    for method, own in (("pargs", PARTIAL), ("reweighted", reweighted)):
        upper = replace(own, **above)
        ways += [(method, own, None), (method, upper, None), (method, upper, GATES[0])]
    ways += [("pargs", recipe, None) for recipe in (SOFT_LABELS, DISTILLED, replace(DISTILLED, **above))]
    found = [Cell(seed, method, beta=beta, recipe=recipe, guide_below=gate) for method, recipe, gate in ways]
    return [Cell(seed, "plain"), *(replace(cell, timed=True) for cell in found)]


def whole(row: Row, rows: list[Row]) -> Row | None:
    """The row of the guide that leaves nothing out, if it is there: a guide of its own at every step."""
    recipe = row.cell.recipe and replace(row.cell.recipe, head=None, shared_layers=None)
    cell = replace(row.cell, guide_below=None, recipe=recipe)
    return next((other for other in rows if other.cell == cell), None)


def kept(rows: list[Row]) -> dict[str, Estimate]:
    """What each way keeps of the gain over plain of the guide that leaves nothing out; nan where that is not there."""
    plain, *others = rows
    gain = {row.cell: np.subtract(row.found["reward"].seeds, plain.found["reward"].seeds) for row in others}
    shares = {}
    for row in others:
        best = whole(row, others)
        with np.errstate(all="ignore"):  # a guide may gain nothing
            share = interval((gain[row.cell] / gain[best.cell]).tolist(), row.worlds) if best else Estimate(math.nan)
        shares[str(row.cell)] = share
    return shares


def conclude(rows: list[Row]) -> str:
    """What is kept, and at what price."""
    shares = kept(rows)
    lines = [
        "Share of the whole guide's gain over plain that is kept, and the time of a token where a plain one takes 1:"
    ]
    for row in rows[1:]:
        share = shares[str(row.cell)]
        lines.append(f"- {row.cell}: {share.mean:.2f} ± {share.error:.2f}, {row.found['time'].mean:.2f}")
    return "\n".join(lines)


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    shown = {"kept of the gain": kept(rows)}
    for name, label in (("time", "time (plain = 1)"), ("memory", "weights (plain = 1)")):
        shown[label] = {str(row.cell): row.found[name] for row in rows[1:]}
    return plots.intervals(
        {label: {way: (one.mean, one.low, one.high) for way, one in found.items()} for label, found in shown.items()}
    )
