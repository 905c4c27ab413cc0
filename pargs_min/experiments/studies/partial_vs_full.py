"""What is gained by training on prefixes?"""

from collections.abc import Sequence

import numpy as np

from pargs_min import plots
from pargs_min.experiments.measure import Cell, guided
from pargs_min.experiments.recipes import FULL, SOFT_LABELS
from pargs_min.experiments.report import BETAS, KL_LABEL, PARTICLES, Row, grouped, intervals_over, kl, reward_against_kl
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import interval

OURS = str(Cell(0, "pargs", recipe=SOFT_LABELS))
COLUMNS = ("reward", "prompt_error", "rlhf", "kl", "calls", "distinct2", "off_grammar")


def cells(lab: Lab, seed: int) -> list[Cell]:
    better = guided(seed, ("pargs", "pargs-greedy"), BETAS, recipe=SOFT_LABELS)
    tokenwise = better + guided(seed, ("pargs", "args", "args-greedy", "cd"), BETAS)  # the paper's PARGS among them
    smc = guided(seed, ["smc"], BETAS[1:3], recipe=SOFT_LABELS, particles=PARTICLES, final=FULL)
    return [Cell(seed, "plain"), *tokenwise, *smc, *(Cell(seed, "best-of-n", n=n, recipe=FULL) for n in (4, 16))]


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    drawing, (axes,) = plots.panels(1, (8.6, 5.0))
    reward_against_kl(axes, rows, labs)
    axes.set_xlabel(f"{KL_LABEL}; small marks: single seeds; {intervals_over(rows)}")
    return drawing


def conclude(rows: list[Row]) -> str:
    """PARGS minus each other method, at the KL that the other spent, seed by seed: read off the line through its betas.

    PARGS is trained with soft labels here; trained on the pairs, as in the paper, it is one of the others. Where the
    other's KL is a bound, this is one, too: PARGS would have less at the KL itself.
    """
    groups = grouped(rows, "name")
    (plain,), ours = groups.pop("plain"), groups.pop(OURS, [])
    others = [row for group in groups.values() for row in group if ours and not row.cell.writes.greedy]
    lines = [f"{OURS} minus others at equal KL (on the line through plain and its betas), and minus plain:"]
    for row in others:
        most = "at most " if row.cell.writes.bound else ""
        more = signed(ahead([plain, *ours], row), row) + beyond(ours, row)
        lines.append(f"- at the KL of {row.cell} ({kl(row):.2f}): {most}{more}")
    for row in ours:
        gained = np.subtract(row.found["reward"].seeds, plain.found["reward"].seeds).tolist()
        lines.append(f"- minus plain, beta={row.cell.beta:g}: {signed(gained, row)}")
    return "\n".join(lines)


def ahead(ours: list[Row], other: Row) -> list[float]:
    """Our reward minus the other's at the other's KL, of each seed."""
    spent = zip(other.found["kl"].seeds, other.found["reward"].seeds, strict=True)
    return [reward_at(seed, at, ours) - reward for seed, (at, reward) in enumerate(spent)]


def reward_at(seed: int, at: float, rows: list[Row]) -> float:
    """The reward of one seed's curve at a KL; beyond its ends the end's."""
    points = sorted((row.found["kl"].seeds[seed], row.found["reward"].seeds[seed]) for row in rows)
    return float(np.interp(at, *np.array(points).T))


def beyond(ours: list[Row], other: Row) -> str:
    """Says so where the other's KL is beyond all of ours."""
    most = max(kl(row) for row in ours)
    return f" (ours at its largest, {most:.2f})" if kl(other) > most else ""


def signed(values: Sequence[float], row: Row) -> str:
    """The mean of one value for each seed of a row, and its interval over seeds, or over the worlds that they share."""
    found, many = interval(values, row.worlds), len(set(row.worlds or range(len(values))))
    if many == 1:
        return f"{found.mean:+.2f} (one {'world' if row.worlds else 'seed'})"
    over = "worlds" if row.worlds else "seeds"
    return f"{found.mean:+.2f}, 95% [{found.low:+.2f}, {found.high:+.2f}] over {many} {over}"
