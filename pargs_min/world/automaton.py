"""Exact values of a reference policy with finitely many states, by recursion over (time, state).

A response is a path of exactly `horizon` tokens through an `Automaton`: after the end token only end tokens follow.
Prefixes of equal length that lead to the same state have the same future and so the same value: a table over (time,
state) replaces one of |V|^T rows. Nothing here depends on a particular world: `journey.py` builds automata from a
grammar, and a tree of all prefixes is an automaton too.

Shapes: S states, E edges, T the horizon. Tables of values are (T + 1, S): row i holds prefixes of length i; entries
that no prefix reaches are never used. A policy is the log-probability of every edge at every step, (T, E), in nats.
Everything is float64. T6 is the statement of that name in `theory/`, where `exact.py` has policies and more values.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

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
        if np.any(np.diff(self.sources) < 0) or set(self.sources.tolist()) != set(range(len(self.rewards))):
            raise ValueError(
                f"sources must be sorted, and name each of the {len(self.rewards)} states at least once: give a "
                "finished state the end token, back to itself"
            )
        totals = np.add.reduceat(np.exp(self.log_probs), self.first_edges)
        worst = int(np.argmax(np.abs(totals - 1)))
        if abs(totals[worst] - 1) > 1e-9:
            raise ValueError(f"log_probs must be normalised at each state, but state {worst} sums to {totals[worst]!r}")

    @cached_property
    def first_edges(self) -> NDArray[np.int64]:
        """Where each state's edges begin, (S,)."""
        return np.searchsorted(self.sources, np.arange(len(self.rewards)))

    @cached_property
    def reference(self) -> Array:
        """The reference as a policy: its edge log-probabilities at every step, (T, E)."""
        return np.broadcast_to(self.log_probs, (self.horizon, len(self.log_probs)))


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


def win_rates(world: Automaton, labeler: Array | None = None, policy: Array | None = None) -> Array:
    """W(a) = E[p(Y > Y') | prefix a of Y]: how often completions of a prefix beat whole responses (T6).

    It is the value function of u(y) = E_{Y'} p(y > Y'). labeler (S, S) between final states, by default Bradley-Terry,
    p(y > y') = sigmoid(r(y) - r(y')); Y, Y' from `policy` (T, E), by default the reference.
    Result (T + 1, S), 1/2 at the empty prefix.
    """
    labeler = expit(np.subtract.outer(world.rewards, world.rewards)) if labeler is None else labeler
    return expected(world, labeler @ occupancy(world, policy)[-1], policy)


def sample(world: Automaton, uniforms: Array) -> tuple[NDArray[np.int64], Array]:
    """Draw from the reference, one uniform in [0, 1) per token: uniforms (N, T) -> tokens, log-probabilities (N, T)."""
    cumulative = np.cumsum(np.exp(world.log_probs))
    before = cumulative[world.first_edges] - np.exp(world.log_probs[world.first_edges])
    last_edges = np.append(world.first_edges[1:], len(world.sources)) - 1
    states, edges = np.full(len(uniforms), world.start), np.empty(uniforms.shape, dtype=np.int64)
    for i, u in enumerate(uniforms.T):
        drawn = np.searchsorted(cumulative, before[states] + u, side="right")
        edges[:, i] = np.clip(drawn, world.first_edges[states], last_edges[states])  # rounding may step over a boundary
        states = world.targets[edges[:, i]]
    return world.tokens[edges], world.log_probs[edges]
