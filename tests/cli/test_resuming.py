"""A file of texts is continued by the run that began it, and by no other."""

import itertools
import json
from datetime import datetime

import pytest

from pargs_min.cli.resuming import parse_shard, read_done, time_of, write_records
from pargs_min.texts import generate_texts
from tests.strategies import tiny_lm, tiny_tokenizer
from tests.test_texts import PROMPTS, texts


@pytest.mark.parametrize("shard", ["2", "2/2", "1/0", "-1/2", "1/2/3", "a/b", "", "/"])
def test_a_shard_of_another_form_is_refused(shard):
    with pytest.raises(ValueError, match=r"shard \(--shard\) must be i/n, part i of n counted from 0.*got '"):
        parse_shard(shard)


def test_an_interrupted_run_is_resumed_to_the_same_file(tmp_path):
    settings = {"method": "pargs", "seed": 5}
    list(write_records(tmp_path / "whole.jsonl", texts(), settings))
    half = tmp_path / "half.jsonl"
    list(itertools.islice(write_records(half, texts(), settings), 4))
    with half.open("a") as file:
        file.write('{"prompt": "torn')
    done = read_done(half, settings, PROMPTS)
    assert len(done) == 4
    list(write_records(half, texts(done=done), settings))
    whole, resumed = ([json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in ("whole", "half"))
    exact = ["prompt", "prompt_number", "sample", "response", "response_ids", "settings"]
    assert [[r[k] for k in exact] for r in resumed] == [[r[k] for k in exact] for r in whole]


def test_half_a_first_line_is_no_text(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"prompt": "torn')
    assert read_done(tmp_path / "half.jsonl", {}, PROMPTS) == {}


def test_settings_are_never_mixed_in_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    assert read_done(path, {}, PROMPTS) == {}
    list(write_records(path, itertools.islice(texts(), 2), {"seed": 5}))
    with pytest.raises(ValueError, match=r"out.jsonl:1 was made with other settings \(seed 5 there, 6 now\)"):
        read_done(path, {"seed": 6}, PROMPTS)
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"out.jsonl:1: not a record of `pargs generate`"):
        read_done(path, {"seed": 5}, PROMPTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": True}, "`sample` must not be true"),
        ({"prompt_number": -1}, "`prompt_number` must not be -1"),
        ({"settings": None}, "`settings` must not be null"),
        ({"response": None}, "`response` must not be null"),
        ({"response_ids": [[]]}, "`response_ids` must not be"),
        ({}, "prompt 0 has sample 0 already"),
    ],
)
def test_what_no_run_wrote_is_not_continued(tmp_path, change, message):
    path = tmp_path / "out.jsonl"
    (record,) = write_records(path, itertools.islice(texts(), 1), {})
    with path.open("a") as file:
        file.write(json.dumps(record | {"settings": {}} | change) + "\n")
    with pytest.raises(ValueError, match=f"out.jsonl:2: {message}"):
        read_done(path, {}, PROMPTS)


def test_a_run_that_refuses_its_input_leaves_no_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="prompt number 0"):
        next(write_records(path, texts(prompts=[{"prompt": "a " * 60}]), {}))
    assert not path.exists()
    assert not list(write_records(path, texts(shard=(0, 5)), {}))  # nothing to write is no error
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        ([{"prompt": "a b c"}, {"prompt": "e"}, PROMPTS[2]], 2),
        ([*PROMPTS[:2], {"prompt": "e f", "prompt_ids": [3, 5]}], 3),
        (PROMPTS[:2], 3),
        (PROMPTS[::-1], 1),
    ],
)
def test_prompts_are_never_mixed_in_one_file(tmp_path, prompts, line):
    path = tmp_path / "out.jsonl"
    list(write_records(path, texts(num_samples=1), {}))
    with pytest.raises(ValueError, match=rf"out.jsonl:{line} was written for another prompt number {line - 1}"):
        read_done(path, {}, prompts)
    done = read_done(path, {}, [*PROMPTS, {"prompt": "g"}])
    assert set(done) == {(0, 0), (1, 0), (2, 0)}
    assert done[2, 0] == PROMPTS[2]["prompt_ids"]
    with pytest.raises(ValueError, match="prompt number 2 has other token ids now"):
        list(texts(prompts=[*PROMPTS[:2], {"prompt": "a b"}], num_samples=1, done=done))


def test_a_resumed_run_reads_the_date_of_its_beginning(tmp_path):
    lm, tokenizer, out = tiny_lm(vocabulary=14), tiny_tokenizer(), tmp_path / "out.jsonl"
    tokenizer.chat_template = "{{ 'abcdefg'[strftime_now('%S') | int % 7] }} " + tokenizer.chat_template
    began = datetime(2026, 1, 1, 0, 0, 3)
    settings = dict(method="plain", max_new_tokens=3, prompt_format="chat")
    records = generate_texts(lm, tokenizer, [{"prompt": "a"}] * 2, now=began, **settings)
    assert time_of(out) is None
    first, second = write_records(out, records, {})
    assert time_of(out) == began
    assert tokenizer.decode(first["prompt_ids"]).startswith("d ")
    done = {(0, 0): first["prompt_ids"]}
    (again,) = generate_texts(lm, tokenizer, [{"prompt": "a"}] * 2, now=time_of(out), done=done, **settings)
    assert again["response_ids"] == second["response_ids"]
    with pytest.raises(ValueError, match="prompt number 0 has other token ids now"):
        list(generate_texts(lm, tokenizer, [{"prompt": "a"}] * 2, now=datetime(2026, 1, 1), done=done, **settings))


def test_a_file_that_another_run_has_written_since_is_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    list(write_records(path, texts(num_samples=1), {}, earlier=0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another run has written"):
        list(write_records(path, texts(num_samples=1), {}, earlier=0))
    assert path.read_bytes() == before
