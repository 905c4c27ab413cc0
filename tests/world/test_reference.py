"""The tiny reference, and its pairs."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit
from transformers import AutoModelForCausalLM, AutoTokenizer

from pargs_min.codec import Codec
from pargs_min.decode import row_uniforms
from pargs_min.texts import generate_texts, text_log_probs
from pargs_min.world import reference as toy
from pargs_min.world.journey import HELD_OUT_PROMPTS, HORIZON, PROMPTS, TRAIN_PROMPTS, Journey

WORLD = Journey()
STEPS = 60  # enough for texts that end
early = partial(toy.reference, worst_gap=math.inf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy") / "reference"


@pytest.fixture(scope="module")
def trained(folder: Path):
    return early(folder, WORLD, steps=STEPS)


@pytest.fixture(scope="module")
def pairs(folder: Path, trained) -> list[dict]:
    """Four hundred pairs, less those with a response that did not end."""
    toy.write_pairs(folder / "../pairs.jsonl", *trained, WORLD, pairs=400)
    return [json.loads(line) for line in (folder / "../pairs.jsonl").read_text().splitlines()]


def test_texts_survive_the_tokenizer():
    tokenizer = toy.word_tokenizer(WORLD)
    tokens, _ = WORLD.write(np.random.default_rng(0).random((120, HORIZON)))
    for i, row in enumerate(tokens):
        text = " ".join(WORLD.words[t] for t in row if t != tokenizer.eos_token_id)
        ids = tokenizer(text).input_ids
        assert ids == row[: len(ids)].tolist()
        assert tokenizer.decode(ids) == text
        assert tokenizer(PROMPTS[i % 12]).input_ids == [WORLD.vocabulary[word] for word in PROMPTS[i % 12].split()]
    assert tokenizer("she packs a zebra <end>").input_ids[3:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_the_reference_is_an_ordinary_hub_folder(folder: Path, trained):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == WORLD.vocabulary
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (model.config.pad_token_id, model.config.eos_token_id)
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    assert torch.equal(model.eval()(input_ids=ids).logits, trained[0](input_ids=ids).logits)
    assert not trained[0].training


def test_a_reference_that_is_there_is_reused_and_another_is_refused(folder: Path, trained):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    early(folder, Journey(stay_home_reward=0.0), steps=STEPS)  # the same texts
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="choose another folder"):
        toy.reference(folder, WORLD, steps=STEPS + 1)


def test_training_repeats_itself_and_leaves_the_global_stream_alone(tmp_path: Path):
    one = early(tmp_path / "a", WORLD, steps=3)[0]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    other = early(tmp_path / "b", WORLD, steps=3)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    different = early(tmp_path / "c", WORLD, steps=3, seed=1)[0]
    assert not torch.equal(one.transformer.wte.weight, different.transformer.wte.weight)


@pytest.mark.trains
@pytest.mark.parametrize("seed", range(3))
def test_the_reference_learns_the_grammar(tmp_path: Path, seed: int):
    """Its surprisal at fresh journeys: more than the grammar's own (by KL), much less than that of guessing words.

    By how much: 6.5 nats per text, with a standard error of 0.2; and 1.1 nats per token, where half of guessing is 2.1.
    """
    model, tokenizer = early(tmp_path / "reference", WORLD, seed=seed, steps=STEPS)
    tokens, log_probs = WORLD.write(np.random.default_rng(5).random((240, HORIZON)))
    rows = [row[: row.index(tokenizer.eos_token_id) + 1] for row in tokens.tolist()]
    codec = Codec(tokenizer)
    texts = [
        {"prompt": PROMPTS[i % len(PROMPTS)], "response": codec.text(row), "response_ids": row}
        for i, row in enumerate(rows)
    ]
    surprisal = -np.array(text_log_probs(model, codec, texts))
    gaps = surprisal + log_probs.sum(1)
    found, error = toy.grammar_gap(model, WORLD)
    assert abs(gaps.mean() - found) < 5 * (gaps.std() / np.sqrt(len(gaps)) + error)  # fails once in a million
    assert surprisal.sum() < 0.5 * np.log(len(WORLD.vocabulary)) * sum(map(len, rows))


def test_the_gap_is_the_kl_of_whole_texts(trained, monkeypatch):
    """Of a model that knows only how often each token comes: E_y sum_i (log p(y_i | y_<i) - log q(y_i)), its end
    included and nothing behind it. The prefixes are the same, so the two differ by the noise of the tokens alone."""
    model = trained[0]
    logits = torch.randn(len(WORLD.vocabulary), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: logits.expand(*hidden.shape[:2], -1))
    tokens, log_probs = WORLD.write(np.random.default_rng(1).random((6000, HORIZON)))
    ended = (tokens == WORLD.vocabulary["<end>"]).cumsum(1) > (tokens == WORLD.vocabulary["<end>"])
    gaps = (log_probs - logits.double().log_softmax(-1).numpy()[tokens] * ~ended).sum(1)
    found, error = toy.grammar_gap(model, WORLD, journeys=6000)
    assert abs(found - gaps.mean()) < 5 * gaps.std() / np.sqrt(6000)
    assert toy.grammar_gap(model, WORLD, journeys=1500)[1] == pytest.approx(2 * error, rel=0.2)


@pytest.mark.trains
def test_training_goes_on_until_the_reference_is_near_the_grammar(tmp_path: Path, monkeypatch):
    """On new journeys in every round, and not for ever."""
    drawn, gaps = [], []
    monkeypatch.setattr(toy, "_train", lambda model, world, rng, steps: drawn.append(rng.random()))
    monkeypatch.setattr(toy, "grammar_gap", lambda model, world: (gaps.pop(0), 0.0))
    rounds = []
    for name, found in (("near", [0.09, 0.09]), ("later", [0.2, 0.2, 0.05, 0.05]), ("never", [0.2] * 5)):
        gaps[:], drawn[:] = found, []
        try:
            toy.reference(tmp_path / name, WORLD, steps=1)
        except ValueError:
            rounds.append("refused")
        rounds.append(len(set(drawn)))
        assert not gaps
    early(tmp_path / "early", WORLD, steps=1)
    assert rounds == [1, 3, "refused", 4]
    assert len(drawn) == 5


@pytest.mark.trains
def test_a_reference_far_from_the_grammar_is_refused(folder: Path, trained):
    """When it is made and when it is found; what has a name for being early is not."""
    with pytest.raises(ValueError, match=r"reference is [\d.]+ nats per text from the grammar, and at most 0.1 are"):
        toy.reference(folder, WORLD, steps=STEPS)
    gap, _ = toy.grammar_gap(trained[0], WORLD)
    toy.reference(folder, WORLD, steps=STEPS, worst_gap=1.01 * gap)
    with pytest.raises(ValueError, match="take another seed or more steps"):
        toy.reference(folder, WORLD, steps=STEPS, worst_gap=0.99 * gap)


def test_pairs_are_records_of_training_prompts_in_text_and_ids(pairs, trained):
    model, tokenizer = trained
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    settings = dict(method="plain", max_new_tokens=HORIZON, num_samples=800, batch_size=500)
    texts = {
        (PROMPTS[text["prompt_number"]], text["sample"]): text["response_ids"][:-1] if text["finished"] else None
        for text in generate_texts(model, tokenizer, prompts, **settings)
    }
    drawn = [[texts[TRAIN_PROMPTS[i % len(TRAIN_PROMPTS)], 2 * i + k] for k in (0, 1)] for i in range(400)]
    whole = [sorted(both) for both in drawn if None not in both]
    assert [sorted([record["chosen_ids"], record["rejected_ids"]]) for record in pairs] == whole
    assert {record["prompt"] for record in pairs} == set(TRAIN_PROMPTS)
    assert not set(TRAIN_PROMPTS) & set(HELD_OUT_PROMPTS)
    assert sum(record["chosen_ids"] != record["rejected_ids"] for record in pairs) > 0.9 * len(pairs)
    for record in pairs:
        for field in ("prompt", "chosen", "rejected"):
            ids = record[f"{field}_ids"]
            assert tokenizer(record[field]).input_ids == ids or tokenizer.pad_token_id in ids
            assert tokenizer.eos_token_id not in ids
            assert len(ids) < HORIZON


def test_labels_are_bradley_terry_on_the_gold_reward(trained, tmp_path: Path, monkeypatch):
    """Hoeffding at 1e-6: how often the better response was chosen, against the mean of its probability."""
    rng = np.random.default_rng(2)

    def by_the_grammar(policy, reward, prompt_ids, **settings):
        prompts = trained[1].batch_decode(prompt_ids)
        tokens, _ = WORLD.write(rng.random((len(prompts), HORIZON)), prompts)
        return SimpleNamespace(tokens=tokens)

    monkeypatch.setattr(toy, "generate", by_the_grammar)
    toy.write_pairs(tmp_path / "pairs.jsonl", *trained, WORLD, pairs=4000, batch_size=4000)
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(records) == 4000
    gold = np.array([WORLD.gold([r["prompt"]] * 2, [r["chosen"], r["rejected"]]) for r in records])
    margin = (gold[:, 0] - gold[:, 1])[gold[:, 0] != gold[:, 1]]
    bound = np.sqrt(np.log(2 / 1e-6) / (2 * len(margin)))
    assert bound < 0.05
    assert abs((margin > 0).mean() - expit(np.abs(margin)).mean()) < bound
    close = np.abs(margin) < 0.6
    assert abs((margin > 0)[close].mean() - expit(np.abs(margin[close])).mean()) < bound * np.sqrt(
        len(margin) / close.sum()
    )


def test_labels_are_drawn_by_numbers_that_drew_no_token(trained, tmp_path: Path, monkeypatch):
    """Each pair's by its own: the first that its first response left over."""
    drawn, compared = [], []

    def recorded(*arguments, uniforms, **settings):
        drawn.append(uniforms)
        return generate(*arguments, uniforms=uniforms, **settings)

    class Chance(float):
        def __gt__(self, uniform):
            compared.append(uniform)
            return True

    generate = toy.generate
    monkeypatch.setattr(toy, "generate", recorded)
    monkeypatch.setattr(toy, "expit", Chance)
    toy.write_pairs(tmp_path / "pairs.jsonl", *trained, WORLD, pairs=8, seed=3, prompts=PROMPTS)
    labels = row_uniforms(3, range(8), range(0, 16, 2), HORIZON + 1)[:, -1].tolist()
    assert set(compared) <= set(labels)
    assert len(set(compared)) == len(compared) > 4
    assert torch.cat(drawn).shape == (16, HORIZON)
    assert not set(labels) & set(torch.cat(drawn).flatten().tolist())


def test_pairs_do_not_depend_on_the_batch_and_are_whole_or_not_there(trained, tmp_path: Path, monkeypatch):
    settings = dict(pairs=20, seed=4)
    for name, batch_size in (("a", 20), ("b", 7)):
        toy.write_pairs(tmp_path / name, *trained, WORLD, batch_size=batch_size, **settings)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    first = (tmp_path / "a").read_text()
    toy.write_pairs(tmp_path / "c", *trained, WORLD, pairs=20, seed=5)
    assert (tmp_path / "c").read_text() != first

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journey, "gold", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy.write_pairs(tmp_path / "d", *trained, WORLD, **settings)
    assert not (tmp_path / "d").exists()


def test_pairs_with_a_response_that_does_not_end_are_left_out(trained, tmp_path: Path):
    model, tokenizer = trained
    bias = torch.zeros(len(WORLD.vocabulary))
    bias[tokenizer.eos_token_id] = -torch.inf
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    try:
        toy.write_pairs(tmp_path / "pairs.jsonl", model, tokenizer, WORLD, pairs=12)
    finally:
        hook.remove()
    assert (tmp_path / "pairs.jsonl").read_text() == ""
