"""T4. There is an optimal tokenwise policy, and when the ratio is it.

Known (soft values: Todorov 2006; for language models Korbak et al. 2022, arXiv 2205.11275). With
V*(a) = log E_ref[exp(beta r(Y)) | a] / beta, the policy ref(t | a) exp(beta V*(at)), normalised, is the exact
conditional pi_T(t | a). Hence (beta > 0) the tokenwise policy of a reward r is optimal iff r(at) - V*(at) depends on a
alone, for every a. It answers whether the ratio of T2 is the best tokenwise policy: as a rule it is not.
Falsified by a prefix where the two conditionals differ, or by an r on either side of the "iff" that breaks it.
"""

from theory.ledger import verify
from theory.policies import conditionals, rlhf, soft_value, tokenwise
from theory.strategies import betas, for_all, seeds, worlds
from theory.world import Levels, World, largest_gap, noise


def exact(world: World, beta: float) -> Levels:
    """log pi_T(t | a), by the chain rule from the distribution over whole responses."""
    return conditionals(world, rlhf(world, world.horizon, world.rewards[-1], beta))


@for_all(world=worlds(), beta=betas())
def test_guiding_by_the_soft_value_is_exact(world, beta):
    guided = tokenwise(world, soft_value(world, world.rewards[-1], beta), beta)
    verify("T4", "ref(t|a) e^{beta V*(at)} / Z = pi_T(t | a) (logs)", largest_gap(guided, exact(world, beta)))


@for_all(world=worlds(), beta=betas(), seed=seeds)
def test_optimal_if_the_difference_depends_on_the_parent_alone(world, beta, seed):
    value, anything = soft_value(world, world.rewards[-1], beta), noise(world, seed)
    shifted = [value[0]] + [value[i] + world.down(i, anything[i - 1]) for i in range(1, world.horizon + 1)]
    gap = largest_gap(tokenwise(world, shifted, beta), exact(world, beta))
    verify("T4", "if: r = V* + any function of the parent is optimal (logs)", gap)


@for_all(world=worlds(), beta=betas())
def test_optimal_only_if_it_does(world, beta):
    """beta times the spread of r - V* among siblings is the spread of log pi(t | a) - log pi_T(t | a)."""
    value = soft_value(world, world.rewards[-1], beta)
    guided, optimal = tokenwise(world, world.rewards, beta), exact(world, beta)
    in_scores = sibling_spreads(world, [beta * (r - v) for r, v in zip(world.rewards, value, strict=True)])
    in_policy = sibling_spreads(world, [g - o for g, o in zip(guided, optimal, strict=True)])
    verify("T4", "only if: spread of beta (r - V*) = spread of log pi / pi_T", largest_gap(in_scores, in_policy))


def sibling_spreads(world: World, x: Levels) -> Levels:
    """max_t x(at) - min_t x(at) for every prefix a."""
    return [world.max_up(i, x[i]) + world.max_up(i, -x[i]) for i in range(1, world.horizon + 1)]


def test_control_the_soft_value_of_another_beta_fails():
    world = World.random(0)
    guided = tokenwise(world, soft_value(world, world.rewards[-1], 0.5), 2.0)
    assert largest_gap(guided, exact(world, 2.0)) > 0.1


def test_control_the_reward_itself_is_not_optimal():
    world = World.random(0)
    assert largest_gap(tokenwise(world, world.rewards, 2.0), exact(world, 2.0)) > 0.1
