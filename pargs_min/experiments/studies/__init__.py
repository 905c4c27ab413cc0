"""`pargs study NAME`: the open questions of reward-guided generation, each one file and one small grid of cells.

    data-size        how much data does a reward model of prefixes need?
    policy-gap       how far are tokenwise policies from the RLHF policy?
    best-of-n        what does a unit of reward cost, in forward passes and in KL?
    beta             does the best beta, and the best k, carry over to other worlds and references?
    attribute        does the same method control a style, a topic, a length?
    prefix-length    at which lengths does a reward model know anything, and does it generalise to others?
    cost             how does the time of a token grow?
    architecture     do reward models of other shapes and sizes work?
    partial-vs-full  what is gained by training on prefixes?

A file has `cells`, the grid for one seed, `draw`, and the COLUMNS of its table; it may have `labs`, if it needs further
ones, and `conclude`, which reads an answer off the rows. One without a grid has `run` alone.

Each gives a table, a figure and a JSON file, on the embedded world or on a model, pairs and a judge of one's own.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pargs_min.experiments.report import legend, table, with_rlhf, write
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import gather, sweep

# The list above is the table of studies: a name in it, and its file here.
NAMES = [line.split()[0] for line in (__doc__ or "").splitlines() if line.startswith("    ")]


def run(name: str, lab: Lab, folder: Path, *, seeds: Sequence[int], processes: int = 2, quick: bool = False) -> str:
    """Measure what is not measured yet, write NAME.md, NAME.json and NAME.png to the folder; return the text.

    Raises:
        ValueError: if the folder holds the same study with other settings.
    """
    study = import_module(f"{__name__}.{name.replace('-', '_')}")
    if hasattr(study, "run"):
        return study.run(lab, folder, quick)
    labs = study.labs(lab, quick) if hasattr(study, "labs") else {"": lab}
    cells = [cell for seed in seeds for cell in study.cells(lab, seed)]
    rows = gather(sweep(labs, cells, folder / f"{name}.jsonl", processes))
    rows = [with_rlhf(row, labs[row.cell.lab]) for row in rows]
    shown = table(rows, study.COLUMNS, each_seed=hasattr(study, "conclude"))
    parts = [f"{name}, seeds {seeds[0]} to {seeds[-1]}", shown, legend(rows, study.COLUMNS, len(seeds))]
    text = "\n\n".join([*parts, study.conclude(rows)] if hasattr(study, "conclude") else parts)
    facts = dict(study=name, lab=lab, seeds=list(seeds), rows=[row.as_json() for row in rows])
    write(folder / name, text, study.draw(rows, lab), facts)
    return text
