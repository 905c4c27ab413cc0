"""T1. A full-sequence reward says nothing of prefixes.

Paper (2406.07780). For any function f on unfinished prefixes there is a reward with the same values on whole
responses, hence the same Bradley-Terry loss on every set of full-sequence pairs and the same RLHF policy, whose prefix
scores are f. It is even a sum of token rewards: rho(t | a) = f(at) - f(a), the last one making up the difference.

Follow-up (here; proof in README.md). Guided by such a reward (ARGS, beta > 0), the infimum over f of the win rate is

    min over a in A_{T-1} of sum_t q(t | a) u(at),   u(y) = E_{Y' ~ ref} p(y > Y'):

as bad as the worst prefix allows, the last token alone being scored truly. Falsified by an f that changes a
preference between whole responses, by one that falls below the bound, or by a gap that does not close.
"""

from fractions import Fraction
from math import prod

import numpy as np
from hypothesis import strategies as st

from theory import oracle
from theory.bradley_terry import win_rate, win_rates
from theory.ledger import verify
from theory.policies import tokenwise
from theory.strategies import betas, for_all, labelled_worlds, seeds
from theory.world import Levels, World, bradley_terry_labels, finished, noise


def with_prefix_scores(world: oracle.RationalWorld, f: dict[oracle.Prefix, Fraction]) -> dict[tuple, Fraction]:
    """exp(beta rho(t | a)): their running product is f on unfinished prefixes and w on whole responses."""
    whole = {a: w for a, w in world.weights.items() if a not in world.conditionals}
    target = whole | f
    return {a: w / target.get(a[:-1], Fraction(1)) if len(a) > 1 else w for a, w in target.items() if a}


@for_all(seed=seeds, shape=st.sampled_from([(2, 3), (3, 2), (3, 3), (4, 2)]))
def test_any_prefix_scores_fit_the_same_full_sequence_data(seed, shape):
    world = oracle.random_rational_world(seed, *shape)
    f = oracle.random_rational_world(seed + 1, *shape).weights  # a stream of its own
    f = {a: f.get(a, Fraction(7, 3)) for a in world.conditionals if a}
    token = with_prefix_scores(world, f)

    def running_product(a: oracle.Prefix) -> Fraction:
        return prod((token[a[:j]] for j in range(1, len(a) + 1)), start=Fraction(1))

    arbitrary = oracle.RationalWorld(
        world.vocabulary, world.horizon, world.conditionals, {a: running_product(a) for a in world.weights}
    )
    responses = oracle.prefixes(world, world.horizon)
    changes = (
        abs(oracle.preference(arbitrary, y, other) - oracle.preference(world, y, other))
        for y in responses
        for other in responses
    )
    verify("T1", "p(y > y') does not see the prefix scores", max(changes), 0, "exact")
    changed, pi_t = oracle.rlhf(arbitrary, world.horizon), oracle.rlhf(world, world.horizon)
    verify("T1", "pi_T does not see the prefix scores", max(abs(changed[y] - pi_t[y]) for y in pi_t), 0, "exact")
    verify("T1", "the prefix scores are f", max((abs(arbitrary.weights[a] - f[a]) for a in f), default=0), 0, "exact")


def worst_case(world: World, beta: float) -> tuple[float, Levels]:
    """min over a in A_{T-1} of E_q[u | a], and prefix scores that lead there: +1 along the way, -1 beside it."""
    u = win_rates(world)[-1]
    last = world.up(world.horizon, np.exp(tokenwise(world, world.rewards, beta)[-1]) * u)
    worst = world.prefixes[-2][last.argmin()]
    scores = [np.where((a == worst[: a.shape[1]]).all(-1), 1.0, -1.0) for a in world.prefixes[:-1]]
    return float(last.min()), scores


def misled(world: World, f: Levels, strength: float) -> Levels:
    """The world's reward with strength * f on unfinished prefixes shorter than T."""
    return [
        np.where(finished(a, world.eos), r, strength * g)
        for a, r, g in zip(world.prefixes[:-1], world.rewards, f, strict=False)
    ] + [world.rewards[-1]]


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_the_infimum_over_prefix_scores_is_the_worst_prefix(world, beta, seed):
    least, toward = worst_case(world, beta)

    def win(f: Levels, strength: float) -> float:
        q = world.paths(tokenwise(world, misled(world, f, strength), beta))[-1]
        return win_rate(world, q, world.log_ref[-1])

    below = least - win(noise(world, seed), 10.0)
    verify("T1", "ARGS with random prefix scores wins at least the worst case", below, kind="bound")
    verify("T1", "and scores toward the worst prefix come within", win(toward, 1e4) - least, kind="bound")


def test_control_changing_a_whole_response_changes_the_data():
    world = oracle.random_rational_world(0, 3, 2)
    y = oracle.prefixes(world, 2)[0]
    doubled = world.weights | {oracle.stem(world, y): 2 * oracle.weight(world, y)}
    other = oracle.RationalWorld(3, 2, world.conditionals, doubled)
    assert any(oracle.preference(world, y, z) != oracle.preference(other, y, z) for z in oracle.prefixes(world, 2))


def test_control_random_scores_do_not_reach_the_worst_case():
    world = World.random(3, 3, 3)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    least, _ = worst_case(world, 1.0)
    q = world.paths(tokenwise(world, misled(world, noise(world, 1), 1.0), 1.0))[-1]
    assert win_rate(world, q, world.log_ref[-1]) > least + 0.05
