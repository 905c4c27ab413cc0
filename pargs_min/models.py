"""Models in: every pretrained model and tokenizer of the project is loaded here, from a folder or a hub id.

No code of a model's folder is run, and weights are read from safetensors alone. A model that is loaded is whole: every
weight comes from its files, and every weight of its files has a place. What cannot be loaded raises a `ValueError` that
names the folder and, where one is damaged, the file.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from pargs_min.codec import FORMS, check_fits, turn_end
from pargs_min.memory import is_out_of_memory
from pargs_min.reward_model import LANGUAGE_MODELS, OBJECTIVES
from pargs_min.store import replacing, saving

Name = str | os.PathLike
DTYPES = ("float32", "bfloat16", "float16", "auto")
SPREAD = "auto"  # the device that is all GPUs: layers of a model that is too large for one
SAFE = dict(trust_remote_code=False)
# Weights that do not fit are reported, and then refused here by their names.
WHOLE = dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **SAFE)
# What training records with a reward model, and which values it knows.
RECORD: dict[str, Any] = {
    "objective": (*OBJECTIVES,),
    "prompt_format": FORMS,
    "append_eos": (True, False),
    "shared_layers": range(10_000),
}
# What `save` may have written.
WRITTEN: tuple[str, ...] = ("config.json", "*.safetensors", "*.safetensors.index.json", "generation_config.json")
WRITTEN += ("tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*chat_template*")
WRITTEN += ("vocab.*", "merges.txt", "*.model", "README.md")  # the third is sentencepiece, the last the card
HEADS = ("score", "classifier")  # what the families of transformers call theirs
OLD_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")  # constants that old checkpoints keep among the weights
# What is read of a folder.
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors")


def default_device(asked: str | None = None) -> str:
    """The device that was asked for; by default cuda if there is one, else cpu.

    Raises:
        ValueError: if there is no such device on this machine.
    """
    try:
        torch.empty(0, device=asked or "cpu")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {asked!r} cannot be used: {_one_line(error)}") from error
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def load_config(name: Name) -> PreTrainedConfig:
    """The configuration of a model. Raises ValueError if there is none."""
    with _loading(name):
        return AutoConfig.from_pretrained(name, **SAFE)


def load_tokenizer(name: Name) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ValueError if there is none."""
    with _loading(name):
        return AutoTokenizer.from_pretrained(name, **SAFE)


def load_language_model(
    name: Name, *, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    Args:
        dtype: float32 to train or to compare, whatever the checkpoint holds; "auto" or bfloat16 to decode.
        device: where it goes; "auto" spreads its layers over all GPUs, for decoding alone.

    Raises:
        ValueError: if there is no such model, or it is not whole.
    """
    return _load(AutoModelForCausalLM, name, dtype, device)


def load_reward_model(
    name: Name,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    head: str | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a reward model, in evaluation mode; or make one of a language model, if `head` says so.

    Args:
        name: a folder or a hub id.
        tokenizer: given when the model is to be trained and saved: it gets a padding token that is not its end token
            (see `separate_pad_token`), and the model a row for it where one is needed.
        dtype: float32 to train, whatever the checkpoint holds; "auto" or bfloat16 to decode. Bidirectional models,
            whose heads are several layers, are always read in float32.
        head: what a language model gets: "scalar", drawn from torch's global random stream (`torch.manual_seed` first
            fixes it), or "vocab", which begins at zero, so that a token which training never meets keeps the reward 0.
            A reward model keeps the head that it has. None makes no head.
        device: where it goes.

    Raises:
        ValueError: if there is no such model or it is not whole; if it is a language model and `head` is None, or a
            classifier with several labels; if `head` is unknown, or "vocab" for a model with a scalar head; if what
            training recorded with it cannot be.
    """
    if head not in (None, "scalar", "vocab"):
        raise ValueError(f'head must be "scalar" or "vocab", got {head!r}')
    config = load_config(name)
    with _loading(name):
        trained = is_classifier(config)
    if not trained and head is None:
        raise ValueError(
            f"{name} ({_architecture(config)}) is not a sequence-classification model, and gives no rewards; train one "
            "from a language model with `pargs train`"
        )
    if trained and config.num_labels not in (1, config.get_text_config().vocab_size):
        raise ValueError(
            f"{name} is a classifier with {config.num_labels} labels; a reward model has one (num_labels=1), or one "
            "for each token"
        )
    if trained and head == "vocab" and config.num_labels == 1:
        raise ValueError(f"{name} has a scalar head; start a vocabulary head from a language model")
    model = _load(AutoModelForSequenceClassification, name, dtype, device, fresh_head=not trained)
    if tokenizer is not None:
        check_fits(model, tokenizer)
        separate_pad_token(model, tokenizer)
    if head == "vocab" and not trained:
        give_vocabulary_head(model)
    return model if hasattr(model, "score") else model.to(torch.promote_types(model.dtype, torch.float32))


def load_guide(name: Name, *, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Load what guides: a language model where training recorded that it is one, else a reward model.

    Raises:
        ValueError: if it cannot be loaded.
    """
    _check_record(name, config := load_config(name))
    recorded = getattr(config, "pargs", None) or {}
    load = load_language_model if recorded.get("objective") in LANGUAGE_MODELS else load_reward_model
    return load(name, dtype=dtype, device=device)


def _load(kind: Any, name: Name, dtype: torch.dtype | str, device: str, fresh_head: bool = False) -> PreTrainedModel:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    more: dict[str, Any] = {"num_labels": 1} if fresh_head else {}
    if device == SPREAD:
        more["device_map"] = "auto"
    else:
        default_device(device)
    _check_record(name, load_config(name))
    with _loading(name):
        model, report = kind.from_pretrained(name, dtype=dtype, **more, **WHOLE)
    _check_weights(name, report, model.base_model_prefix, fresh_head)
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"{name} does not fit on the GPUs of this machine together (--device auto); use a smaller type"
        )
    return (model if device == SPREAD else model.to(device)).eval()


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is a sequence classifier, as reward models are."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def save_reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Name, **settings) -> None:
    """Save model (safetensors) and tokenizer so that transformers' own loader and pipeline give our numbers.

    Args:
        settings: how it was trained (objective, tail, append_eos, prompt format): kept as `config.pargs`, where
            decoding finds them.
    """
    record(model, **settings)
    save(model, tokenizer, folder)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Name, card: str | None = None) -> None:
    """Write an ordinary folder of transformers: configuration, safetensors, tokenizer; an old model there is replaced.

    Args:
        card: what the README.md says (`hub.model_card`); None means that there is none.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    with _quietly(), saving(folder), replacing(folder, WRITTEN, last="config.json") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if card is not None:
            (unfinished / "README.md").write_text(card, "utf-8")


def record(model: PreTrainedModel, **settings) -> None:
    """Note in a reward model's configuration how it is trained, so that each of its checkpoints says it, too."""
    model.config.problem_type = "regression"  # or the pipeline would squash the reward through a sigmoid
    model.config.pargs = settings


def separate_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model a padding token that is not the end token.

    transformers' own pooling takes the last token that differs from padding: where padding is the end token, as is
    usual for language models, it reads r(response) without its end. The tokenizer's own padding is kept where it
    differs, else its unknown token serves, else one token is added.
    """
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        if tokenizer.unk_token is not None and tokenizer.unk_token_id not in ends:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def give_vocabulary_head(model: PreTrainedModel) -> None:
    """Replace a reward model's head by one with a number for each token, all zero."""
    rows, old = model.get_input_embeddings().num_embeddings, model.score.weight
    model.config.num_labels = model.num_labels = rows
    model.score = nn.Linear(old.shape[1], rows, bias=False, dtype=old.dtype, device=old.device)
    nn.init.zeros_(model.score.weight)


def _check_weights(name: Name, report: dict, backbone: str, fresh_head: bool) -> None:
    """Raises ValueError if weights are missing, misshapen or without a place, but for those of a fresh head and an
    old one."""
    missing, misshapen = report["missing_keys"], report["mismatched_keys"]
    wrong = [f"{key} is missing" for key in sorted(missing) if not (fresh_head and key.startswith(HEADS))]
    wrong += [f"{key} is {tuple(there)}, not {tuple(wanted)}" for key, there, wanted in sorted(misshapen)]
    unexpected = [key for key in sorted(report["unexpected_keys"]) if not OLD_MASKS.search(key)]
    unexpected = [key for key in unexpected if not fresh_head or key.startswith(f"{backbone}.")]
    wrong += [f"{key} has no place" for key in unexpected]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{name}: its weights are not those of its config.json: {'; '.join(wrong[:3])}{more}")


def _check_record(name: Name, config: PreTrainedConfig) -> None:
    """Raises ValueError if `config.pargs` holds what no training records."""
    record = getattr(config, "pargs", None) or {}
    wrong = [key for key in RECORD if isinstance(record, dict) and record.get(key, RECORD[key][0]) not in RECORD[key]]
    if wrong or not isinstance(record, dict):
        shown = (
            f"pargs.{wrong[0]} must not be {record[wrong[0]]!r:.60}" if wrong else f"pargs must not be {record!r:.60}"
        )
        raise ValueError(f"{Path(name, 'config.json')}: {shown}; train the model again, or remove `pargs`")


def _architecture(config: PreTrainedConfig) -> str:
    return ", ".join(config.architectures or [config.model_type])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _loading(name: Name) -> Iterator[None]:
    """Context manager: whatever a damaged folder makes transformers raise becomes a ValueError that names the model,
    and the file where one cannot be read by itself."""
    if damage := _damage(Path(name)):
        raise ValueError(f"cannot load {str(name)!r}: {damage}")
    try:
        with _quietly():
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"cannot load {str(name)!r}: {_one_line(error)}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Context manager: transformers says nothing, and shows no bars."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _damage(folder: Path) -> str | None:
    """What is wrong with the first file of a model's folder that cannot be read, some of which transformers would do
    without."""
    if (folder / "adapter_config.json").exists():
        return "it holds an adapter (adapter_config.json): merge that into its model first"
    for file in [file for name in FILES for file in sorted(folder.glob(name))]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    continue
            known = json.loads(file.read_text("utf-8"))
        except Exception as error:
            return f"{file.name} is damaged ({_one_line(error)})"
        if not isinstance(known, dict):
            return f"{file.name} holds no JSON object"
        if file.name == "generation_config.json" and not _are_ids(known.get("eos_token_id")):
            return f"{file.name}: eos_token_id must not be {known['eos_token_id']!r:.60}"
    return None


def _are_ids(value: Any) -> bool:
    return value is None or all(type(one) is int for one in (value if isinstance(value, list) else [value]))
