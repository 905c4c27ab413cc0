from __future__ import annotations

import math
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pargs_min.data import (
    Pair,
    Text,
    at_response_tokens,
    by_prompt,
    centred,
    collate,
    collate_groups,
    effective_texts,
    encode_preferences,
    encode_texts,
    in_groups,
    records_form,
    reward_weights,
    reweighted,
    split_by_prompt,
    training_form,
)
from pargs_min.records import Preference, Response

from .strategies import tiny_tokenizer, token_pairs
from .test_codec import chat_tokenizer
from .test_reward_model import word_tokenizer

END, START = 1, 2
A, B, C = 7, 8, 9  # the words "a", "b", "c"


def preference(chosen, rejected, prompt="a"):
    return Preference(prompt, chosen, rejected, "pairs.jsonl:1")


def test_the_end_token_is_appended_once():
    pairs, _ = encode_preferences([preference("a", [B, END])], tiny_tokenizer())
    assert pairs == [Pair([START, A], [A, END], [B, END])]
    pairs, _ = encode_preferences([preference("a", "b")], tiny_tokenizer(), append_eos=False)
    assert pairs == [Pair([START, A], [A], [B])]


def test_a_text_that_was_cut_gets_no_end_token():
    records = [Response("a", "b", finished, f"texts.jsonl:{finished}") for finished in (True, False)]
    assert encode_texts(records, tiny_tokenizer())[0] == [Text([START, A], [B, END]), Text([START, A], [B])]


def test_ids_of_another_tokenizer_are_refused():
    """Where the record has the text as well: by this one they would be another."""
    ours, theirs = (Response([START], [A, END], True, "texts.jsonl:1", text=text) for text in ("a", "c"))
    assert encode_texts([ours], tiny_tokenizer())[0] == [Text([START], [A, END])]
    with pytest.raises(ValueError, match=r"texts.jsonl:1: its response_ids are not of the tokenizer .*not 'c'"):
        encode_texts([ours, theirs], tiny_tokenizer())


def test_a_prompt_that_just_fits_is_not_counted_as_cut():
    records = [preference("a", "b c", "a b c")]
    for length, counted in ((7, 0), (6, 1)):
        (pair,), counts = encode_preferences(records, tiny_tokenizer(), max_length=length)
        assert len(pair.prompt_ids) + len(pair.rejected_ids) == length
        assert counts["prompts_cut"] == counted


def test_a_prompt_stays_one_prompt_when_it_is_cut():
    """However long its responses are: what groups texts by their prompts would else see several."""
    records = [Response("a b c", " ".join("b" * n), False, "texts") for n in (1, 3, 2)]
    texts, counts = encode_texts(records, tiny_tokenizer(), max_length=5)
    assert [text.prompt_ids for text in texts] == [[START, C]] * 3
    assert counts["prompts_cut"] == 3


def test_an_empty_response_is_its_end_token_or_nothing():
    records = [preference("a", ""), preference("a", "b")]
    assert encode_preferences(records, tiny_tokenizer())[0][0] == Pair([START, A], [A, END], [END])
    pairs, counts = encode_preferences(records, tiny_tokenizer(), append_eos=False)
    assert len(pairs) == counts["kept"] == counts["empty"] == 1


def test_what_does_not_fit_is_cut_or_dropped_and_counted():
    records = [preference("a b c", "b", "a b"), preference("a b c d", "b"), preference("a", "a"), preference("a", "b")]
    pairs, counts = encode_preferences(records, tiny_tokenizer(), max_length=5)
    assert pairs == [Pair([START], [A, B, C, END], [B, END]), Pair([START, A], [A, END], [B, END])]
    assert counts == dict(read=4, kept=2, too_long=1, empty=0, identical=1, prompts_cut=1)


@given(st.lists(st.lists(st.sampled_from("abcdefg"), max_size=6), min_size=6, max_size=6), st.integers(2, 12))
def test_kept_pairs_fit_and_counts_add_up(words, max_length):
    prompts, chosen, rejected = (list(map(" ".join, words[i : i + 2])) for i in (0, 2, 4))
    records = [preference(c, r, p) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    try:
        pairs, counts = encode_preferences(records, tiny_tokenizer(), max_length)
    except ValueError:
        return
    assert all(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= max_length for p in pairs)
    assert counts["read"] == len(records) == sum(counts[k] for k in ("kept", "too_long", "empty", "identical"))
    assert counts["kept"] == len(pairs)


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ([preference("a", "a")], {}, r"pairs.jsonl:1 .*chosen equals rejected everywhere"),
        ([preference("a", "b")], dict(max_length=1), "no pair left of 1: 1 responses longer than max_length=1"),
        ([preference([99], "b")], {}, r"pairs.jsonl:1: token id 99 is outside"),
        ([preference("a", "b", [])], {}, r"pairs.jsonl:1: prompt \[\] has no token"),
        ([], {}, "no preferences given"),
    ],
)
def test_unusable_data_is_refused(records, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_preferences(records, tiny_tokenizer(), **arguments)


def test_a_tokenizer_without_end_token_is_refused_unless_none_is_wanted():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        encode_preferences([preference("a", "b")], tokenizer)
    assert encode_preferences([preference("a", "b")], tokenizer, append_eos=False)[1]["kept"] == 1


# ---- splitting and collating ----


@given(token_pairs(), st.floats(0.0, 0.99), st.integers(0, 3))
def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(pairs, fraction, seed):
    prompts = len({tuple(p.prompt_ids) for p in pairs})
    held_out_prompts = max(1, round(fraction * prompts)) if fraction else 0
    assume(held_out_prompts < prompts)
    train, held_out = split_by_prompt(pairs, fraction, seed)
    assert sorted(train + held_out) == sorted(pairs)
    assert not {tuple(p.prompt_ids) for p in train} & {tuple(p.prompt_ids) for p in held_out}
    assert len({tuple(p.prompt_ids) for p in held_out}) == held_out_prompts


def test_the_split_is_fixed_by_its_seed_not_by_the_order_of_the_file():
    pairs = [Pair([i], [5], [6]) for i in range(20)]
    assert split_by_prompt(pairs, 0.5, 1)[1] == split_by_prompt(pairs[::-1], 0.5, 1)[1][::-1]
    assert split_by_prompt(pairs, 0.5, 1)[1] != split_by_prompt(pairs, 0.5, 2)[1]


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="eval-fraction"):
        split_by_prompt([Pair([1], [2], [3])] * 2, fraction)


def test_one_prompt_cannot_be_split():
    with pytest.raises(ValueError, match="cannot hold out"):
        split_by_prompt([Pair([1], [2], [3])] * 2, 0.1)


@given(token_pairs(), st.sampled_from([None, END]))
def test_collating_loses_nothing(pairs, extend_with):
    batch = collate(pairs, pad_id=0, extend_with=extend_with)
    responses = at_response_tokens(batch["input_ids"], batch)
    for side, ids in zip(("chosen", "rejected"), responses, strict=True):
        for pair, row in zip(pairs, ids, strict=True):
            own = getattr(pair, f"{side}_ids")
            longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
            expected = own + [END] * (longest - len(own)) if extend_with else own
            assert row[: len(expected)].tolist() == expected
    rows = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -1)
    for pair, row in zip(pairs, rows, strict=False):
        assert row[: len(pair.prompt_ids)].tolist() == pair.prompt_ids
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    extension = sum(abs(len(p.chosen_ids) - len(p.rejected_ids)) for p in pairs)
    assert batch["attention_mask"].sum() == tokens + (extension if extend_with else 0)


def test_the_end_token_may_be_id_zero():
    tokenizer = word_tokenizer("<end> a b")
    (pair,), _ = encode_preferences([Preference([1], [2], [2, 2], "here")], tokenizer)
    assert pair == Pair([1], [2, 0], [2, 2, 0])
    batch = collate([pair], pad_id=0, extend_with=tokenizer.eos_token_id)
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_lengths_are_the_responses_own():
    batch = collate([Pair([5], [6, 7, END], [END])], pad_id=0, extend_with=END)
    assert batch["chosen_lengths"].tolist() == [3]
    assert batch["rejected_lengths"].tolist() == [1]
    torch.testing.assert_close(batch["input_ids"][1], torch.tensor([5, END, END, END]))


def test_text_to_evaluate_on_is_a_users_message_beside_chats_and_nothing_else():
    chat, text = Preference([{"role": "user", "content": "a"}], "b", "c", "-"), Preference("a", "b", "c", "-")
    assert training_form([chat], [text]) == training_form([chat]) == training_form([chat], [chat]) == "chat"
    assert training_form([text], [text]) == "text"
    for some in (([text], [chat]), ([chat], [text, chat]), ([chat, text], []), ([chat], [text._replace(prompt=[3])])):
        with pytest.raises(ValueError, match="prompts must all have one form, got"):
            training_form(*some)
    tokenizer = chat_tokenizer()
    assert encode_preferences([text], tokenizer, form="chat")[0] == encode_preferences([chat], tokenizer)[0]


def test_prompts_of_text_beside_a_chat_template_are_pointed_out():
    chat, text = Preference([{"role": "user", "content": "a"}], "b", "c", "-"), Preference("a", "b", "c", "-")
    with pytest.warns(UserWarning, match="a guide of chats learns from messages"):
        encode_preferences([text], chat_tokenizer())
    with warnings.catch_warnings(action="error"):
        encode_preferences([chat], chat_tokenizer())
        encode_preferences([text], chat_tokenizer(), form="chat")
        encode_preferences([text], word_tokenizer("<end> a b c"))


def test_texts_that_say_what_they_were_written_for_have_that_form():
    said = Response([5, 6], [7], True, "t.jsonl:1", "chat")
    assert records_form([said, said]) == "chat"
    assert records_form([said, said._replace(form=None)]) == "ids"


# ---- rated samples ----


@st.composite
def rated_texts(draw):
    """Texts of up to three prompts, two or more of each, all different."""
    rewards = st.lists(st.floats(-3, 3), min_size=2, max_size=12)
    prompts = draw(st.lists(rewards, min_size=1, max_size=3))
    return [Text([p], [i + 5], reward) for p, some in enumerate(prompts) for i, reward in enumerate(some)]


@given(rated_texts(), st.floats(0.01, 5), st.integers(0, 3))
def test_texts_come_as_often_as_their_weight_says(texts, beta, seed):
    drawn = Counter((text.prompt_ids[0], text.response_ids[0]) for text in reweighted(texts, beta, seed))
    for prompt in {text.prompt_ids[0] for text in texts}:
        some = [text for text in texts if text.prompt_ids == [prompt]]
        wanted = torch.tensor([beta * text.reward for text in some], dtype=torch.float64).softmax(0) * len(some)
        counts = torch.tensor([drawn[prompt, text.response_ids[0]] for text in some])
        assert counts.sum() == len(some)
        assert ((counts - wanted).abs() < 1 + 1e-9).all()


def test_the_draw_is_unbiased_and_fixed_by_its_seed():
    """Over 4,000 seeds the mean count is within 5 standard errors (false failure: 6e-7 for each of the three)."""
    texts = [Text([1], [i], reward) for i, reward in enumerate((0.0, 0.3, -0.5))]
    counts = torch.tensor(
        [
            [Counter(t.response_ids[0] for t in reweighted(texts, 2.0, seed))[i] for i in range(3)]
            for seed in range(4000)
        ]
    ).double()
    wanted = 3 * torch.tensor([0.0, 0.6, -1.0], dtype=torch.float64).softmax(0)
    assert ((counts.mean(0) - wanted).abs() < 5 * counts.std(0) / 4000**0.5).all()
    assert reweighted(texts, 2.0, seed=3) == reweighted(texts, 2.0, seed=3)


def test_reweighting_refuses_what_says_nothing():
    alone = [Text([1], [5], 0.0), Text([1], [6], 0.0), Text([2], [5], 0.0)]
    with pytest.raises(ValueError, match=r"1 of 2 prompts have one text each.*--num-samples"):
        reweighted(alone, 1.0)
    for beta in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="beta must be a positive number"):
            reweighted(alone[:2], beta)


@given(rated_texts(), st.floats(0, 5))
def test_effective_texts_lie_between_one_and_all(texts, beta):
    sizes = torch.tensor([*Counter(text.prompt_ids[0] for text in texts).values()], dtype=torch.float64)
    effective = effective_texts(texts, beta)
    assert (effective >= 1 - 1e-9).all()
    assert (effective <= sizes + 1e-9).all()
    torch.testing.assert_close(effective_texts(texts, 0.0), sizes)


@given(rated_texts(), st.floats(0.1, 4.0), st.floats(-9.0, 9.0))
def test_centred_rewards_weigh_the_texts_of_each_prompt_as_reweighting_does(texts, lam, shift):
    """n times the probability of being drawn, whatever is added to all rewards of a prompt."""
    one, other = centred(texts[::2], texts[1::2], lam=lam)
    weights = {
        id(text): math.exp(lam * now.reward) for text, now in zip(texts[::2] + texts[1::2], one + other, strict=True)
    }
    for some in by_prompt(texts):
        expected = len(some) * reward_weights(some, lam)
        torch.testing.assert_close(torch.tensor([weights[id(text)] for text in some]).double(), expected)
    shifted = [text._replace(reward=text.reward + shift * text.prompt_ids[0]) for text in texts]
    for text, now in zip(centred(shifted, lam=lam)[0], centred(texts, lam=lam)[0], strict=True):
        assert text.reward == pytest.approx(now.reward, abs=1e-9)


def test_centred_rewards_need_two_texts_of_a_prompt():
    with pytest.raises(ValueError, match="no prompt has two texts"):
        centred([Text([1], [5], 0.0)], [Text([2], [5], 1.0)], lam=1.0)
    assert [text.reward for text in centred([Text([1], [5], 3.0)], [Text([1], [6], 3.0)], lam=1.0)[1]] == [0.0]
    alone = Text([2], [5], 9.0)  # is left out: its weight would be 1 whatever it is worth
    assert centred([Text([1], [5], 0.0), Text([1], [6], 0.0), alone], lam=1.0) == [
        [Text([1], [5], 0.0), Text([1], [6], 0.0)]
    ]
    for lam in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a positive number"):
            centred([Text([1], [5], 0.0)] * 2, lam=lam)


@given(rated_texts(), st.integers(2, 5))
def test_groups_are_of_one_prompt_and_lose_nobody(texts, size):
    groups = in_groups(texts, size)
    assert all(1 < len(group) <= size for group in groups if size > 2)
    assert all(len({text.prompt_ids[0] for text in group}) == 1 for group in groups)
    lost = len(texts) - sum(map(len, groups))
    assert lost <= (3 if size == 2 else 0)  # one text of an odd number cannot be in a pair


def test_groups_need_two_texts():
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        in_groups([Text([1], [5])] * 2, 1)
    with pytest.raises(ValueError, match="no prompt has two texts"):
        in_groups([Text([1], [5]), Text([2], [5])], 8)


@given(rated_texts(), st.sampled_from([None, END]))
def test_all_pairs_of_a_group_are_there_with_their_labels(texts, extend_with):
    groups = in_groups(texts, 4)
    batch = collate_groups(groups, pad_id=0, extend_with=extend_with)
    place = {(*text.prompt_ids, *text.response_ids): (n, text.reward) for n, some in enumerate(groups) for text in some}
    rows = [place[tuple(row)] for row in batch["input_ids"].tolist()]
    assert sorted(rows) == sorted(place.values())
    pairs = [(rows[one], rows[other]) for one, other in zip(*batch["rows"].view(2, -1).tolist(), strict=True)]
    assert len(pairs) == sum(len(group) * (len(group) - 1) // 2 for group in groups)
    assert [one[0] for one, _ in pairs] == [other[0] for _, other in pairs] == batch["group"].tolist()
    ahead = torch.tensor([one[1] - other[1] for one, other in pairs])
    assert (ahead >= 0).all()
    torch.testing.assert_close(batch["won"], ahead.sigmoid(), rtol=0, atol=1e-5)


def test_responses_of_a_group_are_continued_to_its_longest():
    group = [Text([9], [5, END], 0.0), Text([9], [5, 6, 7, END], 1.0), Text([9], [END], -1.0)]
    batch = collate_groups([group], pad_id=0, extend_with=END)
    assert batch["input_ids"].tolist() == [[9, 5, 6, 7, END], [9, 5, END, END, END], [9, END, END, END, END]]
    assert batch["attention_mask"].all()
    assert batch["chosen_lengths"].tolist() == [4, 4, 2]
    assert batch["rejected_lengths"].tolist() == [2, 1, 1]
    assert collate_groups([group], pad_id=0)["attention_mask"].sum() == 3 + 7
