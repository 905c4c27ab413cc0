"""T5. The partial Bradley-Terry loss identifies the partial reward.

Here (proof in README.md). Pairs (Y, Y') from ref x ref, any labeler p with 0 < p < 1, cut at length i (finished
responses continue with end tokens), label kept. The population loss over scores on A_i is convex with one minimiser up
to one constant for each length, and the tokenwise policy does not see that constant. (Contrast T1: pairs of whole
responses leave every prefix score free.) The labeler enters through W(a) = E[p(Y > Y') | Y_1:i = a] alone. Falsified
by a second minimiser with another tokenwise policy, or by a flat direction of the loss besides the constants.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_expit

from theory.bradley_terry import bt_loss, level_fit, partial_reward, stationarity, win_rates
from theory.ledger import verify
from theory.policies import tokenwise
from theory.strategies import betas, for_all, labelled_worlds, seeds
from theory.world import Levels, World, bradley_terry_labels, largest_gap, noise


def loss_over_pairs(world: World, i: int, scores: np.ndarray) -> float:
    """E[-log sigmoid(s(winner_1:i) - s(loser_1:i))], summed over every pair of whole responses as the data come."""
    ref, cut = np.exp(world.log_ref[-1]), scores[world.ancestors(i)]
    margins = cut[:, None] - cut[None, :]
    per_pair = -(world.labels * log_expit(margins) + (1 - world.labels) * log_expit(-margins))
    return float(ref @ per_pair @ ref)


def flat_directions(world: World, i: int, scores: np.ndarray, linked: np.ndarray | None = None) -> int:
    """How many eigenvalues of the loss's Hessian, scaled by the mass of each prefix, vanish."""
    weight, _ = level_fit(world.log_ref[i], np.full(len(scores), 0.5))
    weight = weight if linked is None else weight * linked
    win = 1 / (1 + np.exp(scores[None, :] - scores[:, None]))
    slopes = weight * win * win.T
    root = np.sqrt(weight.sum(1))
    eigenvalues = np.linalg.eigvalsh((np.diag(slopes.sum(1)) - slopes) / np.outer(root, root))
    return int((eigenvalues < 1e-10 * eigenvalues.max()).sum()) if len(scores) > 1 else 1


@for_all(world=labelled_worlds(), seed=seeds)
def test_the_loss_over_pairs_sees_the_labeler_through_its_win_rates(world, seed):
    scores, win = noise(world, seed), win_rates(world)
    levels = range(world.horizon + 1)
    direct = [loss_over_pairs(world, i, scores[i]) for i in levels]
    through_wins = [bt_loss(*level_fit(world.log_ref[i], win[i]), scores[i]) for i in levels]
    verify("T5", "loss over all pairs = L(ref ref', ref W)", np.abs(np.subtract(direct, through_wins)).max())


@for_all(world=labelled_worlds())
def test_one_minimiser_up_to_a_constant(world):
    s, win = partial_reward(world), win_rates(world)
    levels = range(world.horizon + 1)
    residual = max(np.abs(stationarity(*level_fit(world.log_ref[i], win[i]), s[i])).max() for i in levels)
    verify("T5", "stationarity of the Newton solution", residual, 1e-10, "fit")
    spare = max(flat_directions(world, i, s[i]) for i in levels) - 1
    verify("T5", "flat directions of the loss besides the constant", spare, 0, "exact")


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_another_optimiser_from_anywhere_finds_the_same_policy(world, beta, seed):
    def found(i: int, start: np.ndarray) -> np.ndarray:
        weight, wins = level_fit(world.log_ref[i], win_rates(world)[i])
        scale = 1 / np.sqrt(weight.sum(1))  # rare prefixes on the same footing

        def loss_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
            s = scale * x
            return bt_loss(weight, wins, s), 2 * scale * weight.sum(1) * stationarity(weight, wins, s)

        return scale * minimize(loss_and_gradient, start / scale, jac=True, method="BFGS", options={"gtol": 1e-9}).x

    found_scores = [found(i, start) for i, start in enumerate(noise(world, seed))]
    gap = largest_gap(*(_probabilities(tokenwise(world, s, beta)) for s in (partial_reward(world), found_scores)))
    verify("T5", "BFGS from a random start gives the same pi(t | a)", gap, 1e-4, "bound")


@for_all(world=labelled_worlds(), beta=betas(), seed=seeds)
def test_the_policy_does_not_see_the_constants(world, beta, seed):
    s, constants = partial_reward(world), np.random.default_rng(seed).standard_normal(world.horizon + 1)
    moved = [x + c for x, c in zip(s, constants, strict=True)]
    gap = largest_gap(tokenwise(world, s, beta), tokenwise(world, moved, beta))
    verify("T5", "one constant a length leaves pi(t | a) as it is (logs)", gap)


def _probabilities(policy: Levels) -> Levels:
    return [np.exp(x) for x in policy]


def labelled(seed: int) -> World:
    world = World.random(seed)
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def test_control_a_shuffled_reward_is_not_stationary():
    world = labelled(0)
    win, s = win_rates(world), partial_reward(world)
    assert np.abs(stationarity(*level_fit(world.log_ref[-1], win[-1]), s[-1][::-1])).max() > 0.01


def test_control_pairs_that_never_meet_leave_a_second_constant_free():
    world = labelled(0)
    two_halves = np.arange(len(world.prefixes[-1])) < 4
    linked = (two_halves[:, None] == two_halves[None, :]).astype(float)
    assert flat_directions(world, world.horizon, partial_reward(world)[-1], linked) == 2


def test_control_a_constant_that_varies_within_a_length_changes_the_policy():
    world = labelled(0)
    s = partial_reward(world)
    moved = [x + np.arange(len(x)) for x in s]
    assert largest_gap(tokenwise(world, s, 1.0), tokenwise(world, moved, 1.0)) > 0.1
