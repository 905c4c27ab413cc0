"""T10. The ratio's normaliser is the weight that makes the ratio exact.

Known (twisted sequential Monte Carlo: Zhao et al. 2024, arXiv 2404.17546; unbiasedness: Del Moral 2004); the reading
of the weight: here. With q of T3 as proposal, the weights w(y) = prod_i Z(y_1:i-1) exp(-beta sum_{i<T} r(y_1:i)) turn q
into pi_T, and their mean under q is Z_T. With the intermediate targets pi_i the incremental weight after prefix a is

    Z(a) exp(-beta r(a)) = sum_t pi_i(at) / pi_{i-1}(a) * Z_i / Z_{i-1}:

T2's normaliser, up to a constant. What the paper drops to get a tokenwise policy is what N particles need to sample the
RLHF policy as N grows. The weight does not depend on the token drawn, so one resamples before drawing. (A few particles
may be worse than one in a given world: the approach is asymptotic, only Z-hat is unbiased at every N.) Falsified by a
biased estimate of Z_T, or by a total variation that does not fall with N.
"""

import numpy as np
import pytest

from theory.ledger import verify
from theory.policies import log_partition, log_weight, rlhf, tokenwise
from theory.smc import enumerate_particles, log_increments, sample_particles
from theory.strategies import WORLDS, betas, for_all, worlds
from theory.test_t02_ratio_identity import log_ratio
from theory.world import World, largest_gap, total_variation

TINY = [World.random(seed, 2, 4, reward_scale=2.0) for seed in range(WORLDS)]
WORLD = World.random(14, 3, 3, reward_scale=1.5)
BETA = 1.5


def target(world: World, beta: float) -> np.ndarray:
    return rlhf(world, world.horizon, world.rewards[-1], beta)


@for_all(world=worlds(), beta=betas())
def test_reweighted_the_tokenwise_policy_is_the_rlhf_policy(world, beta):
    log_w = log_weight(world, world.rewards, beta)
    q = world.paths(tokenwise(world, world.rewards, beta))[-1]
    log_zt = log_partition(world, world.horizon, world.rewards[-1], beta)
    verify("T10", "q w / Z_T = pi_T (logs)", np.abs(q + log_w - log_zt - target(world, beta)).max())
    verify("T10", "E_q[w] = Z_T (logs)", abs(np.logaddexp.reduce(q + log_w) - log_zt))


@for_all(world=worlds(), beta=betas())
def test_the_incremental_weight_is_the_normaliser_of_the_ratio(world, beta):
    """gamma_i(at) / (gamma_{i-1}(a) pi(t|a)) = Z(a) exp(-beta r(a)) = (sum_t pi_i(at) / pi_{i-1}(a)) Z_i / Z_{i-1}."""
    r, policy = world.rewards, tokenwise(world, world.rewards, beta)
    levels = range(1, world.horizon + 1)
    gamma = [log_ref + beta * x for log_ref, x in zip(world.log_ref, r, strict=True)]
    definition = [gamma[i] - world.down(i, gamma[i - 1]) - policy[i] for i in levels]
    weight = log_increments(world, r, beta)
    weight[0] = weight[0] - beta * r[0]
    log_zi = [log_partition(world, i, x, beta) for i, x in enumerate(r)]
    ratio = zip(levels, log_ratio(world, beta), strict=True)
    from_ratio = [world.log_up(i, x) + log_zi[i] - log_zi[i - 1] for i, x in ratio]
    gap = largest_gap(definition, [world.down(i, weight[i - 1]) for i in levels])
    verify("T10", "incremental weight = Z(a) e^{-beta r(a)} for every token (logs)", gap)
    verify("T10", "incremental weight = normaliser of T2's ratio * Z_i / Z_{i-1}", largest_gap(weight, from_ratio))


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_every_outcome_of_every_particle(particles):
    for world in TINY:
        law, z = enumerate_particles(world, world.rewards, BETA, particles, weighted=True)
        log_zt = log_partition(world, world.horizon, world.rewards[-1], BETA)
        gap = np.abs(law / np.exp(target(world, BETA) + log_zt) - 1).max()
        verify("T10", f"E[Z-hat 1(Y = y)] = Z_T pi_T(y), N = {particles}, all outcomes (relative)", gap)
        verify("T10", f"E[Z-hat] = Z_T, N = {particles}, all outcomes (relative)", abs(z / np.exp(log_zt) - 1))


def test_more_particles_come_closer_on_average():
    def distance(world: World, particles: int) -> float:
        law, _ = enumerate_particles(world, world.rewards, BETA, particles, weighted=False)
        return total_variation(np.log(law), target(world, BETA))

    one, four = (np.mean([distance(world, n) for world in TINY]) for n in (1, 4))
    verify("T10", f"mean TV to pi_T over {len(TINY)} worlds, N = 4 / N = 1, all outcomes", four / one, 0.75, "example")


def test_many_particles_come_close():
    """20,000 runs of 64 particles; fails by chance with probability below 1e-6.

    By McDiarmid (a run moves the TV by at most 1 / runs) the sampled TV exceeds its mean by 0.019 with less than that,
    and its mean exceeds the TV of one particle's law by at most sqrt(n / runs) / 2 = 0.014.
    """
    runs, pi = 20_000, target(WORLD, BETA)
    at, log_z = sample_particles(WORLD, WORLD.rewards, BETA, 64, runs, np.random.default_rng(0))
    law = np.bincount(at.ravel(), minlength=len(pi)) / at.size
    sampled = 0.5 * np.abs(law - np.exp(pi)).sum()
    alone = total_variation(WORLD.paths(tokenwise(WORLD, WORLD.rewards, BETA))[-1], pi)
    assert alone > 0.35
    verify("T10", "TV to pi_T at N = 64, sampled", sampled, 0.05, "sampled")
    z = np.exp(log_z - log_partition(WORLD, WORLD.horizon, WORLD.rewards[-1], BETA))
    errors = abs(z.mean() - 1) / z.std() * runs**0.5
    verify("T10", "mean Z-hat / Z_T - 1 in standard errors, sampled", errors, 5.0, "sampled")


def test_control_without_the_weight_particles_do_not_help():
    """N independent draws of q, never resampled, are draws of q; and the weight upside down leads elsewhere."""
    q = WORLD.paths(tokenwise(WORLD, WORLD.rewards, BETA))[-1]
    assert total_variation(q, target(WORLD, BETA)) > 0.35
    upside_down = q - log_weight(WORLD, WORLD.rewards, BETA)
    assert total_variation(upside_down - np.logaddexp.reduce(upside_down), target(WORLD, BETA)) > 0.4


def test_control_resampling_by_z_alone_is_biased():
    """Z(a) without exp(-beta r(a)): another quantity, and not T2's normaliser."""
    ratio = log_ratio(WORLD, BETA)
    z_alone = [w + BETA * r for w, r in zip(log_increments(WORLD, WORLD.rewards, BETA), WORLD.rewards, strict=False)]
    spread = [np.ptp(WORLD.log_up(i, x) - z) for i, (x, z) in enumerate(zip(ratio, z_alone, strict=True), start=1)]
    assert max(spread) > 0.1
