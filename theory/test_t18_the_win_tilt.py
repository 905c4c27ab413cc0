"""T18. Tilted by an affine function of the win rate, tokens drawn one by one give one RLHF policy exactly.

Here (proof in README.md; over the whole vocabulary; for binary rewards the tilt is known: Q#, Zhou et al. 2025, and
PITA, Bobbili et al. 2025). W of T6 is a martingale under ref, and so is g = 1 + c W for any
c >= 0. So with c = exp(eta) - 1 the tokenwise policy pi(t | a) = ref(t | a) g(at) / g(a), guidance by log g(at) at
beta = 1, telescopes: a response has the probability

    ref(y) (1 + c u(y)) / (1 + c / 2),    u(y) = P(y beats a response of ref),

the RLHF policy of the reward log(1 + c u(y)): no price of tractability (T3). As eta grows it becomes 2 ref(y) u(y), the
law of the winner of a pair, with KL at most log 2. No other continuous positive g telescopes in every world.
Falsified by one response of another probability, or by a KL above log 2.
"""

import numpy as np
from hypothesis import strategies as st

from theory.bradley_terry import partial_reward, win_rate, win_rates
from theory.ledger import verify
from theory.policies import rlhf, tokenwise
from theory.strategies import for_all, labelled_worlds
from theory.world import Levels, World, bradley_terry_labels, kl

etas = st.floats(0.01, 20.0)


def win_tilt(world: World, eta: float) -> Levels:
    """log(1 + (exp(eta) - 1) W(at)) on A_0 .. A_T."""
    return [np.log1p(np.expm1(eta) * win) for win in win_rates(world)]


@for_all(world=labelled_worlds(), eta=etas)
def test_token_by_token_is_the_rlhf_policy_of_the_tilt(world, eta):
    tilt = win_tilt(world, eta)
    q = world.paths(tokenwise(world, tilt, 1.0))[-1]
    closed_form = world.log_ref[-1] + tilt[-1] - np.log1p(np.expm1(eta) / 2)
    verify("T18", "q(y) = ref(y) (1 + c u(y)) / (1 + c / 2)", abs(q - closed_form).max())
    verify("T18", "q = the RLHF policy of log(1 + c u)", abs(q - rlhf(world, world.horizon, tilt[-1], 1.0)).max())


@for_all(world=labelled_worlds(), eta=etas)
def test_it_never_loses_and_spends_at_most_log_2(world, eta):
    q = world.paths(tokenwise(world, win_tilt(world, eta), 1.0))[-1]
    verify("T18", "KL(q || ref) <= log 2", kl(q, world.log_ref[-1]) - np.log(2), kind="bound")
    verify("T18", "win rate >= 1/2", 0.5 - win_rate(world, q, world.log_ref[-1]), kind="bound")


@for_all(world=labelled_worlds())
def test_its_limit_is_the_winner_of_a_pair(world):
    """P(the winner is y) = sum_y' ref(y) ref(y') (p(y > y') + p(y > y')) / ... = 2 ref(y) u(y)."""
    ref = np.exp(world.log_ref[-1])
    winner = ref * (world.labels @ ref) + ref * (ref @ (1 - world.labels))  # first of the pair, second of the pair
    q = np.exp(world.paths(tokenwise(world, win_tilt(world, 40.0), 1.0))[-1])
    verify("T18", "eta -> infinity: the law of the winner of a pair", abs(q - winner).max())


@for_all(world=labelled_worlds())
def test_rounds_of_fresh_pairs_go_on(world):
    """The winner of a pair of winners: each round doubles the density at most."""
    q = world.ref
    for n in range(1, 4):
        win, before = win_rates(world, q), world.paths(q)[-1]
        q = tokenwise(world, [np.log(level) for level in win], 1.0, ref=q)
        law = world.paths(q)[-1]
        verify("T18", "a round from q: the law 2 q(y) u_q(y)", abs(law - np.log(2) - before - np.log(win[-1])).max())
        spent = kl(law, world.log_ref[-1])
        verify("T18", "n rounds: KL(q || ref) <= n log 2", spent - n * np.log(2), kind="bound")


@for_all(world=labelled_worlds(), eta=etas)
def test_w_is_a_martingale_that_begins_at_one_half(world, eta):
    win = win_rates(world)
    steps = [world.up(i, np.exp(world.ref[i]) * win[i]) - win[i - 1] for i in range(1, world.horizon + 1)]
    verify("T18", "sum_t ref(t | a) W(at) = W(a)", max(abs(step).max() for step in steps))
    verify("T18", "W(empty) = 1/2", abs(win[0][0] - 0.5))


def test_control_other_weights_do_not_telescope():
    """Each loses exactness in some world: of two steps, with a first token that wins more often than another."""
    world = World.random(3, vocabulary=3, horizon=2)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    win = win_rates(world)
    for g in (np.square, np.sqrt, np.exp, lambda w: w / (1.01 - w)):
        scores = [np.log(g(level)) for level in win]
        q = world.paths(tokenwise(world, scores, 1.0))[-1]
        assert kl(rlhf(world, world.horizon, scores[-1], 1.0), q) > 1e-5
    s = partial_reward(world)
    assert kl(rlhf(world, world.horizon, s[-1], 1.0), world.paths(tokenwise(world, s, 1.0))[-1]) > 1e-5
