"""The same quantities in exact rational arithmetic: an independent oracle, standard library only.

Dictionaries keyed by tuples of tokens, plain recursion, no logarithm and no array. With rational weights
w(a) = exp(beta r(a)) every policy is rational, so identities can be asserted with `==`.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from fractions import Fraction
from math import prod

Prefix = tuple[int, ...]
Distribution = dict[Prefix, Fraction]


@dataclass(frozen=True)
class RationalWorld:
    """ref(t | a) and w(a) = exp(beta r(a)), both rational; the last token id is the end token."""

    vocabulary: int
    horizon: int
    conditionals: dict[Prefix, list[Fraction]]  # of unfinished prefixes
    weights: dict[Prefix, Fraction]  # of unfinished prefixes and whole responses

    @property
    def eos(self) -> int:
        return self.vocabulary - 1


def random_rational_world(seed: int, vocabulary: int, horizon: int) -> RationalWorld:
    """Small integer odds for the tokens, small integer ratios for the weights."""
    rng = random.Random(seed)
    conditionals: dict[Prefix, list[Fraction]] = {}
    weights: dict[Prefix, Fraction] = {}

    def grow(a: Prefix) -> None:
        weights[a] = Fraction(rng.randint(1, 9), rng.randint(1, 9))
        if len(a) == horizon or a[-1:] == (vocabulary - 1,):
            return
        odds = [rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(vocabulary)]
        odds[rng.randrange(vocabulary)] += 1
        conditionals[a] = [Fraction(o, sum(odds)) for o in odds]
        for t in range(vocabulary):
            if odds[t]:
                grow((*a, t))

    grow(())
    return RationalWorld(vocabulary, horizon, conditionals, weights)


def stem(world: RationalWorld, a: Prefix) -> Prefix:
    """a without the end tokens that follow its first one."""
    return a[: a.index(world.eos) + 1] if world.eos in a else a


def next_tokens(world: RationalWorld, a: Prefix) -> dict[int, Fraction]:
    """ref(t | a) on its support; after the end token only the end token."""
    if world.eos in a:
        return {world.eos: Fraction(1)}
    return {t: p for t, p in enumerate(world.conditionals[a]) if p}


def weight(world: RationalWorld, a: Prefix) -> Fraction:
    """w(a): a finished response keeps its own at every length."""
    return world.weights[stem(world, a)]


def prefixes(world: RationalWorld, i: int) -> list[Prefix]:
    """A_i."""
    if i == 0:
        return [()]
    return [(*a, t) for a in prefixes(world, i - 1) for t in next_tokens(world, a)]


def ref(world: RationalWorld, a: Prefix) -> Fraction:
    """ref(a) = prod_j ref(a_j | a_<j)."""
    return prod((next_tokens(world, a[:j])[a[j]] for j in range(len(a))), start=Fraction(1))


def rlhf(world: RationalWorld, i: int) -> Distribution:
    """pi_i(a) = ref(a) w(a) / Z_i."""
    tilted = {a: ref(world, a) * weight(world, a) for a in prefixes(world, i)}
    z = sum(tilted.values())
    return {a: x / z for a, x in tilted.items()}


def partition(world: RationalWorld, i: int) -> Fraction:
    """Z_i = sum over A_i of ref(a) w(a)."""
    return sum(ref(world, a) * weight(world, a) for a in prefixes(world, i))


def normaliser(world: RationalWorld, a: Prefix) -> Fraction:
    """Z(a) = sum_t ref(t | a) w(at)."""
    return sum(p * weight(world, (*a, t)) for t, p in next_tokens(world, a).items())


def tokenwise(world: RationalWorld, a: Prefix) -> dict[int, Fraction]:
    """pi(t | a) = ref(t | a) w(at) / Z(a)."""
    z = normaliser(world, a)
    return {t: p * weight(world, (*a, t)) / z for t, p in next_tokens(world, a).items()}


def sequences(world: RationalWorld) -> Distribution:
    """q(y) = prod_i pi(y_i | y_<i), the tokenwise policy sampled to the end."""
    return {
        y: prod((tokenwise(world, y[:j])[y[j]] for j in range(len(y))), start=Fraction(1))
        for y in prefixes(world, world.horizon)
    }


def preference(world: RationalWorld, y: Prefix, other: Prefix) -> Fraction:
    """p(y > y') = w(y) / (w(y) + w(y')): Bradley-Terry."""
    return weight(world, y) / (weight(world, y) + weight(world, other))


def win_rate(world: RationalWorld, p: Distribution) -> Fraction:
    """P(Y > Y'), Y ~ p and Y' ~ ref."""
    references = {y: ref(world, y) for y in prefixes(world, world.horizon)}
    return sum(p[y] * r * preference(world, y, other) for y in p for other, r in references.items())


def expected_weight(world: RationalWorld, a: Prefix) -> Fraction:
    """E_ref[w(Y) | a]: exp of beta times the soft value."""
    if len(a) == world.horizon:
        return weight(world, a)
    return sum(p * expected_weight(world, (*a, t)) for t, p in next_tokens(world, a).items())


def best_of_n(world: RationalWorld, n: int) -> Distribution:
    """All n-tuples of responses, the heaviest kept, ties shared."""
    references = {y: ref(world, y) for y in prefixes(world, world.horizon)}
    chosen = dict.fromkeys(references, Fraction(0))
    for draws in itertools.product(references, repeat=n):
        best = max(weight(world, y) for y in draws)
        winners = [y for y in draws if weight(world, y) == best]
        for y in winners:
            chosen[y] += prod((references[d] for d in draws), start=Fraction(1)) / len(winners)
    return chosen
