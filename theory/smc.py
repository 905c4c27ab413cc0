"""Sequential Monte Carlo with the tokenwise policy as proposal, sampled and enumerated.

The targets are gamma_i(a) = ref(a) exp(beta s(a)) on A_i. With the tokenwise policy as proposal the incremental weight

    gamma_i(at) / (gamma_{i-1}(a) pi(t | a)) = Z(a) exp(-beta s(a)) = G(a)

depends on the prefix alone. So the particles are resampled in proportion to G *before* they are extended, and those of
the last step carry equal weights. (gamma_0 = 1: the empty prefix's own score cancels.)
"""

from __future__ import annotations

import numpy as np

from theory.policies import log_normalisers, tokenwise
from theory.world import Levels, World


def log_increments(world: World, scores: Levels, beta: float) -> Levels:
    """log G(a) = log Z(a) - beta s(a) on A_0 .. A_{T-1}, with s(empty) taken as 0."""
    log_z = log_normalisers(world, scores, beta)
    return [z - beta * (s if i else 0.0) for i, (z, s) in enumerate(zip(log_z, scores, strict=False))]


def sample_particles(
    world: World, scores: Levels, beta: float, particles: int, runs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(runs, particles) places in A_T, and (runs,) log of the estimate of Z_T: the sum of log mean G."""
    policy, increments = tokenwise(world, scores, beta), log_increments(world, scores, beta)
    at, log_z = np.zeros((runs, particles), dtype=np.int64), np.zeros(runs)
    for i in range(1, world.horizon + 1):
        weights = np.exp(increments[i - 1][at])
        log_z += np.log(weights.mean(1))
        shares = np.cumsum(weights, axis=1) / weights.sum(1, keepdims=True)
        at = np.take_along_axis(at, _inverse_cdf(shares, rng.random((runs, particles))), axis=1)
        families = np.cumsum(np.exp(policy[i]))  # every family sums to 1, so parent a owns the interval (a, a + 1]
        at = np.searchsorted(families, at + rng.random(at.shape)).clip(*_family(world, i, at))
    return at, log_z


def enumerate_particles(
    world: World, scores: Levels, beta: float, particles: int, weighted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Every outcome of every particle: (law of one particle over A_T, total mass over the runs).

    `weighted`: each run counts with its estimate of Z_T, as the unbiasedness of SMC is stated; else with 1.
    """
    policy, increments = tokenwise(world, scores, beta), log_increments(world, scores, beta)
    mass = np.ones(1)  # over tuples of A_i, the last particle varying fastest
    for i in range(1, world.horizon + 1):
        n = len(world.prefixes[i - 1])
        members = np.stack(np.unravel_index(np.arange(n**particles), (n,) * particles), axis=1)
        weights = np.exp(increments[i - 1])[members]
        extension = np.zeros((n, len(world.prefixes[i])))
        extension[world.parents[i], np.arange(len(world.prefixes[i]))] = np.exp(policy[i])
        one = np.einsum("xk,xkb->xb", weights / weights.sum(1, keepdims=True), extension[members])
        mass = mass * (weights.mean(1) if weighted else 1.0)
        if i == world.horizon:
            return mass @ one, mass.sum()  # the particles of the last step are alike
        together = one
        for _ in range(particles - 1):
            together = (together[:, :, None] * one[:, None, :]).reshape(len(one), -1)
        mass = mass @ together
    return mass, mass.sum()


def _inverse_cdf(cdf: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Row by row, the first place whose cdf reaches the uniform."""
    rows = np.arange(len(cdf))[:, None]
    places = np.searchsorted((cdf + rows).ravel(), (uniforms + rows).ravel()).reshape(uniforms.shape)
    return (places - rows * cdf.shape[1]).clip(0, cdf.shape[1] - 1)


def _family(world: World, i: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last child of each prefix, so that rounding cannot move a draw to a neighbour's family."""
    first = world.first_children[i]
    last = np.append(first[1:], len(world.parents[i])) - 1
    return first[at], last[at]
