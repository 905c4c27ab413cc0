"""The tokenwise loop: for every token one pass of the language model, one of the reward model, and one draw.

The loop takes functions, not models: a *policy stepper* for the language model (`ModelPolicy`), a *reward scorer* for
the reward model (`pargs_min.scoring`), and a *draw*. Tables of a tiny world work as well as networks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pargs_min.policy import guided_log_probs, keep_rest, tempered, top_k_candidates, truncate_rest, worth_guiding
from pargs_min.reward_model import read, token_positions, widened
from pargs_min.scoring import CachedText, RewardFn

CHECK_EVERY = 16  # steps between two checks, on a GPU, for impossible numbers and for rows that have ended
NEVER = 2**31


class PolicyStepper(Protocol):
    """The reference, one step at a time: `log_probs` and `push`, once each, in that order.

    `select(rows)` is called only where rows are resampled, before `push`: row i goes on from what row rows[i] has read.
    The reward scorer has it, too.
    """

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None: ...
    def log_probs(self) -> Tensor: ...  # (B, V)
    def push(self, tokens: Tensor) -> None: ...  # (B,)
    def select(self, rows: Tensor) -> None: ...  # (B,)


class RewardScorer(Protocol):
    """The reward of prefixes, one step at a time: `score` and `push`, once each, in that order.

    With `guide_below` some steps are pushed without having been scored.
    """

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None: ...
    def score(self, candidates: Tensor, ref_log_probs: Tensor) -> Tensor: ...  # (B, K) each -> (B, K)
    def push(self, tokens: Tensor) -> None: ...  # (B,)
    def select(self, rows: Tensor) -> None: ...  # (B,)


Draw = Callable[[Tensor, Tensor], Tensor]  # (B, V) log-probabilities, (B,) uniforms -> (B,) token ids
# (B, K) ref_log_probs and rewards of the candidates, (B,) alive -> (B,) the row each row goes on from; None: its own
Resample = Callable[[Tensor, Tensor, Tensor], Tensor | None]


def sample(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from each row by inverting its distribution function at one uniform number.

    What has no probability is not drawn, even where sums that are taken in parallel, on a GPU, fall by a rounding.

    >>> sample(torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log(), torch.tensor([0.2, 0.3]))
    tensor([0, 1])
    """
    probs = log_probs.exp()
    below, possible = probs.cumsum(-1), probs > 0
    total = below[:, -1:]
    point = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # it may round up
    beyond = possible & (below > point)
    last = possible.shape[1] - 1 - possible.flip(1).int().argmax(1)
    return beyond.int().argmax(1).where(beyond.any(1), last)


def greedy(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """The most likely token of each row, which is always a candidate; `uniforms` is not read."""
    return log_probs.argmax(-1)


def row_uniforms(seed: int, prompts: Iterable[int], samples: Iterable[int], steps: int) -> Tensor:
    """(B, steps) uniform numbers in [0, 1), one stream for each (seed, prompt number, sample number).

    A text then depends on its own numbers alone, not on its batch, the other samples, or the length of the run.

    >>> bool((row_uniforms(0, [3, 4], [1, 1], 8)[1, :5] == row_uniforms(0, [4], [1], 5)[0]).all())
    True

    Raises:
        ValueError: if `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    streams = [np.random.default_rng([seed, *row]) for row in zip(prompts, samples, strict=True)]
    return torch.from_numpy(np.stack([stream.random(steps) for stream in streams]))


class ModelPolicy(CachedText):
    """A causal language model of transformers as a policy stepper, with its own key-value cache.

    Args:
        model: a causal language model in evaluation mode.
        vocabulary: number of token ids that the tokenizer knows, where the model has more rows: many models pad their
            embedding to a round number, and the extra rows mean nothing.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None):
        super().__init__(model, model)
        self.vocabulary = vocabulary

    def log_probs(self) -> Tensor:
        """(B, V) log pi_ref of the next token in nats, in float32 or wider."""
        return self.next_log_probs(self.vocabulary)


@dataclass(frozen=True)
class Warp:
    """How users of a reference sample it, in the order of transformers' own warpers; the defaults change nothing.

    Raises:
        ValueError: naming the number that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 < self.temperature < float("inf"), "a positive number"),
            "top_k": (self.top_k >= 0, "at least 1, or 0 for all tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (right, wanted) in ranges.items():
            if not right:
                raise ValueError(f"ref_{name} must be {wanted}, got {getattr(self, name)}")

    def __call__(self, log_probs: Tensor) -> Tensor:
        """(N, V) log-probabilities of what the users draw from, normalised, in nats.

        >>> Warp(top_k=2)(torch.tensor([[0.2, 0.5, 0.3]]).log()).exp()
        tensor([[0.0000, 0.6250, 0.3750]])
        """
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers(torch.empty(0), log_probs).log_softmax(-1) if warpers else log_probs


def recorded_warp(reference: Mapping, source: str) -> Warp:
    """The warp that a text or a guide says it is for; nothing said is no warp. Raises ValueError with the source."""
    try:
        return Warp(**reference)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: `reference` says how the reference was sampled, and this cannot be: {error}"
        ) from None


class WarpedPolicy:
    """A policy stepper, sampled as `warp` says: the reference is then this distribution, and so is that of KLs."""

    def __init__(self, policy: PolicyStepper, warp: Warp):
        self.policy, self.warp = policy, warp
        self.start, self.push, self.select = policy.start, policy.push, policy.select
        self.max_length = getattr(policy, "max_length", None)

    def log_probs(self) -> Tensor:
        return self.warp(self.policy.log_probs())


class Generation(NamedTuple):
    """B responses, the longest of N tokens; after a response's end the tokens are padding and the numbers 0."""

    tokens: Tensor  # (B, N) ids
    lengths: Tensor  # (B,) tokens of each response, its end token included
    ref_log_probs: Tensor  # (B, N) log pi_ref of each drawn token, in nats, over the whole vocabulary
    log_probs: Tensor  # (B, N) log-probability of each drawn token under the guided policy, in nats, whatever the draw
    rewards: Tensor  # (B, N) reward of the prefix that ends in it; 0 without guidance, nan if nobody asked for it


class Drawn(NamedTuple):
    """The tokens of one step, (B,) each; for the meaning of the numbers see `Generation`."""

    tokens: Tensor
    ref_log_probs: Tensor
    log_probs: Tensor
    rewards: Tensor

    @classmethod
    def of(cls, tokens: Tensor, reference: Tensor, log_probs: Tensor, candidates: Tensor, rewards: Tensor) -> "Drawn":
        """What is known of (B,) tokens, from (B, V) log-probabilities and (B, K) candidates and rewards."""
        chosen = candidates == tokens[:, None]
        reward = rewards.masked_fill(~chosen, 0.0).sum(-1).masked_fill(~chosen.any(-1), torch.nan)
        ref_log_prob, log_prob = (of_all.gather(1, tokens[:, None])[:, 0] for of_all in (reference, log_probs))
        return cls(tokens, ref_log_prob, log_prob, reward)


@dataclass(frozen=True)
class Step:
    """What one step saw and did, for `on_step`."""

    number: int  # from 0
    candidates: Tensor  # (B, K) the k likeliest tokens
    ref_log_probs: Tensor  # (B, K)
    rewards: Tensor  # (B, K); nan for those that `min_ref_prob` rules out, and in rows that `guide_below` leaves alone
    log_probs: Tensor  # (B, K) of the guided policy
    drawn: Drawn
    alive: Tensor  # (B,) rows that had not ended before this step
    eligible: Tensor  # (B, K) False for those that `min_ref_prob` rules out: no candidates after all


@torch.no_grad()
def generate(
    policy: PolicyStepper,
    reward: RewardScorer | None,
    prompt_ids: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    top_k: int,
    max_new_tokens: int,
    min_ref_prob: float = 0.0,
    truncate: bool = False,
    guide_below: float | None = None,
    eos: int | Iterable[int] | None = None,
    pad: int | None = None,
    temperature: float = 1.0,
    draw: Draw = sample,
    uniforms: Tensor | None = None,
    resample: Resample | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generation:
    """Generate token by token from pi(t | prefix) proportional to pi_ref(t | prefix) * exp(beta * r(prefix + t)).

    Rows are independent: neither the other rows nor padding changes a response, unless `resample` is given.

    Args:
        policy: the reference, see `PolicyStepper`.
        reward: the reward of prefixes, see `RewardScorer`; None samples the reference itself.
        prompt_ids: (B, P) token ids, padded on the left.
        mask: (B, P) 1 at tokens, 0 at padding; None means no padding.
        beta: weight of the reward, in nats per unit of reward.
        top_k: candidates per step; 0 takes the whole vocabulary.
        max_new_tokens: N, the longest response.
        min_ref_prob: tokens that the reference finds less likely than this are no candidates.
        truncate: draw from the candidates alone, as the paper does. By default all other tokens keep the probability
            that the reference gives them (`keep_rest`).
        guide_below: leave a row unguided (beta = 0) where its likeliest token is at least this likely to the reference,
            or is the only candidate. Where this is so of all rows that have not ended, nobody asks for rewards: the
            fewer rows, the more passes it saves. By default every step is guided.
        eos: the token that ends a response, or several. It is a candidate like any other.
        pad: the id put after the end; by default the (first) end token.
        temperature: of the guided policy, see `tempered`.
        draw: `sample`, `greedy`, or any other choice of a token.
        uniforms: (B, N) numbers in [0, 1), one per row and step (`row_uniforms`); by default torch's global stream.
        resample: called before each draw; may let rows continue other rows, which must then share their prompt.
        on_step: called with a `Step` after each draw.

    Raises:
        ValueError: for an argument out of range, a prompt that leaves no room for N tokens in a model's context, or
            `guide_below` with `resample`.
        FloatingPointError: if a reward is not finite or a log-probability is not a number, with the step and the row.

    Source: arXiv 2406.07780, the decoding algorithm. With a full-sequence reward model it is ARGS (arXiv 2402.01694).
    """
    mask = torch.ones_like(prompt_ids) if mask is None else mask
    reward = NoReward() if reward is None else reward
    uniforms = torch.rand(len(prompt_ids), max_new_tokens) if uniforms is None else uniforms
    _check_lengths(policy, reward, prompt_ids, mask, max_new_tokens)
    if uniforms.shape != (wanted := (len(prompt_ids), max_new_tokens)):
        raise ValueError(f"uniforms must be {wanted}, a row and step each, got {tuple(uniforms.shape)}")
    if guide_below is not None and resample is not None:
        raise ValueError("guide_below leaves steps without rewards, by which particles (smc) are weighed; leave it out")
    spread = truncate_rest if truncate else keep_rest
    texts = _Texts(len(prompt_ids), [] if eos is None else [eos] if isinstance(eos, int) else [*eos], pad, prompt_ids)
    uniforms = uniforms.to(prompt_ids.device)

    policy.start(prompt_ids, mask)
    reward.start(prompt_ids, mask)
    for number in range(max_new_tokens):
        # What may come next, what each candidate would be worth, the equation that joins the two, and all other tokens.
        reference = policy.log_probs()
        ref_log_probs, candidates = top_k_candidates(reference, top_k, min_ref_prob)
        asked = None if guide_below is None else texts.alive & worth_guiding(ref_log_probs, guide_below)
        rewards = _score(reward, candidates, ref_log_probs, asked)
        among = guided_log_probs(ref_log_probs, rewards, beta)
        log_probs = tempered(spread(reference, candidates, among), temperature)
        texts.check(number, rewards, among)

        # Particles only: rows go on from the rows that were chosen.
        if resample is not None and (rows := resample(ref_log_probs, rewards, texts.alive)) is not None:
            for stepper in (policy, reward, texts):
                stepper.select(rows)
            reference, candidates, ref_log_probs, rewards, log_probs = (
                of_all[rows] for of_all in (reference, candidates, ref_log_probs, rewards, log_probs)
            )

        # One token for every row; rows that have ended are given padding.
        tokens = draw(log_probs, uniforms[:, number])
        eligible = ~ref_log_probs.isneginf()
        rewards = rewards.masked_fill(~(eligible if asked is None else eligible & asked[:, None]), torch.nan)
        drawn = Drawn.of(tokens, reference, log_probs, candidates, rewards)
        if on_step is not None:
            of_candidates = reference.gather(1, candidates), rewards, log_probs.gather(1, candidates)
            on_step(Step(number, candidates, *of_candidates, drawn, texts.alive, eligible))
        tokens = texts.append(drawn)
        if texts.all_ended(number):
            break
        policy.push(tokens)
        reward.push(tokens)
    return texts.generation()


def _score(reward: RewardScorer, candidates: Tensor, ref_log_probs: Tensor, asked: Tensor | None) -> Tensor:
    """(B, K) rewards, 0 in rows that are not asked for; by no pass at all if that is all of them. None: all are."""
    if asked is None:
        return reward.score(candidates, ref_log_probs)
    if not asked.any():
        return torch.zeros_like(ref_log_probs)
    return reward.score(candidates, ref_log_probs).masked_fill(~asked[:, None], 0.0)


class NoReward:
    """The reward scorer of a reference that nothing guides."""

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None: ...
    def push(self, tokens: Tensor) -> None: ...
    def select(self, rows: Tensor) -> None: ...

    def score(self, candidates: Tensor, ref_log_probs: Tensor) -> Tensor:
        return torch.zeros_like(ref_log_probs)


class _Texts:
    """B responses as far as they have been written, and which of them go on."""

    def __init__(self, batch: int, ends: list[int], pad: int | None, like: Tensor):
        self.ends = torch.tensor(ends, dtype=torch.long, device=like.device)
        self.padding = pad if pad is not None else ends[0] if ends else 0
        self.alive = torch.ones(batch, dtype=torch.bool, device=like.device)
        self.broken_at = torch.full((batch,), NEVER, device=like.device)  # the first step with an impossible number
        self.written: list[tuple[Tensor, ...]] = []  # of each step (B,) tokens, ref_log_probs, log_probs, rewards

    def select(self, rows: Tensor) -> None:
        """Let row i be what row rows[i] is."""
        self.alive, self.broken_at = self.alive[rows], self.broken_at[rows]
        self.written = [tuple(column[rows] for column in columns) for columns in self.written]

    def check(self, number: int, rewards: Tensor, log_probs: Tensor) -> None:
        """Remember the rows of a step with a (B, K) reward that is not finite, or a log-probability that is nan."""
        broken = self.alive & ~(rewards.isfinite() & ~log_probs.isnan()).all(-1)
        self.broken_at = self.broken_at.where(~broken, self.broken_at.clamp(max=number))

    def append(self, drawn: Drawn) -> Tensor:
        """Write what a step drew, and return its (B,) tokens."""
        tokens, *numbers = drawn
        tokens = tokens.where(self.alive, self.padding)
        self.written.append((tokens, *(column.where(self.alive, 0.0) for column in numbers)))
        self.alive = self.alive & ~torch.isin(tokens, self.ends)
        return tokens

    def all_ended(self, number: int) -> bool:
        """Whether no row goes on. A GPU is asked now and then only, for an answer makes the CPU wait for it."""
        if self.alive.device.type != "cpu" and number % CHECK_EVERY != CHECK_EVERY - 1:
            return False
        self._check_finite()
        return not self.alive.any()

    def generation(self) -> Generation:
        self._check_finite()
        tokens, *numbers = (torch.stack(columns, 1) for columns in zip(*self.written, strict=True))
        ended_before = torch.isin(tokens, self.ends).cumsum(-1).roll(1, -1)
        ended_before[:, 0] = 0
        lengths = (ended_before == 0).sum(-1)  # up to the first end token, which counts
        longest = int(lengths.max())
        return Generation(tokens[:, :longest], lengths, *(columns[:, :longest] for columns in numbers))

    def _check_finite(self) -> None:
        if (self.broken_at < NEVER).any():
            row = int(self.broken_at.argmin())
            raise FloatingPointError(
                f"row {row}, step {int(self.broken_at[row])}: a reward is not finite, or a log-probability is not a "
                "number; the weights may be damaged, the dtype too narrow (try float32), or beta too large"
            )


@torch.no_grad()
def response_rewards(reward_fn: RewardFn, prompt_ids: Tensor, mask: Tensor, generation: Generation) -> Tensor:
    """(B,) rewards of the whole responses, end token included, each behind its prompt.

    Raises:
        FloatingPointError: if a reward is not finite, with its row: argmax would select nan.
    """
    tokens, lengths = generation.tokens, generation.lengths
    written = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    rewards = reward_fn(torch.cat([prompt_ids, tokens], 1), torch.cat([mask, written.to(mask.dtype)], 1))
    if not rewards.isfinite().all():
        raise FloatingPointError(f"row {int((~rewards.isfinite()).nonzero()[0])}: the reward of a text is not finite")
    return rewards


def response_log_probs(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    responses: int,
    warp: Warp | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """(B, N) log pi of each token of the responses in nats, by a model that need not have written them; with gradient.

    Args:
        ids, mask: (B, P + N) prompts padded on the left, then responses padded on the right.
        responses: N, the width of the responses.
        warp: how the model is sampled.
        vocabulary: as of `ModelPolicy`.
    """
    settings, tokens = dict(use_cache=False, logits_to_keep=responses + 1), ids[:, ids.shape[1] - responses :, None]
    logits = read(model, ids, mask, token_positions(mask), **settings).logits[:, -responses - 1 : -1, :vocabulary]
    logits = widened(logits)
    if warp is not None:
        logits = warp(logits.log_softmax(-1).flatten(0, 1)).view_as(logits)
    return logits.gather(2, tokens)[..., 0] - logits.logsumexp(-1)


def _check_prompts(prompt_ids: Tensor, mask: Tensor) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] < 1 or mask.shape != prompt_ids.shape:
        raise ValueError(
            f"prompt_ids and mask must be (B, P) with P >= 1, got {tuple(prompt_ids.shape)} and {tuple(mask.shape)}"
        )
    if not mask[:, -1].all():
        raise ValueError("prompt_ids must be padded on the left: the last column of mask has to be 1")


def _check_lengths(policy, reward, prompt_ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
    _check_prompts(prompt_ids, mask)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    longest = int(mask.sum(-1).max())
    for name, stepper in (("language", policy), ("reward", reward)):
        limit = getattr(stepper, "max_length", None)
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the {name} model's context "
                f"of {limit}; shorten the prompt or lower max_new_tokens"
            )


class RewardGuidance(LogitsProcessor):
    """The same guidance inside transformers' own `model.generate(logits_processor=[RewardGuidance(...)])`.

    Tokens are scored by their log-probability under the guided policy; transformers then samples or takes the maximum.
    What it applies behind that changes the policy: its own `top_k` (50 by default), and whatever the model's generation
    configuration holds, such as temperature, top_p or a penalty. For the policy itself pass `top_k=0`, and give the
    model a generation configuration that names the end tokens alone.

    Warpers that belong to the reference stand before it in the list, as
    `[TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.95), RewardGuidance(...)]`: what they leave is what is guided.

    Use a new object for each call of `generate`. Greedy decoding and sampling work, with any number of returned
    sequences; beam search and assisted decoding reorder rows behind the processor's back and are refused.

    Args:
        scorer: a `RewardScorer`, such as `SiblingScorer(reward_model)`.
        attention_mask: (B, P) mask of the prompts that `generate` is given, padded on the left.
        beta, top_k, min_ref_prob, truncate, guide_below: as in `generate` of this module; rows that have ended count.

    Raises:
        ValueError: if `attention_mask` is not of those prompts, the running texts are not as said above, or they
            outgrow the reward model's context.
        FloatingPointError: if a reward is not finite or a log-probability is not a number.
    """

    def __init__(
        self,
        scorer: RewardScorer,
        attention_mask: Tensor,
        *,
        beta: float,
        top_k: int,
        min_ref_prob: float = 0.0,
        truncate: bool = False,
        guide_below: float | None = None,
    ):
        self.scorer, self.attention_mask, self.beta = scorer, attention_mask, beta
        self.candidates, self.spread = (top_k, min_ref_prob), truncate_rest if truncate else keep_rest
        self.guide_below = guide_below
        self.seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seen is None:
            returned = input_ids.shape[0] // self.attention_mask.shape[0]
            mask = self.attention_mask.repeat_interleave(returned, 0)
            _check_prompts(input_ids, mask)
            self.padding = int((1 - mask.long()).sum(-1).min())  # of the longest prompt
            self.scorer.start(input_ids, mask)
        elif torch.equal(input_ids[:, :-1], self.seen):
            self.scorer.push(input_ids[:, -1])
        else:
            raise ValueError(
                "the running texts changed under RewardGuidance: it works with greedy decoding and sampling, not with "
                "beam search or assisted decoding, and each call of generate() needs a RewardGuidance of its own"
            )
        self.seen = input_ids.clone()
        longest, limit = input_ids.shape[1] - self.padding + 1, getattr(self.scorer, "max_length", None)
        if limit is not None and longest > limit:
            raise ValueError(f"a text of {longest} tokens exceeds the reward model's context of {limit}; write fewer")
        reference = widened(scores).log_softmax(-1)
        ref_log_probs, candidates = top_k_candidates(reference, *self.candidates)
        asked = None if self.guide_below is None else worth_guiding(ref_log_probs, self.guide_below)
        rewards = _score(self.scorer, candidates, ref_log_probs, asked)
        guided = guided_log_probs(ref_log_probs, rewards, self.beta)
        broken = ~(rewards.isfinite() & ~guided.isnan()).all(-1)
        if broken.any():
            raise FloatingPointError(
                f"row {int(broken.nonzero()[0])}, token {input_ids.shape[1]}: a reward is not finite, or a "
                "log-probability is not a number"
            )
        return self.spread(reference, candidates, guided).to(scores.dtype)
