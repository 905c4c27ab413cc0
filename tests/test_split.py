"""Published pairs become chats, in three parts that share no prompt."""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import pytest

FILE = Path(__file__).parents[1] / "tutorials" / "split.py"


def test_every_pair_is_in_one_part_and_a_chat(tmp_path):
    texts = [{"prompt": f"Question {i % 80}", "chosen": f" yes {i}", "rejected": "no"} for i in range(160)]
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    dialogue = {"chosen": f"{talk} Because", "rejected": f"{talk} No"}
    left_out = [{"prompt": "x" * 2000, "chosen": "a", "rejected": "b"}, {"prompt": "y", "chosen": " ", "rejected": "b"}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*texts, dialogue, *left_out])))
    split = run_path(str(FILE))["main"]
    split(str(tmp_path / "all.jsonl"), str(tmp_path / "parts"))

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "parts" / f"{name}.jsonl").read_text().splitlines()]

    pairs, judge_pairs, decoded = read("pairs"), read("judge_pairs"), read("prompts")
    parts = [{json.dumps(record["prompt"]) for record in part} for part in (pairs, judge_pairs, decoded)]
    assert [len(part) for part in parts] == [24, 25, 32]
    assert len(set.union(*parts)) == 81
    assert len(decoded) == 32
    assert all(pair["chosen"] == pair["chosen"].strip() for pair in pairs)
    chat = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    said = [[(one["role"], one["content"]) for one in json.loads(prompt)] for prompt in set.union(*parts)]
    assert chat in said
    assert [("user", "Question 0")] in said

    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, texts[:33])))
    with pytest.raises(SystemExit, match=r"few.jsonl has 33 prompts of up to 1500 characters; 34 are needed"):
        split(str(tmp_path / "few.jsonl"), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
