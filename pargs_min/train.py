"""Train a reward model on preference pairs, on every prefix of the responses or on whole responses only; on rated
samples of the reference a reward model, a value model or a language model.

A batch of B pairs is one forward pass of 2B rows, which yields the rewards of all prefixes. The loop, checkpoints,
precision and processes are those of transformers' `Trainer`; ours are the losses and the metrics.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from pargs_min import data, losses
from pargs_min.data import Pair, Text
from pargs_min.lora import check_rank, low_rank
from pargs_min.memory import enough_memory
from pargs_min.progress import progress
from pargs_min.reward_model import is_causal, prefix_rewards, takes_positions, token_positions, widened
from pargs_min.scoring import RewardFn
from pargs_min.trainer import Watched, WithTokenizer, check_settings

Batch = dict[str, Tensor]
Collator = Callable[[Sequence], Batch]
Items = Callable[[Batch], Tensor]  # what a loss is a mean of: -100 where there is nothing to count
FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the longer response of a pair; 1 is the usual accuracy of a reward model
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # in tokens
FEW_TEXTS = 100  # effective ones per prompt, below which reweighting is warned of


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    eval_pairs: Sequence[Pair] = (),
    *,
    args: TrainingArguments,
    objective: str = "partial",
    tail: str = "extend",
    reduction: str = "prefix",
    lengths: tuple[int, int | None] = (1, None),
    end: int | None = None,
    lora_rank: int | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train a reward model in place.

    Args:
        model: from `load_reward_model`.
        tokenizer: names the padding, and is saved with checkpoints.
        pairs, eval_pairs: from `encode_preferences`; the second are evaluated when training has ended, and whenever
            `args` says so.
        args: of transformers; batch sizes count pairs.
        objective: "partial" (PARGS) compares every prefix, "full" (ARGS) whole responses only; "win" says at every
            prefix of both responses whether it wins.
        tail, reduction, lengths: of the partial objective, see `partial_bradley_terry_loss`.
        end: what continues the shorter response of a pair (`Codec.end`); None means the tokenizer's end token.
        lora_rank: R >= 1 trains adapters of rank R and the head (`low_rank`) instead of all weights.
        resume: go on from the last whole checkpoint in `args.output_dir`, if there is one: same data, seed and
            arguments give the weights of a run that was never interrupted.

    Returns:
        Metrics: `eval_loss` in nats per prefix (full objective, or reduction by pair: per pair), pair accuracies
        (`prefix_metrics`), seconds. The loss while training is what `args` logs.

    Raises:
        ValueError: if the model is not causal, if `objective`, `tail` or `reduction` is unknown, if one process sees
            several GPUs, for FSDP and other settings that `check_settings` refuses, or if the checkpoint to resume from
            was made with another `lora_rank`.
        FloatingPointError: where training diverges, with the step; what it came to is not saved.
        MemoryError: where a batch is too large, saying what to lower; checkpoints stay.
    """
    loss, items = objective_functions(objective, tail, reduction, lengths)
    extend_with = _end(tokenizer, end) if (objective, tail) == ("partial", "extend") else None
    collator = collate_by(data.collate, tokenizer, items, extend_with=extend_with)
    run = dict(args=args, lora_rank=lora_rank, resume=resume)
    return fit(PairTrainer, model, tokenizer, pairs, eval_pairs, loss, collator, **run)


def train_partial_on_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    eval_texts: Sequence[Text] = (),
    *,
    tail: str = "extend",
    end: int | None = None,
    group_size: int = 8,
    **run: Any,
) -> dict[str, float]:
    """Train a reward model of prefixes in place on all pairs of rated texts of one prompt, with soft labels.

    A pair has the label sigmoid(r(y) - r(y')), the probability that y wins by the reward of whole texts. A batch is one
    forward pass over its texts, whatever the number of pairs.

    Args:
        texts, eval_texts: samples of the reference, rated (`rate`), several for each prompt.
        group_size: texts of a prompt that are compared with each other, at most; batch sizes of `args` count groups.

    All other arguments are those of `train_reward_model`.

    Returns:
        Metrics: as `train_reward_model`; the text with the higher reward is the chosen one.

    Raises:
        ValueError: as `train_reward_model`, if a text has no finite reward, or no prompt has two texts.
        FloatingPointError: as `train_reward_model`.
    """
    _check_rated(texts, eval_texts)
    loss, items = objective_functions("partial", tail, "prefix")
    extend_with = _end(tokenizer, end) if tail == "extend" else None
    groups, eval_groups = (data.in_groups(some, group_size) if some else [] for some in (texts, eval_texts))

    def soft_loss(*terms: Tensor) -> Tensor:
        return loss(*terms[:-1], labels=terms[-1])

    collator = collate_by(data.collate_groups, tokenizer, items, extend_with=extend_with)
    return fit(GroupTrainer, model, tokenizer, groups, eval_groups, soft_loss, collator, **run)


def train_value_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    eval_texts: Sequence[Text] = (),
    *,
    objective: str = "value",
    lam: float = 1.0,
    **run: Any,
) -> dict[str, float]:
    """Train a value model in place: every prefix of a text predicts what the reward of the whole will be.

    Args:
        texts, eval_texts: samples of the reference, rated (`rate`).
        objective: "value" (controlled decoding) predicts the mean reward, "soft" the soft value
            log E[exp(lam r)] / lam, up to a constant for each prompt (`soft_value_loss`, `data.centred`).
        lam: weight of the reward in the soft value, in nats per unit of reward.

    All other arguments are those of `train_reward_model`.

    Returns:
        Metrics: `eval_loss` per prefix, of values in squared units of reward, `value_metrics`, seconds.

    Raises:
        ValueError: as `train_reward_model`, if a text has no finite reward; for "soft", if no prompt has two texts or
            lam is not a positive number.
        FloatingPointError: as `train_reward_model`.

    Warns:
        UserWarning: if soft values know less of the held-out texts than V = 0 does, whose loss is 1.
    """
    _check_rated(texts, eval_texts)
    loss: Callable[..., Tensor] = losses.prefix_value_loss
    if objective == "soft":
        texts, eval_texts = data.centred(texts, eval_texts, lam=lam)
        highest = max((text.reward for text in texts), default=0.0)
        loss = partial(losses.soft_value_loss, lam=lam, highest=highest)
    elif objective != "value":
        raise ValueError(f'objective must be "value" or "soft", got {objective!r}')
    collator = collate_by(data.collate_texts, tokenizer, response_tokens)
    metrics = fit(ValueTrainer, model, tokenizer, texts, eval_texts, loss, collator, **run)
    if objective == "soft" and metrics.get("eval_loss", 0.0) > 1:
        warnings.warn(
            f"the held-out loss of the soft values is {metrics['eval_loss']:.3g}, and that of a guide that says "
            f"nothing is 1: learn from more texts per prompt, or for a beta below {lam:g}",
            stacklevel=2,
        )
    return metrics


def train_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    eval_texts: Sequence[Text] = (),
    *,
    beta: float,
    args: TrainingArguments,
    **run: Any,
) -> dict[str, float]:
    """Train a language model in place on samples of the reference, drawn again in proportion to exp(beta r).

    With enough of them it becomes the RLHF policy at beta, and log pi - log pi_ref a guide (`likelihood_loss`).

    Args:
        model: a causal language model, the reference before it is trained.
        texts, eval_texts: samples of the reference, rated (`rate`), several for each prompt; each prompt's are drawn
            once from its own (`data.reweighted`, by the seed of `args`).
        beta: weight of the reward, in nats per unit of reward, as in `generate`.

    All other arguments are those of `train_reward_model`.

    Returns:
        Metrics: `eval_loss` in nats per token, `effective_texts_mean` and `effective_texts_least` per prompt under the
        weights, seconds.

    Raises:
        ValueError: as `train_reward_model`, if a text has no finite reward, a prompt has a single text, or beta is not
            a positive number.
        FloatingPointError: as `train_reward_model`.

    Warns:
        UserWarning: if fewer than 100 texts per prompt are effective.
    """
    _check_rated(texts, eval_texts)
    drawn, held_out = (data.reweighted(some, beta, args.seed) for some in (texts, eval_texts))
    effective = data.effective_texts(texts, beta)
    if effective.mean() < FEW_TEXTS:
        warnings.warn(
            f"at beta {beta:g} only {effective.mean():.3g} texts per prompt are effective, fewer than {FEW_TEXTS}: "
            "write more of them, or choose a lower beta",
            stacklevel=2,
        )
    loss, collator = losses.likelihood_loss, collate_by(data.collate_texts, tokenizer, response_tokens)
    metrics = fit(LikelihoodTrainer, model, tokenizer, drawn, held_out, loss, collator, args=args, **run)
    return metrics | {"effective_texts_mean": float(effective.mean()), "effective_texts_least": float(effective.min())}


def _end(tokenizer: PreTrainedTokenizerBase, end: int | None) -> int:
    """The token that the shorter response is continued with. Raises ValueError if there is none."""
    if (end := tokenizer.eos_token_id if end is None else end) is None:
        raise ValueError('tail "extend" continues responses with the end token, and the tokenizer has none: take "min"')
    return end


def _check_rated(*texts: Sequence[Text]) -> None:
    if unrated := sum(not math.isfinite(text.reward) for some in texts for text in some):
        raise ValueError(f"texts must have finite rewards, got {unrated} without: call rate() first")


def collate_by(gather: Callable, tokenizer: PreTrainedTokenizerBase, items: Items, **settings: Any) -> Collator:
    """Records -> a batch, by a `gather` of `data`, with `items` of it as labels for Trainer to count."""

    def collate_with_items(batch: Sequence) -> Batch:
        tensors = gather(batch, tokenizer.pad_token_id or 0, **settings)
        return tensors | {"labels": items(tensors)}

    return collate_with_items


@torch.no_grad()
def rate(texts: Sequence[Text], reward_fn: RewardFn, *, batch_size: int = 32, device: str = "cpu") -> list[Text]:
    """The texts, each with the reward of its whole response."""
    rated = []
    for start in progress(range(0, len(texts), batch_size), desc="rewards"):
        some = texts[start : start + batch_size]
        batch = data.collate_texts(some, pad_id=0)
        rewards = reward_fn(batch["input_ids"].to(device), batch["attention_mask"].to(device)).tolist()
        rated += [text._replace(reward=reward) for text, reward in zip(some, rewards, strict=True)]
    return rated


def fit(
    trainer_class: "type[PrefixTrainer]",
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence,
    eval_items: Sequence,
    loss: Callable[..., Tensor],
    collator: Collator,
    *,
    args: TrainingArguments,
    lora_rank: int | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train a model in place by one of the trainers below; what all objectives share."""
    trainer_class.check(model)
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one process each with `torchrun --nproc-per-node={args.n_gpu} "
            "-m pargs_min train ...`, or show it a single one through CUDA_VISIBLE_DEVICES"
        )
    checkpoint = check_settings(args, resume)
    check_rank(checkpoint, lora_rank)
    with enough_memory(*_asked(args)), low_rank(model, lora_rank), _forward_is(trainer_class.reads, model):
        parts = dict(train_dataset=items, eval_dataset=eval_items or None, callbacks=[WithTokenizer(tokenizer)])
        trainer = trainer_class(model, args, data_collator=collator, loss=loss, **parts)
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "args.fsdp shards the model, and shards cannot be saved as one yet; use DDP (plain torchrun)"
            )
        metrics = trainer.fit(checkpoint)
    model.eval()
    return metrics


def _asked(args: TrainingArguments) -> tuple[str, str]:
    """What training takes, and what to lower where that is too much."""
    size, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    doing = f"training with --per-device-train-batch-size {size} (evaluating with {args.per_device_eval_batch_size}), "
    doing += f"--gradient-accumulation-steps {parts}"
    ways = [f"--per-device-train-batch-size {size // 2} --gradient-accumulation-steps {2 * parts}"] * (size > 1)
    ways += ["--gradient-checkpointing True"] * (not args.gradient_checkpointing)
    way_out = f"the same training fits in less with {' or '.join(ways)}, from the last checkpoint with --resume; "
    way_out += "another one with --lora-rank 16, --bf16 True, a lower --max-length"
    return doing, way_out if ways else way_out.partition("; ")[2]


def token_log_probs(model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """(B, T) log pi(ids_t | ids_1:t-1) in nats of all response tokens under a language model, in float32 or wider.

    Columns that hold prompts alone are 0: the logits of a long prompt over a large vocabulary take more memory than
    all else. It calls the forward of the model's class, for a model whose own is replaced by this function.
    """
    width = ids.shape[1] - int(prompt_lengths.min())
    settings: dict[str, Any] = dict(attention_mask=mask, use_cache=False, logits_to_keep=width + 1)
    settings |= {"position_ids": token_positions(mask)} if takes_positions(type(model).forward) else {}
    logits = type(model).forward(model, input_ids=ids, **settings).logits[:, -width - 1 : -1]
    logits = widened(logits)
    log_probs = logits.gather(2, ids[:, -width:, None])[..., 0] - logits.logsumexp(-1)
    return F.pad(log_probs, (ids.shape[1] - width, 0))


class PrefixTrainer(Watched):
    """transformers' Trainer, for losses of the rewards at all response tokens; a subclass says where those are.

    `labels` mark what the loss is a mean of, -100 elsewhere: Trainer counts them over all parts of a global batch
    (accumulation steps, processes), so that a prefix weighs the same wherever it falls. `terms` are the loss's
    arguments, a row each.
    """

    reads: Callable[..., Any] = staticmethod(prefix_rewards)  # what calling the model gives
    given: tuple[str, ...] = ("input_ids", "attention_mask")  # what it is called with

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        """Raises ValueError if the model cannot be trained so."""
        if not is_causal(model):
            raise ValueError(f"{type(model).__name__} has no reward at every token; train a causal model")
        if model.score.out_features != 1:
            raise ValueError(
                f"{type(model).__name__} has a vocabulary head, which would learn about a token only where it came; "
                "train a scalar head and distil it (--distil-from), or use FaRMA's loss (--objective farma)"
            )

    def __init__(self, *arguments, loss: Callable[..., Tensor], **keywords):
        super().__init__(*arguments, compute_metrics=self.metrics, **keywords)
        self.loss = loss
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = self.terms(model(*(inputs[name] for name in self.given)), inputs)
        loss = self.loss(*terms)
        if num_items_in_batch is not None:
            # Gradients are summed over accumulation steps and averaged over processes: the mean of all items.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            counted = torch.as_tensor(num_items_in_batch).clamp(min=1)  # without a pair that is long enough: 0
            loss = loss * processes * (inputs["labels"] != -100).sum() / counted
        return (loss, terms) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, terms = self.compute_loss(model, inputs, return_outputs=True)
        # The loss of each row and what it is a mean of: Trainer would average over batches, however large they are.
        means = torch.stack([self.loss(*row) for row in zip(*(term.split(1) for term in terms), strict=True)])
        items = (inputs["labels"] != -100).view(len(means), -1).sum(1)
        predictions, labels = self.predictions_and_labels(terms, inputs)
        return None, (means, items, *predictions), labels


class PairTrainer(PrefixTrainer):
    """For batches of pairs (`collate`)."""

    def terms(self, rewards, inputs):
        return *data.at_response_tokens(rewards, inputs), inputs["chosen_lengths"], inputs["rejected_lengths"]

    def predictions_and_labels(self, terms, inputs):
        chosen, rejected, *ends = terms[:4]  # what a loss reads besides comes behind
        longest = torch.maximum(*ends)[:, None]
        lengths = torch.cat([fractions(longest), longest.new_tensor(LENGTHS).expand(len(longest), -1)], 1)
        margins, differ = prefix_margins(chosen, rejected, inputs, lengths)
        return (_wins(margins) * differ, differ.double()), longest

    def metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        """`loss`, and `accuracy` over pairs: of whole responses, after 25, 50, 75 % and after 1, 2, 4, ... tokens."""
        (means, items, wins, differ), longest = evaluation.predictions, evaluation.label_ids
        names = _percent_names("accuracy")
        names += [f"accuracy_after_{length}" for length in LENGTHS if length < longest.max()]
        accuracies = {name: (wins[:, n].sum(), count) for n, name in enumerate(names) if (count := differ[:, n].sum())}
        counts = {"loss": mean_loss(means, items), "pairs": int(differ[:, len(FRACTIONS) - 1].sum())}
        return counts | {name: float(won / count) for name, (won, count) in accuracies.items()}


class GroupTrainer(PairTrainer):
    """For batches of groups of rated texts (`collate_groups`); what it predicts is summed over the pairs of a group."""

    def terms(self, rewards, inputs):
        return *super().terms(rewards[inputs["rows"]], inputs), inputs["won"]

    def predictions_and_labels(self, terms, inputs):
        of_pairs = inputs | {"input_ids": inputs["input_ids"][inputs["rows"]]}
        return super().predictions_and_labels(terms, of_pairs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        _, (means, items, wins, differ), longest = super().prediction_step(model, inputs, prediction_loss_only)
        group = inputs["group"].to(means.device)

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(int(group.max()) + 1, *values.shape[1:]).index_add(0, group, values)

        counts = summed(items)
        longest = longest.new_zeros(len(counts)).scatter_reduce(0, group, longest[:, 0], "amax")
        return None, (summed(means * items) / counts, counts, summed(wins), summed(differ)), longest


class ValueTrainer(PrefixTrainer):
    """For batches of rated texts (`collate_texts`)."""

    def terms(self, rewards, inputs):
        lengths = inputs["response_lengths"]
        return data.from_columns(rewards, inputs["prompt_lengths"], int(lengths.max())), inputs["rewards"], lengths

    def predictions_and_labels(self, terms, inputs):
        values, rewards, lengths = terms
        return (values.gather(1, fractions(lengths[:, None]) - 1),), rewards

    def metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        """`loss`, and `correlation` of value and reward over texts, also after 25, 50 and 75 % of each."""
        (means, items, values), rewards = evaluation.predictions, evaluation.label_ids
        columns = zip(_percent_names("correlation"), values.T, strict=True)
        varied = {name: column for name, column in columns if rewards.std() > 0 and column.std() > 0}
        correlations = {name: float(np.corrcoef(column, rewards)[0, 1]) for name, column in varied.items()}
        return {"loss": mean_loss(means, items), "texts": len(rewards)} | correlations


class LikelihoodTrainer(ValueTrainer):
    """For batches of texts, read by a language model."""

    reads = staticmethod(token_log_probs)
    given = (*PrefixTrainer.given, "prompt_lengths")

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no probability for the next token; train a language model")

    def terms(self, log_probs, inputs):
        log_probs, _, lengths = super().terms(log_probs, inputs)
        return log_probs, lengths

    def predictions_and_labels(self, terms, inputs):
        return (), inputs["rewards"]

    def metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        """`loss`."""
        means, items = evaluation.predictions
        return {"loss": mean_loss(means, items), "texts": len(means)}


def fractions(lengths: Tensor) -> Tensor:
    """(B, 4) of (B, 1) lengths: FRACTIONS of each, in whole tokens."""
    return torch.ceil(lengths * lengths.new_tensor(FRACTIONS, dtype=torch.float64)).long()


def objective_functions(
    objective: str, tail: str, reduction: str, lengths: tuple[int, int | None] = (1, None)
) -> tuple[Callable[..., Tensor], Items]:
    """The loss of (chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths), and what it is a mean of.

    The second function takes a collated batch and gives a tensor with -100 where there is nothing to count.

    Raises:
        ValueError: if a name is unknown.
    """
    known = dict(objective=("partial", "full", "win"), tail=("extend", "min"), reduction=("prefix", "pair"))
    for name, value in (("objective", objective), ("tail", tail), ("reduction", reduction)):
        if value not in known[name]:
            raise ValueError(f"{name} must be one of {', '.join(known[name])}, got {value!r}")

    def items(batch: Batch) -> Tensor:
        chosen, rejected = batch["chosen_lengths"], batch["rejected_lengths"]
        if objective == "win":
            return _counted(written_up_to(torch.stack([chosen, rejected], 1)))
        if objective == "full" or reduction == "pair":
            return one_each(batch)
        longest = int(torch.maximum(chosen, rejected).max())
        return _counted(losses.compared_prefixes(chosen, rejected, longest, tail, lengths))

    if objective != "partial":
        return {"full": losses.full_loss, "win": losses.prefix_win_loss}[objective], items
    return partial(losses.partial_bradley_terry_loss, tail=tail, reduction=reduction, lengths=lengths), items


def one_each(batch: Batch) -> Tensor:
    """The items of a loss that is a mean over pairs."""
    return torch.zeros_like(batch["chosen_lengths"])


def response_tokens(batch: Batch) -> Tensor:
    """Items: every token of the responses."""
    return _counted(written_up_to(batch["response_lengths"]))


def written_up_to(lengths: Tensor) -> Tensor:
    """(..., T) booleans, true at the first tokens up to each of the (...) lengths; T is the largest."""
    return torch.arange(int(lengths.max())) < lengths[..., None]


def _counted(items: Tensor) -> Tensor:
    """Labels of what a loss is a mean of, as Trainer counts them."""
    return torch.where(items, 0, -100)


@contextmanager
def _forward_is(reads: Callable[..., Any], model: PreTrainedModel) -> Iterator[None]:
    """Context manager: calling the model gives `reads(model, ids, mask)`, such as its rewards at every token.

    The own forward of a reward model pools the last one. Wrappers (DDP, autocast) act on a model that is called, so its
    parts must not be called behind their back.
    """
    model.forward = MethodType(reads, model)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):  # the second is a trace of accelerate's autocast
            vars(model).pop(name, None)


# ---- evaluation ----


class PrefixAccuracy(NamedTuple):
    """How often the chosen response is ahead after i = 1, 2, ... tokens, and over how many pairs; both (T,)."""

    accuracy: Tensor
    pairs: Tensor


@torch.no_grad()
def prefix_accuracy(model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int = 32) -> PrefixAccuracy:
    """Pair accuracy of a reward model at every prefix length.

        accuracy_i = mean over pairs of [r(chosen_1:i) > r(rejected_1:i)],   ties 1/2

    over the pairs whose first i tokens differ. A response that has ended stays as it is, so the last entry is the usual
    accuracy on whole responses. It is nan where no pair differs yet.

    Args:
        model: causal, with one label; trained on prefixes or not.
        batch_size: in pairs.

    Raises:
        ValueError: if there are no pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty; give at least one")
    longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    lengths = torch.arange(1, longest + 1, device=model.device)
    ahead = torch.zeros(2, longest, dtype=torch.float64, device=model.device)
    for start in range(0, len(pairs), batch_size):
        some = data.collate(pairs[start : start + batch_size], pad_id=0)
        batch = {name: tensor.to(model.device) for name, tensor in some.items()}
        rewards = data.at_response_tokens(prefix_rewards(model, batch["input_ids"], batch["attention_mask"]), batch)
        margins, differ = prefix_margins(*rewards, batch, lengths.expand(len(batch["chosen_lengths"]), -1))
        ahead += torch.stack([_wins(margins) * differ, differ.double()]).sum(1)
    return PrefixAccuracy((ahead[0] / ahead[1]).cpu(), ahead[1].long().cpu())


def prefix_margins(
    chosen_rewards: Tensor, rejected_rewards: Tensor, batch: dict[str, Tensor], lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much the chosen response is ahead at given prefix lengths, and whether the prefixes differ at all.

        margin = r(chosen_1:i) - r(rejected_1:i),   where a response that has ended stays as it is

    Args:
        chosen_rewards, rejected_rewards: (B, T) reward at each response token, from `at_response_tokens`.
        batch: from `collate`.
        lengths: (B, K) prefix lengths i >= 1, in tokens.

    Returns:
        (B, K) margins, and (B, K) booleans.
    """
    ends = batch["chosen_lengths"][:, None], batch["rejected_lengths"][:, None]
    ids = data.at_response_tokens(batch["input_ids"], batch)
    both = torch.arange(ids[0].shape[1], device=lengths.device) < torch.minimum(*ends)
    shared = ((ids[0] == ids[1]) & both).cumprod(1).sum(1, keepdim=True)
    chosen, rejected = (
        rewards.gather(1, torch.minimum(lengths, end) - 1)
        for rewards, end in zip((chosen_rewards, rejected_rewards), ends, strict=True)
    )
    return chosen - rejected, torch.minimum(lengths, torch.maximum(*ends)) > shared


def mean_loss(means: np.ndarray, items: np.ndarray) -> float:
    """Of rows that are means of so many items each."""
    return float((means.astype(float) * items).sum() / max(items.sum(), 1))


def _percent_names(measure: str) -> list[str]:
    """A name for each of FRACTIONS; that of the whole is the measure's own."""
    return [f"{measure}_{100 * fraction:.0f}_percent" for fraction in FRACTIONS[:-1]] + [measure]


def _wins(margins: Tensor) -> Tensor:
    return (margins > 0).double() + 0.5 * (margins == 0).double()
