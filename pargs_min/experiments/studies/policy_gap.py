"""How far are tokenwise policies from the RLHF policy?"""

from pargs_min import plots
from pargs_min.experiments.measure import FULL, Cell, Lab, guided
from pargs_min.experiments.report import BETAS, INTERVALS, PARTICLES, Row, curves, reward_against_kl
from pargs_min.methods import FINE_TUNED

COLUMNS = ("reward", "prompt_error", "rlhf", "kl", "gap", "off_grammar")


def cells(lab: Lab, seed: int) -> list[Cell]:
    found = [Cell(seed, "plain")]
    for beta in BETAS[:3]:
        found += guided(seed, ("args", "pargs", "cd"), [beta])
        found += guided(seed, ["smc"], [beta], particles=PARTICLES, final=FULL)
    return found + [Cell(seed, method, beta=1.0) for method in FINE_TUNED]


def draw(rows: list[Row], lab: Lab) -> plots.Figure:
    drawing, (left, right) = plots.panels(2, (10.4, 4.2))
    curves(left, rows, lambda row: row.cell.beta, "gap")
    left.set(xlabel=f"beta ({INTERVALS})", ylabel="KL(policy ‖ RLHF policy), nats per text", yscale="log")
    reward_against_kl(right, rows, lab)
    return drawing
