"""The named methods: each is one call of `generate`, and they differ only in its arguments.

plain          the reference itself
pargs          guided by a reward model of prefixes, sampled (arXiv 2406.07780)
pargs-greedy   the same, always the most likely candidate
args           guided by a full-sequence reward model, sampled
args-greedy    the same, always the most likely candidate (arXiv 2402.01694)
cd             guided by a value model: controlled decoding (arXiv 2310.17022)
best-of-n      n samples of the reference, the best by a reward of whole texts
smc            particles guided like pargs and resampled towards the RLHF policy of whole texts (`smc.py`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from pargs_min.decode import Generation, PolicyStepper, RewardScorer, generate, greedy, sample

METHODS = ("plain", "pargs", "pargs-greedy", "args", "args-greedy", "cd", "best-of-n", "smc")
GUIDED = ("pargs", "pargs-greedy", "args", "args-greedy", "cd", "smc")

RewardFn = Callable[[Tensor, Tensor], Tensor]  # whole texts (N, T) and their mask -> (N,)


def plain(policy: PolicyStepper, prompt_ids: Tensor, mask: Tensor, **settings) -> Generation:
    """Samples of the reference; `settings` are those of `generate`."""
    return generate(policy, None, prompt_ids, mask, beta=0.0, **settings)


def guided(
    method: str, policy: PolicyStepper, reward: RewardScorer, prompt_ids: Tensor, mask: Tensor, **settings
) -> Generation:
    """PARGS, ARGS or controlled decoding: what the reward model was trained on tells which, not the loop.

    Raises:
        ValueError: if `method` is none of these.
    """
    if method not in (names := [name for name in GUIDED if name != "smc"]):
        raise ValueError(f"method must be one of {', '.join(names)}, got {method!r}")
    draw = greedy if method.endswith("-greedy") else sample
    return generate(policy, reward, prompt_ids, mask, draw=draw, **settings)


def best_of_n(
    policy: PolicyStepper, reward_fn: RewardFn, prompt_ids: Tensor, mask: Tensor, *, n: int, **settings
) -> Generation:
    """For each prompt the best of n samples of the reference, drawn as one batch of B * n rows.

    Args:
        reward_fn: reward of whole texts, see `pargs_min.scoring.model_rewards`.
        settings: those of `generate`; `uniforms`, where given, are (B * n, N), the n rows of a prompt together.

    Raises:
        ValueError: if n < 1.

    Source: Stiennon et al. (2020), arXiv 2009.01325.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    prompt_ids, mask = prompt_ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    samples = plain(policy, prompt_ids, mask, **settings)
    rewards = response_rewards(reward_fn, prompt_ids, mask, samples).view(-1, n)
    best = rewards.argmax(-1) + n * torch.arange(len(rewards), device=rewards.device)
    return Generation(*(getattr(samples, field.name)[best] for field in fields(samples)))


@torch.no_grad()
def response_rewards(reward_fn: RewardFn, prompt_ids: Tensor, mask: Tensor, generation: Generation) -> Tensor:
    """(B,) rewards of the whole responses, end token included, each behind its prompt.

    Raises:
        FloatingPointError: if a reward is not finite, with its row: nan would be the greatest of all.
    """
    tokens, lengths = generation.tokens, generation.lengths
    written = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    rewards = reward_fn(torch.cat([prompt_ids, tokens], 1), torch.cat([mask, written.to(mask.dtype)], 1))
    if not rewards.isfinite().all():
        raise FloatingPointError(f"row {int((~rewards.isfinite()).nonzero()[0])}: the reward of a text is not finite")
    return rewards


def path_kl(method: str, generation: Generation, n: int = 1) -> Tensor:
    """(B,) nats of each response from the untruncated reference; the mean over responses estimates the divergence.

    sampled      sum_i log pi(y_i | y_<i) - log pi_ref(y_i | y_<i)
    greedy       -sum_i log pi_ref(y_i | y_<i): the divergence of a policy that can write nothing else
    best-of-n    log n - (n - 1) / n more than that of a sample: an upper bound (Beirami et al., arXiv 2401.01879)

    Samples of the reference itself have none; those of its top k, or at a temperature, do.
    """
    if method == "smc":
        raise ValueError("the paths of smc do not tell its divergence: take the kl that `smc` returns")
    if method.endswith("-greedy"):
        return -generation.ref_log_probs.sum(-1)
    selection = math.log(n) - (n - 1) / n if method == "best-of-n" else 0.0
    return (generation.log_probs - generation.ref_log_probs).sum(-1) + selection
