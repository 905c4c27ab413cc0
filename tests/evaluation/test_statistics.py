"""The statistics against textbook values."""

import math

import numpy as np
import pytest
from scipy import stats

from pargs_min.evaluation.statistics import (
    distinct_n,
    estimate,
    interval_over_prompts,
    mean_and_error,
    outcome,
    prompt_means,
    rlhf_frontier,
    wilson,
    win_rate,
)
from pargs_min.world.journey import HELD_OUT_PROMPTS, HORIZON, Journey
from theory import exact


def test_an_error_is_counted_over_prompts():
    """One value per prompt is scipy's standard error; repeating every text makes nothing more certain."""
    values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    mean, error = mean_and_error(values, range(8))
    assert mean == 5.0
    assert error == pytest.approx(stats.sem(values)) == pytest.approx(math.sqrt(32 / 7 / 8))
    assert mean_and_error(values * 10, [*range(8)] * 10) == pytest.approx((mean, error))


def test_every_prompt_counts_once():
    assert mean_and_error([0.0] * 9 + [1.0], ["a"] * 9 + ["b"]) == (0.5, 0.5)
    assert prompt_means([0.0, 9.0, 1.0], ["b", "a", "b"]).tolist() == [0.5, 9.0]


def test_one_prompt_says_nothing_about_others():
    mean, error = mean_and_error([1.0, 2.0], ["a", "a"])
    assert mean == 1.5
    assert math.isnan(error)
    assert all(map(math.isnan, interval_over_prompts([1.0, 2.0], ["a", "a"])))


def test_the_interval_over_prompts_is_the_normal_one_where_that_is_right():
    """For the mean of 400 prompts both agree to a few hundredths of their width; the texts within do not matter."""
    values = np.random.default_rng(0).normal(size=400)
    mean, error = mean_and_error(values, range(400))
    low, high = interval_over_prompts(values, range(400))
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert interval_over_prompts([*values] * 2, [*range(400)] * 2) == pytest.approx((low, high))


def test_the_interval_over_prompts_is_exact_for_constants():
    assert interval_over_prompts([2.0] * 3, range(3)) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_has_newcombes_values(successes, trials, low, high):
    """Newcombe (1998), Statistics in Medicine 17:857, table I, method 3."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_half_a_success_widens_wilsons_interval_outwards():
    assert wilson(7.5, 20) == (wilson(7, 20)[0], wilson(8, 20)[1])


def test_ties_count_half():
    rate = win_rate([1, 0.5, 0.5, 0.5, 0], range(5))
    assert (rate["wins"], rate["ties"], rate["losses"]) == (1, 3, 1)
    assert rate["rate"] == 0.5
    assert (rate["low"], rate["high"]) == pytest.approx((wilson(2, 5)[0], wilson(3, 5)[1]))
    assert rate["error_over_prompts"] == mean_and_error([1, 0.5, 0.5, 0.5, 0], range(5))[1]
    assert win_rate([1], [0])["rate"] == 1.0
    assert win_rate([1, 1, 0], "aab")["rate"] == 0.5
    swapped = win_rate([0, 0.5, 0.5, 0.5, 1], range(5))
    assert (swapped["rate"], swapped["low"]) == pytest.approx((1 - rate["rate"], 1 - rate["high"]))


@pytest.mark.parametrize("prompts", [2, 3, 5, 20])
def test_an_interval_of_few_prompts_holds_the_truth_as_often_as_it_says(prompts):
    draws = np.random.default_rng(0).normal(size=(400, prompts))
    ends = [interval_over_prompts(values, range(prompts)) for values in draws]
    assert 0.92 < np.mean([low <= 0 <= high for low, high in ends]) < 0.98  # of two prompts drawn again, 0.5


def test_a_win_rate_lies_within_0_and_1():
    rate = win_rate([1, 1, 1, 0.5], "aabb")
    assert rate["low"] >= 0
    assert rate["high"] == 1


def test_an_outcome_is_of_two_scores():
    assert [outcome(*pair) for pair in ((1, 0), (2, 2), (3.0, 4.0))] == [1, 0.5, 0]


def test_an_estimate_has_its_error_and_its_interval():
    values, groups = [1.0, 4.0, 2.0, 2.0], [0, 0, 1, 2]
    mean, error = mean_and_error(values, groups)
    low, high = interval_over_prompts(values, groups)
    assert estimate(values, groups) == {"mean": mean, "error": error, "low": low, "high": high}


def test_distinct_n_counts_ngrams_within_texts():
    texts = [["the", "cat", "sat", "on", "the", "mat"], ["the", "cat"], ["the"]]
    assert distinct_n(texts, 1) == 5 / 9
    assert distinct_n(texts, 2) == 5 / 6  # "the the" across two texts is no bigram
    assert distinct_n([[1, 1, 1, 1]], 2) == 1 / 3
    assert math.isnan(distinct_n([[1], []], 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_and_error([], []), "at least one value, got 0 and 0"),
        (lambda: mean_and_error([1.0], ["a", "b"]), "got 1 and 2"),
        (lambda: win_rate([1.0], []), "got 1 and 0"),
        (lambda: win_rate([], []), "at least one value, got 0 and 0"),
        (lambda: distinct_n([[1]], 0), "n must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_frontier_of_samples_is_the_exact_frontier():
    """The automaton's own samples, to 5.5 standard errors (delta method): false failures 4e-8 each, ten of them."""
    world, n, betas = Journey(), 5000, [0.0, 0.5, 1.0, 2.0, 3.0]
    automata = [world.automata[prompt] for prompt in HELD_OUT_PROMPTS]
    tokens, _ = world.write(np.random.default_rng(11).random((4 * n, HORIZON)), HELD_OUT_PROMPTS)
    gold = np.array(world.gold(HELD_OUT_PROMPTS * n, tokens.tolist())).reshape(n, 4).T
    for point in rlhf_frontier(gold, betas):
        policies = [exact.rlhf_frontier(automaton, [max(point.beta, 1e-9)])[0] for automaton in automata]
        weights = np.exp(point.beta * gold)
        weights /= weights.sum(1, keepdims=True)
        log_ratio = np.log(n * weights)
        for found, truth, value in (
            (point.reward, np.mean([policy.reward for policy in policies]), gold),
            (point.kl, np.mean([policy.kl for policy in policies]), log_ratio),
        ):
            mean = (weights * value).sum(1, keepdims=True)
            # KL = E_w[beta gold] - log Z: each sample moves the mean, and for KL the normaliser too
            influence = weights * (value - mean) - (0 if value is gold else weights - 1 / n)
            error = np.sqrt((influence**2).sum()) / 4
            assert abs(found - truth) <= 5.5 * error + 1e-6
    assert rlhf_frontier(gold, [0.0])[0].effective_samples == pytest.approx(n)
    log_z = np.log(np.exp(2.0 * gold).mean(1)).mean()
    (point,) = rlhf_frontier(gold, [2.0])
    assert 2.0 * point.reward - point.kl == pytest.approx(log_z, rel=1e-12)


def test_the_frontier_is_estimated_from_prompts_that_each_tell_of_it():
    """Normal rewards, whose most at a KL is sqrt(2 KL): many prompts with few texts each do not make up for that."""
    rewards, betas = np.random.default_rng(0).normal(size=(1000, 64)), np.linspace(0.1, 3, 30)
    kept = rlhf_frontier(rewards, betas, least=32)
    assert len(kept) > 5
    assert all(abs(point.reward - math.sqrt(2 * point.kl)) < 0.02 for point in kept)
    last = rlhf_frontier(rewards, betas, least=1)[-1]
    assert math.sqrt(2 * last.kl) - last.reward > 0.1


def test_a_frontier_point_on_few_samples_is_left_out():
    gold = np.zeros((1, 1000))
    gold[0, 0] = 5.0
    assert [point.beta for point in rlhf_frontier(gold, [0.1, 5.0])] == [0.1]
    assert [point.beta for point in rlhf_frontier(gold, [0.1, 5.0], least=1)] == [0.1, 5.0]
