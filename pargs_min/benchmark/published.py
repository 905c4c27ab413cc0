"""What the published code does, written plainly as steppers: to measure against, and as oracles of the fast way.

    UncachedPolicy, SeparateScorer   the paper's code: no cache, and a reward pass of its own for every candidate
    CopiedScorer                     ARGS's code: a cache, kept once for every candidate

Only the cost differs: behind the same loop they write the same tokens. (The paper's code also turns ids to text and
back at every pass; that is left out.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pargs_min.reward_model import body_and_head, position_arguments, prefix_rewards, token_positions, token_rewards


class UncachedPolicy:
    """A causal language model that reads the whole text again for every token."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        self.ids, self.mask = prompt_ids, mask

    def log_probs(self) -> Tensor:
        positions = position_arguments(self.model, token_positions(self.mask))
        logits = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False, **positions).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def push(self, tokens: Tensor) -> None:
        self.ids, self.mask = _append(self.ids, self.mask, tokens)


class SeparateScorer:
    """A reward pass over the whole text for each candidate, one after the other."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        self.ids, self.mask = prompt_ids, mask

    def score(self, candidates: Tensor) -> Tensor:
        texts = (_append(self.ids, self.mask, tokens) for tokens in candidates.unbind(1))
        return torch.stack([prefix_rewards(self.model, ids, mask)[:, -1] for ids, mask in texts], 1)

    def push(self, tokens: Tensor) -> None:
        self.ids, self.mask = _append(self.ids, self.mask, tokens)


class CopiedScorer:
    """A reward pass over one new token a candidate, behind k copies of the cache; the winner's is copied k times."""

    def __init__(self, model: PreTrainedModel, k: int):
        self.model, self.k = model, k
        self.body, self.head = body_and_head(model)

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        self.cache = DynamicCache()
        self.mask = mask.repeat_interleave(self.k, 0)
        self._read(prompt_ids.repeat_interleave(self.k, 0))

    def score(self, candidates: Tensor) -> Tensor:
        self.candidates = candidates
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return token_rewards(self.head, self._read(candidates.reshape(-1, 1))).view(candidates.shape)

    def push(self, tokens: Tensor) -> None:
        winner = (self.candidates == tokens[:, None]).long().argmax(-1)  # a finished row's does not matter
        rows = winner + self.k * torch.arange(len(tokens), device=tokens.device)
        self.cache.reorder_cache(rows.repeat_interleave(self.k))

    def _read(self, ids: Tensor) -> Tensor:
        positions = position_arguments(self.body, token_positions(self.mask)[:, -ids.shape[1] :])
        cached = dict(past_key_values=self.cache, use_cache=True)
        return self.body(input_ids=ids, attention_mask=self.mask, **cached, **positions).last_hidden_state


def _append(ids: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
