"""The benchmark measures what it says: no test here depends on how long anything takes."""

import json

import pytest
import torch
from torch.testing import assert_close

from pargs_min import minimal
from pargs_min.benchmark import report, ways
from pargs_min.benchmark.targets import Target, check, targets
from pargs_min.benchmark.ways import (
    CopiedScorer,
    Models,
    Setting,
    cache_bytes,
    ideal_speed_up,
    interleaved,
    passes_per_token,
    peak_bytes,
    training_ways,
    weight_bytes,
    with_vocabulary_head,
)
from pargs_min.cli import main
from pargs_min.decode import ModelPolicy, generate, greedy, row_uniforms, sample
from pargs_min.reward_model import has_vocabulary_head
from pargs_min.scoring import SiblingScorer
from pargs_min.trunk import layers_of
from tests.strategies import left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def models():
    scalar = tiny_reward_model("llama").float()
    return Models(tiny_lm("gpt2").float(), scalar, with_vocabulary_head(scalar))


@torch.no_grad()
@pytest.mark.parametrize("draw", [sample, greedy])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_copies_of_the_cache_write_the_same_tokens_as_ours(family, draw):
    lm, rm = tiny_lm("gpt2"), tiny_reward_model(family)
    settings = dict(beta=2.0, top_k=4, truncate=True, max_new_tokens=10, eos=1, pad=0, draw=draw)
    settings["uniforms"] = row_uniforms(0, range(3), [0] * 3, 10)
    prompts = left_padded(6, 2, 4)
    ours = generate(ModelPolicy(lm), SiblingScorer(rm), *prompts, **settings)
    copies = generate(ModelPolicy(lm), CopiedScorer(rm, 4), *prompts, **settings)
    assert torch.equal(copies.tokens, ours.tokens)
    assert_close(copies.rewards, ours.rewards, rtol=0, atol=1e-12)


def test_each_way_makes_the_passes_it_is_named_for(models):
    setting = Setting(top_k=4, batch_size=2, prompt_length=6, tokens=3)
    counts = {name: passes_per_token(way, models) for name, way in ways.all_ways(models, setting).items()}
    plain = {"lm passes": 1, "lm tokens": 2, "reward passes": 0, "reward tokens": 0}
    fused = {"lm passes": 1, "lm tokens": 2, "reward passes": 1, "reward tokens": 2 * (4 + 1)}
    one_query = fused | {"reward tokens": 2}
    assert counts == {
        "plain generation": plain,
        "floor": fused,
        "our loop": fused,
        "our loop, no step guided": plain,
        "RewardGuidance": fused,
        "vocabulary floor": one_query,
        "vocabulary head": one_query,
        "reweighted": one_query,
        "reweighted, shared trunk": one_query,
        "k copies of the cache": fused | {"reward tokens": 2 * 4},
        "k passes, no cache": {  # one text after the other
            "lm passes": 2,
            "lm tokens": 2 * 6,
            "reward passes": 2 * 4,
            "reward tokens": 2 * 4 * 7,
        },
    }


def test_compiled_ways_compile_once_whatever_runs_beside_them(models):
    """A hook that is on a model when it is compiled would make every step compile anew, and fail at the eighth."""
    torch.compiler.reset()
    graphs, setting = [], Setting(top_k=4, prompt_length=6, tokens=4)
    ids = torch.zeros(1, 6, dtype=torch.long)
    compiled = ways.compiled_ways(models, ids, 4, 4, backend=lambda graph, inputs: graphs.append(graph) or graph)
    ours = compiled[ways.COMPILED[1]]
    others = ways.all_ways(models, setting)
    for _ in range(3):
        for way in (*others.values(), ours):
            way(lambda: None)
    assert len(graphs) == 2  # a step of each model


def test_passes_of_compiled_ways_are_not_counted(models, monkeypatch):
    all_ways = ways.all_ways
    monkeypatch.setattr(
        ways,
        "all_ways",
        lambda models, setting: (
            all_ways(models, setting, "plain generation", "floor")
            | ways.compiled_ways(models, torch.zeros(1, 6, dtype=torch.long), 4, 2, backend="eager")
        ),
    )
    found = report.run(models, rounds=2, quick=True, top_k=4, prompt_length=6, tokens=2)
    assert [row["way"] for row in found["ways"] if "lm passes" not in row] == list(ways.COMPILED)
    lines = {line.split("|")[1].strip(): line.split("|") for line in report.markdown(found).splitlines() if "|" in line}
    assert [cell.strip() for cell in lines["our loop, compiled"][5:8]] == ["", "", ""]
    assert lines["floor"][5].strip() == "1"


def test_the_way_without_a_cache_is_the_method_on_one_page(models, monkeypatch):
    """Each prompt by itself, from its first token; never ended by a token, since a token is what is timed."""
    read = []
    monkeypatch.setattr(minimal, "generate", lambda *args, **settings: read.append((args, settings)))
    setting, ticks = Setting(top_k=4, batch_size=2, prompt_length=6), []
    ways.all_ways(models, setting)["k passes, no cache"](lambda: ticks.append(None))
    assert len(ticks) == 2
    assert [(lm is models.lm, rm is models.scalar, len(prompt)) for (lm, rm, prompt), _ in read] == [
        (True, True, 6)
    ] * 2
    assert read[0][1] == dict(end=-1, beta=1.0, k=4, max_new_tokens=1)


def test_two_heads_share_one_backbone(models):
    assert models.vocabulary.base_model is models.scalar.base_model
    assert models.vocabulary.config is not models.scalar.config
    assert has_vocabulary_head(models.vocabulary)
    assert weight_bytes(models.scalar, models.vocabulary) == weight_bytes(models.scalar) + 11 * 16 * 4


def test_a_guide_on_the_trunk_has_its_upper_layers_alone(models):
    upper, weight = models.lm.transformer.h[1], models.lm.transformer.h[1].mlp.c_fc.weight
    assert len(layers_of(models.trunk.model)) == 1
    assert not any(weight.data_ptr() == own.data_ptr() for own in models.trunk.model.parameters())
    parts = [*upper.parameters(), *models.lm.transformer.ln_f.parameters()]
    own = weight_bytes(models.lm, models.trunk.model) - weight_bytes(models.lm)
    assert own == sum(weight.nbytes for weight in parts) + sum(b.nbytes for b in models.trunk.model.buffers())
    assert weight_bytes(models.lm, models.guide) == 2 * weight_bytes(models.lm)


def test_ways_take_turns_token_by_token_and_all_are_timed(monkeypatch):
    """On a clock that advances by what each way says: a token of "slow" takes 3, its first takes 100."""
    now, order = [0.0], []
    monkeypatch.setattr(ways, "clock", lambda: now[0])

    def way(name, prompt, token):
        def run(tick):
            for number in range(2):
                now[0] += token if number else prompt
                order.append(name)
                tick()

        return run

    seconds = interleaved({"fast": way("fast", 50, 1), "slow": way("slow", 100, 3)}, range(2), CPU)
    assert seconds == {"fast": [1, 1], "slow": [3, 3]}
    assert order == ["fast", "slow"] * 6


def test_a_way_that_breaks_stops_the_measurement():
    def broken(tick):
        tick()
        raise ValueError("out of tokens")

    with pytest.raises(ValueError, match="out of tokens"):
        interleaved({"broken": broken, "whole": lambda tick: [tick(), tick()]}, range(1), CPU)


def test_memory_is_counted_to_the_byte_and_only_after_the_prompt():
    def way(tick):
        prompt = torch.zeros(5000)
        del prompt
        kept = torch.zeros(250)
        tick()
        for _ in range(3):
            kept = torch.cat([kept, torch.zeros(250)])
            tick()

    assert peak_bytes(way, CPU) == 4 * (750 + 250 + 1000)


def test_a_cache_is_as_large_as_the_one_that_is_used(models):
    cache = models.lm(input_ids=torch.zeros(2, 9, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(models.lm, 2, 9) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_training_reads_every_prefix_once_or_all_in_one_pass(models):
    """Eight of eight prefixes: the rows read P + i tokens for each side, the one pass P + n; a tick after each."""
    read, ticks = [], []
    models.scalar.base_model.register_forward_hook(lambda _, __, output: read.append(output[0].shape[:2].numel()))
    steps = training_ways(models.scalar, prompt=5, response=8, rows=8)
    steps["one pass"](lambda: ticks.append(len(read)))
    steps["a row per prefix"](lambda: ticks.append(len(read)))
    assert read == [2 * 13, *(5 + i for i in range(1, 9) for _ in range(2))]
    assert ticks == [0, 1, 1, *range(3, 18, 2)]
    assert sum(read[1:]) / read[0] == pytest.approx(ideal_speed_up(5, 8))


def test_both_ways_of_training_have_the_same_gradient(monkeypatch):
    """Eight of eight prefixes: the mean of the gradients of all rows is that of the one pass."""
    model, kept = tiny_reward_model("gpt2", pad_token_id=None), []
    monkeypatch.setattr(
        model,
        "zero_grad",
        lambda: kept.append([(p.grad.clone(), setattr(p, "grad", None))[0] for p in model.parameters()]),
    )
    steps = training_ways(model, prompt=5, response=8, rows=8)
    steps["one pass"](lambda: None)
    steps["a row per prefix"](lambda: None)
    one_pass, *rows = kept
    assert len(rows) == 8
    for ours, *theirs in zip(one_pass, *rows, strict=True):
        assert_close(ours, torch.stack(theirs).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("bound", "values", "quartiles", "mark"),
    [
        (dict(at_most=2), [1, 1, 1, 1, 1, 1, 9], (1, 1), "ok  "),  # one bad round of seven
        (dict(at_most=2), [1, 1, 1, 1, 1, 9, 9], (1, 9), "FAIL"),
        (dict(at_least=2), [5, 5, 5, 5, 5, 5, 0], (5, 5), "ok  "),
        (dict(at_least=2), [5, 5, 5, 5, 5, 0, 0], (0, 5), "FAIL"),
        (dict(at_most=2), [2], (2, 2), "ok  "),
        (dict(at_most=2), [2.1], (2.1, 2.1), "FAIL"),
        (dict(at_most=2), [float("nan")], None, "FAIL"),
        (dict(at_most=0), [1], (1, 1), "FAIL"),
        ({}, [5, 5, 5, 5, 5, 0, 0], (0, 5), "    "),  # a report
    ],
)
def test_a_target_holds_if_three_quarters_of_the_rounds_reach_it(bound, values, quartiles, mark):
    target = Target("a ratio", values, **bound)
    assert quartiles is None or target.quartiles == [*quartiles]
    assert target.holds == (mark != "FAIL")
    assert str(target).startswith(mark + " a ratio")


def test_the_check_fails_with_its_targets(monkeypatch, capsys):
    results = [Target("one", [0.5], at_most=1), Target("two", [0.5], at_least=1), Target("three", [0.5])]
    monkeypatch.setattr("pargs_min.benchmark.targets.targets", lambda rounds: iter(results))
    assert not check()
    assert "1 missed" in capsys.readouterr().out
    assert main(["benchmark", "--check"]) == 1
    del results[1]
    assert main(["benchmark", "--check"]) == 0


@pytest.fixture
def small_shapes(monkeypatch):
    shape = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    for name in ("tiny", "gpt2"):
        monkeypatch.setitem(ways.SHAPES, name, ("gpt2", shape))


def test_what_depends_on_the_hardware_is_reported_without_a_bound(small_shapes, monkeypatch):
    """Where a token takes a second whoever writes it, all targets hold; the published loops have no bound."""
    monkeypatch.setattr(
        ways, "interleaved", lambda found, rounds, device: {name: [1.0 for _ in rounds] for name in found}
    )
    found = {target.name: target for target in targets(rounds=2)}
    assert len(found) == 23
    assert all(target.holds or "memory" in name for name, target in found.items())  # small models have small caches
    reported = [name for name, target in found.items() if target.at_most is None and target.at_least is None]
    assert reported == [
        name
        for name in found
        if name.startswith("4 layers, 3 shared, P=128") or "k passes" in name or "k copies of the cache / " in name
    ]
    assert len(reported) == 5
    counted = {name: target.values for name, target in found.items() if "per token" in name}
    assert list(counted.values()) == [[2], [12], [1], [2]]


def test_the_report_of_given_models(tmp_path, capsys):
    tiny_lm(vocabulary=14).float().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    options = ["--model", str(tmp_path / "lm"), "--output-dir", str(tmp_path / "out"), "--prompt-length", "8"]
    options += ["--top-k", "3", "--tokens", "2", "--rounds", "2"]
    assert main(["benchmark", *options, "--quick"]) == 0
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["way"] for row in report["ways"]][:3] == ["plain generation", "floor", "our loop"]
    assert all(row["ms"] > 0 and row["peak_mb"] > 0 for row in report["ways"])
    assert report["setting"] == dict(top_k=3, batch_size=1, prompt_length=8, tokens=2, rounds=2)
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000
    assert "| our loop  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-k", "9000"], "top_k must lie between 1 and the vocabulary size 8000, got 9000"),
        (["--tokens", "1"], "tokens and rounds must be at least 2"),
        (["--prompt-length", "1024"], "exceed the models' context of 1024"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, more, message):
    assert main(["benchmark", "--output-dir", str(tmp_path), *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pargs: error: ")
    assert message in err
