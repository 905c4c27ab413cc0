"""What experiments are made on: the frozen lab, the embedded world, and the reference that is shipped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest

from pargs_min.experiments import recipes, setup
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import PARTIAL
from pargs_min.experiments.setup import SHIPPED, STEPS, as_json, embedded, generated, judged, material
from pargs_min.models import load_tokenizer
from pargs_min.reward_model import recorded
from pargs_min.world.journey import Journey
from pargs_min.world.reference import grammar_gap, reference, word_tokenizer
from tests.strategies import tiny_lm
from tests.test_codec import chat_tokenizer


def test_the_shipped_reference_is_the_one_that_the_defaults_train():
    """`reference` checks the settings that the folder records, and raises where the recipe has changed since."""
    reference(SHIPPED, Journey(), seed=0, steps=STEPS)
    assert load_tokenizer(SHIPPED).get_vocab() == word_tokenizer(Journey()).get_vocab()


def test_the_shipped_reference_knows_the_grammar():
    """Of whose texts the entropy is 13 nats."""
    gap, error = grammar_gap(reference(SHIPPED)[0], Journey())
    assert 0 < gap < 0.05
    assert error < 0.005


def test_the_world_takes_the_shipped_reference_at_its_defaults_only(tmp_path, monkeypatch):
    asked = []

    def fake(folder, world, *, seed, steps, worst_gap):
        asked.append((folder.exists(), worst_gap))
        raise StopIteration

    monkeypatch.setattr(setup, "reference", fake)
    cases = [{}, {"seed": 1}, {"steps": 500}, {"quick": True}, {"world": Journey(luck=Fraction(1, 4))}]
    for number, case in enumerate(cases):
        with pytest.raises(StopIteration):
            embedded(tmp_path / str(number), **case)
    early = math.inf
    assert asked == [(True, 0.1), (False, 0.1), (False, early), (False, early), (False, 0.1)]
    weights = (tmp_path / "0" / "reference" / "model.safetensors").read_bytes()
    assert weights == (SHIPPED / "model.safetensors").read_bytes()


def test_a_lab_is_a_key(lab):
    assert material(lab) is material(replace(lab))
    assert len({lab, replace(lab), replace(lab, samples=4)}) == 2
    assert hash(replace(lab, world=Journey())) == hash(replace(lab, world=Journey()))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(samples=0), "samples must be at least 1, got 0"),
        (dict(text_prompts=0), "text_prompts must be at least 1, got 0"),
        (dict(texts_per_prompt=3), "texts_per_prompt must be even, got 3"),
    ],
)
def test_a_lab_without_texts_is_refused(lab, sizes, message):
    with pytest.raises(ValueError, match=message):
        replace(lab, **sizes)


def test_what_is_written_is_json(lab):
    written = json.dumps(as_json({"lab": replace(lab, world=Journey()), "cell": Cell(3, recipe=PARTIAL)}))
    found = json.loads(written)
    assert found["lab"]["world"] == {"stay_home_reward": -2.0, "luck": "1/200"}
    assert found["cell"] == {"seed": 3, "recipe": {"objective": "partial"}, "quality": False, "lab": ""}
    assert as_json({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}


def test_a_judge_that_gives_no_number_is_named(lab):
    with pytest.raises(ValueError, match="answers None"):
        judged(replace(lab, judge="tests.experiments.test_setup:silent"), [{"prompt": "a", "response": "b"}])


def test_a_judge_is_known_by_its_code(lab, tmp_path, monkeypatch):
    """Also in a package, and wherever Python finds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_judges").mkdir()
    code = tmp_path / "own_judges" / "__init__.py"
    code.write_text("def f(prompts, responses): return [1.0] * len(responses)")
    found = []
    for _ in range(2):
        setup.contents.cache_clear()
        found.append(setup.contents(replace(lab, judge="own_judges:f"))["judge"])
        code.write_text("def f(prompts, responses): return [2.0] * len(responses)")
    assert found[0] != found[1]
    with pytest.raises(ValueError, match=r"'own_judges\.absent\.deeper:f' cannot be loaded"):
        setup.contents(replace(lab, judge="own_judges.absent.deeper:f"))


def test_prompts_of_another_are_not_replaced(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl was made from other prompts"):
        embedded(tmp_path, pairs=2, held_out=2)
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "mine"}\n'


def silent(prompts, responses):
    return [None] * len(responses)


def test_a_judge_that_compares_is_refused(lab):
    with pytest.raises(ValueError, match="give one that scores them one by one"):
        judged(replace(lab, judge="http://localhost/v1#model"), [])


def test_a_lab_of_chats_is_of_chats_throughout(lab, tmp_path, monkeypatch):
    """Its texts, its reward models, and the end that the shorter response of a pair is continued by; one of text pairs
    is of text, though the tokenizer has a chat template."""
    assert generated(lab, [{"prompt": "a"}], 1)[0]["prompt_format"] == "text"
    tiny_lm(vocabulary=12).float().save_pretrained(tmp_path / "lm")
    chat_tokenizer().save_pretrained(tmp_path / "lm")
    asked = ([{"role": "user", "content": word}] for word in "abcd")
    pairs = [{"prompt": prompt, "chosen": "b c", "rejected": "d"} for prompt in asked]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    ends = []
    monkeypatch.setattr(recipes, "train_reward_model", lambda *_, end, **__: ends.append(end) or {})
    lab = replace(lab, held_out=lab.pairs)
    (text, *_) = generated(lab, [{"prompt": "a"}], 1)
    assert text["prompt_format"] == recorded(recipes.guide(lab, recipes.PARTIAL, 0))["prompt_format"] == "chat"
    assert ends == [0]
