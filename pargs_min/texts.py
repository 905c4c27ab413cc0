"""Prompts in, texts out: the named methods over a file of prompts, in batches, one record per text.

A text depends on (seed, prompt number, sample number) alone, so a run that was interrupted, resumed or divided writes
the texts of one that was not.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.data import encode_prompt
from pargs_min.decode import Generation, ModelPolicy, RewardScorer, Step, row_uniforms
from pargs_min.memory import enough_memory
from pargs_min.methods import GUIDED, METHODS, RewardFn, best_of_n, guided, path_kl, plain, response_rewards
from pargs_min.reward_model import context_length, has_vocabulary_head
from pargs_min.scoring import (
    ReencodeScorer,
    SiblingScorer,
    VocabularyScorer,
    check_vocabularies,
    model_rewards,
    text_rewards,
)
from pargs_min.smc import smc
from pargs_min.static import StaticPolicy, StaticScorer


def generate_texts(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict],
    *,
    method: str,
    reward_model: PreTrainedModel | None = None,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    beta: float = 1.0,
    top_k: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    num_samples: int = 1,
    n: int = 10,
    particles: int = 8,
    final_reward_model: PreTrainedModel | None = None,
    final_reward_tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    seed: int = 0,
    compiled: bool = False,
    shard: tuple[int, int] = (0, 1),
    done: Iterable[tuple[int, int]] = (),
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[dict]:
    """Yield one record per prompt and sample, in order.

    Args:
        prompts: records of `read_prompts`.
        method: one of `METHODS`; all but "plain" need a reward model.
        reward_tokenizer: the reward model's; None means that it is the language model's.
        beta, max_new_tokens, temperature: as in `generate`.
        top_k: candidates per step; by default 10 for guided methods and the whole vocabulary (0) for the others.
        num_samples: texts per prompt.
        n: samples behind each text of best-of-n.
        particles: behind each text of smc.
        final_reward_model: what smc weighs whole texts by, and `reward` then reports; None means `reward_model`.
        batch_size: rows decoded together.
        compiled: decode with the steppers of `pargs_min.static`, where there is one for the reward model's scorer.
        shard: (i, n) writes the texts of part i of n alone (`shard_range`), the same as all parts together would.
        done: (prompt number, sample number) of records that need not be made again.
        on_step: as in `generate`.

    Yields:
        prompt and prompt_ids as given, prompt_number, sample, response (text), response_ids, finished (whether it
        ended by itself), method, ref_log_prob (nats), kl (nats, `path_kl` or `smc`), cost (this text's share of its
        batch: seconds, and model_calls, forward passes of one row by any model), and with a reward model `reward` of
        the whole response.

    Raises:
        ValueError: for an argument out of range, no prompt, or a prompt that leaves no room in a model's context:
            before any text is generated.
        MemoryError: where a batch is too large, saying what to lower; the records before it have been yielded.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    _check(method, reward_model, num_samples=num_samples, n=n, particles=particles, batch_size=batch_size)
    if final_reward_model is not None and method != "smc":
        raise ValueError(f"final_reward_model (--final-reward-model) is for method smc alone, not for {method}")
    if top_k is None:
        top_k = min(10, len(tokenizer)) if method in GUIDED else 0
    format_ = None if reward_model is None else _recorded(reward_model).get("prompt_format")
    encoded = [_encode(tokenizer, prompt, number, format_) for number, prompt in enumerate(prompts)]
    longest = _longest(encoded, max_new_tokens, lm, reward_model, final_reward_model)
    ends = end_tokens(lm, tokenizer)
    reward_fn, scorer = _reward(method, reward_model, reward_tokenizer, tokenizer, ends, longest)
    if final_reward_model is not None:
        reward_fn, _ = _reward("best-of-n", final_reward_model, final_reward_tokenizer, tokenizer, ends, longest)
    policy = ModelPolicy(lm, vocabulary=len(tokenizer))
    if compiled:
        policy = StaticPolicy(lm, longest, vocabulary=len(tokenizer))
        if isinstance(scorer, SiblingScorer):
            scorer = StaticScorer(reward_model, longest + (top_k or len(tokenizer)))
    static = [stepper for stepper in (policy, scorer) if isinstance(stepper, (StaticPolicy, StaticScorer))]
    hooked = [m for m in (lm, reward_model, final_reward_model) if all(m is not stepper.model for stepper in static)]
    skip, group = set(done), {"best-of-n": n, "smc": particles}.get(method, 1)
    rows = [(p, s) for p in shard_range(len(prompts), shard) for s in range(num_samples) if (p, s) not in skip]
    size = max(1, batch_size // group)
    for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
        prompt_ids, mask = (x.to(lm.device) for x in left_pad([encoded[p] for p, _ in batch]))
        streams = [(p, s * group + i) for p, s in batch for i in range(group)]
        # The first max_new_tokens numbers of a row's stream draw its tokens; smc chooses among particles by the rest.
        uniforms = row_uniforms(seed, *zip(*streams, strict=True), 2 * max_new_tokens + 1).to(lm.device)
        uniforms, choices = uniforms[:, :max_new_tokens], uniforms[::group, max_new_tokens:]
        settings = dict(
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos=ends,
            uniforms=uniforms,
            on_step=on_step,
        )
        asked = _asked(batch, prompt_ids, max_new_tokens, method, group)
        with enough_memory(*asked), counted_passes(*hooked) as passes:
            began = time.perf_counter()
            if method == "smc":
                settings |= dict(
                    n=particles, beta=beta, final=final_reward_model and reward_fn, choices=choices[:, :-1]
                )
                generation, kl = smc(policy, scorer, prompt_ids, mask, **settings).pick(choices[:, -1])
            elif method == "plain":
                generation = plain(policy, prompt_ids, mask, **settings)
            elif method == "best-of-n":
                generation = best_of_n(policy, reward_fn, prompt_ids, mask, n=n, **settings)
            else:
                generation = guided(method, policy, scorer, prompt_ids, mask, beta=beta, **settings)
            if method != "smc":
                kl = path_kl(method, generation, n)
        with enough_memory(*asked), counted_passes(reward_model, final_reward_model) as rated:
            rewards = None if reward_fn is None else response_rewards(reward_fn, prompt_ids, mask, generation)
        calls = passes.total() + rated.total() + sum(stepper.passes for stepper in static)
        cost = {"seconds": time.perf_counter() - began, "model_calls": calls}
        cost = {name: total / len(batch) for name, total in cost.items()}
        yield from _records(batch, prompts, tokenizer, method, generation, kl, rewards, ends, cost)


def _asked(batch: list, prompt_ids: Tensor, max_new_tokens: int, method: str, group: int) -> tuple[str, str]:
    """What a batch takes, and what to lower where that is too much."""
    flag = {"best-of-n": "--n", "smc": "--particles"}.get(method)
    doing = f"decoding {len(batch)} texts at once, prompts of up to {prompt_ids.shape[1]} tokens, --max-new-tokens "
    doing += f"{max_new_tokens}" + (f", {flag} {group} rows a text" if flag else "")
    if len(batch) > 1:
        way_out = f"lower --batch-size (here to {len(batch) * group // 2} or less) and go on with --resume; the texts "
        return doing, way_out + "so far are kept, and the others stay what they would be"
    lower = (f"{flag}, " if flag else "") + "--max-new-tokens or the prompts' length"
    return (
        doing,
        f"it is one text, so --batch-size cannot help; write another file with less {lower}, or --dtype bfloat16",
    )


def shard_range(prompts: int, shard: tuple[int, int]) -> range:
    """Numbers of the prompts of part i of n: equal parts but for one prompt, which follow each other.

    >>> [list(shard_range(5, (i, 2))) for i in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    i, n = shard
    return range(prompts * i // n, prompts * (i + 1) // n)


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        ValueError: if it is not of this form, or i does not lie between 0 and n - 1.

    >>> parse_shard("0/4")
    (0, 4)
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(
            f"shard (--shard) must be i/n, part i of n counted from 0, such as 0/4 to 3/4 of four; got {text!r}"
        )
    return int(i), int(n)


# What a reward model makes of the tokenwise policy, by the objective it was trained with.
GUIDES = {
    "partial": ("pargs", "a reward model of prefixes"),
    "full": ("args", "a reward model of whole responses, whose scores of prefixes mean nothing,"),
    "value": ("cd", "a value model"),
}


def _check(method: str, reward_model, **counts: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if method == "plain":
        return
    if reward_model is None:
        raise ValueError(f"method {method} needs a reward model (--reward-model)")
    objective = _recorded(reward_model).get("objective", "full")
    wanted = next((name for name, (its, _) in GUIDES.items() if its == method.removesuffix("-greedy")), objective)
    if objective != wanted:
        its, what = GUIDES[objective]
        warnings.warn(f"{method} with {what} is {its}; train one with --objective {wanted}", stacklevel=3)
    if not _recorded(reward_model).get("append_eos", True):
        warnings.warn(
            "this reward model was trained on responses without an end token: its reward of ending is extrapolation",
            stacklevel=3,
        )


def _recorded(reward_model: PreTrainedModel) -> dict:
    """What training recorded with the reward model; nothing for one from elsewhere, which is full-sequence."""
    return getattr(reward_model.config, "pargs", None) or {}


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: dict, number: int, prompt_format: str | None) -> list[int]:
    try:
        return encode_prompt(tokenizer, prompt.get("prompt_ids", prompt.get("prompt")), prompt_format)
    except ValueError as error:
        raise ValueError(f"prompt number {number}: {error}") from None


def _longest(encoded: list[list[int]], max_new_tokens: int, *models: PreTrainedModel | None) -> int:
    """Tokens of the longest text that a run can write; an error now, not hours later, where a model cannot read it."""
    number = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    longest = len(encoded[number]) + max_new_tokens
    for model in filter(None, models):
        limit = context_length(model)
        if limit is not None and longest > limit:
            raise ValueError(
                f"prompt number {number} has {len(encoded[number])} tokens; with max_new_tokens={max_new_tokens} that "
                f"exceeds the context of {limit} of {type(model).__name__}; shorten it, or lower max_new_tokens"
            )
    return longest


def _reward(
    method: str,
    model: PreTrainedModel | None,
    tokenizer,
    lm_tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    longest: int,
) -> tuple[RewardFn | None, RewardScorer | None]:
    """The fastest right way to ask this reward model: of whole texts, and of the candidates of a step."""
    if model is None:
        return None, None
    try:
        check_vocabularies(lm_tokenizer, tokenizer or lm_tokenizer)
        reward_fn = model_rewards(model)
    except ValueError as error:
        warnings.warn(f"{error}. Falling back to the latter: {_reencoding(longest)}", stacklevel=3)
        reward_fn = text_rewards(model, tokenizer, lm_tokenizer, ends)
        return reward_fn, ReencodeScorer(reward_fn)
    if method not in GUIDED:
        return reward_fn, None
    return reward_fn, choose_scorer(model, longest)


def choose_scorer(model: PreTrainedModel, longest: int) -> RewardScorer:
    """The fastest scorer that is right for this model and texts of up to `longest` tokens.

    `VocabularyScorer` for a vocabulary head, `SiblingScorer` for others where it is right, else `ReencodeScorer`, with
    a warning.
    """
    if has_vocabulary_head(model):
        return VocabularyScorer(model)
    try:
        scorer = SiblingScorer(model)
        if scorer.window is None or longest <= scorer.window:
            return scorer
        why = f"texts of up to {longest} tokens outgrow the reward model's attention window of {scorer.window}"
    except ValueError as error:
        why = str(error)
    warnings.warn(f"{why}. Falling back to whole texts: {_reencoding(longest)}", stacklevel=2)
    return ReencodeScorer(model_rewards(model))


def _reencoding(longest: int) -> str:
    return (
        f"every token costs top_k reward passes over a whole text, here of up to {longest} tokens, instead of one pass "
        "over top_k + 1 tokens"
    )


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's end token first, then those of the generation configuration."""
    configured = lm.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return list(dict.fromkeys(end for end in ends if end is not None))


@contextmanager
def counted_passes(*models: PreTrainedModel | None) -> Iterator[Counter]:
    """Count the forward passes of the models' backbones, a row each, while this is open.

    Not for models whose steps are compiled: a hook would be compiled in, and make every step compile anew.
    """
    passes: Counter = Counter()
    hooks = [
        model.base_model.register_forward_hook(lambda body, args, output: passes.update(rows=len(output[0])))
        for model in models
        if model is not None
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def left_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, P), of token lists padded on the left (with id 0, which the mask hides).

    >>> left_pad([[5, 6], [7]])[0]
    tensor([[5, 6],
            [0, 7]])
    """
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])).long()


def _records(batch, prompts, tokenizer, method, generation: Generation, kl, rewards, ends, cost) -> Iterator[dict]:
    ref_log_probs = generation.ref_log_probs.sum(-1).tolist()
    for i, (number, sample) in enumerate(batch):
        ids = generation.tokens[i, : generation.lengths[i]].tolist()
        record = {
            **{name: prompts[number][name] for name in ("prompt", "prompt_ids") if name in prompts[number]},
            "prompt_number": number,
            "sample": sample,
            "response": tokenizer.decode(ids, skip_special_tokens=True),
            "response_ids": ids,
            "finished": ids[-1] in ends,
            "method": method,
            "ref_log_prob": ref_log_probs[i],
            "kl": kl[i].item(),
            "cost": cost,
        }
        yield record if rewards is None else record | {"reward": rewards[i].item()}


def write_records(path: str | os.PathLike, records: Iterable[dict], settings: dict) -> Iterator[dict]:
    """Append each record, with the run's settings, to a JSONL file as it comes, and pass it on."""
    with open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record | {"settings": settings}, ensure_ascii=False) + "\n")
            file.flush()
            yield record


def read_done(path: str | os.PathLike, settings: dict, prompts: list[dict]) -> set[tuple[int, int]]:
    """(prompt number, sample number) of the records that an interrupted run left; a half-written last line is removed.

    Raises:
        ValueError: naming file and line, if they were made with other settings or for other prompts than these.
    """
    path, done = Path(path), set()
    if not path.exists():
        return done
    whole, _, broken = path.read_bytes().rpartition(b"\n")
    if broken:
        os.truncate(path, len(whole) + 1 if whole else 0)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            prompt_number, theirs = record["prompt_number"], record["settings"]
            done.add((prompt_number, record["sample"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not a record of `pargs generate` ({error!r}); write to another file"
            ) from None
        if differ := differences(theirs, settings):
            raise ValueError(f"{path}:{number} was made with other settings ({differ}); write to another file")
        asked = prompts[prompt_number] if prompt_number < len(prompts) else {}
        if any(record.get(name) != asked.get(name) for name in ("prompt", "prompt_ids")):
            raise ValueError(
                f"{path}:{number} was written for another prompt number {prompt_number}: the prompts have changed "
                "since; write to another file"
            )
    return done


def differences(theirs: dict, ours: dict) -> str:
    """Which of our settings an earlier run had otherwise; empty where none.

    >>> differences({"seed": 5, "beta": 1.0}, {"seed": 6, "beta": 1.0})
    'seed 5 there, 6 now'
    """
    return "; ".join(
        f"{key} {theirs.get(key)!r} there, {value!r} now" for key, value in ours.items() if theirs.get(key) != value
    )
