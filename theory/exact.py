"""Exact policies and values on an automaton, by recursion over (time, state): what `world/automaton.py` leaves out.

The recursion of a finite automaton reaches real lengths, where strings are too many to enumerate: see the shapes there
and the tests of both in `tests/world/test_automaton.py` and `test_length_recursion.py`. T0, T4, T5, T6 and T7 are the
statements of that name in this folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pargs_min.world.automaton import Array, Automaton, expected, occupancy, win_rates
from theory.bradley_terry import fit_bradley_terry


def normalise(world: Automaton, log_weights: Array) -> Array:
    """Log-probabilities from unnormalised log-weights of the edges: w(e) - log sum_{e' at the same state} exp w(e').

    log_weights and result (T, E).
    """
    return log_weights - np.logaddexp.reduceat(log_weights, world.first_edges, axis=-1)[:, world.sources]


def guided(world: Automaton, scores: Array, beta: float) -> Array:
    """The tokenwise policy pi(t | a) = ref(t | a) exp(beta score(at)) / Z(a), for scores (T + 1, S) of prefixes.

    PARGS for `partial_rewards`, controlled decoding for `expected(world, world.rewards)`, the RLHF policy itself for
    `soft_values`. A tilt that is no function of the state reached goes through `normalise`. Result (T, E).
    """
    return normalise(world, world.log_probs + beta * scores[1:, world.targets])


def greedy(world: Automaton, scores: Array, beta: float) -> Array:
    """The policy that takes argmax_t log ref(t | a) + beta score(at), ties shared evenly. Result (T, E)."""
    log_weights = world.log_probs + beta * scores[1:, world.targets]
    best = np.maximum.reduceat(log_weights, world.first_edges, axis=-1)[:, world.sources]
    with np.errstate(divide="ignore"):
        return normalise(world, np.log(log_weights == best))


def likeliest(world: Automaton, k: int) -> NDArray[np.bool_]:
    """Whether an edge is among the k likeliest of its state, (E,); ties go to the first."""
    order = np.lexsort((-world.log_probs, world.sources))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - world.first_edges[world.sources[order]]
    return rank < k


def truncated(world: Automaton, scores: Array, beta: float, candidates: NDArray[np.bool_]) -> Array:
    """`guided` among the candidates (E,) alone, as the paper draws. Result (T, E)."""
    return normalise(world, np.where(candidates, world.log_probs + beta * scores[1:, world.targets], -np.inf))


def kept(world: Automaton, scores: Array, beta: float, candidates: NDArray[np.bool_]) -> Array:
    """`truncated` times ref(C | a) on the candidates, the reference elsewhere (T17). Result (T, E)."""
    mass = np.add.reduceat(np.exp(world.log_probs) * candidates, world.first_edges)[world.sources]
    return np.where(candidates, truncated(world, scores, beta, candidates) + np.log(mass), world.log_probs)


def reweighted(world: Automaton, weights: ArrayLike, policy: Array | None = None) -> Array:
    """The policy of the texts q(y) = policy(y) w(y) / E_policy[w]: q(t | a) = policy(t | a) E[w | at] / E[w | a].

    weights (S,) of finished responses, positive where any end; policy (T, E), by default the reference. The RLHF policy
    for exp(beta r), best-of-n for P(r is the best of n) / P(r). Result (T, E).
    """
    policy = world.reference if policy is None else policy
    ahead = expected(world, np.asarray(weights, dtype=np.float64), policy)
    return normalise(world, policy + np.log(ahead)[1:, world.targets])


class Split(NamedTuple):
    """A reference whose states know what was written: `totals` (S, A) of the weights so far, `origins` (S,) of old."""

    world: Automaton
    totals: Array
    origins: NDArray[np.int64]


def split(world: Automaton, weights: ArrayLike) -> Split:
    """The same reference, a state for every (state, sum of weights(token) over what was written) that can be reached.

    So a sum over tokens, a count of words for example, is a function of the state, and can be a reward. The rewards are
    the old ones; tables of the old states are read through `origins`: values[:, origins]. weights (V, A).
    """
    weights = np.asarray(weights, dtype=np.float64)
    ends = np.append(world.first_edges[1:], len(world.sources))
    states, edges = [(world.start, (0.0,) * weights.shape[1])], []
    number, tokens_before = {states[0]: 0}, [0]
    for n, (state, totals) in enumerate(states):  # grows as it is read
        for edge in range(world.first_edges[state], ends[state]):
            then = int(world.targets[edge]), tuple((weights[world.tokens[edge]] + totals).tolist())
            if tokens_before[n] == world.horizon:  # nothing follows, but every state needs an edge
                then = state, totals
            if then not in number:
                number[then] = len(states)
                states.append(then)
                tokens_before.append(tokens_before[n] + 1)
            edges.append((n, edge, number[then]))
    sources, old, targets = map(np.array, zip(*edges, strict=True))
    origins, sums = map(np.array, zip(*states, strict=True))
    changed = dict(sources=sources, tokens=world.tokens[old], targets=targets, log_probs=world.log_probs[old])
    return Split(replace(world, rewards=world.rewards[origins], start=0, **changed), sums, origins)


# Values --------------------------------------------------------------------------------------------------------------


def soft_values(world: Automaton, beta: float) -> Array:
    """V*(prefix) = log E_ref[exp(beta r(Y)) | prefix] / beta, whose tilt is the RLHF policy exactly (T4).

    At the empty prefix it is log Z / beta, the best J of T0. Result (T + 1, S). Raises ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: at 0 the soft value is expected(world, world.rewards)")
    values = [beta * world.rewards]
    for log_probs in reversed(world.reference):
        values.append(np.logaddexp.reduceat(log_probs + values[-1][world.targets], world.first_edges))
    return np.stack(values[::-1]) / beta


def reward_distribution(world: Automaton) -> tuple[Array, Array]:
    """The distribution of the final reward after each prefix: levels (L,) and probabilities (T + 1, S, L)."""
    levels, level = np.unique(world.rewards, return_inverse=True)
    return levels, expected(world, np.eye(len(levels))[level])


def bradley_terry_scores(mass: ArrayLike, wins: ArrayLike) -> Array:
    """The scores that win as often as asked: sum_b mass(b) sigmoid(s(a) - s(b)) = wins(a), with sum_b mass(b) s(b) = 0.

    The stationarity of the population Bradley-Terry loss (T6). mass, wins and result (N,). Raises ValueError unless
    mass is positive and sums to one, wins is in (0, 1) and its mean is 1/2; if no finite scores are found.

    >>> bradley_terry_scores([0.5, 0.5], [0.5 + 0.1, 0.5 - 0.1]).round(6)   # sigmoid(s - s') = .7, half the time
    array([ 0.423649, -0.423649])
    """
    mass, wins = np.asarray(mass, dtype=np.float64), np.asarray(wins, dtype=np.float64)
    if np.any(mass <= 0) or abs(mass.sum() - 1) > 1e-9:
        raise ValueError(
            f"mass must be positive and sum to one, got a minimum of {mass.min()} and a sum of {mass.sum()}"
        )
    if np.any(wins <= 0) or np.any(wins >= 1) or abs(mass @ wins - 0.5) > 1e-9:
        raise ValueError(f"wins must lie in (0, 1) with mean 1/2, got {wins.min()} to {wins.max()}, mean {mass @ wins}")
    return fit_bradley_terry(np.outer(mass, mass), mass * wins)


def partial_rewards(world: Automaton, labeler: Array | None = None, policy: Array | None = None) -> Array:
    """The partial reward that Bradley-Terry training on every prefix converges to (T5, T6), (T + 1, S).

    At each length, the solution of sum_b m(b) sigmoid(s(a) - s(b)) = W(a) over the prefixes that pairs from `policy`
    (T, E; by default the reference) reach, mean zero; finished responses continue with end tokens. Zero elsewhere.
    """
    scores = np.zeros((world.horizon + 1, len(world.rewards)))
    for row, mass, wins in zip(scores, occupancy(world, policy), win_rates(world, labeler, policy), strict=True):
        row[mass > 0] = bradley_terry_scores(mass[mass > 0], wins[mass > 0])
    return scores


# Judging a policy ----------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """What a policy earns and how far it went: expected reward, and KL to the reference in nats per response."""

    reward: float
    kl: float


def evaluate(world: Automaton, policy: Array) -> Evaluation:
    """Expected reward of a tokenwise policy (T, E), and its KL to the reference."""
    return Evaluation(float(occupancy(world, policy)[-1] @ world.rewards), kl(world, policy, world.reference))


def kl(world: Automaton, policy: Array, other: Array) -> float:
    """KL(pi || other) = sum_i E_{a ~ pi}[ KL(pi(. | a) || other(. | a)) ] of two policies (T, E), in nats."""
    flow = occupancy(world, policy)[:-1, world.sources] * np.exp(policy)
    ratios = np.subtract(policy, other, where=flow > 0, out=np.zeros_like(flow))
    return float((flow * ratios).sum())


def rlhf_frontier(world: Automaton, betas: Sequence[float]) -> list[Evaluation]:
    """The exact RLHF policies, one per beta: no policy earns more reward at the same KL (T0)."""
    return [evaluate(world, guided(world, soft_values(world, beta), beta)) for beta in betas]


def entropy(world: Automaton, policy: Array | None = None) -> float:
    """Entropy of a response in nats: -sum_i E[log pi(Y_i | Y_1:i-1)], pi (T, E) by default the reference."""
    policy = world.reference if policy is None else policy
    return float(-(occupancy(world, policy)[:-1, world.sources] * np.exp(policy) * policy).sum())


def expected_length(world: Automaton, end: int, policy: Array | None = None) -> float:
    """Expected tokens of a response, the first of its end tokens included: 1 + sum_i P(Y_i is another token)."""
    policy = world.reference if policy is None else policy
    flow = occupancy(world, policy)[:-1, world.sources] * np.exp(policy)
    return 1 + float(flow[:, world.tokens != end].sum())
