"""The autoregressive reward model of GenARM: the log-probability of a language model is the reward, so that one query
gives the rewards of all next tokens. `theory/`, T19, has what it converges to."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.data import Pair, collate
from pargs_min.losses import bradley_terry_loss, written_tokens
from pargs_min.train import LikelihoodTrainer, PairTrainer, collate_by, fit, one_each, token_log_probs


def autoregressive_loss(
    chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """Bradley-Terry loss of r(y) = log pi_r(y) = sum_i log pi_r(y_i | y_<i).

        L = -mean log sigmoid(log pi_r(chosen) - log pi_r(rejected))

    Args:
        chosen_log_probs, rejected_log_probs: (B, T) log pi_r of each response token, right padded.
        chosen_lengths, rejected_lengths: (B,) number of tokens of each response, its own end token included.

    Returns:
        Scalar, in nats per pair.

    Raises:
        ValueError: if the shapes do not fit, or for lengths outside 1..T.

    Source: Xu et al. (2024), arXiv 2410.08193; the scale that their code gives the reward is 1 here.

    >>> import torch
    >>> chosen, rejected = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-2.0, 9.0]])
    >>> autoregressive_loss(chosen, rejected, torch.tensor([2]), torch.tensor([1]))
    tensor(0.4741)
    """
    sides = (chosen_log_probs, chosen_lengths), (rejected_log_probs, rejected_lengths)
    return bradley_terry_loss(*(rows.masked_fill(~written_tokens(rows, n), 0.0).sum(1) for rows, n in sides))


def train_genarm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    eval_pairs: Sequence[Pair] = (),
    **run: Any,
) -> dict[str, float]:
    """Train a language model in place as an autoregressive reward model (`autoregressive_loss`).

    Args:
        model: a causal language model.

    All other arguments, metrics and errors are those of `train_reward_model`.
    """
    collator = collate_by(collate, tokenizer, one_each)
    return fit(AutoregressiveTrainer, model, tokenizer, pairs, eval_pairs, autoregressive_loss, collator, **run)


class AutoregressiveTrainer(PairTrainer):
    """For batches of pairs, read by a language model; the reward of a prefix is its log-probability."""

    reads, given = staticmethod(token_log_probs), LikelihoodTrainer.given
    check = staticmethod(LikelihoodTrainer.check)

    def predictions_and_labels(self, terms, inputs):
        chosen, rejected, *ends = terms
        return super().predictions_and_labels((chosen.cumsum(1), rejected.cumsum(1), *ends), inputs)
