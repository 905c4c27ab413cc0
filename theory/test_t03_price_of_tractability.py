"""T3. Sampled token by token, the ratio is not the RLHF policy.

Paper (2406.07780, which names the gap; its exact size and its zeros: here). The sampled responses follow

    q(y) = ref(y) exp(beta sum_i r(y_1:i)) / prod_i Z(y_1:i-1),
    log pi_T(y) - log q(y) = log w(y) - log Z_T,   w(y) = prod_i Z(y_1:i-1) exp(-beta sum_{i<T} r(y_1:i)),

so KL(q || pi_T) = log E_q[w] - E_q[log w], the Jensen gap of w (which T10 uses as a weight). It is zero exactly when w
is constant on A_T. Falsified by a response where the second line fails, or a constant w with q != pi_T.
"""

import numpy as np

from theory.ledger import verify
from theory.policies import log_normalisers, log_partition, log_weight, path_sum, rlhf, soft_value, tokenwise
from theory.strategies import betas, for_all, worlds
from theory.world import World, kl


@for_all(world=worlds(), beta=betas())
def test_what_sampling_the_ratio_gives(world, beta):
    r = world.rewards
    q = world.paths(tokenwise(world, r, beta))[-1]
    steps = [world.down(i, z) for i, z in enumerate(log_normalisers(world, r, beta), start=1)]
    formula = world.log_ref[-1] + beta * path_sum(world, r[1:]) - path_sum(world, steps)
    verify("T3", "q(y) = ref(y) e^{beta sum r} / prod Z (logs)", np.abs(q - formula).max())

    log_w = log_weight(world, r, beta)
    pi = rlhf(world, world.horizon, r[-1], beta)
    log_zt = log_partition(world, world.horizon, r[-1], beta)
    verify("T3", "log pi_T - log q = log w - log Z_T", np.abs(pi - q - (log_w - log_zt)).max())
    jensen = np.logaddexp.reduce(q + log_w) - np.exp(q) @ log_w
    verify("T3", "KL(q || pi_T) = log E_q w - E_q log w", abs(kl(q, pi) - jensen))


@for_all(world=worlds(), beta=betas())
def test_a_constant_weight_closes_the_gap(world, beta):
    scores = soft_value(world, world.rewards[-1], beta)
    verify("T3", "r = soft value: w is constant", np.ptp(log_weight(world, scores, beta)))
    q = world.paths(tokenwise(world, scores, beta))[-1]
    pi = rlhf(world, world.horizon, world.rewards[-1], beta)
    verify("T3", "and then q = pi_T (logs)", np.abs(q - pi).max())


def test_control_an_ordinary_reward_leaves_a_gap():
    world = World.random(0)
    assert np.ptp(log_weight(world, world.rewards, 1.0)) > 0.1
    q = world.paths(tokenwise(world, world.rewards, 1.0))[-1]
    assert kl(q, rlhf(world, world.horizon, world.rewards[-1], 1.0)) > 0.01
