"""T17. Guidance that leaves the rest alone keeps its guarantee.

Here (proof in README.md). Let C(a) be any set of candidates that depends on the prefix alone: the top k, a floor on
ref(t | a), all, none. The candidates share the mass that the reference gives them, and every other token keeps its own:

    pi(t | a) = ref(t | a) exp(beta s(at)) ref(C | a) / sum_{c in C} ref(c | a) exp(beta s(ac))   on C,   ref elsewhere.

Then T7 holds for every C and beta, with the terms ref(C | a) Cov_{t ~ ref(. | a, C)}(W(at), exp(beta s(at)) / Z_C(a)).
It repairs T8(b), where decoding is cut to C. beta may depend on the prefix, too: steps may be left unguided. And it is
the tokenwise policy of the whole vocabulary for other scores: s on C, and elsewhere the candidates' certainty
equivalent log E_{t ~ ref(. | a, C)}[exp(beta s(at))] / beta; T3 and T10 hold with these.
Falsified by one win rate below 1/2.
"""

import numpy as np
from hypothesis import strategies as st

from theory.bradley_terry import partial_reward, win_rates
from theory.ledger import verify
from theory.policies import kept, likeliest, log_partition, log_weight, rlhf, tokenwise, top_k
from theory.strategies import SHAPES, betas, for_all, labelled_worlds, seeds
from theory.test_t07_guidance_never_loses import gain
from theory.test_t08_where_the_guarantee_stops import CUT_AWAY
from theory.world import Levels, World, largest_gap, noise

KS = (1, 2, 3, 5, 10)


def anywhere(world: World, seed: int) -> Levels:
    """Some candidates after each prefix: all, none, or any others."""
    rng = np.random.default_rng(seed)
    return [rng.random(len(level)) < rng.choice([0.0, 0.5, 1.0]) for level in world.ref]


def expected_covariance(world: World, s: Levels, beta: float, candidates: Levels, along: Levels) -> float:
    """sum over steps of E_{a ~ along}[ref(C | a) Cov_{t ~ ref(. | a, C)}(W(at), exp(beta s(at)) / Z_C(a))]."""
    win, paths, total = win_rates(world), world.paths(along), 0.0
    for i in range(1, world.horizon + 1):
        inside = np.where(candidates[i], np.exp(world.ref[i]), 0.0)
        mass = world.up(i, inside)
        share = inside / np.where(world.down(i, mass) > 0, world.down(i, mass), 1.0)  # ref(. | a, C)
        tilt = np.exp(beta * (s[i] - world.down(i, world.max_up(i, s[i]))))
        mean = world.up(i, share * tilt)
        tilt = tilt / np.where(world.down(i, mean) > 0, world.down(i, mean), 1.0)
        cov = world.up(i, share * win[i] * tilt) - world.up(i, share * win[i]) * world.up(i, share * tilt)
        verify("T17", "each Cov >= 0", -cov.min(), kind="bound")
        total += np.exp(paths[i - 1]) @ (mass * cov)
    return float(total)


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_the_win_rate_is_a_sum_of_covariances_among_candidates(world, beta, seed):
    s, candidates = partial_reward(world), anywhere(world, seed)
    q = kept(world, s, beta, candidates)
    found = expected_covariance(world, s, beta, candidates, along=q)
    verify("T17", "win rate - 1/2 = sum E_q[ref(C) Cov_C], any candidates", abs(gain(world, q) - found))
    verify("T17", "win rate >= 1/2, any candidates", -gain(world, q), kind="bound")


@for_all(world=labelled_worlds(shapes=[*SHAPES, (12, 2)]), beta=betas())
def test_it_holds_for_the_top_k_of_any_k(world, beta):
    s = partial_reward(world)
    for k in (*KS, world.vocabulary):
        q = kept(world, s, beta, likeliest(world, k))
        verify("T17", "win rate >= 1/2, top k = 1, 2, 3, 5, 10, all", -gain(world, q), kind="bound")


@for_all(world=labelled_worlds(), seed=seeds)
def test_the_strength_may_depend_on_the_prefix(world, seed):
    rng, s = np.random.default_rng(seed), partial_reward(world)
    strengths = [rng.choice([0.0, 1.0, 5.0], len(level)) for level in world.ref]
    scores = [np.zeros(1)] + [world.down(i, strengths[i - 1]) * s[i] for i in range(1, world.horizon + 1)]
    q = kept(world, scores, 1.0, anywhere(world, seed))
    verify("T17", "win rate >= 1/2, beta(a) >= 0 after each prefix", -gain(world, q), kind="bound")


def undecided(world: World, below: float) -> Levels:
    """Whether the likeliest token after a, the parent of at, is less likely than `below`."""
    tops = (world.down(i, world.max_up(i, level)) for i, level in enumerate(world.ref) if i)
    return [np.ones(1, bool), *(np.exp(top) < below for top in tops)]


@for_all(world=labelled_worlds(), beta=betas(), k=st.integers(1, 3), below=st.floats(0.3, 1.0))
def test_steps_that_are_nearly_decided_may_go_unguided(world, beta, k, below):
    """beta where the likeliest token has less than `below`, else 0; and a single candidate is as good as none."""
    s, inside, open_ = partial_reward(world), likeliest(world, k), undecided(world, below)
    strengths = [np.where(level, beta, 0.0) for level in open_]
    q = kept(world, [b * level for b, level in zip(strengths, s, strict=True)], 1.0, inside)
    verify("T17", "win rate >= 1/2, beta or 0 by the likeliest token", -gain(world, q), kind="bound")
    candidates = [a & b for a, b in zip(inside, open_, strict=True)]
    found = expected_covariance(world, s, beta, candidates, along=q)
    verify("T17", "win rate - 1/2 = the sum over guided steps alone", abs(gain(world, q) - found))
    if k == 1:
        verify("T17", "a single candidate: the reference", largest_gap(q, world.ref))


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_it_is_a_policy_between_the_reference_and_the_whole_tilt(world, beta, seed):
    s = partial_reward(world)
    q = kept(world, s, beta, anywhere(world, seed))
    sums = max(abs(world.log_up(i, q[i])).max() for i in range(1, world.horizon + 1))
    verify("T17", "sum_t pi(t | a) = 1", sums)
    everything = [np.ones(len(level), bool) for level in world.ref]
    nothing = [~level for level in everything]
    whole, none = kept(world, s, beta, everything), kept(world, s, beta, nothing)
    for i in range(1, world.horizon + 1):
        verify("T17", "all candidates: the paper's policy", abs(whole[i] - tokenwise(world, s, beta)[i]).max(), 1e-11)
        verify("T17", "no candidates: the reference", abs(none[i] - world.ref[i]).max())


def with_equivalents(world: World, s: Levels, beta: float, candidates: Levels) -> Levels:
    """s on C, log E_{ref(. | a, C)}[exp(beta s)] / beta elsewhere (0 where nothing is a candidate)."""
    scores = [np.zeros(1)]
    for i in range(1, world.horizon + 1):
        inside = np.where(candidates[i], np.exp(world.ref[i]), 0.0)
        z, mass = world.up(i, inside * np.exp(beta * s[i])), world.up(i, inside)
        empty = mass == 0
        equivalent = (np.log(z + empty) - np.log(mass + empty)) / beta
        scores.append(np.where(candidates[i], s[i], world.down(i, equivalent)))
    return scores


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_it_is_the_tokenwise_policy_of_other_scores(world, beta, seed):
    s, candidates = partial_reward(world), anywhere(world, seed)
    q, scores = kept(world, s, beta, candidates), with_equivalents(world, s, beta, candidates)
    verify("T17", "pi = ref exp(beta s~) / Z~ over all tokens (logs)", largest_gap(q, tokenwise(world, scores, beta)))
    r = noise(world, seed)[-1]
    log_w = log_weight(world, scores, beta) + beta * (r - scores[-1])
    found = world.paths(q)[-1] + log_w - log_partition(world, world.horizon, r, beta)
    verify(
        "T17",
        "T10's weights of s~, and R - s~ at the end: pi_T of R",
        abs(found - rlhf(world, world.horizon, r, beta)).max(),
    )


def test_it_repairs_the_cut_of_t8():
    """Pairs from ref, guided at its two likeliest tokens; cut to them, the same scores lose to the cut reference."""
    s = partial_reward(CUT_AWAY)
    won = 0.5 + gain(CUT_AWAY, kept(CUT_AWAY, s, 16.0, likeliest(CUT_AWAY, 2)))
    verify("T17", "T8(b) with the rest kept: 1/2 - win rate", 0.5 - won, 0.0, "example")
    assert won > 0.52
    assert gain(CUT_AWAY, tokenwise(CUT_AWAY, s, 16.0, top_k(CUT_AWAY, 2))) < 0


def test_control_the_cut_is_another_policy():
    """Candidates that took all the mass, not their own, would be the cut."""
    s = partial_reward(CUT_AWAY)
    cut, rest = tokenwise(CUT_AWAY, s, 16.0, top_k(CUT_AWAY, 2)), kept(CUT_AWAY, s, 16.0, likeliest(CUT_AWAY, 2))
    assert max(abs(np.exp(a) - np.exp(b)).max() for a, b in zip(cut[1:], rest[1:], strict=True)) > 0.1
