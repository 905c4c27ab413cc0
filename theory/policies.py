"""The exact policies: one small pure function each, its formula above it.

A policy is `Levels` of log pi(t | a), one number for every `at` in A_i. beta >= 0 multiplies the reward.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from theory.world import Levels, World, kl


def checked_beta(beta: float) -> float:
    """beta >= 0, or a ValueError."""
    if not beta >= 0:
        raise ValueError(f"beta={beta}, expected a number >= 0: it multiplies the reward (1 / the KL coefficient)")
    return beta


# ---- guidance, one token at a time ----------------------------------------------------------------------------------


def log_normalisers(world: World, scores: Levels, beta: float, ref: Levels | None = None) -> Levels:
    """log Z(a) = log sum_t ref(t | a) exp(beta s(at)) on A_0 .. A_{T-1}."""
    ref = world.ref if ref is None else ref
    return [world.log_up(i, ref[i] + checked_beta(beta) * scores[i]) for i in range(1, world.horizon + 1)]


def tokenwise(world: World, scores: Levels, beta: float, ref: Levels | None = None) -> Levels:
    """pi(t | a) = ref(t | a) exp(beta s(at)) / Z(a): the paper's equation, for any scores s and any reference."""
    ref = world.ref if ref is None else ref
    log_z = log_normalisers(world, scores, beta, ref)
    return [np.zeros(1)] + [
        ref[i] + beta * scores[i] - world.down(i, log_z[i - 1]) for i in range(1, world.horizon + 1)
    ]


def best_token(world: World, objective: Levels) -> Levels:
    """pi(t | a) uniform over argmax_t objective(at)."""
    policy = [np.zeros(1)]
    for i in range(1, world.horizon + 1):
        best = objective[i] == world.down(i, world.max_up(i, objective[i]))
        policy.append(np.where(best, -world.down(i, np.log(world.up(i, best.astype(float)))), -np.inf))
    return policy


def likeliest(world: World, k: int) -> Levels:
    """Whether t is among the k likeliest tokens after a; ties go to the lower id."""
    levels = [np.ones(1, bool)]
    for i in range(1, world.horizon + 1):
        order = np.lexsort((-world.ref[i], world.parents[i]))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - world.first_children[i][world.parents[i][order]]
        levels.append(rank < k)
    return levels


def top_k(world: World, k: int) -> Levels:
    """ref cut to its k likeliest tokens after each prefix and renormalised."""
    policy, candidates = [np.zeros(1)], likeliest(world, k)
    for i in range(1, world.horizon + 1):
        cut = np.where(candidates[i], world.ref[i], -np.inf)
        policy.append(cut - world.down(i, world.log_up(i, cut)))
    return policy


def kept(world: World, scores: Levels, beta: float, candidates: Levels) -> Levels:
    """pi(t | a) = ref(t | a) exp(beta s(at)) ref(C | a) / sum_{c in C} ref(c | a) exp(beta s(ac)) on C, else ref."""
    policy = [np.zeros(1)]
    for i in range(1, world.horizon + 1):
        tilted = world.ref[i] + checked_beta(beta) * scores[i]
        none = world.down(i, world.up(i, candidates[i].astype(float))) == 0
        sums = (world.log_up(i, np.where(candidates[i] | none, level, -np.inf)) for level in (world.ref[i], tilted))
        mass, z = (world.down(i, level) for level in sums)
        policy.append(np.where(candidates[i], tilted + mass - z, world.ref[i]))
    return policy


# ---- scores to guide by ---------------------------------------------------------------------------------------------


def soft_value(world: World, last: np.ndarray, lam: float) -> Levels:
    """V_lambda(a) = log E_ref[exp(lambda r(Y)) | a] / lambda, lambda > 0."""
    return world.backward(last, lambda i, v: world.log_up(i, world.ref[i] + lam * v) / lam)


def max_value(world: World, last: np.ndarray) -> Levels:
    """V_inf(a) = max of r over the completions of a."""
    return world.backward(last, world.max_up)


def on_policy_value(world: World, last: np.ndarray, policy: Levels, beta: float) -> Levels:
    """V(a) = E_q[r(Y) - sum over later steps of log(q / ref) / beta | a]."""

    def step(i: int, v: np.ndarray) -> np.ndarray:
        return world.up(i, np.exp(policy[i]) * (v - (policy[i] - world.ref[i]) / beta))

    return world.backward(last, step)


# ---- whole responses ------------------------------------------------------------------------------------------------


def log_partition(world: World, i: int, rewards: np.ndarray, beta: float) -> float:
    """log Z_i = log sum over A_i of ref(a) exp(beta r(a))."""
    return float(np.logaddexp.reduce(world.log_ref[i] + checked_beta(beta) * rewards))


def rlhf(world: World, i: int, rewards: np.ndarray, beta: float) -> np.ndarray:
    """log pi_i(a) = log ref(a) + beta r(a) - log Z_i on A_i: the RLHF policy over strings of length i."""
    return world.log_ref[i] + beta * rewards - log_partition(world, i, rewards, beta)


def conditionals(world: World, log_p: np.ndarray) -> Levels:
    """log p(t | a) = log p(at) - log p(a), of a distribution log p over A_T."""
    paths = world.backward(log_p, world.log_up)
    return [np.zeros(1)] + [paths[i] - world.down(i, paths[i - 1]) for i in range(1, world.horizon + 1)]


def best_of_n(world: World, last: np.ndarray, n: int) -> np.ndarray:
    """log P(y) = log ref(y) - log ref(r = r(y)) + log(F(r(y))^n - F(r(y)-)^n): the best of n draws, ties at random."""
    values, group = np.unique(last, return_inverse=True)
    mass = np.bincount(group, np.exp(world.log_ref[-1]), minlength=len(values))
    up_to = np.cumsum(mass)
    with np.errstate(divide="ignore"):  # the worst reward has nothing below it: log1p(-1)
        not_all_below = -np.expm1(n * np.log1p(-mass / up_to))  # 1 - (F(r-) / F(r))^n
    return world.log_ref[-1] + (n * np.log(up_to / up_to[-1]) + np.log(not_all_below) - np.log(mass))[group]


def path_sum(world: World, levels: list[np.ndarray | float]) -> np.ndarray:
    """sum_i x_i(y_1:i) over A_T, of what is given for the lengths 1..T."""
    total = np.zeros(1)
    for i, level in enumerate(levels, start=1):
        total = world.down(i, total) + level
    return total


def log_weight(world: World, scores: Levels, beta: float) -> np.ndarray:
    """log w(y) = sum_i log Z(y_1:i-1) - beta sum_{1 <= i < T} s(y_1:i): what turns q into Z_T pi_T."""
    log_z = log_normalisers(world, scores, beta)
    steps = [world.down(i, z) for i, z in enumerate(log_z, start=1)]
    return path_sum(world, steps) - beta * path_sum(world, [*scores[1:-1], 0.0])


# ---- measures of a policy -------------------------------------------------------------------------------------------


def objective(world: World, i: int, log_p: np.ndarray, rewards: np.ndarray, beta: float) -> float:
    """J(pi) = E_pi[r] - KL(pi || ref) / beta over strings of length i, beta > 0."""
    return float(np.exp(log_p) @ rewards) - kl(log_p, world.log_ref[i]) / beta


def reward_and_kl(world: World, log_p: np.ndarray, last: np.ndarray) -> tuple[float, float]:
    """(E_p[r], KL(p || ref) in nats) of a distribution over A_T."""
    return float(np.exp(log_p) @ last), kl(log_p, world.log_ref[-1])


def reward_lost(world: World, log_p: np.ndarray, last: np.ndarray) -> float:
    """The reward of the RLHF policy of equal KL, less E_p[r].

    By T0 it is min over beta > 0 of KL(p || pi_beta) / beta: never negative, whatever p is.
    """
    reward, divergence = reward_and_kl(world, log_p, last)

    def excess(log_beta: float) -> float:
        return reward_and_kl(world, rlhf(world, world.horizon, last, np.exp(log_beta)), last)[1] - divergence

    low, high = np.log(1e-9), np.log(1e4)
    if excess(high) <= 0:
        return float(last.max() - reward)
    if excess(low) >= 0:
        return float(np.exp(world.log_ref[-1]) @ last - reward)
    beta = np.exp(brentq(excess, low, high))
    return (divergence + log_partition(world, world.horizon, last, beta)) / beta - reward
