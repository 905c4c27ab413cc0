"""What is guidance worth on a real model, under judges that guided nothing?"""

from itertools import product

import numpy as np

from pargs_min.experiments.measure import Cell, guided
from pargs_min.experiments.recipes import FULL, PARTIAL, SOFT_LABELS, Recipe
from pargs_min.experiments.report import PARTICLES, Row, grouped, kl
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.studies.partial_vs_full import OURS, ahead, beyond, draw, signed
from pargs_min.experiments.sweep import interval

__all__ = ["COLUMNS", "cells", "conclude", "draw"]  # what a study has
COLUMNS = ("reward", "prompt_error", "second", "kl", "distinct2", "length", "calls", "seconds", "whole")
BETAS = (1.0, 3.0)


def cells(lab: Lab, seed: int) -> list[Cell]:
    found = [Cell(seed, "plain"), *guided(seed, ("pargs", "args", "cd"), BETAS)]
    found += guided(seed, ["pargs"], BETAS, recipe=SOFT_LABELS)
    for beta in BETAS:
        found += [Cell(seed, method, beta=beta, recipe=Recipe(method, beta=beta)) for method in ("soft", "reweighted")]
    found += [Cell(seed, "best-of-n", n=n, recipe=FULL) for n in (4, 16)]
    return [*found, Cell(seed, "smc", beta=BETAS[0], particles=PARTICLES, recipe=PARTIAL, final=FULL)]


def conclude(rows: list[Row]) -> str:
    """Each method minus plain, seed by seed; guides minus ARGS at equal KL; and what each writes."""
    plain, *others = rows  # the cells are in this order
    lines = ["Reward minus plain, of the same seed; the standard error over prompts, of the mean of the seeds:"]
    for row in others:
        more = np.subtract(row.found["reward"].seeds, plain.found["reward"].seeds).tolist()
        over_prompts = interval(np.subtract(row.found["by_prompt"].mean, plain.found["by_prompt"].mean).tolist())
        each = " ".join(f"{one:+.2f}" for one in more)
        lines.append(f"- {row.cell}: {signed(more, row)}; each seed {each}; over prompts ± {over_prompts.error:.2f}")
    groups = grouped(rows, "name")
    lines.append("\nMinus ARGS at equal KL (on the line through plain and the betas of each):")
    for row, name in product(groups.get("args", ()), ("pargs", OURS, "soft")):
        if name in groups:
            lines.append(
                f"- {name} at the KL of {row.cell} ({kl(row):.2f}): {signed(ahead([plain, *groups[name]], row), row)}"
                f"{beyond(groups[name], row)}"
            )
    lines.append("\nThe first text for each of the first prompts (first seed):")
    for row in rows:
        if "examples" in row.found:
            lines += [f"- {row.cell}", *(f"  > {' '.join(text.split())}" for text in row.found["examples"].mean)]
    return "\n".join(lines)
