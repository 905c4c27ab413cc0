"""Distil a scalar guide into a vocabulary head, which scores every candidate by one query per step.

Trained on preferences, a row of a vocabulary head learns only where its token came. Here it learns wherever its token
might have come: what the guide says of the reference's candidates is computed once, at every prefix of its texts.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from pargs_min.codec import Codec, check_fits
from pargs_min.data import Text, collate_texts
from pargs_min.decode import ModelPolicy, Step, Warp, WarpedPolicy, generate
from pargs_min.losses import distillation_loss
from pargs_min.models import give_vocabulary_head
from pargs_min.progress import progress
from pargs_min.reward_model import (
    body_and_head,
    features,
    has_vocabulary_head,
    head_rewards,
    next_token_rewards,
    recorded,
)
from pargs_min.scoring import FEW
from pargs_min.texts import choose_scorer
from pargs_min.train import PrefixTrainer, fit, mean_loss

NEEDS_LEVEL = {"win"}  # objectives whose tilt changes with a constant per prefix, which a distilled head does not learn


class Taught(NamedTuple):
    """A text as token ids, and at each of its N tokens what a guide says of the candidates that the reference has."""

    prompt_ids: list[int]
    response_ids: list[int]
    candidates: Tensor  # (N, K) ids
    ref_log_probs: Tensor  # (N, K) in nats; -inf for a token that the reference never writes
    rewards: Tensor  # (N, K) of the prefix that ends in the candidate; 0 for such a token


def train_distilled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Taught],
    eval_texts: Sequence[Taught] = (),
    *,
    beta: float,
    args: TrainingArguments,
    **run: Any,
) -> dict[str, float]:
    """Train a vocabulary head and its body in place to guide as a scalar guide does (`distillation_loss`).

    Its rewards are those of the guide up to a constant per prefix, which guidance does not see; whole texts they do not
    rate.

    Args:
        model: with a vocabulary head, best `vocabulary_headed(guide)`.
        texts, eval_texts: samples of the reference, and what the guide says of them: from `taught`.
        beta: at which the two are to guide alike, in nats per unit of reward.

    All other arguments are those of `train_reward_model`.

    Returns:
        Metrics: `eval_loss`, and `eval_divergence` of the guide's policy from the model's, in nats per prefix; seconds.

    Raises:
        ValueError: as `train_reward_model`; without texts; if the model has no row for a token, or beta is not a
            positive number.
        FloatingPointError: as `train_reward_model`.
    """
    if not texts:
        raise ValueError("texts is empty; write some with `pargs generate --method plain`")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta (--beta) must be a positive number, got {beta}")
    check_fits(model, tokenizer)
    loss = partial(distillation_loss, beta=beta)
    collator = partial(collate_taught, pad_id=tokenizer.pad_token_id or 0)
    return fit(DistilTrainer, model, tokenizer, texts, eval_texts, loss, collator, args=args, **run)


def check_teacher(guide: PreTrainedModel) -> None:
    """Raises ValueError if a guide cannot be distilled."""
    if body_and_head(guide)[1].out_features != 1:
        raise ValueError("guide (--distil-from) has a vocabulary head already; what is distilled has a scalar one")
    if (objective := recorded(guide).get("objective")) in NEEDS_LEVEL:
        raise ValueError(
            f"guide (--distil-from) was trained with --objective {objective}, whose guidance needs more than what is "
            "distilled: rewards up to a constant per prefix"
        )


def vocabulary_headed(guide: PreTrainedModel) -> PreTrainedModel:
    """A copy of a guide with a vocabulary head of zeros on its body. Raises ValueError as `check_teacher`."""
    check_teacher(guide)
    model = copy.deepcopy(guide)
    give_vocabulary_head(model)
    return model


@torch.no_grad()
def taught(
    texts: Sequence[Text],
    guide: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    top_k: int | None = None,
    warp: Warp | None = None,
    batch_size: int = 32,
) -> list[Taught]:
    """Ask a guide at every prefix of the responses: the decoding loop, with tokens that are given instead of drawn.

    Texts of a batch have prompts of about one length, and all steps behind the shortest are taken together.

    Args:
        texts: samples of the reference; rewards are not read.
        guide, reference: on one device, in evaluation mode.
        top_k: candidates per prefix, 0 for the whole vocabulary; None for 10.
        warp: how the reference is sampled.

    Raises:
        ValueError: as `check_teacher`; if the guide has no row for a token.
        FloatingPointError: where the guide's reward of a candidate is not finite.
    """
    check_teacher(guide)
    check_fits(guide, tokenizer)
    if not texts:
        return []
    vocabulary = Codec(tokenizer).vocabulary
    order = sorted(range(len(texts)), key=lambda number: [*map(len, texts[number][:2])])
    policy = WarpedPolicy(ModelPolicy(reference, vocabulary), warp or Warp())
    scorer = choose_scorer(guide, max(len(text.prompt_ids) + len(text.response_ids) for text in texts))
    rows = reference.get_input_embeddings().num_embeddings
    top_k = min(10, rows, vocabulary) if top_k is None else top_k
    found: dict[int, Taught] = {}
    for start in progress(range(0, len(texts), batch_size), desc="candidates"):
        numbers = order[start : start + batch_size]
        ids = collate_texts([texts[number] for number in numbers], pad_id=0)["input_ids"].to(guide.device)
        first = len(texts[numbers[0]].prompt_ids)
        given, steps = iter(ids[:, first:].unbind(1)), list[Step]()
        settings: dict[str, Any] = dict(beta=0.0, top_k=top_k, max_new_tokens=ids.shape[1] - first)
        generate(
            policy, scorer, ids[:, :first], draw=lambda *_, given=given: next(given), on_step=steps.append, **settings
        )
        candidates, ref_log_probs, rewards = (
            torch.stack(column, 1).cpu()
            for column in zip(*((step.candidates, step.ref_log_probs, step.rewards) for step in steps), strict=True)
        )
        rewards = rewards.masked_fill(ref_log_probs.isneginf(), 0.0)
        for row, number in enumerate(numbers):
            prompt_ids, response_ids, _ = texts[number]
            own = slice(skipped := len(prompt_ids) - first, skipped + len(response_ids))
            asked = (column[row, own].clone() for column in (candidates, ref_log_probs, rewards))
            found[number] = Taught(prompt_ids, response_ids, *asked)
    return [found[number] for number in range(len(texts))]


def collate_taught(texts: Sequence[Taught], pad_id: int) -> dict[str, Tensor]:
    """A batch of B texts, padded on the right; the candidates of a token stand at the place of the token before it.

    Returns:
        `input_ids`, `attention_mask`: (B, T); `candidates`, `ref_log_probs`, `rewards`: (B, T, K), -inf in the second
        where there are none; `labels`: (B, T) -100 there.
    """
    batch = collate_texts([Text(*text[:2]) for text in texts], pad_id)
    shape = (*batch["input_ids"].shape, texts[0].candidates.shape[1])
    candidates, rewards = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=texts[0].rewards.dtype)
    ref_log_probs = torch.full(shape, -torch.inf, dtype=texts[0].ref_log_probs.dtype)
    for row, text in enumerate(texts):
        places = slice(before := len(text.prompt_ids) - 1, before + len(text.response_ids))
        candidates[row, places], ref_log_probs[row, places], rewards[row, places] = text[2:]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "candidates": candidates,
        "ref_log_probs": ref_log_probs,
        "rewards": rewards,
        "labels": torch.where(ref_log_probs.isneginf().all(-1), -100, 0),
    }


def candidate_rewards(model: PreTrainedModel, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
    """(B, T, K) rewards r(ids_1:t c) of the (B, T, K) candidates behind each prefix, under a vocabulary head."""
    hidden, head = features(model, ids, mask)
    if FEW * candidates.shape[2] <= head.out_features:
        return next_token_rewards(head, hidden[:, :, None], candidates)
    return head_rewards(head, hidden).gather(2, candidates)


class DistilTrainer(PrefixTrainer):
    """For batches of `collate_taught`."""

    reads = staticmethod(candidate_rewards)
    given = (*PrefixTrainer.given, "candidates")

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        if not has_vocabulary_head(model):
            raise ValueError(f"{type(model).__name__} has no vocabulary head; train vocabulary_headed(guide)")

    def terms(self, rewards, inputs):
        return rewards, inputs["rewards"], inputs["ref_log_probs"]

    def predictions_and_labels(self, terms, inputs):
        """The least loss that each row can have, at the guide itself."""
        _, guide, reference = terms
        least = torch.stack([self.loss(mine, mine, ref) for mine, ref in zip(guide, reference, strict=True)])
        return (least,), least

    def metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        """`loss`, and `divergence`, what it is above the least."""
        means, items, least = evaluation.predictions
        loss = mean_loss(means, items)
        return {"loss": loss, "divergence": loss - mean_loss(least, items), "texts": len(means)}
