"""Direct preference optimisation, by TRL: the language model itself is trained on the pairs that would otherwise train
a reward model. With enough pairs drawn from the reference it reaches the RLHF policy (`theory/`, T12).

Needs the extra `baselines`. Pairs are tokenised by `encode_preferences`, as for reward models: TRL would tokenise
prompt and response together, into ids that decoding may never meet, and cannot read records of token ids.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import fields

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, DPOTrainer

from pargs_min.data import Pair
from pargs_min.trainer import Watched, check_settings


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    eval_pairs: Sequence[Pair] = (),
    *,
    beta: float,
    args: TrainingArguments,
    resume: bool = False,
) -> dict[str, float]:
    """Train a language model in place on preference pairs.

        L = -mean log sigmoid((log pi(chosen) / pi_ref(chosen) - log pi(rejected) / pi_ref(rejected)) / beta)

    Args:
        model: a causal language model, the reference before it is trained.
        pairs, eval_pairs: from `encode_preferences`.
        beta: weight of the reward, in nats per unit of reward, as in `generate`; DPO's own beta is its inverse.
        args: of transformers; batch sizes count pairs, and evaluation takes one pair at a time.
        resume: continue from the last whole checkpoint in `args.output_dir`, if there is one.

    Returns:
        TRL's metrics: `eval_loss` in nats per pair, `eval_rewards/accuracies`, seconds.

    Raises:
        ValueError: if `beta` is not a positive number, and for settings that `check_settings` refuses.
        FloatingPointError: where training diverges, with the step.

    Source: Rafailov et al. (2023), arXiv 2305.18290, equation 7.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive number, got {beta}")
    checkpoint = check_settings(args, resume)
    theirs = {field.name: getattr(args, field.name) for field in fields(TrainingArguments) if field.init}
    theirs["per_device_eval_batch_size"] = 1  # TRL averages over batches; so every pair counts the same
    config = DPOConfig(**theirs, beta=1 / beta, max_length=None)
    train, held_out = (
        Dataset.from_list([pair._asdict() for pair in some]) if some else None for some in (pairs, eval_pairs)
    )
    trainer = _PairsAsTheyAre(
        model, copy.deepcopy(model), config, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    metrics = trainer.fit(checkpoint)
    vars(model).pop("forward", None)  # TRL put its own there, with its own head
    model.eval()
    return metrics


class _PairsAsTheyAre(Watched, DPOTrainer):
    """TRL's trainer, for pairs that are token ids already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset
