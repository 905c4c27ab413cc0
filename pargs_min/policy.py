"""The equation: how a reference model and a reward of prefixes make one next-token distribution."""

import torch
from torch import Tensor


def guided_log_probs(ref_log_probs: Tensor, prefix_rewards: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the tokenwise reward-guided policy over the candidates of one step.

        pi(t | prefix) = pi_ref(t | prefix) * exp(beta * r(prefix + t)) / Z(prefix)

    A `temperature` divides the whole sum, `(log pi_ref + beta * r) / temperature`, as a sampler's temperature would;
    the paper's policy is `temperature=1`. Adding a constant to a row of either input changes nothing, so raw logits
    work as well as log-probabilities, and the reward matters only up to a constant per prefix.

    Args:
        ref_log_probs: (..., K) log pi_ref of each candidate, in nats; -inf where the reference never goes.
        prefix_rewards: (..., K) r(prefix + candidate), in the reward model's own unit.
        beta: weight of the reward, in nats per unit of reward. It is the inverse of the KL coefficient of RLHF, which
            DPO and TRL call beta.
        temperature: > 0.

    Returns:
        (..., K) normalised log-probabilities in nats, in float32 or wider.

    Raises:
        ValueError: if `beta` is not finite or `temperature` is not a positive number, in the dtype of the result.

    Source: arXiv 2406.07780, the tokenwise policy that the paper shows to be a ratio of two RLHF policies.

    >>> ref = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> guided_log_probs(ref, torch.tensor([0.0, 1.0, 0.0]), beta=1.0).exp()
    tensor([0.3299, 0.5381, 0.1320])
    """
    dtype = torch.promote_types(torch.promote_types(ref_log_probs.dtype, prefix_rewards.dtype), torch.float32)
    limits = torch.finfo(dtype)
    if not abs(beta) <= limits.max:
        raise ValueError(f"beta must be a finite number of {dtype}, got {beta}")
    if not limits.tiny <= temperature <= limits.max:
        raise ValueError(
            f"temperature must be a positive number of {dtype}, got {temperature} (for the argmax use draw=greedy)"
        )
    return ((ref_log_probs.to(dtype) + beta * prefix_rewards.to(dtype)) / temperature).log_softmax(-1)


def top_k_candidates(ref_log_probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k tokens that the reference finds most likely: the only ones whose reward is asked for.

    Args:
        ref_log_probs: (B, V) log pi_ref over the vocabulary, in nats.
        top_k: number of candidates K, 1 <= K <= V; 0 takes the whole vocabulary.

    Returns:
        `(log_probs, candidates)`, both (B, K): log pi_ref of the candidates, not renormalised, and their token ids;
        most likely first, or in id order when `top_k=0`.

    Raises:
        ValueError: if `top_k` is negative or larger than the vocabulary.

    Source: arXiv 2406.07780, the decoding algorithm (k candidates per step).

    >>> top_k_candidates(torch.tensor([[0.2, 0.5, 0.3]]).log(), top_k=2)[1]
    tensor([[1, 2]])
    """
    vocabulary = ref_log_probs.shape[-1]
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"top_k must lie between 1 and the vocabulary size {vocabulary} (0 takes all), got {top_k}")
    if top_k == 0:
        return ref_log_probs, torch.arange(vocabulary, device=ref_log_probs.device).expand_as(ref_log_probs)
    return ref_log_probs.topk(top_k, -1)
