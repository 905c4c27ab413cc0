"""The named methods, in one table: each calls the loop once; best-of-n and smc then choose among its rows.

Whoever needs to know something of a method (what trains its reward, how its KL is known) reads it here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pargs_min.decode import Draw, Generation, PolicyStepper, RewardScorer, generate, greedy, response_rewards, sample
from pargs_min.scoring import RewardFn, WinTilt
from pargs_min.smc import smc


@dataclass(frozen=True)
class Setup:
    """What a method writes with: the same for every batch of a run."""

    policy: PolicyStepper
    settings: dict[str, Any]  # of `generate`: the candidates, max_new_tokens, temperature, eos, on_step
    beta: float = 0.0
    scorer: RewardScorer | None = None  # reward of prefixes
    reward_fn: RewardFn | None = None  # reward of whole texts
    rows: int = 1  # behind each response


class Batch(NamedTuple):
    """A batch of B prompts, and the random numbers for one response to each."""

    prompt_ids: Tensor  # (B, P), padded on the left
    mask: Tensor
    uniforms: Tensor  # (B * rows, N), the rows of a prompt together
    choices: Tensor  # (B, N + 1), by which smc chooses among particles


# ---- how the KL of a response is known: (B,) nats whose mean over responses estimates the divergence ----


def sampled_kl(generation: Generation) -> Tensor:
    """sum_i log pi(y_i | y_<i) - log pi_ref(y_i | y_<i); 0 for the reference itself, but not for its top k."""
    return (generation.log_probs - generation.ref_log_probs).sum(-1)


def greedy_kl(generation: Generation) -> Tensor:
    """-sum_i log pi_ref(y_i | y_<i): the divergence of a policy that can write nothing else."""
    return -generation.ref_log_probs.sum(-1)


# ---- how texts are written: B responses, and the (B,) kl of each in nats ----

Written = tuple[Generation, Tensor]


def tokenwise(method: "Method", setup: Setup, batch: Batch) -> Written:
    """One call of the loop. What the guide was trained on tells PARGS, ARGS, controlled decoding, ... apart."""
    reward, beta = method.tilt(setup.scorer, setup.beta)
    settings = setup.settings | dict(beta=beta, draw=method.draw, uniforms=batch.uniforms)
    generation = generate(setup.policy, reward, batch.prompt_ids, batch.mask, **settings)
    return generation, method.kl(generation)


def best_of_n(method: "Method", setup: Setup, batch: Batch) -> Written:
    """For each prompt the best of n samples of the reference, drawn as one batch of B * n rows.

    Its kl is log n - (n - 1) / n more than that of the sample: an upper bound (Beirami et al., arXiv 2401.01879).

    Source: Stiennon et al. (2020), arXiv 2009.01325.
    """
    n = setup.rows
    prompt_ids, mask = batch.prompt_ids.repeat_interleave(n, 0), batch.mask.repeat_interleave(n, 0)
    samples = generate(setup.policy, None, prompt_ids, mask, beta=0.0, uniforms=batch.uniforms, **setup.settings)
    rewards = response_rewards(cast("RewardFn", setup.reward_fn), prompt_ids, mask, samples).view(-1, n)
    best = rewards.argmax(-1) + n * torch.arange(len(rewards), device=rewards.device)
    generation = Generation(*(column[best] for column in samples))
    return generation, sampled_kl(generation) + math.log(n) - (n - 1) / n


def by_smc(method: "Method", setup: Setup, batch: Batch) -> Written:
    """For each prompt one of n particles, drawn by weight (`smc`)."""
    settings = setup.settings | dict(n=setup.rows, beta=setup.beta, final=setup.reward_fn, uniforms=batch.uniforms)
    scorer = cast("RewardScorer", setup.scorer)
    particles = smc(setup.policy, scorer, batch.prompt_ids, batch.mask, choices=batch.choices[:, :-1], **settings)
    return particles.pick(batch.choices[:, -1])


# ---- the table ----


Tilt = Callable[[Any, float], tuple[Any, float]]  # (scorer, beta) -> those of the loop


def as_is(scorer: RewardScorer | None, beta: float) -> tuple[RewardScorer | None, float]:
    """Most methods tilt the reference by beta times the reward."""
    return scorer, beta


def by_win_rate(scorer: RewardScorer, eta: float) -> tuple[RewardScorer, float]:
    """`win` tilts by what `WinTilt` makes of the logit of a win rate."""
    return WinTilt(scorer, eta), 1.0


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    write: Callable[["Method", Setup, Batch], Written] = tokenwise
    guided: bool = False  # the reward enters at every token
    draw: Draw = sample
    objective: str | None = None  # what its reward model must be trained with; None: any will do
    rows: str | None = None  # the setting that says how many rows are written for each response
    kl: Callable[[Generation], Tensor] = sampled_kl  # of what `tokenwise` writes, from its path
    tilt: Tilt = as_is
    bound: str | None = None  # its kl is an upper bound in the mean, by this much; None: it is the divergence itself

    @property
    def greedy(self) -> bool:
        """Whether it can write only one text for a prompt."""
        return self.draw is greedy

    @property
    def needs_reward(self) -> bool:
        return self.guided or self.rows is not None


GREEDY: dict[str, Any] = dict(guided=True, draw=greedy, kl=greedy_kl)
TABLE = (
    Method("plain"),  # the reference itself
    Method("pargs", objective="partial", guided=True),  # arXiv 2406.07780
    Method("pargs-greedy", objective="partial", **GREEDY),  # always the most likely candidate
    Method("args", objective="full", guided=True),
    Method("args-greedy", objective="full", **GREEDY),  # arXiv 2402.01694
    Method("cd", objective="value", guided=True),  # controlled decoding, arXiv 2310.17022
    Method("soft", objective="soft", guided=True),  # whose optimum is the RLHF policy, as is the next one's
    Method("reweighted", objective="reweighted", guided=True),
    Method("win", objective="win", tilt=by_win_rate, guided=True),  # its beta is eta
    Method("genarm", objective="autoregressive", guided=True),  # arXiv 2410.08193
    Method("farma", objective="farma", guided=True),  # arXiv 2502.04517
    Method("implicit", objective="dpo", guided=True),  # the implicit reward of a model fine-tuned by DPO
    Method("best-of-n", write=best_of_n, rows="n", bound="log n - (n - 1)/n more than that of its samples"),
    Method("smc", write=by_smc, guided=True, rows="particles", bound="what all its particles tell, not the text alone"),
)
METHODS = {method.name: method for method in TABLE}
BOUNDED = tuple(method.name for method in TABLE if method.bound)
FINE_TUNED = ("dpo", "ppo")  # language models of `baselines/`, which write as `plain` does


def guided_by(objective: str) -> str:
    """The name of the sampling method that uses a reward model trained with this objective.

    >>> guided_by("partial")
    'pargs'
    """
    return next(method.name for method in TABLE if method.objective == objective)
