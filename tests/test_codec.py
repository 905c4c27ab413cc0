"""Text to token ids and back: the same ids in training, decoding and judging."""

from __future__ import annotations

from datetime import datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pargs_min.codec import Codec, check_vocabularies, cut_left, encode_prompt, end_tokens, left_pad, prompt_format
from pargs_min.data import encode_preferences
from pargs_min.models import load_tokenizer
from pargs_min.records import Preference
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


def test_a_blank_behind_assistant_begins_the_response():
    """A model that is asked without it writes it itself."""
    tokenizer = character_tokenizer()
    codec, asked = Codec(tokenizer, "dialogue"), "\n\nHuman: a\n\nAssistant:"
    for blank, response in ((" ", "b"), ("", " b"), (" ", " b")):
        prompt_ids, (ids,) = codec.encode(asked + blank, [response])
        assert tokenizer.decode(prompt_ids + ids) == f"{asked} b"
    prompt_ids, (ids,) = codec.encode("\n\nHuman: a ", ["b"])  # whose blank is the human's
    assert tokenizer.decode(ids) == "b"


def test_an_unknown_word_does_not_end_a_response():
    tokenizer = tiny_tokenizer()
    assert Codec(tokenizer).encode("a", ["b zebra"], finished=True)[1] == [[B, tokenizer.unk_token_id, END]]


def character_tokenizer():
    backend = Tokenizer(WordLevel({letter: n for n, letter in enumerate("b\n :HumAnstia")}, unk_token="b"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_messages_without_a_chat_template_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


@given(st.lists(st.integers(3, 13), min_size=1, max_size=8), st.integers(1, 9), st.booleans())
def test_prompts_are_cut_from_the_left_and_keep_their_start_token(ids, length, has_start):
    prompt = [START] * has_start + ids
    cut = cut_left(prompt, length, START)
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


# --- chats -----------------------------------------------------------------------------------------------------------

TURNS = (
    "{% for m in messages %}<|start|> {{ m.role }} : {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant :{% endif %}"
)
USER = [{"role": "user", "content": "a b"}]


def chat_tokenizer(template: str = TURNS, words: str = "<|end|> <|start|> <eos> <unk> user system assistant : a b c d"):
    """A chat tokenizer whose turns end with another token than its end token, here id 0."""
    vocabulary = {word: i for i, word in enumerate(words.split())}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_ends_as_its_template_ends_it_and_text_with_the_end_token():
    tokenizer = chat_tokenizer()
    chat, text, lm = Codec(tokenizer, "chat"), Codec(tokenizer, "text"), tiny_lm(vocabulary=12)
    assert (chat.end, text.end) == (0, 2)
    prompt_ids, (ids,) = chat.encode(USER, ["c"], finished=True)
    assert tokenizer.decode(prompt_ids + ids) == "<|start|> user : a b <|end|> <|start|> assistant : c <|end|>"
    assert text.encode("a", ["c"], finished=True)[1] == [[10, 2]]
    lm.generation_config.eos_token_id = 5
    assert end_tokens(lm, tokenizer) == [2, 0, 5]
    assert all(chat.finished([10, end]) for end in (0, 2))
    assert Codec(chat_tokenizer(TURNS.replace(" <|end|>", "")), "chat").end == 2


def test_a_template_that_demands_a_system_message_still_says_how_it_ends():
    demands = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('say who you are') }}{% endif %}"
    tokenizer = chat_tokenizer(demands + TURNS)
    assert Codec(tokenizer, "chat").end == 0
    assert Codec(tokenizer, "chat").encode([{"role": "system", "content": "d"}, *USER], ["c"], finished=True)[1] == [
        [10, 0]
    ]
    for prompt in ("a b", USER):
        with pytest.raises(ValueError, match=r"the chat template of .* fails: say who you are"):
            encode_prompt(tokenizer, prompt, "chat")


def test_pairs_of_chats_end_as_their_template_ends_them():
    preference = Preference(USER, "c", "d d", "pairs.jsonl:1")
    (pair,), _ = encode_preferences([preference], chat_tokenizer())
    assert (pair.chosen_ids, pair.rejected_ids) == ([10, 0], [11, 11, 0])


def test_a_tokenizer_without_its_own_form_is_of_text_unless_it_has_a_chat_template():
    assert Codec(chat_tokenizer()).form == "chat"
    assert Codec(word_tokenizer()).form == "text"
    assert Codec(chat_tokenizer(), "dialogue").form == "dialogue"
    with pytest.raises(ValueError, match="prompt_format must be one of text, dialogue, chat, ids, got 'poem'"):
        Codec(word_tokenizer(), "poem")


def test_the_number_of_ids_counts_those_that_are_left_out():
    tokenizer = word_tokenizer("<end> a b c")
    tokenizer.backend_tokenizer.model = WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 9}, unk_token="<end>")
    assert len(tokenizer) == 4
    codec = Codec(tokenizer)
    assert codec.vocabulary == 10
    assert codec.encode([1, 9], [[9, 0]]) == ([1, 9], [[9, 0]])
    with pytest.raises(ValueError, match="token id 10 is outside the tokenizer's vocabulary of 10"):
        codec.encode([1], [[10]])


def test_a_tokenizer_larger_than_its_model_is_refused():
    with pytest.raises(ValueError, match="has token ids up to 13, and GPT2LMHeadModel has 11 rows"):
        Codec.of(tiny_lm(), tiny_tokenizer())


def sentencepiece_tokenizer():
    """Begins every text with a space of its own, as SentencePiece does; line breaks are tokens."""
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "\n", "▁", "▁a", "a", "▁b", "b", ":", "u"])}
    backend = Tokenizer(BPE(words, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}a:\n{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("response", ["a b", " a b", "\na", "b\n\nb"])
@pytest.mark.parametrize("kind", ["sentencepiece", "words", "real"])
def test_prompt_and_response_are_the_ids_of_the_whole_conversation(kind, response, request):
    if kind == "real":
        tokenizer = load_tokenizer(request.getfixturevalue("real") / "stories260K")
        tokenizer.chat_template = sentencepiece_tokenizer().chat_template
    else:
        tokenizer = sentencepiece_tokenizer() if kind == "sentencepiece" else chat_tokenizer()
    user = [{"role": "user", "content": "b"}]
    prompt_ids, (ids,) = Codec(tokenizer, "chat").encode(user, [response], finished=True)
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": response}], return_dict=False)
    assert prompt_ids + ids == whole[: len(prompt_ids + ids)]
    assert len(whole) - len(prompt_ids + ids) <= 2  # the line break behind the end


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (TURNS, [*USER, {"role": "assistant", "content": "c"}], "ends with a message of the assistant"),
        (
            TURNS.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}"),
            [{"role": "human", "content": "c"}, *USER],
            "leaves out what 'human' says",
        ),
        (TURNS.replace("m.content", "m.content[:1]"), USER, r"leaves out what 'user' says, or part of it \('a b'\)"),
        (
            "{{ raise_exception('roles must take turns') }}",
            USER,
            "the chat template of the tokenizer fails: roles must take turns",
        ),
        ("{% for m in messages %}", USER, "the chat template of the tokenizer fails"),
        ("{{ messages[7].content.upper() }}", USER, "the chat template of the tokenizer fails"),
    ],
)
def test_what_a_template_cannot_write_is_said(template, messages, message):
    with pytest.raises(ValueError, match=message):
        Codec(chat_tokenizer(template), "ids").prompt({"prompt": messages})


def test_a_response_that_a_template_changes_is_refused_and_one_that_it_trims_is_said():
    strip = TURNS.replace("m.content", "m.content.split('</think>')[-1] | trim")
    codec = Codec(chat_tokenizer(strip), "chat")
    with pytest.raises(ValueError, match="leaves out part of the response '<think> c"):
        codec.encode(USER, ["<think> c </think> d"])
    with pytest.warns(UserWarning, match="strips responses of the whitespace"):
        assert codec.encode(USER, ["  c\n"])[1] == [[10]]


def test_a_start_token_that_is_there_is_not_added():
    assert encode_prompt(tiny_tokenizer(), "<s> a") == encode_prompt(tiny_tokenizer(), "a") == [START, A]


DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize("text", [DIALOGUE, DIALOGUE + " ", DIALOGUE.lstrip(), DIALOGUE.replace("\n\n", "\n")])
def test_a_dialogue_is_not_wrapped_twice(text):
    tokenizer = word_tokenizer("<end> Human: Assistant: a b c")
    dialogue = [
        tokenizer.convert_tokens_to_ids(word)
        for word in ["Human:", "a", "Assistant:", "b", "Human:", "c", "Assistant:"]
    ]
    assert encode_prompt(tokenizer, text, "dialogue") == dialogue
    messages = [
        {"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), "abc", strict=True)
    ]
    assert encode_prompt(tiny_tokenizer(), text, "chat") == encode_prompt(tiny_tokenizer(), messages)
    assert prompt_format([text]) == "dialogue"


@pytest.mark.parametrize("text", ["a", "\n\nHuman: a", "Human: a\n\nAssistant:"])
def test_what_is_not_a_whole_dialogue_becomes_one(text):
    tokenizer = word_tokenizer("<end> Human: Assistant: a b c")
    assert encode_prompt(tokenizer, text, "dialogue") == [1, 3, 2]


def test_the_time_that_a_template_writes_is_that_of_the_run():
    tokenizer = chat_tokenizer('<|start|> system : {{ strftime_now("%H") }} <|end|> ' + TURNS)
    tokenizer.add_tokens(["07", "08"])
    early, late = (Codec(tokenizer, now=datetime(2026, 1, 1, hour)) for hour in (7, 8))
    assert early.dated
    assert not Codec(chat_tokenizer()).dated
    assert tokenizer.decode(early.prompt({"prompt": "a"})).startswith("<|start|> system : 07 <|end|>")
    assert early.prompt({"prompt": "a"}) != late.prompt({"prompt": "a"})


def test_a_text_is_read_as_it_was_written_or_else_anew():
    """Its own ids behind the prompt, read anew; what was cut has no end."""
    codec = Codec(chat_tokenizer(), "chat")
    own = {"prompt": "a", "prompt_ids": [8], "prompt_format": "chat", "response": "c", "response_ids": [10, 0]}
    anew = codec.prompt({"prompt": "a"})
    assert codec.whole(own) == [*anew, 10, 0]
    assert codec.whole(own | {"response_ids": [10, 0, 0][:2], "finished": False}) == [*anew, 10, 0]
    foreign = own | {"response_ids": [1, 1]}
    assert codec.whole(foreign) == codec.whole(own | {"response_ids": None}) == [*anew, 10, 0]
    assert codec.whole(foreign | {"finished": False}) == codec.whole(foreign, append_eos=False) == [*anew, 10]
    assert codec.conversation(own | {"finished": False, "response_ids": [10]}) == [*anew, 10]
    assert codec.conversation(own) == [*anew, 10, 0]


def test_a_template_may_put_the_system_first_or_last():
    """As long as every message is there, and as often as it was said."""
    last = (
        "{% for m in messages %}{% if m.role == 'user' %}user : {{ m.content }} {% if loop.last %}"
        "{{ messages[0].content }}{% endif %}{% endif %}{% endfor %}"
    )
    system, user = {"role": "system", "content": "c"}, {"role": "user", "content": "a"}
    assert len(Codec(chat_tokenizer(last)).prompt({"prompt": [system, user, user]})) == 7
    with pytest.raises(ValueError, match="leaves out what 'system' says"):
        Codec(chat_tokenizer(last)).prompt({"prompt": [user, system, user]})
    with pytest.raises(ValueError, match="leaves out what 'human' says"):
        Codec(chat_tokenizer(last)).prompt({"prompt": [system, user | {"role": "human"}, user]})


def test_a_text_that_has_ended_gets_no_second_end():
    """By whatever special token it ended."""
    codec = Codec(chat_tokenizer(), "chat")
    for end in (0, 1, 2):
        assert codec.encode(USER, [[10, end]], finished=True)[1] == [[10, end]]
    assert codec.encode(USER, [[10, 11]], finished=True)[1] == [[10, 11, 0]]
    known = {"prompt": "a", "response": "c", "response_ids": [10, 9], "finished": True}
    assert codec.whole(known) == [*codec.prompt({"prompt": "a"}), 10, 9]


@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_text_whose_last_word_was_added_to_the_vocabulary_ends_as_others_do(form):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["</code>"])
    prompt = USER if form == "chat" else "a"
    _, (bare, tagged) = Codec(tokenizer, form).encode(prompt, ["c", "c </code>"], finished=True)
    assert tagged == [*bare[:-1], tokenizer.convert_tokens_to_ids("</code>"), bare[-1]]


def test_a_template_that_opens_reasoning_trains_answers_behind_it():
    opened = "{% if add_generation_prompt %}<|start|> assistant : <t>{% endif %}"
    closed = TURNS.partition("{% if add_generation")[0].replace("{{ m.content }}", "{{ m.content }}")
    thinking = closed.replace(
        ": {{ m.content }}", ": {% if m.role == 'assistant' %}<t> </t> {% endif %}{{ m.content }}"
    )
    words = "<|end|> <|start|> <eos> <unk> user system assistant : a b c d <t> </t>"
    prompt_ids, (ids,) = Codec(chat_tokenizer(thinking + opened, words), "chat").encode(USER, ["c"], finished=True)
    assert prompt_ids[-1] == 12
    assert ids == [13, 10, 0]
    with pytest.raises(ValueError, match="opens an answer with '<t>', which a chat that it has closed lacks"):
        Codec(chat_tokenizer(closed + opened, words), "chat").encode(USER, ["c"])


def test_a_template_without_an_end_keeps_the_space_before_an_answer():
    tokenizer = sentencepiece_tokenizer()
    turns = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}a:{% endif %}"
    user = [{"role": "user", "content": "b"}]
    prompt_ids, (ids,) = Codec(tokenizer, "chat").encode(user, ["a b"])
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "a b"}], return_dict=False)
    assert prompt_ids + ids == whole[:-1]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁b"]


def test_a_template_that_drops_the_system_once_an_answer_is_there_still_trains():
    """As Mistral's does: the prompt is what decoding reads, the answer follows it."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% if loop.length == 2 %}system : {{ m.content }} "
        "{% endif %}{% else %}{{ m.role }} : {{ m.content }} <|end|> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    codec, asked = Codec(chat_tokenizer(template), "chat"), [{"role": "system", "content": "d"}, *USER]
    prompt_ids, (ids,) = codec.encode(asked, ["c"], finished=True)
    assert codec.tokenizer.decode(prompt_ids) == "system : d user : a b <|end|> assistant :"
    assert ids == [10, 0]


def test_of_several_templates_the_default_one_is_used():
    tokenizer = chat_tokenizer()
    want = Codec(tokenizer).prompt({"prompt": "a"})
    tokenizer.chat_template = {"default": TURNS, "tool_use": "{{ raise_exception('no') }}"}
    assert Codec(tokenizer).prompt({"prompt": "a"}) == want


def test_a_template_that_fails_does_not_matter_to_text():
    codec = Codec.of(tiny_lm(vocabulary=12), chat_tokenizer("{% for %}"), "text")
    assert codec.ends == (2, 1)
    assert codec.prompt({"prompt": "a"}) == [8]


def test_a_dropped_message_is_noticed_though_its_text_occurs_elsewhere():
    only_user = "{% for m in messages %}{% if m.role == 'user' %}user : {{ m.content }} {% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out what 'system' says"):
        Codec(chat_tokenizer(only_user)).prompt({"prompt": [{"role": "system", "content": "a"}, *USER]})


def test_an_added_token_may_end_a_turn_without_being_called_special():
    tokenizer = chat_tokenizer(TURNS.replace("<|end|>", "<end_of_turn>"))
    tokenizer.add_tokens(["<end_of_turn>"])
    assert tokenizer.convert_ids_to_tokens(Codec(tokenizer, "chat").end) == "<end_of_turn>"
