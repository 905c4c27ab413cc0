"""One cell: what it needs is trained once and whole, what it finds is what it says."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import numpy as np
import pytest
import torch

from pargs_min.codec import Codec
from pargs_min.decode import Step
from pargs_min.experiments import measure as module
from pargs_min.experiments import recipes
from pargs_min.experiments.measure import CAP, Cell, measure, rlhf_gap
from pargs_min.experiments.recipes import DISTILLED, FULL, PARTIAL, SOFT_LABELS, VALUE, Recipe, make
from pargs_min.experiments.report import with_rlhf
from pargs_min.models import load_config, load_guide, load_language_model, load_tokenizer
from pargs_min.records import read_jsonl
from pargs_min.reward_model import final_rewards
from pargs_min.store import read_json


def vowels(prompts, responses):
    """A judge."""
    return [sum(word in "ae" for word in text.split()) for text in responses]


def test_a_model_is_whole_or_not_there(lab, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("no")

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "save", fail)
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
        Cell(0, "pargs", beta=1.0, recipe=SOFT_LABELS, quality=True),
        Cell(0, "pargs", beta=2.0, recipe=SOFT_LABELS),
        Cell(0, "pargs", beta=1.0, recipe=DISTILLED, quality=True),
        Cell(0, "soft", beta=1.0, recipe=Recipe("soft", beta=1.0), min_ref_prob=0.01),
        Cell(0, "win", beta=1.0, recipe=Recipe("win")),
        Cell(0, "reweighted", beta=1.0, recipe=Recipe("reweighted", beta=1.0)),
        Cell(0, "smc", beta=1.0, particles=2, recipe=PARTIAL, final=FULL),
        Cell(0, "best-of-n", n=2, recipe=FULL),
        Cell(0, recipe=replace(PARTIAL, lengths=(1, 2)), quality=True),
        Cell(0, recipe=new, quality=True),
    ]
    for cell in cells:
        found = measure(lab, cell)
        if cell.method:
            assert len(found["by_prompt"]) == 2
            assert found["reward"] == pytest.approx(np.mean(found["by_prompt"]))
            assert found["calls"] > 0
            assert "off_grammar" not in found  # a measure of the world's own judge
        assert ("flips" in found) == (cell.method not in (None, "plain", "smc", "best-of-n"))
        assert found.get("training", 0) > 0 or not cell.recipe
        by_pairs = cell.recipe is not None and cell.recipe.training.source == "pairs"
        assert ("whole" in found) == (cell.quality or by_pairs)  # what a model has labelled does not count
        if cell.quality:
            assert 0 <= found["concordance"] <= 1
            assert len(found["final"]) == len(found["gold"]) == 8
            assert found["final"][-1] == pytest.approx(1)
    assert abs(measure(lab, Cell(0, "plain"))["kl"]) < 1e-5


def test_how_many_steps_need_the_guide(lab):
    """All where there is a choice, none where there is none; the texts are then the reference's."""
    cell = Cell(0, "pargs", beta=1.0, recipe=PARTIAL, guide_below=1.0)
    every, none = measure(lab, cell), measure(lab, replace(cell, min_ref_prob=1.0))
    assert (every["asked"], none["asked"], none["flips"]) == (1, 0, 0)
    assert none["by_prompt"] == measure(lab, Cell(0, "plain"))["by_prompt"]
    assert none["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(every["kl"]) > 1e-3
    assert "asked" not in measure(lab, replace(cell, guide_below=None))
    assert str(cell) == "pargs beta=1 guide_below=1"


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
    assert rlhf_gap(lab, Cell(0, "win", beta=beta), {"kl": 0, "reward": 0}) is None
    assert rlhf_gap(lab, Cell(0, "pargs-greedy", beta=beta), {"kl": 0, "reward": 0}) is None
    # at a huge beta the estimate of Z would rest on the few best texts
    monkeypatch.setattr(module, "plain_rewards", lambda lab: np.linspace(0, 1, 800)[None])
    assert rlhf_gap(lab, Cell(0, "pargs", beta=50.0), {"kl": 0, "reward": 0}) is None


def test_the_rlhf_policy_of_a_learned_reward_is_judged_by_gold(lab, monkeypatch):
    """Two kinds of texts, gold 0 and 1: a learned reward that is gold gives RLHF itself, its opposite the worst."""
    gold = np.tile([0.0, 1.0], (3, 400))
    monkeypatch.setattr(module, "plain_rewards", lambda lab: gold)
    best = 1 / (1 + math.exp(-2))
    for sign, p in ((1, best), (-1, 1 - best), (0, 0.5)):
        monkeypatch.setattr(module, "learned_rewards", lambda *_, sign=sign: sign * gold)
        found = measure(lab, Cell(0, CAP, beta=2.0, recipe=FULL))
        assert found["reward"] == pytest.approx(p, abs=1e-12)
        assert found["kl"] == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), abs=1e-12)
        assert found["gap"] == pytest.approx((1 - sign) * (2 * best - 1) if sign else found["gap"], abs=1e-12)
        assert found["gap"] > -1e-12
    with pytest.raises(ValueError, match="needs a recipe and a beta"):
        measure(lab, Cell(0, CAP, recipe=FULL))


def test_learned_rewards_are_of_the_texts_that_the_judge_rated(lab):
    model, codec = recipes.guide(lab, FULL, 0), Codec(load_tokenizer(lab.model))
    texts = [text for text, _ in read_jsonl(module.plain_texts(lab))]
    found = module.learned_rewards(lab, FULL, 0)
    assert found.shape == module.plain_rewards(lab).shape == (2, 40)
    assert module.plain_rewards(lab).ravel().tolist() == vowels(None, [text["response"] for text in texts])
    for number in (0, 41, 79):
        ids = torch.tensor([codec.prompt(texts[number]) + texts[number]["response_ids"]])
        assert found.ravel()[number] == pytest.approx(final_rewards(model, ids, torch.ones_like(ids)).item(), abs=1e-5)


def test_an_infinite_kl_is_left_out(lab, monkeypatch):
    """A fine-tuned model writes what a reference that is cut never does."""
    monkeypatch.setattr(
        module, "text_log_probs", lambda lm, codec, texts, size: [-math.inf] + [-9.0] * (len(texts) - 1)
    )
    found = measure(lab, Cell(0, "ppo", beta=2.0))
    assert {"kl", "gap"} & found.keys() == set()
    assert math.isfinite(found["reward"])
    assert with_rlhf(lab, Cell(0, "ppo", beta=2.0), found) == found


def test_each_world_draws_texts_of_its_own(lab, tmp_path):
    """Else what is estimated from them errs alike in all worlds, and no error over worlds tells of it."""
    other = replace(lab, folder=str(tmp_path / "other"), seed=lab.seed + 1)
    for made in (module.plain_texts, recipes.samples):
        here, there = ([text["response_ids"] for text, _ in read_jsonl(made(one))] for one in (lab, other))
        assert len(here) == len(there)
        assert sum(map(operator.eq, here, there)) < len(here) / 10


def test_flips_are_the_steps_of_rows_that_go_on_whose_likeliest_token_changes():
    flips, drawn = module.Flips(), None
    ref = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.4, 0.6]]).log()
    guided = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.3, 0.7]]).log()
    for alive in ([True, False, True], [True, True, True]):
        flips(Step(0, torch.zeros(3, 2), ref, torch.zeros(3, 2), guided, drawn, torch.tensor(alive), ref < 0))
    assert flips.share == 3 / 5


def test_a_model_is_chosen_by_its_loss_on_what_was_held_out(lab, tmp_path, monkeypatch):
    """Of several learning rates, the one with the least; the held-out texts are no others' but whole pairs of texts."""
    seen = []

    def trained(lab, recipe, model, tokenizer, data, held_out, args):
        seen.append((data, held_out, args.learning_rate))
        with torch.no_grad():
            model.score.weight.fill_(args.learning_rate)
        return {"eval_loss": abs(args.learning_rate - 2e-3)}

    how = recipes.TRAINING["value"]._replace(by=trained, rates=(1.0, 2.0, 4.0))
    monkeypatch.setitem(recipes.TRAINING, "value", how)
    folder = make(lab, VALUE, 0)
    assert [rate for *_, rate in seen] == [1e-3, 2e-3, 4e-3]
    assert load_guide(folder).score.weight.mean().item() == pytest.approx(2e-3)
    assert read_json(folder / "training.json") | {"seconds": 0} == {"seconds": 0, "rate": 2.0, "loss": 0.0}
    (data, held_out, _), *_ = seen
    assert len(data) + len(held_out) == len(recipes.rated(lab, 0))
    assert 0 < len(held_out) < len(data) / 8
    assert [text.prompt_ids for text in held_out[::2]] == [text.prompt_ids for text in held_out[1::2]]


def test_the_best_step_by_held_out_loss_is_kept(lab, monkeypatch):
    """Where the learning rate is far too high, an early one."""
    losses = []

    def trained(*arguments):
        metrics = by(*arguments)
        losses.append(metrics["eval_loss"])
        return metrics

    how = recipes.TRAINING["value"]
    by = how.by
    monkeypatch.setitem(recipes.TRAINING, "value", how._replace(by=trained))
    make(replace(lab, learning_rate=0.3, epochs=4.0), VALUE, 0)
    monkeypatch.setitem(recipes.TRAINING, "value", how._replace(by=trained, chosen=False, rates=(1.0, 1.0)))
    make(replace(lab, folder=f"{lab.folder}/last", learning_rate=0.3, epochs=4.0), VALUE, 0)
    assert losses[0] < losses[1] == losses[2]


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
        SOFT_LABELS,
        *(replace(first, start=shape) for shape in (("gpt2", 1, 32), ("gpt2", 2, 32), ("gpt2", 1, 64))),
    ]
    assert len({recipe.folder_name(seed) for recipe in (first, *others) for seed in (0, 1)}) == 22


def test_a_guided_token_is_priced_beside_a_plain_one(lab, monkeypatch):
    """A clock that ticks at every layer: two of the language model, two more of the guide, or one of two that are."""
    layers = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: layers.append(1) if type(module).__name__ == "GPT2Block" else None
    )
    monkeypatch.setattr("pargs_min.benchmark.ways.clock", lambda: float(len(layers)))
    shared = Recipe("reweighted", beta=1.0, shared_layers=1)
    asked = (("pargs", PARTIAL), ("reweighted", replace(shared, shared_layers=None)), ("reweighted", shared))
    priced = {recipe: module.price(lab, Cell(0, method, beta=1.0, recipe=recipe)) for method, recipe in asked}
    hook.remove()
    assert [found["time"] for found in priced.values()] == [2, 2, 1.5]
    headed, whole, upper = (found["memory"] for found in priced.values())
    assert 1 < upper < whole == 2 < headed


def test_shared_layers_stay_those_of_the_reference(lab):
    reference = load_language_model(lab.model).state_dict()
    anyway = replace(lab, folder=f"{lab.folder}/shared", shared_layers=1)  # where the lab says so
    one = Recipe("reweighted", beta=1.0, shared_layers=1)
    for home, recipe in ((lab, one), (lab, replace(DISTILLED, shared_layers=1)), (anyway, FULL)):
        model = load_guide(make(home, recipe, 0))
        assert model.config.pargs["shared_layers"] == 1
        same = {
            name
            for name, weight in model.base_model.state_dict().items()
            if torch.equal(weight, reference[f"transformer.{name}"])
        }
        assert {name.split(".")[1] for name in same if name.startswith("h.")} == {"0"}
        assert {"wte.weight", "wpe.weight"} <= same


def test_a_distilled_guide_is_trained_by_adapters_where_the_lab_says_so(lab, monkeypatch):
    ranks = []
    monkeypatch.setattr(
        recipes, "train_distilled", lambda *_, lora_rank, **__: ranks.append(lora_rank) or {"eval_loss": 0.0}
    )
    for rank in (None, 2):
        make(replace(lab, lora_rank=rank, folder=f"{lab.folder}/{rank}"), DISTILLED, 0)
    assert ranks == [None, 2]
