"""What a guided token costs: against plain generation, against the least it can cost, and against the published loops.

A way of generating is a function that calls `tick` once per token; the time between two ticks is the time of a token.
Ways are compared within a round, in which each writes some tokens and, on a CPU, they take turns token by token; a
ratio is the median over the rounds. A machine that is busy with other work then slows both sides of it.
"""

import copy
import json
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Condition

import torch
import transformers
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GenerationConfig, PreTrainedModel

from pargs_min import minimal
from pargs_min.data import Pair, at_response_tokens, collate
from pargs_min.decode import ModelPolicy, PolicyStepper, RewardGuidance, RewardScorer, generate
from pargs_min.losses import partial_bradley_terry_loss
from pargs_min.models import give_vocabulary_head
from pargs_min.reward_model import body_and_head, head_rewards, prefix_rewards
from pargs_min.scoring import CachedText, LanguageModelScorer, SiblingScorer, VocabularyScorer
from pargs_min.static import StaticPolicy, StaticScorer
from pargs_min.texts import counted_passes
from pargs_min.trunk import TrunkScorer, layers_of, one_query_scorer, trunk_parameters

# Name -> a family of models, and how its default configuration is changed.
SHAPES: dict[str, tuple[str, dict]] = json.loads(Path(__file__).with_name("shapes.json").read_text("utf-8"))
COMPILED = "plain, compiled", "our loop, compiled"
Tick = Callable[[], None]
Way = Callable[[Tick], object]


@dataclass(frozen=True)
class Models:
    """A language model, and a reward model with each of the two heads, both on one backbone."""

    lm: PreTrainedModel
    scalar: PreTrainedModel
    vocabulary: PreTrainedModel

    @cached_property
    def guide(self) -> PreTrainedModel:
        """A language model to guide the other: a copy, since time does not depend on what it has learned."""
        return copy.deepcopy(self.lm)

    @cached_property
    def watched(self) -> PreTrainedModel:
        """The language model for `trunk`, on the same weights: what watches its passes would break a compiled one."""
        return copy.deepcopy(self.lm, {id(tensor): tensor for tensor in (*self.lm.parameters(), *self.lm.buffers())})

    @cached_property
    def trunk(self) -> LanguageModelScorer | VocabularyScorer | TrunkScorer:
        """The same as `guide`, on the language model's own embeddings and lowest four of five layers."""
        layers = 4 * len(layers_of(self.lm)) // 5
        below = trunk_parameters(self.lm, layers) if layers else {}
        guide = copy.deepcopy(self.lm, {id(weight): weight for weight in below.values()})
        guide.config.pargs = dict(shared_layers=layers)
        return one_query_scorer(self.watched, guide, partial(LanguageModelScorer, beta=1.0))


@dataclass(frozen=True)
class Setting:
    """What every way is given to do.

    Args:
        top_k: Candidates per step.
        batch_size: Texts decoded together.
        prompt_length: Tokens per prompt.
        tokens: Tokens that each way of generating writes in each round.
    """

    top_k: int = 10
    batch_size: int = 1
    prompt_length: int = 128
    tokens: int = 8


def models_of_shape(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Models:
    """Models of one of the `SHAPES`, with random weights: their time does not depend on what they have learned."""
    family, changes = SHAPES[name]
    config = transformers.AutoConfig.for_model(family, **changes)
    torch.manual_seed(0)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        config.num_labels = 1
        scalar = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    return Models(lm, scalar, with_vocabulary_head(scalar))


def with_vocabulary_head(scalar: PreTrainedModel) -> PreTrainedModel:
    """The same backbone, shared, under a vocabulary head."""
    model = copy.deepcopy(scalar, {id(scalar.base_model): scalar.base_model})
    give_vocabulary_head(model)
    return model


# ---- the ways ----


def plain(lm: PreTrainedModel, ids: Tensor, tokens: int, tick: Tick, processors: Sequence = (), **settings) -> Tensor:
    """transformers' own `generate`, sampling; no end token is ever drawn."""

    def ticking(input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    never = lm.get_input_embeddings().num_embeddings  # an id that no token has
    settings |= dict(max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=never, pad_token_id=0)
    return lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(**settings),
        logits_processor=list(processors),
        stopping_criteria=[ticking],
    )


@torch.no_grad()
def floor(lm: PreTrainedModel, rm: PreTrainedModel, ids: Tensor, queries: int, tokens: int, tick: Tick) -> None:
    """The least a guided token can cost: a bare step of each model, `queries` tokens of the reward model's.

    No candidates are chosen, no masks are made, nothing is drawn; the caches are those of our loop.
    """
    body, head = body_and_head(rm)
    written = lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    judged = body(input_ids=ids, use_cache=True).past_key_values
    last, siblings = ids[:, -1:], ids[:, :1].repeat(1, queries)
    for _ in range(tokens):
        last = lm(input_ids=last, past_key_values=written, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        head(body(input_ids=siblings, past_key_values=judged, use_cache=True).last_hidden_state)
        judged.crop(1 - queries)
        tick()


def ours(
    policy: PolicyStepper, scorer: RewardScorer, ids: Tensor, top_k: int, tokens: int, tick: Tick, **settings
) -> None:
    """Our loop, over any steppers."""
    settings |= dict(beta=1.0, top_k=top_k, max_new_tokens=tokens)
    generate(policy, scorer, ids, on_step=lambda step: tick(), **settings)


class CopiedScorer(CachedText):
    """ARGS's code as a scorer: one new token for each candidate, behind k copies of the cache.

    The copy that read the winner is then copied k times. Rows cannot be resampled.
    """

    def __init__(self, model: PreTrainedModel, k: int):
        body, self.head = body_and_head(model)
        super().__init__(model, body)
        self.k = k

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        super().start(prompt_ids.repeat_interleave(self.k, 0), mask.repeat_interleave(self.k, 0))
        self.read()

    def score(self, candidates: Tensor, ref_log_probs: Tensor | None = None) -> Tensor:
        self.candidates = candidates
        super().push(candidates.flatten())
        return head_rewards(self.head, self.read().last_hidden_state).view(candidates.shape)

    def push(self, tokens: Tensor) -> None:
        winner = (self.candidates == tokens[:, None]).long().argmax(-1)  # any copy will do for a finished row
        rows = winner + self.k * torch.arange(len(tokens), device=tokens.device)
        self.select(rows.repeat_interleave(self.k))


def uncached(models: Models, ids: Tensor, top_k: int, tick: Tick) -> None:
    """One token of the paper's code, as `minimal.generate` writes it: each text alone, each candidate in its own pass.

    The paper's code also turns ids into text and back at every pass; that is left out. Nothing is cached, so the first
    token costs what all others do, and its time counts from the start.
    """
    tick()
    for prompt in ids:
        minimal.generate(models.lm, models.scalar, prompt, end=-1, beta=1.0, k=top_k, max_new_tokens=1)
    tick()


def all_ways(models: Models, setting: Setting, *names: str) -> dict[str, Way]:
    """Every way of writing in this setting, or those of these names, behind the same random prompts.

    Raises:
        ValueError: if there are not as many candidates as `top_k`.
    """
    lm, rm, k, tokens = models.lm, models.scalar, setting.top_k, setting.tokens
    vocabulary = lm.get_input_embeddings().num_embeddings
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k must lie between 1 and the vocabulary size {vocabulary}, got {k}")
    shape, generator = (setting.batch_size, setting.prompt_length), torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, shape, generator=generator).to(lm.device)
    below_all = 1e-9  # the likeliest of all tokens has more
    policy, siblings, one_query = ModelPolicy(lm), SiblingScorer(rm), VocabularyScorer(models.vocabulary)

    found: dict[str, Way] = {"plain generation": lambda tick: plain(lm, ids, tokens, tick)}
    if ids.is_cuda:
        found |= compiled_ways(models, ids, k, tokens)
    found |= {
        "floor": lambda tick: floor(lm, rm, ids, k + 1, tokens, tick),
        "our loop": lambda tick: ours(policy, siblings, ids, k, tokens, tick),
        "our loop, no step guided": lambda tick: ours(policy, siblings, ids, k, tokens, tick, guide_below=below_all),
        "RewardGuidance": lambda tick: plain(
            lm, ids, tokens, tick, [RewardGuidance(siblings, torch.ones_like(ids), beta=1.0, top_k=k)]
        ),
        "vocabulary floor": lambda tick: floor(lm, models.vocabulary, ids, 1, tokens, tick),
        "vocabulary head": lambda tick: ours(policy, one_query, ids, 0, tokens, tick),
        "reweighted": lambda tick: ours(policy, LanguageModelScorer(models.guide, 1.0), ids, 0, tokens, tick),
        "reweighted, shared trunk": lambda tick: ours(ModelPolicy(models.watched), models.trunk, ids, 0, tokens, tick),
        "k copies of the cache": lambda tick: ours(policy, CopiedScorer(rm, k), ids, k, tokens, tick, truncate=True),
        "k passes, no cache": lambda tick: uncached(models, ids, k, tick),
    }
    return {name: found[name] for name in names or found}


def compiled_ways(models: Models, ids: Tensor, top_k: int, tokens: int, **compile_options) -> dict[str, Way]:
    """The `COMPILED` ways. A forward hook that is on one of their models would make every step compile anew."""
    slots = ids.shape[1] + tokens
    policy = StaticPolicy(models.lm, slots, **compile_options)
    scorer = StaticScorer(models.scalar, slots + top_k, **compile_options)
    return {
        COMPILED[0]: lambda tick: plain(models.lm, ids, tokens, tick, cache_implementation="static"),
        COMPILED[1]: lambda tick: ours(policy, scorer, ids, top_k, tokens, tick),
    }


# ---- the measures ----


def interleaved(ways: Mapping[str, Way], rounds: Iterable[object], device: torch.device) -> dict[str, list[float]]:
    """Seconds per token of each way in each round, after one run of each to warm up."""
    token_seconds(ways, device)
    times = [token_seconds(ways, device) for _ in rounds]
    return {name: [statistics.median(round[name]) for round in times] for name in ways}


def token_seconds(ways: Mapping[str, Way], device: torch.device) -> dict[str, list[float]]:
    """Seconds from tick to tick of each way; the reading of the prompt is not counted."""
    return _taking_turns(ways) if device.type == "cpu" else {name: _gpu_seconds(way) for name, way in ways.items()}


def _taking_turns(ways: Mapping[str, Way]) -> dict[str, list[float]]:
    """Seconds from tick to tick of each way, all of them under way at once and one token of each at a time.

    So they meet the same neighbours. The reading of the prompt is not counted, except of a way that ticks before it.
    """
    turns, changed = deque(ways), Condition()  # whoever is first in line holds the lock, and works
    marks: dict[str, list[float]] = {name: [] for name in ways}  # by turns the end of one token, the start of the next

    def run(name: str) -> None:
        def tick() -> None:
            marks[name].append(clock())
            turns.rotate(-1)
            changed.notify_all()
            changed.wait_for(lambda: turns[0] == name)
            marks[name].append(clock())

        with changed:
            changed.wait_for(lambda: turns[0] == name)
            try:
                ways[name](tick)
            finally:
                turns.remove(name)
                changed.notify_all()

    with ThreadPoolExecutor(len(ways)) as pool:
        list(pool.map(run, ways))  # raises what stopped a way
    return {name: [end - start for start, end in zip(at[1::2], at[2::2], strict=False)] for name, at in marks.items()}


def _gpu_seconds(way: Way) -> list[float]:
    """Seconds from tick to tick by the GPU's own clock, without making the CPU wait for it."""
    marks: list[torch.cuda.Event] = []
    way(lambda: marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))))
    torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]


def clock() -> float:
    """Seconds; on one thread of processor time, which does not count what other programs take."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ratios(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> list[float]:
    """One way's time over another's, round by round.

    >>> ratios({"ours": [2.0, 6.0], "floor": [2.0, 4.0]}, "ours", "floor")
    [1.0, 1.5]
    """
    return [a / b for a, b in zip(seconds[name], seconds[over], strict=True)]


def peak_bytes(way: Way, device: torch.device) -> int:
    """The most memory that tensors hold at any time after the first token, weights not counted.

    On a CPU, the profiler records what is allocated and freed.
    """
    if device.type != "cpu":
        before = torch.cuda.memory_allocated()
        way(cache(torch.cuda.reset_peak_memory_stats))  # at the first tick alone
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way(record_function("pargs.tick")(lambda: None))
    events = profiler.profiler.kineto_results.events()
    first = next(number for number, event in enumerate(events) if event.name() == "pargs.tick")
    return max(list(accumulate(event.nbytes() if event.name() == "[memory]" else 0 for event in events))[first:])


def passes_per_token(way: Way, models: Models) -> dict[str, float]:
    """Forward passes of each model and the tokens they read, per token written; the reading of the prompt left out.

    Not for the `COMPILED` ways (`counted_passes`).
    """
    seen: list[tuple[Counter, Counter]] = []  # the counts at each tick
    guides = models.scalar, models.guide, models.trunk.model
    with counted_passes(models.lm, models.watched) as lm, counted_passes(*guides) as reward:
        way(lambda: seen.append((lm.copy(), reward.copy())))
    return {
        f"{model} {what}": (last[what] - first[what]) / (len(seen) - 1)
        for model, first, last in zip(("lm", "reward"), seen[0], seen[-1], strict=True)
        for what in ("passes", "tokens")
    }


def weight_bytes(*models: PreTrainedModel) -> int:
    """Memory of the weights, each counted once."""
    weights = {w.data_ptr(): w.nbytes for model in models for w in (*model.parameters(), *model.buffers())}
    return sum(weights.values())


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, batch: int, length: int) -> int:
    """Memory of the keys and values of `batch` texts of `length` tokens."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    layers = model.base_model(input_ids=token, use_cache=True).past_key_values.layers
    return batch * length * sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


# ---- training ----


def training_ways(rm: PreTrainedModel, prompt: int, response: int, rows: int = 8) -> dict[str, Way]:
    """The gradient of the loss of every prefix of one pair, in one pass, and that of one prefix in rows of its own.

    The rows are those of `minimal.prefix_loss`, of `rows` evenly spaced prefixes, with a tick after each: times
    `response`, such a step is what all prefixes take. Both responses have the same length, so that no end tokens are
    added.
    """
    ids = torch.randint(rm.get_input_embeddings().num_embeddings, (3, max(prompt, response)), device=rm.device)
    asked, won, lost = ids[0, :prompt], ids[1, :response], ids[2, :response]
    pair = Pair(asked.tolist(), won.tolist(), lost.tolist())

    def one_pass(tick: Tick) -> None:
        tick()
        batch = {name: tensor.to(rm.device) for name, tensor in collate([pair], pad_id=0).items()}
        rewards = at_response_tokens(prefix_rewards(rm, batch["input_ids"], batch["attention_mask"]), batch)
        partial_bradley_terry_loss(*rewards, batch["chosen_lengths"], batch["rejected_lengths"]).backward()
        rm.zero_grad()
        tick()

    def one_row(tick: Tick) -> None:
        tick()
        for row in range(rows):
            i = response * (2 * row + 1) // (2 * rows) + 1
            r_won, r_lost = (minimal.reward(rm, torch.cat([asked, y[:i]])) for y in (won, lost))
            (-logsigmoid(r_won - r_lost)).backward()
            rm.zero_grad()
            tick()

    return {"one pass": one_pass, "a row per prefix": one_row}


def ideal_speed_up(prompt: int, response: int) -> float:
    """Tokens read with a row per prefix over those read in one pass: n (P + (n + 1) / 2) / (P + n).

    >>> ideal_speed_up(128, 32)
    28.9
    """
    return response * (prompt + (response + 1) / 2) / (prompt + response)
