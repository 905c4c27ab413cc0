"""Sequential Monte Carlo: the same loop with n particles per prompt, which approach the RLHF policy as n grows.

The tokenwise policy follows the partial reward from token to token, so its texts do not follow the RLHF policy of whole
texts. The difference is a weight that the loop already has: after the prefix a,

    gamma(at) / (gamma(a) pi(t | a)) = Z(a) exp(-beta r(a)),   gamma(a) = pi_ref(a) exp(beta r(a)),

whatever the token t. When the weights of a prompt's particles have drifted apart, the particles are resampled in
proportion to them before they draw; at the end, exp(beta (R(y) - r(y))) replaces the partial reward by the reward R
of the whole text. No further training is needed. With an R of its own, r need not be good: it only decides how many
particles are enough. Without one, R is r.

Source: twisted sequential Monte Carlo, Zhao et al. (2024), arXiv 2404.17546; the weight is the normaliser of the ratio
of two RLHF policies in arXiv 2406.07780 (`theory/`, T2 and T10).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pargs_min.decode import Generation, PolicyStepper, RewardScorer, Step, generate, greedy, response_rewards, sample
from pargs_min.scoring import RewardFn

# (B, n) log-weights, (B,) uniforms -> (B, n) particles to go on from; each is chosen n times its weight on average
Resampler = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Particles:
    """B prompts with n weighted responses each."""

    generation: Generation  # B * n rows, those of a prompt together; `log_probs` are of the tokenwise policy
    log_weights: Tensor  # (B, n) in nats, normalised
    log_evidence: Tensor  # (B,) in nats; its exp is an unbiased estimate of Z = E_ref[exp(beta * R)]
    kl: Tensor  # (B, n) beta * R - log_evidence, in nats, see `smc`

    def pick(self, uniforms: Tensor) -> tuple[Generation, Tensor]:
        """One response per prompt, drawn by weight with (B,) uniforms: (B rows, their (B,) kl)."""
        n = self.log_weights.shape[1]
        rows = sample(self.log_weights, uniforms) + n * torch.arange(len(uniforms), device=uniforms.device)
        return Generation(*(column[rows] for column in self.generation)), self.kl.flatten()[rows]


def systematic(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Resample with one uniform per prompt: particle k is chosen floor(n w_k) or ceil(n w_k) times, n w_k on average.

    Args:
        log_weights: (B, n) in nats, need not be normalised.
        uniforms: (B,) in [0, 1).

    Returns:
        (B, n) the particle that each particle goes on from.

    Source: Carpenter, Clifford and Fearnhead (1999).

    >>> systematic(torch.tensor([[0.1, 0.6, 0.3]]).log(), torch.tensor([0.5]))
    tensor([[1, 1, 2]])
    """
    n = log_weights.shape[1]
    shares = log_weights.double().softmax(-1).cumsum(-1)
    points = (torch.arange(n, device=uniforms.device) + uniforms[:, None].double()) / n
    below = torch.nextafter(shares[:, -1:], torch.zeros_like(shares[:, -1:]))  # rounding may reach the end
    return torch.searchsorted(shares, torch.minimum(points, below), right=True)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(B,) of (B, n): (sum_k w_k)^2 / sum_k w_k^2, between 1 (one particle has all the weight) and n (all alike).

    Source: Kong, Liu and Wong (1994).

    >>> effective_sample_size(torch.tensor([[1.0, 1.0, 0.0]]).log())
    tensor([2.])
    """
    return torch.exp(2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1))


def smc(
    policy: PolicyStepper,
    reward: RewardScorer,
    prompt_ids: Tensor,
    mask: Tensor,
    *,
    n: int,
    beta: float,
    final: RewardFn | None = None,
    threshold: float = 0.5,
    choices: Tensor | None = None,
    resampler: Resampler = systematic,
    temperature: float = 1.0,
    on_step: Callable[[Step], None] | None = None,
    **settings,
) -> Particles:
    """n particles per prompt, which sample pi(y) proportional to pi_ref(y) exp(beta R(y)) as n grows.

    A token that is no candidate counts as one with the candidates' certainty equivalent (`keep_rest`), which changes
    the targets along the way and not the last one. With `truncate` pi_ref is the reference restricted to the responses
    all of whose tokens are candidates. A response that was cut at `max_new_tokens` counts as it stands. A particle that
    has ended keeps its weight.

    The `kl` of a response, beta * R(y) - log_evidence, is in the mean over responses (drawn by weight) an upper bound
    of the divergence of what is written from the untruncated reference. Let h be all that is drawn besides y: the other
    particles, their ancestors, which of them y is. With Q(h, y) the law of the whole run, and S(h | y) that of a run in
    which one particle is made to be y (conditional SMC),

        log Q(h, y) / (pi_ref(y) S(h | y)) = beta R(y) - log_evidence = kl
        E_Q[kl] = KL(Q || pi_ref S) = KL(Q(y) || pi_ref(y)) + E_Q[KL(Q(h | y) || S(h | y))] >= KL(Q(y) || pi_ref(y))

    The bound is attained with one particle, where h is empty and kl the path's log-ratio, and in the limit of many.
    Source of the first line: the extended target of particle Markov chain Monte Carlo, Andrieu, Doucet and Holenstein
    (2010); the second is the chain rule.

    Args:
        n: particles per prompt; one particle is PARGS.
        beta: weight of both rewards, in nats per unit of reward.
        final: R, reward of whole texts; None takes the partial reward of the finished response, which is known if all
            tokens are candidates, or `truncate` is set.
        threshold: resample the particles of a prompt when their effective number falls below this fraction of n;
            0 never, above 1 at every step.
        choices: (B, N) uniforms for resampling, a prompt and step each; by default torch's global stream.
        on_step: as in `generate`; a row goes on from another one where it is resampled.
        settings: others of `generate`; `uniforms`, where given, are (B * n, N), the n rows of a prompt together.

    Raises:
        ValueError: if n < 1, `threshold` is negative, `temperature` is not 1, which has no such target, `draw` is
            greedy, `choices` has another shape, or `final` is None where rewards of finished responses are not known.
        FloatingPointError: as `generate`, or if the weights of a prompt are not numbers.
    """
    if n < 1:
        raise ValueError(f"n (particles) must be at least 1, got {n}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be a fraction of the particles, at least 0, got {threshold}")
    if temperature != 1:
        raise ValueError(f"temperature must be 1 for smc, whose weights are those of temperature 1, got {temperature}")
    if settings.get("draw") is greedy:
        raise ValueError("draw must sample (leave it out), not be greedy: the weights are those of sampled particles")
    truncate = settings.get("truncate", False)
    if final is None and not truncate and (settings["top_k"] or settings.get("min_ref_prob")):
        raise ValueError("final, the reward of whole texts, is needed where some tokens are no candidates")
    shape = len(prompt_ids), settings["max_new_tokens"]
    if choices is None:
        choices = torch.rand(shape)
    if choices.shape != shape:
        raise ValueError(f"choices must be {shape}, a prompt and step each, got {tuple(choices.shape)}")
    prompt_ids, mask = prompt_ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    weights = _Weights(beta, n, threshold, choices.to(prompt_ids.device), resampler, truncate)

    def drawn(step: Step) -> None:
        weights.drawn(step)
        if on_step is not None:
            on_step(step)

    settings |= dict(beta=beta, resample=weights.resample, on_step=drawn)
    generation = generate(policy, reward, prompt_ids, mask, **settings)
    tilts = weights.tilts
    if final is not None:
        tilts = beta * response_rewards(final, prompt_ids, mask, generation).double()
        weights.log_weights += (tilts - weights.tilts).view(-1, n)
    log_evidence = weights.log_evidence + weights.log_weights.logsumexp(-1) - math.log(n)
    if not log_evidence.isfinite().all():
        prompt = int((~log_evidence.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"prompt {prompt}: the weights of its particles are not numbers; beta may be too large"
        )
    kl = tilts.view(-1, n) - log_evidence[:, None]
    return Particles(generation, weights.log_weights.log_softmax(-1), log_evidence, kl)


class _Weights:
    """The two hooks of `generate`, in the order of a step: `resample` weighs the prefix a of each particle by Z(a)
    exp(-beta r(a)), with the beta r(a) that `drawn` remembered in the step before; then tokens are drawn, and `drawn`
    remembers it of the longer prefixes.

    log_weights (B, n) are since the last resampling; log_evidence (B,) holds what was resampled away.
    """

    def __init__(self, beta: float, n: int, threshold: float, choices: Tensor, resampler: Resampler, truncate: bool):
        self.beta, self.threshold, self.resampler, self.truncate = beta, threshold, resampler, truncate
        self.choices = iter(choices.unbind(1))
        self.log_weights = torch.zeros(len(choices), n, dtype=torch.float64, device=choices.device)
        self.log_evidence = torch.zeros_like(self.log_weights[:, 0])
        self.tilts = torch.zeros_like(self.log_weights).flatten()  # (B * n,) beta r(a); the empty response counts 0

    def resample(self, ref_log_probs: Tensor, rewards: Tensor, alive: Tensor) -> Tensor | None:
        log_z = (ref_log_probs.double() + self.beta * rewards.double()).logsumexp(-1)
        self.log_z = log_z if self.truncate else log_z - ref_log_probs.double().logsumexp(-1)
        increments = (self.log_z - self.tilts).where(alive, 0.0)
        self.log_weights = self.log_weights + increments.view_as(self.log_weights)
        batch, n = self.log_weights.shape
        uniforms = next(self.choices)
        apart = effective_sample_size(self.log_weights) < self.threshold * n
        if not apart.any():
            return None
        stay = torch.arange(n, device=apart.device).expand(batch, n)
        chosen = torch.where(apart[:, None], self.resampler(self.log_weights, uniforms), stay)
        rows = (chosen + n * torch.arange(batch, device=apart.device)[:, None]).flatten()
        mean = self.log_weights.logsumexp(-1) - math.log(n)
        self.log_evidence = self.log_evidence + mean.where(apart, 0.0)
        self.log_weights = self.log_weights.masked_fill(apart[:, None], 0.0)
        self.tilts, self.log_z = self.tilts[rows], self.log_z[rows]
        return rows

    def drawn(self, step: Step) -> None:
        tilts = self.beta * step.drawn.rewards.double()
        tilts = torch.where(tilts.isnan(), self.log_z, tilts)  # of a token that was no candidate
        self.tilts = tilts.where(step.alive, self.tilts)
