"""Grids of cells: what is measured, what is kept when a grid is interrupted, what the numbers are."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pargs_min.experiments import measure as lab_module
from pargs_min.experiments.measure import Lab, gather, measure, model_name, rlhf_gap, sweep
from tests.strategies import tiny_lm, tiny_tokenizer

WORDS = "abcdefg"


def vowels(prompts, responses):
    """A judge."""
    return [sum(word in "ae" for word in text.split()) for text in responses]


@pytest.fixture
def lab(tmp_path) -> Lab:
    """A lab of a tiny model with pairs that prefer one word; quick to measure anything on."""
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tiny_lm(vocabulary=14, **no_dropout).float().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    pairs = [{"prompt": f"{w} {v}", "chosen": f"a {w}", "rejected": f"b {v} c"} for w in WORDS for v in WORDS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": w}) for w in "bc"))
    names = {name: str(tmp_path / file) for name, file in (("model", "lm"), ("pairs", "pairs.jsonl"))}
    return Lab(
        folder=str(tmp_path),
        prompts=str(tmp_path / "prompts.jsonl"),
        judge="tests.experiments.test_measure:vowels",
        max_new_tokens=8,
        samples=3,
        plain_samples=40,
        batch_size=8,
        pairs_per_step=8,
        learning_rate=1e-3,
        ppo_updates=1,
        **names,
    )


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(lab_module, "workers", lambda processes: ThreadPoolExecutor(1))


def plain(seed):
    return {"method": "plain", "seed": seed}


def test_an_interrupted_grid_keeps_its_cells_and_goes_on(lab, tmp_path, monkeypatch):
    measured, limit = [], [3]

    def counted(lab, cell):
        if len(measured) == limit[0]:
            raise KeyboardInterrupt
        measured.append(cell)
        return {"reward": float(cell["seed"])}

    monkeypatch.setattr(lab_module, "measure", counted)
    cells, file = [plain(seed) for seed in range(6)], tmp_path / "grid.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep({"": lab}, cells, file)
    with file.open("a") as out:
        out.write('{"cell": {"method": "plain", "seed": 5}, "found": {"rew')  # what a killed run leaves
    limit[0] = None
    records = sweep({"": lab}, cells, file)
    assert [cell["seed"] for cell in measured] == list(range(6))  # none twice
    assert [record["found"]["reward"] for record in records] == list(range(6))
    assert sweep({"": lab}, cells, file) == records
    assert len(measured) == 6
    with pytest.raises(ValueError, match="made with other settings"):
        sweep({"": replace(lab, samples=4)}, cells, file)


def test_what_cells_share_is_trained_once_and_ingredients_first(lab, tmp_path, monkeypatch):
    made = []

    def make(lab, recipe, seed):
        made.append(model_name(recipe, seed))

    monkeypatch.setattr(lab_module, "make", make)
    monkeypatch.setattr(lab_module, "measure", lambda lab, cell: {})
    value, full = {"objective": "value"}, {"objective": "full"}
    cells = [
        {"method": "cd", "beta": 1.0, "recipe": value, "seed": 0},
        {"method": "cd", "beta": 2.0, "recipe": value, "seed": 0},
        {"method": "args", "beta": 1.0, "recipe": full, "seed": 0},
        {"method": "ppo", "beta": 1.0, "seed": 1},
    ]
    sweep({"": lab}, cells, tmp_path / "grid.jsonl")
    assert made[:2] == ["full-seed=0", "full-seed=1"]
    assert sorted(made[2:]) == ["ppo-beta=1.0-seed=1", "value-seed=0"]


def test_a_model_is_whole_or_not_there(lab, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("no")

    with monkeypatch.context() as patch:
        patch.setattr(lab_module, "save_reward_model", fail)
        with pytest.raises(FloatingPointError):
            lab_module.make(lab, {"objective": "partial"}, 0)
    assert not (tmp_path / "models" / "partial-seed=0").exists()
    folder = lab_module.make(lab, {"objective": "partial"}, 0)
    assert (folder / "model.safetensors").exists()
    assert lab_module.make(lab, {"objective": "partial"}, 0) == folder


def test_every_kind_of_cell_is_measured(lab):
    partial, full, value = ({"objective": objective} for objective in ("partial", "full", "value"))
    cells = [
        plain(0),
        {"method": "pargs", "beta": 1.0, "top_k": 3, "recipe": partial, "quality": True, "seed": 0},
        {"method": "args-greedy", "beta": 1.0, "recipe": full, "seed": 0},
        {"method": "cd", "beta": 1.0, "recipe": value, "seed": 0},
        {"method": "smc", "beta": 1.0, "particles": 2, "recipe": partial, "final": full, "seed": 0},
        {"method": "best-of-n", "n": 2, "recipe": full, "seed": 0},
        {"recipe": partial | {"head": "vocab", "lengths": [1, 2]}, "quality": True, "seed": 0},
        {"recipe": partial | {"start": {"family": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}, "pairs": 9},
         "quality": True, "seed": 0},
    ]  # fmt: skip
    for cell in cells:
        found = measure(lab, cell)
        if "method" in cell:
            assert len(found["by_prompt"]) == 2
            assert found["reward"] == pytest.approx(np.mean(found["by_prompt"]))
            assert found["calls"] > 0
        if cell.get("quality"):
            assert 0 <= found["concordance"] <= 1
            assert len(found["final"]) == len(found["gold"]) == 8
            assert found["final"][-1] == pytest.approx(1)
    assert abs(measure(lab, plain(0))["kl"]) < 1e-5


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_gap_to_the_rlhf_policy_is_a_divergence(lab, monkeypatch, beta):
    """Two texts, rewards 0 and 1, equally likely: zero for the RLHF policy itself, KL(p || p*) for any other p."""
    monkeypatch.setattr(lab_module, "plain_rewards", lambda lab: np.tile([0.0, 1.0], (3, 400)))
    best = 1 / (1 + math.exp(-beta))
    for p in (best, 0.5, 0.9):
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        expected = p * math.log(p / best) + (1 - p) * math.log((1 - p) / (1 - best))
        found = rlhf_gap(lab, {"method": "pargs", "beta": beta}, {"kl": kl, "reward": p})
        assert found == pytest.approx(expected, abs=1e-12)
    assert rlhf_gap(lab, {"method": "plain"}, {"kl": 0, "reward": 0}) is None
    # at a huge beta the estimate of Z would rest on the few best texts
    monkeypatch.setattr(lab_module, "plain_rewards", lambda lab: np.linspace(0, 1, 800)[None])
    assert rlhf_gap(lab, {"method": "pargs", "beta": 50.0}, {"kl": 0, "reward": 0}) is None


def test_rows_gather_the_seeds_of_a_cell():
    records = [
        {"cell": {"method": m, "seed": s}, "found": {"reward": r, "by_prompt": [r, r + 2], "accuracy": [r, 0.0]}}
        for m, s, r in (("plain", 0, 1.0), ("pargs", 0, 5.0), ("plain", 1, 3.0))
    ]
    first, second = gather(records)
    assert first["method"] == "plain"
    assert (first["reward"]["mean"], first["reward"]["error"], first["reward"]["seeds"]) == (2.0, 1.0, [1.0, 3.0])
    assert first["prompt_error"]["mean"] == 1.0
    assert first["accuracy"]["mean"] == [2.0, 0.0]
    assert math.isnan(second["reward"]["error"])


def test_a_judge_that_gives_no_number_is_named(lab):
    with pytest.raises(ValueError, match="answers None"):
        measure(replace(lab, judge="tests.experiments.test_measure:silent"), plain(0))


def silent(prompts, responses):
    return [None] * len(responses)


def test_models_know_only_what_a_seed_tells_them(lab, tmp_path):
    """The same recipe and seed give the same weights, in another folder, too."""
    one = lab_module.make(lab, {"objective": "partial"}, 0)
    elsewhere = replace(lab, folder=str(tmp_path / "elsewhere"))
    two = lab_module.make(elsewhere, {"objective": "partial"}, 0)
    three = lab_module.make(lab, {"objective": "partial"}, 1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, two, three)]
    assert weights[0] == weights[1] != weights[2]


def test_what_is_not_installed_is_said_before_anything_is_made(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lab_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="which is TRL's: pip install"):
        sweep({"": lab}, [{"method": "dpo", "beta": 1.0, "seed": 0}], tmp_path / "grid.jsonl")
    assert not (tmp_path / "grid.jsonl").exists()
