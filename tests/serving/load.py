"""How a server bears 32 clients at once, beside one that calls transformers' `generate` for each request in turn.

    python -m tests.serving.load MODEL          # prints ratios, and the latency of a first token

Both serve the same model, unguided, with texts of the same length; requests are the same, and so are their clients.
"""

import json
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import torch
import uvicorn
from fastapi import FastAPI
from transformers.utils import logging

from pargs_min.cli.serve import ServeOptions, offer
from pargs_min.models import load_language_model, load_tokenizer
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


def ask(address: str, seed: int) -> tuple[float, int]:
    """Seconds that an answer took, and its tokens."""
    began = time.perf_counter()
    body = {"prompt": PROMPT, "seed": seed, "max_tokens": TOKENS}
    answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=600).json()
    return time.perf_counter() - began, answer["usage"]["completion_tokens"] if "usage" in answer else TOKENS


def bear(address: str) -> dict[str, float]:
    """Tokens per second of all clients together, and the median seconds of a request."""
    ask(address, 0)
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = [*pool.map(lambda seed: ask(address, seed), range(REQUESTS))]
    seconds = time.perf_counter() - began
    return {
        "rate": sum(tokens for _, tokens in found) / seconds,
        "median": statistics.median(took for took, _ in found),
    }


def first_token(address: str, **more) -> float:
    """Median seconds to the first token of a stream, alone."""
    taken = []
    for seed in range(20):
        began = time.perf_counter()
        body = {"prompt": PROMPT, "seed": seed, "max_tokens": TOKENS, "stream": True} | more
        with httpx2.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(line for line in answer.iter_lines() if line)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main(model: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    plain = uvicorn.Server(uvicorn.Config(generate_server(model), log_level="warning"))
    offered = offer(ServeOptions(model=model, method="plain"), Tokens(max_new_tokens=TOKENS))
    with running(offered) as ours, listening(plain) as theirs:
        rounds = [(bear(ours), bear(theirs)) for _ in range(3)]
        for name in ("rate", "median"):
            print(name, "ours / generate's:", [round(mine[name] / other[name], 2) for mine, other in rounds])
        print("first token, ms:", round(1000 * first_token(ours), 1))
    print(json.dumps(rounds))


if __name__ == "__main__":
    main(sys.argv[1])
