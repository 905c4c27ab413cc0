"""What holds on any machine, and what is only reported: `pargs benchmark --check`.

A *target* has a bound: on passes and bytes, or on a time over the time of the same arithmetic done bare, with room for
other machines. (With models of width 16, whose arithmetic costs next to nothing, our loop and a vocabulary head take
1.0 to 1.1 times their floors, and `RewardGuidance` 1.2 times.) How much slower the published loops are is reported
without a bound: it weighs arithmetic against memory and the cost of a call, which depends on the hardware. That fast
ways write what slow ones do is not measured here: the tests hold all of them to `minimal.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pargs_min.benchmark import ways
from pargs_min.benchmark.ways import Models, Setting, models_of_shape, ratios

CPU, K = torch.device("cpu"), Setting.top_k


@dataclass(frozen=True)
class Target:
    """What was measured in each round, and the bound that three quarters of the rounds must reach; None: a report.

    >>> Target("a ratio", [1.0, 1.1, 1.1, 1.2, 1.3], at_most=1.15).holds
    False
    """

    name: str
    values: Sequence[float]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def quartiles(self) -> list[float]:
        """The lower and the upper one; of a single value, itself."""
        return np.quantile(self.values, (0.25, 0.75), method="weibull").tolist()

    @property
    def holds(self) -> bool:
        low, high = self.quartiles
        return (self.at_most is None or high <= self.at_most) and (self.at_least is None or low >= self.at_least)

    def __str__(self) -> str:
        line = f"{self.name:58} {np.median(self.values):8.3g}"
        if len(self.values) > 1:
            line += "  [{:.3g}, {:.3g}]".format(*self.quartiles)
        if self.at_most is None and self.at_least is None:
            return f"     {line}"
        bound = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        return f"{'ok' if self.holds else 'FAIL':4} {line:90} {bound}"


def targets(rounds: int = 7) -> Iterator[Target]:
    """Measure each target, on models with random weights on the CPU; about six minutes on a quiet core."""
    tiny = models_of_shape("tiny")
    yield from passes_and_memory(tiny)
    yield from against_the_floor("4 layers", tiny, rounds, tokens=16)
    yield shared_trunk(tiny, rounds)
    yield growth_with_length(tiny, rounds)
    yield from training(tiny, rounds)
    for way, setting in (
        ("k passes, no cache", Setting(prompt_length=128)),
        ("k copies of the cache", Setting(prompt_length=256)),
        ("k copies of the cache", Setting(prompt_length=256, batch_size=8)),
    ):
        yield against_published("4 layers", tiny, rounds, way, setting)
    small = models_of_shape("gpt2")
    yield from against_the_floor("GPT-2 small", small, rounds, tokens=4)
    yield against_published("GPT-2 small", small, rounds, "k passes, no cache", Setting(prompt_length=512, tokens=3))


def passes_and_memory(tiny: Models) -> Iterator[Target]:
    """What a token of our loop reads, and what it holds: the weights and everything else, over the weights and one
    cache for each model."""
    for name, what, at_most in (
        ("our loop", "passes", 2),
        ("our loop", "tokens", K + 2),
        ("our loop, no step guided", "passes", 1),
        ("reweighted, shared trunk", "tokens", 2),
    ):
        counts = ways.passes_per_token(ways.all_ways(tiny, Setting(), name)[name], tiny)
        total = counts[f"lm {what}"] + counts[f"reward {what}"]
        yield Target(f"{name}: {what} per token written", [total], at_most=at_most)
    both, alone = ways.weight_bytes(tiny.lm, tiny.trunk.model), ways.weight_bytes(tiny.lm)
    yield Target("4 layers, 3 shared: weights / the language model's", [both / alone], at_most=1.2)
    weights = ways.weight_bytes(tiny.lm, tiny.scalar)
    for batch, length, k in ((1, 128, 10), (1, 128, 50), (8, 256, 10)):
        peak = ways.peak_bytes(ways.all_ways(tiny, Setting(k, batch, length))["our loop"], CPU)
        caches = sum(ways.cache_bytes(model, batch, length + Setting.tokens) for model in (tiny.lm, tiny.scalar))
        share = (weights + peak) / (weights + caches)
        yield Target(f"4 layers, B={batch}, P={length}, k={k}: memory / (models + caches)", [share], at_most=1.1)


def against_the_floor(shape: str, models: Models, rounds: int, tokens: int) -> Iterator[Target]:
    """Nothing is left to gain but the arithmetic of the models themselves; transformers' `generate` adds its own."""
    names = "floor", "our loop", "RewardGuidance", "vocabulary floor", "vocabulary head"
    seconds = ways.interleaved(ways.all_ways(models, Setting(tokens=tokens), *names), range(rounds), CPU)
    for name, over, bound in (
        ("our loop", "floor", 1.25),
        ("RewardGuidance", "floor", 1.5),
        ("vocabulary head", "vocabulary floor", 1.25),
    ):
        yield Target(f"{shape}, P=128: {name} / {over}", ratios(seconds, name, over), at_most=bound)


def shared_trunk(tiny: Models, rounds: int) -> Target:
    """What is left of the cost of a guide that shares 3 of 4 layers: a report, since the loop's own cost weighs in."""
    names = "reweighted, shared trunk", "reweighted"
    seconds = ways.interleaved(ways.all_ways(tiny, Setting(tokens=16), *names), range(rounds), CPU)
    return Target("4 layers, 3 shared, P=128: guide on the trunk / on its own", ratios(seconds, *names))


def growth_with_length(tiny: Models, rounds: int) -> Target:
    """Over plain generation a guided token costs as much after 512 tokens as after 64; read anew, 8 times as much."""
    names = "our loop", "plain generation"
    both = (ways.all_ways(tiny, Setting(prompt_length=length, tokens=12), *names) for length in (64, 512))
    short, long = (ratios(ways.interleaved(found, range(rounds), CPU), *names) for found in both)
    values = [b / a for a, b in zip(short, long, strict=True)]
    return Target("4 layers: (our loop / plain) at P=512 over that at P=64", values, at_most=2)


def training(tiny: Models, rounds: int) -> Iterator[Target]:
    """All prefixes in one pass against a row for each: the share of the speed-up that the tokens read make possible."""
    for length in (32, 64, 128):
        seconds = ways.interleaved(ways.training_ways(tiny.scalar, 128, length), range(rounds), CPU)
        ideal = ways.ideal_speed_up(128, length)
        values = [length * ratio / ideal for ratio in ratios(seconds, "a row per prefix", "one pass")]
        yield Target(f"4 layers: training speed-up / ideal, n={length}", values, at_least=0.5)


def against_published(shape: str, models: Models, rounds: int, way: str, setting: Setting) -> Target:
    """How much slower a published loop is: a report, without a bound."""
    name = f"{shape}, B={setting.batch_size}, P={setting.prompt_length}: {way} / our loop"
    seconds = ways.interleaved(ways.all_ways(models, setting, way, "our loop"), range(rounds), CPU)
    return Target(name, ratios(seconds, way, "our loop"))


def check(rounds: int = 7) -> bool:
    """Print every target as it is measured; whether all hold."""
    missed = 0
    for target in targets(rounds):
        print(target, flush=True)
        missed += not target.holds
    print("all targets reached" if not missed else f"{missed} missed")
    return not missed
