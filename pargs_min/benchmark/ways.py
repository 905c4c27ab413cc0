"""What a guided token costs: against plain generation, against the least it can cost, and against the published loops.

Every way of generating is a function that calls `tick` once a token; the time between two ticks is the time of a
token. Ways are compared within a round, in which each writes some tokens and, on a CPU, they take turns token by token;
a ratio is the median over the rounds. So a machine that is busy with other work slows both sides of it.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Semaphore

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
)

from pargs_min.benchmark.published import CopiedScorer, SeparateScorer, UncachedPolicy
from pargs_min.data import Pair, at_response_tokens, collate
from pargs_min.decode import ModelPolicy, RewardGuidance, generate
from pargs_min.losses import bradley_terry_loss, partial_bradley_terry_loss
from pargs_min.reward_model import body_and_head, final_rewards, prefix_rewards
from pargs_min.scoring import SiblingScorer, VocabularyScorer
from pargs_min.static import StaticPolicy, StaticScorer

SHAPES = {  # what a configuration differs by from the default one of its family
    "tiny": ("gpt2", dict(vocab_size=8000, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)),
    "gpt2": ("gpt2", {}),
    "gpt2-large": ("gpt2", dict(n_embd=1280, n_layer=36, n_head=20)),
    "llama-7b": ("llama", dict(max_position_embeddings=2048)),
}
Tick = Callable[[], None]
Way = Callable[[Tick], object]


@dataclass(frozen=True)
class Models:
    """A language model and two reward models on one backbone, one for each shape of head."""

    lm: PreTrainedModel
    scalar: PreTrainedModel
    vocabulary: PreTrainedModel


def models_of_shape(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Models:
    """Models with random weights: time does not depend on what they have learned.

    Raises:
        ValueError: if the shape is unknown.
    """
    if name not in SHAPES:
        raise ValueError(f"config must be one of {', '.join(SHAPES)}, got {name!r}")
    family, changes = SHAPES[name]
    config = AutoConfig.for_model(family, **changes)
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        config.num_labels = 1
        scalar = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    return Models(lm, scalar, with_vocabulary_head(scalar))


def with_vocabulary_head(scalar: PreTrainedModel) -> PreTrainedModel:
    """The same backbone under a random vocabulary head."""
    config, rows = copy.deepcopy(scalar.config), scalar.get_input_embeddings().num_embeddings
    config.num_labels = rows
    with torch.device("meta"):
        model = type(scalar)(config)
    setattr(model, model.base_model_prefix, scalar.base_model)
    old = scalar.score.weight
    model.score = nn.Linear(old.shape[1], rows, bias=False, device=old.device, dtype=old.dtype)
    return model.eval()


# ---- the ways ----


class _TickPerToken(StoppingCriteria):
    def __init__(self, tick: Tick):
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def plain(lm: PreTrainedModel, ids: Tensor, tokens: int, tick: Tick, processors: Sequence = (), **settings) -> Tensor:
    """transformers' own `generate`, sampling; it ends at an id that no token has."""
    never = lm.get_input_embeddings().num_embeddings
    settings |= dict(max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=never, pad_token_id=0)
    return lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(**settings),
        logits_processor=list(processors),
        stopping_criteria=[_TickPerToken(tick)],
    )


@torch.no_grad()
def floor(lm: PreTrainedModel, rm: PreTrainedModel, ids: Tensor, queries: int, tokens: int, tick: Tick) -> None:
    """The least a guided token can cost: a bare step of each model, `queries` tokens of the reward model's.

    No candidates are chosen, no masks are made, nothing is drawn; the caches are those of our loop.
    """
    body, head = body_and_head(rm)
    caches = DynamicCache(), DynamicCache()
    lm(input_ids=ids, past_key_values=caches[0], use_cache=True, logits_to_keep=1)
    body(input_ids=ids, past_key_values=caches[1], use_cache=True)
    last, siblings = ids[:, -1:], ids[:, :1].repeat(1, queries)
    for _ in range(tokens):
        last = lm(input_ids=last, past_key_values=caches[0], use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        head(body(input_ids=siblings, past_key_values=caches[1], use_cache=True).last_hidden_state)
        caches[1].crop(1 - queries)
        tick()


def ours(policy, scorer, ids: Tensor, top_k: int, tokens: int, tick: Tick) -> None:
    """Our loop over any steppers."""
    generate(policy, scorer, ids, beta=1.0, top_k=top_k, max_new_tokens=tokens, on_step=lambda step: tick())


def uncached(models: Models, ids: Tensor, top_k: int, tick: Tick) -> None:
    """One token of the paper's way. Nothing is cached, so the first costs what all do: its time is from the start."""
    tick()
    ours(UncachedPolicy(models.lm), SeparateScorer(models.scalar), ids, top_k, 1, tick)


def ways(models: Models, ids: Tensor, k: int, tokens: int) -> dict[str, Way]:
    """Every way of writing `tokens` tokens behind the prompts (B, P), by name."""
    lm, rm, vocabulary = models.lm, models.scalar, models.vocabulary
    policy, siblings, one_query = ModelPolicy(lm), SiblingScorer(rm), VocabularyScorer(vocabulary)
    mask = torch.ones_like(ids)

    def guidance(tick: Tick) -> Tensor:
        return plain(lm, ids, tokens, tick, [RewardGuidance(siblings, mask, beta=1.0, top_k=k)])

    found = {"plain generation": lambda tick: plain(lm, ids, tokens, tick)}
    if ids.is_cuda:
        slots = ids.shape[1] + tokens
        static = StaticPolicy(lm, slots), StaticScorer(rm, slots + k)
        found["plain, compiled"] = lambda tick: plain(lm, ids, tokens, tick, cache_implementation="static")
        found["our loop, compiled"] = lambda tick: ours(*static, ids, k, tokens, tick)
    return found | {
        "floor": lambda tick: floor(lm, rm, ids, k + 1, tokens, tick),
        "our loop": lambda tick: ours(policy, siblings, ids, k, tokens, tick),
        "RewardGuidance": guidance,
        "one-call floor": lambda tick: floor(lm, vocabulary, ids, 1, tokens, tick),
        "one-call head": lambda tick: ours(policy, one_query, ids, 0, tokens, tick),
        "k copies of the cache": lambda tick: ours(policy, CopiedScorer(rm, k), ids, k, tokens, tick),
        "k passes, no cache": lambda tick: uncached(models, ids, k, tick),
    }


# ---- the measures ----


def interleaved(ways: Mapping[str, Way], rounds: int, device: torch.device, progress=None) -> dict[str, list[float]]:
    """Seconds per token of each way in each round, after one run of each to warm up."""
    _taking_turns(ways) if device.type == "cpu" else [_on_gpu(way) for way in ways.values()]
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        times = _taking_turns(ways) if device.type == "cpu" else {name: _on_gpu(way) for name, way in ways.items()}
        for name in ways:
            seconds[name].append(statistics.median(times[name]))
        if progress is not None:
            progress.update()
    return seconds


def _taking_turns(ways: Mapping[str, Way]) -> dict[str, list[float]]:
    """Seconds from tick to tick of each way, all of them under way at once and one token of each at a time.

    So they meet the same neighbours. The reading of the prompt is not counted, but for a way that ticks before it.
    """
    turns, back = {name: Semaphore(0) for name in ways}, Semaphore(0)
    times, running = {name: [] for name in ways}, list(ways)

    def run(name: str) -> None:
        began = [0.0]

        def tick() -> None:
            times[name].append(clock() - began[0])
            back.release()
            turns[name].acquire()
            began[0] = clock()

        turns[name].acquire()
        try:
            ways[name](tick)
        finally:
            running.remove(name)
            back.release()

    with ThreadPoolExecutor(len(ways)) as pool:
        futures = [pool.submit(run, name) for name in ways]
        while running:
            for name in list(running):
                turns[name].release()
                back.acquire()
    for future in futures:
        future.result()
    return {name: seconds[1:] for name, seconds in times.items()}


def _on_gpu(way: Way) -> list[float]:
    """Seconds from tick to tick by the GPU's own clock, without making the CPU wait for it."""
    marks = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    way(mark)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def clock() -> float:
    """Seconds; on one thread of processor time, which does not count what other programs take."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ratios(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> list[float]:
    """Of one way's time to another's, round by round.

    >>> ratios({"ours": [2.0, 6.0], "floor": [2.0, 4.0]}, "ours", "floor")
    [1.0, 1.5]
    """
    return [a / b for a, b in zip(seconds[name], seconds[over], strict=True)]


def peak_bytes(way: Way, device: torch.device) -> int:
    """The most memory that tensors hold at any time after the first token, weights not counted."""
    if device.type == "cuda":
        before, ticks = torch.cuda.memory_allocated(), []

        def tick() -> None:
            if not ticks:
                torch.cuda.reset_peak_memory_stats()
            ticks.append(None)

        way(tick)
        return torch.cuda.max_memory_allocated() - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself

    def mark() -> None:
        with record_function("pargs.tick"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way(mark)
    held = peak = 0
    started = False
    for event in profiler.profiler.kineto_results.events():
        started |= event.name() == "pargs.tick"
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held) if started else peak
    return peak


def passes_per_token(way: Way, models: Models) -> dict[str, float]:
    """Forward passes of each model and the tokens they read, per token written; the reading of the prompt left out."""
    counts = dict.fromkeys(("lm passes", "lm tokens", "reward passes", "reward tokens"), 0)
    seen = []  # a copy of the counts at each tick
    hooks = []
    for name, body in (("lm", models.lm.base_model), ("reward", models.scalar.base_model)):

        def count(_, __, output, name: str = name) -> None:
            rows, length = output.last_hidden_state.shape[:2]
            counts[f"{name} passes"] += 1
            counts[f"{name} tokens"] += rows * length

        hooks.append(body.register_forward_hook(count))
    way(lambda: seen.append(dict(counts)))
    for hook in hooks:
        hook.remove()
    return {name: (seen[-1][name] - seen[0][name]) / (len(seen) - 1) for name in counts}


def weight_bytes(*models: PreTrainedModel) -> int:
    """Memory of the weights, each counted once."""
    weights = {w.data_ptr(): w.nbytes for model in models for w in (*model.parameters(), *model.buffers())}
    return sum(weights.values())


def cache_bytes(model: PreTrainedModel, batch: int, length: int) -> int:
    """Memory of the keys and values of `batch` texts of `length` tokens."""
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True
        )
    return batch * length * sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# ---- training ----


def training_ways(rm: PreTrainedModel, prompt: int, response: int, rows: int = 8) -> dict[str, Callable[[], float]]:
    """The loss of every prefix of one pair and its gradient: in one pass, and with a row of its own for each prefix.

    Both return seconds. The second would take minutes: `rows` evenly spaced prefixes are timed, and scaled to all.
    """
    ids = torch.randint(rm.get_input_embeddings().num_embeddings, (3, max(prompt, response)), device=rm.device)
    pair = Pair(ids[0, :prompt].tolist(), ids[1, :response].tolist(), ids[2, :response].tolist())
    every = [response * (2 * i + 1) // (2 * rows) + 1 for i in range(rows)]

    def step(lengths: Sequence[int], loss: Callable[[dict], Tensor]) -> float:
        began = clock()
        for length in lengths:
            cut = Pair(pair.prompt_ids, pair.chosen_ids[:length], pair.rejected_ids[:length])
            loss({name: t.to(rm.device) for name, t in collate([cut], pad_id=0).items()}).backward()
        rm.zero_grad()
        if rm.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    def all_prefixes(batch: dict[str, Tensor]) -> Tensor:
        rewards = at_response_tokens(prefix_rewards(rm, batch["input_ids"], batch["attention_mask"]), batch)
        return partial_bradley_terry_loss(*rewards, batch["chosen_lengths"], batch["rejected_lengths"])

    def one_prefix(batch: dict[str, Tensor]) -> Tensor:
        return bradley_terry_loss(*final_rewards(rm, batch["input_ids"], batch["attention_mask"]).chunk(2))

    return {
        "one pass": lambda: step([response], all_prefixes),
        "a row per prefix": lambda: step(every, one_prefix) * response / rows,
    }


def ideal_speed_up(prompt: int, response: int) -> float:
    """Tokens read with a row per prefix over those read in one pass: n (P + (n + 1) / 2) / (P + n).

    >>> ideal_speed_up(128, 32)
    28.9
    """
    return response * (prompt + (response + 1) / 2) / (prompt + response)
