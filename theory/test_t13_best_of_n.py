"""T13. The exact law of best-of-N, and the bound on its divergence.

Known (Beirami et al. 2024, arXiv 2401.01879, who prove the widely used formula to be a bound). With F the CDF of r
under ref,

    P(y) = ref(y) / ref(r = r(y)) * (F(r(y))^N - F(r(y)-)^N),      KL(P || ref) <= log N - (N - 1) / N,

ties broken at random. Falsified by an N-tuple count that differs, or a divergence above the bound.
"""

import numpy as np
import pytest
from hypothesis import strategies as st

from theory import oracle
from theory.ledger import verify
from theory.policies import best_of_n
from theory.strategies import for_all, worlds
from theory.world import World, kl


def bound(n: int) -> float:
    return np.log(n) - (n - 1) / n


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_law_agrees_with_all_n_tuples(n):
    for seed in range(20):
        exact = oracle.random_rational_world(seed, 3, 2)
        counted = np.array([float(p) for p in oracle.best_of_n(exact, n).values()])
        world = World.from_rational(exact)
        gap = np.abs(np.exp(best_of_n(world, np.round(world.rewards[-1], 9), n)) - counted).max()
        verify("T13", "best-of-N from the CDF = all N-tuples, ties included", gap)


@for_all(world=worlds(), n=st.integers(1, 64))
def test_the_divergence_is_below_the_bound(world, n):
    law = best_of_n(world, world.rewards[-1], n)
    verify("T13", "the law sums to 1", abs(np.exp(law).sum() - 1))
    verify("T13", "KL(best-of-N || ref) <= log N - (N - 1) / N", kl(law, world.log_ref[-1]) - bound(n), kind="bound")


@for_all(world=worlds(), n=st.integers(1, 63))
def test_more_draws_are_never_worse(world, n):
    r = world.rewards[-1]
    fewer, more = (float(np.exp(best_of_n(world, r, m)) @ r) for m in (n, n + 1))
    verify("T13", "E[r] does not fall with N", fewer - more, kind="bound")


def test_control_the_bound_is_nearly_met_and_one_draw_fewer_is_not_enough():
    world = World.random(0, 5, 5)  # many responses, none likely
    assert 0 < bound(4) - kl(best_of_n(world, world.rewards[-1], 4), world.log_ref[-1]) < 0.05
    assert kl(best_of_n(world, world.rewards[-1], 4), world.log_ref[-1]) > bound(3)


def test_control_ties_matter():
    world = World.random(0, 3, 2, ties=True, reward_scale=0.5)
    r = world.rewards[-1]
    apart = r + 1e-6 * np.arange(len(r))
    assert len(np.unique(r)) < len(r)
    assert np.abs(np.exp(best_of_n(world, r, 4)) - np.exp(best_of_n(world, apart, 4))).max() > 0.01
