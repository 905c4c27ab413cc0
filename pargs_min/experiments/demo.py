"""`pargs demo`: train, decode and compare on the embedded world, once and small enough to watch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pargs_min import plots
from pargs_min.experiments import report
from pargs_min.experiments.measure import FULL, PARTIAL, VALUE, Cell, write
from pargs_min.experiments.setup import Lab, embedded, judged
from pargs_min.experiments.sweep import Row, gather, sweep
from pargs_min.world.journey import HELD_OUT_PROMPTS

PROMPT = HELD_OUT_PROMPTS[0]
WELCOME = f"""\
The embedded world is a grammar of short journeys, such as
    {PROMPT} she packs a kettle and walks the ridge into snow but comes home warm
What she packs and which road she takes all but decides, many words later, how the journey ends. The reference is a
small language model that has learned to write such journeys; reward models guide it to better ones. The judge is the
gold reward, the world's own: from -2.75 to 2.75, or -3.5 for a text that is no journey. No model is trained on it.
"""
REFERENCE = """\
[1/3] The reference: {comes}.
      Preference pairs: two of its texts each, of which the one with more gold is chosen more often."""
SHIPPED, TRAINED = "shipped with the package, made by pargs_min.world.reference.reference", "trained now"
MODELS = """\
[2/3] Three reward models, trained on these pairs: on every prefix (PARGS), on whole texts (ARGS), and a value model
      (controlled decoding). Then every method writes for four prompts that no pair was made for."""
LEGEND = """\
beta: weight of the reward in guidance; n: best-of-n takes the best of n plain texts
reward: mean gold reward
KL: how far a method departs from the reference: the mean of log(its probability of a text / the reference's) over its
    texts, in nats (natural units: base e); ≤ marks an upper bound. The better method has more gold at the same KL.
off-grammar: share of texts that the grammar cannot have written
passes: texts run through a model once, by any model and for each text that is kept: the cost
One seed: another one, or another processor, trains models that differ; studies have error bars."""
NEXT = """\
Where to go next:
    pargs study partial-vs-full    the same for several seeds, with error bars and more methods
    pargs trace --model {folder}/reference --reward-model {folder}/models/{model} \\
        --prompt "{prompt}" --beta 2 --output trace.html    one text, token by token
    README.md    the same with your own model and pairs"""


def say_now(text: str) -> None:
    print(text, flush=True)  # also where stdout is a pipe


def run(folder: Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = say_now) -> None:
    """Do it all; tables, figure and models stay in the folder.

    Args:
        quick: everything much smaller, and numbers to match.
        seed: of the reference, the pairs, the reward models and the texts; 0 takes the reference that is shipped.
    """
    torch.set_num_threads(1)  # the models are so small that a second thread only waits; processes do not
    say(WELCOME)
    say(REFERENCE.format(comes=TRAINED if seed else SHIPPED))
    lab = small(folder, seed) if quick else replace(embedded(folder, seed=seed), plain_samples=1000)
    say(MODELS)
    rows = gather(sweep({"": lab}, [*cells(seed)], folder / "demo.jsonl"))
    say("[3/3] What came of it:")
    shown = report.table(rows, ("reward", "kl", "off_grammar", "calls"))
    text = "\n\n".join([shown, LEGEND, side_by_side(lab, seed)])
    report.write(folder / "demo", text, rows, draw(rows, lab), lab=lab, seed=seed)
    say(f"\n{text}\n\nsaved demo.md, demo.json and demo.png (gold reward against KL) in {folder}\n")
    say(NEXT.format(folder=folder, model=PARTIAL.folder_name(seed), prompt=PROMPT))


def small(folder: Path, seed: int) -> Lab:
    """A lab that takes less than a minute."""
    lab = embedded(folder, seed=seed, pairs=600, held_out=100)
    return replace(lab, samples=16, plain_samples=300, epochs=4.25)


def cells(seed: int) -> Iterator[Cell]:
    yield Cell(seed, "plain")
    for method, recipe in (("args", FULL), ("pargs", PARTIAL)):
        for beta in (1.0, report.BETA):
            yield Cell(seed, method, beta=beta, recipe=recipe)
    for method, recipe in (("pargs-greedy", PARTIAL), ("cd", VALUE)):
        yield Cell(seed, method, beta=report.BETA, recipe=recipe)
    yield Cell(seed, "best-of-n", n=16, recipe=FULL)


def draw(rows: list[Row], lab: Lab) -> Figure:
    drawing, (axes,) = plots.panels(1, (8.0, 4.6))
    report.reward_against_kl(axes, rows, lab)
    axes.set_ylabel("gold reward")
    return drawing


def side_by_side(lab: Lab, seed: int) -> str:
    """One prompt under plain, ARGS and PARGS: of each method's texts for it, the one with the median gold reward."""
    lines = [
        f'"{PROMPT}" under three methods, beta = {report.BETA:g}: of its texts, the one with the median gold reward'
    ]
    for method, recipe in (("plain", None), ("args", FULL), ("pargs", PARTIAL)):
        texts = write(lab, Cell(seed, method, beta=report.BETA if recipe else None, recipe=recipe))
        texts = [text for text in texts if text["prompt"] == PROMPT]
        ranked = sorted(zip(judged(lab, texts), (text["response"] for text in texts), strict=True))
        gold, response = ranked[len(ranked) // 2]
        lines.append(f"    {method:5}  {gold:5.2f}  {response}")
    return "\n".join(lines)
