"""Models in: every pretrained model and tokenizer of the project is loaded here, from a folder or a hub id.

No code of a model's folder is run, and weights are read from safetensors alone. What cannot be loaded raises a
`ValueError` that names the folder.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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

Name = str | os.PathLike
SAFE = dict(trust_remote_code=False)
# Weights that do not fit are reported, and then refused here by their names.
WHOLE = dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **SAFE)


def default_device(asked: str | None = None) -> str:
    """The device that was asked for; by default cuda if there is one, else cpu."""
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

    Raises:
        ValueError: if there is no such model, or weights of it are missing.
    """
    with _loading(name):
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **WHOLE)
        _check_weights(name, report, fresh=())
        return model.to(device).eval()


def load_reward_model(
    name_or_path: Name,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    head: str = "scalar",
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a reward model, in evaluation mode; a plain language model gets a fresh head.

    Args:
        name_or_path: a folder or a hub id. A language model's backbone is kept, and a new scalar head is drawn from
            torch's global random stream (call `torch.manual_seed` first to fix it).
        tokenizer: given when the model is to be trained and saved: it gets a padding token that is not its end token
            (see `separate_pad_token`), and the model a row for it where one is needed.
        dtype: float32 to train, whatever the checkpoint holds; "auto" or bfloat16 to decode.
        head: what a plain language model gets, "scalar" or "vocab". The latter begins at zero, so that a token which
            training never meets keeps the reward 0. A reward model keeps the head that it has.

    Raises:
        ValueError: if there is no such model or weights of it are missing, if the checkpoint is a classifier with
            several labels, if `head` is unknown, or if it is "vocab" and the checkpoint has a scalar head.
    """
    if head not in ("scalar", "vocab"):
        raise ValueError(f'head must be "scalar" or "vocab", got {head!r}')
    config = load_config(name_or_path)
    trained = is_classifier(config)
    if trained and config.num_labels not in (1, config.get_text_config().vocab_size):
        raise ValueError(
            f"{name_or_path} is a classifier with {config.num_labels} labels; a reward model has one "
            "(num_labels=1), or one for each token"
        )
    if trained and head == "vocab" and config.num_labels == 1:
        raise ValueError(f"{name_or_path} has a scalar head; start a vocabulary head from a language model")
    with _loading(name_or_path):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, dtype=dtype, **({} if trained else {"num_labels": 1}), **WHOLE
        )
        _check_weights(name_or_path, report, fresh=() if trained else ("score", "classifier"))
    if tokenizer is not None:
        separate_pad_token(model, tokenizer)
    if head == "vocab" and not trained:
        _give_vocabulary_head(model)
    return model.to(device).eval()


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is a sequence classifier, as reward models are."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def recorded(model: PreTrainedModel) -> dict:
    """What training recorded with a reward model (`save_reward_model`); nothing for one from elsewhere."""
    return getattr(model.config, "pargs", None) or {}


def save_reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Name, **settings) -> None:
    """Save model (safetensors) and tokenizer so that transformers' own loader and pipeline give our numbers.

    Args:
        settings: how it was trained (objective, tail, append_eos, prompt format): kept as `config.pargs`, where
            decoding finds them.
    """
    model.config.problem_type = "regression"  # or the pipeline would squash the reward through a sigmoid
    model.config.pargs = settings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def separate_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model a padding token that is not the end token.

    transformers' own pooling takes the last token that differs from padding: where padding is the end token, as is
    usual for language models, it reads r(response) without its end. The tokenizer's own padding is kept where it
    differs, else its unknown token serves, else one token is added.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if tokenizer.unk_token is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def _give_vocabulary_head(model: PreTrainedModel) -> None:
    rows, old = model.get_input_embeddings().num_embeddings, model.score.weight
    model.config.num_labels = model.num_labels = rows
    model.score = nn.Linear(old.shape[1], rows, bias=False, dtype=old.dtype, device=old.device)
    nn.init.zeros_(model.score.weight)


def _check_weights(name: Name, report: dict, fresh: tuple[str, ...]) -> None:
    """Raises ValueError if the file lacks a weight, but for those of a fresh head, or has one in another shape."""
    missing = [key for key in sorted(report["missing_keys"]) if not key.startswith(fresh)]
    wrong = missing + [f"{key} ({there} there, {wanted} wanted)" for key, there, wanted in report["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{name}: its weights lack {len(wrong)} that its configuration asks for, or have them in another shape: "
            f"{', '.join(wrong[:3])}"
        )


@contextmanager
def _loading(name: Name) -> Iterator[None]:
    """Context manager: transformers loads without its report on each model, and an error names the model."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot load {str(name)!r}: {error}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
