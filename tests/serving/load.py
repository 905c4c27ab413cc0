"""How a server bears 32 clients at once, beside one that calls transformers' `generate` for each request in turn.

    python -m tests.serving.load MODEL          # prints ratios

Both serve the same model, unguided, with texts of up to the same length; requests are the same, and so are their
clients. Then, alone: the time to the first token of a stream, plain and guided, in steps of a plain one.
"""

import json
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from transformers.utils import logging

from pargs_min.cli.serve import ServeOptions, offer
from pargs_min.models import load_language_model, load_reward_model, load_tokenizer, record, save
from pargs_min.texts import Tokens
from tests.serving.conftest import listening, running

CLIENTS, REQUESTS, TOKENS = 32, 64, 64
PROMPT = "Once upon a time, there was"


def generate_server(model: str) -> FastAPI:
    """One request at a time, whole answers."""
    app, lm, tokenizer, one_at_a_time = FastAPI(), load_language_model(model), load_tokenizer(model), threading.Lock()

    @app.post("/v1/completions")
    def complete(asked: dict) -> dict:
        ids = tokenizer(asked["prompt"], return_tensors="pt").input_ids
        with one_at_a_time, torch.inference_mode():
            tokens = lm.generate(
                ids, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0
            )
        return {"choices": [{"text": tokenizer.decode(tokens[0, ids.shape[1] :])}], "tokens": tokens.shape[1]}

    return app


def ask(client: httpx2.Client, seed: int) -> tuple[float, int]:
    """Seconds that an answer took, and its tokens."""
    began = time.perf_counter()
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "seed": seed, "max_tokens": TOKENS}).json()
    return time.perf_counter() - began, answer["usage"]["completion_tokens"] if "usage" in answer else TOKENS


def bear(address: str) -> dict[str, float]:
    """Tokens per second of all clients together, and the median seconds of a request."""
    with httpx2.Client(base_url=address, timeout=600) as client, ThreadPoolExecutor(CLIENTS) as pool:
        ask(client, 0)
        began = time.perf_counter()
        found = [*pool.map(partial(ask, client), range(REQUESTS))]
    seconds = time.perf_counter() - began
    return {
        "rate": sum(tokens for _, tokens in found) / seconds,
        "median": statistics.median(took for took, _ in found),
    }


def stream(client: httpx2.Client, method: str, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a stream, and between one token and the next."""
    body = {"prompt": PROMPT, "seed": seed, "max_tokens": TOKENS, "stream": True, "method": method}
    times = [time.perf_counter()]
    with client.stream("POST", "/v1/completions", json=body) as answer:
        times += [time.perf_counter() for line in answer.iter_lines() if line]
    gaps = [after - before for before, after in pairwise(times)]
    return gaps[0], statistics.median(gaps[1:-1])


def main(model: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        untrained(model, folder)
        offered = offer(ServeOptions(model=model, reward_model=folder), Tokens(max_new_tokens=TOKENS))
    plain = uvicorn.Server(uvicorn.Config(generate_server(model), log_level="warning"))
    offered.method = offered.methods["plain"]
    with running(offered) as ours, listening(plain) as theirs:
        rounds = [(bear(ours), bear(theirs)) for _ in range(3)]
        for name in ("rate", "median"):
            print(name, "ours / generate's:", [round(mine[name] / other[name], 2) for mine, other in rounds])
        with httpx2.Client(base_url=ours) as client:
            for _ in range(2):
                found = {
                    method: np.median([stream(client, method, seed) for seed in range(20)], 0)
                    for method in ("plain", "pargs")
                }
                step = found["plain"][1]
                firsts = {method: round(float(first / step), 1) for method, (first, _) in found.items()}
                print(
                    "first token, in plain steps:", firsts, "a guided step:", round(float(found["pargs"][1] / step), 2)
                )
    print(json.dumps(rounds))


def untrained(model: str, folder: str) -> None:
    """A reward model with a new head: what it says does not matter here."""
    tokenizer = load_tokenizer(model)
    rm = load_reward_model(model, tokenizer, head="scalar")
    record(rm, objective="partial", append_eos=True, prompt_format="text")
    save(rm, tokenizer, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
