"""Training on a small GPU: adapters of low rank in place of all weights, merged when training ends."""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel


@contextmanager
def low_rank(model: PreTrainedModel, rank: int | None) -> Iterator[None]:
    """Context manager: only the head is trained, plus adapters on all remaining linear layers; afterwards they are
    merged into the weights, and the model is an ordinary one again.

        W x  becomes  W x + 2 B (A x),   A (rank, in) random, B (out, rank) zero at first

    Adapters and head are float32 or wider; where W is bfloat16, W + 2 B A is rounded to it in the end. Weights that
    need no gradient, such as those of a `frozen_trunk`, get no adapters.

    Args:
        model: causal, with a head called `score`; or a language model, of which only adapters are trained.
        rank: R >= 1, or None, which changes nothing.

    Raises:
        ValueError: if the rank is below 1, or peft is missing.

    Source: Hu et al. (2021), arXiv 2106.09685, with alpha = 2 R, on all linear layers as in arXiv 2305.14314.
    """
    if rank is None:
        yield
        return
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    config = lora_config(rank, [name.rpartition(".")[0] for name in frozen])
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # GPT-2 holds its weights transposed: peft sees to it
        warnings.filterwarnings("ignore", "You have passed exclude_modules")  # a language model has no such head
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft's to change
        adapters = get_peft_model(model, config).base_model  # within the model, which stays what it is outside
    if hasattr(model, "score"):
        model.score.to(torch.promote_types(model.score.weight.dtype, torch.float32)).requires_grad_(True)
    model.config.lora_rank = rank  # checkpoints keep it
    try:
        yield
    finally:
        adapters.merge_and_unload()
        for name, weight in model.named_parameters():
            weight.requires_grad_(name not in frozen)
        del model.config.lora_rank


def lora_config(rank: int, without: Iterable[str] = ()):
    """The adapters of `low_rank`, as peft's configuration; `without` names modules that get none.

    Raises:
        ValueError: if the rank is below 1, or peft is missing.
    """
    if rank < 1:
        raise ValueError(f"lora_rank (--lora-rank) must be at least 1, got {rank}")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"lora_rank (--lora-rank) needs peft ({error}): pip install 'pargs-min[lora]'") from None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=["score", *without])


def check_rank(checkpoint: str | None, rank: int | None) -> None:
    """Raises ValueError if a checkpoint to resume from was made with another rank."""
    if checkpoint is None:
        return
    theirs = json.loads((Path(checkpoint) / "config.json").read_text("utf-8")).get("lora_rank")
    if theirs != rank:
        raise ValueError(
            f"{checkpoint} was made with lora_rank (--lora-rank) {theirs}, not {rank}: resume with the same, or choose "
            "another output folder"
        )
