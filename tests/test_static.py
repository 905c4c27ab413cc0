"""Compiled steps over caches of fixed size: the tokens and rewards of the plain ones."""

import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from pargs_min.cli import main
from pargs_min.decode import ModelPolicy, generate, greedy, row_uniforms, sample
from pargs_min.scoring import SiblingScorer
from pargs_min.static import StaticPolicy, StaticScorer
from tests.strategies import hybrid, left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

EXACT = dict(rtol=0, atol=1e-12, equal_nan=True)
SETTINGS = dict(beta=2.0, top_k=4, max_new_tokens=10, eos=1, pad=0)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def both(lm, rm, prompts, slots=None, backend="eager", **settings):
    """The same prompts by plain and by compiled steppers."""
    width = prompts[0].shape[1]
    policy = StaticPolicy(lm, slots or width + 10, backend=backend)
    scorer = StaticScorer(rm, slots or width + 14, backend=backend)
    settings = SETTINGS | {"uniforms": row_uniforms(0, range(len(prompts[0])), [0] * len(prompts[0]), 10)} | settings
    plain = generate(ModelPolicy(lm), SiblingScorer(rm), *prompts, **settings)
    return plain, generate(policy, scorer, *prompts, **settings), (policy, scorer)


@pytest.mark.parametrize(("lm", "rm"), [("gpt2", "llama"), ("llama", "gpt2"), ("qwen3", "gpt_neox")])
@pytest.mark.parametrize("draw", [sample, greedy])
def test_compiled_steps_give_the_same_tokens_and_rewards(lm, rm, draw):
    plain, static, _ = both(tiny_lm(lm), tiny_reward_model(rm), left_padded(6, 2, 4), draw=draw)
    assert torch.equal(static.tokens, plain.tokens)
    for name in ("rewards", "log_probs", "ref_log_probs"):
        assert_close(getattr(static, name), getattr(plain, name), **EXACT)


def test_also_through_the_compilers_own_autograd_stage():
    plain, static, _ = both(tiny_lm(), tiny_reward_model("llama"), left_padded(5, 3), backend="aot_eager")
    assert torch.equal(static.tokens, plain.tokens)
    assert_close(static.rewards, plain.rewards, **EXACT)


def test_a_prompt_of_one_token_and_slots_to_spare():
    plain, static, _ = both(tiny_lm(), tiny_reward_model("llama"), left_padded(1, 1), slots=40)
    assert torch.equal(static.tokens, plain.tokens)
    assert_close(static.rewards, plain.rewards, **EXACT)


def test_no_step_compiles_anew_nor_does_another_prompt():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    lm, rm = tiny_lm(), tiny_reward_model("llama")
    *_, (policy, scorer) = both(lm, rm, left_padded(6, 2), backend=counting, slots=40)
    assert len(graphs) == 2
    for prompts in (left_padded(6, 2, seed=1), left_padded(9, 4)):
        uniforms = row_uniforms(1, range(2), [0, 0], 10)
        static = generate(policy, scorer, *prompts, uniforms=uniforms, **SETTINGS)
        plain = generate(ModelPolicy(lm), SiblingScorer(rm), *prompts, uniforms=uniforms, **SETTINGS)
        assert torch.equal(static.tokens, plain.tokens)
        assert_close(static.rewards, plain.rewards, **EXACT)
    assert len(graphs) == 2


def test_rows_may_go_on_from_others():
    """After every second step each row goes on from its neighbour."""

    def turn(ref_log_probs, rewards, alive):
        turn.step += 1
        return torch.tensor([1, 2, 0]) if turn.step % 2 else None

    results = []
    prompt = left_padded(4)[0].expand(3, -1)
    lm, rm = tiny_lm(), tiny_reward_model("llama")
    for steppers in (
        (ModelPolicy(lm), SiblingScorer(rm)),
        (StaticPolicy(lm, 20, backend="eager"), StaticScorer(rm, 20, backend="eager")),
    ):
        turn.step = 0
        uniforms = row_uniforms(0, range(3), [0] * 3, 10)
        results.append(generate(*steppers, prompt, resample=turn, uniforms=uniforms, **SETTINGS))
    assert torch.equal(results[0].tokens, results[1].tokens)
    assert_close(results[0].rewards, results[1].rewards, **EXACT)


def test_where_compiling_fails_it_goes_on_and_says_so():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with pytest.warns(UserWarning, match="torch.compile failed .*going on without it") as warned:
        plain, static, _ = both(tiny_lm(), tiny_reward_model(), left_padded(5, 3), backend=broken)
    assert len(warned) == 2  # once for each model
    assert torch.equal(static.tokens, plain.tokens)
    assert_close(static.rewards, plain.rewards, **EXACT)


def test_what_fixed_caches_cannot_hold_is_refused():
    lm = tiny_lm()
    policy = StaticPolicy(lm, 6, backend="eager")
    with pytest.raises(ValueError, match="a prompt of 6 tokens leaves no room in a cache of 6"):
        policy.start(*left_padded(6))
    with pytest.raises(ValueError, match="has attention windows"):
        StaticPolicy(
            tiny_lm("mistral", sliding_window=8, hidden_size=16, num_attention_heads=4, num_key_value_heads=2), 9
        )
    with pytest.raises(ValueError, match="transformers cannot compile"):
        StaticPolicy(tiny_lm("bloom", hidden_size=16, n_layer=1, n_head=2), 9)
    with pytest.raises(ValueError, match="layers without keys; decode without --compile"):
        StaticPolicy(hybrid(tiny_lm), 9, backend="eager").start(*left_padded(3))
    with pytest.raises(ValueError, match="training mode"):
        StaticPolicy(lm.train(), 9, backend="eager").start(*left_padded(3))


def test_generate_writes_the_same_texts_compiled(tmp_path, monkeypatch):
    tiny_lm(vocabulary=14).float().save_pretrained(tmp_path / "lm")
    tiny_reward_model(vocabulary=14).float().save_pretrained(tmp_path / "rm")
    for folder in ("lm", "rm"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    (tmp_path / "prompts.txt").write_text("a b c\nd\n")
    passes, texts = [], []
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=lambda graph, _: passes.append(1) or graph))
    for file, more in (("plain", []), ("compiled", ["--compile"])):
        models = ["--model", str(tmp_path / "lm"), "--reward-model", str(tmp_path / "rm"), "--max-new-tokens", "8"]
        files = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / file), "--batch-size", "1"]
        assert main(["generate", *models, *files, *more]) == 0
        records = [json.loads(line) for line in (tmp_path / file).open()]
        texts.append([(record["response_ids"], record["cost"]["model_calls"]) for record in records])
        assert len(passes) == (2 if more else 0)
    assert texts[0] == texts[1]
