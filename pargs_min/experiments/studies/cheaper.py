"""What may be left out of guidance, and how much of its gain goes with it?"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pargs_min import plots
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import DISTILLED, SOFT_LABELS, Recipe
from pargs_min.experiments.report import BETA, INTERVALS, Row
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.studies.real import BETAS
from pargs_min.experiments.sweep import interval
from pargs_min.models import load_config

COLUMNS = ("reward", "share", "kl", "asked", "time", "memory", "training")
GATES = (0.95, 0.9, 0.8, 0.7)


def cells(lab: Lab, seed: int) -> list[Cell]:
    beta, layers = BETA if lab.world else BETAS[-1], load_config(lab.model).get_text_config().num_hidden_layers
    shared = max(1, layers * 4 // 5)
    soft, reweighted = (Recipe(objective, beta=beta) for objective in ("soft", "reweighted"))
    found = [Cell(seed, "soft", beta=beta, recipe=soft, guide_below=gate) for gate in (None, *GATES)]
    found += [Cell(seed, "pargs", beta=beta, recipe=SOFT_LABELS)]
    for recipe in (DISTILLED, replace(DISTILLED, shared_layers=shared)):
        found.append(Cell(seed, "pargs", beta=beta, recipe=recipe))
    for recipe in (reweighted, replace(reweighted, shared_layers=shared)):
        found.append(Cell(seed, "reweighted", beta=beta, recipe=recipe))
    return [Cell(seed, "plain"), *(replace(cell, timed=True) for cell in found)]


def whole(row: Row, rows: list[Row]) -> Row:
    """The row of the guide that leaves nothing out: of the same method, with layers of its own, at every step."""
    return next(other for other in rows if other.cell.method == row.cell.method)


def conclude(rows: list[Row]) -> str:
    """What each way keeps of the gain over plain of the guide that leaves nothing out."""
    plain, *others = rows
    lines = ["Kept of the whole guide's gain over plain, at how many times the price of a plain token:"]
    gain = {row.cell: np.subtract(row.found["reward"].seeds, plain.found["reward"].seeds) for row in others}
    for row in others:
        with np.errstate(all="ignore"):  # a guide may gain nothing
            kept = interval((gain[row.cell] / gain[whole(row, others).cell]).tolist())
        lines.append(f"- {row.cell}: {kept.mean:.2f} ± {kept.error:.2f}, {row.found['time'].mean:.2f} times the time")
    return "\n".join(lines)


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    drawing, (left, right) = plots.panels(2, (12.4, 4.2))
    plain, *others = rows
    left.axhline(plain.found["reward"].mean, color=plots.ink("plain")[0], linewidth=0.8, label="plain")
    for row in others:
        ink, mark = plots.ink(str(row.cell.name))
        found, low, high = row.found["reward"], row.found["reward"].low, row.found["reward"].high
        bars = np.nan_to_num([[found.mean - low], [high - found.mean]])
        left.errorbar(row.found["time"].mean, found.mean, bars, color=ink, marker=mark, linestyle="none", capsize=2)
        left.annotate(str(row.cell), (row.found["time"].mean, found.mean), (4, 4), textcoords="offset points", size=7)
    left.set(xlabel="time of a token, one text at a time (plain = 1)", ylabel=f"reward ({INTERVALS})")
    inks = [plots.ink(str(row.cell.name))[0] for row in others]
    right.barh([str(row.cell) for row in others], [row.found["memory"].mean for row in others], color=inks)
    right.invert_yaxis()
    right.set_xlabel("weights in memory (the language model alone = 1)")
    return drawing
