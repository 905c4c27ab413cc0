"""transformers' Trainer, held to what it is told: settings that it would ignore or break on are refused, training that
diverges stops, and a run goes on from its last whole checkpoint. What is trained is in `train`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from pargs_min.memory import is_out_of_memory
from pargs_min.models import load_config
from pargs_min.store import saving

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
    "push_to_hub": ((False,), "a model is pushed when it is whole, by `pargs train` or `hf upload`"),
}


def check_settings(args: TrainingArguments, resume: bool) -> str | None:
    """Check that training here does what transformers' settings say, and that a run can be resumed if it is to be.

    Returns:
        The checkpoint to go on from, if there is one and `resume` is true.

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
    if resume and args.save_only_model:
        raise ValueError("save_only_model (--save-only-model) leaves checkpoints that --resume cannot go on from")
    if (checkpoint := last_checkpoint(args.output_dir) if resume else None) is None:
        return None
    if not (Path(checkpoint) / "optimizer.pt").exists():
        raise ValueError(
            f"{checkpoint} holds no optimizer.pt (was it made with --save-only-model?), so resume (--resume) cannot go "
            "on from it; choose another output folder"
        )
    _check_whole(Path(checkpoint))
    return checkpoint


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

    def create_scheduler(self, *arguments, **keywords):
        with usable_settings((TypeError, ValueError)):
            return super().create_scheduler(*arguments, **keywords)

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


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a folder; one that was being written when the run was killed does not count."""
    whole = [str(one) for one in checkpoints(folder) if (one / "trainer_state.json").exists()]  # Trainer's last file
    return max(whole, key=lambda name: int(name.rpartition("-")[2]), default=None)


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders that Trainer made for checkpoints, whole or not."""
    return [one for one in Path(folder).glob("checkpoint-*") if one.is_dir() and one.name[11:].isdecimal()]
