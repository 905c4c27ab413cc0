"""Recursion over states equals enumeration of strings, on small random automata."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp

from pargs_min.world import automaton
from pargs_min.world.automaton import Automaton
from theory import exact

END = 0
CLOSE = dict(rtol=1e-11, atol=1e-11)
few = settings(max_examples=40, deadline=None)


def random_automaton(seed: int, unfinished: int = 4, finished: int = 3, horizon: int = 4) -> Automaton:
    """Tokens 1 and 2 lead from each unfinished state to any other, the end token (0) to one of the finished ones."""
    rng = np.random.default_rng(seed)
    edges = [(s, t, rng.integers(unfinished)) for s in range(unfinished) for t in (1, 2)]
    edges += [(s, END, unfinished + rng.integers(finished)) for s in range(unfinished)]
    edges += [(s, END, s) for s in range(unfinished, unfinished + finished)]
    sources, tokens, targets = np.array(sorted(edges)).T
    weights = rng.exponential(size=len(edges)) + 0.05
    log_probs = np.log(weights / np.bincount(sources, weights)[sources])
    rewards = rng.normal(scale=2, size=unfinished + finished)
    return Automaton(sources, tokens, targets, log_probs, rewards, start=0, horizon=horizon)


class String(NamedTuple):
    edges: tuple[int, ...]  # the path
    log_prob: float
    state: int


def strings(world: Automaton, policy: np.ndarray | None = None) -> list[list[String]]:
    """Every prefix of every length 0..T with its log-probability, one path at a time: the oracle."""
    levels = [[String((), 0.0, world.start)]]
    for i in range(world.horizon):
        log_probs = world.log_probs if policy is None else policy[i]
        levels.append(
            [
                String((*a.edges, e), a.log_prob + log_probs[e], int(world.targets[e]))
                for a in levels[-1]
                for e in np.flatnonzero(world.sources == a.state)
                if log_probs[e] > -np.inf
            ]
        )
    return levels


def completions(prefix: String, whole: list[String]) -> list[String]:
    return [y for y in whole if y.edges[: len(prefix.edges)] == prefix.edges]


def conditional_mean(prefix: String, whole: list[String], values: np.ndarray) -> float:
    return sum(np.exp(y.log_prob - prefix.log_prob) * values[y.state] for y in completions(prefix, whole))


automata = st.integers(0, 2**31).map(random_automaton)


@few
@given(automata, st.floats(0.1, 4))
def test_values_equal_sums_over_all_completions(world: Automaton, beta: float):
    levels = strings(world)
    mean, soft = exact.expected(world, world.rewards), exact.soft_values(world, beta)
    rewards, distribution = exact.reward_distribution(world)
    for i, level in enumerate(levels):
        for a in level:
            ends = completions(a, levels[-1])
            log_weights = [y.log_prob - a.log_prob + beta * world.rewards[y.state] for y in ends]
            np.testing.assert_allclose(mean[i, a.state], conditional_mean(a, levels[-1], world.rewards), **CLOSE)
            np.testing.assert_allclose(soft[i, a.state], logsumexp(log_weights) / beta, **CLOSE)
            for reward, p in zip(rewards, distribution[i, a.state], strict=True):
                np.testing.assert_allclose(p, conditional_mean(a, levels[-1], world.rewards == reward), **CLOSE)


@few
@given(automata, st.floats(0, 3), st.integers(0, 2**31))
def test_a_guided_policy_is_evaluated_as_the_sum_over_all_strings(world: Automaton, beta: float, seed: int):
    scores = np.random.default_rng(seed).normal(size=(world.horizon + 1, len(world.rewards)))
    policy = exact.guided(world, scores, beta)
    for i in range(world.horizon):
        for s in range(len(world.rewards)):
            edges = np.flatnonzero(world.sources == s)
            logits = world.log_probs[edges] + beta * scores[i + 1, world.targets[edges]]
            np.testing.assert_allclose(policy[i, edges], logits - logsumexp(logits), **CLOSE)
    whole, guided = strings(world)[-1], strings(world, policy)[-1]
    q = np.exp([y.log_prob for y in guided])
    ratios = np.array([y.log_prob - x.log_prob for x, y in zip(whole, guided, strict=True)])
    reward, kl = exact.evaluate(world, policy)
    np.testing.assert_allclose(reward, q @ [world.rewards[y.state] for y in guided], **CLOSE)
    np.testing.assert_allclose(kl, q @ ratios, **CLOSE)


@few
@given(automata)
def test_partial_rewards_win_over_prefixes_as_often_as_their_completions_win(world: Automaton):
    """T6 at every prefix of every length: sum_b ref(b) sigmoid(s(a) - s(b)) = W(a), W summed over pairs of strings."""
    levels, scores = strings(world), exact.partial_rewards(world)
    wins = np.array([sum(np.exp(y.log_prob) * expit(r - world.rewards[y.state]) for y in levels[-1])
                     for r in world.rewards])  # fmt: skip
    for i, level in enumerate(levels):
        ref = np.exp([b.log_prob for b in level])
        s = np.array([scores[i, b.state] for b in level])
        want = [conditional_mean(a, levels[-1], wins) for a in level]
        np.testing.assert_allclose(expit(s[:, None] - s) @ ref, want, **CLOSE)
        np.testing.assert_allclose(ref @ s, 0, atol=1e-11)


@few
@given(automata, st.integers(0, 2**31), st.floats(0.2, 3))
def test_partial_rewards_of_pairs_from_a_policy_and_any_labeler(world: Automaton, seed: int, beta: float):
    """T6 for pairs from a guided policy q and an intransitive labeler: q takes the place of ref."""
    rng, size = np.random.default_rng(seed), len(world.rewards)
    upper = np.triu(rng.uniform(0.05, 0.95, (size, size)), 1)
    labeler = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(size)
    policy = exact.guided(world, rng.normal(size=(world.horizon + 1, size)), beta)
    scores, levels = exact.partial_rewards(world, labeler, policy), strings(world, policy)
    wins = sum(np.exp(y.log_prob) * labeler[:, y.state] for y in levels[-1])
    for i, level in enumerate(levels):
        s, q = np.array([scores[i, b.state] for b in level]), np.exp([b.log_prob for b in level])
        want = [conditional_mean(a, levels[-1], wins) for a in level]
        np.testing.assert_allclose(expit(s[:, None] - s) @ q, want, **CLOSE)


@few
@given(automata, st.floats(0.1, 4), st.integers(0, 2**31))
def test_the_rlhf_policy_is_the_frontier(world: Automaton, beta: float, seed: int):
    """T0: J(pi) = log Z / beta - KL(pi || pi*) / beta for every pi, and so log Z / beta at pi* itself."""
    best = exact.guided(world, exact.soft_values(world, beta), beta)
    [(reward, kl)] = exact.rlhf_frontier(world, [beta])
    log_z = beta * exact.soft_values(world, beta)[0, world.start]
    np.testing.assert_allclose(reward - kl / beta, log_z / beta, **CLOSE)
    scores = np.random.default_rng(seed).normal(size=(world.horizon + 1, len(world.rewards)))
    policy = exact.guided(world, scores, beta)
    other = exact.evaluate(world, policy)
    mine, optimal = strings(world, policy)[-1], strings(world, best)[-1]
    distance = sum(np.exp(y.log_prob) * (y.log_prob - x.log_prob) for x, y in zip(optimal, mine, strict=True))
    np.testing.assert_allclose(other.reward - other.kl / beta, (log_z - distance) / beta, **CLOSE)


@few
@given(automata)
def test_entropy_length_and_occupancy_equal_sums_over_all_strings(world: Automaton):
    levels = strings(world)
    p = np.exp([y.log_prob for y in levels[-1]])
    np.testing.assert_allclose(exact.entropy(world), -(p @ np.log(p)), **CLOSE)
    tokens = [world.tokens[list(y.edges)].tolist() for y in levels[-1]]
    lengths = [row.index(END) + 1 if END in row else len(row) + 1 for row in tokens]
    np.testing.assert_allclose(exact.expected_length(world, END), p @ lengths, **CLOSE)
    for mass, level in zip(exact.occupancy(world), levels, strict=True):
        np.testing.assert_allclose(
            mass, np.bincount([a.state for a in level], np.exp([a.log_prob for a in level]), len(mass)), **CLOSE
        )


@few
@given(automata, st.floats(0, 3))
def test_greedy_follows_the_best_edge(world: Automaton, beta: float):
    policy = exact.greedy(world, exact.expected(world, world.rewards), beta)
    [only] = strings(world, policy)[-1]
    assert only.log_prob == 0
    reward, kl = exact.evaluate(world, policy)
    assert reward == world.rewards[only.state]
    np.testing.assert_allclose(kl, -world.log_probs[list(only.edges)].sum(), **CLOSE)


def test_samples_have_the_probabilities_of_the_automaton():
    """Exact, by stratified uniforms: n of them count every first token to within 1 of n times its probability."""
    world, n = random_automaton(3), 1000
    uniforms = np.random.default_rng(0).random((n, world.horizon))
    uniforms[:, 0] = (np.arange(n) + 0.5) / n
    tokens, log_probs = automaton.sample(world, uniforms)
    first = world.sources == world.start
    counts = np.bincount(tokens[:, 0], minlength=3)[world.tokens[first]]
    assert np.abs(counts - n * np.exp(world.log_probs[first])).max() <= 1
    known = {tuple(world.tokens[list(y.edges)]): y.log_prob for y in strings(world)[-1]}
    np.testing.assert_allclose(log_probs.sum(1), [known[tuple(row)] for row in tokens], **CLOSE)


def test_a_normalised_edge_tilt_need_not_be_a_function_of_the_state():
    world = random_automaton(5)
    tilt = np.random.default_rng(0).normal(size=(world.horizon, len(world.tokens)))
    policy = exact.normalise(world, world.log_probs + tilt)
    np.testing.assert_allclose(np.add.reduceat(np.exp(policy), world.first_edges, axis=1), 1, **CLOSE)
    assert exact.evaluate(world, policy).kl > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(log_probs=np.log([0.5, 0.6, 1.0])), "state 0 sums to"),
        (dict(sources=np.array([1, 0, 0])), "sorted"),
        (dict(sources=np.array([0, 0, 0])), "each of the 2 states"),
    ],
)
def test_a_broken_automaton_is_refused(change: dict, message: str):
    parts = dict(
        sources=np.array([0, 0, 1]), tokens=np.array([0, 1, 0]), targets=np.array([1, 0, 1]),
        log_probs=np.log([0.5, 0.5, 1.0]), rewards=np.zeros(2), start=0, horizon=2,
    )  # fmt: skip
    Automaton(**parts)
    with pytest.raises(ValueError, match=message):
        Automaton(**(parts | change))


def test_impossible_win_rates_and_betas_are_refused():
    with pytest.raises(ValueError, match="beta must be positive"):
        exact.soft_values(random_automaton(0), 0.0)
    with pytest.raises(ValueError, match="mean 1/2"):
        exact.bradley_terry_scores([0.5, 0.5], [0.6, 0.6])
    with pytest.raises(ValueError, match="mass must be positive"):
        exact.bradley_terry_scores([1.0, 0.0], [0.5, 0.5])


def test_scores_are_found_however_lopsided_the_wins():
    """A prefix of mass 1e-9 that nearly always wins beside one that nearly always loses."""
    truth, mass = np.array([25.0, -25.0, 0.0, 3.0]), np.array([1e-9, 1e-6, 0.5, 0.5 - 1e-9 - 1e-6])
    wins = expit(truth[:, None] - truth) @ mass
    found = exact.bradley_terry_scores(mass, wins)
    np.testing.assert_allclose(expit(found[:, None] - found) @ mass, wins, atol=1e-12)
