"""What is gained by training on prefixes?"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pargs_min import plots
from pargs_min.experiments import report
from pargs_min.experiments.measure import FULL, PARTIAL, VALUE, Cell, Lab
from pargs_min.experiments.report import BETAS, PARTICLES, Row, kl
from pargs_min.experiments.sweep import interval

GUIDED = {"args": FULL, "args-greedy": FULL, "pargs": PARTIAL, "pargs-greedy": PARTIAL, "cd": VALUE}


def cells(lab: Lab, seed: int) -> list[Cell]:
    guided = [Cell(seed, method, beta=beta, recipe=recipe) for method, recipe in GUIDED.items() for beta in BETAS]
    smc = Cell(seed, "smc", particles=PARTICLES, recipe=PARTIAL, final=FULL)
    best = [Cell(seed, "best-of-n", n=n, recipe=FULL) for n in (4, 16)]
    return [Cell(seed, "plain"), *guided, *(replace(smc, beta=beta) for beta in BETAS[1:3]), *best]


def draw(rows: list[Row], lab: Lab) -> plots.Figure:
    drawing, (axes,) = plots.panels(1, (8.6, 5.0))
    report.reward_against_kl(axes, rows, lab)
    axes.set_xlabel(f"{report.KL_LABEL}; small marks: single seeds; {report.INTERVALS}")
    return drawing


def conclude(rows: list[Row]) -> str:
    """PARGS minus each other method, at the KL that the other spent, seed by seed: read off the line through its betas.

    Where the other's KL is a bound, this is one, too: PARGS would have less at the KL itself.
    """
    groups = report.grouped(rows, "method")
    (plain,), ours = groups.pop("plain"), groups.pop("pargs")
    others = [row for group in groups.values() for row in group if not row.cell.writes.greedy]
    lines = ["PARGS minus others at equal KL (on the line through plain and PARGS's betas), and minus plain:"]
    for row in others:
        spent = zip(row.found["kl"].seeds, row.found["reward"].seeds, strict=True)
        ahead = [reward_at(seed, at, [plain, *ours]) - reward for seed, (at, reward) in enumerate(spent)]
        most = "at most " if row.cell.writes.bound else ""
        lines.append(f"- at the KL of {row.cell} ({kl(row):.2f}): {most}{signed(ahead)}")
    for row in ours:
        both = zip(row.found["reward"].seeds, plain.found["reward"].seeds, strict=True)
        lines.append(f"- PARGS minus plain, beta={row.cell.beta:g}: {signed([a - b for a, b in both])}")
    return "\n".join(lines)


def reward_at(seed: int, at: float, rows: list[Row]) -> float:
    """The reward of one seed's curve at a KL; beyond its ends the end's."""
    points = sorted((row.found["kl"].seeds[seed], row.found["reward"].seeds[seed]) for row in rows)
    return float(np.interp(at, *np.array(points).T))


def signed(values: Sequence[float]) -> str:
    found, seeds = interval(values), len(values)
    if seeds == 1:
        return f"{found.mean:+.2f} (one seed)"
    return f"{found.mean:+.2f}, 95% [{found.low:+.2f}, {found.high:+.2f}] over {seeds} seeds"


STUDY = report.Study(
    cells,
    draw,
    ("reward", "prompt_error", "rlhf", "kl", "calls", "distinct2", "off_grammar"),
    conclude=conclude,
    each_seed=True,  # what a reward model of whole texts does depends on its seed
)
