"""The recipe's prompts, and its pairs: labelled with the noise that it names."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from runpy import run_path

import pytest

FILE = Path(__file__).parents[1] / "tutorials" / "cheerful.py"


@pytest.fixture
def cheerful():
    return run_path(str(FILE))


def test_prompts_to_train_judge_and_test_on_share_no_topic(cheerful, tmp_path):
    cheerful["main"]("prompts", str(tmp_path))
    asked, test = (
        [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("asked", "prompts")
    )
    assert (len(asked), len(test)) == (60, 32)
    assert len({*asked, *test}) == 92
    assert asked[0] == "Write two sentences about the weather."


def test_the_more_cheerful_text_is_chosen_as_often_as_bradley_and_terry_say(cheerful):
    pairs, scores = cheerful["pairs"], {"good": 0.5, "bad": 0.1}
    pairs.__globals__["compound"] = lambda prompts, responses: [scores[response] for response in responses]
    texts = {"Write two sentences about it.": ["good", "bad", "bad", "good"] * 2000 + ["good", "good", "", "bad"]}
    found = pairs(texts, "it", random.Random(1))
    assert len(found) == 4000  # without those that are empty or the same
    chosen = sum(pair["chosen"] == "good" for pair in found) / 4000
    assert chosen == pytest.approx(1 / (1 + math.exp(-4 * 0.4)), abs=0.025)  # four standard errors


def test_vader_tells_good_from_bad(cheerful):
    pytest.importorskip("vaderSentiment")
    good, bad = cheerful["compound"](["", ""], ["What a wonderful day!", "What a horrible day!"])
    assert bad < 0 < good
