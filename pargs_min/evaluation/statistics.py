"""What texts are worth: their statistics, each with the uncertainty that prompts leave.

Texts of one prompt resemble each other, so prompts, not texts, are what an error is counted over.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import logsumexp


def prompt_means(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """(prompts,) mean value of each prompt, in order of appearance; `groups` names the prompt of each value.

    Raises:
        ValueError: if there is no value, or not one group for each.

    >>> prompt_means([1.0, 3.0, 5.0], ["a", "a", "b"]).tolist()
    [2.0, 5.0]
    """
    if not len(values) or len(values) != len(groups):
        raise ValueError(f"groups must name one for each of at least one value, got {len(values)} and {len(groups)}")
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


def interval_over_prompts(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Student's interval (95%) of the mean over prompts.

    Returns:
        (low, high) in the unit of `values`; nan for a single prompt.

    Source: Student (1908); `scipy.stats.t`.

    >>> low, high = interval_over_prompts([1.0, 3.0], "ab")
    >>> round(low, 2), round(high, 2)
    (-10.71, 14.71)
    """
    means = prompt_means(values, groups)
    if np.ptp(means) == 0:
        return (float(means[0]),) * 2 if len(means) > 1 else (math.nan, math.nan)
    low, high = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
    return float(low), float(high)


def estimate(values: Sequence[float], groups: Sequence[Hashable]) -> dict[str, float | None]:
    """{mean, error, low, high}, of `mean_and_error` and `interval_over_prompts`; None where it is unknown.

    >>> estimate([1.0, 3.0], ["a", "a"])
    {'mean': 2.0, 'error': None, 'low': None, 'high': None}
    """
    numbers = (*mean_and_error(values, groups), *interval_over_prompts(values, groups))
    return dict(zip(("mean", "error", "low", "high"), map(_known, numbers), strict=True))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's interval of a proportion, of 95%.

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
    tests = [stats.binomtest(whole(successes), trials) for whole in (math.floor, math.ceil)]
    low, high = (test.proportion_ci(method="wilson") for test in tests)
    return float(low.low), float(high.high)


def outcome(ours: float, theirs: float) -> float:
    """1 if ours is the better, 0 if theirs is, 0.5 for a tie."""
    return 0.5 * ((ours > theirs) + (ours >= theirs))


def win_rate(outcomes: Sequence[float], groups: Sequence[Hashable]) -> dict[str, float | None]:
    """How often one side wins, averaged over prompts.

    Wilson's interval is for independent pairs, so it serves where each prompt has one. Several pairs for a prompt
    resemble each other: then it is that of `interval_over_prompts`, within 0 and 1.

    Args:
        outcomes: 1 (won), 0.5 (tied) or 0 (lost) for each pair.
        groups: the prompt of each pair.

    Returns:
        {rate, low, high, wins, ties, losses, error_over_prompts}: a rate in [0, 1] with its interval of 95%, the counts
        behind it, and its standard error; None where a single prompt leaves it unknown.

    Raises:
        ValueError: if there is no outcome, or not one group for each.

    >>> rate = win_rate([1, 1, 0.5, 0], range(4))
    >>> rate["rate"], rate["wins"], rate["ties"], rate["losses"]
    (0.625, 2, 1, 1)
    """
    rate, error = mean_and_error(outcomes, groups)
    counts = {name: list(outcomes).count(value) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))}
    won, prompts = counts["wins"] + counts["ties"] / 2, len(set(groups))
    if prompts == len(groups):
        low, high = wilson(won, prompts)
    else:
        low, high = map(float, np.clip(interval_over_prompts(outcomes, groups), 0, 1))
    if low == high:  # no two prompts differ
        low, high = wilson(rate * prompts, prompts)
    return {"rate": rate, "low": _known(low), "high": _known(high), **counts, "error_over_prompts": _known(error)}


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


class FrontierPoint(NamedTuple):
    """The best expected reward at a KL (nats per text), and the effective sample size behind it, of a prompt."""

    beta: float
    reward: float
    kl: float
    effective_samples: float


def rlhf_frontier(
    rewards: np.ndarray, betas: Sequence[float], least: float = 50.0, learned: np.ndarray | None = None
) -> list[FrontierPoint]:
    """The RLHF policies of a reward, one per beta, estimated from samples of the reference; no policy does better.

        w_n = exp(beta R_n) / sum_m exp(beta R_m)        reward = sum_n w_n R_n        KL = sum_n w_n log(N w_n)

    each averaged over prompts; so the mean of log Z(prompt) = log E_ref[exp(beta R)] is beta reward - KL. It comes out
    too small by about (1/E - 1/N) / 2 nats, where E = 1 / sum_n w_n^2 is the effective sample size of a prompt: more
    prompts do not help, and E is averaged harmonically over them.

    Args:
        rewards: (prompts, N) rewards R of N samples for each prompt.
        least: points with fewer effective samples per prompt are left out.
        learned: another reward of the same samples, whose RLHF policies these are to be: it stands in the weights.

    >>> [round(point.reward, 6) for point in rlhf_frontier(np.array([[0.0, 1.0] * 600]), [0.0, 1.0])]  # sigmoid(beta)
    [0.5, 0.731059]
    """
    points, pursued = [], rewards if learned is None else learned
    for beta in betas:
        log_weights = beta * pursued - logsumexp(beta * pursued, axis=1, keepdims=True)
        weights = np.exp(log_weights)
        reward = (weights * rewards).sum(1).mean()
        kl = (weights * (log_weights + math.log(rewards.shape[1]))).sum(1).mean()
        points.append(FrontierPoint(beta, float(reward), float(kl), float(1 / (weights**2).sum(1).mean())))
    return [point for point in points if point.effective_samples >= least]
