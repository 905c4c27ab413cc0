"""T9. For small rewards the partial reward is controlled decoding's value function.

Here (proof in README.md). Bradley-Terry labels with r* = eps r0 and pairs from ref. With m(a) = E_ref[r* | a],
v(a) and k(a) its conditional variance and third central moment, m_ and v_ the means of m and v over A_i,

    s(a) = m(a) - [ k(a) + 3 (m(a) - m_) (v(a) + v_) ] / 12 + constant + O(eps^5).

So s = m + constant + O(eps^3): to leading order controlled decoding's value function, less a price on uncertainty
for prefixes that look better than average (and a premium below it). KL(CD || PARGS) falls as eps^6. As the soft value
differs from m at order eps^2, KL(RLHF || PARGS) falls as eps^4 (beta fixed). Falsified by another slope.
"""

import numpy as np

from theory.bradley_terry import partial_reward
from theory.ledger import verify
from theory.policies import rlhf, tokenwise
from theory.strategies import WORLDS
from theory.world import Levels, World, bradley_terry_labels, kl

EPSILONS = 2.0 ** -np.arange(3, 8)


def third_order(world: World, r: np.ndarray) -> Levels:
    """m - [k + 3 (m - m_)(v + v_)] / 12, mean zero on every A_i."""
    levels = []
    means, squares, cubes = world.mean(r), world.mean(r**2), world.mean(r**3)
    for log_ref, m, second, third in zip(world.log_ref, means, squares, cubes, strict=True):
        ref, v, k = np.exp(log_ref), second - m**2, third - 3 * m * second + 2 * m**3
        s = m - (k + 3 * (m - ref @ m) * (v + ref @ v)) / 12
        levels.append(s - ref @ s)
    return levels


def errors(world: World, epsilon: float, beta: float = 1.0) -> dict[str, float]:
    """What is left between the partial reward of eps * r and its approximations."""
    r = epsilon * world.rewards[-1]
    world = world.with_labels(bradley_terry_labels(r))
    s, m, expansion = partial_reward(world), world.mean(r), third_order(world, r)
    cd, pargs = (world.paths(tokenwise(world, scores, beta))[-1] for scores in (m, s))
    return {
        "|s - m|": max(np.abs(x - (y - m[0])).max() for x, y in zip(s, m, strict=True)),
        "|s - third order|": max(np.abs(x - y).max() for x, y in zip(s, expansion, strict=True)),
        "KL(CD || PARGS)": kl(cd, pargs),
        "KL(RLHF || PARGS)": kl(rlhf(world, world.horizon, r, beta), pargs),
    }


def slopes(world: World, epsilons: np.ndarray = EPSILONS) -> dict[str, float]:
    """Slope of log error against log eps, least squares, over the epsilons."""
    rows = [errors(world, epsilon) for epsilon in epsilons]
    return {name: float(np.polyfit(np.log(epsilons), np.log([row[name] for row in rows]), 1)[0]) for name in rows[0]}


ORDERS = {"|s - m|": 3, "|s - third order|": 5, "KL(CD || PARGS)": 6, "KL(RLHF || PARGS)": 4}


def test_the_orders_of_the_errors():
    for seed in range(WORLDS):
        for name, slope in slopes(World.random(seed, 3, 3)).items():
            verify("T9", f"{name} ~ eps^{ORDERS[name]}: error of the slope", abs(slope - ORDERS[name]), 0.25, "bound")


def test_control_a_wrong_coefficient_leaves_the_third_order():
    world = World.random(0, 3, 3)

    def left(epsilon: float) -> float:
        r = epsilon * world.rewards[-1]
        s = partial_reward(world.with_labels(bradley_terry_labels(r)))
        m = world.mean(r)
        wrong = [2 * x - (y - m[0]) for x, y in zip(third_order(world, r), m, strict=True)]  # twice the correction
        return max(np.abs(x - y).max() for x, y in zip(s, wrong, strict=True))

    assert 2.8 < np.log2(left(2**-5) / left(2**-6)) < 3.2


def test_control_large_rewards_do_not_follow_the_slope():
    assert abs(slopes(World.random(0, 3, 3), np.array([2.0, 4.0, 8.0]))["KL(CD || PARGS)"] - 6) > 1
