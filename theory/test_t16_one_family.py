"""T16. Controlled decoding, the exact policy and the maximum are one family; PARGS is beside it.

Known limits (soft values: Korbak et al. 2022; the maximum is FaRMA's target); the place of PARGS: here.
V_lambda(a) = log E_ref[exp(lambda r) | a] / lambda satisfies

    mean <= V_lambda <= mean + lambda range^2 / 8,    max + log ref(max | a) / lambda <= V_lambda <= max,

so it is controlled decoding's mean as lambda -> 0 and the maximum as lambda -> infinity; at lambda = beta guidance is
exact (T4). Elsewhere KL to RLHF is positive but for special worlds: with two unfinished first tokens and T = 2 one
equation decides, and it may have a second root. (If one of the two has ended it has none: the other's V_lambda rises
strictly, unless its reward is settled.) PARGS starts at the lambda = 0 end for small rewards (T9) and leaves the family
from there. Falsified by a V_lambda outside the bounds, or by KL > 0 at lambda = beta.
"""

import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.optimize import brentq

from theory.bradley_terry import partial_reward
from theory.ledger import verify
from theory.policies import max_value, rlhf, soft_value, tokenwise
from theory.strategies import betas, for_all, worlds
from theory.world import Levels, World, bradley_terry_labels, kl

BETA = 0.5
SECOND_ROOT = World.from_tables(
    {(): [0.5, 0.5, 0.0], (0,): [0.5, 0.5, 0.0], (1,): [0.01, 0.99, 0.0]},
    {(0, 0): 1.0, (0, 1): -1.0, (1, 0): 3.0, (1, 1): -0.03},
    horizon=2,
    eos=2,
)


def divergence(world: World, scores: Levels, beta: float) -> float:
    """KL(pi_T || guided by the scores)."""
    return kl(rlhf(world, world.horizon, world.rewards[-1], beta), world.paths(tokenwise(world, scores, beta))[-1])


def log_mass_of_the_maximum(world: World, last: np.ndarray) -> Levels:
    """log P_ref(r(Y) = max | a)."""
    best = max_value(world, last)
    levels = []
    for i, level in enumerate(best):
        at = world.ancestors(i)
        mass = np.bincount(at, np.exp(world.log_ref[-1] - world.log_ref[i][at]) * (last >= level[at]), len(level))
        levels.append(np.log(mass))
    return levels


@for_all(world=worlds(), lam=st.floats(1e-3, 1e3))
def test_the_mean_and_the_maximum_are_its_ends(world, lam):
    r = world.rewards[-1]
    value, mean, top, bottom = soft_value(world, r, lam), world.mean(r), max_value(world, r), max_value(world, -r)
    rare = log_mass_of_the_maximum(world, r)
    in_nats = min(lam, 1.0)  # V = log(..) / lambda: rounding grows as 1 / lambda
    above, below = [], []
    for v, m, high, low, log_mass in zip(value, mean, top, bottom, rare, strict=True):
        above.append(v - np.minimum(high, m + lam * (high + low) ** 2 / 8))
        below.append(np.maximum(m, high + log_mass / lam) - v)
    too_high, too_low = (in_nats * max(x.max() for x in side) for side in (above, below))
    verify("T16", "V <= min(max, mean + lambda range^2 / 8)", too_high, kind="bound")
    verify("T16", "V >= max(mean, max + log ref(max | a) / lambda)", too_low, kind="bound")


@for_all(world=worlds(), beta=betas())
def test_it_is_exact_at_beta(world, beta):
    verify("T16", "KL(pi_T || guided by V_beta)", divergence(world, soft_value(world, world.rewards[-1], beta), beta))


def second_root() -> float:
    """The other lambda at which SECOND_ROOT is guided to its RLHF policy."""

    def gap(lam: float) -> float:
        first, other = soft_value(SECOND_ROOT, SECOND_ROOT.rewards[-1], lam)[1]
        return first - other

    return float(brentq(lambda lam: gap(lam) - gap(BETA), 1.0, 50.0, xtol=1e-14, rtol=1e-14))


def test_a_world_with_a_second_root():
    world, second = SECOND_ROOT, second_root()
    at_root, between, beyond = (
        divergence(world, soft_value(world, world.rewards[-1], lam), BETA)
        for lam in (second, (BETA + second) / 2, 3 * second)
    )
    verify("T16", "a second root of KL to RLHF besides lambda = beta: KL there", at_root)
    verify("T16", "minus KL between the roots and beyond them", -min(between, beyond), -1e-4, "example")


@pytest.mark.parametrize("lam", [0.25, 0.5, 2.0, 4.0])
def test_control_other_lambdas_are_not_exact(lam):
    world = World.random(0, 3, 4, reward_scale=2.0)
    assert divergence(world, soft_value(world, world.rewards[-1], lam), 1.0) > 1e-3


def test_control_pargs_is_no_member():
    """The nearest V_lambda leaves a divergence from the policy of the partial reward."""
    world = World.random(0, 4, 3, reward_scale=2.0)
    r = world.rewards[-1]
    partial = partial_reward(world.with_labels(bradley_terry_labels(r)))
    pargs = world.paths(tokenwise(world, partial, 1.0))[-1]
    family = (soft_value(world, r, lam) for sign in (-1, 1) for lam in sign * np.geomspace(1e-3, 100, 200))
    assert min(kl(pargs, world.paths(tokenwise(world, scores, 1.0))[-1]) for scores in family) > 1e-3
