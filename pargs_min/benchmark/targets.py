"""What decoding and training must not exceed: `pargs benchmark --check`.

A target holds if three quarters of the rounds reach it: the upper quartile of what may be at most so much, the lower
quartile of what must be at least so much.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pargs_min.benchmark.published import CopiedScorer, SeparateScorer, UncachedPolicy
from pargs_min.benchmark.ways import (
    Models,
    cache_bytes,
    ideal_speed_up,
    interleaved,
    models_of_shape,
    peak_bytes,
    ratios,
    training_ways,
    ways,
    weight_bytes,
)
from pargs_min.decode import ModelPolicy, generate
from pargs_min.scoring import ReencodeScorer, SiblingScorer, VocabularyScorer, model_rewards

K = 10


@dataclass(frozen=True)
class Target:
    """A bound, and what was measured, round by round."""

    name: str
    at_most: bool
    bound: float
    values: Sequence[float]

    @property
    def quartile(self) -> float:
        """The less favourable quartile; of a single value, itself."""
        if len(self.values) == 1:
            return self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4)
        return high if self.at_most else low

    @property
    def holds(self) -> bool:
        """
        >>> Target("a ratio", at_most=True, bound=1.15, values=[1.0, 1.1, 1.1, 1.2, 1.3]).holds
        False
        """
        return self.quartile <= self.bound if self.at_most else self.quartile >= self.bound

    def __str__(self) -> str:
        quartile, sign = ("upper", "<=") if self.at_most else ("lower", ">=")
        numbers = f"median {statistics.median(self.values):8.3g}   {quartile} quartile {self.quartile:8.3g}"
        return f"{'ok  ' if self.holds else 'FAIL'} {self.name:62} {numbers}   {sign} {self.bound:g}"


def targets(rounds: int = 7) -> Iterator[Target]:
    """Measure each target, on models with random weights on the CPU; about six minutes on a quiet core."""
    yield from fast_equals_slow()
    tiny = models_of_shape("tiny")
    yield from memory(tiny)
    yield from against_the_floor("4 layers", tiny, rounds, tokens=16)
    yield from against_the_naive(tiny, rounds)
    yield from growth_with_length(tiny, rounds)
    yield from training(tiny, rounds)
    small = models_of_shape("gpt2")
    yield from against_the_floor("GPT-2 small", small, rounds, tokens=4)
    seconds = _measure(small, 1, 512, 3, rounds, "our loop", "k passes, no cache")
    values = ratios(seconds, "k passes, no cache", "our loop")
    yield Target("GPT-2 small, P=512: k passes, no cache / our loop", False, 80, values)


def _prompt(models: Models, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(models.lm.get_input_embeddings().num_embeddings, (batch, length), generator=generator)


def _measure(models: Models, batch: int, length: int, tokens: int, rounds: int, *names: str) -> dict[str, list[float]]:
    found = ways(models, _prompt(models, batch, length), K, tokens)
    return interleaved({name: found[name] for name in names}, rounds, torch.device("cpu"))


def against_the_floor(shape: str, models: Models, rounds: int, tokens: int) -> Iterator[Target]:
    """Nothing is left to gain but the arithmetic of the models themselves."""
    names = "floor", "our loop", "RewardGuidance", "one-call floor", "one-call head"
    seconds = _measure(models, 1, 128, tokens, rounds, *names)
    for name, over, bound in (
        ("our loop", "floor", 1.15),
        ("RewardGuidance", "floor", 1.30),
        ("one-call head", "one-call floor", 1.15),
    ):
        yield Target(f"{shape}, P=128: {name} / {over}", True, bound, ratios(seconds, name, over))


def against_the_naive(tiny: Models, rounds: int) -> Iterator[Target]:
    """The published loops, at four layers."""
    for way, batch, length, bound in (
        ("k passes, no cache", 1, 128, 25),
        ("k copies of the cache", 1, 256, 1.1),
        ("k copies of the cache", 8, 256, 2),
    ):
        values = ratios(_measure(tiny, batch, length, 8, rounds, "our loop", way), way, "our loop")
        yield Target(f"4 layers, B={batch}, P={length}: {way} / our loop", False, bound, values)


def growth_with_length(tiny: Models, rounds: int) -> Iterator[Target]:
    """Over plain generation, a guided token behind 512 tokens costs what one behind 64 does; a tenth is for noise."""
    names = "our loop", "plain generation"
    found = {
        (name, length): way
        for length in (64, 512)
        for name, way in ways(tiny, _prompt(tiny, 1, length), K, 12).items()
        if name in names
    }
    seconds = interleaved(found, rounds, torch.device("cpu"))
    short, long = (ratios(seconds, ("our loop", n), ("plain generation", n)) for n in (64, 512))
    values = [b / a for a, b in zip(short, long, strict=True)]
    yield Target("4 layers: (our loop / plain) at P=512 over that at P=64", True, 1.1, values)


def memory(tiny: Models) -> Iterator[Target]:
    """Weights, and all that is held while a step is made, over weights and one cache each."""
    weights = weight_bytes(tiny.lm, tiny.scalar)
    for batch, length, k in ((1, 128, 10), (1, 128, 50), (8, 256, 10)):
        peak = peak_bytes(ways(tiny, _prompt(tiny, batch, length), k, 8)["our loop"], torch.device("cpu"))
        caches = sum(cache_bytes(model, batch, length + 8) for model in (tiny.lm, tiny.scalar))
        values = [(weights + peak) / (weights + caches)]
        yield Target(f"4 layers, B={batch}, P={length}, k={k}: memory / (models + caches)", True, 1.1, values)


def training(tiny: Models, rounds: int) -> Iterator[Target]:
    """All prefixes in one pass, against a row for each: the share of the ideal speed-up."""
    for length in (32, 64, 128):
        found, values = training_ways(tiny.scalar, 128, length), []
        for number in range(rounds + 1):
            speed_up = found["a row per prefix"]() / found["one pass"]()
            values += [speed_up / ideal_speed_up(128, length)] if number else []  # the first warms up
        yield Target(f"4 layers: training speed-up / ideal, n={length}", False, 0.8, values)


@torch.no_grad()
def fast_equals_slow() -> Iterator[Target]:
    """Every way, on the same draws: the naive way's tokens, and its rewards."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        models = models_of_shape("tiny", dtype)
        ids = _prompt(models, 2, 12)
        uniforms = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        policy, scalar, vocabulary = ModelPolicy(models.lm), models.scalar, models.vocabulary
        for head, slow, *fast in (
            ("scalar", SeparateScorer(scalar), SiblingScorer(scalar), CopiedScorer(scalar, K)),
            ("vocabulary", ReencodeScorer(model_rewards(vocabulary)), VocabularyScorer(vocabulary)),
        ):
            settings = dict(beta=2.0, top_k=K, max_new_tokens=4, uniforms=uniforms)
            want = generate(UncachedPolicy(models.lm), slow, ids, **settings)
            got = [generate(policy, scorer, ids, **settings) for scorer in fast]
            same = all(torch.equal(g.tokens, want.tokens) for g in got)
            error = max(float((g.rewards - want.rewards).abs().max()) for g in got) if same else float("inf")
            name = f"fast equals slow, {head} head, {str(dtype)[6:]}: difference of rewards"
            yield Target(name, True, bound, [error])


def check(rounds: int = 7) -> bool:
    """Print every target as it is measured; whether all hold."""
    missed = 0
    for target in targets(rounds):
        print(target, flush=True)
        missed += not target.holds
    print("all targets reached" if not missed else f"{missed} missed")
    return not missed
