"""T8. Where the guarantee of T7 stops: one explicit world for each way.

Here (found by search, rounded to readable numbers, kept as tests). Every counterexample is a claim "win rate below 1/2"
beside the control that the method T7 speaks of does not lose in the same world.

(a) a full-sequence reward, whose prefix scores are free (T1)      (b) pairs from ref, decoding cut to the top k
(c) more beta is not more wins over a whole response, though at each single step it is
(d) pairs from another policy mu: the guarantee is then for guided mu against mu
(e) other treatments of responses that have ended: one score held at all lengths, comparison up to the shorter response
    only, every pair counting once in place of every prefix
(f) the argmax of log ref + beta s
"""

import numpy as np
import pytest

from theory.bradley_terry import partial_reward, partial_reward_of, win_rate, win_rates
from theory.ledger import verify
from theory.policies import best_token, tokenwise, top_k
from theory.strategies import betas, for_all, labelled_worlds, seeds
from theory.test_t06_what_the_partial_reward_is import sibling_disorder
from theory.world import Levels, World, bradley_terry_labels, noise

END = 2


def tabled(probabilities: dict, rewards: dict, eos: int = END) -> World:
    """Two steps, Bradley-Terry labels."""
    world = World.from_tables(probabilities, rewards, horizon=2, eos=eos)
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def wins(world: World, q: Levels, against: Levels | None = None) -> float:
    """P(Y > Y'), Y from the policy q and Y' from ref (or another policy)."""
    return win_rate(world, world.paths(q)[-1], world.paths(against or world.ref)[-1])


# ---- (a) full-sequence rewards --------------------------------------------------------------------------------------

GOOD_OR_BAD = tabled(
    {(): [0.5, 0.5, 0.0], (0,): [0.0, 0.0, 1.0], (1,): [0.0, 0.0, 1.0]}, {(0, END): 2.0, (1, END): -2.0}
)


def test_a_full_sequence_reward_can_lose():
    scores = [np.zeros(1), np.array([-3.0, 3.0]), GOOD_OR_BAD.rewards[-1]]  # true on whole responses
    won = wins(GOOD_OR_BAD, tokenwise(GOOD_OR_BAD, scores, 1.0))
    verify("T8", "(a) a full-sequence reward, misleading on prefixes: win rate", won, 0.27, "example")
    assert wins(GOOD_OR_BAD, tokenwise(GOOD_OR_BAD, partial_reward(GOOD_OR_BAD), 1.0)) > 0.6


# ---- (b) top-k at decoding only -------------------------------------------------------------------------------------

CUT_AWAY = tabled(
    {(): [0.45, 0.45, 0.1, 0.0], (0,): [0.34, 0.34, 0.32, 0.0], (1,): [1.0, 0.0, 0.0, 0.0], (2,): [1.0, 0.0, 0.0, 0.0]},
    {(0, 0): -0.5, (0, 1): -0.5, (0, 2): 9.0, (1, 0): 0.0, (2, 0): 0.0},
    eos=3,
)


def test_b_top_k_at_decoding_only_can_lose():
    """The first token is good for a continuation that the cut takes away."""
    reference, s = top_k(CUT_AWAY, 2), partial_reward(CUT_AWAY)
    won = wins(CUT_AWAY, tokenwise(CUT_AWAY, s, 16.0, reference), reference)
    verify("T8", "(b) pairs from ref, decoding cut to the top 2: win rate", won, 0.44, "example")
    assert wins(CUT_AWAY, tokenwise(CUT_AWAY, s, 16.0)) > 0.7
    from_cut_pairs = partial_reward(CUT_AWAY, reference)
    assert wins(CUT_AWAY, tokenwise(CUT_AWAY, from_cut_pairs, 16.0, reference), reference) > 0.5


# ---- (c) more beta --------------------------------------------------------------------------------------------------

STAY_OR_GO = tabled(
    {(): [0.5, 0.5, 0.0], (0,): [1.0, 0.0, 0.0], (1,): [0.45, 0.55, 0.0]}, {(0, 0): 0.0, (1, 0): 3.0, (1, 1): -3.0}
)


def test_c_more_beta_can_win_less():
    """Strong guidance stays where it is safe, and forgoes the road that guidance itself would have made good."""
    s = partial_reward(STAY_OR_GO)
    at_one, at_sixteen = (wins(STAY_OR_GO, tokenwise(STAY_OR_GO, s, beta)) for beta in (1.0, 16.0))
    verify("T8", "(c) win rate at beta = 16 less that at beta = 1", at_sixteen - at_one, -0.13, "example")
    assert at_sixteen > 0.5


@for_all(world=labelled_worlds(), beta=betas(), more=betas())
def test_c_yet_every_single_step_wins_more(world, beta, more):
    s, win = partial_reward(world), win_rates(world)
    less_guided, guided = tokenwise(world, s, beta), tokenwise(world, s, beta + more)
    loss = max(
        float(world.up(i, (np.exp(less_guided[i]) - np.exp(guided[i])) * win[i]).max())
        for i in range(1, world.horizon + 1)
    )
    verify("T8", "(c) yet sum_t pi(t | a) W(at) rises with beta, every a", loss, kind="bound")


# ---- (d) pairs from another policy ----------------------------------------------------------------------------------

OTHERWISE = tabled(
    {(): [0.5, 0.5, 0.0], (0,): [0.001, 0.999, 0.0], (1,): [1.0, 0.0, 0.0]}, {(0, 0): 2.0, (0, 1): -2.0, (1, 0): 0.0}
)
MU = World.from_tables(
    {(): [0.5, 0.5, 0.0], (0,): [0.999, 0.001, 0.0], (1,): [1.0, 0.0, 0.0]}, {}, horizon=2, eos=END
).ref


def test_d_pairs_from_another_policy_can_lose():
    """Where mu goes on well, ref goes on badly: the first token is scored for mu's continuations."""
    won = wins(OTHERWISE, tokenwise(OTHERWISE, partial_reward(OTHERWISE, MU), 1.0))
    verify("T8", "(d) pairs from mu, guided ref against ref: win rate", won, 0.39, "example")
    assert wins(OTHERWISE, tokenwise(OTHERWISE, partial_reward(OTHERWISE), 1.0)) > 0.5


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_d_the_guarantee_is_then_for_guided_mu_against_mu(world, beta, seed):
    mu = tokenwise(world, noise(world, seed), 1.0)
    loss = 0.5 - wins(world, tokenwise(world, partial_reward(world, mu), beta, mu), mu)
    verify("T8", "(d) yet guided mu wins against mu >= 1/2", loss, kind="bound")


# ---- (e) other treatments of responses that have ended --------------------------------------------------------------


def four_responses(p_end: float, p_short: float, p_first: float, upper: list[float]) -> World:
    """Responses 0 0 0 0 0 0, 0 0 1 0 0 0, 0 end and end; `upper` is p(row > column), in this order."""
    probabilities = {(): [1 - p_end, 0, p_end], (0,): [1 - p_short, 0, p_short], (0, 0): [p_first, 1 - p_first, 0]}
    for t in (0, 1):
        probabilities |= {(0, 0, t, *([0] * j)): [1, 0, 0] for j in range(3)}
    world = World.from_tables(probabilities, {}, horizon=6, eos=END)
    labels = np.full((4, 4), 0.5)
    labels[np.triu_indices(4, 1)] = upper
    labels.T[np.triu_indices(4, 1)] = 1 - np.array(upper)
    return world.with_labels(labels)


HELD = four_responses(0.75, 0.01, 0.8, [0.99, 0.1, 0.99, 0.01, 0.01, 0.01])
ONCE_A_PAIR = four_responses(0.1, 0.3, 0.5, [0.9, 0.01, 0.99, 0.99, 0.99, 0.01])


@pytest.mark.parametrize(
    ("treatment", "world", "most"), [("hold", HELD, 0.24), ("min", HELD, 0.24), ("pair", ONCE_A_PAIR, 0.36)]
)
def test_e_another_treatment_of_ended_responses_can_lose(treatment, world, most):
    won = wins(world, tokenwise(world, partial_reward_of(world, treatment), 16.0))
    verify("T8", f'(e) "{treatment}": win rate', won, most, "example")
    assert wins(world, tokenwise(world, partial_reward_of(world, "extend"), 16.0)) > 0.5


@pytest.mark.parametrize(("treatment", "at_most"), [("extend", 1.0), ("hold", 0.95), ("min", 0.7), ("pair", 0.9)])
def test_e_how_often_siblings_keep_their_order(treatment, at_most):
    """100 worlds with |V| = 3, T = 4 and Bradley-Terry labels."""

    def in_order(seed: int) -> bool:
        world = World.random(seed, 3, 4, reward_scale=3.0)
        world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
        return sibling_disorder(world, partial_reward_of(world, treatment), win_rates(world)) < 1e-9

    share = np.mean([in_order(seed) for seed in range(100)])
    verify("T8", f'(e) "{treatment}": share of 100 worlds with siblings ordered as W', share, at_most, "example")
    assert share == 1.0 or treatment != "extend"


# ---- (f) the likeliest guided token ---------------------------------------------------------------------------------


def test_f_pargs_greedy_can_lose():
    """T = 1: the argmax of log ref + beta s takes the likeliest token, whatever it is worth."""
    world = World.from_tables({(): [0.4, 0.3, 0.3, 0.0]}, {(0,): -2.0, (1,): 1.0, (2,): 1.0}, horizon=1, eos=3)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    s = partial_reward(world)
    greedy = best_token(world, [r + 0.05 * x for r, x in zip(world.ref, s, strict=True)])
    verify("T8", "(f) argmax of log ref + beta s: win rate", wins(world, greedy), 0.23, "example")
    assert wins(world, best_token(world, s)) > 0.5
    assert wins(world, tokenwise(world, s, 0.05)) > 0.5
