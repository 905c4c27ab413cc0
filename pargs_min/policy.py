"""The equation: how a reference model and a reward of prefixes make one next-token distribution."""

import math

import torch
from torch import Tensor


def guided_log_probs(ref_log_probs: Tensor, prefix_rewards: Tensor, beta: float) -> Tensor:
    """Log-probabilities of the tokenwise reward-guided policy among the candidates of one step.

        pi(t | prefix) = pi_ref(t | prefix) * exp(beta * r(prefix + t)) / Z(prefix)

    Adding a constant to a row of either input changes nothing, so raw logits work as well as log-probabilities, and the
    reward matters only up to a constant per prefix.

    Args:
        ref_log_probs: (..., K) log pi_ref of each candidate, in nats; -inf where the reference never goes.
        prefix_rewards: (..., K) r(prefix + candidate), in the reward model's own unit.
        beta: weight of the reward, in nats per unit of reward. It is the inverse of the KL coefficient of RLHF, which
            DPO and TRL call beta.

    Returns:
        (..., K) normalised log-probabilities in nats, in float32 or wider.

    Raises:
        ValueError: if `beta` is not finite, in the dtype of the result.

    Source: arXiv 2406.07780, the tokenwise policy that the paper shows to be a ratio of two RLHF policies.

    >>> ref = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> guided_log_probs(ref, torch.tensor([0.0, 1.0, 0.0]), beta=1.0).exp()
    tensor([0.3299, 0.5381, 0.1320])
    """
    dtype = torch.promote_types(torch.promote_types(ref_log_probs.dtype, prefix_rewards.dtype), torch.float32)
    if not abs(beta) <= torch.finfo(dtype).max:
        raise ValueError(f"beta must be a finite number of {dtype}, got {beta}")
    return (ref_log_probs.to(dtype) + beta * prefix_rewards.to(dtype)).log_softmax(-1)


def top_k_candidates(ref_log_probs: Tensor, top_k: int, min_ref_prob: float = 0.0) -> tuple[Tensor, Tensor]:
    """The k tokens that the reference finds most likely: the only ones whose reward is asked for.

    Args:
        ref_log_probs: (B, V) log pi_ref over the vocabulary, in nats.
        top_k: number of candidates K, 1 <= K <= V; 0 takes the whole vocabulary.
        min_ref_prob: tokens less likely than this are no candidates; the most likely one always is.

    Returns:
        `(log_probs, candidates)`, both (B, K): log pi_ref, not renormalised, -inf for those that `min_ref_prob` rules
        out, and the token ids; most likely first, or in id order when `top_k=0`.

    Raises:
        ValueError: if `top_k` is negative or larger than the vocabulary, or `min_ref_prob` is not in [0, 1].

    Source: arXiv 2406.07780, the decoding algorithm (k candidates per step).

    >>> top_k_candidates(torch.tensor([[0.2, 0.5, 0.3]]).log(), top_k=2)[1]
    tensor([[1, 2]])
    >>> top_k_candidates(torch.tensor([[0.2, 0.5, 0.3]]).log(), top_k=2, min_ref_prob=0.4)[0].exp()
    tensor([[0.5000, 0.0000]])
    """
    vocabulary = ref_log_probs.shape[-1]
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"top_k must lie between 1 and the vocabulary size {vocabulary} (0 takes all), got {top_k}")
    if top_k == 0:
        log_probs = ref_log_probs
        candidates = torch.arange(vocabulary, device=ref_log_probs.device).expand_as(ref_log_probs)
    else:
        log_probs, candidates = ref_log_probs.topk(top_k, -1)
    return likely_enough(log_probs, min_ref_prob), candidates


def likely_enough(ref_log_probs: Tensor, min_ref_prob: float) -> Tensor:
    """(..., K) log pi_ref of candidates, in nats, with -inf for those less likely than `min_ref_prob`; the most likely
    one stays. Raises ValueError if that is no probability."""
    if not 0 <= min_ref_prob <= 1:
        raise ValueError(f"min_ref_prob must be a probability, from 0 to 1, got {min_ref_prob}")
    if min_ref_prob == 0:
        return ref_log_probs
    least = ref_log_probs.amax(-1, keepdim=True).clamp(max=math.log(min_ref_prob))
    return ref_log_probs.masked_fill(ref_log_probs < least, -torch.inf)


def worth_guiding(ref_log_probs: Tensor, guide_below: float) -> Tensor:
    """The rows where guidance can change something and the reference leaves enough open: the others keep beta = 0.

    A single candidate keeps the probability that the reference gives it, whatever its reward.

    Args:
        ref_log_probs: (B, K) of the candidates, in nats; -inf for those that are none after all (`top_k_candidates`).
        guide_below: P, 0 < P <= 1; rows are guided whose likeliest token is less likely than this. At 1, all rows that
            have a choice.

    Returns:
        (B,) booleans.

    Raises:
        ValueError: if `guide_below` is no such probability.

    Source: `theory/`, T17: with beta(a) >= 0 after each prefix a, guidance by a reward that orders siblings as their
    win rates do never loses to the reference.

    >>> worth_guiding(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.0]]).log(), guide_below=0.8)
    tensor([False,  True, False])
    """
    if not 0 < guide_below <= 1:
        raise ValueError(f"guide_below must be a probability, above 0 and at most 1, got {guide_below}")
    choice = (~ref_log_probs.isneginf()).sum(-1) > 1
    return choice & (ref_log_probs.amax(-1) < math.log(guide_below))


def keep_rest(ref_log_probs: Tensor, candidates: Tensor, log_probs: Tensor) -> Tensor:
    """The policy over the whole vocabulary: the candidates share the mass that the reference gives them.

        pi(t | prefix) = pi_ref(C | prefix) * pi_C(t | prefix)   for t in C,     pi_ref(t | prefix) for all other tokens

    So the number of candidates trades strength for cost: without any, this is the reference itself, and guidance by a
    reward that orders siblings as their win rates do never loses to it, whatever C is (T17). It is the equation over
    the whole vocabulary, where tokens outside C have the reward log E_{pi_ref(. | C)}[exp(beta * r)] / beta, the
    candidates' certainty equivalent. The most likely token is always a candidate.

    Args:
        ref_log_probs: (B, V) log pi_ref over the vocabulary, in nats.
        candidates: (B, K) token ids.
        log_probs: (B, K) log pi_C, normalised (`guided_log_probs`); -inf for those that are no candidates after all.

    Returns:
        (B, V) normalised log-probabilities in nats.

    Source: `theory/`, T17.

    >>> ref = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> keep_rest(ref, torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]).log()).exp()
    tensor([[0.2000, 0.6000, 0.2000]])
    """
    ref_log_probs = ref_log_probs.to(torch.promote_types(ref_log_probs.dtype, log_probs.dtype))
    theirs, out = ref_log_probs.gather(1, candidates), log_probs.isneginf()
    mass = theirs.masked_fill(out, -torch.inf).logsumexp(-1, keepdim=True)
    return ref_log_probs.scatter(1, candidates, torch.where(out, theirs, log_probs + mass))


def truncate_rest(ref_log_probs: Tensor, candidates: Tensor, log_probs: Tensor) -> Tensor:
    """The policy over the whole vocabulary as the paper has it: tokens that are no candidates are never drawn.

    Arguments and result are those of `keep_rest`.

    >>> truncate_rest(torch.zeros(1, 3), torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]).log()).exp()
    tensor([[0.2500, 0.7500, 0.0000]])
    """
    return torch.full_like(ref_log_probs, -torch.inf, dtype=log_probs.dtype).scatter(1, candidates, log_probs)


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities proportional to pi^(1/temperature), as a sampler's temperature makes them.

    Args:
        log_probs: (..., V) in nats.
        temperature: > 0; the paper's policy is `temperature=1`.

    Raises:
        ValueError: if `temperature` is not a positive number, in the dtype of `log_probs`.

    >>> tempered(torch.tensor([0.8, 0.2]).log(), 0.5).exp()
    tensor([0.9412, 0.0588])
    """
    limits = torch.finfo(log_probs.dtype)
    if not limits.tiny <= temperature <= limits.max:
        raise ValueError(
            f"temperature must be a positive number of {log_probs.dtype}, got {temperature} (for the argmax use "
            "draw=greedy)"
        )
    return log_probs if temperature == 1 else (log_probs / temperature).log_softmax(-1)
