from __future__ import annotations

import gzip
import json
import os
import re
import sys

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pargs_min.records import (
    ASSISTANT,
    Preference,
    check_preference,
    read_preferences,
    read_prompts,
    read_responses,
    split_dialogues,
)

GOOD = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
USER, HELLO, GO = ({"role": r, "content": c} for r, c in [("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go")])
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = [{"type": "text", "text": "Hi"}]
DIALOGUES = {"chosen": f"\n\nHuman: Hi{ASSISTANT} A", "rejected": f"\n\nHuman: Hi{ASSISTANT} B"}


def lines(*records):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)


def test_a_file_is_read_plain_or_compressed_and_blank_lines_are_skipped(tmp_path):
    text = lines(GOOD, "", GOOD) + "\n"
    (tmp_path / "p.jsonl").write_text(text)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(text)
    for name in ("p.jsonl", "p.jsonl.gz"):
        assert read_preferences(tmp_path / name) == [
            Preference("1 + 1 =", " 2", " 3", f"{tmp_path / name}:{line}") for line in (1, 3)
        ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (GOOD, ("1 + 1 =", " 2", " 3")),
        (dict(prompt=[USER], chosen=[HELLO], rejected=[GO]), ([USER], "Hello", "Go")),
        (dict(prompt=[USER], chosen="Hello", rejected="Go"), ([USER], "Hello", "Go")),
        (dict(prompt="Hi", chosen=[HELLO], rejected=[GO]), ([USER], "Hello", "Go")),
        (dict(chosen=[USER, HELLO], rejected=[USER, GO]), ([USER], "Hello", "Go")),
        (dict(prompt=[SYSTEM, USER], chosen=[HELLO], rejected=[GO]), ([SYSTEM, USER], "Hello", "Go")),
        (dict(prompt=[USER], chosen=[USER, HELLO], rejected=[USER, GO]), ([USER], "Hello", "Go")),
        (GOOD | dict(prompt_ids=[5]), ([5], " 2", " 3")),
        (GOOD | dict(chosen_ids=[6]), ("1 + 1 =", [6], " 3")),
        (dict(prompt_ids=[5], chosen_ids=[6], rejected_ids=[7]), ([5], [6], [7])),
        (dict(prompt_ids=[5], chosen_ids=[6], rejected_ids=[7], system="Be brief."), ([5], [6], [7])),
        (GOOD | dict(prompt_ids=None), ("1 + 1 =", " 2", " 3")),
        (DIALOGUES | dict(prompt=None), (f"\n\nHuman: Hi{ASSISTANT}", " A", " B")),
        (
            dict(prompt=[SYSTEM, USER], chosen=[HELLO], rejected=[GO], system="Be brief."),
            ([SYSTEM, USER], "Hello", "Go"),
        ),
        (GOOD | dict(system="", system_prompt=None, input="1 + 1"), ("1 + 1 =", " 2", " 3")),
        (dict(prompt="Hi", chosen=[HELLO], rejected=[GO | {"role": "model"}]), ([USER], "Hello", "Go")),
        (dict(prompt="a", chosen="ab", rejected="ac"), ("a", "ab", "ac")),
        (dict(prompt="ha", chosen="haha", rejected="no"), ("ha", "haha", "no")),
    ],
)
def test_every_form_comes_to_prompt_chosen_rejected(record, expected):
    assert check_preference(record, "-")[:3] == expected


@given(st.text(), st.text(max_size=5), st.text(max_size=5))
def test_dialogues_are_cut_after_the_last_shared_assistant(history, chosen, rejected):
    prompt = f"\n\nHuman: {history}{ASSISTANT}"
    record = split_dialogues({"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert record["prompt"] + record["chosen"] == prompt + chosen
    assert record["prompt"] + record["rejected"] == prompt + rejected
    assert record["prompt"].endswith(ASSISTANT)
    assert record["prompt"] == prompt


def test_an_earlier_turn_that_differs_belongs_to_the_response():
    start = f"\n\nHuman: Hi{ASSISTANT}"
    record = split_dialogues({"chosen": f"{start} A\n\nHuman: x{ASSISTANT} B", "rejected": f"{start} C"})
    assert record == {"prompt": start, "chosen": f" A\n\nHuman: x{ASSISTANT} B", "rejected": " C"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "no field `rejected`; found prompt, chosen"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "`prompt` must be a string"),
        (GOOD | {"chosen": None}, "no field `chosen`; found prompt, rejected"),
        (GOOD | {"chosen": [{"role": "assistant"}]}, "`chosen` must be a string"),
        (GOOD | {"chosen": [HELLO]}, "both be lists of messages"),
        (dict(chosen=[USER, HELLO], rejected=[HELLO, GO]), "share all messages but the last"),
        (dict(chosen=[HELLO], rejected=[GO]), "no field `prompt`"),
        (dict(prompt=[SYSTEM, USER], chosen=[USER, HELLO], rejected=[USER, GO]), "not what chosen and rejected begin"),
        (dict(chosen="a", rejected="b"), "share no beginning"),
        (dict(chosen_ids=[1], rejected_ids=[2]), "no field `prompt`"),
        (GOOD | {"prompt_ids": [1, -1]}, "`prompt_ids` must be a list of token ids"),
        (GOOD | {"prompt_ids": [True]}, "`prompt_ids` must be a list of token ids"),
        (GOOD | {"prompt_ids": "12"}, "`prompt_ids` must be a list of token ids"),
        (GOOD | {"chosen_ids": [[]]}, "`chosen_ids` must be a list of token ids"),
        (GOOD | {"chosen_ids": [2**31]}, "`chosen_ids` must be a list of token ids"),
        (GOOD | {"chosen_ids": [1.0]}, "`chosen_ids` must be a list of token ids"),
        (GOOD | {"prompt": None}, "no field `prompt`, and chosen and rejected share no beginning"),
        (GOOD | {"chosen": HELLO, "rejected": GO}, "`chosen` must be .* a list of messages .*got {.role.: .assistant."),
        (
            GOOD | {"prompt": [USER | {"content": PARTS}]},
            "`prompt` must be .* {role, content} of two strings each, got",
        ),
        (GOOD | {"system": "Be brief."}, "`system` would be left out; put it into `prompt` as a message"),
        (GOOD | {"system_prompt": ["Be brief."]}, "`system_prompt` would be left out"),
        (GOOD | {"input": "3"}, "`input` would be left out"),
        (GOOD | {"history": [["Capital of France?", "Paris."]]}, "`history` would be left out"),
        (dict(chosen=[USER, HELLO], rejected=[USER, GO], system="Be brief."), "`system` would be left out"),
        (DIALOGUES | {"system": "Be brief."}, "`system` would be left out"),
        (dict(chosen=[USER, HELLO, USER], rejected=[USER, HELLO, SYSTEM]), "the response, .* its role is 'user'"),
        (dict(prompt=[USER], chosen=[HELLO], rejected=[USER]), "the response, .* its role is 'user'"),
        (dict(prompt="Q:", chosen="Q: a", rejected="Q: b"), "both repeat the prompt"),
        (DIALOGUES | {"prompt": DIALOGUES["chosen"][:-2]}, "both repeat the prompt"),
        ('{"prompt": "a", "prompt": "b"}', "not JSON .field 'prompt' is there twice"),
        ('{"prompt": "a", "x": [{"y": 1, "y": 1}]}', "not JSON .field 'y' is there twice"),
        ('{"prompt": "\\ud83d"}', "not JSON .field 'prompt' holds half a character"),
        ('{"prompt": "a", "x": {"y": ["\\udc00"]}}', "not JSON .field 'y' holds half a character"),
        ('{"\\ud83d": 1}', "not JSON .field '.+ud83d' holds half a character"),
        ('{"prompt": "a", "x": NaN}', "not JSON .field 'x' holds NaN, Infinity"),
        ('{"prompt": "a", "x": [-Infinity]}', "not JSON .field 'x' holds NaN, Infinity"),
        ('{"prompt": "a", "x": 1e999}', "not JSON .field 'x' holds NaN, Infinity"),
        ('{"x": ' + "9" * 5000 + "}", "not JSON .Exceeds the limit"),
        ('{"x": ' + "[" * 10**5, "not JSON .maximum recursion depth"),
        ('{"x": ' * 10**5, "not JSON .maximum recursion depth"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines(GOOD, line))
    with pytest.raises(ValueError, match="bad.jsonl:2: .*" + message):
        read_preferences(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: not text in UTF-8 .*0xff in position 12"):
        read_preferences(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "chosen": "b", "rejected": "c"}\n\xe9')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not text in UTF-8 .*0xe9"):
        read_preferences(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(ValueError, match=r"bad.jsonl:1: not text in UTF-8"):
        read_preferences(tmp_path / "bad.jsonl")


def test_an_empty_file_and_a_cut_archive_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_preferences(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(*[GOOD] * 50).encode())[:-12])
    with pytest.raises(ValueError, match=r"damaged gzip stream .*ended before the end"):
        read_preferences(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize("name", ["absent.jsonl", "folder/absent.jsonl", "a/b/absent"])
def test_a_missing_file_is_an_oserror(name):
    with pytest.raises(FileNotFoundError):
        read_preferences(name)


BENCH = GOOD | {"chosen_model": "a", "rejected_model": "b", "subset": "sums", "id": 5}


@pytest.mark.parametrize("name", ["bench.jsonl", "bench.parquet"])
def test_pairs_of_reward_bench_know_their_subset(tmp_path, name):
    if name.endswith("parquet"):
        table = pyarrow.Table.from_pylist([BENCH, BENCH | {"subset": None}])
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        (tmp_path / name).write_text(lines(BENCH, GOOD))
    assert [(*one[:3], one.subset) for one in read_preferences(tmp_path / name)] == [
        ("1 + 1 =", " 2", " 3", "sums"), ("1 + 1 =", " 2", " 3", None),
    ]  # fmt: skip


def test_every_chosen_response_is_compared_with_every_rejected_one(tmp_path):
    """As RewardBench 2 has them; ids and messages stay what they are."""
    (tmp_path / "p.jsonl").write_text(lines(BENCH | {"chosen": ["2", "two"], "rejected": ["3", "1"]}))
    found = read_preferences(tmp_path / "p.jsonl")
    assert [one[1:3] for one in found] == [("2", "3"), ("2", "1"), ("two", "3"), ("two", "1")]
    assert {one.source for one in found} == {f"{tmp_path}/p.jsonl:1"}
    for wrong in (BENCH | {"chosen": []}, BENCH | {"rejected": ["3", 1]}):
        (tmp_path / "p.jsonl").write_text(lines(wrong))
        with pytest.raises(ValueError, match=r"p.jsonl:1: `(chosen|rejected)` must be a string"):
            read_preferences(tmp_path / "p.jsonl")


def test_an_instruction_and_its_input_are_a_prompt(tmp_path):
    both = {"chosen": "friend, please", "rejected": "friend"}
    asked = [{"instruction": "Correct it.", "input": given} for given in ("freind", "", None)]
    (tmp_path / "p.json").write_text(json.dumps([record | both for record in asked]))
    found = read_preferences(tmp_path / "p.json")
    assert [one.prompt for one in found] == ["Correct it.\n\nfreind", "Correct it.", "Correct it."]
    assert {one[1:3] for one in found} == {("friend, please", "friend")}
    (tmp_path / "p.json").write_text(lines({"instruction": ["Correct it."], **both}))
    with pytest.raises(ValueError, match="`instruction` and `input` must be text"):
        read_preferences(tmp_path / "p.json")


def test_a_damaged_table_and_a_missing_reader_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"p.parquet is no parquet file that can be read"):
        read_preferences(tmp_path / "p.parquet")
    with pytest.raises(FileNotFoundError):
        read_preferences(tmp_path / "absent.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"to read .*p.parquet: pip install 'pargs-min\[hub\]'"):
        read_preferences(tmp_path / "p.parquet")


# ---- prompts ----


def test_prompts_are_read_from_records_and_from_lines(tmp_path):
    records = [{"prompt": "a", "id": 3}, {"prompt": [USER]}, {"prompt_ids": [1, 2]}]
    (tmp_path / "p.jsonl").write_text(lines(*records))
    assert read_prompts(tmp_path / "p.jsonl") == records
    (tmp_path / "p.txt").write_text("one day\n\ntwo\u2028days\n")
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "one day"}, {"prompt": "two\u2028days"}]


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone day\r\n\r\ntwo\r\n")
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "one day"}, {"prompt": "two"}]
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "one day"}\r\n\r\n{"prompt": "two"}\r\n')
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "one day"}, {"prompt": "two"}]


JSONL, TEXT = b'{"prompt": "one"}\n\n{"prompt": "two"}\n', b"one\r\n\ntwo\r"
ONE_TWO = [{"prompt": "one"}, {"prompt": "two"}]


@pytest.mark.parametrize("name", ["p.ndjson", "p.JSONL", "p.jsonlines", "p", "p.txt", "p.jsonl.gz", "p.gz"])
@pytest.mark.parametrize(
    "data", [JSONL, b" \n" + JSONL, json.dumps(ONE_TWO).encode(), json.dumps(ONE_TWO, indent=1).encode()]
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_is_known_by_its_content_whatever_the_name(tmp_path, name, data, packed):
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    assert read_prompts(tmp_path / name) == ONE_TWO


@pytest.mark.parametrize("name", ["p.txt", "p", "p.gz", "p.txt.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_all_else_is_plain_text(tmp_path, name, packed):
    (tmp_path / name).write_bytes(gzip.compress(TEXT) if packed else TEXT)
    assert read_prompts(tmp_path / name) == ONE_TWO
    (tmp_path / name).write_text("[INST] one [/INST]\n[1] two\n[] three\n")
    assert len(read_prompts(tmp_path / name)) == 3


@pytest.mark.parametrize("data", [JSONL, TEXT, gzip.compress(JSONL)], ids=["records", "text", "archive"])
def test_prompts_are_read_from_a_pipe(data):
    end, pipe = os.pipe()
    os.write(pipe, data)
    os.close(pipe)
    try:
        assert read_prompts(f"/dev/fd/{end}") == ONE_TWO
    finally:
        os.close(end)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.csv", JSONL, "p.csv: tables are not read"),
        ("p.TSV", TEXT, "p.TSV: tables are not read"),
        ("p.jsonl", TEXT, "p.jsonl:1: not JSON"),
        ("p", b"[]", "p holds no prompts"),
        ("p", b'["one", "two"]', "p: record 1: expected a JSON object, got str"),
        ("p", b'[{"prompt": "one"}, {"text": "two"}]', "p: record 2: no field `prompt`; found text"),
        ("p", b'[{"prompt": "one"},', "p: not JSON .*line 1 column 20"),
        ("p", b'{"prompt": "one"}\n[{"prompt": "two"}]', "p:2: expected a JSON object, got list"),
        ("p", b'{"prompt": "one", "system": "Be brief."}', "p:1: `system` would be left out"),
        ("p", b'{"prompt": null, "prompt_ids": null}', "p:1: no field `prompt`"),
        ("p", b'{"prompt": 5, "prompt_ids": [1]}', "p:1: `prompt` must be a string"),
        ("p", "one\ntwo".encode("utf-16-le"), "p:1: not text in UTF-8 .*0x00 in position 1"),
        ("p", b"one\ntwo\n\xff\xfe", "p:3: not text in UTF-8"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/{message}"):
        read_prompts(tmp_path / name)


def test_null_stands_for_nothing(tmp_path):
    (tmp_path / "p").write_text('{"prompt": "one", "prompt_ids": null, "id": 3}')
    assert read_prompts(tmp_path / "p") == [{"prompt": "one", "id": 3}]


def test_every_damage_to_an_archive_is_found(tmp_path):
    """A byte flipped anywhere behind the header, which zlib, the length or the check sum tells."""
    data, file = gzip.compress(JSONL, mtime=0), tmp_path / "p.gz"
    for at in range(10, len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"p.gz is a damaged gzip stream"):
            read_prompts(file)


def test_bad_prompts_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text(lines({"prompt": "a"}, {"text": "b"}))
    with pytest.raises(ValueError, match=r"p.jsonl:2: no field `prompt`; found text"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"p.txt:1: not text in UTF-8 .*0xe9"):
        read_prompts(tmp_path / "p.txt")


def test_whether_a_text_finished_is_true_or_false(tmp_path):
    good = {"prompt": "a", "response": "b"}
    (tmp_path / "t.jsonl").write_text(lines(good, good | {"finished": False}))
    assert [response.finished for response in read_responses(tmp_path / "t.jsonl")] == [True, False]
    (tmp_path / "t.jsonl").write_text(lines(good, good | {"finished": "no"}))
    with pytest.raises(ValueError, match=r't.jsonl:2: `finished` must be true or false, got "no"'):
        read_responses(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(lines(good | {"prompt_format": 5}))
    with pytest.raises(ValueError, match=r"t.jsonl:1: `prompt_format` must be text, got 5"):
        read_responses(tmp_path / "t.jsonl")


# ---- the hub: rows written by us, in the published schemas ----

ROWS = {
    "Anthropic/hh-rlhf": {
        "chosen": "\n\nHuman: Is tea hot?\n\nAssistant: Usually.\n\nHuman: Always?\n\nAssistant: No.",
        "rejected": "\n\nHuman: Is tea hot?\n\nAssistant: Usually.\n\nHuman: Always?\n\nAssistant: Find out.",
    },
    "trl-lib/tldr-preference": {
        "prompt": "SUBREDDIT: r/tea\n\nTITLE: Tea\n\nPOST: I like tea a lot.\n\nTL;DR:",
        "chosen": " Likes tea.",
        "rejected": " Coffee.",
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "Hi",
        "prompt_id": "0a",
        "chosen": [USER, HELLO],
        "rejected": [USER, GO],
        "messages": [USER, HELLO],
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    },
}
EXPECTED = {
    "Anthropic/hh-rlhf": (ROWS["Anthropic/hh-rlhf"]["chosen"][: -len(" No.")], " No.", " Find out."),
    "trl-lib/tldr-preference": tuple(ROWS["trl-lib/tldr-preference"].values()),
    "HuggingFaceH4/ultrafeedback_binarized": ([USER], "Hello", "Go"),
}


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the datasets library: the rows above, and the splits that were asked for."""
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name, split):
            asked.append((name, split))
            return [ROWS[name]]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    return asked


@pytest.mark.parametrize("name", ROWS)
def test_presets_read_the_published_schemas(hub, name):
    assert read_preferences(name) == [Preference(*EXPECTED[name], f"{name} row 0")]


def test_the_split_is_the_presets_own_or_the_one_named(hub):
    name = "HuggingFaceH4/ultrafeedback_binarized"
    read_preferences(name)
    read_preferences(f"{name}:test_prefs")
    read_preferences("trl-lib/tldr-preference")
    assert [split for _, split in hub] == ["train_prefs", "test_prefs", "train"]


def test_without_the_library_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no file owner/name; .*pip install 'pargs-min\[hub\]'"):
        read_preferences("owner/name")


def test_texts_as_prompts_are_read_anew(tmp_path):
    """Their ids are those of the model that wrote them."""
    text = {"prompt": "one", "prompt_ids": [1, 2], "response": "two"}
    (tmp_path / "p.jsonl").write_text(json.dumps(text) + "\n")
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "one", "response": "two"}]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "prompt_ids": [1, 2]}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "one", "prompt_ids": [1, 2]}]
