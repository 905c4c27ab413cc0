"""No reader fails unclearly or accepts what is wrong, whatever the bytes."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pargs_min.cli.resuming import read_done
from pargs_min.evaluation.chat_judge import ChatJudge
from pargs_min.records import (
    Preference,
    Response,
    is_messages,
    read_jsonl,
    read_preferences,
    read_prompts,
    read_responses,
    read_texts,
)

CHAT = [{"role": "user", "content": "Hi"}]
PROMPTS = [{"prompt": "One day"}, {"prompt": CHAT}, {"prompt": "é", "prompt_ids": [5, 6]}]
PREFERENCES = [
    {"prompt": "One day", "chosen": " a cat", "rejected": " a dog", "prompt_ids": [3], "chosen_ids": [4, 5]},
    {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "model", "content": ""}],
    },
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: é", "score": 0.5},
]
COST = {"cost": {"seconds": 0.5, "model_calls": 3}, "kl": 1.5, "ref_log_prob": -2.25, "reward": -1, "finished": True}
TEXTS = [
    prompt | COST | {"prompt_number": n, "sample": i, "response": "né", "response_ids": [7, 1], "method": "pargs"}
    | {"settings": {"seed": 5, "model": "lm"}}
    for n, prompt in enumerate(PROMPTS) for i in range(2)
]  # fmt: skip
ALPACA_EVAL = [{"instruction": "Hi", "output": text, "generator": "x", "dataset": "d"} for text in ("Hello", "Hey")]
VERDICTS = [{"address": "http://a", "request": {"model": "m", "messages": CHAT}, "reply": "[[A]]"}] * 2


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(records)).encode()


READERS = {  # name of the file: how it is read, what it holds
    "preferences.jsonl": (read_preferences, lines(PREFERENCES)),
    "preferences.json": (read_preferences, json.dumps(PREFERENCES, indent=1).encode()),
    "preferences.jsonl.gz": (read_preferences, gzip.compress(lines(PREFERENCES), mtime=0)),
    "prompts.ndjson": (read_prompts, lines(PROMPTS)),
    "prompts": (read_prompts, lines(PROMPTS)),
    "prompts.txt": (read_prompts, "One day\r\n\n[Two] {days}\né\n".encode()),
    "prompts.txt.gz": (read_prompts, gzip.compress(b"One day\nTwo days\n", mtime=0)),
    "responses.jsonl": (read_responses, lines(TEXTS)),
    "texts.jsonl": (read_texts, lines(TEXTS)),
    "alpaca_eval.json": (read_texts, json.dumps(ALPACA_EVAL).encode()),
    "done.jsonl": (lambda path: read_done(path, {"seed": 5}, PROMPTS), lines(TEXTS)),
    "verdicts.jsonl": (lambda path: ChatJudge("http://a", "m", path).replies, lines(VERDICTS)),
    "log.jsonl": (
        lambda path: [json.dumps(line, allow_nan=False) for line, _ in read_jsonl(path, growing=True)],
        lines([{"update": 1, "kl": 0.5}] * 2),
    ),
}
DEEP = 100_000
ODD = [
    "null", "true", "-1", "0", "1.5", "NaN", "-Infinity", "1e999", "2147483648", "1" + "0" * 400, "1" * 5000,
    '"x"', '""', '"\\ud83d"', '"\\ud83d\\ude00"', '"\\u0000"', "[]", "[[]]", "[-1]", "[true]", "[2147483648]", '["a"]',
    "{}", '{"a": 1, "a": 2}', '{"role": "user"}', '{"seconds": Infinity}', '{"model": 5}',
    '[{"role": "user", "content": null}]', '[{"role": "user", "content": [{"type": "text", "text": "Q"}]}]',
    "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a": ' * DEEP + "1" + "}" * DEEP,
]  # fmt: skip
FIELD = re.compile(rb'"(\w+)": (?:"(?:[^"\\]|\\.)*"|[^][{}",]+|\[[^][]*\])')


def changed(data, how, at, more, odd):
    """The bytes after one change: some flipped, cut out or put in, two lines swapped, or a value replaced or added."""
    at %= len(data) + 1
    if how == "flip":
        return data[:at] + bytes(byte ^ more[0] for byte in data[at : at + 1]) + data[at + 1 :]
    if how == "cut":
        return data[:at] + data[at + len(more) :]
    if how == "end":
        return data[:at]
    if how == "insert":
        return data[:at] + more + data[at:]
    if how == "swap":
        parts = data.split(b"\n")
        i, j = at % len(parts), more[0] % len(parts)
        parts[i], parts[j] = parts[j], parts[i]
        return b"\n".join(parts)
    fields = [*FIELD.finditer(data)]
    if not fields:
        return data
    field = fields[at % len(fields)]
    name = field[1] if how == "value" else (b"prompt", b"system", b"prompt_ids", field[1])[more[0] % 4]
    new = b'"' + name + b'": ' + odd.encode()
    return data[: field.start()] + new + (b"" if how == "value" else b", " + field[0]) + data[field.end() :]


CHANGE = st.tuples(
    st.sampled_from(["flip", "cut", "end", "insert", "swap", "value", "value", "add"]),
    st.integers(0, 10**6),
    st.binary(min_size=1, max_size=8)
    | st.sampled_from([b"\n", b"{", b"}", b'"', b"\\", b"\xef\xbb\xbf", b"\x00", b"\r"]),
    st.sampled_from(ODD),
)


def is_count(value):
    return type(value) is int and 0 <= value < 2**31


def is_number(value):
    return type(value) in (int, float) and abs(value) < 2**53


def is_prompt(value):
    return isinstance(value, str) or is_messages(value) or (isinstance(value, list) and all(map(is_count, value)))


def is_right(found):
    """Whether what a reader returns is of the documented types, and can be written again."""
    if isinstance(found, Preference):
        return is_prompt(found.prompt) and not (is_messages(found.chosen) or is_messages(found.rejected))
    if isinstance(found, Response):
        return is_prompt(found.prompt) and is_prompt(found.response) and type(found.finished) is bool
    if isinstance(found, dict):
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        right = [is_prompt(found[name]) for name in ("prompt", "prompt_ids") if found.get(name) is not None]
        if "response" in found:
            numbers = [found[name] for name in ("kl", "ref_log_prob", "reward") if name in found]
            right += [is_number(number) for number in (*numbers, *found.get("cost", {}).values())]
            right += map(is_count, [found["prompt_number"], found["sample"], *found["response_ids"]])
        return all(right)
    return isinstance(found, str | tuple)


def check(path, read, data):
    """Whether the bytes are accepted; fails if they are wrongly, or if the error does not name file and line."""
    path.write_bytes(data)
    try:
        found = read(path)
    except ValueError as error:
        message, name = str(error), re.escape(str(path))
        where = r"(:\d+[: ]|: record \d+: |: not JSON| holds no | ends in | is a damaged )"
        assert re.match(name + where, message), message
        message.encode()
        return False
    assert found or "done" in path.name or "log" in path.name or "verdicts" in path.name
    assert all(map(is_right, found)), found
    return True


@pytest.mark.parametrize("name", READERS)
def test_unchanged_files_are_accepted(name, tmp_path):
    assert check(tmp_path / name, *READERS[name])


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_right_or_refused_clearly(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.lists(CHANGE, min_size=1, max_size=3))
    def fuzz(changes):
        read, data = READERS[name]
        for change in changes:
            data = changed(data, *change)
        check(folder / name, read, data)

    fuzz()
