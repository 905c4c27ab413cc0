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

Each gives a table, a figure and a JSON file, on the embedded world or on a model, pairs and a judge of one's own.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pargs_min.experiments.report import Study, legend, table, with_rlhf, write
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import gather, sweep

# The list above is the table of studies: a name in it, and its file here.
NAMES = [line.split()[0] for line in (__doc__ or "").splitlines() if line.startswith("    ")]


def run(name: str, lab: Lab, folder: Path, *, seeds: Sequence[int], processes: int = 2, quick: bool = False) -> str:
    """Measure what is not measured yet, write NAME.md, NAME.json and NAME.png to the folder; return the text.

    Raises:
        ValueError: if the folder holds the same study with other settings.
    """
    study = import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
    if not isinstance(study, Study):  # no grid: it is run by itself
        return study(lab, folder, quick)
    labs = study.labs(lab, quick)
    cells = [cell for seed in seeds for cell in study.cells(lab, seed)]
    rows = gather(sweep(labs, cells, folder / f"{name}.jsonl", processes))
    rows = [with_rlhf(row, labs[row.cell.lab]) for row in rows]
    head, shown = f"{name}, seeds {seeds[0]} to {seeds[-1]}", table(rows, study.columns, study.each_seed)
    text = "\n\n".join(filter(None, [head, shown, legend(rows, study.columns, len(seeds)), study.conclude(rows)]))
    write(folder / name, text, rows, study.draw(rows, lab), study=name, lab=lab, seeds=list(seeds))
    return text
