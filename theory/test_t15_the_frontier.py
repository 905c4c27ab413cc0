"""T15. No method is above the RLHF frontier.

Known (it is T0 read as a Lagrangian). Among all distributions p over responses with the same KL(p || ref), the RLHF
policy has the largest expected reward, and what p loses to it is a divergence:

    reward lost(p) = min over beta > 0 of KL(p || pi_beta) / beta >= 0.

Checked for the RLHF policy (0), PARGS, on-policy PARGS, controlled decoding, ARGS and best-of-N. Falsified by one point
above the curve.
"""

import numpy as np

from theory.bradley_terry import partial_reward
from theory.ledger import verify
from theory.policies import best_of_n, log_partition, reward_and_kl, reward_lost, rlhf, tokenwise
from theory.strategies import betas, for_all, labelled_worlds, seeds
from theory.test_t11_on_policy_rounds import pair_rounds
from theory.world import World, bradley_terry_labels, kl


def methods(world: World, beta: float, n: int = 4) -> dict[str, np.ndarray]:
    """log p over A_T of every rival of the RLHF policy."""
    r = world.rewards[-1]
    scored = {"PARGS": partial_reward(world), "CD": world.mean(r), "ARGS": world.rewards}
    guided = {name: tokenwise(world, scores, beta) for name, scores in scored.items()}
    guided["PARGS, on-policy"] = pair_rounds(world, beta, 3)[-1]
    return {name: world.paths(q)[-1] for name, q in guided.items()} | {"best-of-N": best_of_n(world, r, n)}


@for_all(world=labelled_worlds(any_labeler=False), beta=betas(), other=betas(), seed=seeds)
def test_nothing_is_above_the_frontier(world, beta, other, seed):
    r, horizon = world.rewards[-1], world.horizon
    scale = max(1.0, np.abs(r).max())
    on_curve = reward_lost(world, rlhf(world, horizon, r, beta), r)
    verify("T15", "the RLHF policy itself loses nothing (relative)", abs(on_curve) / scale, 1e-9, "bound")
    for name, p in methods(world, beta, n=2 + seed % 15).items():
        lost = reward_lost(world, p, r)
        verify("T15", f"{name}: reward above the frontier (relative)", -lost / scale, 1e-9, "bound")
        above = lost - kl(p, rlhf(world, horizon, r, other)) / other
        verify("T15", "reward lost <= KL(p || pi_b) / b for any b (relative)", above / scale, 1e-9, "bound")


@for_all(world=labelled_worlds(any_labeler=False), beta=betas(), other=betas())
def test_the_loss_is_a_divergence(world, beta, other):
    """(KL(p || ref) + log Z(b)) / b - E_p[r] = KL(p || pi_b) / b, whatever p and b are."""
    r = world.rewards[-1]
    for p in methods(world, beta).values():
        reward, divergence = reward_and_kl(world, p, r)
        dual = (divergence + log_partition(world, world.horizon, r, other)) / other - reward
        gap = abs(other * dual - kl(p, rlhf(world, world.horizon, r, other)))
        verify("T15", "Lagrangian gap = KL(p || pi_b) / b", gap)


def test_control_a_smaller_divergence_than_the_true_one_shows_a_point_above():
    world = World.random(0, 3, 4)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    r = world.rewards[-1]
    reward, divergence = reward_and_kl(world, methods(world, 2.0)["PARGS"], r)
    dual = min((divergence / 2 + log_partition(world, 4, r, b)) / b for b in np.geomspace(0.01, 100, 400))
    assert dual - reward < -0.05
