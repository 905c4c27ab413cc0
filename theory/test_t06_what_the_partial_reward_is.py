"""T6. The partial reward orders prefixes by the expected win rate of their completions.

Known for whole responses (a Bradley-Terry fit orders by win rate, the Borda count: Siththaranjan et al. 2024, arXiv
2312.08358); for prefixes: here (proof in README.md). Stationarity (T5) reads, for every a in A_i,

    sum_b ref(b) sigmoid(s(a) - s(b)) = W(a),   W(a) = E[p(Y > Y') | Y_1:i = a],

and its left side is one strictly increasing function G_i of s(a). So s = G_i^{-1}(W), whatever the labeler,
Bradley-Terry or not, transitive or not. At full length with Bradley-Terry labels s is the true reward. Among siblings
the same holds when pairs are compared only up to the longer response's length, as they are in training. Falsified by
two prefixes of one length that s and W order differently.
"""

import numpy as np
import pytest
from scipy.special import expit

from theory.bradley_terry import partial_reward, partial_reward_of, win_rates
from theory.ledger import verify
from theory.policies import soft_value
from theory.strategies import for_all, labelled_worlds
from theory.world import Levels, World, bradley_terry_labels, finished, largest_gap


def disorder(scores: np.ndarray, win: np.ndarray) -> float:
    """How far s ever falls as W rises: 0 when they order alike."""
    sorted_scores = scores[np.argsort(win)]
    return float(np.max(np.maximum.accumulate(sorted_scores) - sorted_scores))


def sibling_disorder(world: World, scores: Levels, win: Levels) -> float:
    """The same among the siblings that decoding compares: the children of one unfinished prefix."""
    worst = 0.0
    for i in range(1, world.horizon + 1):
        for a in np.flatnonzero(~finished(world.prefixes[i - 1], world.eos)):
            family = world.parents[i] == a
            worst = max(worst, disorder(scores[i][family], win[i][family]))
    return worst


def from_win_rates(world: World, win: Levels) -> Levels:
    """G_i(s(a)) = sum_b ref(b) sigmoid(s(a) - s(b)), solved for s(a) by bisection, each a on its own."""
    s = partial_reward(world)
    inverse = []
    for i, w in enumerate(win):
        low, high = np.full(len(w), s[i].min() - 1.0), np.full(len(w), s[i].max() + 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = expit(middle[:, None] - s[i][None, :]) @ np.exp(world.log_ref[i]) < w
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        inverse.append(low)
    return inverse


@for_all(world=labelled_worlds())
def test_the_partial_reward_orders_as_the_win_rate(world):
    s, win = partial_reward(world), win_rates(world)
    worst = max(disorder(x, w) for x, w in zip(s, win, strict=True))
    verify("T6", "s falls where W rises, any labeler, every length", worst, 1e-9, "bound")
    verify("T6", "s(a) = G_i^{-1}(W(a)), by bisection", largest_gap(s, from_win_rates(world, win)), 1e-7, "bound")


@for_all(world=labelled_worlds(any_labeler=False))
def test_at_full_length_it_is_the_true_reward(world):
    centred = world.rewards[-1] - np.exp(world.log_ref[-1]) @ world.rewards[-1]
    gap = np.abs(partial_reward(world)[-1] - centred).max()
    verify("T6", "BT labels: s_T = r + constant", gap, 1e-9, "fit")


@for_all(world=labelled_worlds())
def test_comparing_up_to_the_longer_response_orders_siblings_alike(world):
    worst = sibling_disorder(world, partial_reward_of(world, "extend"), win_rates(world))
    verify("T6", "the same among siblings, pairs compared to the longer length", worst, 1e-9, "bound")


def mixed_world() -> World:
    """A gamble (5 or -5, even odds) and a sure 1."""
    tables = {(): [0.5, 0.5, 0.0], (0,): [0.5, 0.5, 0.0], (1,): [1.0, 0.0, 0.0]}
    world = World.from_tables(tables, {(0, 0): 5.0, (0, 1): -5.0, (1, 0): 1.0}, horizon=2, eos=2)
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def test_control_the_soft_value_orders_differently():
    world = mixed_world()
    value = soft_value(world, world.rewards[-1], 1.0)
    assert disorder(value[1], win_rates(world)[1]) > 1.0


def test_control_the_scores_of_another_world_are_caught():
    world, other = (World.random(seed, 3, 3) for seed in (0, 1))
    world, other = (w.with_labels(bradley_terry_labels(w.rewards[-1])) for w in (world, other))
    assert largest_gap(partial_reward(other), from_win_rates(world, win_rates(world))) > 0.1
    assert sibling_disorder(world, partial_reward(other), win_rates(world)) > 0.1


def test_an_unknown_treatment_is_refused():
    with pytest.raises(ValueError, match="treatment='middle', expected one of"):
        partial_reward_of(mixed_world(), "middle")
