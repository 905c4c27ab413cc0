"""Prompts in, texts out: the named methods over a file of prompts, in batches, one record per text.

In float32 a text depends only on (seed, prompt number, sample number), so a run that is interrupted, resumed or sharded
writes the same texts as one that is not. In bfloat16 and float16 it depends on its batch, too: a resumed run writes the
same texts with the same batch size.
"""

import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min import decode, scoring
from pargs_min.codec import Codec, check_vocabularies, left_pad, shares_ids
from pargs_min.memory import enough_memory
from pargs_min.methods import METHODS, Batch, Method, Setup, guided_by
from pargs_min.reading import reads_chats, text_rewards
from pargs_min.reward_model import (
    OBJECTIVES,
    check_rates_texts,
    context_length,
    has_vocabulary_head,
    is_language_model,
    pooled_padding,
    rates_texts,
    recorded,
)
from pargs_min.static import StaticPolicy, StaticScorer
from pargs_min.trunk import TrunkScorer, one_query_scorer, share_trunk

Model: TypeAlias = PreTrainedModel | None
Guide: TypeAlias = tuple[Model, PreTrainedTokenizerBase | None]
Numbers = Sequence[tuple[int, int]]  # prompt number and sample number of each text
MOST_LOGITS = 2**28  # read at once of texts that are read again: a gigabyte in float32, and as much to add them up


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a text are chosen.

    Args:
        beta: Weight of the reward, in nats per unit of reward: the inverse of the beta of DPO and TRL.
        top_k: Candidates per step of guided methods, 0 for the whole vocabulary. Default: 10.
        min_ref_prob: Tokens that the reference finds less likely than this are no candidates.
        truncate: Draw from the candidates alone, as the paper does. Default: all other tokens keep the probability that
            the reference gives them.
        guide_below: Leave steps unguided whose likeliest token is at least this likely to the reference, or is the only
            candidate. The guide is not read where that is so of all texts of a batch: it pays with --batch-size 1.
        max_new_tokens: Length limit of a response, in tokens.
        temperature: Of the guided policy: divides log pi_ref + beta * r.
        ref_temperature: Temperature of the reference, before it is guided; KL is to what it then is.
        ref_top_k: The reference is sampled from so many likeliest tokens, 0 for all.
        ref_top_p: The same, from the likeliest tokens that make up this probability.
        ref_min_p: The same, from tokens at least this times as likely as the likeliest.
    """

    beta: float = 1.0
    top_k: int | None = None
    min_ref_prob: float = 0.0
    truncate: bool = False
    guide_below: float | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    ref_temperature: float = 1.0
    ref_top_k: int = 0
    ref_top_p: float = 1.0
    ref_min_p: float = 0.0

    @property
    def warp(self) -> decode.Warp:
        return decode.Warp(self.ref_temperature, self.ref_top_k, self.ref_top_p, self.ref_min_p)


@dataclass(frozen=True)
class Decoding(Tokens):
    """How one text is written; the same for all texts of a run.

    Args:
        n: Samples behind each text of best-of-n.
        particles: Particles behind each text of smc.
    """

    n: int = 10
    particles: int = 8


def generate_texts(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict],
    *,
    method: str,
    reward_model: PreTrainedModel | None = None,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    final_reward_model: PreTrainedModel | None = None,
    final_reward_tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_format: str | None = None,
    now: datetime | None = None,
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    compiled: bool = False,
    shard: tuple[int, int] = (0, 1),
    done: Mapping[tuple[int, int], list[int] | None] | None = None,
    on_step: Callable[[decode.Step], None] | None = None,
    **settings,
) -> Iterator[dict]:
    """Yield one record per prompt and sample, in order.

    Args:
        prompts: records of `read_prompts`.
        method: a name of `METHODS`; all but "plain" need a reward model.
        reward_tokenizer: the reward model's; None means that it is the language model's.
        final_reward_model: what smc weighs whole texts by, and `reward` then reports; None means `reward_model`.
        prompt_format: the form of the prompts, see `encode_prompt`. None means what the reward model, or else the
            language model, was trained on; of models from elsewhere, "chat" where there is a chat template.
        now: the time that a chat template is told which writes the date.
        num_samples: texts per prompt.
        batch_size: rows decoded together.
        compiled: decode with the steppers of `pargs_min.static`, where there is one for the reward model's scorer.
        shard: (i, n) writes the texts of part i of n alone (`shard_range`), the same as all parts together would.
        done: (prompt number, sample number) of records that need not be made again, each with the prompt's ids (None:
            not known) for comparison.
        on_step: as in `generate`.
        settings: the fields of `Decoding`.

    Yields:
        prompt as given, prompt_ids (what the models read) and prompt_format, prompt_number, sample, response (text),
        response_ids, finished (whether it ended by itself), method, ref_log_prob (nats), kl (nats, see `methods.py`),
        reference (its `Warp`, if any), cost (this text's share of its batch: seconds, and model_calls, forward passes
        of one row by any model), and with a reward model `reward` of the whole response.

    Raises:
        ValueError: for an argument out of range, no prompt, a prompt that leaves no room in a model's context, or
            models that were trained on prompts of different forms: before any text is generated.
        MemoryError: where a batch is too large, saying what to lower; the records before it have been yielded.
    """
    how = Decoding(**settings)
    _check(method, how, prompts, reward_model, final_reward_model, num_samples=num_samples, batch_size=batch_size)
    guides = ((reward_model, reward_tokenizer), (final_reward_model, final_reward_tokenizer))
    same = [model for model, theirs in guides if model is not None and shares_ids(tokenizer, theirs)]
    form = common_form(prompt_format, *same) or recorded(lm).get("prompt_format")
    codec = Codec.of(lm, tokenizer, form, now=now)
    if form is None and codec.form == "chat" and any(isinstance(prompt.get("prompt"), str) for prompt in prompts):
        warnings.warn(
            "text prompts become a user's message, because the tokenizer has a chat template; with prompt_format "
            '(--prompt-format) "text" they are continued as they stand',
            stacklevel=2,
        )
    if not codec.ends:
        warnings.warn("the tokenizer has no end token: every text will have max_new_tokens tokens", stacklevel=2)
    writer = _Writer(METHODS[method], how, codec, lm, prompts, *guides, compiled, on_step)

    # The batches are those of a run from the beginning, since in half precision the rows of a batch change each other.
    skip, size = dict(done or {}), max(1, batch_size // writer.setup.rows)
    for (number, _), ids in skip.items():
        if ids is not None and ids != writer.encoded[number]:
            raise ValueError(f"prompt number {number} has other token ids now than in the texts that are done")
    numbers = [(p, s) for p in shard_range(len(prompts), shard) for s in range(num_samples)]
    for batch in (numbers[start : start + size] for start in range(0, len(numbers), size)):
        if any(number not in skip for number in batch):
            records = writer.write(batch, seed)
            yield from (record for number, record in zip(batch, records, strict=True) if number not in skip)


@dataclass
class _Writer:
    """Writes batches of texts, and says what they cost."""

    method: Method
    how: Decoding
    codec: Codec
    lm: PreTrainedModel
    prompts: list[dict]
    reward: Guide
    final: Guide
    compiled: bool
    on_step: Callable[[decode.Step], None] | None

    def __post_init__(self) -> None:
        method, how, codec, lm = self.method, self.how, self.codec, self.lm
        self.encoded = [_encode(codec, prompt, number) for number, prompt in enumerate(self.prompts)]
        top_k = (min(10, codec.vocabulary) if method.guided else 0) if how.top_k is None else how.top_k
        candidates: dict[str, Any] = {name: getattr(how, name) for name in ("min_ref_prob", "truncate", "guide_below")}
        candidates["top_k"] = top_k
        if not method.guided and any(candidates.values()):
            raise ValueError(
                "top_k, min_ref_prob, truncate and guide_below are about the candidates of guided methods, and "
                f"{method.name} has none; to sample the reference from its k likeliest tokens use ref_top_k "
                "(--ref-top-k)"
            )

        # Whom to ask, and how.
        longest = longest_text(self.encoded, how.max_new_tokens, lm)
        policy: decode.PolicyStepper = decode.ModelPolicy(lm, vocabulary=codec.vocabulary)
        self.raters = self.reward[0], self.final[0]
        for guide in filter(None, self.raters):
            share_trunk(lm, guide)
        reward_fn, scorer = self._reward(*self.reward, guided=method.guided)
        weigh, _ = self._reward(*self.final, guided=False)
        if self.compiled and how.guide_below is not None:
            raise ValueError("guide_below (--guide-below) does not go with --compile, whose steps read one token")
        if self.compiled:
            policy = StaticPolicy(lm, longest, vocabulary=codec.vocabulary)
            if isinstance(scorer, scoring.SiblingScorer) and (top_k or codec.vocabulary) <= scoring.MOST:
                scorer = StaticScorer(scorer.model, longest + (top_k or codec.vocabulary))
        self.rate = weigh or reward_fn
        settings = dict(max_new_tokens=how.max_new_tokens, temperature=how.temperature, eos=codec.ends)
        self.setup = Setup(
            policy if how.warp == decode.Warp() else decode.WarpedPolicy(policy, how.warp),
            candidates | settings | dict(on_step=self.on_step),
            how.beta if method.guided else 0.0,
            scorer,
            self.rate,
            rows=getattr(how, method.rows) if method.rows else 1,
        )
        # Passes are counted by hooks, but compiled steps count their own.
        self.static = [one for one in (policy, scorer) if isinstance(one, (StaticPolicy, StaticScorer))]
        read = lm, *self.raters, scorer.model if isinstance(scorer, TrunkScorer) else None
        self.hooked = [one for one in read if all(one is not stepper.model for stepper in self.static)]

    def _reward(
        self, model: Model, tokenizer: PreTrainedTokenizerBase | None, *, guided: bool
    ) -> tuple[scoring.RewardFn | None, decode.RewardScorer | None]:
        """The fastest right way to ask this reward model: of whole texts, and of the candidates of a step."""
        if model is None:
            return None, None
        codec, tokens, lm = self.codec, self.how.max_new_tokens, None if self.compiled else self.lm
        tokenizer = tokenizer or codec.tokenizer
        if is_language_model(model):
            check_vocabularies(codec.tokenizer, tokenizer)
            longest_text(self.encoded, tokens, model)
            return None, language_model_scorer(lm, model, codec.vocabulary)
        try:
            check_vocabularies(codec.tokenizer, tokenizer)
            form = common_form(None, model) or codec.form
            check_prompts(Codec(tokenizer, form, now=codec.now), self.prompts, self.encoded)
        except ValueError as error:
            longest = longest_text(self.encoded, tokens)
            warnings.warn(f"{error}. Falling back to decoded texts: {_reencoding(longest)}", stacklevel=3)
            reward_fn = text_rewards(model, tokenizer, codec, self.prompts)
            return reward_fn if rates_texts(model) else None, scoring.ReencodeScorer(reward_fn)
        longest = longest_text(self.encoded, tokens, model)
        scorer = choose_scorer(model, longest, codec.ends or (), lm) if guided else None
        if not rates_texts(model):
            return None, scorer
        if reads_chats(model, tokenizer):
            return text_rewards(model, tokenizer, codec, self.prompts), scorer
        return scoring.model_rewards(model), scorer

    def write(self, numbers: Numbers, seed: int) -> Iterator[dict]:
        """The records of a batch of (prompt number, sample number)."""
        batch = self._batch(numbers, seed)
        with enough_memory(*self._doing(len(numbers), batch.prompt_ids.shape[1])):
            began = time.perf_counter()
            with counted_passes(*self.hooked) as passes:
                generation, kl = self.method.write(self.method, self.setup, batch)
            with counted_passes(*self.raters) as rated:
                rewards = self.rate and decode.response_rewards(self.rate, batch.prompt_ids, batch.mask, generation)
            seconds = time.perf_counter() - began
        calls = passes["rows"] + rated["rows"] + sum(stepper.passes for stepper in self.static)
        cost = {"seconds": seconds / len(numbers), "model_calls": calls / len(numbers)}
        return self._records(numbers, generation, kl, rewards, cost)

    def _batch(self, numbers: Numbers, seed: int) -> Batch:
        """The first numbers of a row's stream draw its tokens; by the rest smc chooses among particles."""
        tokens, rows = self.how.max_new_tokens, self.setup.rows
        prompts, samples = zip(*[(p, s * rows + i) for p, s in numbers for i in range(rows)], strict=True)
        uniforms = decode.row_uniforms(seed, prompts, samples, 2 * tokens + 1)
        tensors = (*left_pad([self.encoded[p] for p, _ in numbers]), uniforms[:, :tokens], uniforms[::rows, tokens:])
        return Batch(*(tensor.to(self.lm.device) for tensor in tensors))

    def _doing(self, texts: int, width: int) -> tuple[str, str]:
        """What a batch takes, and what to lower where that is too much."""
        flag, tokens, rows = self.method.rows and f"--{self.method.rows}", self.how.max_new_tokens, self.setup.rows
        doing = f"decoding {texts} texts at once, prompts of up to {width} tokens, --max-new-tokens {tokens}"
        doing += f", {flag} {rows} rows per text" if flag else ""
        if texts > 1:
            lower = f"lower --batch-size (here to {texts * rows // 2} or less) and go on with --resume"
            return doing, f"{lower}; the texts so far are kept, and in float32 the others stay what they would be"
        lower = (f"{flag}, " if flag else "") + "--max-new-tokens or the prompts' length"
        less = f"it is one text, so --batch-size cannot help; write another file with less {lower}"
        return doing, f"{less}, or --dtype bfloat16"

    def _records(
        self, numbers: Numbers, generation: decode.Generation, kl: Tensor, rewards: Tensor | None, cost: dict
    ) -> Iterator[dict]:
        ref_log_probs = generation.ref_log_probs.sum(-1).tolist()
        for i, (number, sample) in enumerate(numbers):
            ids = generation.tokens[i, : generation.lengths[i]].tolist()
            record = {"prompt": self.prompts[number].get("prompt"), "prompt_ids": self.encoded[number]}
            record |= {"prompt_format": self.codec.form, "prompt_number": number, "sample": sample}
            record |= {"response": self.codec.text(ids), "response_ids": ids}
            record |= {"finished": self.codec.finished(ids), "method": self.method.name}
            record |= {"ref_log_prob": ref_log_probs[i], "kl": kl[i].item(), "cost": cost}
            record |= {} if self.how.warp == decode.Warp() else {"reference": vars(self.how.warp)}
            record |= {"now": self.codec.now.isoformat()} if self.codec.now and self.codec.dated else {}
            yield record if rewards is None else record | {"reward": rewards[i].item()}


def shard_range(prompts: int, shard: tuple[int, int]) -> range:
    """Numbers of the prompts of part i of n: equal parts but for one prompt, which follow each other.

    >>> [list(shard_range(5, (i, 2))) for i in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    i, n = shard
    return range(prompts * i // n, prompts * (i + 1) // n)


def _check(method: str, how: Decoding, prompts: list[dict], reward_model: Model, final: Model, **counts: int) -> None:
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    counts |= dict(n=how.n, particles=how.particles, max_new_tokens=how.max_new_tokens)
    for name, value in counts.items():
        if not 1 <= value <= 1_000_000:
            raise ValueError(f"{name} must be at least 1, and at most 1,000,000, got {value}")
    if final is not None and METHODS[method].rows != "particles":
        raise ValueError(f"final_reward_model (--final-reward-model) is for method smc alone, not for {method}")
    for name in ("n", "particles"):
        if name != METHODS[method].rows and getattr(how, name) != getattr(Decoding, name):
            raise ValueError(f"{name} (--{name}) has no effect with method {method}: leave it out")
    if METHODS[method].needs_reward:
        check_guide(method, how.warp, reward_model)
    if METHODS[method].rows:
        check_rates_texts(final or reward_model)


def check_guide(method: str, warp: decode.Warp, reward_model: Model) -> None:
    """Warns of a guide that was trained for something else. Raises ValueError if there is none, or it cannot be one."""
    if reward_model is None:
        raise ValueError(f"method {method} needs a reward model (--reward-model)")
    if METHODS[method].rows and is_language_model(reward_model):
        raise ValueError(f"method {method} needs rewards of whole texts, and a language model as guide gives none")
    objective, wanted = recorded(reward_model).get("objective", "full"), METHODS[method].objective
    if objective == "dpo" and warp != decode.Warp():
        raise ValueError(
            "the reward of a model fine-tuned by DPO is to the reference as it is: leave out ref_temperature "
            "(--ref-temperature) and the like; temperature (--temperature) divides the whole sum"
        )
    if wanted not in (None, objective):
        what = f"{OBJECTIVES[objective]} is {guided_by(objective)}"
        warnings.warn(f"{method} with {what}; train one with --objective {wanted}", stacklevel=4)
    learned_on = decode.recorded_warp(recorded(reward_model).get("reference", vars(warp)), "the guide")
    if learned_on != warp:
        warnings.warn(
            f"this guide learned from texts of the reference sampled as {learned_on}, and guides it sampled as "
            f"{warp}: what it expects of a prefix is not what follows",
            stacklevel=4,
        )
    if not recorded(reward_model).get("append_eos", True):
        warnings.warn(
            "this reward model was trained on responses without an end token: its reward of ending is extrapolation",
            stacklevel=4,
        )


def _encode(codec: Codec, prompt: dict, number: int) -> list[int]:
    try:
        return codec.prompt(prompt)
    except ValueError as error:
        raise ValueError(f"prompt number {number}: {error}") from None


def longest_text(encoded: list[list[int]], max_new_tokens: int, *models: PreTrainedModel | None) -> int:
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


def common_form(asked: str | None, *reward_models: PreTrainedModel) -> str | None:
    """The form of prompts that these models were trained on; None where none says.

    Raises:
        ValueError: if they differ, or another was asked for.
    """
    forms = [asked, *(recorded(model).get("prompt_format") for model in reward_models)]
    known = sorted({form for form in forms if form not in (None, "ids")})
    if len(known) > 1:
        raise ValueError(
            f"the prompts cannot be {' and '.join(known)} at once: the reward models of a run, and prompt_format "
            "(--prompt-format), must be for one form"
        )
    return known[0] if known else None


def check_prompts(codec: Codec, prompts: list[dict], encoded: list[list[int]]) -> None:
    """Raises ValueError if a reward model reads a prompt otherwise than the language model does."""
    for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        if codec.prompt(prompt) != ids:
            raise ValueError(f"the reward model reads prompt number {number} differently (another chat template?)")


def language_model_scorer(lm: Model, guide: PreTrainedModel, vocabulary: int) -> decode.RewardScorer:
    """The scorer of a guide that is itself a language model, as it was trained (`one_query_scorer`)."""
    how = dict(beta=recorded(guide).get("beta"), vocabulary=vocabulary)
    return one_query_scorer(lm, guide, partial(scoring.LanguageModelScorer, **how))


def choose_scorer(
    model: PreTrainedModel, longest: int, ends: Collection[int] = (), lm: PreTrainedModel | None = None
) -> decode.RewardScorer:
    """The fastest scorer that is right for this model and texts of up to `longest` tokens.

    `VocabularyScorer` for a vocabulary head, `SiblingScorer` for others where it is right, else `ReencodeScorer`, with
    a warning.

    Args:
        ends: ids that end a response.
        lm: the language model, whose lowest layers a vocabulary-headed model may share (`one_query_scorer`).
    """
    if has_vocabulary_head(model):
        return one_query_scorer(lm, model, scoring.VocabularyScorer)
    if (pad := pooled_padding(model)) in ends:
        why = f"this reward model takes an end token ({pad}) for padding, and reads a text that has ended before it"
    else:
        try:
            scorer = scoring.SiblingScorer(model)
            if scorer.window is None or longest <= scorer.window:
                return scorer
            why = f"texts of up to {longest} tokens outgrow the reward model's attention window of {scorer.window}"
        except ValueError as error:
            why = str(error)
    warnings.warn(f"{why}. Falling back to whole texts: {_reencoding(longest)}", stacklevel=2)
    return scoring.ReencodeScorer(scoring.model_rewards(model))


def _reencoding(longest: int) -> str:
    return (
        f"every token costs top_k reward passes over a whole text, here of up to {longest} tokens, instead of one pass "
        "over top_k + 1 tokens"
    )


@contextmanager
def counted_passes(*models: PreTrainedModel | None) -> Iterator[Counter]:
    """Count the `passes` of the models' backbones, their `rows` and the `tokens` they read, while this is open, in this
    thread: another one may use the same models.

    Not for models whose steps are compiled: a hook would be compiled in, and make every step compile anew.
    """
    passes: Counter = Counter()
    ours = threading.get_ident()

    def count(body: PreTrainedModel, args: tuple, output) -> None:
        if threading.get_ident() == ours:
            passes.update(passes=1, rows=len(output[0]), tokens=output[0].shape[:2].numel())

    hooks = [model.base_model.register_forward_hook(count) for model in models if model is not None]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def text_log_probs(lm: PreTrainedModel, codec: Codec, texts: Sequence[dict], batch_size: int = 32) -> list[float]:
    """log pi(response | prompt) in nats of records of `generate_texts`, by a model that need not have written them.

    The model is sampled as the reference of each record was (`Warp`): what it then never writes has -inf.

    Raises:
        ValueError: for a record without ids, or with those of another tokenizer.
    """
    for text in texts:
        if not codec.wrote(text) or "response_ids" not in text:
            raise ValueError(
                f"prompt number {text['prompt_number']}, sample {text['sample']}: its response_ids are not of this "
                "model's tokenizer; take the model that wrote it, or one with the same tokenizer"
            )
    longest = 1 + max((len(text["response_ids"]) for text in texts), default=0)
    batch_size = max(1, min(batch_size, MOST_LOGITS // (longest * codec.vocabulary)))
    totals = []
    runs = (
        (decode.recorded_warp(how, f"prompt number {(run := [*some])[0].get('prompt_number')}"), run)
        for how, some in groupby(texts, lambda text: text.get("reference", {}))
    )
    batches = ((warp, run[i : i + batch_size]) for warp, run in runs for i in range(0, len(run), batch_size))
    for warp, some in batches:
        prompt_ids, mask = left_pad([codec.prompt(text) for text in some])
        responses, written = (x.flip(1) for x in left_pad([text["response_ids"][::-1] for text in some]))
        ids, mask = torch.cat([prompt_ids, responses], 1).to(lm.device), torch.cat([mask, written], 1).to(lm.device)
        log_probs = decode.response_log_probs(lm, ids, mask, responses.shape[1], warp, codec.vocabulary)
        totals += log_probs.double().masked_fill(written.to(lm.device) == 0, 0.0).sum(1).tolist()
    for text, total in zip(texts, totals, strict=True):
        if math.isnan(total):
            raise FloatingPointError(
                f"prompt number {text['prompt_number']}, sample {text['sample']}: its log-probability is not a number; "
                "the weights may be damaged"
            )
    return totals
