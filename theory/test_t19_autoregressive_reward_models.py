"""T19. What an autoregressive reward model does (GenARM, Xu et al. 2024), and DPO's implicit reward as a guide.

Reading: here (proofs in README.md). GenARM trains r(y) = log p(y), p a language model, by Bradley-Terry; with labels
of a reward r* its population optimum is p(y) = exp(r*(y)) / sum_y' exp(r*(y')) on the support of ref: a tilt of
*counting* measure, where the soft value has ref's. Guided by ref(t | a) p(t | a)^beta / Z(a),

    pi_T(y) / q(y) = prod_i Z(y_1:i-1) / Z_T,    pi_T the RLHF policy of r*,

T3's price without its factors exp(-beta r(a)). Where ref lacks support the pair loss knows ratios among supported
responses alone: p may put any mass on others, which changes p(t | a), and so the policy, at no loss. The same holds for
log(pi / ref) of DPO: exact where it was trained (T12), free elsewhere.
"""

import numpy as np

from theory.ledger import verify
from theory.policies import conditionals, log_normalisers, path_sum, rlhf, tokenwise
from theory.strategies import WORLDS, betas, for_all, worlds
from theory.world import World, kl


def autoregressive(world: World) -> list[np.ndarray]:
    """log p(t | a) of the population optimum: p(y) proportional to exp(r*(y)) on the support of ref."""
    last = world.rewards[-1]
    return conditionals(world, last - np.logaddexp.reduce(last))


def world_of_sharpness(sharpness: float, seed: int, eos: int, vocabulary: int = 3, horizon: int = 4) -> World:
    """ref = softmax(sharpness * normal), r = normal; texts of one length where no token is the end token."""
    rng = np.random.default_rng(seed)

    def conditionals(prefixes: np.ndarray) -> np.ndarray:
        logits = sharpness * rng.standard_normal((len(prefixes), vocabulary))
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def reward(prefixes: np.ndarray) -> np.ndarray:
        return rng.standard_normal(len(prefixes))

    return World.build(conditionals, reward, vocabulary=vocabulary, horizon=horizon, eos=eos)


@for_all(world=worlds(), beta=betas())
def test_its_price_is_the_product_of_the_dropped_normalisers(world, beta):
    p = autoregressive(world)
    q = world.paths(tokenwise(world, p, beta))[-1]
    log_z = log_normalisers(world, p, beta)
    price = path_sum(world, [world.down(i, level) for i, level in enumerate(log_z, start=1)])
    optimum = rlhf(world, world.horizon, world.rewards[-1], beta)
    gap = optimum - q - price
    verify("T19", "log pi_T - log q = sum_i log Z(y_1:i-1) - log Z_T", np.ptp(gap), 1e-11)


@for_all(world=worlds(), beta=betas())
def test_it_is_the_bradley_terry_optimum(world, beta):
    """Differences of log p are those of r*: what the pair loss asks for, and all that it asks for."""
    log_p = world.paths(autoregressive(world))[-1]
    verify("T19", "log p(y) - log p(y') = r*(y) - r*(y')", np.ptp(log_p - world.rewards[-1]), 1e-11)


def test_counting_measure_is_the_references_where_that_is_uniform():
    """Texts of one length, all alike to the reference, at beta = 1; ends break it."""
    apart, ends_at_once = [], []
    for seed in range(WORLDS):
        for eos in (-1, 2):
            world = world_of_sharpness(0.0, seed, eos)
            policy = tokenwise(world, autoregressive(world), 1.0)
            q, optimum = world.paths(policy)[-1], rlhf(world, world.horizon, world.rewards[-1], 1.0)
            if eos == -1:
                verify("T19", "ref uniform, one length, beta = 1: q = pi_T", abs(q - optimum).max())
            else:
                apart.append(kl(optimum, q))
                ends_at_once.append(np.exp(policy[1][eos]))
    assert min(apart) > 0.1
    assert np.mean(ends_at_once) < 0.1  # the reference: 1/3


def test_counting_measure_is_not_the_references():
    """Two first tokens, one with a single continuation and one with many, all of the same reward: nothing is to be
    gained, and yet the guide prefers the token with more continuations."""
    tables = {(): [0.5, 0.5, 0.0, 0.0], (0,): [1.0, 0.0, 0.0, 0.0], (1,): [0.4, 0.3, 0.3, 0.0]}
    world = World.from_tables(tables, {(0, 0): 1.0, (1, 0): 1.0, (1, 1): 1.0, (1, 2): 1.0}, horizon=2, eos=3)
    q = tokenwise(world, autoregressive(world), 1.0)
    verify("T19", "equal rewards: q(first of 1, 3 continuations) - 3/4", abs(np.exp(q[1])[1] - 0.75), 1e-12, "example")
    assert kl(world.paths(q)[-1], world.log_ref[-1]) > 0.1


def test_where_nothing_is_compared_the_mass_is_free():
    """p leaks to strings that the reference never writes: the same loss, another policy."""
    tables = {(): [0.5, 0.5, 0.0], (0,): [0.5, 0.5, 0.0], (1,): [1.0, 0.0, 0.0]}
    world = World.from_tables(tables, {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.5}, horizon=2, eos=2)
    tight = autoregressive(world)
    leak = np.where(world.prefixes[2][:, 0] == 0, np.log(0.1), 0.0)  # nine tenths of what follows 0 go elsewhere
    log_p = world.paths(tight)[-1]
    leaking = [tight[0], tight[1] + np.array([np.log(10.0), 0.0]), tight[2] + leak]
    leaking[1] = leaking[1] - np.logaddexp.reduce(leaking[1])
    verify("T19", "leaking: the same differences of log p", np.ptp(world.paths(leaking)[-1] - log_p), kind="example")
    first, other = (np.exp(tokenwise(world, p, 1.0)[1])[0] for p in (tight, leaking))
    assert other - first > 0.2
