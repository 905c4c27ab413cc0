"""The server as its clients see it."""

import asyncio
import json
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import httpx2
import openai
import pytest
import torch
from starlette.exceptions import HTTPException

from pargs_min import trace
from pargs_min.codec import Codec
from pargs_min.decode import ModelPolicy
from pargs_min.methods import METHODS
from pargs_min.serving.app import Guard, Served
from pargs_min.serving.engine import Engine
from pargs_min.texts import Tokens, choose_scorer, generate_texts
from tests.serving.conftest import running, started
from tests.serving.test_engine import CODEC, LM, Counted, engine, reward_model
from tests.strategies import tiny_lm
from tests.test_codec import chat_tokenizer
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


# ---- chats ----


def chat_served():
    tokenizer = chat_tokenizer()
    lm = tiny_lm(vocabulary=12, seed=2)
    codec = Codec.of(lm, tokenizer, "chat")
    plain = {"plain": METHODS["plain"]}
    one = Engine(ModelPolicy(lm, codec.vocabulary), None, codec.ends)
    how = Tokens(max_new_tokens=20)
    settings = dict(name="chatty", codec=codec, engine=one, method=plain["plain"], how=how, methods=plain)
    return lm, Served(**settings)


MESSAGES = [{"role": "user", "content": "a b"}]


def test_a_chat_is_what_the_command_writes_and_its_parts_are_one_text():
    lm, offered = chat_served()
    [wanted] = generate_texts(
        lm, offered.codec.tokenizer, [{"prompt": MESSAGES}], method="plain", seed=4, max_new_tokens=9
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}]
    with running(offered) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        ask = partial(client.chat.completions.create, model="chatty", seed=4)
        for messages in (MESSAGES, parts):
            answer = ask(messages=messages, max_tokens=9)
            assert answer.choices[0].message.content == wanted["response"]
            assert answer.choices[0].message.role == "assistant"
            assert answer.choices[0].finish_reason == ("stop" if wanted["finished"] else "length")
            assert answer.usage.prompt_tokens == len(wanted["prompt_ids"])
        said = [chunk.choices[0] for chunk in ask(messages=MESSAGES, max_completion_tokens=9, stream=True)]
        assert "".join(choice.delta.content for choice in said) == wanted["response"]
        assert [choice.delta.role for choice in said] == ["assistant", *[None] * (len(said) - 1)]
        assert said[-1].finish_reason == answer.choices[0].finish_reason
        system = [{"role": "developer", "content": "b"}, {"role": "assistant", "content": "a"}]
        with pytest.raises(openai.BadRequestError, match="ends with a message of the assistant") as refused:
            ask(messages=system)
        assert refused.value.param == "messages"


def test_a_chat_with_a_model_without_a_template_says_where_to_ask(client):
    with pytest.raises(openai.BadRequestError, match="tiny has no chat template: ask /v1/completions") as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert refused.value.param == "messages"


# ---- what a request may say ----


def test_settings_of_a_request(client):
    ask = partial(client.completions.create, model="tiny", prompt="a b c", seed=3)
    of_ours = {"beta": -1.0, "top_k": 7}
    assert ask(extra_body=of_ours).choices[0].text == expected("a b c", **of_ours)[0]
    assert ask(extra_body={"method": "plain"}).choices[0].text == expected("a b c", method="plain")[0]
    warped = ask(temperature=0.5, top_p=0.8).choices[0].text
    assert warped == expected("a b c", ref_temperature=0.5, ref_top_p=0.8)[0]
    assert ask(temperature=0).choices[0].text == expected("a b c", method="pargs-greedy")[0]
    several = ask(prompt=["a b c", "d", "e f"], n=2)
    prompts = [{"prompt": prompt} for prompt in ("a b c", "d", "e f")]
    wanted = generate_texts(
        LM, TOKENIZER, prompts, method="pargs", reward_model=reward_model(), num_samples=2, seed=3, **vars(HOW)
    )
    assert [choice.text for choice in several.choices] == [text["response"] for text in wanted]
    assert ask(prompt=CODEC.prompt({"prompt": "a b c"})).choices[0].text == expected("a b c")[0]
    without = {ask(prompt="a b c", seed=None).choices[0].text for _ in range(5)}
    assert len(without) > 1


def test_beta_0_is_the_reference_and_asks_no_guide():
    scorer = Counted(choose_scorer(reward_model(), 64, CODEC.ends))
    with running(served(engine=engine(scorer))) as address:
        answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "a b c", "seed": 3, "beta": 0}).json()
    assert answer["choices"][0]["text"] == expected("a b c", method="plain")[0]
    assert scorer.rows == []


def test_log_probabilities_are_the_policys_and_come_with_the_references_and_rewards(client):
    steps = []
    [wanted] = generate_texts(
        LM,
        TOKENIZER,
        [{"prompt": "a b c"}],
        method="pargs",
        reward_model=reward_model(),
        seed=3,
        on_step=steps.append,
        **vars(HOW),
    )
    record = trace.records(steps, trace.token_texts(TOKENIZER), shown=4)
    ask = partial(client.completions.create, model="tiny", prompt="a b c", seed=3, logprobs=10)
    found = ask().choices[0].logprobs.model_dump()
    drawn = [trace.drawn(one) for one in record]
    assert found["token_logprobs"] == pytest.approx([math.log(one["prob"]) for one in drawn], abs=1e-9)
    assert sum(one["nats"] for one in found["guidance"]) == pytest.approx(wanted["kl"])
    assert "".join(found["tokens"]) == wanted["response"]
    assert [
        wanted["response"][at:][: len(token)] for at, token in zip(found["text_offset"], found["tokens"], strict=True)
    ] == found["tokens"]
    for ours, theirs in zip(found["guidance"], record, strict=True):
        listed = {one["id"]: one for one in ours["candidates"]}
        assert len(listed) == 10 + (trace.drawn(theirs)["id"] not in listed)  # those beside the candidates, too
        for other in theirs["candidates"]:
            one = listed[other["id"]]
            assert [one.pop(name) for name in ("token", "candidate")] == [
                other.pop(name) for name in ("token", "candidate")
            ]
            assert (one["reward"] is None) == (other["reward"] is None)
            assert dict(one, reward=one["reward"] or 0) == pytest.approx(
                dict(other, reward=other["reward"] or 0), rel=1e-9
            )
    parts = [chunk.choices[0].logprobs.model_dump() for chunk in ask(stream=True) if chunk.choices[0].logprobs.tokens]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts for value in part[name]] == pytest.approx(found[name])
    every = ask(logprobs=20).choices[0].logprobs.model_dump()["guidance"]
    assert {len(one["candidates"]) for one in every} == {CODEC.vocabulary}
    plain = ask(extra_body={"method": "plain"}).choices[0].logprobs.model_dump()
    assert {one["reward"] for record in plain["guidance"] for one in record["candidates"]} == {None}
    assert sum(record["nats"] for record in plain["guidance"]) == 0


def test_a_chats_log_probabilities():
    _, offered = chat_served()
    with running(offered) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        ask = partial(client.chat.completions.create, model="chatty", messages=MESSAGES, seed=4)
        answer = ask(logprobs=True, top_logprobs=3).choices[0]
        assert "".join(token.token for token in answer.logprobs.content) == answer.message.content
        for token in answer.logprobs.content:
            assert bytes(token.bytes).decode() == token.token
            assert token.logprob <= max(one.logprob for one in token.top_logprobs) <= 0
            assert 3 <= len(token.top_logprobs) <= 4
        assert ask().choices[0].logprobs is None


def test_a_stop_string_ends_its_own_choice_and_frees_its_row():
    """Of two texts, one soon says the word: it is cut there, and the other goes on alone."""
    found = (expected("a b c", n=2, seed=seed) for seed in range(100))
    seed, (first, second), word = next(
        (seed, texts, word)
        for seed, texts in enumerate(found)
        for word in texts[0].split()[1:4]
        if word not in texts[1].split()[:8] and min(len(text.split()) for text in texts) > 10
    )
    wanted = [first[: first.index(word)], second.partition(word)[0]]
    policy = Counted(ModelPolicy(LM, CODEC.vocabulary))
    with running(served(engine=engine(policy=policy))) as address:
        ask = partial(httpx2.post, f"{address}/v1/completions")
        for stop in (word, ["nowhere", word, ""]):
            policy.rows.clear()
            answer = ask(json={"prompt": "a b c", "n": 2, "seed": seed, "stop": stop}).json()
            assert [choice["text"] for choice in answer["choices"]] == wanted
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert policy.rows[0] == 2
            assert policy.rows[6:8] == [1, 1]


WRONG = [
    ("prompt", {"prompt": 5}, "prompt"),
    ("prompt", {"prompt": []}, "empty"),
    ("prompt", {"prompt": [[99]]}, "99"),
    ("prompt", {"prompt": [-7, 3]}, "token id -7 is outside"),
    ("prompt", {"prompt": ""}, "no token"),
    ("prompt", {"prompt": "z"}, "UNK"),
    ("prompt", {"prompt": "a " * 64}, "exceed the context of 64"),
    ("max_tokens", {"max_tokens": 0}, "greater than or equal to 1"),
    ("max_tokens", {"max_tokens": 21}, "at most 20"),
    ("max_tokens", {"max_tokens": 20, "prompt": "a " * 50}, "50 tokens and 20 more exceed the context of 64"),
    ("temperature", {"temperature": -1}, "greater than or equal to 0"),
    ("temperature", {"temperature": "1"}, "valid number"),
    ("top_p", {"top_p": 0}, "greater than 0"),
    ("beta", {"beta": 1e300}, "less than or equal to"),
    ("beta", {"beta": None, "top_k": 5, "n": 0}, None),
    ("top_k", {"top_k": 12}, "at most 11"),
    ("top_k", {"top_k": -1}, "greater than or equal to 0"),
    ("n", {"n": 65}, "65 texts at once are more than may wait here"),
    ("seed", {"seed": -1}, "greater than or equal to 0"),
    ("method", {"method": "smc"}, "method must be one of plain, pargs, got 'smc'"),
    ("model", {"model": "other"}, "there is no model 'other'; this is tiny"),
    ("stream_options", {"stream_options": {}}, "only for streams: set stream to true, or leave it out"),
    ("stream_options", {"stream_options": {"include_usage": True}, "stream": False}, "only for streams"),
    ("logprobs", {"logprobs": 21}, "less than or equal to 20"),
    ("frequency_penalty", {"frequency_penalty": 0.5}, "is not supported here"),
    ("nonsense", {"nonsense": 1}, "is not supported here"),
]


@pytest.mark.parametrize(("field", "body", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_the_name_of_its_field(address, field, body, said):
    answer = httpx2.post(f"{address}/v1/completions", json={"model": "tiny", "prompt": "a"} | body)
    found = answer.json()["error"]
    assert answer.status_code == (404 if field == "model" else 400)
    assert found["type"] == "invalid_request_error"
    if said:
        assert (found["param"], said in found["message"]) == (field, True), found
    else:
        assert found["param"] == "n"


def test_too_many_texts_are_refused_before_any_is_prepared(monkeypatch):
    monkeypatch.setattr("pargs_min.serving.app.Text", lambda *_: pytest.fail("one was"))
    with running(served()) as found:
        answer = httpx2.post(f"{found}/v1/completions", json={"prompt": [[3]] * 500, "n": 128})
        assert "64000 texts at once are more than may wait here (64)" in answer.json()["error"]["message"]


def test_no_request_may_ask_for_more_candidates_than_there_are_tokens():
    with running(served(max_top_k=100)) as found:
        answer = httpx2.post(f"{found}/v1/completions", json={"prompt": "a", "top_k": 12})
        assert "top_k may be at most 11 here" in answer.json()["error"]["message"]


NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "echo": False, "best_of": 1}
NEUTRAL |= {"stream_options": None}


def test_fields_that_ask_for_nothing_are_taken(address):
    answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": False} | NEUTRAL)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b'{"prompt": "a", "beta": NaN}', "beta"),
    ],
)
def test_bodies_that_are_no_request(address, body, said):
    answer = httpx2.post(f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_paths_and_methods_that_there_are_not(address):
    for answer, status in ((httpx2.get(f"{address}/v1/nothing"), 404), (httpx2.get(f"{address}/v1/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_models_and_health(client, address):
    [model] = client.models.list()
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert model.pargs == {
        "method": "pargs",
        "methods": ["plain", "pargs"],
        "beta": 2.0,
        "chat": False,
        "max_tokens": 20,
    }
    with pytest.raises(openai.NotFoundError, match="no model 'large'"):
        client.models.retrieve("large")
    assert httpx2.get(f"{address}/health").json() == {"status": "ok", "running": 0, "waiting": 0}


# ---- who may ask, and how much ----


def test_a_key_is_asked_for_where_there_is_one():
    with running(served(), key="s" * 20) as address:
        for given in (None, "t" * 20, "s" * 19, "ß"):
            headers = {} if given is None else {"Authorization": f"Bearer {given}".encode()}
            answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "a"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=f"{address}/v1", api_key="s" * 20) as client:
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        assert httpx2.get(f"{address}/health").status_code == 200


def test_a_web_page_cannot_reach_it_under_another_name_nor_read_what_it_says(address):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert httpx2.get(f"{address}/v1/models", headers={"Host": host}).status_code == 403
    for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8000"):
        assert httpx2.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200
    for origin in ("https://evil.example", "null", f"{address}0"):
        answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "a"}, headers={"Origin": origin})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx2.get(f"{address}/v1/models", headers={"Origin": address}).status_code == 200
    simple = httpx2.post(
        f"{address}/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert simple.status_code == 400
    assert "sent as Content-Type: application/json" in simple.json()["error"]["message"]
    with running(served(), local=False) as public:
        assert httpx2.get(f"{public}/v1/models", headers={"Host": "guided.example"}).status_code == 200


def test_bodies_have_a_limit():
    with running(served(), most=1000) as address:
        long = json.dumps({"prompt": "a", "user": "x" * 2000})
        answer = httpx2.post(f"{address}/v1/completions", content=long, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, answer.text
        assert "1000 bytes" in answer.json()["error"]["message"]


def test_bodies_have_a_limit_in_parts_too():
    parts = iter([b"x" * 700, b"x" * 200, b"x" * 200])

    async def receive():
        return {"type": "http.request", "body": next(parts), "more_body": True}

    async def app(scope, receive, send):
        for _ in range(2):
            await receive()
        with pytest.raises(HTTPException) as refused:
            await receive()
        assert refused.value.status_code == 413

    guard = Guard(app, key=None, hosts=None, most=1000)
    asyncio.run(guard({"type": "http", "path": "/v1/completions", "headers": []}, receive, None))
    assert not [*parts]


def test_prompts_are_in_no_log_unless_asked_for(capfd):
    for asked in (False, True):
        with running(served(log_prompts=asked)) as address:
            httpx2.post(f"{address}/v1/completions", json={"prompt": "a b c", "max_tokens": 1})
        out, err = capfd.readouterr()
        assert ("a b c" in out + err) == asked


# ---- when things go wrong ----


def slow(seconds=0.05):
    return Counted(ModelPolicy(LM, CODEC.vocabulary), lambda rows: time.sleep(seconds))


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_goes_away_frees_its_texts():
    """Of 50 tokens that take 10 seconds, few are written."""
    one = engine(policy=slow(0.2))
    offered = served(engine=one, how=Tokens(top_k=4, max_new_tokens=50))
    body = {"prompt": "a b c", "n": 3, "method": "plain"}
    with running(offered) as address:
        with httpx2.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
            assert one.running
        until(lambda: not one.running, 3)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{address}/v1/completions", json=body, timeout=0.5)
        until(lambda: not one.running, 3)
        assert httpx2.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_whoever_comes_when_too_many_wait_is_told_to_try_again():
    one = engine(policy=slow(), rows=1, room=2)
    with running(served(engine=one)) as address, ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(httpx2.post, f"{address}/v1/completions", json={"prompt": "a b c", "seed": seed}, timeout=60)
            for seed in range(8)
        ]
        answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(refused) <= 6
    assert {answer.status_code for answer in refused} == {429}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in refused)
    for seed, answer in enumerate(answers):
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected("a b c", seed=seed)[0]


def refused(address):
    """Whether nobody listens there any more."""
    try:
        httpx2.get(f"{address}/health")
    except httpx2.ConnectError:
        return True
    return False


def test_told_to_stop_it_finishes_what_runs_and_refuses_what_waits_and_what_comes():
    one = engine(policy=slow(0.2), rows=1)
    how = Tokens(top_k=4, max_new_tokens=10, beta=2.0)
    with started(served(engine=one, how=how)) as (address, server), ThreadPoolExecutor(4) as pool:
        ask = partial(httpx2.post, f"{address}/v1/completions", timeout=60)
        idle = httpx2.Client()  # keeps its connection
        idle.get(f"{address}/health")
        first = pool.submit(ask, json={"prompt": "a b c", "seed": 3})
        until(lambda: one.running)
        second, third = (pool.submit(ask, json={"prompt": "d", "stream": stream}) for stream in (False, True))
        until(lambda: len(one.waiting) == 2)
        server.handle_exit(signal.SIGTERM, None)
        assert second.result().status_code == 503
        assert "shutting down" in second.result().json()["error"]["message"]
        assert "shutting down" in third.result().text
        with suppress(httpx2.TransportError):  # its connection may have been closed
            assert idle.post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 503
        until(lambda: refused(address))
        assert first.result().json()["choices"][0]["text"] == expected("a b c", **vars(how))[0]


@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "out of memory: ask for"),
        (FloatingPointError("a reward is not finite"), 500, "a reward is not finite; the weights may be damaged"),
        (KeyError("secret"), 500, "internal error"),
    ],
)
def test_errors_of_the_models_reach_the_client_as_such_and_the_next_request_is_served(wrong, status, said, capfd):
    wrongs = [wrong, wrong]

    def fails(rows):
        if wrongs:
            raise wrongs.pop()

    with running(served(engine=engine(policy=Counted(ModelPolicy(LM, CODEC.vocabulary), fails)))) as address:
        ask = partial(httpx2.post, f"{address}/v1/completions")
        answer = ask(json={"prompt": "a"})
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]
        assert "secret" not in answer.text
        streamed = ask(json={"prompt": "a", "stream": True})
        events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        assert said in json.loads(events[0])["error"]["message"]
        assert events[1:] == ["[DONE]"]
        assert ask(json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert ("KeyError" in capfd.readouterr().err) == isinstance(wrong, KeyError)
