"""The benchmark measures what it says: no test here depends on how long anything takes."""

import json

import pytest
import torch
from torch.testing import assert_close

from pargs_min.benchmark import ways as cost
from pargs_min.benchmark.published import CopiedScorer, SeparateScorer, UncachedPolicy
from pargs_min.benchmark.targets import Target, check, fast_equals_slow
from pargs_min.benchmark.ways import (
    Models,
    cache_bytes,
    ideal_speed_up,
    interleaved,
    passes_per_token,
    peak_bytes,
    training_ways,
    ways,
    weight_bytes,
    with_vocabulary_head,
)
from pargs_min.cli import main
from pargs_min.decode import ModelPolicy, generate, greedy, row_uniforms, sample
from pargs_min.reward_model import has_vocabulary_head
from pargs_min.scoring import SiblingScorer
from tests.strategies import left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def models():
    scalar = tiny_reward_model("llama").float()
    return Models(tiny_lm("gpt2").float(), scalar, with_vocabulary_head(scalar))


@torch.no_grad()
@pytest.mark.parametrize("draw", [sample, greedy])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_published_loops_write_the_same_tokens_as_ours(family, draw):
    lm, rm = tiny_lm("gpt2"), tiny_reward_model(family)
    settings = dict(beta=2.0, top_k=4, max_new_tokens=10, eos=1, pad=0, draw=draw)
    settings["uniforms"] = row_uniforms(0, range(3), [0] * 3, 10)
    prompts = left_padded(6, 2, 4)
    ours = generate(ModelPolicy(lm), SiblingScorer(rm), *prompts, **settings)
    paper = generate(UncachedPolicy(lm), SeparateScorer(rm), *prompts, **settings)
    copies = generate(ModelPolicy(lm), CopiedScorer(rm, 4), *prompts, **settings)
    for theirs in (paper, copies):
        assert torch.equal(theirs.tokens, ours.tokens)
        assert_close(theirs.rewards, ours.rewards, rtol=0, atol=1e-12)


def test_each_way_makes_the_passes_it_is_named_for(models):
    ids, k = torch.randint(2, 11, (2, 6)), 4
    counts = {name: passes_per_token(way, models) for name, way in ways(models, ids, k, 3).items()}
    fused = {"lm passes": 1, "lm tokens": 2, "reward passes": 1, "reward tokens": 2 * (k + 1)}
    one_call = fused | {"reward tokens": 2}
    assert counts == {
        "plain generation": {"lm passes": 1, "lm tokens": 2, "reward passes": 0, "reward tokens": 0},
        "floor": fused,
        "our loop": fused,
        "RewardGuidance": fused,
        "one-call floor": one_call,
        "one-call head": one_call,
        "k copies of the cache": fused | {"reward tokens": 2 * k},
        "k passes, no cache": {"lm passes": 1, "lm tokens": 2 * 6, "reward passes": k, "reward tokens": 2 * k * 7},
    }


def test_two_heads_share_one_backbone(models):
    assert models.vocabulary.base_model is models.scalar.base_model
    assert has_vocabulary_head(models.vocabulary)
    assert weight_bytes(models.scalar, models.vocabulary) == weight_bytes(models.scalar) + 11 * 16 * 4


def test_ways_take_turns_token_by_token_and_all_are_timed(monkeypatch):
    """On a clock that advances by what each way says: a token of "slow" takes 3, its first takes 100."""
    now, order = [0.0], []
    monkeypatch.setattr(cost, "clock", lambda: now[0])

    def way(name, prompt, token):
        def run(tick):
            for number in range(2):
                now[0] += token if number else prompt
                order.append(name)
                tick()

        return run

    seconds = interleaved({"fast": way("fast", 50, 1), "slow": way("slow", 100, 3)}, 2, CPU)
    assert seconds == {"fast": [1, 1], "slow": [3, 3]}
    assert order == ["fast", "slow"] * 6


def test_a_way_that_breaks_stops_the_measurement():
    def broken(tick):
        tick()
        raise ValueError("out of tokens")

    with pytest.raises(ValueError, match="out of tokens"):
        interleaved({"broken": broken, "whole": lambda tick: [tick(), tick()]}, 1, CPU)


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
    """Eight of eight prefixes: the rows read 2 * (P + i) tokens each, the one pass 2 * (P + n)."""
    read = []
    models.scalar.base_model.register_forward_hook(lambda _, __, output: read.append(output[0].shape[:2].numel()))
    steps = training_ways(models.scalar, prompt=5, response=8, rows=8)
    steps["one pass"]()
    steps["a row per prefix"]()
    assert read == [2 * 13, *(2 * (5 + i) for i in range(1, 9))]
    assert sum(read[1:]) / read[0] == pytest.approx(ideal_speed_up(5, 8))


@pytest.mark.parametrize(
    ("at_most", "values", "quartile", "holds"),
    [
        (True, [1, 1, 1, 1, 1, 1, 9], 1, True),  # one bad round of seven
        (True, [1, 1, 1, 1, 1, 9, 9], 9, False),
        (False, [5, 5, 5, 5, 5, 5, 0], 5, True),
        (False, [5, 5, 5, 5, 5, 0, 0], 0, False),
        (True, [2], 2, True),
        (True, [2.1], 2.1, False),
    ],
)
def test_a_target_holds_if_three_quarters_of_the_rounds_reach_it(at_most, values, quartile, holds):
    target = Target("a ratio", at_most, 2, values)
    assert (target.quartile, target.holds) == (quartile, holds)
    assert str(target).startswith("ok  " if holds else "FAIL")


def test_the_check_fails_with_its_targets(monkeypatch, capsys):
    results = [Target("one", True, 1, [0.5]), Target("two", False, 1, [0.5])]
    monkeypatch.setattr("pargs_min.benchmark.targets.targets", lambda rounds: iter(results))
    assert not check()
    assert "1 missed" in capsys.readouterr().out
    assert main(["benchmark", "--check"]) == 1
    del results[1]
    assert main(["benchmark", "--check"]) == 0


def test_fast_equals_slow_is_measured_and_holds():
    found = list(fast_equals_slow())
    assert len(found) == 4
    assert all(target.holds for target in found)
    assert all(target.values[0] > 0 for target in found)  # two computations, not one compared with itself


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
    assert "| our loop |" in capsys.readouterr().out


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
