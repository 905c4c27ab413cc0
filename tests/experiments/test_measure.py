"""One cell: what it needs is trained once and whole, what it finds is what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pargs_min.experiments import measure as module
from pargs_min.experiments.measure import FULL, PARTIAL, VALUE, Cell, Recipe, make, measure, rlhf_gap
from pargs_min.models import load_config

pytestmark = pytest.mark.trains


def vowels(prompts, responses):
    """A judge."""
    return [sum(word in "ae" for word in text.split()) for text in responses]


def test_a_model_is_whole_or_not_there(lab, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("no")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_reward_model", fail)
        with pytest.raises(FloatingPointError):
            make(lab, PARTIAL, 0)
    assert not (tmp_path / "models" / "partial-seed=0").exists()
    folder = make(lab, PARTIAL, 0)
    assert (folder / "model.safetensors").exists()
    assert make(lab, PARTIAL, 0) == folder


def test_every_kind_of_cell_is_measured(lab):
    new = replace(PARTIAL, start=("gpt2", 1, 16), pairs=9)
    cells = [
        Cell(0, "plain"),
        Cell(0, "pargs", beta=1.0, top_k=3, recipe=PARTIAL, quality=True),
        Cell(0, "args-greedy", beta=1.0, recipe=FULL),
        Cell(0, "cd", beta=1.0, recipe=VALUE),
        Cell(0, "smc", beta=1.0, particles=2, recipe=PARTIAL, final=FULL),
        Cell(0, "best-of-n", n=2, recipe=FULL),
        Cell(0, recipe=replace(PARTIAL, head="vocab", lengths=(1, 2)), quality=True),
        Cell(0, recipe=new, quality=True),
    ]
    for cell in cells:
        found = measure(lab, cell)
        if cell.method:
            assert len(found["by_prompt"]) == 2
            assert found["reward"] == pytest.approx(np.mean(found["by_prompt"]))
            assert found["calls"] > 0
            assert "off_grammar" not in found  # a measure of the world's own judge
        if cell.quality:
            assert 0 <= found["concordance"] <= 1
            assert len(found["final"]) == len(found["gold"]) == 8
            assert found["final"][-1] == pytest.approx(1)
    assert abs(measure(lab, Cell(0, "plain"))["kl"]) < 1e-5


def test_the_kl_of_a_fine_tuned_model_is_to_the_reference(lab, monkeypatch):
    """Where nothing is learned it is zero; else the mean of log pi(y) - log pi_ref(y)."""
    made = module.write(replace(lab, ppo_learning_rate=1e-12, samples=8), Cell(0, "ppo", beta=1.0))
    assert all(text["kl"] == pytest.approx(0, abs=1e-4) for text in made)
    tuned = module.write(replace(lab, folder=f"{lab.folder}/other", ppo_learning_rate=1e-2), Cell(0, "ppo", beta=1.0))
    assert max(abs(text["kl"]) for text in tuned) > 1e-3


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_gap_to_the_rlhf_policy_is_a_divergence(lab, monkeypatch, beta):
    """Two texts, rewards 0 and 1, equally likely: zero for the RLHF policy itself, KL(p || p*) for any other p."""
    monkeypatch.setattr(module, "plain_rewards", lambda lab: np.tile([0.0, 1.0], (3, 400)))
    best = 1 / (1 + math.exp(-beta))
    for p in (best, 0.5, 0.9):
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        expected = p * math.log(p / best) + (1 - p) * math.log((1 - p) / (1 - best))
        found = rlhf_gap(lab, Cell(0, "pargs", beta=beta), {"kl": kl, "reward": p})
        assert found == pytest.approx(expected, abs=1e-12)
    assert rlhf_gap(lab, Cell(0, "plain"), {"kl": 0, "reward": 0}) is None
    assert rlhf_gap(lab, Cell(0, "pargs-greedy", beta=beta), {"kl": 0, "reward": 0}) is None
    # at a huge beta the estimate of Z would rest on the few best texts
    monkeypatch.setattr(module, "plain_rewards", lambda lab: np.linspace(0, 1, 800)[None])
    assert rlhf_gap(lab, Cell(0, "pargs", beta=50.0), {"kl": 0, "reward": 0}) is None


def test_models_know_only_what_a_seed_tells_them(lab, tmp_path):
    """The same recipe and seed give the same weights, in another folder, too."""
    elsewhere = replace(lab, folder=str(tmp_path / "elsewhere"))
    folders = make(lab, PARTIAL, 0), make(elsewhere, PARTIAL, 0), make(lab, PARTIAL, 1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("start", [("gpt2", 1, 32), ("llama", 2, 64)])
def test_a_new_model_has_the_shape_that_its_recipe_says(lab, start):
    config = load_config(make(lab, Recipe("full", start=start), 0))
    *_, width = start
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == start
    assert config.num_attention_heads == width // 16
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (14, 0, 1)


def test_folders_of_models_are_told_apart_by_all_of_a_recipe():
    first = Recipe("partial")
    others = [
        replace(first, objective="full"),
        replace(first, pairs=9),
        replace(first, head="vocab"),
        replace(first, lengths=(1, 8)),
        replace(first, lengths=(1, None)),
        replace(first, beta=0.5),
        *(replace(first, start=shape) for shape in (("gpt2", 1, 32), ("gpt2", 2, 32), ("gpt2", 1, 64))),
    ]
    assert len({recipe.folder_name(seed) for recipe in (first, *others) for seed in (0, 1)}) == 20
