"""`pargs study NAME`: the open questions of reward-guided generation, each a small grid of cells (`lab.py`).

    data-size        how much data does a reward model of prefixes need?
    policy-gap       how far are tokenwise policies from the RLHF policy?
    best-of-n        what does a unit of reward cost, in passes and in KL?
    beta             does the best beta, and the best k, carry over to other worlds and references?
    attribute        does the same method control a style, a topic, a length?
    prefix-length    at which lengths does a reward model know anything, and does it generalise to others?
    cost             how does the time of a token grow?
    architecture     do reward models of other shapes and sizes work?
    partial-vs-full  what is gained by training on prefixes?

Each gives a table, a figure and a JSON file, on the embedded world or on a model, pairs and a judge of one's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from pargs_min import plots
from pargs_min.benchmark import report as benchmark
from pargs_min.benchmark import ways as cost
from pargs_min.experiments.measure import Cell, Lab, device, embedded, gather, interval, judged, plain_rewards, sweep
from pargs_min.models import load_reward_model
from pargs_min.records import is_messages, read_preferences
from pargs_min.world.reference import FrontierPoint, frontier

PARTIAL, FULL, VALUE = {"objective": "partial"}, {"objective": "full"}, {"objective": "value"}
BETAS = (0.5, 1.0, 2.0, 3.0)
BETA = 2.0  # where one is enough
PARTICLES = 8

Rows = list[dict]  # of `lab.gather`


@dataclass(frozen=True)
class Study:
    """A question, its cells for one seed, and how the answer is shown."""

    cells: Callable[[Lab, int], Iterator[Cell]]
    draw: Callable[[Rows, Lab], Figure]
    columns: tuple[str, ...]  # of the table
    labs: Callable[[Lab, bool], dict[str, Lab]] = lambda lab, quick: {"": lab}
    conclude: Callable[[Rows], Iterator[str]] = lambda rows: iter(())
    each_seed: bool = False  # show the reward of each


def run(name: str, lab: Lab, folder: Path, *, seeds: Sequence[int], processes: int = 2, quick: bool = False) -> str:
    """Measure what is not measured yet, write NAME.md, NAME.json and NAME.png to the folder; return the text.

    Raises:
        ValueError: if the folder holds the same study with other settings.
    """
    if name == "cost":
        return run_cost(lab, folder, quick)
    study = STUDIES[name]
    labs = study.labs(lab, quick)
    cells = [cell for seed in seeds for cell in study.cells(lab, seed)]
    rows = gather(sweep(labs, cells, folder / f"{name}.jsonl", processes))
    rows = [row | rlhf_at_equal_kl(row, labs[row.get("lab", "")]) for row in rows]
    text = "\n\n".join(
        [f"{name}, seeds {seeds[0]} to {seeds[-1]}", table(rows, study.columns, study.each_seed), *study.conclude(rows)]
    )
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    kept = {"study": name, "lab": asdict(lab), "seeds": list(seeds), "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(without_nan(kept), indent=1), encoding="utf-8")
    plots.save(study.draw(rows, lab), folder / f"{name}.png")
    return text


def rlhf_at_equal_kl(row: dict, lab: Lab) -> dict:
    """{"rlhf": the most reward that any policy has at the row's KL}, where that is known and the KL a policy's own."""
    if not row.get("method") or row["method"].endswith("-greedy"):
        return {}
    points = optimum(lab)
    kl = row["kl"]["mean"]
    if not points or kl > points[-1].kl:
        return {}
    reward = np.interp(kl, [point.kl for point in points], [point.reward for point in points])
    return {"rlhf": {"mean": float(reward), "error": math.nan}}


@cache
def optimum(lab: Lab) -> list[FrontierPoint]:
    """The RLHF policies of the judge's reward, from little KL to much, by the lab's own samples of the reference."""
    rewards = plain_rewards(lab)
    return frontier(rewards, [*np.linspace(0, 1, 41), *np.linspace(1.1, 6, 50)], least=min(500, rewards.size // 4))


def run_cost(lab: Lab, folder: Path, quick: bool) -> str:
    """The report of `pargs benchmark`, on the lab's model with a new reward head, or on small random ones."""
    if lab.world is not None:  # whose texts are too short to tell
        models = cost.models_of_shape("tiny", device=device())
    else:
        lm = AutoModelForCausalLM.from_pretrained(lab.model).to(device()).eval()
        scalar = load_reward_model(lab.model).to(device()).eval()
        models = cost.Models(lm, scalar, cost.with_vocabulary_head(scalar))
    settings = dict(top_k=10, batch_size=1, prompt_length=64, tokens=4 if quick else 8, rounds=2 if quick else 7)
    report = benchmark.run(models, quick=quick, **settings)
    text = benchmark.markdown(report)
    (folder / "cost.md").write_text(text + "\n", encoding="utf-8")
    (folder / "cost.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plots.save(benchmark.draw(report), folder / "cost.png")
    return text


def without_nan(value):
    """The same with None for what is no number, as JSON wants it."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- the grids ----


def data_size_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    for method, recipe in (("args", FULL), ("pargs", PARTIAL)):
        for share in (16, 8, 4, 2, 1):
            some = {} if share == 1 else {"pairs": pairs_of(lab) // share}
            yield dict(method=method, beta=BETA, recipe=recipe | some, quality=True, seed=seed)


def pairs_of(lab: Lab) -> int:
    """How many pairs a lab has to train on."""
    held_out = 0 if lab.held_out else 0.1
    return round(len(read_preferences(lab.pairs)) * (1 - held_out))


def policy_gap_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    yield dict(method="plain", seed=seed)
    for beta in BETAS[:3]:
        for method, recipe in (("args", FULL), ("pargs", PARTIAL), ("cd", VALUE)):
            yield dict(method=method, beta=beta, recipe=recipe, seed=seed)
        yield dict(method="smc", beta=beta, particles=PARTICLES, recipe=PARTIAL, final=FULL, seed=seed)
    for method in ("dpo", "ppo"):
        yield dict(method=method, beta=1.0, seed=seed)


def best_of_n_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    yield dict(method="plain", seed=seed)
    for n in (2, 4, 8, 16, 32):
        yield dict(method="best-of-n", n=n, recipe=FULL, seed=seed)
    for beta in BETAS:
        yield dict(method="pargs", beta=beta, recipe=PARTIAL, seed=seed)
    for particles in (2, 4, 8, 16):
        yield dict(method="smc", beta=BETA, particles=particles, recipe=PARTIAL, final=FULL, seed=seed)


def beta_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    for world in OTHER_WORLDS if lab.world is not None else ("",):
        for top_k in (3, 10, 0):
            for beta in (*BETAS, 4.0):
                yield dict(lab=world, method="pargs", top_k=top_k, beta=beta, recipe=PARTIAL, seed=seed)


OTHER_WORLDS = {
    "": {},
    "forgiving": {"luck": Fraction(1, 4)},  # a first mistake can be undone
    "early reference": {"steps": 500},  # a third of the training
}


def beta_labs(lab: Lab, quick: bool) -> dict[str, Lab]:
    if lab.world is None:
        return {"": lab}
    others = {}
    for name, settings in OTHER_WORLDS.items():
        folder = Path(lab.folder) / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        others[name] = embedded(folder, quick=quick, **settings) if name else lab
    return others


ATTRIBUTES = ("style", "topic", "brevity")


def attribute_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    for name in ATTRIBUTES if lab.world is not None else ("",):
        yield dict(lab=name, method="plain", seed=seed)
        for method, recipe in (("args", FULL), ("pargs", PARTIAL)):
            for beta in BETAS[:3]:
                yield dict(lab=name, method=method, beta=beta, recipe=recipe, seed=seed)


def attribute_labs(lab: Lab, quick: bool) -> dict[str, Lab]:
    """The same texts, labelled anew by the attribute that is the judge, too."""
    if lab.world is None:
        return {"": relabelled(lab, "attribute", lab.judge)}
    return {name: relabelled(lab, name, f"pargs_min.world.attributes:{name}") for name in ATTRIBUTES}


def relabelled(lab: Lab, name: str, judge: str) -> Lab:
    """A lab whose pairs are the given one's, the chosen response the one with more reward; pairs of a tie are left out.

    Half the passes over the pairs are enough: these labels have no noise.
    """
    folder = Path(lab.folder) / name
    folder.mkdir(exist_ok=True)
    other = replace(lab, folder=str(folder), judge=judge, world=None, epochs=lab.epochs / 2)
    other = replace(other, plain_samples=min(lab.plain_samples, 400))
    files = {kind: getattr(lab, kind) for kind in ("pairs", "held_out") if getattr(lab, kind)}
    for kind, source in files.items():
        file = folder / f"{kind}.jsonl"
        if not file.exists():
            file.write_text("".join(json.dumps(pair) + "\n" for pair in _by_reward(other, source)), encoding="utf-8")
        other = replace(other, **{kind: str(file)})
    return other


def _by_reward(lab: Lab, source: str) -> Iterator[dict]:
    tokenizer = AutoTokenizer.from_pretrained(lab.model)

    def text(words):
        return tokenizer.decode(words, skip_special_tokens=True) if _is_ids(words) else words

    pairs = read_preferences(source)
    rewards = [
        judged(
            lab,
            [
                {"prompt": text(pair.prompt), "prompt_number": i, "sample": 0, "response": text(getattr(pair, side))}
                for i, pair in enumerate(pairs)
            ],
        )
        for side in ("chosen", "rejected")
    ]
    for pair, first, second in zip(pairs, *rewards, strict=True):
        if first != second:
            two = (pair.chosen, pair.rejected) if first > second else (pair.rejected, pair.chosen)
            named = zip(("prompt", "chosen", "rejected"), (pair.prompt, *two), strict=True)
            yield {f"{name}_ids" if _is_ids(value) else name: value for name, value in named}


def _is_ids(value) -> bool:
    return isinstance(value, list) and not is_messages(value)


def prefix_length_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    third = lab.max_new_tokens // 3
    some = [PARTIAL | {"lengths": lengths} for lengths in ([1, third], [third + 1, None])]
    for recipe in (FULL, VALUE, PARTIAL, *some):
        yield dict(recipe=recipe, quality=True, seed=seed)


def architecture_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    yield dict(method="pargs", beta=BETA, recipe=PARTIAL, quality=True, seed=seed)
    yield dict(method="pargs", beta=BETA, recipe=PARTIAL | {"head": "vocab"}, quality=True, seed=seed)
    for start in SHAPES if lab.world is not None else ():  # they are shapes for its short texts
        yield dict(method="pargs", beta=BETA, recipe=PARTIAL | {"start": start}, quality=True, seed=seed)


SHAPES = (  # random weights: nothing is known of the language but what the pairs show
    {"family": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64},
    {"family": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64},
    {"family": "gpt2", "n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 64},
    {
        "family": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
)


def partial_vs_full_cells(lab: Lab, seed: int) -> Iterator[Cell]:
    yield dict(method="plain", seed=seed)
    for method, recipe in (
        ("args", FULL),
        ("args-greedy", FULL),
        ("pargs", PARTIAL),
        ("pargs-greedy", PARTIAL),
        ("cd", VALUE),
    ):
        for beta in BETAS:
            yield dict(method=method, beta=beta, recipe=recipe, seed=seed)
    for beta in BETAS[1:3]:
        yield dict(method="smc", beta=beta, particles=PARTICLES, recipe=PARTIAL, final=FULL, seed=seed)
    for n in (4, 16):
        yield dict(method="best-of-n", n=n, recipe=FULL, seed=seed)


# ---- what the numbers say ----


def at_equal_kl(rows: Rows) -> Iterator[str]:
    """PARGS less each other method, at the KL that the other spent, seed by seed: read off the line through its betas.

    Where the other's KL is a bound, this is one, too: PARGS would have less at the KL itself.
    """
    plain = next(row for row in rows if row["method"] == "plain")
    ours = [row for row in rows if row["method"] == "pargs"]
    lines = ["PARGS less others at equal KL (line through plain and PARGS's betas), and less plain:"]
    for row in rows:
        if row["method"] not in ("plain", "pargs") and not row["method"].endswith("-greedy"):
            ahead = [
                _reward_at(seed, kl, [plain, *ours]) - reward
                for seed, (kl, reward) in enumerate(zip(row["kl"]["seeds"], row["reward"]["seeds"], strict=True))
            ]
            most = "at most " if row["method"] in BOUNDED else ""
            lines.append(f"- at the KL of {method_name(row)} ({row['kl']['mean']:.2f}): {most}{_signed(ahead)}")
    for row in ours:
        both = zip(row["reward"]["seeds"], plain["reward"]["seeds"], strict=True)
        lines.append(f"- PARGS less plain, beta={row['beta']:g}: {_signed([a - b for a, b in both])}")
    yield "\n".join(lines)


BOUNDED = ("best-of-n", "smc")  # methods whose KL is an upper bound


def method_name(cell: Cell) -> str:
    """A method and its setting in a few words.

    >>> method_name({"method": "args", "beta": 2.0}), method_name({"method": "best-of-n", "n": 4})
    ('args beta=2', 'best-of-n n=4')
    """
    named = (name for name in ("beta", "n", "particles") if cell.get(name) is not None)
    return " ".join([cell["method"], *(f"{name}={cell[name]:g}" for name in named)])


def _reward_at(seed: int, kl: float, rows: Rows) -> float:
    """The reward of one seed's curve at a KL; beyond its ends the end's."""
    points = sorted((row["kl"]["seeds"][seed], row["reward"]["seeds"][seed]) for row in rows)
    return float(np.interp(kl, *zip(*points, strict=True)))


def _signed(values: Sequence[float]) -> str:
    mean = interval(values)
    return f"{mean['mean']:+.2f}, 95% [{mean['low']:+.2f}, {mean['high']:+.2f}] over {len(values)} seeds"


# ---- tables ----

HEADS = {
    "lab": "world",
    "method": "method",
    "beta": "beta",
    "top_k": "k",
    "n": "n",
    "particles": "particles",
    "recipe": "reward model",
}
FORMATS = {
    "reward": ("reward", 2),
    "prompt_error": ("± over prompts", 2),
    "rlhf": ("RLHF at this KL", 2),
    "kl": ("KL", 2),
    "gap": ("KL to RLHF", 2),
    "calls": ("passes", 0),
    "length": ("tokens", 1),
    "distinct2": ("distinct-2", 2),
    "off_grammar": ("off-grammar", 3),
    "whole": ("accuracy", 3),
    "concordance": ("concordance", 3),
    "gain": ("by gain", 3),
    "ceiling": ("ceiling", 3),
}


def table(rows: Rows, columns: Sequence[str], each_seed: bool = False) -> str:
    """The rows as Markdown: what was varied, means ± standard errors over seeds, each seed's reward if asked for."""
    varied = [name for name in HEADS if len({json.dumps(row.get(name)) for row in rows}) > 1]
    shown = [name for name in columns if any(name in row for row in rows)]
    lines = [[HEADS[name] for name in varied] + [FORMATS[name][0] for name in shown]]
    lines[0] += ["each seed"] if each_seed else []
    lines.append(["---"] * len(varied) + ["---:"] * (len(lines[0]) - len(varied)))
    for row in rows:
        bound = "≤ " if row.get("method") in BOUNDED else ""
        cells = [_setting(row.get(name)) for name in varied]
        for name in shown:
            cells.append((bound if name == "kl" else "") + _number(row.get(name), FORMATS[name][1]))
        if each_seed:
            cells.append(" ".join(f"{value:.2f}" for value in row["reward"]["seeds"]))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _setting(value) -> str:
    if isinstance(value, dict):
        return recipe_name(value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def recipe_name(recipe: dict) -> str:
    """A reward model in a few words.

    >>> recipe_name({"objective": "partial", "pairs": 500}), recipe_name({"objective": "partial", "lengths": [1, 8]})
    ('partial, 500 pairs', 'partial, lengths 1 to 8')
    """
    words = [recipe["objective"]]
    words += [f"{recipe['pairs']} pairs"] if recipe.get("pairs") else []
    words += [f"{recipe['head']} head"] if recipe.get("head") else []
    if recipe.get("lengths"):
        first, last = recipe["lengths"]
        words.append(f"lengths {first} to {last}" if last else f"lengths from {first}")
    start = recipe.get("start")
    if isinstance(start, dict):
        layers, width = (
            start.get(a, start.get(b)) for a, b in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size"))
        )
        words.append(f"new {start['family']} {layers} x {width}")
    elif start:
        words.append(f"from {start}")
    return ", ".join(words)


def _number(found: dict | None, digits: int) -> str:
    if found is None:
        return ""
    error = "" if math.isnan(found["error"]) else f" ± {found['error']:.{digits}f}"
    return f"{round(found['mean'], digits) + 0.0:.{digits}f}{error}"  # + 0.0: no minus before a zero


# ---- figures ----

SHOWN_KL = 6.0  # nats
CONCORDANCE = "siblings ordered right (by gain)"
INTERVALS = "bars: 95 % interval over seeds"


def curve(axes: Axes, rows: Rows, x: Callable[[dict], float], y: str, label: str, ink: str, mark: str, **style) -> None:
    """A line through rows with their intervals over seeds."""
    points = sorted((x(row), row[y]["mean"], row[y]["low"], row[y]["high"]) for row in rows if row.get(y))
    if points:
        at, mean, low, high = np.array(points).T
        bars = np.nan_to_num(np.array([mean - low, high - mean]))
        axes.errorbar(at, mean, bars, color=ink, marker=mark, label=label, capsize=2, linewidth=1.5, **style)


def log_scale(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def by_method(rows: Rows) -> Iterator[tuple[str, Rows]]:
    for method in dict.fromkeys(row["method"] for row in rows):
        yield method, [row for row in rows if row["method"] == method]


def draw_data_size(rows: Rows, lab: Lab) -> Figure:
    drawing, axes = plots.panels(3, (11.4, 3.8))
    for method, some in by_method(rows):
        ink, mark = plots.INKS[method]
        for panel, measure in zip(axes, ("reward", "whole", "gain"), strict=True):
            curve(panel, some, lambda row: row["recipe"].get("pairs", pairs_of(lab)), measure, method, ink, mark)
    sizes = sorted({row["recipe"].get("pairs", pairs_of(lab)) for row in rows})
    names = (f"reward at beta = {BETA:g}", "accuracy on whole held-out pairs", CONCORDANCE)
    for panel, name in zip(axes, names, strict=True):
        panel.set(xlabel=f"training pairs ({INTERVALS})", ylabel=name)
        log_scale(panel, sizes)
    axes[0].legend(frameon=False, fontsize=8)
    return drawing


def draw_policy_gap(rows: Rows, lab: Lab) -> Figure:
    drawing, (left, right) = plots.panels(2, (10.4, 4.2))
    for method, some in by_method(rows):
        ink, mark = plots.INKS[method]
        curve(left, some, lambda row: row["beta"], "gap", method, ink, mark)
    left.set(xlabel=f"beta ({INTERVALS})", ylabel="KL(policy ‖ RLHF policy), nats a text", yscale="log")
    reward_against_kl(right, rows, lab)
    return drawing


def reward_against_kl(axes: Axes, rows: Rows, lab: Lab) -> None:
    """Each method's curve, small marks for single seeds, and the most that any policy reaches.

    Greedy methods are left out: the divergence of a policy with one text is another matter. So is what lies far right.
    """
    rows = [row for row in rows if not row["method"].endswith("-greedy")]
    best = [(point.kl, point.reward) for point in optimum(lab)]
    axes.plot(*zip(*best, strict=True), color=plots.BLACK, label="RLHF (the most at each KL)")
    for method, some in by_method(rows):
        ink, mark = plots.INKS[method]
        line = "none" if method in ("best-of-n", "dpo", "ppo") else "-"
        label = f"{method} (KL is a bound)" if method in BOUNDED else method
        curve(axes, some, lambda row: row["kl"]["mean"], "reward", label, ink, mark, linestyle=line)
        for row in some:
            axes.scatter(row["kl"]["seeds"], row["reward"]["seeds"], s=8, color=ink, marker=mark, alpha=0.5)
    beyond = [row for row in rows if row["kl"]["mean"] > SHOWN_KL]
    plots.root_scale(axes, min(SHOWN_KL, max(max(row["kl"]["seeds"]) for row in rows)))
    if beyond:
        names = ", ".join(f"{row['method']} beta={row['beta']:g} at {row['kl']['mean']:.0f} nats" for row in beyond)
        axes.set_title(f"beyond the right edge: {names}", loc="right", fontsize=8)
    axes.set(xlabel="KL to the reference (nats a text)", ylabel="reward")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_best_of_n(rows: Rows, lab: Lab) -> Figure:
    drawing, (left, right) = plots.panels(2, (10.4, 4.2))
    for method, some in by_method(rows):
        ink, mark = plots.INKS[method]
        curve(left, some, lambda row: row["calls"]["mean"], "reward", method, ink, mark, linestyle="none")
    left.set(xlabel="passes of one row by any model, a text", ylabel="reward")
    passes = sorted(row["calls"]["mean"] for row in rows)
    log_scale(left, [round(passes[0] * 2**i) for i in range(int(np.log2(passes[-1] / passes[0])) + 1)])
    left.legend(frameon=False, fontsize=8, title=INTERVALS)
    reward_against_kl(right, rows, lab)
    return drawing


def draw_beta(rows: Rows, lab: Lab) -> Figure:
    worlds = list(dict.fromkeys(row["lab"] for row in rows))
    drawing, axes = plots.panels(len(worlds), (3.9 * max(len(worlds), 2), 3.8))
    inks = {3: (plots.SKY, "s"), 10: (plots.BLUE, "o"), 0: (plots.ORANGE, "^")}
    for panel, world in zip(axes, worlds, strict=True):
        for k, (ink, mark) in inks.items():
            some = [row for row in rows if row["lab"] == world and row["top_k"] == k]
            curve(panel, some, lambda row: row["beta"], "reward", f"k = {k}" if k else "all tokens", ink, mark)
        panel.set(xlabel=f"beta ({INTERVALS})", ylabel="reward", title=world or "as usual")
    axes[0].legend(frameon=False, fontsize=8)
    return drawing


def draw_attribute(rows: Rows, lab: Lab) -> Figure:
    names = list(dict.fromkeys(row["lab"] for row in rows))
    drawing, axes = plots.panels(len(names), (3.9 * max(len(names), 2), 3.8))
    for panel, name in zip(axes, names, strict=True):
        for method, some in by_method([row for row in rows if row["lab"] == name]):
            ink, mark = plots.INKS[method]
            curve(panel, some, lambda row: row["kl"]["mean"], "reward", method, ink, mark)
        panel.set(xlabel="KL to the reference (nats a text)", ylabel=name or lab.judge)
    axes[0].legend(frameon=False, fontsize=8)
    return drawing


def draw_prefix_length(rows: Rows, lab: Lab) -> Figure:
    drawing, axes = plots.panels(3, (12.6, 4.2))
    names = (
        ("accuracy", "held-out pairs ordered as labelled"),
        ("final", "rank correlation with its own final reward"),
        ("gold", "rank correlation with the judge's reward"),
    )
    inks = (plots.RED, plots.GREEN, plots.BLUE, plots.SKY, plots.ORANGE)
    for panel, (measure, label) in zip(axes, names, strict=True):
        for row, ink in zip(rows, inks, strict=True):
            values = np.array(row[measure]["seeds"], dtype=float)
            lengths = range(1, values.shape[1] + 1)
            panel.plot(lengths, values.mean(0), color=ink, linewidth=2, label=recipe_name(row["recipe"]))
            panel.fill_between(lengths, values.min(0), values.max(0), color=ink, alpha=0.15, linewidth=0)
        panel.axhline(0.5 if measure == "accuracy" else 0, color=plots.BLACK, linewidth=0.8, linestyle=":")
        panel.set(xlabel="prefix length (tokens; band: all seeds)", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return drawing


def draw_architecture(rows: Rows, lab: Lab) -> Figure:
    shown = {
        name: {recipe_name(r["recipe"]): (r[m]["mean"], r[m]["low"], r[m]["high"]) for r in rows}
        for m, name in (("reward", f"reward at beta = {BETA:g}"), ("whole", "accuracy"), ("gain", CONCORDANCE))
    }
    return plots.intervals(shown)


def draw_partial_vs_full(rows: Rows, lab: Lab) -> Figure:
    drawing, (axes,) = plots.panels(1, (8.6, 5.0))
    reward_against_kl(axes, rows, lab)
    axes.set_xlabel(f"KL to the reference (nats a text); small marks: single seeds; {INTERVALS}")
    return drawing


STUDIES = {
    "data-size": Study(data_size_cells, draw_data_size, ("reward", "kl", "whole", "concordance", "gain", "ceiling")),
    "policy-gap": Study(
        policy_gap_cells, draw_policy_gap, ("reward", "prompt_error", "rlhf", "kl", "gap", "off_grammar")
    ),
    "best-of-n": Study(best_of_n_cells, draw_best_of_n, ("reward", "prompt_error", "rlhf", "kl", "calls", "distinct2")),
    "beta": Study(beta_cells, draw_beta, ("reward", "prompt_error", "rlhf", "kl", "off_grammar"), labs=beta_labs),
    "attribute": Study(
        attribute_cells, draw_attribute, ("reward", "prompt_error", "rlhf", "kl", "length"), labs=attribute_labs
    ),
    "prefix-length": Study(prefix_length_cells, draw_prefix_length, ("whole", "concordance", "gain", "ceiling")),
    "architecture": Study(
        architecture_cells, draw_architecture, ("reward", "kl", "calls", "whole", "concordance", "gain", "ceiling")
    ),
    "partial-vs-full": Study(
        partial_vs_full_cells,
        draw_partial_vs_full,
        ("reward", "prompt_error", "rlhf", "kl", "calls", "distinct2", "off_grammar"),
        conclude=at_equal_kl,
        each_seed=True,  # what a reward model of whole texts does depends on its seed
    ),
}
NAMES = (*STUDIES, "cost")
