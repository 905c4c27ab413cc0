"""T14. Controlled decoding never lowers the expected reward.

Known (Mudgal et al. 2024, arXiv 2310.17022, whose tokenwise policy it is); by the proof of T7 with r for u. Guided by
V(a) = E_ref[r | a],

    E_q[r] - E_ref[r] = sum over steps of E_{a ~ q}[ Cov_{t ~ ref(. | a)}( V(at), exp(beta V(at)) / Z(a) ) ] >= 0.

Falsified by one world where the guided expectation is lower.
"""

import numpy as np

from theory.ledger import verify
from theory.policies import log_normalisers, tokenwise
from theory.strategies import betas, for_all, worlds
from theory.world import Levels, World


def gain(world: World, scores: Levels, beta: float) -> float:
    """E_q[r] - E_ref[r], q guided by the scores."""
    q = world.paths(tokenwise(world, scores, beta))[-1]
    return float((np.exp(q) - np.exp(world.log_ref[-1])) @ world.rewards[-1])


@for_all(world=worlds(), beta=betas())
def test_the_gain_is_a_sum_of_covariances_none_negative(world, beta):
    value = world.mean(world.rewards[-1])
    log_z = log_normalisers(world, value, beta)
    along = world.paths(tokenwise(world, value, beta))
    total, least = 0.0, 0.0
    for i in range(1, world.horizon + 1):
        ref, tilt = np.exp(world.ref[i]), np.exp(beta * value[i] - world.down(i, log_z[i - 1]))
        covariance = world.up(i, ref * tilt * (value[i] - world.down(i, value[i - 1])))
        least = min(least, covariance.min())
        total += float(np.exp(along[i - 1]) @ covariance)
    verify("T14", "each Cov >= 0", -least, kind="bound")
    scale = max(1.0, np.abs(world.rewards[-1]).max())
    verify("T14", "E_q[r] - E_ref[r] = sum E_q[Cov] (relative)", abs(gain(world, value, beta) - total) / scale)
    verify("T14", "E_q[r] >= E_ref[r]", -gain(world, value, beta), kind="bound")


def test_control_arbitrary_prefix_rewards_can_lower_it():
    gains = [gain(world, world.rewards, 2.0) for world in (World.random(seed, 3, 4) for seed in range(50))]
    assert min(gains) < -0.1


def test_control_the_value_upside_down_lowers_it():
    world = World.random(0)
    assert gain(world, [-v for v in world.mean(world.rewards[-1])], 1.0) < -0.1
