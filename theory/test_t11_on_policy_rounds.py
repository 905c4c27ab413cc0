"""T11. Pairs from the guided policy, again and again.

Here. (a) Draw the pairs from the current guided policy, refit (T5), guide ref by the new reward, repeat. Over random
worlds the reward lost at equal KL to the RLHF policy shrinks *on average*, not in every world and not to zero; no
theorem is claimed, and that rounds can harm is kept as a test. (b) There is an exact version (soft policy iteration,
known for entropy-regularised control: Haarnoja et al. 2018): with the current guided policy q,

    V(a) = E_q[ r(Y) - sum over later steps of log(q / ref) / beta | a ],    q <- ref exp(beta V) / Z

has the last k conditionals of pi_T right after k rounds, hence q = pi_T after T. Without the log-ratio term it stops
short. Falsified by a wrong conditional among the last k.
"""

import numpy as np
import pytest

from theory.bradley_terry import partial_reward
from theory.ledger import verify
from theory.policies import conditionals, on_policy_value, reward_lost, rlhf, tokenwise
from theory.strategies import betas, for_all, worlds
from theory.world import Levels, World, bradley_terry_labels, kl, largest_gap


def pair_rounds(world: World, beta: float, rounds: int) -> list[Levels]:
    """The guided policies of rounds 1.. of (a): pairs from the last one, the first from ref."""
    policies = [world.ref]
    for _ in range(rounds):
        policies.append(tokenwise(world, partial_reward(world, policies[-1]), beta))
    return policies[1:]


def value_rounds(world: World, beta: float, rounds: int, log_ratio: bool = True) -> list[Levels]:
    """The guided policies of rounds 1.. of (b)."""
    last, policies = world.rewards[-1], [world.ref]
    for _ in range(rounds):
        q = policies[-1]
        value = on_policy_value(world, last, q, beta) if log_ratio else world.mean(last, q)
        policies.append(tokenwise(world, value, beta))
    return policies[1:]


def losses(seed: int, beta: float, rounds: int) -> list[float]:
    """Reward lost at equal KL after each round of (a), |V| = 3, T = 4."""
    world = World.random(seed, 3, 4)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    return [reward_lost(world, world.paths(q)[-1], world.rewards[-1]) for q in pair_rounds(world, beta, rounds)]


def test_a_rounds_recover_reward_on_average_but_not_all_and_not_always():
    lost = np.array([losses(seed, 4.0, 5) for seed in range(50)])
    first, last = lost[:, 0], lost[:, -1]
    verify("T11", "(a) mean reward lost over 50 worlds, round 5 / round 1", last.mean() / first.mean(), 0.25, "example")
    verify("T11", "(a) not to zero: minus the mean left after 5 rounds", -last.mean(), -0.01, "example")
    verify("T11", "(a) not always: the least gain of the rounds", (first - last).min(), -0.01, "example")


@for_all(world=worlds(), beta=betas())
def test_b_after_k_rounds_the_last_k_conditionals_are_exact(world, beta):
    exact = conditionals(world, rlhf(world, world.horizon, world.rewards[-1], beta))
    rounds = value_rounds(world, beta, world.horizon)
    gap = max(largest_gap(q[-k:], exact[-k:]) for k, q in enumerate(rounds, start=1))
    verify("T11", "(b) last k conditionals = pi_T's after k rounds, every k (logs)", gap)


@pytest.mark.parametrize("seed", range(3))
def test_control_one_round_fewer_is_not_exact(seed):
    world = World.random(seed, 3, 4)
    pi = rlhf(world, 4, world.rewards[-1], 2.0)
    divergence = [kl(world.paths(q)[-1], pi) for q in value_rounds(world, 2.0, 4)]
    assert divergence[2] > 1e-7
    assert divergence[3] < 1e-20


def test_control_without_the_log_ratio_it_stops_short():
    world = World.random(0, 3, 4)
    q = value_rounds(world, 2.0, 20, log_ratio=False)[-1]
    assert kl(world.paths(q)[-1], rlhf(world, 4, world.rewards[-1], 2.0)) > 0.1
