"""The reward model: an ordinary `AutoModelForSequenceClassification`, read at every token instead of only the last.

At token i a causal backbone sees exactly the prefix that ends there, so one forward pass over a response yields the
rewards of all its prefixes. The class's own `forward` hides them, since it pools the last token: we call the backbone
and the head ourselves.

The head has one of two shapes. *Scalar head*: one number, r(y_1:i), read at token i. *Vocabulary head*: one number for
each token that may come next; r(y_1:i) is entry y_i, read at token i-1, so a single query scores every candidate.
"""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

# What a guide is, by the objective it was trained with.
OBJECTIVES = {
    "partial": "a reward model of prefixes",
    "full": "a reward model of whole responses (whose scores of prefixes mean nothing)",
    "value": "a value model",
    "soft": "a soft value model",
    "win": "a model of win rates",
    "farma": "a vocabulary-headed reward model (FaRMA)",
    "reweighted": "a language model of reweighted texts",
    "autoregressive": "an autoregressive reward model (GenARM)",
    "dpo": "a language model fine-tuned by DPO",
}
LANGUAGE_MODELS = ("reweighted", "autoregressive", "dpo")  # objectives of guides that are language models themselves


def prefix_rewards(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """r(ids_1:t) for every t, in one forward pass.

    Args:
        model: a causal sequence-classification model with one label, or with one for each token.
        ids: (B, T) token ids of prompt and response, padded on either side.
        mask: (B, T) 1 at tokens, 0 at padding.

    Returns:
        (B, T) rewards in float32 or wider; meaningless where `mask` is 0, and under a vocabulary head also at the
        first token of a text, which nothing precedes.

    Raises:
        ValueError: if the model is not a causal reward model (see `body_and_head`).

    Source: arXiv 2406.07780; the paper's code asks for each prefix in a pass of its own.
    """
    hidden, head = features(model, ids, mask)
    if head.out_features == 1:
        return head_rewards(head, hidden)[..., 0].to(ids.device)  # layers may lie on several devices
    return F.pad(next_token_rewards(head, hidden[:, :-1], ids[:, 1:].to(hidden.device)), (1, 0)).to(ids.device)


def features(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, nn.Linear]:
    """What the head of a reward model reads at each token, (B, T, D), and the head. Raises as `body_and_head`."""
    body, head = body_and_head(model)
    return read(body, ids, mask, token_positions(mask), use_cache=False).last_hidden_state, head


def widened(values: Tensor) -> Tensor:
    """The same in float32, or as wide as they are: bfloat16 would round rewards near 5 to steps of 1/32, about the
    spread between candidates."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def head_rewards(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(..., 1) rewards, or under a vocabulary head the (..., V) of every token that may come next, from (..., D) hidden
    states; in float32 or wider whatever the backbone computes in."""
    hidden = widened(hidden)
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden, head.weight.to(hidden.dtype), bias)


def next_token_rewards(head: nn.Linear, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) rewards under a vocabulary head: of each of the (B, T) tokens, read at the hidden state before it.

    Only the rows of the tokens that came are multiplied: training costs no more than with a scalar head.
    """
    return (widened(hidden) * widened(F.embedding(tokens, head.weight))).sum(-1)


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
        ids, mask: (B, T), padded on either side; a reward is read at the last token, or of a model from elsewhere at
            the last that is not its `pooled_padding`, as its own `forward` reads it.

    >>> from transformers import LlamaConfig, LlamaForSequenceClassification
    >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_labels=1)
    >>> model = LlamaForSequenceClassification(config).eval()
    >>> ids, mask = torch.tensor([[0, 5, 7]]), torch.tensor([[0, 1, 1]])
    >>> bool(final_rewards(model, ids, mask) == prefix_rewards(model, ids, mask)[:, 2])
    True
    """
    if is_causal(model):
        read_at = mask if (pad := pooled_padding(model)) is None else mask * (ids != pad)
        last = (read_at * torch.arange(mask.shape[1], device=mask.device)).argmax(-1, keepdim=True)
        return prefix_rewards(model, ids, mask).gather(1, last)[:, 0]
    order = mask.argsort(dim=1, descending=True, stable=True)  # bidirectional models expect padding on the right
    pad = model.config.get_text_config().pad_token_id or 0
    ids = ids.masked_fill(mask == 0, pad)  # by which some tell where a text ends
    logits = model(input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order)).logits
    return widened(logits[:, 0])


def recorded(model: PreTrainedModel) -> dict:
    """What training recorded with a reward model (`models.save_reward_model`); nothing for one from elsewhere."""
    return getattr(model.config, "pargs", None) or {}


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether a guide is a causal language model, by the objective that it was trained with."""
    return recorded(model).get("objective") in LANGUAGE_MODELS


def rates_texts(model: PreTrainedModel) -> bool:
    """Whether a guide's number at the end of a text rates the text: a language model has none, and that of a distilled
    guide is right up to a constant per prefix alone."""
    return not is_language_model(model) and "distilled" not in recorded(model)


def check_rates_texts(model: PreTrainedModel) -> None:
    """Raises ValueError if a model does not rate whole texts."""
    if not rates_texts(model):
        what = "a language model" if is_language_model(model) else "distilled from another guide"
        raise ValueError(
            f"{type(model).__name__} guides token by token and rates no whole texts, for it is {what}; give a reward "
            "model of whole texts"
        )


def pooled_padding(model: PreTrainedModel) -> int | None:
    """The token at which a reward model from elsewhere is not read, since it takes it for padding: often the end token.

    Ours are read at every token, and their padding is never the end token (`models.separate_pad_token`).
    """
    return None if recorded(model) else model.config.get_text_config().pad_token_id


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model has a reward at every token; `score` is the name that causal families give their head."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def has_vocabulary_head(model: PreTrainedModel) -> bool:
    """Whether the head has a number for each token that may come next; its size says so."""
    return is_causal(model) and 1 < model.score.out_features == model.get_input_embeddings().num_embeddings


def token_positions(mask: Tensor) -> Tensor:
    """(B, T) position of each token within its text, not counting padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def read(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, **settings):
    """One pass of a model or backbone over (B, T) ids; models with ALiBi derive the positions from the mask alone."""
    if takes_positions(type(model).forward):
        settings["position_ids"] = positions
    return model(input_ids=ids, attention_mask=mask, **settings)


@functools.cache  # reading a signature costs as much as a small layer
def takes_positions(forward: Callable) -> bool:
    """Whether this `forward` is told the position of each token."""
    return "position_ids" in inspect.signature(forward).parameters


def context_length(model: PreTrainedModel) -> int | None:
    """The longest text the model takes, in tokens; None where its configuration names no limit.

    RoBERTa's kin count positions from behind that of padding, and so lose the first ones: 514 are 512 tokens. Models
    with longrope (Phi-3) read all rows of a batch in another way once one is longer than what they were trained on
    first: that is their context here.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    longrope = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    limit = longrope or getattr(config, "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return limit if limit is None or padding is None else limit - padding - 1


def check_evaluating(model: PreTrainedModel) -> None:
    """Raises ValueError if a model is in training mode."""
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode (dropout would change it): call .eval()")
