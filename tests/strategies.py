"""Hypothesis strategies for small instances, and tiny models, in one place."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from pargs_min.data import Pair

# The shapes that differ in what matters here: learned, offset and rotary positions; plain and grouped attention.
SHAPES = {
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "llama": dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen2": dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen3": dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "opt": dict(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16),
    "gpt_neox": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
}


def tiny_config(family: str, vocabulary: int, **changes):
    defaults = dict(vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    return AutoConfig.for_model(family, **{**defaults, **SHAPES.get(family, {}), **changes})


def _randomised(model, seed: int):
    """Random weights large enough that everything a model reads makes a visible difference."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.double().eval()


def tiny_lm(family: str = "gpt2", vocabulary: int = 11, seed: int = 0, **changes):
    return _randomised(AutoModelForCausalLM.from_config(tiny_config(family, vocabulary, **changes)), seed)


def tiny_reward_model(family: str = "gpt2", vocabulary: int = 11, seed: int = 1, **changes):
    config = tiny_config(family, vocabulary, **{"num_labels": 1, "pad_token_id": None, **changes})
    return _randomised(AutoModelForSequenceClassification.from_config(config), seed)


def hybrid(make):
    """A model, made by one of the two functions above, whose first layer keeps no keys."""
    layers = dict(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes |= dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    return make("qwen3_5_text", **layers, **sizes).float()


def left_padded(*lengths: int, vocabulary: int = 11, seed: int = 0):
    """(ids, mask) of random texts of these lengths, padded on the left with id 0."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(2, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return ids * mask, mask


@st.composite
def rows(draw, width: st.SearchStrategy[int], low: float = -30.0, high: float = 30.0, batch: int = 3):
    """(batch, width) float64 numbers."""
    k = draw(width)
    numbers = st.floats(low, high, allow_nan=False, width=32)
    flat = draw(st.lists(numbers, min_size=batch * k, max_size=batch * k))
    return torch.tensor(flat, dtype=torch.float64).view(batch, k)


@st.composite
def candidates(draw):
    """(ref_log_probs, prefix_rewards, beta): one step of a batch of 3."""
    k = draw(st.integers(1, 8))
    ref = draw(rows(st.just(k), -8.0, 0.0)).log_softmax(-1)
    return ref, draw(rows(st.just(k), -5.0, 5.0)), draw(st.floats(0.0, 10.0))


@st.composite
def scored_pairs(draw):
    """(chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths): a batch of 3 pairs."""
    width = draw(st.integers(1, 6))
    lengths = st.lists(st.integers(1, width), min_size=3, max_size=3).map(torch.tensor)
    reward_rows = rows(st.just(width), -10.0, 10.0)
    return draw(reward_rows), draw(reward_rows), draw(lengths), draw(lengths)


def tiny_tokenizer(start: bool = True) -> PreTrainedTokenizerFast:
    """One word, one token; a start token where wanted, an end token, a chat template that writes the start token."""
    words = ["<pad>", "</s>", "<s>", "<unk>", "user", "assistant", ":", *"abcdefg"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if start:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %} {{ m.role }} : {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} assistant :{% endif %}"
    )
    return tokenizer


@st.composite
def token_pairs(draw, vocabulary: int = 14):
    """One to four pairs of token ids; prompts of 1 to 4 tokens, responses of 1 to 5."""
    ids = st.integers(2, vocabulary - 1)
    pair = st.builds(Pair, *(st.lists(ids, min_size=1, max_size=longest) for longest in (4, 5, 5)))
    return draw(st.lists(pair, min_size=1, max_size=4))
