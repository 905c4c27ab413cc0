"""The engine writes what `generate_texts` writes, whatever runs beside it and whenever it comes."""

import pytest

from pargs_min.codec import Codec
from pargs_min.decode import ModelPolicy
from pargs_min.methods import METHODS
from pargs_min.serving.engine import Engine, Text
from pargs_min.texts import Tokens, choose_scorer, generate_texts, language_model_scorer
from tests.strategies import tiny_lm, tiny_reward_model
from tests.test_texts import TOKENIZER, language_model_guide

PROMPTS = ["a b c", "d", "e f"]
LM = tiny_lm("gpt2")
CODEC = Codec.of(LM, TOKENIZER, "text")


def reward_model(objective="partial"):
    model = tiny_reward_model("llama")
    model.config.pargs = {"objective": objective, "append_eos": True, "prompt_format": "text"}
    return model


def engine(guide=None, **settings):
    guide = guide or reward_model()
    language_model = guide.config.pargs["objective"] in ("reweighted", "autoregressive")
    scorer = (
        language_model_scorer(LM, guide, CODEC.vocabulary) if language_model else choose_scorer(guide, 64, CODEC.ends)
    )
    return Engine(ModelPolicy(LM, CODEC.vocabulary), scorer, CODEC.ends, **settings)


class Heard(list):
    """What a text has told, and whether it has ended."""

    def __call__(self, what):
        self.append(what)


def text(prompt=0, sample=0, method="pargs", seed=5, **how):
    how = dict(max_new_tokens=6, top_k=4 if METHODS[method].guided else None, beta=2.0) | how
    return Text(
        CODEC.prompt({"prompt": PROMPTS[prompt]}), METHODS[method], Tokens(**how), (seed, prompt, sample), Heard()
    )


def finish(one):
    while one.running or one.waiting:
        one.turn()


def alone(one, guide=None):
    """What `generate_texts` writes in its place."""
    seed, prompt, sample = one.numbers
    texts = generate_texts(
        LM,
        TOKENIZER,
        [{"prompt": text} for text in PROMPTS],
        method=one.method.name,
        reward_model=guide or reward_model(),
        num_samples=sample + 1,
        seed=seed,
        **vars(one.how),
    )
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


@pytest.mark.parametrize("late", [0, 1, 9, 20])
def test_texts_with_settings_of_their_own_are_those_of_the_command_whenever_they_join(late):
    texts = [text(**settings) | {} if False else text(**{"max_new_tokens": 12} | settings) for settings in MIXED]
    one = engine()
    one.submit(texts[::2])
    for _ in range(late):
        one.turn()
    one.submit(texts[1::2])
    finish(one)
    for each in texts:
        assert each.ids == alone(each)["response_ids"], each.method.name
        assert each.hear[-1] is None
        assert len(each.hear) == len(each.ids) + 1


@pytest.mark.parametrize("objective", ["win", "reweighted", "autoregressive", "full"])
def test_every_kind_of_guide(objective):
    kinds = {"win": "win", "reweighted": "reweighted", "autoregressive": "genarm", "full": "args"}
    guide = reward_model(objective) if objective in ("win", "full") else language_model_guide(objective, beta=1.5)
    texts = [text(prompt, method=kinds[objective], beta=beta) for prompt, beta in enumerate((0.5, 1.5, 3.0))]
    one = engine(guide)
    one.submit(texts)
    finish(one)
    assert [each.ids for each in texts] == [alone(each, guide)["response_ids"] for each in texts]
