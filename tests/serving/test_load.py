"""Many clients at once, on a small real model: every answer is right, none is mixed up, and memory stays flat."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch

from pargs_min.cli.serve import ServeOptions, offer
from pargs_min.models import load_language_model, load_reward_model, load_tokenizer
from pargs_min.texts import Tokens, generate_texts
from tests.serving.conftest import running
from tests.serving.load import untrained

pytestmark = pytest.mark.real
CLIENTS, PROMPTS = 32, ["Once upon a time, there was", "Lily and Tom went to the", "One day, a big dog", "The sun"]


def settings(number):
    """What one client asks, different from all others."""
    method = ("plain", "pargs", "pargs")[number % 3]
    more = {"beta": float(number % 4), "top_k": (5, 10)[number % 2]} if method != "plain" else {}
    top_p = (1.0, 0.9)[number // 4 % 2]
    return dict(prompt=PROMPTS[number % 4], method=method, seed=number, max_tokens=8 + number % 32, top_p=top_p) | more


def resident():
    """Memory of this process, in MB."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def test_each_of_32_clients_at_once_gets_its_own_text(real, tmp_path):
    torch.manual_seed(0)
    model, folder = str(real / "stories260K"), str(tmp_path / "rm")
    untrained(model, folder)
    offered = offer(ServeOptions(model=model, reward_model=folder), Tokens(max_new_tokens=64))
    with running(offered) as address, ThreadPoolExecutor(CLIENTS) as pool:

        def asked(number):
            return httpx2.post(f"{address}/v1/completions", json=settings(number), timeout=120).json()

        answers = [*pool.map(asked, range(64))]
        before = resident()
        again = [*pool.map(asked, range(64))]
        grown = resident() - before
    lm, tokenizer, rm = load_language_model(model), load_tokenizer(model), load_reward_model(folder)
    for number, answer in enumerate(answers):
        how = settings(number)
        tokens = dict(max_new_tokens=how["max_tokens"], ref_top_p=how["top_p"])
        tokens |= {name: how[name] for name in ("beta", "top_k") if name in how}
        prompts = [{"prompt": how["prompt"]}]
        [text] = generate_texts(lm, tokenizer, prompts, method=how["method"], reward_model=rm, seed=number, **tokens)
        assert answer["choices"][0]["text"] == text["response"], how
        assert again[number]["choices"] == answer["choices"]
    assert grown < 20
