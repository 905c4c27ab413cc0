"""The main job on the embedded world: train reward models, guide a language model with them, show what was gained.

Everything is made here: the reference model, its preference pairs, reward models of prefixes, of whole texts and of
values (several of each, and every one is shown), texts of every method for prompts that no pair was made for, judged
by the gold reward that nothing was trained on. It is the study `partial-vs-full` with something to read beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pargs_min import plots
from pargs_min.experiments import studies as study
from pargs_min.experiments.measure import Cell, Lab, embedded, gather, sweep, write
from pargs_min.world.journey import Journey
from pargs_min.world.reference import reference_gap

MODELS = 3  # reward models of each kind
SHOWN_BETA = 2.0  # whose texts are printed


def run(folder: Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Do it all; tables, figures and models stay in the folder.

    Args:
        quick: everything much smaller, and numbers to match.
        seed: of the reference, the pairs, the first reward models and the texts.
    """
    torch.set_num_threads(1)  # the models are so small that a second thread only waits; processes do not
    lab = small(folder, seed) if quick else embedded(folder, seed=seed)
    gap = reference_gap(AutoModelForCausalLM.from_pretrained(lab.model).eval(), Journey(), texts=1200)
    say(
        f"reference: {gap['model']:.3f} nats a token on fresh texts of the grammar; the grammar itself needs "
        f"{gap['automaton']:.3f} on them, {gap['entropy']:.3f} in expectation"
    )
    seeds = range(seed, seed + MODELS)
    text = study.run("partial-vs-full", lab, folder, seeds=seeds)
    known = gather(sweep({"": lab}, [*judging_cells(seeds)], folder / "accuracy.jsonl"))
    curves = {row["recipe"]["objective"]: row["accuracy"]["seeds"] for row in known}
    plots.save(plots.prefix_accuracy(curves, "Held-out pairs, read up to a prefix"), folder / "prefix_accuracy.png")
    for name, some in examples(lab, seed):
        say(f"\n{name}\n" + "\n".join(f"    {one}" for one in some))
    say(f"\n{text}\n\n{LEGEND}\n\nsaved partial-vs-full.md, .json, .png and prefix_accuracy.png in {folder}")


def small(folder: Path, seed: int) -> Lab:
    """A lab that takes less than a minute."""
    lab = embedded(folder, seed=seed, steps=250, pairs=600, held_out=300)
    return replace(lab, samples=16, plain_samples=300, epochs=4.25)


LEGEND = """reward: the world's gold reward of a text, ± a standard error over reward models; RLHF: the most that any
policy reaches at the same KL to the reference; KL: in nats a text (≤ an upper bound); passes: of one row by any model,
a text; off-grammar: share of texts that the grammar cannot have written; greedy methods write one text a prompt"""


def judging_cells(seeds: range) -> Iterator[Cell]:
    """Every reward model by itself: how well it orders held-out pairs after 1, 2, ... tokens."""
    for recipe in (study.FULL, study.PARTIAL):
        for seed in seeds:
            yield dict(recipe=recipe, quality=True, seed=seed)


def examples(lab: Lab, seed: int) -> Iterator[tuple[str, list[str]]]:
    """(name, a text for each of three prompts) of each way to write, at one beta."""
    few = replace(lab, samples=1)
    for cell in study.partial_vs_full_cells(lab, seed):
        if cell.get("beta", SHOWN_BETA) == SHOWN_BETA:
            yield study.method_name(cell), [text["response"] for text in write(few, cell)[:3]]
