"""T0. The RLHF objective has one maximiser, in closed form.

Known (Todorov 2006; for language models Korbak et al. 2022, arXiv 2205.11275), and the paper's starting point. For
beta > 0 and every policy pi over strings of length i,

    J(pi) = E_pi[r] - KL(pi || ref) / beta = log Z_i / beta - KL(pi || pi_i) / beta,
    pi_i(a) = ref(a) exp(beta r(a)) / Z_i,

so pi_i is the one maximiser. Falsified by any pi for which the two sides differ, or by one with J(pi) > J(pi_i).
"""

from theory.ledger import verify
from theory.policies import log_partition, objective, rlhf, tokenwise
from theory.strategies import betas, for_all, seeds, worlds
from theory.world import World, kl, noise


def gap(world: World, beta: float, seed: int, optimum_beta: float) -> float:
    """Largest |J(pi) - (log Z_i - KL(pi || pi_i)) / beta| over the lengths i, for a random pi."""
    pi = world.paths(tokenwise(world, noise(world, seed), 1.0))
    gaps = []
    for i, r in enumerate(world.rewards):
        closed_form = log_partition(world, i, r, beta) - kl(pi[i], rlhf(world, i, r, optimum_beta))
        gaps.append(abs(objective(world, i, pi[i], r, beta) - closed_form / beta))
    return max(gaps) * beta  # in nats


@for_all(world=worlds(), beta=betas(), seed=seeds)
def test_objective_is_a_constant_less_the_divergence_from_pi_i(world, beta, seed):
    verify("T0", "J(pi) = (log Z_i - KL(pi || pi_i)) / beta, every i, random pi", gap(world, beta, seed, beta))


@for_all(world=worlds(), beta=betas(), seed=seeds)
def test_no_policy_does_better_than_pi_i(world, beta, seed):
    pi = world.paths(tokenwise(world, noise(world, seed), 1.0))
    excess = max(
        objective(world, i, pi[i], r, beta) - objective(world, i, rlhf(world, i, r, beta), r, beta)
        for i, r in enumerate(world.rewards)
    )
    verify("T0", "J(pi) <= J(pi_i), every i", beta * excess, kind="bound")


def test_control_the_optimum_of_another_beta_fails():
    assert gap(World.random(0), beta=1.0, seed=1, optimum_beta=2.0) > 0.01
