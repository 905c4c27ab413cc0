"""Population Bradley-Terry fits: the reward that infinitely many preference pairs determine.

A fit is stated by two tables over the items that are compared: `weight[a, b]`, how often the pair meets (symmetric),
and `wins[a]`, how much of that weight a wins. The loss of scores s is

    L(s) = sum_ab weight[a, b] softplus(s(a) - s(b)) - sum_a (2 wins[a] - sum_b weight[a, b]) s(a)

so the labeler enters through its wins alone. L is convex, and stationary where the model wins as often as the data:

    sum_b weight[a, b] sigmoid(s(a) - s(b)) = wins[a]      for every a.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from theory.world import Levels, World, finished


def bt_loss(weight: np.ndarray, wins: np.ndarray, scores: np.ndarray) -> float:
    """L(s), in nats: the mean of -log sigmoid(s(winner) - s(loser)) when `weight` sums to 1."""
    margins = scores[:, None] - scores[None, :]
    return float(np.sum(weight * np.logaddexp(0.0, margins)) - (2 * wins - weight.sum(1)) @ scores)


def stationarity(weight: np.ndarray, wins: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n,) how much more often a wins in the model than in the data, per comparison that a takes part in."""
    return _expected_wins(weight, wins, scores)[1]


def fit_bradley_terry(weight: np.ndarray, wins: np.ndarray, steps: int = 100) -> np.ndarray:
    """The minimiser of L with mean zero, by damped Newton steps; items that meet nobody get 0.

    Raises ValueError when the stationarity residual stays above 1e-10: then the data have no finite minimiser
    (somebody always wins), or floating point cannot hold it.
    """
    met = weight.sum(1) > 0
    if not met.any():
        return np.zeros(len(met))
    weight, wins = weight[np.ix_(met, met)], wins[met]
    mass = weight.sum(1)
    root = np.sqrt(mass)
    scale = np.outer(root, root)
    scores = np.zeros(len(mass))
    beats, residual = _expected_wins(weight, wins, scores)
    for _ in range(steps):
        if np.abs(residual).max() < 1e-15:
            break
        slopes = weight * beats * beats.T
        scaled = scale / mass.sum() - slopes / scale  # the first term holds the constant at its value
        scaled.flat[:: len(mass) + 1] += slopes.sum(1) / mass
        try:
            step = np.linalg.solve(scaled, residual * root) / root
        except np.linalg.LinAlgError:  # flat to the last digit: the scores have run off to infinity
            break
        size = 1.0
        while size > 1e-4:
            trial = scores - size * step
            trial_beats, trial_residual = _expected_wins(weight, wins, trial)
            if trial_residual @ trial_residual < residual @ residual:
                break
            size /= 2
        else:
            break
        scores, beats, residual = trial, trial_beats, trial_residual
    if not np.abs(residual).max() <= 1e-10:
        raise ValueError(f"Bradley-Terry fit: stationarity residual {np.abs(residual).max():.3g} after {steps} steps")
    fitted = np.zeros(len(met))
    fitted[met] = scores - mass @ scores / mass.sum()
    return fitted


def _expected_wins(weight: np.ndarray, wins: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n, n) sigmoid(s(a) - s(b)), `stationarity` of the scores)."""
    beats = expit(scores[:, None] - scores[None, :])
    return beats, (np.sum(weight * beats, axis=1) - wins) / weight.sum(1)


# ---- the partial reward ---------------------------------------------------------------------------------------------


def win_rates(world: World, mu: Levels | None = None) -> Levels:
    """W(a) = E_mu[u(Y) | Y_1:i = a] with u(y) = E_{Y' ~ mu} p(y > Y'), on every A_i (mu = ref unless given)."""
    policy = world.ref if mu is None else mu
    u = labels_of(world) @ np.exp(world.paths(policy)[-1])
    return world.mean(u, policy)


def level_fit(log_mu: np.ndarray, win: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight, wins) of pairs drawn independently from mu at one length: weight = mu mu', wins = mu W."""
    mu = np.exp(log_mu)
    return np.outer(mu, mu), mu * win


def partial_reward(world: World, mu: Levels | None = None) -> Levels:
    """The population minimiser of the partial Bradley-Terry loss on pairs from mu x mu, on every A_i.

    sum_b mu(b) sigmoid(s(a) - s(b)) = W(a), every a in A_i; mean zero at each length.
    """
    paths = world.log_ref if mu is None else world.paths(mu)
    wins = win_rates(world, mu)
    return [fit_bradley_terry(*level_fit(log_mu, win)) for log_mu, win in zip(paths, wins, strict=True)]


def labels_of(world: World) -> np.ndarray:
    """The world's labeler, or a ValueError."""
    if world.labels is None:
        raise ValueError("world.labels is None, expected a preference labeler: world.with_labels(p)")
    return world.labels


def win_rate(world: World, log_p: np.ndarray, log_q: np.ndarray) -> float:
    """P(Y > Y'), Y ~ p and Y' ~ q independent, over A_T."""
    return float(np.exp(log_p) @ labels_of(world) @ np.exp(log_q))


# ---- other treatments of responses that have ended ------------------------------------------------------------------


def compared_pairs(world: World, treatment: str) -> list[np.ndarray]:
    """(n_T, n_T) for i = 0..T: with what weight the lengths of a pair let its length-i prefixes be compared."""
    shorter = np.minimum.outer(world.lengths, world.lengths)
    longer = np.maximum.outer(world.lengths, world.lengths)
    weights = {
        "extend": lambda i: longer >= i,  # end tokens up to the longer response's length; every prefix counts once
        "min": lambda i: shorter >= i,  # up to the shorter response's length
        "pair": lambda i: (longer >= i) / longer,  # as extend, but every pair counts once
        "hold": lambda i: longer >= i,  # as extend, a finished response having one score at all lengths
    }
    if treatment not in weights:
        raise ValueError(f"treatment={treatment!r}, expected one of {sorted(weights)}")
    return [weights[treatment](i).astype(float) for i in range(world.horizon + 1)]


def tables_of(world: World, treatment: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight, wins) of the prefixes of each length 0..T, summed over whole pairs (Y, Y') from ref x ref."""
    ref = np.exp(world.log_ref[-1])
    tables = []
    for i, compared in enumerate(compared_pairs(world, treatment)):
        to_level = _descendants(world, i)
        pairs = np.outer(ref, ref) * compared
        tables.append((to_level @ pairs @ to_level.T, to_level @ (pairs * labels_of(world)).sum(1)))
    return tables


def partial_reward_of(world: World, treatment: str) -> Levels:
    """The population minimiser of the partial loss as it is summed over real pairs (Y, Y') from ref x ref."""
    tables = tables_of(world, treatment)
    if treatment != "hold":
        return [fit_bradley_terry(weight, wins) for weight, wins in tables]
    places, count = _shared_places(world)
    shared, shared_wins = np.zeros((count, count)), np.zeros(count)
    for (weight, wins), place in zip(tables[1:], places[1:], strict=True):
        np.add.at(shared, np.ix_(place, place), weight)
        np.add.at(shared_wins, place, wins)
    return [fit_bradley_terry(shared, shared_wins)[place] for place in places]


def _descendants(world: World, i: int) -> np.ndarray:
    """(n_i, n_T) one where the response continues the prefix."""
    return (world.ancestors(i) == np.arange(len(world.prefixes[i]))[:, None]).astype(float)


def _shared_places(world: World) -> tuple[list[np.ndarray], int]:
    """A number for every prefix, a finished response having the same one at all lengths."""
    places, count = [np.zeros(1, dtype=np.int64)], 1
    for i in range(1, world.horizon + 1):
        ended = finished(world.prefixes[i - 1], world.eos)[world.parents[i]]
        fresh = count + np.cumsum(~ended) - 1
        places.append(np.where(ended, world.down(i, places[-1]), fresh))
        count += int((~ended).sum())
    return places, count
