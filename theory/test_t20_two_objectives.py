"""T20. Two objectives on samples of the reference whose optimum is the RLHF policy.

Known parts (Poisson deviance as a proper loss; reward-weighted regression, Peters and Schaal 2007), check: here. For a
reward R of whole responses and lambda > 0, Y ~ ref:

(a) E[exp(u(a)) - exp(lambda R(Y)) u(a) | a] is convex in u(a), and least at u(a) = lambda V_lambda(a) of T16; guidance
    by u(at) / lambda at beta = lambda is the RLHF policy (T4).
(b) E[-exp(beta R(Y)) log p(Y)] over policies p is least at p = pi_T, the RLHF policy at beta; then log(p / ref) / beta,
    token by token, is a guide for any other strength: at beta itself it is exact.

Falsified by a slope at these optima, or by a policy other than pi_T.
"""

import numpy as np
from hypothesis import strategies as st

from theory.ledger import verify
from theory.policies import conditionals, rlhf, soft_value, tokenwise
from theory.strategies import betas, for_all, seeds, worlds
from theory.world import Levels, World, kl


def deviance(world: World, u: Levels, lam: float) -> Levels:
    """E[exp(u(a)) - exp(lambda R(Y)) u(a) | a] on A_1 .. A_T, over its scale E[exp(lambda R) | a]."""
    weights = world.backward(lam * world.rewards[-1], lambda i, v: world.log_up(i, world.ref[i] + v))
    return [np.exp(x - w) - x for x, w in zip(u[1:], weights[1:], strict=True)]


@for_all(world=worlds(), lam=betas(), seed=seeds, size=st.floats(-2.0, 2.0))
def test_the_deviance_is_least_at_the_soft_value(world, lam, seed, size):
    u = [lam * level for level in soft_value(world, world.rewards[-1], lam)]
    rng, step = np.random.default_rng(seed), 1e-3
    best = deviance(world, u, lam)
    for sign in (step, -step):
        slopes = [(a - b) / sign for a, b in zip(deviance(world, [x + sign for x in u], lam), best, strict=True)]
        verify("T20", "(a) slope at lambda V_lambda, by steps of 1e-3", max(abs(x).max() for x in slopes), 1e-3, "rate")
    moved = deviance(world, [x + size * rng.standard_normal(len(x)) for x in u], lam)
    worst = max((b - a).max() for a, b in zip(moved, best, strict=True))
    verify("T20", "(a) nowhere less than at lambda V_lambda", worst, 1e-9, "bound")


@for_all(world=worlds(), lam=betas())
def test_its_tilt_is_the_rlhf_policy(world, lam):
    q = world.paths(tokenwise(world, soft_value(world, world.rewards[-1], lam), lam))[-1]
    optimum = rlhf(world, world.horizon, world.rewards[-1], lam)
    verify("T20", "(a) guided by u / lambda at beta = lambda: pi_T", abs(q - optimum).max(), 1e-11)


@for_all(world=worlds(), beta=betas(), seed=seeds)
def test_reweighted_likelihood_is_greatest_at_the_rlhf_policy(world, beta, seed):
    """E_ref[exp(beta R) log p] / Z = E_pi_T[log p] = -H(pi_T) - KL(pi_T || p)."""
    optimum = rlhf(world, world.horizon, world.rewards[-1], beta)
    other = optimum + np.random.default_rng(seed).standard_normal(len(optimum))
    other = other - np.logaddexp.reduce(other)
    weights = np.exp(world.log_ref[-1] + beta * world.rewards[-1])
    likelihoods = [float(weights @ log_p / weights.sum()) for log_p in (optimum, other)]
    found = likelihoods[0] - likelihoods[1] - kl(optimum, other)
    verify("T20", "(b) likelihood lost = KL(pi_T || p)", abs(found), 1e-10)


@for_all(world=worlds(), beta=betas())
def test_its_log_ratio_is_an_exact_guide(world, beta):
    optimum = rlhf(world, world.horizon, world.rewards[-1], beta)
    p = conditionals(world, optimum)
    scores = [(a - b) / beta for a, b in zip(p, world.ref, strict=True)]
    q = world.paths(tokenwise(world, scores, beta))[-1]
    verify("T20", "(b) guided by log(p / ref) / beta at beta: pi_T", abs(q - optimum).max(), 1e-11)


def test_control_the_mean_is_another_optimum():
    """Squared error is least at E[R | a], controlled decoding's value, which is not pi_T's."""
    world = World.random(1)
    mean = world.backward(world.rewards[-1], lambda i, v: world.up(i, np.exp(world.ref[i]) * v))
    q = world.paths(tokenwise(world, mean, 2.0))[-1]
    assert kl(rlhf(world, world.horizon, world.rewards[-1], 2.0), q) > 1e-3
