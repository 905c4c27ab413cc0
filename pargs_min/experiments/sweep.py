"""A grid of cells: run in several processes, kept as it comes, resumed where it stopped, gathered over seeds."""

import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import RLock, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm
from transformers.utils import logging
from transformers.utils.logging import is_progress_bar_enabled

from pargs_min.experiments import measure, recipes
from pargs_min.experiments.forecast import forecast, pace, told
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.setup import Lab, as_json, contents, load_judges
from pargs_min.progress import progress
from pargs_min.records import read_jsonl
from pargs_min.store import appending

Worlds = Mapping[int, Mapping[str, Lab]]  # seed -> name -> lab; the name is "" where there is one


class Workers(NamedTuple):
    """Processes that train and decode side by side, started when they are needed; each keeps what it has loaded."""

    executor: Executor
    processes: int


def in_each_world(pool: Workers, make: Callable[[int], Mapping[str, Lab]], seeds: Sequence[int]) -> Worlds:
    """The labs of each seed, made side by side."""
    made = {seed: labs for (_, seed), labs in _run(pool, [(make, seed) for seed in seeds], "worlds")}
    return {seed: made[seed] for seed in seeds}


def sweep(pool: Workers, worlds: Worlds, cells: Sequence[Cell], file: Path) -> dict[Cell, dict]:
    """Measure every cell that the file does not hold yet, appending each as it comes; what all cells found, in order.

    A cell's lab is that of its name in the world of its seed. The file has a line {"seed", "labs", "contents"} for each
    seed (`_head`), which comes before the seed's cells: {"cell", "found"}.

    Raises:
        ValueError: if the file was made with other labs, a cell needs what is not installed, or a process is killed.
    """
    if find_spec("trl") is None and any(one.objective in recipes.NEED_TRL for cell in cells for one in cell.recipes):
        raise ValueError("these cells train DPO, which is TRL's: pip install -e '.[baselines]' -c constraints.txt")
    done = _read(file, worlds, cells)
    if left := [cell for cell in cells if cell not in done]:
        with appending(file) as append:
            judging = {worlds[cell.seed][cell.lab] for cell in left if cell.method}
            for _ in _run(pool, [(load_judges, lab) for lab in judging], "judges"):
                pass
            shared = _shared(worlds, left)  # first, so that none of it is made twice
            of_cells = [(measure.measure, worlds[cell.seed][cell.lab], cell) for cell in left]
            _say_how_long(pool, [*shared, of_cells])
            for jobs in shared:
                for _ in _run(pool, jobs, "models and texts"):
                    pass
            for (_, _, cell), found in _run(pool, of_cells, "cells"):
                append({"cell": as_json(cell), "found": found})
                done[cell] = found
    return {cell: done[cell] for cell in cells}


def _say_how_long(pool: Workers, stages: list[list[tuple]]) -> None:
    """On stderr, for models of one's own: those of the embedded world are known, and small."""
    labs = {lab for jobs in stages for _, lab, *_ in jobs if lab.world is None}
    if labs and is_progress_bar_enabled():
        paces = {lab: found for (_, lab), found in _run(pool, [(pace, lab) for lab in labs], "a short measurement")}
        seconds = forecast(stages, paces, pool.processes)
        print(
            f"this will take {told(seconds)}; it can be interrupted, and then continues from what is finished",
            file=sys.stderr,
        )


def _run(pool: Workers, jobs: list[tuple], desc: str) -> Iterator[tuple[tuple, Any]]:
    """Each job and what it returned, in the order in which they end."""
    try:
        with _no_interrupts():
            futures = {pool.executor.submit(*job): job for job in jobs}
        for future in progress(as_completed(futures), desc=desc, total=len(futures)) if futures else ():
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"a process that made {desc} was killed, perhaps for memory: lower --processes and start again; what is "
            "made is kept"
        ) from None


def _read(file: Path, worlds: Worlds, cells: Sequence[Cell]) -> dict[Cell, dict]:
    """What the file holds of these cells; it gets the lines of new seeds."""
    known = [(cell, as_json(cell)) for cell in cells]
    lines = [line for line, _ in read_jsonl(file, growing=True)] if file.exists() else []
    found = [line for line in lines if "found" in line]
    heads = {line.get("seed"): line for line in lines if "labs" in line}
    begun = {line["cell"]["seed"] for line in found}
    with appending(file) as append:
        for seed, labs in worlds.items():
            head = _head(seed, labs)
            if seed in begun and (differ := _differ(heads.get(seed, {}), head)):
                raise ValueError(f"{file} was made with other {differ}: choose another --output-dir, or delete it")
            if heads.get(seed) != head:
                append(head)
    return {cell: line["found"] for line in found for cell, written in known if written == line["cell"]}


# What tells where things lie, not what they are; and what changes no number.
PLACES = {"folder", "model", "pairs", "held_out", "prompts", "judge", "second_judge", "batch_size"}


def _head(seed: int, labs: Mapping[str, Lab]) -> dict:
    """What the cells of a seed depend on: settings, and contents wherever they lie."""
    settings = as_json(labs)
    kept = {name: {key: one[key] for key in one if key not in PLACES} for name, one in settings.items()}
    return {"seed": seed, "labs": kept, "contents": {name: contents(lab) for name, lab in labs.items()}}


def _differ(there: dict, now: dict) -> str:
    """The names of what two heads do not share; empty where they are alike."""
    names = []
    for part, labs in ((part, now[part]) for part in ("labs", "contents")):
        for name, ours in labs.items():
            theirs = there.get(part, {}).get(name, {})
            names += [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    return ", ".join(dict.fromkeys(names))


STAGES = {"pairs": 0, "rollouts": 1, "texts": 2, "guide": 3}  # when models are trained, by what they learn from


def _shared(worlds: Worlds, cells: Sequence[Cell]) -> list[list[tuple]]:
    """Jobs that make what cells share, in stages: each needs what those before it make."""
    stages: dict[tuple, int] = {}
    for cell in cells:
        lab = worlds[cell.seed][cell.lab]
        texts = {measure.plain_rewards: cell.method, measure.siblings: cell.quality}
        stages |= {(make, lab): 0 for make, needed in texts.items() if needed}
        for model in [model for recipe in cell.recipes for model in (*recipe.ingredients, recipe)]:
            stages[recipes.make, lab, model, cell.seed] = STAGES[model.training.source]
            if model.training.source == "texts":
                stages |= {(recipes.samples, lab): 0, (recipes.rated, lab, cell.seed): 1}
    return [[job for job in stages if stages[job] == stage] for stage in range(len(STAGES))]


@contextmanager
def workers(processes: int) -> Iterator[Workers]:
    """So many of them, while this is open; an error or an interrupt drops what has not begun."""
    how = (os.getpid(), warnings.formatwarning)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), quiet_worker, how)
    try:
        yield Workers(pool, processes)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """An interrupt waits: here until the end, and in processes that are started here until `quiet_worker` is called."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet_worker(parent: int, formatwarning: Callable[..., str]) -> None:
    """One thread, since processes share the cores, and no word: the first process reports, also of an interrupt.
    Warnings look as the parent's do."""
    warnings.formatwarning = formatwarning
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tqdm.set_lock(RLock())  # instead of one between processes, which an interrupt would leave behind


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, however that came about."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# ---- over seeds ----


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its standard error and the ends of Student's 95% interval, and the value of each seed.

    For curves all of them are lists, place by place; nan where they are not known.
    """

    mean: Any
    error: Any = math.nan
    low: Any = math.nan
    high: Any = math.nan
    seeds: Sequence = ()


class Row(NamedTuple):
    """A cell of any seed, what its seeds found, and the world of each seed where they have worlds."""

    cell: Cell
    found: dict[str, Estimate]
    worlds: list[Hashable] | None = None

    def as_json(self) -> dict:
        """One flat object, without the seed."""
        return {name: value for name, value in as_json(self.cell).items() if name != "seed"} | as_json(self.found)


def gather(measured: Mapping[Cell, dict], worlds: Mapping[int, Hashable] | None = None) -> list[Row]:
    """A row for all cells that differ in their seed only, with an `Estimate` of each measure.

    prompt_error is the standard error of the reward over prompts, seeds averaged.

    Args:
        worlds: the world of each seed, where they have worlds: errors are then those over worlds.
    """
    groups: dict[Cell, dict[int, dict]] = {}
    for cell, found in measured.items():
        groups.setdefault(replace(cell, seed=0), {})[cell.seed] = found
    of_seeds = {cell: [worlds[seed] for seed in seeds] if worlds else None for cell, seeds in groups.items()}
    return [Row(cell, _summary([*seeds.values()], of_seeds[cell]), of_seeds[cell]) for cell, seeds in groups.items()]


def _summary(seeds: list[dict], worlds: list[Hashable] | None) -> dict[str, Estimate]:
    known = [name for name in seeds[0] if all(name in found for found in seeds)]
    summary = {name: interval([found[name] for found in seeds], worlds) for name in known if name != "examples"}
    if "examples" in known:
        summary["examples"] = Estimate(seeds[0]["examples"])
    if "by_prompt" in summary:
        summary["prompt_error"] = Estimate(interval(summary["by_prompt"].mean).error)
    return summary


def interval(values: Sequence, worlds: Sequence[Hashable] | None = None) -> Estimate:
    """The `Estimate` of numbers, or of curves of equal length, that differ in their seed.

    Args:
        worlds: of each value, where several may share one: the mean of a world then counts as one value.

    >>> found = interval([1.0, 3.0])
    >>> found.mean, found.error, round(found.low, 2), round(found.high, 2)
    (2.0, 1.0, -10.71, 14.71)
    >>> found = interval([0.0, 3.0, 2.0, 3.0], "abab")  # two worlds, whose means are 1 and 3
    >>> found.mean, found.error, found.seeds
    (2.0, 1.0, [0.0, 3.0, 2.0, 3.0])
    """
    array = np.array(values, dtype=float)
    if worlds:
        array = np.stack([array[[other == world for other in worlds]].mean(0) for world in dict.fromkeys(worlds)])
    n, mean = len(array), array.mean(0)
    error = array.std(0, ddof=1) / math.sqrt(n) if n > 1 else mean * math.nan
    half = error * stats.t.ppf(0.975, n - 1) if n > 1 else error
    return Estimate(mean.tolist(), error.tolist(), (mean - half).tolist(), (mean + half).tolist(), list(values))
