"""What texts are worth: their statistics, each with the uncertainty that prompts leave.

Texts of one prompt resemble each other, so prompts, not texts, are what an error is counted over.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


def prompt_means(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """(prompts,) mean value of each prompt, in order of appearance; `groups` names the prompt of each value.

    Raises:
        ValueError: if there is no value, or not one group for each.

    >>> prompt_means([1.0, 3.0, 5.0], ["a", "a", "b"]).tolist()
    [2.0, 5.0]
    """
    if not len(values) or len(values) != len(groups):
        raise ValueError(
            f"values and groups must name one group for each of at least one value, got {len(values)} and {len(groups)}"
        )
    gathered: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        gathered.setdefault(group, []).append(value)
    return np.array([np.mean(members) for members in gathered.values()])


def mean_and_error(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Mean over prompts, and its standard error.

        mean = sum_p m_p / P        error = sqrt(sum_p (m_p - mean)^2 / (P - 1)) / sqrt(P)

    where m_p is the mean of prompt p. Every prompt counts once, however many samples it has.

    Args:
        values: one number per text.
        groups: the prompt of each text.

    Returns:
        Both in the unit of `values`; the error is nan for a single prompt, which says nothing about others.

    Source: the cluster as the unit, e.g. Cochran (1977), Sampling Techniques; for language models Miller (2024),
    arXiv 2411.00640.

    >>> mean_and_error([1.0, 3.0, 4.0, 4.0], ["a", "a", "b", "b"])
    (3.0, 1.0)
    """
    means = prompt_means(values, groups)
    error = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), error


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval (BCa) of the mean over prompts: whole prompts are drawn again, with all their texts.

    Returns:
        (low, high) in the unit of `values`; nan for a single prompt.

    Source: Efron (1987), Better bootstrap confidence intervals; `scipy.stats.bootstrap`.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50, range(100))
    >>> low < 0.5 - 0.08 and 0.5 + 0.08 < high
    True
    """
    means = prompt_means(values, groups)
    if len(means) == 1:
        return math.nan, math.nan
    if np.ptp(means) == 0:
        return float(means[0]), float(means[0])
    low, high = stats.bootstrap(
        (means,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 10**7 // len(means)),  # at most 80 MB at a time
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def wilson(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion.

        (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
        successes: number of successes, in halves where ties count so. Half a success is rounded down for the lower end
            and up for the upper one; ties only make the truth more certain than an interval of successes says.
        trials: n >= 1, independent.

    Returns:
        (low, high) within [0, 1].

    Raises:
        ValueError: scipy's own, if `successes` is not within 0..trials.

    Source: Wilson (1927); `scipy.stats.binomtest(...).proportion_ci(method="wilson")`.

    >>> [round(end, 3) for end in wilson(15, 148)]  # Newcombe (1998), table I: 0.0624 to 0.1605
    [0.062, 0.16]
    """
    low, high = (
        stats.binomtest(whole, trials).proportion_ci(confidence, method="wilson")
        for whole in (math.floor(successes), math.ceil(successes))
    )
    return float(low.low), float(high.high)


class WinRate(NamedTuple):
    """Paired comparisons: a rate in [0, 1] with its interval, and the counts behind it."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95) -> WinRate:
    """How often ours beats theirs, pair by pair, a tie counting half.

        rate = (wins + ties / 2) / pairs

    with Wilson's interval, for which pairs are independent: that is, for one pair per prompt. With several, take error
    and interval over prompts, from `mean_and_error` and `bootstrap_interval` of the outcomes.

    Args:
        ours, theirs: the score of each text; any unit, the larger the better.

    Raises:
        ValueError: if the lengths differ, there is no pair, or a score is nan, which neither beats nor ties.

    >>> rate = win_rate([1, 2, 3, 4], [0, 2, 4, 1])
    >>> rate.rate, rate.wins, rate.ties, rate.losses
    (0.625, 2, 1, 1)
    """
    if len(ours) != len(theirs):
        raise ValueError(f"ours and theirs must be paired, got {len(ours)} and {len(theirs)} scores")
    if np.isnan([*ours, *theirs]).any():
        raise ValueError("ours and theirs must be numbers, got nan among them; leave those pairs out")
    return count_outcomes([outcome(a, b) for a, b in zip(ours, theirs, strict=True)], confidence)


def outcome(ours: float, theirs: float) -> float:
    """1 if ours is the better, 0 if theirs is, 0.5 for a tie."""
    return 0.5 * ((ours > theirs) + (ours >= theirs))


def count_outcomes(outcomes: Sequence[float], confidence: float = 0.95) -> WinRate:
    """The win rate of outcomes 1 (won), 0.5 (tied) and 0 (lost).

    Raises:
        ValueError: if there is none.
    """
    if not len(outcomes):
        raise ValueError("outcomes must hold at least one comparison, got none")
    wins, ties = outcomes.count(1), outcomes.count(0.5)
    successes = wins + ties / 2
    return WinRate(
        successes / len(outcomes),
        *wilson(successes, len(outcomes), confidence),
        wins,
        ties,
        len(outcomes) - wins - ties,
    )


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of the n-grams of some texts, taken together, that are distinct: 1 when none is repeated.

        distinct-n = |set of n-grams| / number of n-grams

    It falls as texts grow longer or more: compare equal numbers of texts. Texts shorter than n have no n-gram; where
    none has one, the result is nan.

    Args:
        sequences: token ids (or words) of each text.
        n: >= 1.

    Raises:
        ValueError: if n < 1.

    Source: Li et al. (2016), arXiv 1510.03055, who divide by the number of tokens instead.

    >>> distinct_n([[1, 2, 1], [1, 2]], 1), distinct_n([[1, 2, 1], [1, 2]], 2)
    (0.4, 0.6666666666666666)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    ngrams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan
