"""The embedded world is a grammar of short journeys, such as

    the sailor leaves for the mountain : she packs a kettle and walks the ridge into snow but comes home warm

What she packs and which road she takes all but decides, many words later, how the journey ends. The reference is a
small language model that has learned to write such journeys; reward models guide it to better ones. The judge is the
gold reward, the world's own: from -2.75 to 2.75, or -3.5 for a text that is no journey. No model is trained on it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pargs_min import plots
from pargs_min.experiments import report
from pargs_min.experiments.measure import Cell, guided, write
from pargs_min.experiments.recipes import FULL, SOFT_LABELS
from pargs_min.experiments.setup import Lab, embedded, judged, material
from pargs_min.experiments.sweep import Row, gather, sweep, workers

PAIRS, MODELS, RESULTS, NEXT = Path(__file__).with_name("demo.txt").read_text("utf-8").rstrip().split("\n\n")
SHIPPED, TRAINED = "shipped with the package, made by pargs_min.world.reference.reference", "trained now"
BETAS = (1.0, report.BETA)
COLUMNS = ("reward", "kl", "off_grammar", "calls")
say = partial(print, flush=True)  # at once, also where stdout is a pipe


def run(folder: Path, *, quick: bool = False, seed: int = 0) -> None:
    """Train, decode and compare; tables, figure and models stay in the folder.

    Args:
        quick: everything much smaller, and numbers to match.
        seed: of the reference, the pairs, the reward models and the texts; 0 takes the reference that is shipped.
    """
    torch.set_num_threads(1)  # the models are so small that a second thread only waits; processes do not
    say(__doc__)
    say(PAIRS.format(TRAINED if seed else SHIPPED))
    lab = small(folder, seed) if quick else embedded(folder, seed=seed, pairs=5000)
    lab = lab if quick else replace(lab, samples=64, plain_samples=1000, texts_per_prompt=None)
    say(MODELS)
    with workers(2) as pool:
        rows = gather(sweep(pool, {seed: {"": lab}}, cells(seed), folder / "demo.jsonl"))
    text = "\n\n".join([report.table(rows, COLUMNS), report.legend(rows, COLUMNS, seeds=1), side_by_side(lab, seed)])
    report.write(folder / "demo", text, draw(rows, lab), dict(lab=lab, seed=seed, rows=[row.as_json() for row in rows]))
    saved = NEXT.format(folder, SOFT_LABELS.folder_name(seed), material(lab).prompts[0]["prompt"])
    say("\n\n".join([RESULTS, text, saved]))


def small(folder: Path, seed: int) -> Lab:
    """A lab that takes less than a minute."""
    lab = embedded(folder, seed=seed, pairs=600, held_out=100)
    return replace(lab, samples=16, plain_samples=300, epochs=4.25)


def cells(seed: int) -> list[Cell]:
    args, cd = guided(seed, ["args"], BETAS), guided(seed, ["cd"], [report.BETA])
    return [Cell(seed, "plain"), *args, *pargs(seed, BETAS), *cd, Cell(seed, "best-of-n", n=16, recipe=FULL)]


def pargs(seed: int, betas: Sequence[float]) -> list[Cell]:
    return guided(seed, ["pargs"], betas, recipe=SOFT_LABELS)


def draw(rows: list[Row], lab: Lab) -> plots.Figure:
    drawing, (axes,) = plots.panels(1, (8.0, 4.6))
    report.reward_against_kl(axes, rows, [lab])
    axes.set_ylabel("gold reward")
    for row in rows:
        if row.cell.beta:
            spot = report.kl(row), row.found["reward"].mean
            axes.annotate(f"beta {row.cell.beta:g}", spot, (6, -10), textcoords="offset points", fontsize=8)
    return drawing


def side_by_side(lab: Lab, seed: int) -> str:
    """One prompt under plain, ARGS and PARGS: of each method's texts for it, the one with the median gold reward."""
    prompt = material(lab).prompts[0]["prompt"]
    lines = [f'"{prompt}" under three methods (beta {report.BETA:g}); of the texts of each, the one of median gold:']
    for cell in (Cell(seed, "plain"), *guided(seed, ["args"], BETAS[1:]), *pargs(seed, BETAS[1:])):
        texts = [text for text in write(lab, cell) if text["prompt"] == prompt]
        ranked = sorted(zip(judged(lab, texts), (text["response"] for text in texts), strict=True))
        gold, response = ranked[len(ranked) // 2]
        lines.append(f"    {cell.method:5}  {gold:5.2f}  {response}")
    return "\n".join(lines)
