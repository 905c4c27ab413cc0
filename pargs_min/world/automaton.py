"""Exact values of a reference policy with finitely many states, by recursion over (time, state).

A response is a path of exactly `horizon` tokens through an `Automaton`: after the end token only end tokens follow.
Two prefixes of one length that lead to one state have the same futures, hence the same values, so a table over
(time, state) holds what enumeration would need |V|^T rows for. The recursion knows nothing of any world: `journey.py`
builds automata from a grammar, and a tree of all prefixes is an automaton too.

Shapes: S states, E edges, T the horizon. Tables of values are (T + 1, S): row i holds prefixes of length i; entries
that no prefix reaches are never used. A policy is the log-probability of every edge at every step, (T, E), in nats.
Everything is float64. T0, T4, T6 and T7 are the statements of that name in `theory/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Automaton:
    """The reference policy: edge e leads from state sources[e] by tokens[e] to targets[e] with exp(log_probs[e]).

    Edges are sorted by source; every state has at least one (a finished state: the end token, back to itself).
    rewards (S,) is the reward of a response whose path stands in that state after `horizon` tokens.
    Raises ValueError if the edges are unsorted, leave a state without one, or do not sum to one at a state.
    """

    sources: NDArray[np.int64]
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    log_probs: Array
    rewards: Array
    start: int
    horizon: int

    def __post_init__(self) -> None:
        if not np.array_equal(np.unique(self.sources), np.arange(len(self.rewards))):
            raise ValueError(
                f"sources must name each of the {len(self.rewards)} states at least once: give a finished "
                "state the end token, back to itself"
            )
        if np.any(np.diff(self.sources) < 0):
            raise ValueError("sources must be sorted: order the edges by their source")
        totals = np.add.reduceat(np.exp(self.log_probs), self.first_edges)
        worst = int(np.argmax(np.abs(totals - 1)))
        if abs(totals[worst] - 1) > 1e-9:
            raise ValueError(
                f"log_probs must be normalised at each state, but those of state {worst} sum to "
                f"{totals[worst]!r} in probability"
            )

    @cached_property
    def first_edges(self) -> NDArray[np.int64]:
        """Where each state's edges begin, (S,)."""
        return np.searchsorted(self.sources, np.arange(len(self.rewards)))

    @cached_property
    def reference(self) -> Array:
        """The reference as a policy: its edge log-probabilities at every step, (T, E)."""
        return np.broadcast_to(self.log_probs, (self.horizon, len(self.log_probs)))


# Policies ------------------------------------------------------------------------------------------------------------


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


def occupancy(world: Automaton, policy: Array | None = None) -> Array:
    """The probability of standing in each state after i tokens: m_0 = start, m_{i+1} = sum_e m_i(source e) pi_i(e).

    policy (T, E), by default the reference; result (T + 1, S), each row sums to one.
    """
    mass = np.zeros((world.horizon + 1, len(world.rewards)))
    mass[0, world.start] = 1
    for i, log_probs in enumerate(world.reference if policy is None else policy):
        flow = mass[i, world.sources] * np.exp(log_probs)
        mass[i + 1] = np.bincount(world.targets, flow, minlength=len(world.rewards))
    return mass


# Values --------------------------------------------------------------------------------------------------------------


def expected(world: Automaton, final: Array, policy: Array | None = None) -> Array:
    """E[final(Y) | prefix] under a policy: u_T = final, u_i(s) = sum_e pi_i(e | s) u_{i+1}(target e).

    final (S,) or (S, L), a quantity of finished responses; policy (T, E), by default the reference.
    Result (T + 1, S) or (T + 1, S, L).
    """
    values = [np.asarray(final, dtype=np.float64)]
    for log_probs in reversed(world.reference if policy is None else policy):
        flow = (np.exp(log_probs) * values[-1][world.targets].T).T
        values.append(np.add.reduceat(flow, world.first_edges, axis=0))
    return np.stack(values[::-1])


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


def bradley_terry(rewards: Array) -> Array:
    """The Bradley-Terry labeler p(y > y') = sigmoid(r(y) - r(y')), (S, S).

    >>> bradley_terry(np.array([1.0, 1.0]))
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    return expit(rewards[:, None] - rewards[None, :])


def win_rates(world: Automaton, labeler: Array | None = None, policy: Array | None = None) -> Array:
    """W(a) = E[p(Y > Y') | prefix a of Y]: how often completions of a prefix beat whole responses (T6).

    It is the value function of u(y) = E_{Y'} p(y > Y'). labeler (S, S) between final states, by default Bradley-Terry
    on the rewards; Y, Y' from `policy` (T, E), by default the reference. Result (T + 1, S), 1/2 at the empty prefix.
    """
    labeler = bradley_terry(world.rewards) if labeler is None else labeler
    return expected(world, labeler @ occupancy(world, policy)[-1], policy)


def bradley_terry_scores(mass: ArrayLike, wins: ArrayLike, tolerance: float = 1e-13) -> Array:
    """The scores that win as often as asked: sum_b mass(b) sigmoid(s(a) - s(b)) = wins(a), with sum_b mass(b) s(b) = 0.

    The stationarity of the population Bradley-Terry loss (T6), solved by Newton's method, halving steps that do not
    help. mass, wins and result (N,). Raises ValueError unless mass is positive and sums to one, wins is in (0, 1) and
    its mean is 1/2.

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

    def residual(scores: Array) -> tuple[Array, Array]:
        beats = expit(scores[:, None] - scores)
        return beats @ mass - wins, beats * (1 - beats) * mass

    scores = logit(wins)
    error, slopes = residual(scores)
    rate = 1.0
    while np.abs(error).max() > tolerance and rate > 1e-6:  # below that no step helps: rounding has been reached
        jacobian = np.diag(slopes.sum(1)) - slopes + mass  # `+ mass` fixes the constant that the equations leave free
        step, rate = np.linalg.solve(jacobian, error), 1.0
        while np.abs(residual(scores - rate * step)[0]).max() >= np.abs(error).max() and rate > 1e-6:
            rate /= 2
        if rate > 1e-6:
            scores = scores - rate * step
            error, slopes = residual(scores)
    if np.abs(error).max() > 1e-9:
        raise FloatingPointError(f"no scores found for these wins: the best are off by {np.abs(error).max():.1e}")
    return scores - mass @ scores


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
    """What a policy earns and how far it went: expected reward, and KL to the reference in nats a response."""

    reward: float
    kl: float


def evaluate(world: Automaton, policy: Array) -> Evaluation:
    """Expected reward of a tokenwise policy (T, E), and KL = sum_i E_{a ~ pi}[ KL(pi(. | a) || ref(. | a)) ]."""
    mass = occupancy(world, policy)
    flow = mass[:-1, world.sources] * np.exp(policy)
    ratios = np.subtract(policy, world.reference, where=flow > 0, out=np.zeros_like(flow))
    return Evaluation(float(mass[-1] @ world.rewards), float((flow * ratios).sum()))


def rlhf_frontier(world: Automaton, betas: Sequence[float]) -> list[Evaluation]:
    """The exact RLHF policies, one a beta: no policy earns more reward at the same KL (T0)."""
    return [evaluate(world, guided(world, soft_values(world, beta), beta)) for beta in betas]


def entropy(world: Automaton) -> float:
    """Entropy of a response in nats: -sum_i E[log ref(Y_i | Y_1:i-1)]."""
    return float(-(occupancy(world)[:-1, world.sources] * np.exp(world.log_probs) * world.log_probs).sum())


def expected_length(world: Automaton, end: int, policy: Array | None = None) -> float:
    """Expected tokens of a response, the first of its end tokens included: 1 + sum_i P(Y_i is another token)."""
    policy = world.reference if policy is None else policy
    flow = occupancy(world, policy)[:-1, world.sources] * np.exp(policy)
    return 1 + float(flow[:, world.tokens != end].sum())


def sample(world: Automaton, uniforms: Array) -> tuple[NDArray[np.int64], Array]:
    """Draw from the reference, one uniform in [0, 1) a token: uniforms (N, T) -> tokens, log-probabilities (N, T)."""
    cumulative = np.cumsum(np.exp(world.log_probs))
    before = cumulative[world.first_edges] - np.exp(world.log_probs[world.first_edges])
    last_edges = np.append(world.first_edges[1:], len(world.sources)) - 1
    states, edges = np.full(len(uniforms), world.start), np.empty(uniforms.shape, dtype=np.int64)
    for i, u in enumerate(uniforms.T):
        drawn = np.searchsorted(cumulative, before[states] + u, side="right")
        edges[:, i] = np.clip(drawn, world.first_edges[states], last_edges[states])  # rounding may step over a boundary
        states = world.targets[edges[:, i]]
    return world.tokens[edges], world.log_probs[edges]
