"""Rewards of the k candidates of a step, without wasted work.

A *reward scorer* is all that the decoding loop needs from a reward model: `start(prompt_ids, mask)`, then at every step
`score(candidates, ref_log_probs) -> rewards` and `push(tokens)`, once each, in that order. Rewards of a model do not
depend on the second argument; the guide of a language model does. A step that is left unguided is pushed alone, and the
next `score` reads its token as well, in the same pass.

    SiblingScorer      one pass over one cache for all k candidates; causal reward models with a scalar head
    VocabularyScorer   one query over one cache for the whole vocabulary; those with a vocabulary head
    LanguageModelScorer  the same, for guides that are language models themselves
    ReencodeScorer     any function of whole texts, at k passes over everything per token
    WinTilt            what another scorer's rewards are worth to the method `win`
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pargs_min.reward_model import (
    body_and_head,
    check_evaluating,
    context_length,
    final_rewards,
    has_vocabulary_head,
    head_rewards,
    next_token_rewards,
    prefix_rewards,
    read,
    token_positions,
    widened,
)

WAY_OUT = "use ReencodeScorer, which works with every reward model at the cost of k passes per token"

MOST = 1024  # siblings in one pass, whose mask has a row and a column for each
FEW = 64  # among so many times as many tokens, candidates are looked up in a vocabulary head, not all are multiplied

RewardFn = Callable[[Tensor, Tensor], Tensor]  # whole texts (N, T) and their mask -> (N,)


class CachedText:
    """B texts that a causal model reads token by token, behind a key-value cache of its own: the prompts at first, then
    one token per row and step."""

    cache: Any  # of transformers; None before the first reading
    ids: Tensor  # (B, n) tokens that have not been read, or were the last ones that were

    def __init__(self, model: PreTrainedModel, body: PreTrainedModel):
        self.model, self.body, self.max_length = model, body, context_length(model)

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        """Take the prompts: (B, P) ids, padded on the left, and their mask."""
        check_evaluating(self.model)
        self.cache, self.ids, self.mask, self.positions = None, prompt_ids, mask, token_positions(mask)
        self.unread = True

    @torch.inference_mode()
    def read(self, **settings):
        """The body's output on what it has not read yet; once per step."""
        settings |= dict(past_key_values=self.cache, use_cache=True)
        output = read(self.body, self.ids, self.mask, self.positions, **settings)
        if (cache := getattr(output, "past_key_values", None)) is None:
            raise ValueError(
                f"{type(self.model).__name__} is recurrent: it keeps no cache of keys and values to go on from"
            )
        self.cache, self.unread = cache, False
        return output

    def next_log_probs(self, vocabulary: int | None) -> Tensor:
        """(B, V) log-probabilities of the next token in nats, in float32 or wider, by a language model; once per step.

        Args:
            vocabulary: V; None means all rows of the model.
        """
        logits = self.read(logits_to_keep=1).logits[:, -1, :vocabulary]
        return widened(logits).log_softmax(-1)

    def push(self, tokens: Tensor) -> None:
        """Append the (B,) tokens that were drawn."""
        ids, positions = tokens[:, None], self.positions[:, -1:] + 1
        if self.unread:
            ids, positions = torch.cat([self.ids, ids], 1), torch.cat([self.positions, positions], 1)
        self.ids, self.positions, self.unread = ids, positions, True
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)

    def select(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has read; (B,) ints, after `read` and before `push`."""
        self.cache.reorder_cache(rows)
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]


class SiblingScorer(CachedText):
    """r(prefix + candidate) for k candidates in one pass over a cache that is never copied.

    The candidates are fed as k tokens that share one position, in parts of at most MOST. Each attends to the cached
    prefix and to itself, never to another candidate; afterwards the cache drops them. The drawn token is fed again with
    the next candidates, so the scorer need not know which candidate won.

    Args:
        model: a causal reward model (`body_and_head`) with absolute or rotary positions and softmax attention.

    Raises:
        ValueError: if the siblings of this model would not be scored as whole texts are: ALiBi positions, recurrent
            layers, flash attention, or anything else that fails one small comparison of the two.
    """

    def __init__(self, model: PreTrainedModel):
        body, self.head = body_and_head(model)
        super().__init__(model, body)
        if self.head.out_features != 1:
            raise ValueError("this reward model has a vocabulary head; use VocabularyScorer")
        self.window = attention_window(model.config.get_text_config())
        if "flash" in (model.config._attn_implementation or ""):
            raise ValueError('flash attention ignores the sibling mask; load with attn_implementation="sdpa"')
        _check_siblings(self)

    @torch.inference_mode()
    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        """Read the prompts but for their last tokens: (B, P) ids, padded on the left, and their mask."""
        super().start(prompt_ids, mask)
        self.cache = DynamicCache()  # without a config it keeps every position, whatever the layer
        if prompt_ids.shape[1] > 1:
            before = (of_all[:, :-1] for of_all in (self.ids, self.mask, self.positions))
            read(self.body, *before, past_key_values=self.cache, use_cache=True)
        self.ids, self.positions = self.ids[:, -1:], self.positions[:, -1:]

    @torch.inference_mode()
    def score(self, candidates: Tensor, ref_log_probs: Tensor | None = None) -> Tensor:
        """(B, K) rewards of the prefixes that end in each of the (B, K) candidates."""
        if not self.unread:
            raise RuntimeError("score() may be called once per step: push() the drawn token first")
        if self.window is not None and int(self.positions.max()) + 2 > self.window:  # of the longest, with a candidate
            raise ValueError(f"the text outgrows this reward model's attention window of {self.window}; {WAY_OUT}")
        rewards: list[Tensor] = []
        for part in candidates.split(MOST, 1):
            if rewards:
                self.cache.crop(-1)  # each part reads the last token again
            n, k = 1 if rewards else self.ids.shape[1], part.shape[1]
            ids = torch.cat([self.ids[:, -n:], part], 1)
            positions = torch.cat([self.positions[:, -n:], (self.positions[:, -1:] + 1).expand(-1, k)], 1)
            mask = sibling_mask(self.mask[:, :-n], k, self.head.weight.dtype, n)
            hidden = read(self.body, ids, mask, positions, past_key_values=self.cache, use_cache=True).last_hidden_state
            self.cache.crop(-k)
            rewards.append(head_rewards(self.head, hidden[:, n:])[..., 0].to(candidates.device))
        self.unread = False
        return torch.cat(rewards, 1)


def sibling_mask(prefix: Tensor, k: int, dtype: torch.dtype, n: int = 1) -> Tensor:
    """Additive (B, 1, n+k, T+n+k) attention mask of [last n tokens, k siblings] behind a prefix of T cached tokens.

    Each query sees the unpadded prefix, itself, and the last tokens that stand before it. Additive, since eager
    attention adds its mask.

    >>> sibling_mask(torch.tensor([[0, 1]]), k=2, dtype=torch.float32)[0, 0] == 0
    tensor([[False,  True,  True, False, False],
            [False,  True,  True,  True, False],
            [False,  True,  True, False,  True]])
    """
    batch = prefix.shape[0]
    among = torch.eye(n + k, dtype=torch.bool, device=prefix.device)
    among[:, :n] = True
    if n > 1:
        among[:n, :n].tril_()
    sees = torch.cat([prefix.bool()[:, None].expand(-1, n + k, -1), among.expand(batch, -1, -1)], -1)
    lowest = torch.full(sees.shape, torch.finfo(dtype).min, dtype=dtype, device=prefix.device)
    return lowest.masked_fill_(sees, 0.0)[:, None]


def attention_window(config) -> int | None:
    """Length of the shortest attention window of any layer, in tokens; None where every layer sees the whole text."""
    kinds = set(
        getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ["sliding_attention"]
    )
    windows = [
        getattr(config, name, None)
        for kind, name in [
            ("sliding_attention", "sliding_window"),
            ("chunked_attention", "attention_chunk_size"),
            ("local", "window_size"),
        ]
        if kind in kinds
    ]
    return min((window for window in windows if window), default=None)


def _check_siblings(scorer: SiblingScorer) -> None:
    """Siblings against whole texts: no untested model family is silently wrong."""
    model, training = scorer.model, scorer.model.training
    whole = ReencodeScorer(lambda ids, mask: prefix_rewards(model, ids, mask)[:, -1])
    model.eval()
    try:
        got, want = rehearsed([scorer, whole], model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's code raises where it is called in a way that it does not know
        raise ValueError(
            f"{model.config.model_type} cannot score siblings over one cache ({error}); {WAY_OUT}"
        ) from error
    finally:
        model.train(training)
    if not alike(got, want, scorer.head.weight.dtype):
        raise ValueError(
            f"{model.config.model_type} scores candidates over one cache differently than in whole texts (by up to "
            f"{float((got - want).abs().max()):.2g}), perhaps because it takes positions from the cache; {WAY_OUT}"
        )


@torch.no_grad()
def rehearsed(scorers: Sequence[Any], model: PreTrainedModel, policy: Any = None) -> list[Tensor]:
    """What each scorer of a model says in two steps of a tiny left-padded batch, behind a policy if they need one."""
    vocabulary = model.get_input_embeddings().num_embeddings if policy is None else policy.vocabulary
    ids = torch.randint(vocabulary, (2, 6 + 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    prompt_ids, drawn, candidates = ids[:, :5], ids[:, 5], ids[:, 6:]
    mask, said = torch.ones_like(prompt_ids), []
    mask[0, :3] = 0
    steppers = [*scorers] if policy is None else [policy, *scorers]
    for stepper in steppers:
        stepper.start(prompt_ids, mask)
    for _ in range(2):
        ref_log_probs = None if policy is None else policy.log_probs().gather(1, candidates)
        said.append([scorer.score(candidates, ref_log_probs) for scorer in scorers])
        for stepper in steppers:
            stepper.push(drawn)
    return [torch.stack(rewards) for rewards in zip(*said, strict=True)]


def alike(rewards: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of reading the same texts differ by no more than rounding does; nan is like nothing.

    In bfloat16 that is up to a tenth of the spread of rewards for 30 to 36 layers, in float32 with TF32 products a
    thousandth; a wrong position or a token too many changes them by about the spread itself.
    """
    tolerance = 0.3 if torch.finfo(dtype).bits == 16 else 1e-2
    return bool((rewards - others).abs().max() <= tolerance * others.std().clamp(min=1e-6))


class VocabularyScorer(CachedText):
    """r(prefix + candidate) for any number of candidates, up to the whole vocabulary, by one query per step.

    Args:
        model: a causal reward model with a vocabulary head (`load_reward_model(..., head="vocab")`), of any family.

    Raises:
        ValueError: if the head has another shape.
    """

    def __init__(self, model: PreTrainedModel):
        if not has_vocabulary_head(model):
            raise ValueError(f"{type(model).__name__} has no head with a number for each token; use SiblingScorer")
        body, self.head = body_and_head(model)
        super().__init__(model, body)

    @torch.inference_mode()
    def score(self, candidates: Tensor, ref_log_probs: Tensor | None = None) -> Tensor:
        """(B, K) rewards of the prefixes that end in each of the (B, K) candidates."""
        hidden = self.read().last_hidden_state[:, -1:]
        there = candidates.to(hidden.device)  # layers may lie on several devices
        if FEW * candidates.shape[1] <= self.head.out_features:
            return next_token_rewards(self.head, hidden, there).to(candidates.device)
        return F.linear(hidden[:, 0].to(self.weight.dtype), self.weight).gather(1, there).to(candidates.device)

    @cached_property
    def weight(self) -> Tensor:
        """(V, D) of the head, in float32 or wider."""
        return widened(self.head.weight)


class LanguageModelScorer(CachedText):
    """The reward that a language model pi_r implies for each next token, by one query per step for all of them.

        relative:      r(prefix + t) = (log pi_r(t | prefix) - log pi_ref(t | prefix)) / beta
        not relative:  r(prefix + t) = log pi_r(t | prefix)

    Both up to a constant per prefix. Guided by the first at the same beta, the reference becomes pi_r.

    Args:
        model: a causal language model with the token ids of the reference, in evaluation mode.
        beta: what pi_r was trained for, in nats per unit of reward, where it approaches the RLHF policy pi_ref exp(beta
            R): by reweighting (`theory/`, T20) or DPO (T12). None means not relative: an autoregressive reward model
            (GenARM, arXiv 2410.08193; `theory/`, T19).
        vocabulary: as for `ModelPolicy`.
    """

    def __init__(self, model: PreTrainedModel, beta: float | None = None, vocabulary: int | None = None):
        super().__init__(model, model)
        self.beta, self.vocabulary = beta, vocabulary

    @torch.inference_mode()
    def score(self, candidates: Tensor, ref_log_probs: Tensor) -> Tensor:
        """(B, K) rewards of the prefixes that end in each of the (B, K) candidates; 0 where pi_ref is 0."""
        log_probs = self.next_log_probs(self.vocabulary).gather(1, candidates)
        if self.beta is None:
            return log_probs
        return ((log_probs - ref_log_probs) / self.beta).masked_fill(ref_log_probs.isneginf(), 0.0)


class WinTilt:
    """What a model of the win rate W is worth as a guide:

        r(prefix + t) = log(1 + (exp(eta) - 1) W(prefix + t)),   decoded with beta = 1

    Every affine function of W is a martingale under the reference, so that its tokenwise tilt is the tilt of whole
    texts: over the whole vocabulary it samples exactly pi_ref(y) (1 + (exp(eta) - 1) W(y)) / Z.

    Args:
        scorer: of the logit of W, as `pargs train --objective win` learns it.
        eta: in nats; its limit is the distribution of the winner of a pair.

    Raises:
        ValueError: if `eta` is not a number.

    Source: `theory/`, T18.
    """

    def __init__(self, scorer, eta: float):
        if not math.isfinite(eta):
            raise ValueError(f"beta (eta of the method win) must be a finite number, got {eta}")
        self.scorer, self.eta = scorer, eta
        self.start, self.push, self.select = scorer.start, scorer.push, scorer.select
        self.max_length = getattr(scorer, "max_length", None)

    def score(self, candidates: Tensor, ref_log_probs: Tensor) -> Tensor:
        logits = self.scorer.score(candidates, ref_log_probs)
        return torch.logaddexp(F.logsigmoid(-logits), self.eta + F.logsigmoid(logits))


class ReencodeScorer:
    """r(prefix + candidate) by reading all B * K whole texts again at every step, batched by length.

    Args:
        reward_fn: (N, T) ids and their mask, padded on the left -> (N,) rewards. See `model_rewards` and
            `reading.text_rewards` for hub models; any function of token ids will do. It is called on batches of rows.
        max_tokens: per part, padding included; a longer text is a part by itself.
    """

    def __init__(self, reward_fn: RewardFn, max_tokens: int = 2**14):
        self.reward_fn, self.max_tokens = reward_fn, max_tokens

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        self.ids, self.mask = prompt_ids, mask

    def score(self, candidates: Tensor, ref_log_probs: Tensor | None = None) -> Tensor:
        k = candidates.shape[1]
        ids = torch.cat([self.ids.repeat_interleave(k, 0), candidates.reshape(-1, 1)], 1)
        mask = torch.cat([self.mask.repeat_interleave(k, 0), torch.ones_like(ids[:, :1])], 1)
        lengths, order = mask.sum(-1).sort(stable=True)
        rewards: list[Tensor] = []
        for part in length_buckets(lengths.tolist(), self.max_tokens):
            rows, width = order[part], int(lengths[part][-1])
            rewards.append(self.reward_fn(ids[rows, -width:], mask[rows, -width:]))
        return torch.cat(rewards)[order.argsort()].view(candidates.shape)

    def push(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)

    def select(self, rows: Tensor) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]


def length_buckets(lengths: list[int], max_tokens: int) -> Iterator[slice]:
    """Split ascending lengths into parts to be read together, each with at most a quarter of padding.

    Args:
        max_tokens: number of texts times length of the longest, at most; a longer text is a part by itself.

    >>> list(length_buckets([6, 7, 8, 8, 20, 20], max_tokens=24))
    [slice(0, 3, None), slice(3, 4, None), slice(4, 5, None), slice(5, 6, None)]
    """
    start = 0
    for end, length in enumerate(lengths):
        if end > start and ((end - start + 1) * length > max_tokens or 4 * lengths[start] < 3 * length):
            yield slice(start, end)
            start = end
    yield slice(start, len(lengths))


def model_rewards(model: PreTrainedModel) -> RewardFn:
    """The reward function of any one-label classifier that shares the language model's token ids."""

    def reward_fn(ids: Tensor, mask: Tensor) -> Tensor:
        check_evaluating(model)
        return final_rewards(model, ids, mask)

    return reward_fn
