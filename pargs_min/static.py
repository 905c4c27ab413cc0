"""The two steppers over caches of fixed size, compiled: for GPUs, where launching small kernels one by one costs more
than the arithmetic.

No step changes any shape: a cache has a fixed number of slots, the mask says which of them a text may attend to, and
the slot of the next token is a number on the device. So a step is one compiled graph (on CUDA a captured one,
`mode="reduce-overhead"`), driven by the loop in `decode`. Another batch size or k is compiled anew.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel, StaticCache

from pargs_min.reward_model import (
    body_and_head,
    check_evaluating,
    context_length,
    head_rewards,
    takes_positions,
    token_positions,
    widened,
)
from pargs_min.scoring import SiblingScorer, attention_window


class StaticPolicy:
    """`ModelPolicy`, compiled.

    Args:
        model: a causal language model in evaluation mode, without attention windows.
        slots: tokens of the longest text, padding of its batch included.
        vocabulary: as for `ModelPolicy`.
        compile_options: of `torch.compile`.

    Raises:
        ValueError: if transformers cannot compile the model, or if it has attention windows.
    """

    next: Tensor | None  # (B, V) what `log_probs` returns, once it is known

    def __init__(self, model: PreTrainedModel, slots: int, vocabulary: int | None = None, **compile_options):
        self.model, self.vocabulary, self.max_length = model, vocabulary, context_length(model)
        self.text = _StaticText(model, model, slots)
        self.step = _Compiled(self._step, model, compile_options)

    @torch.no_grad()
    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        """Read the prompts: (B, P) ids, padded on the left, and their mask."""
        self.next = self._log_probs(self.text.start(prompt_ids, mask, logits_to_keep=1).logits)
        self.passes = len(prompt_ids)  # of one row each, since the start

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """(B, V) log pi_ref of the next token in nats, in float32 or wider."""
        if self.next is None:
            self.next = self.step(self.last, self.text.position, self.text.filled)
            self.text.position = self.text.position + 1
            self.passes += len(self.last)
        return self.next

    def push(self, tokens: Tensor) -> None:
        """Append the (B,) tokens that were drawn."""
        self.last, self.next = tokens[:, None], None

    def select(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has read; (B,) ints, after `log_probs` and before `push`."""
        self.text.select(rows)

    def _step(self, last: Tensor, position: Tensor, filled: Tensor) -> Tensor:
        slot, slots = self.text.length(), torch.arange(filled.shape[1], device=filled.device)
        sees = (filled & (slots <= slot))[:, None]
        return self._log_probs(self.text.read(last, position, sees).logits)

    def _log_probs(self, logits: Tensor) -> Tensor:
        logits = logits[:, -1, : self.vocabulary]
        return widened(logits).log_softmax(-1)


class StaticScorer:
    """`SiblingScorer`, compiled: k siblings are written behind the text, and the length of the cache is set back.

    Args:
        model: what `SiblingScorer` takes, without attention windows.
        slots: tokens of the longest text, padding of its batch included, and k more.
        compile_options: of `torch.compile`.

    Raises:
        ValueError: those of `SiblingScorer` and of `StaticPolicy`.
    """

    last: Tensor | None  # (B, 1) the token that was drawn, until it has been read

    def __init__(self, model: PreTrainedModel, slots: int, **compile_options):
        self.model, self.max_length = model, SiblingScorer(model).max_length  # and whatever speaks against siblings
        self.body, self.head = body_and_head(model)
        self.text = _StaticText(model, self.body, slots)
        self.step = _Compiled(self._step, model, compile_options)

    @torch.no_grad()
    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        """Read the prompts: (B, P) ids, padded on the left, and their mask."""
        self.text.start(prompt_ids, mask)
        self.passes = len(prompt_ids)  # of one row each, since the start
        self.text.forget(1)  # the last token is read again, with the candidates
        self.last, self.text.position = prompt_ids[:, -1:], self.text.position - 1

    @torch.no_grad()
    def score(self, candidates: Tensor, ref_log_probs: Tensor | None = None) -> Tensor:
        """(B, K) rewards of the prefixes that end in each of the (B, K) candidates."""
        if self.last is None:
            raise RuntimeError("score() may be called once per step: push() the drawn token first")
        rewards = self.step(torch.cat([self.last, candidates], 1), self.text.position, self.text.filled)
        self.last, self.text.position = None, self.text.position + 1
        self.passes += len(candidates)
        return rewards

    def push(self, tokens: Tensor) -> None:
        """Append the (B,) tokens that were drawn."""
        if self.last is not None:
            raise RuntimeError("a compiled step reads one token: score() every step, without guide_below")
        self.last = tokens[:, None]

    def select(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has read; (B,) ints, after `score` and before `push`."""
        self.text.select(rows)

    def _step(self, ids: Tensor, position: Tensor, filled: Tensor) -> Tensor:
        k = ids.shape[1] - 1
        query = torch.arange(1 + k, device=ids.device)
        slot, slots = self.text.length(), torch.arange(filled.shape[1], device=filled.device)
        sees = (filled & (slots <= slot))[:, None] | (slots == slot + query[:, None])
        positions = position + (query > 0).long()
        hidden = self.text.read(ids, positions, sees).last_hidden_state
        self.text.forget(k)
        return head_rewards(self.head, hidden[:, 1:])[..., 0]


class _StaticText:
    """B texts in a cache of fixed size: `filled` (B, slots) is false at padding, `position` (B, 1) is the next one."""

    filled: Tensor
    position: Tensor

    def __init__(self, model: PreTrainedModel, body: PreTrainedModel, slots: int):
        name = type(model).__name__
        if not (getattr(body, "_can_compile_fullgraph", False) and takes_positions(type(body).forward)):
            raise ValueError(f"transformers cannot compile {name}; decode without --compile")
        if attention_window(model.config.get_text_config()) is not None:
            raise ValueError(f"{name} has attention windows, which fixed caches do not hold; decode without --compile")
        self.model, self.body, self.slots = model, body, slots
        self.cache: Any = None  # made when the first prompts are read

    def start(self, prompt_ids: Tensor, mask: Tensor, **settings):
        """Read the prompts. Not compiled: they have many lengths. The cache is made anew only for another batch size,
        for a compiled step knows it by its address."""
        check_evaluating(self.model)
        batch, width = prompt_ids.shape
        if width >= self.slots:
            raise ValueError(f"a prompt of {width} tokens leaves no room in a cache of {self.slots}; give more slots")
        if self.cache is None or len(self.filled) != batch:
            self.cache = StaticCache(self.model.config, max_cache_len=self.slots)
            if not all(hasattr(layer, "cumulative_length") for layer in self.cache.layers):
                raise ValueError(f"{type(self.model).__name__} has layers without keys; decode without --compile")
        self.cache.reset()
        self.filled = torch.ones(batch, self.slots, dtype=torch.bool, device=mask.device)
        self.filled[:, :width] = mask.bool()
        positions = token_positions(mask)
        self.position = positions[:, -1:] + 1
        cached = dict(past_key_values=self.cache, use_cache=True)
        return self.body(input_ids=prompt_ids, attention_mask=mask, position_ids=positions, **cached, **settings)

    def read(self, ids: Tensor, positions: Tensor, sees: Tensor):
        """A pass over (B, Q) tokens, of which each sees the slots that (B, Q, slots) `sees` names."""
        dtype = self.body.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        cached = dict(past_key_values=self.cache, use_cache=True)
        return self.body(input_ids=ids, attention_mask=mask[:, None], position_ids=positions, **cached)

    def length(self) -> Tensor:
        """Tokens in the cache, a number on the device."""
        return self.cache.layers[0].cumulative_length.clone()

    def forget(self, tokens: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(tokens)

    def select(self, rows: Tensor) -> None:
        for layer in self.cache.layers:  # in place: compiled steps know the tensors by their addresses
            layer.keys.copy_(layer.keys[rows])
            layer.values.copy_(layer.values[rows])
        self.filled, self.position = self.filled[rows], self.position[rows]


class _Compiled:
    """A step, compiled at its first call; where that fails the step as it is, with a warning."""

    def __init__(self, step: Callable[..., Tensor], model: PreTrainedModel, options: dict):
        if not options and model.device.type == "cuda":
            options = dict(mode="reduce-overhead")
        self.plain, self.step = step, torch.compile(step, fullgraph=True, dynamic=False, **options)

    def __call__(self, *inputs: Tensor) -> Tensor:
        try:
            return self.step(*inputs).clone()  # a captured graph writes every result to the same place
        except TorchDynamoException as error:
            if self.step is self.plain:
                raise
            why = str(error).strip().splitlines()[0]
            warnings.warn(f"torch.compile failed ({why}); going on without it", stacklevel=2)
            self.step = self.plain
            return self.plain(*inputs)
