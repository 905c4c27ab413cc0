"""Text to token ids and back: the same ids in training, decoding and judging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from pargs_min.codec import Codec, check_vocabularies, cut_left, encode_prompt, end_tokens, left_pad, prompt_format
from tests.strategies import tiny_lm, tiny_tokenizer
from tests.test_reward_model import word_tokenizer

END, START = 1, 2
A, B, C = 7, 8, 9  # the words "a", "b", "c"


def test_text_gets_one_start_token_and_no_end_token():
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, "a b") == [START, A, B]
    assert encode_prompt(tiny_tokenizer(start=False), "a b") == [A, B]
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    assert tokenizer("a b")["input_ids"] == [START, A, B, END]
    assert encode_prompt(tokenizer, "a b") == [START, A, B]
    assert encode_prompt(tokenizer, "") == [START]


def test_a_chat_template_is_not_given_a_second_start_token():
    ids = encode_prompt(tiny_tokenizer(), [{"role": "user", "content": "a"}])
    assert tiny_tokenizer().decode(ids) == "<s> user : a assistant :"


def test_token_ids_stay_as_they_are():
    assert encode_prompt(tiny_tokenizer(), [5, 6]) == [5, 6]


def test_decoding_applies_the_format_of_training():
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, "a", "chat") == encode_prompt(tokenizer, [{"role": "user", "content": "a"}])
    dialogue = encode_prompt(tokenizer, "\n\nHuman: a\n\nAssistant:")
    assert encode_prompt(tokenizer, "a", "dialogue") == dialogue != encode_prompt(tokenizer, "a", "text")
    assert encode_prompt(tokenizer, "\n\nHuman: a\n\nAssistant:", "dialogue") == dialogue


@pytest.mark.parametrize(
    ("prompt", "prompt_format", "message"),
    [
        ([{"role": "user", "content": "a"}], "text", "trained on text prompts"),
        ([], None, "no token"),
        ([13, 14], None, "token id 14 is outside the tokenizer's vocabulary of 14"),
    ],
)
def test_prompts_that_cannot_be_encoded_are_refused(prompt, prompt_format, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(tiny_tokenizer(), prompt, prompt_format)


def test_messages_without_a_chat_template_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


@given(st.lists(st.integers(3, 13), min_size=1, max_size=8), st.integers(1, 9), st.booleans())
def test_prompts_are_cut_from_the_left_and_keep_their_start_token(ids, length, has_start):
    prompt = [START] * has_start + ids
    cut = encode_prompt(tiny_tokenizer(), prompt, max_length=length)
    assert len(cut) == min(length, len(prompt))
    assert (cut[0] == START) == has_start
    body = cut[has_start:]
    assert body == ids[len(ids) - len(body) :]


def test_the_format_of_a_data_set_is_one():
    assert prompt_format(["\n\nHuman: a\n\nAssistant:"]) == "dialogue"
    assert prompt_format([[{"role": "user", "content": "a"}]]) == "chat"
    assert prompt_format([[5, 6], [7]]) == "ids"
    with pytest.raises(ValueError, match="chat, text"):
        prompt_format(["a", [{"role": "user", "content": "a"}]])


def test_responses_have_neither_start_nor_end_token_and_keep_their_order():
    codec = Codec(tiny_tokenizer(), "text")
    assert codec.encode("a", ["a b", [5, 6], " ", "c"]) == ([START, A], [[A, B], [5, 6], [], [C]])
    assert codec.encode("a", ["b", [5, END], ""], finished=True)[1] == [[B, END], [5, END], [END]]


def test_a_tokenizer_that_writes_its_own_space_is_not_given_two():
    words = {word: i for i, word in enumerate(["<unk>", "▁", "▁a", "▁b"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer(" a")["input_ids"] == [1, 2]
    assert Codec(tokenizer).encode("a", [" a b", " b", "  "])[1] == [[2, 3], [3], []]


def test_end_tokens_come_from_tokenizer_and_generation_configuration():
    lm = tiny_lm()
    lm.generation_config.eos_token_id = [7, 1]
    assert end_tokens(lm, tiny_tokenizer()) == [1, 7]
    lm.generation_config.eos_token_id = None
    assert end_tokens(lm, tiny_tokenizer()) == [1]


def test_vocabularies_are_compared_by_id():
    check_vocabularies(word_tokenizer("<end> a b c"), word_tokenizer("<end> a b c more"))
    with pytest.raises(ValueError, match=r"differ at 2 ids: 1 \('a'\), 2 \('b'\)"):
        check_vocabularies(word_tokenizer("<end> a b c"), word_tokenizer("<end> b a c"))
    with pytest.raises(ValueError, match=r"differ at 1 ids: 3 \('c'\)"):  # one that the reward model lacks
        check_vocabularies(word_tokenizer("<end> a b c"), word_tokenizer("<end> a b"))


def test_id_zero_is_a_token_like_any_other():
    tokenizer = word_tokenizer("<end> <s> a b", bos_token="<s>")
    assert Codec(tokenizer).encode([2], [[3]], finished=True) == ([2], [[3, 0]])
    assert Codec(tokenizer).finished([2, 0])
    assert end_tokens(tiny_lm(eos_token_id=1), tokenizer)[0] == 0
    tokenizer.eos_token, tokenizer.chat_template = "<s>", "{% for m in messages %} {{ m.content }} <end>{% endfor %}"
    tokenizer.add_special_tokens({"pad_token": "<end>"})
    assert Codec(tokenizer, "chat").end == 0
    assert cut_left([0, 5, 6, 7], 3, start_token=0) == [0, 6, 7]


def test_a_codec_reads_records_and_says_what_has_ended():
    codec = Codec(tiny_tokenizer(), form="chat", ends=(END, 5))
    assert codec.prompt({"prompt": "a"}) == encode_prompt(tiny_tokenizer(), "a", "chat")
    assert codec.prompt({"prompt": "a", "prompt_ids": [B, C]}) == [B, C]
    assert codec.text([A, B, END]) == "a b"
    assert [codec.finished(ids) for ids in ([A, END], [A, 5], [A], [])] == [True, True, False, False]
    assert not Codec(tiny_tokenizer()).finished([A, 5])


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4))
def test_left_padding_keeps_every_row_at_the_right(rows):
    ids, mask = left_pad(rows)
    assert ids.dtype == mask.dtype == torch.long
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, padded, kept in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert padded == [0] * (len(padded) - len(row)) + row
        assert kept == [0] * (len(padded) - len(row)) + [1] * len(row)
