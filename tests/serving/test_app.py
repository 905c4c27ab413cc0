"""The server as its clients see it."""

import openai
import pytest

from pargs_min.methods import METHODS
from pargs_min.serving.app import Served
from pargs_min.texts import Tokens, generate_texts
from tests.serving.conftest import running
from tests.serving.test_engine import CODEC, LM, engine, reward_model
from tests.test_texts import TOKENIZER

HOW = Tokens(beta=2.0, top_k=4, max_new_tokens=20)


def served(**changes):
    methods = {"plain": METHODS["plain"], "pargs": METHODS["pargs"]}
    settings = dict(name="tiny", codec=CODEC, method=METHODS["pargs"], how=HOW, methods=methods, context=64)
    changes.setdefault("engine", engine(**changes.pop("limits", {})))
    return Served(**settings | changes)


@pytest.fixture(scope="module")
def address():
    with running(served()) as found:
        yield found


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


def expected(prompt, n=1, method="pargs", seed=3, **how):
    settings = vars(HOW) | ({} if METHODS[method].guided else {"top_k": None}) | how
    texts = generate_texts(
        LM,
        TOKENIZER,
        [{"prompt": prompt}],
        method=method,
        reward_model=reward_model(),
        num_samples=n,
        seed=seed,
        **settings,
    )
    return [text["response"] for text in texts]


def test_a_completion_is_what_the_command_writes(client):
    answer = client.completions.create(model="tiny", prompt="a b c", n=4, seed=3, max_tokens=8)
    wanted = expected("a b c", n=4, max_new_tokens=8)
    assert [choice.text for choice in answer.choices] == wanted
    assert len({*wanted}) > 1
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens <= 32
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}


def test_a_stream_says_the_same(client):
    stream = client.completions.create(
        model="tiny", prompt="a b c", n=2, seed=3, stream=True, stream_options={"include_usage": True}
    )
    said, usage = {0: "", 1: ""}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert [*said.values()] == expected("a b c", n=2)
    assert usage.prompt_tokens == 3
