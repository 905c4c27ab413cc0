"""The reward model of FaRMA: a vocabulary head, fitted on whole responses, and on prefixes to the best token that may
come next."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.data import Pair, at_response_tokens, collate
from pargs_min.losses import full_loss, written_tokens
from pargs_min.reward_model import features, has_vocabulary_head, head_rewards, next_token_rewards
from pargs_min.train import PairTrainer, collate_by, fit, one_each


def farma_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    chosen_best: Tensor,
) -> Tensor:
    """Bradley-Terry loss of whole responses, and the squared gap between a prefix's reward and its best next token's.

        L = -mean log sigmoid(r(chosen) - r(rejected)) + mean_i (r(chosen_1:i) - max_t r(chosen_1:i t))^2

    with i < the length of the chosen response; the second mean is of each pair first. The maximum is over the whole
    vocabulary, whatever the reference can write. Both terms are least where r of whole responses is that of the
    Bradley-Terry model and r of a prefix that of its best completion.

    Args:
        chosen_rewards, rejected_rewards: (B, T) r at each response token, right padded.
        chosen_lengths, rejected_lengths: (B,) number of tokens of each response, its own end token included.
        chosen_best: (B, T) max_t r(chosen_1:i t).

    Returns:
        Scalar, per pair.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    Source: Rashid et al. (2025), arXiv 2502.04517, and its code: it trains on the two terms in turn, an epoch each, and
    on the second with prefixes of chosen responses alone, from the tenth token on.

    >>> import torch
    >>> rewards, best = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.5, 9.0]])
    >>> farma_loss(rewards, torch.zeros(1, 2), torch.tensor([2]), torch.tensor([1]), best)  # 0.1269 + 1
    tensor(1.1269)
    """
    written_tokens(rejected_rewards, rejected_lengths)  # raises for these, too
    before = written_tokens(chosen_rewards, chosen_lengths)[:, 1:]  # where a token follows
    whole = full_loss(chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths)
    gaps = (chosen_rewards - chosen_best)[:, :-1].masked_fill(~before, 0.0)
    return whole + (gaps.square().sum(1) / before.sum(1).clamp(min=1)).mean()


def rewards_and_best(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """(2B, T) r(ids_1:t) of pairs as `prefix_rewards` gives it, and (2B, T) max_v r(ids_1:t v), by a vocabulary head.

    The second is 0 where the loss does not read it: in rejected responses, and where all rows hold prompts.
    """
    hidden, head = features(model, ids, mask)
    rewards = F.pad(next_token_rewards(head, hidden[:, :-1], ids[:, 1:]), (1, 0))
    pairs, first = len(prompt_lengths), int(prompt_lengths.min())
    best = head_rewards(head, hidden[:pairs, first:]).amax(-1)
    return rewards, F.pad(best, (first, 0, 0, pairs))


def train_farma(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    eval_pairs: Sequence[Pair] = (),
    **run: Any,
) -> dict[str, float]:
    """Train a reward model with a vocabulary head in place (`farma_loss`).

    All arguments, metrics and errors are those of `train_reward_model`.
    """
    collator = collate_by(collate, tokenizer, one_each)
    return fit(FarmaTrainer, model, tokenizer, pairs, eval_pairs, farma_loss, collator, **run)


class FarmaTrainer(PairTrainer):
    """For batches of pairs, read by a reward model with a vocabulary head."""

    reads = staticmethod(rewards_and_best)
    given = (*PairTrainer.given, "prompt_lengths")

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        if not has_vocabulary_head(model):
            raise ValueError(f"{type(model).__name__} has no vocabulary head: load a language model with head='vocab'")

    def terms(self, both, inputs):
        rewards, best = both
        return *super().terms(rewards, inputs), at_response_tokens(best, inputs)[0]
