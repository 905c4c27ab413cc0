"""Train a reward model on preference pairs, on every prefix of the responses or on whole responses only; or a value
model on rated samples.

A batch of B pairs is one forward pass of 2B rows, which yields the rewards of all prefixes. The loop, checkpoints,
precision and processes are those of transformers' `Trainer`; ours are the losses and the metrics.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from pargs_min.data import Pair, Text, at_response_tokens, collate, collate_texts, from_columns
from pargs_min.lora import check_rank, low_rank
from pargs_min.losses import bradley_terry_loss, compared_prefixes, partial_bradley_terry_loss, prefix_value_loss
from pargs_min.memory import enough_memory, is_out_of_memory
from pargs_min.models import load_config
from pargs_min.progress import progress
from pargs_min.reward_model import is_causal, prefix_rewards
from pargs_min.scoring import RewardFn
from pargs_min.store import saving

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the longer response of a pair; 1 is the usual accuracy of a reward model
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # in tokens


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
        objective: "partial" (PARGS) compares every prefix, "full" (ARGS) whole responses only.
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
    end = tokenizer.eos_token_id if end is None else end
    extend_with = end if (objective, tail) == ("partial", "extend") else None
    pad_id = tokenizer.pad_token_id or 0

    def collate_with_items(batch: Sequence[Pair]) -> dict[str, Tensor]:
        tensors = collate(batch, pad_id, extend_with)
        return tensors | {"labels": items(tensors)}

    parts = dict(data_collator=collate_with_items, compute_metrics=prefix_metrics, loss=loss)
    return _fit(PairTrainer, model, tokenizer, pairs, eval_pairs, args, lora_rank, resume, **parts)


def train_value_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    eval_texts: Sequence[Text] = (),
    *,
    args: TrainingArguments,
    lora_rank: int | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train a value model in place: every prefix of a text predicts the reward of the whole (controlled decoding).

    Args:
        texts, eval_texts: samples of the reference, rated (`rate`).

    All other arguments are those of `train_reward_model`.

    Returns:
        Metrics: `eval_loss` in squared units of reward per prefix, `value_metrics`, seconds.

    Raises:
        ValueError: as `train_reward_model`, or if a text has no finite reward.
        FloatingPointError: as `train_reward_model`.
    """
    unrated = sum(not math.isfinite(text.reward) for text in (*texts, *eval_texts))
    if unrated:
        raise ValueError(f"texts must have finite rewards, got {unrated} without: call rate() first")
    pad_id = tokenizer.pad_token_id or 0

    def collate_with_items(batch: Sequence[Text]) -> dict[str, Tensor]:
        tensors = collate_texts(batch, pad_id)
        lengths = tensors["response_lengths"]
        return tensors | {"labels": torch.where(torch.arange(int(lengths.max())) < lengths[:, None], 0, -100)}

    parts = dict(data_collator=collate_with_items, compute_metrics=value_metrics, loss=prefix_value_loss)
    return _fit(ValueTrainer, model, tokenizer, texts, eval_texts, args, lora_rank, resume, **parts)


@torch.no_grad()
def rate(texts: Sequence[Text], reward_fn: RewardFn, *, batch_size: int = 32, device: str = "cpu") -> list[Text]:
    """The texts, each with the reward of its whole response."""
    rated = []
    for start in progress(range(0, len(texts), batch_size), desc="rewards"):
        some = texts[start : start + batch_size]
        batch = collate_texts(some, pad_id=0)
        rewards = reward_fn(batch["input_ids"].to(device), batch["attention_mask"].to(device)).tolist()
        rated += [text._replace(reward=reward) for text, reward in zip(some, rewards, strict=True)]
    return rated


def _fit(
    trainer_class,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data,
    eval_data,
    args,
    lora_rank: int | None,
    resume: bool,
    **parts,
) -> dict[str, float]:
    if not is_causal(model):
        raise ValueError(f"{type(model).__name__} has no reward at every token; train a causal model")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one process each with `torchrun --nproc-per-node={args.n_gpu} "
            "-m pargs_min train ...`, or show it a single one through CUDA_VISIBLE_DEVICES"
        )
    check_settings(args, resume)
    checkpoint = last_checkpoint(args.output_dir) if resume else None
    check_rank(checkpoint, lora_rank)
    with enough_memory(*_asked(args)), low_rank(model, lora_rank), _forward_is_prefix_rewards(model):
        parts |= dict(train_dataset=data, eval_dataset=eval_data or None, callbacks=[WithTokenizer(tokenizer)])
        trainer = trainer_class(model, args, **parts)
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


IGNORED = "training here does not read it"
ROUNDED = "it would round the weights that are saved; --bf16 and --fp16 evaluate in half precision without that"
AT_ONCE = "metrics are of all held-out records at once"
# Settings of transformers: which values are right here, and why no others are.
ACCEPTED: dict[str, tuple[tuple, str]] = {
    "label_smoothing_factor": ((0.0,), "these losses have no labels to smooth"),
    "bf16_full_eval": ((False,), ROUNDED),
    "fp16_full_eval": ((False,), ROUNDED),
    "auto_find_batch_size": ((False,), "it would begin again from weights that are half trained"),
    "use_liger_kernel": ((False,), "it replaces forward passes that training replaces itself"),
    "dataloader_drop_last": ((False,), "it would drop held-out records, too"),
    "batch_eval_metrics": ((False,), AT_ONCE),
    "eval_do_concat_batches": ((True,), AT_ONCE),
    "eval_use_gather_object": ((False,), AT_ONCE),
    "debug": (([],), "it cannot look into these batches"),
    "train_sampling_strategy": (("random", "sequential"), "transformers cannot tell how long a pair is"),
    "resume_from_checkpoint": ((None,), f"{IGNORED}; take --resume"),
    "prediction_loss_only": ((False,), IGNORED),
    "label_names": ((None,), IGNORED),
    "include_for_metrics": (([],), IGNORED),
    "do_predict": ((False,), IGNORED),
    "push_to_hub": ((False,), "a model that is whole can be pushed from its folder (hf upload)"),
}


def check_settings(args: TrainingArguments, resume: bool) -> None:
    """Check that training here does what transformers' settings say, and that a run can be resumed if it is to be.

    Raises:
        ValueError: naming the setting and the reason.
    """
    for name, (accepted, why) in ACCEPTED.items():
        if (value := getattr(args, name)) not in accepted:
            wanted = " or ".join(map(str, accepted))
            raise ValueError(f"{name} (--{name.replace('_', '-')}) must be {wanted}, got {value}: {why}")
    ranges: dict[str, tuple[bool, str]] = {
        "max_steps": (args.max_steps >= 1 or args.max_steps == -1, "at least 1, or -1 for whole epochs"),
        "num_train_epochs": (args.max_steps > 0 or 0 < args.num_train_epochs < math.inf, "a positive number"),
        "learning_rate": (0 <= args.learning_rate < math.inf, "a number from 0"),
    }
    ranges |= {name: (False, "a number") for name, value in vars(args).items() if value is not None and value != value}
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        ranges[name] = (getattr(args, name) >= 1, "at least 1")
    for name, (right, wanted) in ranges.items():
        if not right:
            raise ValueError(f"{name} (--{name.replace('_', '-')}) must be {wanted}, got {getattr(args, name)}")
    if not resume:
        return
    if args.save_only_model:
        raise ValueError("save_only_model (--save-only-model) leaves checkpoints that --resume cannot go on from")
    checkpoint = last_checkpoint(args.output_dir)
    if checkpoint is not None and not (Path(checkpoint) / "optimizer.pt").exists():
        raise ValueError(
            f"{checkpoint} holds no optimizer.pt (was it made with --save-only-model?), so resume (--resume) cannot go "
            "on from it; choose another output folder"
        )
    if checkpoint is not None:
        _check_whole(Path(checkpoint))


def _check_whole(checkpoint: Path) -> None:
    """Raises ValueError, naming the file, if one of a checkpoint's files cannot be read."""
    load_config(checkpoint)  # looks at configuration, tokenizer and weights
    for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), checkpoint / "trainer_state.json"]:
        try:
            if file.suffix == ".json":
                TrainerState.load_from_json(str(file))
            elif not is_zipfile(file):
                raise ValueError("not what torch wrote")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete {checkpoint} to go on from an earlier one") from None


class Watched(Trainer):
    """transformers' Trainer, which stops where training diverges.

    It reports no `train_loss`: that of transformers is of one process, and of the steps since the last start alone.
    """

    def __init__(self, *arguments, **keywords):
        with usable_settings((ImportError, KeyError, RuntimeError)):
            super().__init__(*arguments, **keywords)

    def fit(self, checkpoint: str | None) -> dict[str, float]:
        """Train, from a checkpoint on if there is one, and evaluate: the metrics of both."""
        if self.args.logging_strategy == "no":
            self.remove_callback(PrinterCallback)
        with usable_settings():
            metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        check_finite(f"step {self.state.global_step}", self.model.parameters())
        return metrics | (self.evaluate() if self.eval_dataset else {})

    def training_step(self, *inputs, **settings):
        loss = super().training_step(*inputs, **settings)
        check_finite(f"step {self.state.global_step + 1}", [loss])
        return loss

    def _save_checkpoint(self, *what, **settings):
        with saving(self.args.output_dir):
            super()._save_checkpoint(*what, **settings)

    def save_model(self, *where, **settings):
        check_finite(f"step {self.state.global_step}", self.model.parameters())
        super().save_model(*where, **settings)

    def log(self, logs, *start):
        logs.pop("train_loss", None)
        super().log(logs, *start)


@contextmanager
def usable_settings(wrong: tuple[type[Exception], ...] = (ImportError, KeyError)) -> Iterator[None]:
    """Context manager: what transformers raises where a setting names what there is not becomes a ValueError."""
    try:
        yield
    except wrong as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"transformers cannot train with these settings: {error}") from error


def check_finite(when: str, tensors: Iterable[Tensor]) -> None:
    """Raises FloatingPointError if a loss or a weight is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise FloatingPointError(f"training diverged at {when}; lower --learning-rate")


class WithTokenizer(TrainerCallback):
    """Saves the tokenizer with every checkpoint. (Trainer's own way sets the model's special tokens by it.)"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def on_save(self, args, state, control, **_):
        if args.process_index == 0:
            self.tokenizer.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class PrefixTrainer(Watched):
    """transformers' Trainer, for losses of the rewards at all response tokens; a subclass says where those are.

    `labels` mark what the loss is a mean of, -100 elsewhere: Trainer counts them over all parts of a global batch
    (accumulation steps, processes), so that a prefix weighs the same wherever it falls. `terms` are the loss's
    arguments, a row each.
    """

    def __init__(self, *arguments, loss: Callable[..., Tensor], **keywords):
        super().__init__(*arguments, **keywords)
        self.loss = loss
        self.model_accepts_loss_kwargs = True  # makes Trainer count the labels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = self.terms(model(inputs["input_ids"], inputs["attention_mask"]), inputs)
        loss = self.loss(*terms)
        if num_items_in_batch is not None:
            # Gradients are summed over accumulation steps and averaged over processes: the mean of all items.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * processes * (inputs["labels"] != -100).sum() / num_items_in_batch
        return (loss, terms) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, terms = self.compute_loss(model, inputs, return_outputs=True)
        # The loss of each row and what it is a mean of: Trainer would average over batches, however large they are.
        losses = torch.stack([self.loss(*row) for row in zip(*(term.split(1) for term in terms), strict=True)])
        items = (inputs["labels"] != -100).view(len(losses), -1).sum(1)
        predictions, labels = self.predictions_and_labels(terms, inputs)
        return None, (losses, items, *predictions), labels


class PairTrainer(PrefixTrainer):
    """For batches of pairs (`collate`)."""

    def terms(self, rewards, inputs):
        return *at_response_tokens(rewards, inputs), inputs["chosen_lengths"], inputs["rejected_lengths"]

    def predictions_and_labels(self, terms, inputs):
        chosen, rejected, *ends = terms
        longest = torch.maximum(*ends)[:, None]
        lengths = torch.cat([fractions(longest), longest.new_tensor(LENGTHS).expand(len(longest), -1)], 1)
        margins, differ = prefix_margins(chosen, rejected, inputs, lengths)
        return (margins, differ.long()), longest


class ValueTrainer(PrefixTrainer):
    """For batches of rated texts (`collate_texts`)."""

    def terms(self, rewards, inputs):
        lengths = inputs["response_lengths"]
        return from_columns(rewards, inputs["prompt_lengths"], int(lengths.max())), inputs["rewards"], lengths

    def predictions_and_labels(self, terms, inputs):
        values, rewards, lengths = terms
        return (values.gather(1, fractions(lengths[:, None]) - 1),), rewards


def fractions(lengths: Tensor) -> Tensor:
    """(B, 4) of (B, 1) lengths: FRACTIONS of each, in whole tokens."""
    return torch.ceil(lengths * lengths.new_tensor(FRACTIONS, dtype=torch.float64)).long()


def objective_functions(
    objective: str, tail: str, reduction: str, lengths: tuple[int, int | None] = (1, None)
) -> tuple[Callable[..., Tensor], Callable]:
    """The loss of (chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths), and what it is a mean of.

    The second function takes a collated batch and gives a tensor with -100 where there is nothing to count.

    Raises:
        ValueError: if a name is unknown.
    """
    known = dict(objective=("partial", "full"), tail=("extend", "min"), reduction=("prefix", "pair"))
    for name, value in (("objective", objective), ("tail", tail), ("reduction", reduction)):
        if value not in known[name]:
            raise ValueError(f'{name} must be "{known[name][0]}" or "{known[name][1]}", got {value!r}')

    def items(batch: dict[str, Tensor]) -> Tensor:
        chosen, rejected = batch["chosen_lengths"], batch["rejected_lengths"]
        if objective == "full" or reduction == "pair":
            return torch.zeros_like(chosen)
        compared = compared_prefixes(chosen, rejected, int(torch.maximum(chosen, rejected).max()), tail, lengths)
        return torch.where(compared, 0, -100)

    if objective == "full":
        return full_loss, items
    return partial(partial_bradley_terry_loss, tail=tail, reduction=reduction, lengths=lengths), items


def full_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """The Bradley-Terry loss of whole responses: of the reward at the last token of each (nats per pair).

    >>> full_loss(torch.tensor([[9.0, 2.0]]), torch.tensor([[1.0, 9.0]]), torch.tensor([2]), torch.tensor([1]))
    tensor(0.3133)
    """
    return bradley_terry_loss(
        chosen_rewards.gather(1, chosen_lengths[:, None] - 1), rejected_rewards.gather(1, rejected_lengths[:, None] - 1)
    )


@contextmanager
def _forward_is_prefix_rewards(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: calling the model gives its rewards at every token.

    The model's own forward pools the last one. Wrappers (DDP, autocast) act on a model that is called, so its
    parts must not be called behind their back.
    """
    model.forward = MethodType(prefix_rewards, model)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):  # the second is a trace of accelerate's autocast
            vars(model).pop(name, None)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a folder; one that was being written when the run was killed does not count."""
    whole = [str(one) for one in checkpoints(folder) if (one / "trainer_state.json").exists()]  # Trainer's last file
    return max(whole, key=lambda name: int(name.rpartition("-")[2]), default=None)


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders that Trainer made for checkpoints, whole or not."""
    return [one for one in Path(folder).glob("checkpoint-*") if one.is_dir() and one.name[11:].isdecimal()]


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
        batch = {name: t.to(model.device) for name, t in collate(pairs[start : start + batch_size], pad_id=0).items()}
        rewards = at_response_tokens(prefix_rewards(model, batch["input_ids"], batch["attention_mask"]), batch)
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
    ids = at_response_tokens(batch["input_ids"], batch)
    both = torch.arange(ids[0].shape[1], device=lengths.device) < torch.minimum(*ends)
    shared = ((ids[0] == ids[1]) & both).cumprod(1).sum(1, keepdim=True)
    chosen, rejected = (
        rewards.gather(1, torch.minimum(lengths, end) - 1)
        for rewards, end in zip((chosen_rewards, rejected_rewards), ends, strict=True)
    )
    return chosen - rejected, torch.minimum(lengths, torch.maximum(*ends)) > shared


def prefix_metrics(evaluation: EvalPrediction) -> dict[str, float]:
    """For Trainer: `loss`, and pair accuracies: `accuracy` (whole responses), after 25, 50, 75 % and after 1, 2, 4, ...
    tokens."""
    (losses, items, margins, differ), longest = evaluation.predictions, evaluation.label_ids
    names = _percent_names("accuracy") + [f"accuracy_after_{length}" for length in LENGTHS if length < longest.max()]
    wins, differ = _wins(torch.from_numpy(margins)), torch.from_numpy(differ).bool()
    compared = {name: wins[differ[:, column], column] for column, name in enumerate(names)}
    counts = {"loss": _mean_loss(losses, items), "pairs": len(wins)}
    return counts | {name: float(won.mean()) for name, won in compared.items() if len(won)}


def value_metrics(evaluation: EvalPrediction) -> dict[str, float]:
    """For Trainer: `loss`, and correlation of value and reward over texts, after 25, 50, 75 and 100 % of each
    (`correlation`)."""
    (losses, items, values), rewards = evaluation.predictions, evaluation.label_ids
    columns = zip(_percent_names("correlation"), values.T, strict=True)
    varied = {name: column for name, column in columns if rewards.std() > 0 and column.std() > 0}
    correlations = {name: float(np.corrcoef(column, rewards)[0, 1]) for name, column in varied.items()}
    return {"loss": _mean_loss(losses, items), "texts": len(rewards)} | correlations


def _mean_loss(losses: np.ndarray, items: np.ndarray) -> float:
    """Of rows that are means of so many items each."""
    return float((losses.astype(float) * items).sum() / max(items.sum(), 1))


def _percent_names(measure: str) -> list[str]:
    """A name for each of FRACTIONS; that of the whole is the measure's own."""
    return [f"{measure}_{100 * fraction:.0f}_percent" for fraction in FRACTIONS[:-1]] + [measure]


def _wins(margins: Tensor) -> Tensor:
    return (margins > 0).double() + 0.5 * (margins == 0).double()
