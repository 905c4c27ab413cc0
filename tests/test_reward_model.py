"""A reward model read at every token, and its life on disk."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from pargs_min import minimal
from pargs_min.data import Pair, at_response_tokens, collate
from pargs_min.losses import partial_bradley_terry_loss
from pargs_min.reward_model import context_length, final_rewards, prefix_rewards
from tests.strategies import SHAPES, left_padded, tiny_reward_model

EXACT = dict(rtol=0, atol=1e-12)
END = 1


def word_tokenizer(words: str = "<end> a b c d e f g h i", **special):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **special)


@pytest.mark.parametrize("family", SHAPES)
def test_one_pass_gives_the_reward_of_every_prefix_alone(family):
    model = tiny_reward_model(family)
    ids, mask = left_padded(8)
    rewards = prefix_rewards(model, ids, mask)
    for t in range(1, 9):
        assert_close(rewards[:, t - 1], prefix_rewards(model, ids[:, :t], mask[:, :t])[:, -1], **EXACT)


@pytest.mark.parametrize("family", SHAPES)
def test_padding_on_either_side_changes_no_reward(family):
    model = tiny_reward_model(family)
    left, left_mask = left_padded(5, 8)
    ids = left[:1, 3:]  # the row of 5 tokens by itself
    alone = prefix_rewards(model, ids, torch.ones_like(ids))[0]
    assert_close(prefix_rewards(model, left, left_mask)[0, 3:], alone, **EXACT)
    right, right_mask = left.roll(-3, 1), left_mask.roll(-3, 1)
    assert_close(prefix_rewards(model, right[:1], right_mask[:1])[0, :5], alone, **EXACT)


def test_prefix_rewards_ignore_later_tokens():
    model = tiny_reward_model()
    ids, mask = left_padded(8)
    changed = ids.clone()
    changed[0, 5:] = 2 + (changed[0, 5:] - 1) % 9
    before, after = prefix_rewards(model, ids, mask), prefix_rewards(model, changed, mask)
    assert_close(before[:, :5], after[:, :5], **EXACT)
    assert not torch.isclose(before[:, 5:], after[:, 5:]).any()


@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-12), ("llama", 1e-7)])  # llama's norms are float32
def test_one_pass_loss_and_gradient_equal_every_prefix_as_a_row_of_its_own(family, tolerance):
    """Two pairs of unequal lengths, behind prompts of unequal lengths, by `minimal.prefix_loss`."""
    model = tiny_reward_model(family, pad_token_id=None)
    pairs = [Pair([5, 6, 7], [8, 9, 10, 2, END], [3, 4, END]), Pair([6], [2, END], [9, 3, 5, END])]
    batch = collate(pairs, pad_id=0, extend_with=END)
    rewards = at_response_tokens(prefix_rewards(model, batch["input_ids"], batch["attention_mask"]), batch)
    one_pass = partial_bradley_terry_loss(*rewards, batch["chosen_lengths"], batch["rejected_lengths"])
    gradient = torch.autograd.grad(one_pass, list(model.parameters()))

    loss = minimal.prefix_loss(model, [tuple(map(torch.tensor, pair)) for pair in pairs], END)
    assert_close(one_pass, loss, **EXACT)
    for ours, theirs in zip(gradient, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_a_bfloat16_backbone_keeps_a_float32_head():
    model = tiny_reward_model("llama")
    ids, mask = left_padded(8)
    exact = prefix_rewards(model, ids, mask)
    rewards = prefix_rewards(model.bfloat16(), ids, mask)
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())  # more digits than bfloat16 has
    assert (rewards - exact).abs().max() < 0.1 * exact.std()
    with torch.autocast("cpu", torch.bfloat16):
        rewards = prefix_rewards(model.float(), ids, mask)
    assert not torch.equal(rewards, rewards.bfloat16().float())


def test_final_rewards_read_the_last_token_of_each_row():
    model = tiny_reward_model()
    ids, mask = left_padded(3, 8)
    assert_close(final_rewards(model, ids, mask), prefix_rewards(model, ids, mask)[:, -1], **EXACT)
    assert_close(
        final_rewards(model, ids.roll(-5, 1)[:1], mask.roll(-5, 1)[:1]), final_rewards(model, ids, mask)[:1], **EXACT
    )


def test_final_rewards_of_a_bidirectional_model_do_not_see_padding():
    config = BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    model = BertForSequenceClassification(config).double().eval()
    ids, mask = left_padded(3, 8)
    want = model(input_ids=ids[:1, 5:]).logits[0]
    assert_close(final_rewards(model, ids, mask)[:1], want, **EXACT)
    with pytest.raises(ValueError, match="ReencodeScorer"):
        prefix_rewards(model, ids, mask)


def test_the_context_of_longrope_ends_where_a_longer_text_would_change_its_neighbours():
    """Beside it, a text of 5 tokens is read otherwise than alone."""
    rope = dict(rope_type="longrope", short_factor=[1.0, 1.0], long_factor=[2.0, 3.0], rope_theta=10000.0)
    sizes = dict(
        original_max_position_embeddings=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = tiny_reward_model("phi3", num_key_value_heads=4, rope_parameters=rope, **sizes)
    ids, mask = left_padded(5, 12)
    alone = prefix_rewards(model, ids[:1, 7:], mask[:1, 7:])
    assert context_length(model) == 8
    assert (prefix_rewards(model, ids, mask)[0, 7:] - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "longest"), [("roberta", 8), ("xlm-roberta", 8), ("mpnet", 8), ("bert", 10)])
def test_the_context_is_what_the_model_can_read(family, longest):
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = tiny_reward_model(family, max_position_embeddings=10, pad_token_id=1, **small)
    assert context_length(model) == longest
    model(input_ids=torch.full((1, longest), 3))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 3))
