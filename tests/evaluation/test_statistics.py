"""The statistics against textbook values."""

import math

import numpy as np
import pytest
from scipy import stats

from pargs_min.evaluation.statistics import (
    bootstrap_interval,
    distinct_n,
    mean_and_error,
    prompt_means,
    wilson,
    win_rate,
)


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
    assert all(map(math.isnan, bootstrap_interval([1.0, 2.0], ["a", "a"])))


def test_the_bootstrap_interval_is_the_normal_one_where_that_is_right():
    """For the mean of 400 prompts both agree to a few hundredths of their width; the texts within do not matter."""
    values = np.random.default_rng(0).normal(size=400)
    mean, error = mean_and_error(values, range(400))
    low, high = bootstrap_interval(values, range(400))
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert bootstrap_interval([*values] * 2, [*range(400)] * 2) == pytest.approx((low, high))
    narrow = bootstrap_interval(values, range(400), confidence=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, abs=0.1 * error)


def test_the_bootstrap_interval_is_repeatable_and_exact_for_constants():
    values = [0.0, 1.0, 5.0, 2.0, 2.5, 9.0, 4.1]
    assert bootstrap_interval(values, range(7)) == bootstrap_interval(values, range(7))
    assert bootstrap_interval(values, range(7)) != bootstrap_interval(values, range(7), seed=1)
    assert bootstrap_interval([2.0] * 3, range(3)) == (2.0, 2.0)


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
    rate = win_rate([1.0, 2.0, 3.0, 0.0, 0.0], [0.0, 2.0, 3.0, 0.0, 1.0])
    assert (rate.wins, rate.ties, rate.losses) == (1, 3, 1)
    assert rate.rate == 0.5
    assert (rate.low, rate.high) == pytest.approx((wilson(2, 5)[0], wilson(3, 5)[1]))
    assert win_rate([1], [0]).rate == 1.0
    swapped = win_rate([0.0, 2.0, 3.0, 0.0, 1.0], [1.0, 2.0, 3.0, 0.0, 0.0])
    assert (swapped.rate, swapped.low) == pytest.approx((1 - rate.rate, 1 - rate.high))


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
        (lambda: win_rate([1.0], []), "must be paired, got 1 and 0"),
        (lambda: win_rate([1.0, math.nan], [0.0, 0.0]), "got nan among them"),
        (lambda: win_rate([1.0, 0.0], [0.0, math.nan]), "got nan among them"),
        (lambda: win_rate([], []), "at least one comparison"),
        (lambda: distinct_n([[1]], 0), "n must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
