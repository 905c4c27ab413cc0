"""Fast scoring equals the naive way, in every family; what cannot be scored fast is refused."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from pargs_min import minimal, scoring
from pargs_min.codec import Codec
from pargs_min.reading import text_rewards
from pargs_min.scoring import ReencodeScorer, SiblingScorer, alike, attention_window, length_buckets, model_rewards
from tests.strategies import SHAPES, hybrid, left_padded, tiny_config, tiny_reward_model
from tests.test_reward_model import word_tokenizer

STEPS = torch.tensor(
    [[[2, 3, 4], [5, 6, 7], [8, 9, 10]], [[1, 1, 0], [2, 2, 9], [3, 4, 5]], [[7, 8, 9], [7, 7, 1], [2, 4, 6]]]
)
DRAWN = torch.tensor([[2, 6, 10], [1, 2, 4]])


def separate_passes(model, ids, mask, candidates):
    """Each candidate in a forward pass of its own, each row without its padding (`minimal.reward`)."""
    rewards = torch.empty(candidates.shape, dtype=torch.float64)
    for b, k in torch.cartesian_prod(*map(torch.arange, candidates.shape)).tolist():
        rewards[b, k] = minimal.reward(model, torch.cat([ids[b][mask[b].bool()], candidates[b, k, None]]))
    return rewards


def three_steps(scorer, ids, mask):
    """Yield (ids so far, mask so far, candidates, rewards) while stepping the scorer as the loop does."""
    scorer.start(ids, mask)
    for number, candidates in enumerate(STEPS):
        yield ids, mask, candidates, scorer.score(candidates)
        if number < 2:
            scorer.push(DRAWN[number])
            ids = torch.cat([ids, DRAWN[number][:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


@torch.no_grad()
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("sdpa", torch.float64, 1e-12), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)],
)
def test_siblings_are_scored_as_separate_full_passes(family, attention, dtype, tolerance):
    """Three steps deep, a batch of three with left padding; a candidate may be the padding or the end token.

    (transformers' eager attention takes its softmax in float32 whatever the model's dtype.)
    """
    model = tiny_reward_model(family, attn_implementation=attention)
    fast, slow = SiblingScorer(model.to(dtype)), tiny_reward_model(family, pad_token_id=None)
    for ids, mask, candidates, rewards in three_steps(fast, *left_padded(7, 3, 1)):
        assert_close(rewards.double(), separate_passes(slow, ids, mask, candidates), rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reencoding_gives_the_same_rewards(family):
    model = tiny_reward_model(family)
    slow = ReencodeScorer(model_rewards(model))
    for step, again in zip(
        three_steps(SiblingScorer(model), *left_padded(7, 3, 1)), three_steps(slow, *left_padded(7, 3, 1)), strict=True
    ):
        assert_close(step[3], again[3], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_prompt_of_one_token_needs_no_cache_to_begin_with():
    model = tiny_reward_model("llama", pad_token_id=None)
    for ids, mask, candidates, rewards in three_steps(SiblingScorer(model), *left_padded(1, 1, 1)):
        assert_close(rewards, separate_passes(model, ids, mask, candidates), rtol=0, atol=1e-12)


@torch.no_grad()
def test_one_pass_a_step_and_a_cache_that_is_not_expanded():
    model = tiny_reward_model("llama")
    scorer, passes = SiblingScorer(model), []
    model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(output.last_hidden_state.shape[:2])
    )
    for *_, rewards in three_steps(scorer, *left_padded(7, 3, 1)):
        assert rewards.shape == (3, 3)
    assert passes == [(3, 6), (3, 4), (3, 4), (3, 4)]  # the prompts, then last token + 3 siblings a step
    assert scorer.cache.layers[0].keys.shape == (3, 2, 9, 4)  # 7 prompt tokens + 2, one copy


@torch.no_grad()
@pytest.mark.parametrize("length", [7, 1])
def test_many_candidates_are_scored_in_parts_as_they_are_at_once(monkeypatch, length):
    """The whole vocabulary of eleven in parts of four; the parts leave nothing in the cache."""
    model, whole, parts, passes = tiny_reward_model("llama"), [], [], []
    everything = torch.arange(11).expand(2, -1)
    for most, found in ((1024, whole), (4, parts)):
        monkeypatch.setattr(scoring, "MOST", most)
        scorer = SiblingScorer(model)
        scorer.start(*left_padded(length, 1))
        hook = model.base_model.register_forward_hook(lambda body, args, output: passes.append(output[0].shape[1]))
        for drawn in DRAWN[:, :2]:
            found.append(scorer.score(everything))
            scorer.push(drawn)
        hook.remove()
        assert scorer.cache.get_seq_length() == length + 1
    assert passes == [12, 12, 5, 5, 4, 5, 5, 4]
    assert_close(parts, whole, rtol=0, atol=1e-12)


def bert(**changes):
    sizes = dict(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=1, **changes)).double().eval()


@torch.no_grad()
def test_a_bidirectional_model_is_scored_by_reading_whole_texts():
    model = bert()
    with pytest.raises(ValueError, match="ReencodeScorer"):
        SiblingScorer(model)
    for ids, mask, candidates, rewards in three_steps(ReencodeScorer(model_rewards(model)), *left_padded(7, 3, 1)):
        text = torch.cat([ids[1][mask[1].bool()], candidates[1, 2, None]])[None]
        assert_close(rewards[1, 2], model(input_ids=text).logits[0, 0], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "another tokenizer"])
def test_reencoding_in_parts_of_like_length_equals_one_text_at_a_time(kind):
    lm_tokenizer = word_tokenizer("<end> <pad> a b c d e f g h i", pad_token="<pad>")
    own = word_tokenizer("i h g f e d c b a <pad> <end>", pad_token="<pad>")
    reward_fn = {
        "causal": lambda: model_rewards(tiny_reward_model("llama")),
        "bidirectional": lambda: model_rewards(bert()),
        "another tokenizer": lambda: text_rewards(
            tiny_reward_model("gpt2"), own, Codec(lm_tokenizer), [{"prompt_ids": [i]} for i in range(2, 11)]
        ),
    }[kind]()
    shapes = []

    def recorded(ids, mask):
        shapes.append((mask.numel(), int(mask.sum())))
        return reward_fn(ids, mask)

    prompts = left_padded(3, 40, 1, 30, 4, 3)
    steps = torch.randint(2, 11, (3, 6, 5), generator=torch.Generator().manual_seed(1))
    scorer = ReencodeScorer(recorded, max_tokens=150)
    scorer.start(*prompts)
    ids, mask = prompts
    for candidates in steps:
        rewards = scorer.score(candidates)
        for b, k in torch.cartesian_prod(torch.arange(6), torch.arange(5)).tolist():
            text = torch.cat([ids[b][mask[b].bool()], candidates[b, k, None]])[None]
            assert_close(rewards[b, k], reward_fn(text, torch.ones_like(text))[0], rtol=0, atol=1e-12)
        scorer.push(candidates[:, 0])
        ids = torch.cat([ids, candidates[:, :1]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert max(computed for computed, _ in shapes) <= 150
    assert all(3 * computed <= 4 * read for computed, read in shapes)
    assert len(shapes) < 3 * 30 / 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30).map(sorted), st.integers(1, 300))
def test_parts_hold_every_text_once_little_padding_and_no_more_tokens_than_asked(lengths, max_tokens):
    parts = list(length_buckets(lengths, max_tokens))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts:
        some = lengths[part]
        assert len(some) * some[-1] <= max_tokens or len(some) == 1
        assert 4 * sum(some) >= 3 * len(some) * some[-1]
    for one, other in pairwise(parts):  # as few as that allows, taken from the shortest on
        some = lengths[one.start : other.start + 1]
        assert len(some) * some[-1] > max_tokens or 4 * some[0] < 3 * some[-1]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bloom", dict(hidden_size=16, n_layer=2, n_head=2)),
        ("mpt", dict(d_model=16, n_layers=2, n_heads=2)),
        ("falcon", dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True)),
    ],
)
def test_families_whose_siblings_would_be_misplaced_are_refused(family, changes):
    with pytest.raises(ValueError, match="use ReencodeScorer, which works with every reward model"):
        SiblingScorer(tiny_reward_model(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("mistral", dict(sliding_window=8), 8),
        ("mistral", dict(sliding_window=None), None),
        ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), 8),
        ("qwen2", dict(use_sliding_window=False, sliding_window=8), None),
        ("gemma2", dict(sliding_window=8), 8),
        ("gpt_neo", dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8), 8),
        ("gpt_neo", dict(num_layers=2, attention_types=[[["global"], 2]], window_size=8), None),
        ("llama", {}, None),
    ],
)
def test_the_attention_window_is_read_from_the_configuration(family, changes, window):
    assert attention_window(tiny_config(family, 11, **changes)) == window


@torch.no_grad()
def test_a_text_may_fill_an_attention_window_but_not_outgrow_it():
    model = tiny_reward_model("mistral", sliding_window=9, pad_token_id=None, **SHAPES["llama"])
    scorer = SiblingScorer(model)
    for ids, mask, candidates, rewards in three_steps(scorer, *left_padded(6, 3, 1)):
        assert_close(rewards, separate_passes(model, ids, mask, candidates), rtol=0, atol=1e-12)
    scorer.push(DRAWN[0])
    with pytest.raises(ValueError, match="attention window of 9; use ReencodeScorer"):
        scorer.score(STEPS[0])


@torch.no_grad()
def test_padding_takes_no_room_in_an_attention_window():
    """Where the longest text of a batch has left, as in a server, all others are padded beyond what they hold."""
    model = tiny_reward_model("mistral", sliding_window=9, pad_token_id=None, **SHAPES["llama"])
    padded = (of_all[1:] for of_all in left_padded(12, 6, 3, 1))
    for ids, mask, candidates, rewards in three_steps(SiblingScorer(model), *padded):
        assert_close(rewards, separate_passes(model, ids, mask, candidates), rtol=0, atol=1e-12)


def test_layers_without_keys_are_refused():
    with pytest.raises(ValueError, match="cannot score siblings over one cache"):
        SiblingScorer(hybrid(tiny_reward_model))


def test_flash_attention_and_training_mode_are_refused():
    model = tiny_reward_model()
    scorer = SiblingScorer(model.train())
    assert model.training  # looking at it left it as it was
    with pytest.raises(ValueError, match="training mode"):
        scorer.start(*left_padded(3))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention ignores the sibling mask"):
        SiblingScorer(model)


@torch.no_grad()
def test_score_is_called_once_per_push():
    scorer = SiblingScorer(tiny_reward_model())
    scorer.start(*left_padded(3, 3, 3))
    scorer.score(STEPS[0])
    with pytest.raises(RuntimeError, match="once per step"):
        scorer.score(STEPS[0])


@torch.no_grad()
def test_another_tokenizer_is_bridged_by_text():
    """The reward model's words are numbered backwards: through text it gives the rewards of its own ids."""
    lm_tokenizer = word_tokenizer("<end> <pad> a b c d e f g h i", pad_token="<pad>")
    rm_tokenizer = word_tokenizer("i h g f e d c b a <pad> <end>", pad_token="<pad>")
    model = tiny_reward_model("llama")
    ids, mask = left_padded(7, 3, 1)
    ids, mask = torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(mask, (0, 1), value=1)  # ends in <end>
    prompts = [{"prompt_ids": row[keep].tolist()[:1]} for row, keep in zip(ids, mask.bool(), strict=True)]
    rewards = text_rewards(model, rm_tokenizer, Codec(lm_tokenizer), prompts)(ids, mask)
    assert_close(rewards, model_rewards(model)(10 - ids, mask), rtol=0, atol=1e-12)
    ids[:, -1] = 10  # "i", where that ends a text, too
    found = text_rewards(model, rm_tokenizer, Codec(lm_tokenizer, ends=(0, 10)), prompts)(ids, mask)
    assert_close(found, rewards, rtol=0, atol=1e-12)


def test_rounding_is_told_from_another_reading():
    """A deep model in bfloat16 differs from itself by rounding; another token changes rewards by their spread."""
    want = torch.linspace(-1, 1, 11)
    for dtype, rounding, wrong in ((torch.bfloat16, 0.1, 0.5), (torch.float32, 1e-3, 0.05)):
        step = want.std() * torch.ones(11)
        assert alike(want + rounding * step, want, dtype)
        assert not alike(want + wrong * step, want, dtype)
        assert not alike(want * torch.nan, want, dtype)
    assert alike(want * 0, want * 0, torch.float32)
