"""The engine writes what `generate_texts` writes, whatever runs beside it and whenever it comes."""

import threading
import time

import pytest
import torch

from pargs_min.codec import Codec
from pargs_min.decode import ModelPolicy
from pargs_min.methods import METHODS
from pargs_min.serving.engine import JOIN_EVERY, Busy, Closing, Engine, Text
from pargs_min.texts import Tokens, choose_scorer, generate_texts, language_model_scorer
from pargs_min.trunk import share_trunk
from tests.strategies import tiny_lm, tiny_reward_model
from tests.test_texts import TOKENIZER, language_model_guide

PROMPTS = ["a b c", "d", "e f"]
LM = tiny_lm("gpt2")
CODEC = Codec.of(LM, TOKENIZER, "text")


def reward_model(objective="partial"):
    model = tiny_reward_model("llama")
    model.config.pargs = {"objective": objective, "append_eos": True, "prompt_format": "text"}
    return model


def engine(scorer=None, policy=None, **settings):
    policy = policy or ModelPolicy(LM, CODEC.vocabulary)
    return Engine(policy, scorer or choose_scorer(reward_model(), 64, CODEC.ends), CODEC.ends, **settings)


def text(prompt=0, sample=0, method="pargs", seed=5, **how):
    """A text that is asked for; what it tells becomes the list `text.heard`."""
    heard: list = []
    how = dict(max_new_tokens=12, top_k=4 if METHODS[method].guided else None, beta=2.0) | how
    prompt_ids = CODEC.prompt({"prompt": PROMPTS[prompt]})
    one = Text(prompt_ids, METHODS[method], Tokens(**how), (seed, prompt, sample), heard.append)
    one.heard = heard
    return one


def finish(one):
    while one.running or one.waiting:
        one.turn()


def alone(one, guide=None):
    """What `generate_texts` writes in its place."""
    seed, prompt, sample = one.numbers
    asked = dict(prompts=[{"prompt": text} for text in PROMPTS], method=one.method.name, seed=seed)
    asked |= dict(reward_model=guide or reward_model(), num_samples=sample + 1)
    texts = generate_texts(LM, TOKENIZER, **asked, **vars(one.how))
    return next(found for found in texts if (found["prompt_number"], found["sample"]) == (prompt, sample))


MIXED = [
    dict(prompt=0, sample=2),
    dict(prompt=1, method="plain"),
    dict(prompt=2, beta=-1.0, top_k=2, seed=6),
    dict(prompt=0, method="pargs-greedy", max_new_tokens=4),
    dict(prompt=1, top_k=0, ref_temperature=0.5, ref_top_p=0.9),
    dict(prompt=2, top_k=7, min_ref_prob=0.1, temperature=0.7),
    dict(prompt=0, truncate=True),
    dict(prompt=1, method="plain", ref_top_p=0.5, sample=1),
]


@pytest.mark.parametrize("late", [0, 1, JOIN_EVERY + 1, 20])
def test_texts_with_settings_of_their_own_are_those_of_the_command_whenever_they_join(late):
    texts = [text(**settings) for settings in MIXED]
    one = engine()
    one.submit(texts[::2])
    for _ in range(late):
        one.turn()
    one.submit(texts[1::2])
    finish(one)
    for each in texts:
        assert each.ids == alone(each)["response_ids"], each.method.name
        assert each.heard[-1] is None
        assert len(each.heard) == len(each.ids) + 1


def test_what_a_step_says_is_what_the_loop_reports():
    """Of tokens, candidates and rewards of each text, among others with more and with fewer candidates."""
    texts = [text(**settings) for settings in MIXED]
    one = engine()
    one.submit(texts)
    finish(one)
    for each in texts:
        steps = []
        seed, prompt, _ = each.numbers
        settings = dict(method=each.method.name, reward_model=reward_model(), seed=seed, on_step=steps.append)
        settings |= dict(prompts=[{"prompt": text} for text in PROMPTS], num_samples=each.numbers[2] + 1, batch_size=99)
        [*generate_texts(LM, TOKENIZER, **settings, **vars(each.how))]
        number = prompt * settings["num_samples"] + each.numbers[2]
        for (ours, row), theirs in zip(each.heard[:-1], steps, strict=False):
            k = (each.how.top_k or CODEC.vocabulary) if each.method.guided else 0
            for name in ("ref_log_probs", "log_probs", "rewards"):
                one, other = (
                    torch.nan_to_num(getattr(of.drawn, name)[at]) for of, at in ((ours, row), (theirs, number))
                )
                if each.method.guided or name != "rewards":
                    torch.testing.assert_close(one, other)
            order = ours.candidates[row, :k].argsort(), theirs.candidates[number, :k].argsort()
            for name in ("candidates", "rewards", "eligible"):
                one, other = (
                    getattr(of, name)[at, :k][by] for of, at, by in ((ours, row, order[0]), (theirs, number, order[1]))
                )
                torch.testing.assert_close(one, other, equal_nan=True)
            assert not ours.eligible[row, k:].any()


@pytest.mark.parametrize("objective", ["win", "reweighted", "autoregressive", "full"])
def test_every_kind_of_guide(objective):
    kinds = {"win": "win", "reweighted": "reweighted", "autoregressive": "genarm", "full": "args"}
    if objective in ("win", "full"):
        guide = reward_model(objective)
        scorer = choose_scorer(guide, 64, CODEC.ends)
    else:
        guide = language_model_guide(objective, beta=1.5)
        scorer = language_model_scorer(LM, guide, CODEC.vocabulary)
    texts = [text(prompt, method=kinds[objective], beta=beta) for prompt, beta in enumerate((0.5, 1.5, 3.0))]
    one = engine(scorer)
    one.submit(texts)
    finish(one)
    assert [each.ids for each in texts] == [alone(each, guide)["response_ids"] for each in texts]


def test_a_guide_that_shares_layers_runs_beside_plain_texts():
    lm, guide = tiny_lm("llama"), tiny_lm("llama", seed=3)
    for name in ("model.embed_tokens.weight", *(n for n, _ in lm.named_parameters() if "layers.0." in n)):
        guide.get_parameter(name).data = lm.get_parameter(name).data.clone()
    guide.config.pargs = {"objective": "reweighted", "beta": 1.5, "prompt_format": "text", "shared_layers": 1}
    assert share_trunk(lm, guide) == 1
    scorer = language_model_scorer(lm, guide, CODEC.vocabulary)
    assert type(scorer).__name__ == "TrunkScorer"
    texts = [text(prompt, method="reweighted" if prompt else "plain") for prompt in (0, 1, 2)]
    one = Engine(ModelPolicy(lm, CODEC.vocabulary), scorer, CODEC.ends)
    for each in texts:
        one.submit([each])
        for _ in range(JOIN_EVERY + 1):
            one.turn()
    finish(one)
    asked = dict(
        prompts=[{"prompt": text} for text in PROMPTS], reward_model=guide, max_new_tokens=12, beta=2.0, seed=5
    )
    plain, guided = (
        [found["response_ids"] for found in generate_texts(lm, TOKENIZER, method=method, top_k=k, **asked)]
        for method, k in (("plain", None), ("reweighted", 4))
    )
    assert [each.ids for each in texts] == [plain[0], *guided[1:]]


class Counted:
    """A stepper that counts how many rows it was asked about, and may fail."""

    def __init__(self, stepper, fails=lambda rows: None):
        self.stepper, self.rows, self.fails = stepper, [], fails
        self.start, self.push, self.select = stepper.start, stepper.push, stepper.select

    def log_probs(self):
        found = self.stepper.log_probs()
        self.rows.append(len(found))
        self.fails(len(found))
        return found

    def score(self, *asked):
        self.rows.append(len(asked[0]))
        return self.stepper.score(*asked)


def test_plain_texts_ask_no_guide_and_texts_that_end_or_are_not_wanted_make_room():
    scorer, policy = Counted(choose_scorer(reward_model(), 64, CODEC.ends)), Counted(ModelPolicy(LM, CODEC.vocabulary))
    one = engine(scorer, policy)
    texts = [text(method="plain", max_new_tokens=limit, sample=limit) for limit in (1, 3, 12)]
    one.submit(texts)
    one.turn()
    one.turn()
    texts[2].wanted = False
    finish(one)
    assert scorer.rows == []
    assert policy.rows[0] == 3
    assert sum(policy.rows) <= 3 + 2 + 2
    assert texts[2].heard[-1] is not None


def test_a_guide_is_asked_no_more_once_the_guided_texts_have_ended():
    scorer = Counted(choose_scorer(reward_model(), 64, CODEC.ends))
    one = engine(scorer)
    texts = [text(max_new_tokens=3), text(method="plain", sample=12)]
    one.submit(texts)
    finish(one)
    assert len(texts[1].ids) > 3 >= len(texts[0].ids) == len(scorer.rows)
    assert [each.ids for each in texts] == [alone(each)["response_ids"] for each in texts]


def test_texts_beyond_the_rows_wait_their_turn_and_beyond_the_room_are_refused():
    policy = Counted(ModelPolicy(LM, CODEC.vocabulary))
    one = engine(policy=policy, rows=2, room=5)
    texts = [text(sample=sample) for sample in range(7)]
    one.submit(texts[:5])
    with pytest.raises(Busy):
        one.submit(texts[5:6])
    one.turn()
    one.submit(texts[5:7])
    finish(one)
    assert max(policy.rows) == 2
    assert [each.ids for each in texts] == [alone(each)["response_ids"] for each in texts]


def test_out_of_memory_halves_what_runs_and_loses_nothing():
    def fails(rows):
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy = Counted(ModelPolicy(LM, CODEC.vocabulary), fails)
    one = engine(policy=policy, rows=8)
    texts = [text(sample=sample) for sample in range(7)]
    one.submit(texts)
    one.thread.start()
    deadline = time.monotonic() + 30
    while not all(each.heard and each.heard[-1] is None for each in texts):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [each.ids for each in texts] == [alone(each)["response_ids"] for each in texts]
    assert one.rows == 1
    one.close()
    one.thread.join(10)


def test_memory_that_runs_out_as_a_text_leaves_concerns_the_others_alone():
    policy, selected = Counted(ModelPolicy(LM, CODEC.vocabulary)), []

    def select(rows):
        selected.append(len(rows))
        if len(selected) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        policy.stepper.select(rows)

    policy.select = select
    one, texts = engine(policy=policy), [text(max_new_tokens=3), text(sample=1), text(sample=2)]
    one.submit(texts)
    one.thread.start()
    deadline = time.monotonic() + 30
    while not all(each.heard and each.heard[-1] is None for each in texts):
        assert time.monotonic() < deadline, [each.heard[-1:] for each in texts]
        time.sleep(0.01)
    one.close()
    one.thread.join(10)
    assert selected[0] == 2
    assert [each.ids for each in texts] == [alone(each)["response_ids"] for each in texts]
    assert [each.heard.count(None) for each in texts] == [1, 1, 1]


def test_one_text_too_large_and_errors_that_nobody_foresaw_reach_who_asked_and_the_next_one_is_served():
    wrong = [torch.OutOfMemoryError("CUDA out of memory"), KeyError("what")]

    def fails(rows):
        if wrong:
            raise wrong[0]

    one = engine(policy=Counted(ModelPolicy(LM, CODEC.vocabulary), fails))
    one.thread.start()
    for error in [*wrong]:
        first = text()
        one.submit([first])
        while not first.heard:
            time.sleep(0.01)
        assert first.heard == [error]
        wrong.pop(0)
    last = text()
    one.submit([last])
    while not (last.heard and last.heard[-1] is None):
        time.sleep(0.01)
    assert last.ids == alone(last)["response_ids"]
    one.close()
    one.thread.join(10)


def test_a_reward_that_is_no_number_ends_its_own_text_alone():
    class Broken(Counted):
        def score(self, candidates, ref_log_probs):
            rewards = super().score(candidates, ref_log_probs)
            rewards[1, 0] = torch.nan
            return rewards

    one = engine(Broken(choose_scorer(reward_model(), 64, CODEC.ends)))
    texts = [text(sample=sample) for sample in range(2)]
    one.submit(texts)
    one.turn()
    assert isinstance(texts[1].heard[-1], FloatingPointError)
    assert [row for _, row in texts[0].heard] == [0]
    assert one.running == texts[:1]


def test_closing_finishes_what_runs_and_refuses_what_waits():
    gate = threading.Event()
    policy = Counted(ModelPolicy(LM, CODEC.vocabulary), lambda rows: gate.wait(10) and None)
    one = engine(policy=policy, rows=1)
    first, second, third = (text(sample=sample) for sample in range(3))
    one.submit([first, second])
    one.thread.start()
    while not one.running:
        time.sleep(0.01)
    one.close()
    assert isinstance(second.heard[0], Closing)
    with pytest.raises(Closing):
        one.submit([third])
    gate.set()
    one.thread.join(10)
    assert not one.thread.is_alive()
    assert first.ids == alone(first)["response_ids"]
