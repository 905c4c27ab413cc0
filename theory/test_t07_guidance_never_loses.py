"""T7. Guided by the partial reward, responses beat the reference's with probability at least 1/2.

Here (proof in README.md). For any labeler and any beta >= 0, with s the partial reward of T6, q its tokenwise policy,

    win rate - 1/2 = sum over steps of E_{a ~ q}[ Cov_{t ~ ref(. | a)}( W(at), exp(beta s(at)) / Z(a) ) ] >= 0,

because among siblings both factors of every covariance rise together. Equality only if beta = 0 or all responses win
alike. The proof uses nothing but that s orders *siblings* as W does: sibling concordance is what a learned partial
reward should be judged by. It holds too for drawing from the argmax of s alone. Falsified by one win rate below 1/2.
"""

import numpy as np

from theory.bradley_terry import partial_reward, partial_reward_of, win_rate, win_rates
from theory.ledger import verify
from theory.policies import best_token, log_normalisers, soft_value, tokenwise
from theory.strategies import betas, for_all, labelled_worlds, seeds
from theory.world import Levels, World, bradley_terry_labels, noise


def gain(world: World, q: Levels) -> float:
    """P(Y > Y') - 1/2, Y from the policy q and Y' from ref."""
    return win_rate(world, world.paths(q)[-1], world.log_ref[-1]) - 0.5


def covariances(world: World, s: Levels, beta: float) -> Levels:
    """Cov_{t ~ ref(. | a)}(W(at), exp(beta s(at)) / Z(a)) on A_0 .. A_{T-1}."""
    win, log_z = win_rates(world), log_normalisers(world, s, beta)
    levels = []
    for i in range(1, world.horizon + 1):
        ref, tilt = np.exp(world.ref[i]), np.exp(beta * s[i] - world.down(i, log_z[i - 1]))
        levels.append(world.up(i, ref * win[i] * tilt) - world.up(i, ref * win[i]) * world.up(i, ref * tilt))
    return levels


def expected_covariance(world: World, s: Levels, beta: float, along: Levels) -> float:
    """sum over steps of E_{a ~ along}[Cov]."""
    paths = world.paths(along)
    return float(sum(np.exp(p) @ c for p, c in zip(paths, covariances(world, s, beta), strict=False)))


@for_all(world=labelled_worlds(), beta=betas())
def test_the_win_rate_is_a_sum_of_covariances_none_negative(world, beta):
    s = partial_reward(world)
    q = tokenwise(world, s, beta)
    verify("T7", "win rate - 1/2 = sum E_q[Cov]", abs(gain(world, q) - expected_covariance(world, s, beta, along=q)))
    verify("T7", "each Cov >= 0", -min(c.min() for c in covariances(world, s, beta)), kind="bound")
    verify("T7", "win rate >= 1/2, any labeler", -gain(world, q), kind="bound")


@for_all(world=labelled_worlds(), beta=betas())
def test_it_wins_unless_all_responses_win_alike(world, beta):
    """Equality only if u is constant; then there is nothing to win."""
    u, found = win_rates(world)[-1], gain(world, tokenwise(world, partial_reward(world), beta))
    if np.ptp(u) > 1e-6:
        verify("T7", "win rate > 1/2 where some response wins more", 1e-13 - found, 0.0, kind="bound")
    alike = world.with_labels(np.full((len(u), len(u)), 0.5))
    found = gain(alike, tokenwise(alike, partial_reward(alike), beta))
    verify("T7", "win rate = 1/2 where all win alike", abs(found))


@for_all(world=labelled_worlds(), beta=betas())
def test_it_holds_for_pairs_compared_up_to_the_longer_response(world, beta):
    q = tokenwise(world, partial_reward_of(world, "extend"), beta)
    verify("T7", "win rate >= 1/2, pairs compared up to the longer length", -gain(world, q), kind="bound")


@for_all(world=labelled_worlds())
def test_it_holds_for_the_argmax_of_the_reward_alone(world):
    q = best_token(world, partial_reward(world))
    verify("T7", "win rate >= 1/2, argmax of s", -gain(world, q), 1e-9, kind="bound")


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_the_order_of_siblings_is_all_that_is_used(world, beta, seed):
    """Any increasing function of W among siblings, another one after every prefix."""
    rng, win = np.random.default_rng(seed), win_rates(world)
    scores = [win[0]]
    for i in range(1, world.horizon + 1):
        steepness, shift = np.exp(rng.normal(1.0, 2.0, len(win[i - 1]))), rng.standard_normal(len(win[i - 1]))
        scores.append(world.down(i, shift) + np.tanh(world.down(i, steepness) * (win[i] - 0.5)))
    loss = -gain(world, tokenwise(world, scores, beta))
    verify("T7", "win rate >= 1/2, any scores concordant among siblings", loss, kind="bound")


def test_control_reversed_scores_lose():
    world = World.random(0)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    assert gain(world, tokenwise(world, [-x for x in partial_reward(world)], 1.0)) < -0.05


def test_control_scores_that_are_discordant_among_siblings_can_lose():
    world = World.random(1)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    gains = [gain(world, tokenwise(world, noise(world, seed), 1.0)) for seed in range(20)]
    assert min(gains) < -0.02


def test_control_averaging_the_covariances_along_the_reference_fails():
    world = World.random(0)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    s = partial_reward(world)
    q = tokenwise(world, s, 2.0)
    assert abs(gain(world, q) - expected_covariance(world, s, 2.0, along=world.ref)) > 1e-3


def test_control_the_soft_value_in_place_of_the_partial_reward_can_lose():
    """A gamble with a bright tail: the soft value wants it, most comparisons do not."""
    tables = {(): [0.5, 0.5, 0.0], (0,): [0.1, 0.9, 0.0], (1,): [1.0, 0.0, 0.0]}
    world = World.from_tables(tables, {(0, 0): 4.0, (0, 1): -4.0, (1, 0): 0.0}, horizon=2, eos=2)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    value, partial = soft_value(world, world.rewards[-1], 1.0), partial_reward(world)
    first_step_only = [np.zeros(1), value[1], np.zeros(3)]
    assert gain(world, tokenwise(world, first_step_only, 1.0)) < -0.05
    assert gain(world, tokenwise(world, [np.zeros(1), partial[1], np.zeros(3)], 1.0)) > 0.05
