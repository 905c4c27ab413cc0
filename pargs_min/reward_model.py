"""The reward model: an ordinary `AutoModelForSequenceClassification`, read at every token instead of only the last.

A causal backbone sees at token i exactly the prefix that ends there, so one forward pass over a response holds the
rewards of all its prefixes. Only the class's own `forward` hides them: it pools the last token. We call the backbone
and the head ourselves.

The head has one of two shapes. *Scalar*: one number, r(y_1:i), read at token i. *Vocabulary*: one number for each token
that may come next, r(y_1:i) read at token i-1, entry y_i; a single query then scores every candidate of a step.
"""

from __future__ import annotations

import functools
import inspect
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase


def prefix_rewards(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """r(ids_1:t) for every t, in one forward pass.

    Args:
        model: a causal sequence-classification model with one label, or with one for each token.
        ids: (B, T) token ids of prompt and response, padded on either side.
        mask: (B, T) 1 at tokens, 0 at padding.

    Returns:
        (B, T) rewards in float32 or wider; meaningless where `mask` is 0, and under a vocabulary head also at the
        first token of a text, which nothing comes before.

    Raises:
        ValueError: if the model is not a causal reward model (see `body_and_head`).

    Source: arXiv 2406.07780; the paper's code asks for each prefix in a pass of its own.
    """
    body, head = body_and_head(model)
    hidden = body(
        input_ids=ids, attention_mask=mask, use_cache=False, **position_arguments(body, token_positions(mask))
    ).last_hidden_state
    if head.out_features == 1:
        return token_rewards(head, hidden)
    return F.pad(next_token_rewards(head, hidden[:, :-1], ids[:, 1:]), (1, 0))


def token_rewards(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(B, T) rewards from (B, T, D) hidden states, in float32 or wider whatever the backbone computes in.

    A bfloat16 head would round rewards near 5 to steps of 1/32, about the spread between candidates.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), head.weight.to(dtype), bias)[..., 0]


def next_token_rewards(head: nn.Linear, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) rewards under a vocabulary head: of each of the (B, T) tokens, read at the hidden state before it.

    Only the rows of the tokens that came are multiplied: training costs no more than with a scalar head.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(dtype) * F.embedding(tokens, head.weight).to(dtype)).sum(-1)


def body_and_head(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear]:
    """The causal backbone and the head of a reward model: of one output, or of one for each token.

    Raises:
        ValueError: if the model has no such head: it is bidirectional, or has some other number of labels.
    """
    if not is_causal(model) or (model.score.out_features != 1 and not has_vocabulary_head(model)):
        raise ValueError(
            f"{type(model).__name__} is not a causal reward model with one label: it has no reward at every token; "
            "score whole texts with it through pargs_min.ReencodeScorer"
        )
    return model.base_model, model.score


def final_rewards(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(B,) rewards of whole texts, by any sequence-classification model with one label, bidirectional ones included.

    Args:
        ids, mask: (B, T), padded on either side; a text's reward is read at its last token.

    >>> from transformers import LlamaConfig, LlamaForSequenceClassification
    >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_labels=1)
    >>> model = LlamaForSequenceClassification(config).eval()
    >>> ids, mask = torch.tensor([[0, 5, 7]]), torch.tensor([[0, 1, 1]])
    >>> bool(final_rewards(model, ids, mask) == prefix_rewards(model, ids, mask)[:, 2])
    True
    """
    if is_causal(model):
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1, keepdim=True)
        return prefix_rewards(model, ids, mask).gather(1, last)[:, 0]
    order = mask.argsort(dim=1, descending=True, stable=True)  # bidirectional models expect padding on the right
    logits = model(input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order)).logits
    return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model has a reward at every token; `score` is the name all causal families give their head."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def has_vocabulary_head(model: PreTrainedModel) -> bool:
    """Whether the head has a number for each token that may come next; its size says so."""
    return is_causal(model) and 1 < model.score.out_features == model.get_input_embeddings().num_embeddings


def token_positions(mask: Tensor) -> Tensor:
    """(B, T) position of each token within its text, not counting padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def position_arguments(body: PreTrainedModel, positions: Tensor) -> dict[str, Tensor]:
    """`position_ids`, for the backbones that take them; the others (ALiBi) derive positions from the mask."""
    return {"position_ids": positions} if _takes_positions(type(body)) else {}


@functools.cache  # reading a signature costs as much as a small layer
def _takes_positions(body: type[PreTrainedModel]) -> bool:
    return "position_ids" in inspect.signature(body.forward).parameters


def context_length(model: PreTrainedModel) -> int | None:
    """The longest text the model takes, in tokens; None where its configuration names no limit.

    RoBERTa's kin count positions from behind that of padding, and so lose the first ones: 514 are 512 tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return limit if limit is None or padding is None else limit - padding - 1


def load_reward_model(
    name_or_path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    head: str = "scalar",
) -> PreTrainedModel:
    """Load a reward model from a hub id or a folder; a plain language model gets a fresh head.

    Args:
        name_or_path: what `from_pretrained` takes. A language model's backbone is kept, and a new scalar head is drawn
            from torch's global random stream (call `torch.manual_seed` first to fix it).
        tokenizer: given when the model is to be trained and saved: it gets a padding token that is not its end token
            (see `separate_pad_token`), and the model a row for it where one is needed.
        dtype: float32 to train, whatever the checkpoint holds; "auto" or bfloat16 to decode.
        head: what a plain language model gets, "scalar" or "vocab". The latter begins at zero, so that a token which
            training never meets keeps the reward 0. A reward model keeps the head that it has.

    Raises:
        ValueError: if the checkpoint is a classifier with several labels, if `head` is unknown, or if it is "vocab" and
            the checkpoint has a scalar head.
        OSError: transformers' own, if there is no such model.
    """
    if head not in ("scalar", "vocab"):
        raise ValueError(f'head must be "scalar" or "vocab", got {head!r}')
    config = AutoConfig.from_pretrained(name_or_path)
    trained = _is_classifier(config)
    if trained:
        if config.num_labels not in (1, config.get_text_config().vocab_size):
            raise ValueError(
                f"{name_or_path} is a classifier with {config.num_labels} labels; a reward model has one "
                "(num_labels=1), or one for each token"
            )
        if head == "vocab" and config.num_labels == 1:
            raise ValueError(f"{name_or_path} has a scalar head; start a vocabulary head from a language model")
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, dtype=dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=1, dtype=dtype)
    if tokenizer is not None:
        separate_pad_token(model, tokenizer)
    if head == "vocab" and not trained:
        _give_vocabulary_head(model)
    return model


def _give_vocabulary_head(model: PreTrainedModel) -> None:
    rows, old = model.get_input_embeddings().num_embeddings, model.score.weight
    model.config.num_labels = model.num_labels = rows
    model.score = nn.Linear(old.shape[1], rows, bias=False, dtype=old.dtype, device=old.device)
    nn.init.zeros_(model.score.weight)


def _is_classifier(config) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


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


def save_reward_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike, **settings
) -> None:
    """Save model (safetensors) and tokenizer so that transformers' own loader and pipeline give our numbers.

    Args:
        settings: how it was trained (objective, tail, append_eos, prompt format): kept as `config.pargs`, where
            decoding finds them.
    """
    model.config.problem_type = "regression"  # or the pipeline would squash the reward through a sigmoid
    model.config.pargs = settings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
