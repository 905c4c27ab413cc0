"""T2. The tokenwise policy is a ratio of two RLHF policies.

Paper (2406.07780), checked for every reward, prefix, length and beta. The tokenwise policy
pi(t | a) = ref(t | a) exp(beta r(at)) / Z(a) is

    pi_i(at) / pi_{i-1}(a), normalised over t,

a ratio of two RLHF policies, over strings of length i and i - 1. The normaliser (the half that T10 needs) is

    sum_t pi_i(at) / pi_{i-1}(a) = Z(a) Z_{i-1} / (Z_i exp(beta r(a))).

Falsified by one prefix of one world where either equation fails.
"""

from fractions import Fraction

from hypothesis import strategies as st

from theory import oracle
from theory.ledger import verify
from theory.policies import log_normalisers, log_partition, rlhf, tokenwise
from theory.strategies import betas, for_all, seeds, worlds
from theory.world import Levels, World, largest_gap


def log_ratio(world: World, beta: float, lag: int = 1) -> Levels:
    """log pi_i(at) - log pi_{i-1}(a) for every at in A_i, i >= 1 (lag = 0 puts the wrong length below)."""
    pi = [rlhf(world, i, r, beta) for i, r in enumerate(world.rewards)]
    return [pi[i] - (world.down(i, pi[i - 1]) if lag else pi[i]) for i in range(1, world.horizon + 1)]


def ratio_gap(world: World, beta: float, lag: int = 1) -> float:
    """Largest |log pi(t | a) - log of the normalised ratio|."""
    ratio = log_ratio(world, beta, lag)
    normalised = [x - world.down(i, world.log_up(i, x)) for i, x in enumerate(ratio, start=1)]
    return largest_gap(tokenwise(world, world.rewards, beta)[1:], normalised)


def normaliser_gap(world: World, beta: float, with_partitions: bool = True) -> float:
    """Largest |log sum_t ratio - log(Z(a) Z_{i-1} / (Z_i exp(beta r(a))))|."""
    log_z = log_normalisers(world, world.rewards, beta)
    log_zi = [log_partition(world, i, r, beta) for i, r in enumerate(world.rewards)]
    claimed = [
        log_z[i - 1] - beta * world.rewards[i - 1] + (log_zi[i - 1] - log_zi[i] if with_partitions else 0.0)
        for i in range(1, world.horizon + 1)
    ]
    return largest_gap([world.log_up(i, x) for i, x in enumerate(log_ratio(world, beta), start=1)], claimed)


@for_all(world=worlds(), beta=betas())
def test_the_tokenwise_policy_is_the_normalised_ratio(world, beta):
    verify("T2", "pi(t | a) = pi_i(at) / pi_{i-1}(a), normalised (logs)", ratio_gap(world, beta))
    verify("T2", "the ratio's normaliser is Z(a) Z_{i-1} / (Z_i e^{beta r(a)})", normaliser_gap(world, beta))


@for_all(seed=seeds, shape=st.sampled_from([(2, 4), (3, 3), (4, 2), (5, 2)]))
def test_the_same_in_rational_arithmetic(seed, shape):
    world = oracle.random_rational_world(seed, *shape)
    gaps, normaliser_gaps = [], []
    for i in range(1, world.horizon + 1):
        shorter, longer = oracle.rlhf(world, i - 1), oracle.rlhf(world, i)
        z_ratio = Fraction(oracle.partition(world, i - 1), oracle.partition(world, i))
        for a in shorter:
            ratio = {t: longer[*a, t] / shorter[a] for t in oracle.next_tokens(world, a)}
            total = sum(ratio.values())
            policy = oracle.tokenwise(world, a)
            gaps += [abs(policy[t] - ratio[t] / total) for t in ratio]
            normaliser_gaps.append(abs(total - oracle.normaliser(world, a) * z_ratio / oracle.weight(world, a)))
    verify("T2", "the ratio, rational", max(gaps), 0, "exact")
    verify("T2", "its normaliser, rational", max(normaliser_gaps), 0, "exact")


def test_control_length_i_below_the_bar_fails():
    assert ratio_gap(World.random(0), beta=1.0, lag=0) > 0.1


def test_control_the_normaliser_without_the_partitions_fails():
    assert normaliser_gap(World.random(0), beta=1.0, with_partitions=False) > 0.01
