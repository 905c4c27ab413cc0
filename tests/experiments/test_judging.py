"""The judge of the embedded world."""

import numpy as np
import pytest

from pargs_min.experiments.judging import named_judge
from pargs_min.world.journey import END, OFF_GRAMMAR, PAD, PROMPTS, Journey
from pargs_min.world.reference import word_tokenizer


def test_the_gold_reward_reads_ids_up_to_the_end_token():
    world = Journey()
    tokens, _ = world.write(np.random.default_rng(0).random((24, 25)))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(24)]
    end, tokenizer = world.vocabulary[END], word_tokenizer(world)
    rows = [row[: row.index(end) + 1] for row in tokens.tolist()]
    texts = [
        {"prompt": prompt, "response": tokenizer.decode(row, skip_special_tokens=True), "response_ids": row}
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    judge = named_judge("toy")
    golds = judge.score(texts)
    assert golds == world.gold(prompts, [text["response"] for text in texts])
    assert len(set(golds)) > 3
    cut = [text | {"response_ids": text["response_ids"][:-1]} for text in texts]
    padded = [text | {"response_ids": [world.vocabulary[PAD], *text["response_ids"]]} for text in texts]
    off = judge.score(cut + padded)  # though the text of each is that of a whole journey
    assert set(off) == {OFF_GRAMMAR}
    off_grammar = judge.measures["off_grammar"]
    assert [off_grammar(gold) for gold in golds + off] == [0.0] * 24 + [1.0] * 48


@pytest.mark.parametrize(
    ("prompt", "message"), [("a b", "must be one of the world's twelve"), (None, "prompt number 7 has no text")]
)
def test_a_prompt_from_elsewhere_is_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        named_judge("toy").score([{"prompt_number": 7, "prompt": prompt, "response": "", "response_ids": []}])


def test_every_other_name_is_left_to_the_judges():
    with pytest.raises(ValueError, match="names no model; write it behind the address"):
        named_judge("http://127.0.0.1:1/v1")
