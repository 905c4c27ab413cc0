"""`pargs study NAME`: the open questions of reward-guided generation, each one file and one small grid of cells.

    data-size        how much data does a reward model of prefixes need?
    guides           how far do guides reach, at one call per token, and how far is the RLHF policy?
    best-of-n        what does a unit of reward cost, in forward passes and in KL?
    beta             does the best beta, and the best k, carry over to other worlds and references?
    attribute        does the same method control a style, a topic, a length?
    prefix-length    at which lengths does a reward model know anything, and does it generalise to others?
    cost             how does the time of a token grow?
    cheaper          what may be left out of guidance, and how much of its gain goes with it?
    architecture     do reward models of other shapes and sizes work?
    partial-vs-full  what is gained by training on prefixes?
    real             what is guidance worth on a real model, under judges that guided nothing?

A file has `cells`, the grid for one seed, `draw`, and the COLUMNS of its table; it may have `labs`, if it needs further
ones, and `conclude`, which reads an answer off the rows. One without a grid has `run` alone.

Each gives a table, a figure and a JSON file, on the embedded world or on a model, pairs and a judge of one's own.
policy-gap is another name of guides.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pargs_min.experiments.measure import Cell
from pargs_min.experiments.report import legend, table, with_rlhf, write
from pargs_min.experiments.setup import Lab
from pargs_min.experiments.sweep import gather, in_each_world, sweep, workers

# The list above is the table of studies: a name in it, and its file here.
OTHER_NAMES = {"policy-gap": "guides"}
NAMES = [line.split()[0] for line in (__doc__ or "").splitlines() if line.startswith("    ")]


def run(
    name: str,
    world: Callable[[int], Lab],
    folder: Path,
    *,
    seeds: Sequence[int],
    processes: int = 2,
    quick: bool = False,
    methods: Sequence[str] = (),
    betas: Sequence[float] = (),
) -> str:
    """Measure what is not measured yet, write NAME.md, NAME.json and NAME.png to the folder; return the text.

    Args:
        world: the lab of each seed: a world of its own, or the same for all.
        methods, betas: only these of the study's, where any are given; plain is always there.

    Raises:
        ValueError: if the folder holds the same study with other settings, or the study has no such method or beta.
    """
    study = _study(name)
    if hasattr(study, "run"):
        chosen([], methods, betas)
        return study.run(world(seeds[0]), folder, quick)
    with workers(processes) as pool:
        worlds = in_each_world(pool, partial(_labs, name, world, quick), seeds)
        labs = [worlds[seed][""] for seed in seeds]
        cells = [cell for seed, lab in zip(seeds, labs, strict=True) for cell in study.cells(lab, seed)]
        measured = sweep(pool, worlds, chosen(cells, methods, betas), folder / f"{name}.jsonl")
    found = {cell: with_rlhf(worlds[cell.seed][cell.lab], cell, found) for cell, found in measured.items()}
    rows = gather(found, dict(zip(seeds, labs, strict=True)) if len(set(labs)) > 1 else None)
    shown = table(rows, study.COLUMNS, each_seed=hasattr(study, "conclude"))
    said = legend(rows, study.COLUMNS, len(seeds), worlds=len(set(labs)))
    parts = [f"{name}, seeds {seeds[0]} to {seeds[-1]}", shown, said]
    text = "\n\n".join([*parts, study.conclude(rows)] if hasattr(study, "conclude") else parts)
    facts = dict(study=name, labs=[*dict.fromkeys(labs)], seeds=list(seeds), rows=[row.as_json() for row in rows])
    write(folder / name, text, study.draw(rows, labs), facts)
    return text


def chosen(cells: Sequence[Cell], methods: Sequence[str], betas: Sequence[float]) -> list[Cell]:
    """The cells of these methods, as tables name them, and of these betas; all where none are given. Those that need no
    model of their own are always there.

    >>> from pargs_min.experiments.measure import guided
    >>> cells = [Cell(0, "plain"), *guided(0, ["pargs", "args"], [1.0, 3.0])]
    >>> [str(cell) for cell in chosen(cells, ["pargs"], [3.0])]
    ['plain', 'pargs beta=3']

    Raises:
        ValueError: if no cell has such a method or beta.
    """
    for option, name, asked in (("--methods", "name", methods), ("--betas", "beta", betas)):
        known = dict.fromkeys(value for cell in cells if (value := getattr(cell, name)) is not None)
        if unknown := [value for value in asked if value not in known]:
            has = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"{option}: this study has no {unknown[0]!r}; it has {has}")
    of_methods = [cell for cell in cells if not methods or cell.name in methods or not cell.recipes]
    return [cell for cell in of_methods if not betas or cell.beta in (None, *betas)]


def _study(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def _labs(name: str, world: Callable[[int], Lab], quick: bool, seed: int) -> dict[str, Lab]:
    """The lab of a seed, and the further ones of a study."""
    lab, study = world(seed), _study(name)
    return {"": lab} | (study.labs(lab, quick) if hasattr(study, "labs") else {})
