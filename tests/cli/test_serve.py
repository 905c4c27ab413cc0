"""`pargs serve` as a process: its options, its signals, its end."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import openai
import pytest

from pargs_min.cli import main
from pargs_min.cli.serve import ServeOptions, bound, offer
from pargs_min.models import load_reward_model
from pargs_min.texts import Tokens
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer

COMMAND = [sys.executable, "-m", "pargs_min", "serve"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny models, in a folder."""
    folder = tmp_path_factory.mktemp("models")
    tiny_lm(vocabulary=14).float().save_pretrained(folder / "lm")
    rm = tiny_reward_model(vocabulary=14).float()
    rm.config.pargs = {"objective": "partial", "prompt_format": "text"}
    rm.save_pretrained(folder / "rm")
    for name in ("lm", "rm"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def options(made, *more):
    return ["--model", f"{made}/lm", "--reward-model", f"{made}/rm", "--port", "0", *more]


@contextmanager
def serving(made, *more):
    """A process, once it listens, and its address."""
    process = subprocess.Popen([*COMMAND, *options(made, *more)], stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx2.get(f"{address}/health")
                break
            except httpx2.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.wait()


def test_the_same_texts_as_the_command_writes(made, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n')
    out = tmp_path / "texts.jsonl"
    more = ["--prompts", f"{tmp_path}/prompts.jsonl", "--output", str(out), "--num-samples", "4", "--seed", "7"]
    how = ["--beta", "2", "--max-new-tokens", "9"]
    assert main(["generate", *options(made)[:4], *more, *how]) == 0
    with serving(made, *how) as (_, address), openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        answer = client.completions.create(model="lm", prompt="a b", n=4, seed=7)
    wanted = [json.loads(line)["response"] for line in out.read_text().splitlines()]
    assert [choice.text for choice in answer.choices] == wanted
    assert len({*wanted}) > 1


LONG = {"prompt": "a b", "stream": True, "max_tokens": 40, "top_k": 14, "beta": 0.01}  # rarely ends by itself


def lines(address, body, found):
    """Ask for a stream, and note its lines as they come."""
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
        found.append(answer.status_code)
        found.extend(line for line in answer.iter_lines() if line)


def cut_off(address, heard):
    try:
        lines(address, LONG | {"n": 30}, heard)  # more than is sent before the end comes
    except httpx2.TransportError:
        heard.append("cut off")


def test_sigterm_finishes_what_runs_and_ends(made):
    with serving(made, "--max-new-tokens", "50", "--dtype", "float32") as (process, address):
        whole = httpx2.post(f"{address}/v1/completions", json=LONG | {"stream": False, "seed": 0}).json()
        heard = []
        client = threading.Thread(target=lines, args=(address, LONG | {"seed": 0}, heard))
        client.start()
        while len(heard) < 2:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        client.join(30)
        assert process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")
    chunks = [json.loads(line.removeprefix("data: ")) for line in heard[1:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert heard[-1] == "data: [DONE]"


def test_killed_and_started_again_it_serves_at_the_same_port(made):
    with serving(made) as (process, address):
        heard = []
        client = threading.Thread(target=cut_off, args=(address, heard))
        client.start()
        while not heard:
            time.sleep(0.001)
        process.kill()
        client.join(10)
        assert heard[-1] == "cut off"
    with serving(made, "--port", address.rpartition(":")[2]) as (_, again):
        assert again == address
        assert httpx2.post(f"{again}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_it_listens_to_others_only_with_a_key(made, tmp_path, capsys):
    key = tmp_path / "key"
    assert main(["serve", *options(made, "--host", "0.0.0.0")]) == 2
    assert "host 0.0.0.0 is open to other machines: give an API key (--api-key-file)" in capsys.readouterr().err
    for content in ("", "short", "with a blank in its middle", "ä" * 20, "two lines of\nsixteen characters"):
        key.write_text(content, "utf-8")
        assert main(["serve", *options(made, "--host", "0.0.0.0", "--api-key-file", str(key))]) == 2
        assert "must hold one line of at least 16 visible ASCII characters" in capsys.readouterr().err
    key.write_text("0123456789abcdef\n")
    with serving(made, "--host", "0.0.0.0", "--api-key-file", str(key)) as (_, address):
        port = address.rpartition(":")[2]
        ask = {"json": {"prompt": "a", "max_tokens": 1}, "headers": {"Authorization": "Bearer 0123456789abcdef"}}
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/completions", **ask).status_code == 200
        assert httpx2.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401


WRONG = [
    (["--rows", "0"], "rows must be at least 1, got 0"),
    (["--max-length", "-1"], "max_length must be at least 1"),
    (["--guide-below", "0.9"], "guide_below (--guide-below) is for single texts"),
    (["--method", "plain"], "plain has no reward model and no candidates"),
    (["--port", "99999"], "cannot be used"),
    (["--host", "nowhere.invalid", "--api-key-file", "/dev/null"], "must hold one line"),
    (["--prompt-format", "chat"], "cannot be chat and text at once"),
    (["--ref-top-p", "0"], "ref_top_p must be above 0"),
    (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    (["--temperature", "0"], "temperature must be a positive number"),
    (["--top-k", "99"], "top_k must lie between"),
    (["--min-ref-prob", "2"], "min_ref_prob must be a probability"),
    (["--beta", "nan"], "beta must be a finite number"),
]


@pytest.mark.parametrize(("more", "said"), WRONG, ids=lambda value: str(value)[:30])
def test_options_that_cannot_be(made, more, said, capsys):
    assert main(["serve", *options(made, *more)]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_models_are_loaded(made, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_tokens_are_sent_at_once():
    """Not held back for 40 ms, until an earlier packet is acknowledged: asyncio asks so where the protocol is named."""
    with bound("127.0.0.1", 0) as place:
        assert place.proto == socket.IPPROTO_TCP


def test_without_the_extra_it_says_what_to_install(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", *options(made)]) == 2
    assert "pip install 'pargs-min[serve]'" in capsys.readouterr().err


def test_the_limits_of_a_server(made):
    asked = ServeOptions(model=f"{made}/lm", reward_model=f"{made}/rm", max_length=30)
    found = offer(asked, Tokens(max_new_tokens=512))
    assert (found.context, found.max_top_k, found.how.top_k, found.name) == (30, 100, 10, "lm")
    assert [*found.methods] == ["plain", "pargs"]
    plain = offer(ServeOptions(model=f"{made}/lm", method="plain"), Tokens())
    assert ([*plain.methods], plain.context, plain.engine.scorer) == (["plain"], 64, None)


@pytest.mark.parametrize("head", ["vocab", "language model"])
def test_a_guide_that_is_asked_once_per_step_has_no_limit_of_candidates(made, tmp_path, head):
    method, guide = ("reweighted", tiny_lm(vocabulary=14)) if head != "vocab" else ("farma", None)
    guide = guide or load_reward_model(f"{made}/lm", tiny_tokenizer(), head="vocab")
    guide.float().config.pargs = {"objective": method, "prompt_format": "text", "beta": 1.0}
    guide.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = offer(ServeOptions(model=f"{made}/lm", reward_model=str(tmp_path), method=method), Tokens(max_new_tokens=9))
    assert found.max_top_k is None
