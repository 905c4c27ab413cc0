"""The main job on the embedded world: train reward models, guide a language model with them, show what was gained.

Everything is made here: the reference model, its preference pairs, reward models of prefixes and of whole texts
(several of each, and every one is shown), texts of every method for prompts that no pair was made for, judged by the
gold reward that nothing was trained on. What was trained is kept in the output folder and reused.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from pargs_min import plots
from pargs_min.data import Pair, encode_preferences
from pargs_min.decode import Generation, ModelPolicy, row_uniforms
from pargs_min.evaluate import distinct_n
from pargs_min.methods import best_of_n, guided, path_kl, plain
from pargs_min.records import read_preferences
from pargs_min.reward_model import load_reward_model, save_reward_model
from pargs_min.scoring import SiblingScorer, model_rewards
from pargs_min.toy import (
    HELD_OUT_PROMPTS,
    HORIZON,
    OFF_GRAMMAR,
    PROMPTS,
    TRAIN_PROMPTS,
    Journey,
    frontier,
    reference,
    reference_gap,
    responses,
    write_pairs,
)
from pargs_min.train import prefix_accuracy, train_reward_model

BETAS = (0.5, 1.0, 2.0, 3.0)
SHOWN_BETA = 2.0  # whose texts are printed
BEST_OF = (4, 16)
TOP_K = 10


@dataclass(frozen=True)
class Size:
    """How much of everything; steps, pairs and texts are counts."""

    reference_steps: int = 1500
    pairs: int = 8000
    held_out_pairs: int = 1000
    steps: int = 400
    models: int = 3  # of each objective
    samples: int = 64  # texts a prompt
    frontier_samples: int = 5000  # texts a prompt


QUICK = Size(reference_steps=250, pairs=600, held_out_pairs=300, steps=40, samples=16, frontier_samples=300)


def run(folder: Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = print) -> list[dict]:
    """Do it all; write results.json, reward_vs_kl.png and prefix_accuracy.png to the folder; return the rows."""
    size = QUICK if quick else Size()
    torch.set_num_threads(1)  # the models are so small that a second thread only waits; processes do not
    with two_processes() as workers:
        for _ in range(2):
            workers.submit(world)  # they start up while the reference is trained
        lm, tokenizer = reference(folder / "reference", world(), seed=seed, steps=size.reference_steps)
        gap = reference_gap(lm, world(), texts=1200)
        say(
            f"reference: {gap['model']:.3f} nats a token on fresh texts of the grammar; the grammar itself needs "
            f"{gap['automaton']:.3f} on them, {gap['entropy']:.3f} in expectation"
        )
        for name, prompts, count in (
            ("pairs", TRAIN_PROMPTS, size.pairs),
            ("held_out", HELD_OUT_PROMPTS, size.held_out_pairs),
        ):
            if not (folder / f"{name}.jsonl").exists():
                write_pairs(folder / f"{name}.jsonl", lm, tokenizer, world(), pairs=count, seed=seed, prompts=prompts)

        best = workers.submit(optimum, folder, size.frontier_samples, seed)
        names = {what: [f"{what}-{seed + i}" for i in range(size.models)] for what in ("partial", "full")}
        trainings = [(folder, name, size.steps) for several in names.values() for name in several]
        accuracies = {}
        for (_, name, _), future in [(job, workers.submit(train, *job)) for job in trainings]:
            accuracies[name] = future.result()
            say(f"trained reward model {name}")
        curves = {what: [accuracies[name] for name in several] for what, several in names.items()}

        decodings = [(*way, name) for *way, several in plan(names) for name in several]
        runs = [workers.submit(write, folder, *job, size.samples, seed) for job in decodings]
        rows, texts = [], {}
        for method, beta, n, several in plan(names):
            mine = [run.result() for job, run in zip(decodings, runs, strict=True) if job[:3] == (method, beta, n)]
            rows.append(summary(method, beta, n, mine, best.result()))
            if beta in (None, SHOWN_BETA):
                texts[row_name(rows[-1])] = mine[0].texts[:: len(mine[0].texts) // 3][:3]
            say(f"decoded {row_name(rows[-1])} with {len(several)} reward models")
    costs = relative_costs(ModelPolicy(lm), folder, names, tokenizer)
    rows = [row | {"cost": costs[row["method"].removesuffix("-greedy"), row["n"]]} for row in rows]

    results = {"rows": rows, "frontier": best.result(), "prefix_accuracy": curves, "reference": gap, "seed": seed}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    title = "Texts for prompts that no pair was made for"
    plots.save(plots.reward_vs_kl(rows, best.result(), title), folder / "reward_vs_kl.png")
    plots.save(plots.prefix_accuracy(curves, "Held-out pairs, read up to a prefix"), folder / "prefix_accuracy.png")
    for name, some in texts.items():
        say(f"\n{name}\n" + "\n".join(f"    {text}" for text in some))
    say("\n" + table(rows))
    say("\n" + "\n".join(verdicts(rows)))
    say(f"\nsaved results.json, reward_vs_kl.png and prefix_accuracy.png in {folder}")
    return rows


def two_processes() -> Executor:
    """Training and decoding share two cores; only the first process reports."""
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), quiet_worker)


def quiet_worker() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def plan(names: dict[str, list[str]]) -> Iterator[tuple]:
    """(method, beta, n, names of reward models): what is decoded, with every reward model by itself."""
    yield "plain", None, None, [""]
    for method, objective in (
        ("args", "full"),
        ("args-greedy", "full"),
        ("pargs", "partial"),
        ("pargs-greedy", "partial"),
    ):
        for beta in BETAS:
            yield method, beta, None, names[objective]
    for n in BEST_OF:
        yield "best-of-n", None, n, names["full"]


def train(folder: Path, name: str, steps: int) -> list[float]:
    """Train the reward model `objective-seed`, unless it is there; its pair accuracy after 1, 2, ... tokens.

    It starts from the reference; its head and the order of its batches come from the seed.
    """
    objective, seed = name.split("-")
    if not (folder / name / "model.safetensors").exists():
        set_seed(int(seed))
        tokenizer = AutoTokenizer.from_pretrained(folder / "reference")
        model = load_reward_model(folder / "reference", tokenizer)
        args = TrainingArguments(
            output_dir=str(folder / name),
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            warmup_steps=steps // 20,
            seed=int(seed),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        train_reward_model(
            model, tokenizer, preferences(folder / "pairs.jsonl", tokenizer), args=args, objective=objective
        )
        save_reward_model(model, tokenizer, folder / name, objective=objective, append_eos=True, prompt_format="text")
    held_out = preferences(folder / "held_out.jsonl", AutoTokenizer.from_pretrained(folder / name))
    return prefix_accuracy(load_reward_model(folder / name), held_out).accuracy.tolist()


def preferences(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    return encode_preferences(read_preferences(file), tokenizer)[0]


class Run(NamedTuple):
    """What one method wrote with one reward model: S texts, their gold rewards and nats from the reference."""

    texts: list[str]
    gold: np.ndarray
    kl: np.ndarray
    distinct2: float


def write(folder: Path, method: str, beta: float | None, n: int | None, name: str, samples: int, seed: int) -> Run:
    """Texts for the held-out prompts, from the same uniforms for every method and reward model."""
    if method.endswith("-greedy"):
        samples = 1  # it writes one text a prompt, however often it is asked
    lm, tokenizer = load_reference(folder)
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(samples)]
    ids = torch.tensor(tokenizer(prompts).input_ids)  # the prompts are equally long
    streams = [(PROMPTS.index(p), i) for p in HELD_OUT_PROMPTS for i in range(samples * (n or 1))]
    uniforms = row_uniforms(seed, *zip(*streams, strict=True), HORIZON)
    model = load_reward_model(folder / name) if name else None
    generation = decode(ModelPolicy(lm), method, model, ids, beta, n, uniforms=uniforms, eos=tokenizer.eos_token_id)
    rows = zip(generation.tokens.tolist(), generation.lengths.tolist(), strict=True)
    written = [row[:length] for row, length in rows]
    return Run(
        tokenizer.batch_decode(written, skip_special_tokens=True),
        np.array(world().gold(prompts, written)),
        path_kl(method, generation, n or 1).double().numpy(),
        distinct_n(written, 2),
    )


def decode(
    policy: ModelPolicy, method: str, model, ids: Tensor, beta, n, *, uniforms: Tensor, **settings
) -> Generation:
    settings |= dict(uniforms=uniforms, max_new_tokens=uniforms.shape[1])
    mask = torch.ones_like(ids)
    if method == "plain":
        return plain(policy, ids, mask, top_k=0, **settings)
    if method == "best-of-n":
        return best_of_n(policy, model_rewards(model), ids, mask, n=n, top_k=0, **settings)
    return guided(method, policy, SiblingScorer(model), ids, mask, beta=beta, top_k=TOP_K, **settings)


def optimum(folder: Path, samples: int, seed: int) -> list[tuple[float, float]]:
    """(kl, gold) of the RLHF policies of the reference, by reweighting samples that no method shares."""
    lm, tokenizer = load_reference(folder)
    drawn = []
    for prompt in HELD_OUT_PROMPTS:
        written = responses(lm, tokenizer, [prompt] * samples, range(samples), seed + 1)
        drawn.append(world().gold([prompt] * samples, [response or [] for response in written]))
    points = frontier(np.array(drawn), [*np.linspace(0, 1, 41), *np.linspace(1.1, 6, 50)], least=min(500, samples))
    return [(point.kl, point.reward) for point in points]


@cache
def world() -> Journey:
    """One for each process: it works its states out once."""
    return Journey()


def load_reference(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return (
        AutoModelForCausalLM.from_pretrained(folder / "reference"),
        AutoTokenizer.from_pretrained(folder / "reference"),
    )


def summary(method: str, beta: float | None, n: int | None, runs: list[Run], best: list[tuple[float, float]]) -> dict:
    """One row of the table; the standard error is over reward models, for plain sampling over texts."""
    models = [{"gold": float(run.gold.mean()), "kl": float(run.kl.mean())} for run in runs]
    golds = [m["gold"] for m in models] if len(runs) > 1 else runs[0].gold.tolist()
    kl = statistics.fmean(m["kl"] for m in models)
    kls, rewards = zip(*best, strict=True)
    return {
        "method": method,
        "beta": beta,
        "n": n,
        "gold": statistics.fmean(golds),
        "gold_se": statistics.stdev(golds) / len(golds) ** 0.5,
        "kl": kl,
        "rlhf_at_kl": float(np.interp(kl, kls, rewards)) if kl <= kls[-1] else None,
        "distinct2": statistics.fmean(run.distinct2 for run in runs),
        "off_grammar": statistics.fmean(float((run.gold == OFF_GRAMMAR).mean()) for run in runs),
        "models": models,
    }


def relative_costs(
    policy: ModelPolicy, folder: Path, names: dict, tokenizer: PreTrainedTokenizerBase, rounds=7, steps=12, rows=16
) -> dict:
    """Time per token of each way to decode, relative to plain sampling: the median of interleaved rounds."""
    ids = torch.tensor(tokenizer([HELD_OUT_PROMPTS[0]] * rows).input_ids)
    full, partial = (load_reward_model(folder / names[what][0]) for what in ("full", "partial"))
    ways = {("plain", None): None, ("args", None): full, ("pargs", None): partial}
    ways |= {("best-of-n", n): full for n in BEST_OF}
    ratios = {way: [] for way in ways}
    for _ in range(rounds):
        seconds = {}
        for (method, n), model in ways.items():
            uniforms = torch.rand(rows * (n or 1), steps)
            began = time.perf_counter()
            decode(policy, method, model, ids, 1.0, n, uniforms=uniforms)
            seconds[method, n] = time.perf_counter() - began
        for way in ways:
            ratios[way].append(seconds[way] / seconds["plain", None])
    return {way: statistics.median(several) for way, several in ratios.items()}


def row_name(row: dict) -> str:
    if row["method"] == "best-of-n":
        return f"best-of-{row['n']}"
    return row["method"] if row["beta"] is None else f"{row['method']} beta={row['beta']:g}"


def table(rows: list[dict]) -> str:
    """The rows as text, and what their columns mean."""
    header = f"{'method':24}{'gold':>15}{'RLHF':>7}{'KL':>7}{'distinct-2':>12}{'off-grammar':>13}{'cost':>7}"
    lines = [f"{header}   by reward model"]
    for row in rows:
        best = "     -" if row["rlhf_at_kl"] is None else f"{row['rlhf_at_kl']:6.2f}"
        bound = "<" if row["method"] == "best-of-n" else " "
        singles = " ".join(f"{m['gold']:5.2f}" for m in row["models"]) if row["method"] != "plain" else ""
        lines.append(
            f"{row_name(row):24}{row['gold']:7.2f} +- {row['gold_se']:.2f}{best:>8}{bound}{row['kl']:6.2f}"
            f"{row['distinct2']:12.2f}{row['off_grammar']:13.1%}{row['cost']:7.2f}   {singles}"
        )
    return "\n".join(lines) + (
        "\n\ngold: mean reward of a text, +- a standard error over reward models (plain: over texts); RLHF: the most"
        "\nthat any policy reaches at the same KL to the reference; KL: in nats a text (< an upper bound); cost: time"
        "\nper token relative to plain sampling; greedy methods write one text a prompt"
    )


def verdicts(rows: list[dict]) -> list[str]:
    """Who is ahead at equal KL, read off the table; where a rival is, it is said."""
    curve = sorted((row["kl"], row["gold"], row["gold_se"]) for row in rows if row["method"] in ("plain", "pargs"))
    kls, golds, errors = zip(*curve, strict=True)
    lines = []
    for row in rows:
        if row["method"] in ("args", "best-of-n"):
            kl = min(row["kl"], kls[-1])
            ours, error = np.interp(kl, kls, golds), np.interp(kl, kls, errors)
            ahead = ours - row["gold"]
            verb = (
                "level with"
                if abs(ahead) < 2 * math.hypot(error, row["gold_se"])
                else "ahead of"
                if ahead > 0
                else "behind"
            )
            theirs = f"{row_name(row)} ({row['gold']:.2f} at {row['kl']:.2f})"
            lines.append(f"at {kl:.2f} nats sampled PARGS ({ours:.2f}) is {verb} {theirs}")
    return lines
