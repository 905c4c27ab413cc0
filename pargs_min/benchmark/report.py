"""The report of `pargs benchmark`: every way side by side, how cost grows, and training; as a table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from pargs_min.benchmark.ways import (
    Models,
    ideal_speed_up,
    interleaved,
    passes_per_token,
    peak_bytes,
    ratios,
    training_ways,
    ways,
    weight_bytes,
)
from pargs_min.plots import BLUE, GREEN, ORANGE, panels
from pargs_min.reward_model import context_length

GROWN = {"plain generation": ORANGE, "our loop": BLUE, "one-call head": GREEN}
SWEEPS = {"top_k": (1, 5, 10, 20, 50), "batch_size": (1, 2, 4, 8), "prompt_length": (64, 128, 256, 512)}
RESPONSES = (32, 64, 128)  # tokens of the responses that training reads


def run(
    models: Models, *, top_k: int, batch_size: int, prompt_length: int, tokens: int, rounds: int, quick: bool = False
) -> dict:
    """Measure all that the report shows, on random prompts.

    Args:
        models: in evaluation mode, all on one device.
        tokens: written by each way in each round; rounds: of interleaved runs, of which medians are taken.
        quick: only the ways side by side, neither growth nor training.

    Raises:
        ValueError: if there is less than two tokens or one round, or a text would outgrow a model's context.
    """
    if tokens < 2 or rounds < 2:
        raise ValueError(f"tokens and rounds must be at least 2, got {tokens} and {rounds}")
    limit = min(filter(None, (context_length(models.lm), context_length(models.scalar))), default=None)
    if limit is not None and prompt_length + tokens > limit:
        raise ValueError(f"prompt_length {prompt_length} and tokens {tokens} exceed the models' context of {limit}")
    setting = dict(top_k=top_k, batch_size=batch_size, prompt_length=prompt_length)
    report = {"setting": setting | {"tokens": tokens, "rounds": rounds}, "device": str(models.lm.device)}
    report["weights_mb"] = weight_bytes(models.lm, models.scalar) / 1e6
    report["ways"] = _side_by_side(models, tokens, rounds, **setting)
    if quick:
        return report
    report["growth"] = {
        name: [
            {name: value} | _grown(models, tokens, rounds, **{**setting, name: value})
            for value in values
            if name != "prompt_length" or limit is None or value + tokens <= limit
        ]
        for name, values in SWEEPS.items()
    }
    lengths = [n for n in RESPONSES if limit is None or prompt_length + n <= limit]
    report["training"] = [_training(models, prompt_length, n, rounds) for n in tqdm(lengths, desc="training")]
    return report


def _ways(models: Models, tokens: int, *, top_k: int, batch_size: int, prompt_length: int) -> dict:
    vocabulary = models.lm.get_input_embeddings().num_embeddings
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must lie between 1 and the vocabulary size {vocabulary}, got {top_k}")
    ids = torch.randint(vocabulary, (batch_size, prompt_length), device=models.lm.device)
    return ways(models, ids, top_k, tokens)


def _side_by_side(models: Models, tokens: int, rounds: int, **setting: int) -> list[dict]:
    found, device = _ways(models, tokens, **setting), models.lm.device
    with tqdm(total=rounds, desc="rounds") as progress:
        seconds = interleaved(found, rounds, device, progress)
    return [
        {
            "way": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "over_plain": statistics.median(ratios(seconds, name, "plain generation")),
            "over_floor": statistics.median(ratios(seconds, name, "floor")),
            "peak_mb": peak_bytes(way, device) / 1e6,
        }
        | passes_per_token(way, models)
        for name, way in found.items()
    ]


def _grown(models: Models, tokens: int, rounds: int, **setting: int) -> dict[str, float]:
    """Milliseconds per token of the ways that are fit to be used."""
    found = {name: way for name, way in _ways(models, tokens, **setting).items() if name in GROWN}
    seconds = interleaved(found, rounds, models.lm.device)
    return {name: 1e3 * statistics.median(seconds[name]) for name in GROWN}


def _training(models: Models, prompt: int, response: int, rounds: int) -> dict[str, float]:
    steps = training_ways(models.scalar, prompt, response)
    seconds = [{name: step() for name, step in steps.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    speed_up = statistics.median(s["a row per prefix"] / s["one pass"] for s in seconds)
    medians = {name: statistics.median(s[name] for s in seconds) for name in steps}
    return {"response": response} | medians | {"speed_up": speed_up, "ideal": ideal_speed_up(prompt, response)}


def markdown(report: dict) -> str:
    """The tables of a report."""
    head = ("way", "ms a token", "/ plain", "/ floor", "lm passes", "reward passes", "reward tokens", "peak MB")
    rows = [
        (r["way"], f"{r['ms']:.2f}", f"{r['over_plain']:.2f}", f"{r['over_floor']:.2f}", f"{r['lm passes']:g}",
         f"{r['reward passes']:g}", f"{r['reward tokens']:g}", f"{r['peak_mb']:.1f}")
        for r in report["ways"]
    ]  # fmt: skip
    lines = [_table(head, rows), f"peak: beside {report['weights_mb']:.0f} MB of weights, after the prompt was read"]
    for name, points in report.get("growth", {}).items():
        rows = [(str(p[name]), *(f"{p[way]:.2f}" for way in GROWN)) for p in points]
        lines += ["", _table((name, *(f"{way}, ms" for way in GROWN)), rows)]
    if "training" in report:
        rows = [
            (str(t["response"]), f"{t['one pass']:.3f}", f"{t['a row per prefix']:.2f}", f"{t['speed_up']:.1f}",
             f"{t['ideal']:.1f}")
            for t in report["training"]
        ]  # fmt: skip
        lines += ["", _table(("response", "one pass, s", "a row per prefix, s", "speed-up", "by tokens read"), rows)]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(report: dict) -> Figure:
    """A bar a way, on a logarithmic scale, and how the time of a token grows with k, batch and prompt."""
    growth = report.get("growth", {})
    drawing, (bars, *curves) = panels(1 + len(growth), (4.8 + 2.8 * len(growth), 3.6))
    names, times = zip(*((r["way"], r["ms"]) for r in report["ways"]), strict=True)
    bars.barh(names, times, color=[GROWN.get(name, "#BBBBBB") for name in names], log=True)
    bars.bar_label(bars.containers[0], fmt="%.3g", fontsize=7, padding=2)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("ms a token")
    for axes, (name, points) in zip(curves, growth.items(), strict=True):
        for way, ink in GROWN.items():
            axes.plot([p[name] for p in points], [p[way] for p in points], "o-", color=ink, label=way)
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
    if curves:
        curves[0].set_ylabel("ms a token")
        curves[0].legend(fontsize=8, frameon=False)
    return drawing
