"""T12. The population DPO loss is minimised by the RLHF policy.

Known (Rafailov et al. 2023, arXiv 2305.18290). With the implicit reward h = log(pi / ref) / beta, Bradley-Terry labels
and pairs from any mu of full support,

    L(pi) - L(pi_T) = E_{Y, Y' ~ mu}[ KL( p(Y > Y') || sigmoid(h(Y) - h(Y')) ) ] >= 0   (KL between two coins),

zero only if h = r + constant, that is pi = pi_T. Falsified by a policy with a lower loss. (With a labeler that is not
Bradley-Terry the minimiser is the tilt of a T6 reward, not of any true one.)
"""

import numpy as np
from scipy.special import xlogy

from theory.bradley_terry import bt_loss, fit_bradley_terry, level_fit, win_rates
from theory.ledger import verify
from theory.policies import rlhf, tokenwise
from theory.strategies import betas, for_all, labelled_worlds, seeds
from theory.world import World, bradley_terry_labels, noise


def dpo_loss(world: World, log_pi: np.ndarray, beta: float, mu: list) -> float:
    """E[-log sigmoid(h(winner) - h(loser))], pairs from mu x mu."""
    implicit = (log_pi - world.log_ref[-1]) / beta
    return bt_loss(*level_fit(world.paths(mu)[-1], win_rates(world, mu)[-1]), implicit)


def coin_kl(p: np.ndarray, logit: np.ndarray) -> np.ndarray:
    """KL(p || sigmoid(logit)) between two coins."""
    return xlogy(p, p) + xlogy(1 - p, 1 - p) + p * np.logaddexp(0, -logit) + (1 - p) * np.logaddexp(0, logit)


@for_all(world=labelled_worlds(any_labeler=False), beta=betas(), seed=seeds)
def test_the_loss_exceeds_its_least_value_by_a_divergence(world, beta, seed):
    mu, pi = (tokenwise(world, noise(world, seed + k), 1.0) for k in (0, 1))
    log_pi, mass = world.paths(pi)[-1], np.exp(world.paths(mu)[-1])
    best = rlhf(world, world.horizon, world.rewards[-1], beta)
    excess = dpo_loss(world, log_pi, beta, mu) - dpo_loss(world, best, beta, mu)
    implicit = (log_pi - world.log_ref[-1]) / beta
    divergence = float(mass @ coin_kl(world.labels, np.subtract.outer(implicit, implicit)) @ mass)
    gap = abs(excess - divergence) / max(1.0, divergence)
    verify("T12", "L(pi) - L(pi_T) = E KL(p || sigmoid(h - h')) (relative)", gap)
    verify("T12", "L(pi_T) <= L(pi), any mu", -excess, kind="bound")


@for_all(world=labelled_worlds(any_labeler=False), beta=betas(), seed=seeds)
def test_the_fitted_implicit_reward_gives_the_rlhf_policy(world, beta, seed):
    mu = tokenwise(world, noise(world, seed), 1.0)
    h = fit_bradley_terry(*level_fit(world.paths(mu)[-1], win_rates(world, mu)[-1]))
    gap = np.abs(rlhf(world, world.horizon, h, beta) - rlhf(world, world.horizon, world.rewards[-1], beta)).max()
    verify("T12", "argmin of the DPO loss = pi_T (logs)", gap, 1e-9, "fit")


def test_control_the_optimum_of_another_beta_has_a_higher_loss():
    world = World.random(0)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    r = world.rewards[-1]
    wrong, right = (dpo_loss(world, rlhf(world, 3, r, b), 1.0, world.ref) for b in (2.0, 1.0))
    assert wrong > right + 0.01


def test_control_swapped_chosen_and_rejected_is_not_minimised_there():
    world = World.random(0)
    world = world.with_labels(bradley_terry_labels(-world.rewards[-1]))
    best, other = (dpo_loss(world, rlhf(world, 3, s * world.rewards[-1], 1.0), 1.0, world.ref) for s in (1, -1))
    assert best > other + 0.01
