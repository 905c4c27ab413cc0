"""The named methods, in one table: each calls the loop once; best-of-n and smc then choose among its rows.

Whoever needs to know something of a method (what trains its reward, how its KL is known) reads it here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pargs_min.decode import (
    Draw,
    Generation,
    NoReward,
    PolicyStepper,
    RewardScorer,
    generate,
    greedy,
    response_rewards,
    sample,
)
from pargs_min.scoring import RewardFn, WinTilt
from pargs_min.smc import smc


def no_reward(ids: Tensor, mask: Tensor) -> Tensor:
    """The reward of whole texts where there is no reward model. Raises ValueError."""
    raise ValueError("this method needs a reward model")


@dataclass(frozen=True)
class Setup:
    """What a method writes with: the same for every batch of a run."""

    policy: PolicyStepper
    settings: dict[str, Any]  # of `generate`: the candidates, max_new_tokens, temperature, eos, on_step
    beta: float = 0.0
    scorer: RewardScorer = field(default_factory=NoReward)  # reward of prefixes
    reward_fn: RewardFn = no_reward  # reward of whole texts
    rows: int = 1  # behind each response
    final: RewardFn | None = None  # what smc weighs whole texts by; None takes reward_fn


class Batch(NamedTuple):
    """A batch of B prompts, and the random numbers for one response to each."""

    prompt_ids: Tensor  # (B, P), padded on the left
    mask: Tensor
    uniforms: Tensor  # (B * rows, N), the rows of a prompt together
    choices: Tensor  # (B, N + 1), by which smc chooses among particles


def as_is(scorer: RewardScorer, beta: float) -> tuple[RewardScorer, float]:
    """Most methods tilt the reference by beta times the reward."""
    return scorer, beta


def by_win_rate(scorer: RewardScorer, eta: float) -> tuple[RewardScorer, float]:
    """`win` tilts by what `WinTilt` makes of the logit of a win rate."""
    return WinTilt(scorer, eta), 1.0


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    does: str
    write: Callable[["Method", Setup, Batch], tuple[Generation, Tensor]]  # B responses, and the (B,) kl of each in nats
    guided: bool = False  # the reward enters at every token
    draw: Draw = sample
    objective: str | None = None  # what its reward model must be trained with; None: any will do
    rows: str | None = None  # the setting that says how many rows are written for each response
    kl: Callable[[Generation, int], Tensor] | None = None  # from the paths of n rows; None: `write` alone knows
    tilt: Callable[[RewardScorer, float], tuple[RewardScorer, float]] = as_is  # (scorer, beta) -> those of the loop
    bound: str | None = None  # its kl is an upper bound in the mean, by this much; None: it is the divergence itself

    @property
    def greedy(self) -> bool:
        """Whether it can write only one text for a prompt."""
        return self.draw is greedy

    @property
    def needs_reward(self) -> bool:
        return self.guided or self.rows is not None


# ---- how the KL of a response is known: (B,) nats whose mean over responses estimates the divergence ----


def sampled_kl(generation: Generation, n: int = 1) -> Tensor:
    """sum_i log pi(y_i | y_<i) - log pi_ref(y_i | y_<i); 0 for the reference itself, but not for its top k."""
    return (generation.log_probs - generation.ref_log_probs).sum(-1)


def greedy_kl(generation: Generation, n: int = 1) -> Tensor:
    """-sum_i log pi_ref(y_i | y_<i): the divergence of a policy that can write nothing else."""
    return -generation.ref_log_probs.sum(-1)


def selected_kl(generation: Generation, n: int = 1) -> Tensor:
    """log n - (n - 1) / n more than that of a sample: an upper bound (Beirami et al., arXiv 2401.01879)."""
    return sampled_kl(generation) + math.log(n) - (n - 1) / n


def path_kl(method: str, generation: Generation, n: int = 1) -> Tensor:
    """(B,) KL estimates in nats of each response, from the untruncated reference, by the rule of its method.

    Raises:
        ValueError: for smc, whose paths do not tell.
    """
    if (kl := METHODS[method].kl) is None:
        raise ValueError(f"the paths of {method} do not tell its divergence: take the kl that `{method}` returns")
    return kl(generation, n)


# ---- the methods ----


def plain(policy: PolicyStepper, prompt_ids: Tensor, mask: Tensor, **settings) -> Generation:
    """Samples of the reference; `settings` are those of `generate`."""
    return generate(policy, None, prompt_ids, mask, beta=0.0, **settings)


def guided(
    method: str,
    policy: PolicyStepper,
    reward: RewardScorer,
    prompt_ids: Tensor,
    mask: Tensor,
    *,
    beta: float,
    **settings,
) -> Generation:
    """PARGS, ARGS, controlled decoding, ...: what the guide was trained on tells which, not the loop.

    Raises:
        ValueError: if `method` is none of these.
    """
    if method not in (names := [name for name in GUIDED if METHODS[name].rows is None]):
        raise ValueError(f"method must be one of {', '.join(names)}, got {method!r}")
    reward, beta = METHODS[method].tilt(reward, beta)
    return generate(policy, reward, prompt_ids, mask, beta=beta, draw=METHODS[method].draw, **settings)


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
    return Generation(*(getattr(samples, column.name)[best] for column in fields(samples)))


def _plain(method: Method, setup: Setup, batch: Batch) -> tuple[Generation, Tensor]:
    generation = plain(setup.policy, batch.prompt_ids, batch.mask, uniforms=batch.uniforms, **setup.settings)
    return generation, path_kl(method.name, generation)


def _guided(method: Method, setup: Setup, batch: Batch) -> tuple[Generation, Tensor]:
    settings = setup.settings | dict(beta=setup.beta, uniforms=batch.uniforms)
    generation = guided(method.name, setup.policy, setup.scorer, batch.prompt_ids, batch.mask, **settings)
    return generation, path_kl(method.name, generation)


def _best_of_n(method: Method, setup: Setup, batch: Batch) -> tuple[Generation, Tensor]:
    settings = setup.settings | dict(n=setup.rows, uniforms=batch.uniforms)
    generation = best_of_n(setup.policy, setup.reward_fn, batch.prompt_ids, batch.mask, **settings)
    return generation, path_kl(method.name, generation, setup.rows)


def _smc(method: Method, setup: Setup, batch: Batch) -> tuple[Generation, Tensor]:
    final = setup.final or setup.reward_fn
    settings = setup.settings | dict(n=setup.rows, beta=setup.beta, final=final, uniforms=batch.uniforms)
    particles = smc(setup.policy, setup.scorer, batch.prompt_ids, batch.mask, choices=batch.choices[:, :-1], **settings)
    return particles.pick(batch.choices[:, -1])


SAMPLED: dict[str, Any] = dict(write=_guided, guided=True, draw=sample, kl=sampled_kl)
GREEDY: dict[str, Any] = dict(write=_guided, guided=True, draw=greedy, kl=greedy_kl)
TABLE = (
    Method("plain", "the reference itself", write=_plain, kl=sampled_kl),
    Method("pargs", "guided by a reward model of prefixes, sampled (arXiv 2406.07780)", objective="partial", **SAMPLED),
    Method("pargs-greedy", "the same, always the most likely candidate", objective="partial", **GREEDY),
    Method("args", "guided by a full-sequence reward model, sampled", objective="full", **SAMPLED),
    Method("args-greedy", "the same, always the most likely candidate (arXiv 2402.01694)", objective="full", **GREEDY),
    Method("cd", "guided by a value model: controlled decoding (arXiv 2310.17022)", objective="value", **SAMPLED),
    Method("soft", "guided by a soft value model, whose optimum is the RLHF policy", objective="soft", **SAMPLED),
    Method("reweighted", "the same, by a language model of reweighted texts", objective="reweighted", **SAMPLED),
    Method("win", "guided by a model of win rates; beta is eta", objective="win", tilt=by_win_rate, **SAMPLED),
    Method("genarm", "autoregressive reward model (arXiv 2410.08193)", objective="autoregressive", **SAMPLED),
    Method("farma", "vocabulary-headed reward model (arXiv 2502.04517)", objective="farma", **SAMPLED),
    Method("implicit", "guided by the implicit reward of a model fine-tuned by DPO", objective="dpo", **SAMPLED),
    Method(
        "best-of-n",
        "n samples of the reference, the best by a reward of whole texts",
        write=_best_of_n,
        rows="n",
        kl=selected_kl,
        bound="log n - (n - 1)/n more than that of its samples",
    ),
    Method(
        "smc",
        "particles guided like pargs, resampled towards the RLHF policy of whole texts (`smc.py`)",
        write=_smc,
        guided=True,
        rows="particles",
        bound="what all its particles tell, not the text alone",
    ),
)
METHODS = {method.name: method for method in TABLE}
GUIDED = tuple(method.name for method in TABLE if method.guided)
BOUNDED = tuple(method.name for method in TABLE if method.bound)
FINE_TUNED = ("dpo", "ppo")  # language models of `baselines/`, which write as `plain` does

# What a guide is, by the objective it was trained with.
OBJECTIVES = {
    "partial": "a reward model of prefixes",
    "full": "a reward model of whole responses (whose scores of prefixes mean nothing)",
    "value": "a value model",
    "soft": "a soft value model",
    "win": "a model of win rates",
    "farma": "a vocabulary-headed reward model (FaRMA)",
    "reweighted": "a language model of reweighted texts",
    "autoregressive": "an autoregressive reward model (GenARM)",
    "dpo": "a language model fine-tuned by DPO",
}


def guided_by(objective: str) -> str:
    """The name of the sampling method that uses a reward model trained with this objective.

    >>> guided_by("partial")
    'pargs'
    """
    return next(method.name for method in TABLE if method.objective == objective)
