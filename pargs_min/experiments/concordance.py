"""Siblings: the candidates after one prefix, what their completions are worth, and who orders them so.

The guarantee that guidance never loses (`theory/`, T7) needs one thing of a partial reward: that it orders siblings as
the win rates of their completions do. Accuracy over unrelated pairs does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.codec import encode_prompt, end_tokens, left_pad
from pargs_min.decode import ModelPolicy
from pargs_min.texts import choose_scorer, generate_texts
from pargs_min.world.automaton import Array, sample, win_rates
from pargs_min.world.journey import Journey

Score = Callable[[list[dict]], list]  # records of `generate_texts` -> one reward each


class Siblings(NamedTuple):
    """The K candidates after one prefix.

    prefix_ids: prompt and response so far; candidates (K,) token ids; log_probs (K,) under the reference, in nats;
    win_rates (M, K): how often their completions beat whole responses to the prompt, by M independent estimates.
    """

    prefix_ids: list[int]
    candidates: list[int]
    log_probs: list[float]
    win_rates: list[list[float]]


def concordance(
    scores: Sequence[Array], values: Sequence[Array], log_probs: Sequence[Array], power: float = 0.0
) -> float:
    """The share of sibling pairs that scores order as values do; ties of scores count half.

        sum_a sum_{t < t'} w [(s(at) - s(at')) (W(at) - W(at')) > 0]  /  sum_a sum_{t < t'} w,
        w = p(t | a) p(t' | a) |W(at) - W(at')|^power

    over the pairs whose values differ, weighed as the reference meets them, for prefixes a that it has written.
    With power 0 every such pair counts alike. With power 2 it counts by what there is to win: what a small tilt by s
    gains is Cov_t(W, s) = sum_{t < t'} p(t) p(t') (W(at) - W(at')) (s(at) - s(at')) (T7), and the best s is W itself.

    Args:
        scores, values, log_probs: for each prefix (K,) numbers, K may vary; log_probs in nats.

    Returns:
        In [0, 1]; nan where no two values differ.

    >>> concordance([np.array([3.0, 1.0, 2.0])], [np.array([0.9, 0.5, 0.1])], [np.log([0.5, 0.25, 0.25])])
    0.8
    """
    alike = total = 0.0
    for s, w, log_p in zip(scores, values, log_probs, strict=True):
        first, second = np.triu_indices(len(s), 1)
        apart = np.abs(w[first] - w[second])
        weight = np.exp(log_p[first] + log_p[second]) * np.where(apart > 1e-12, apart**power, 0.0)
        agreement = np.sign(s[first] - s[second]) * np.sign(w[first] - w[second])
        alike += float(weight @ (1 + agreement)) / 2
        total += float(weight.sum())
    return alike / total if total else float("nan")


@torch.no_grad()
def score(model: PreTrainedModel, siblings: Sequence[Siblings], batch_size: int = 256) -> list[Array]:
    """(K,) rewards of the candidates of each prefix, by the scorer that decoding uses."""
    scores, device = [], model.device
    scorer = choose_scorer(model, max(len(one.prefix_ids) for one in siblings) + 1)
    for some in (siblings[i : i + batch_size] for i in range(0, len(siblings), batch_size)):
        widest = max(len(one.candidates) for one in some)
        padded = [one.candidates + one.candidates[:1] * (widest - len(one.candidates)) for one in some]
        scorer.start(*(x.to(device) for x in left_pad([one.prefix_ids for one in some])))
        rewards = scorer.score(torch.tensor(padded, device=device)).double().cpu().numpy()
        scores += [row[: len(one.candidates)] for row, one in zip(rewards, some, strict=True)]
    return scores


def reward_model_concordance(model: PreTrainedModel, siblings: Sequence[Siblings]) -> tuple[float, float]:
    """`concordance` of a reward model's scores with the win rates of completions: every pair alike, and by the gain."""
    scores, values = score(model, siblings), [np.mean(one.win_rates, 0) for one in siblings]
    log_probs = [np.array(one.log_probs) for one in siblings]
    return concordance(scores, values, log_probs), concordance(scores, values, log_probs, power=2)


def ceiling(siblings: Sequence[Siblings]) -> float:
    """Concordance of one half of the estimates with the other: what noise leaves for a perfect scorer to reach.

    1 for exact win rates. A perfect scorer is compared with the mean of both halves, so it can pass this a little.
    """
    halves = [np.array_split(np.array(one.win_rates), 2) for one in siblings]
    first, second = ([half.mean(0) for half in side] for side in zip(*halves, strict=True))
    return concordance(first, second, [np.array(one.log_probs) for one in siblings])


def exact_siblings(
    world: Journey, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: int, seed: int = 0
) -> Iterator[Siblings]:
    """Where the grammar has a choice, along its own journeys: its next words, with the exact win rates of the world."""
    for number, prompt in enumerate(prompts):
        automaton = world.automata[prompt]
        rates, ends = win_rates(automaton), np.append(automaton.first_edges[1:], len(automaton.sources))
        drawn, _ = sample(automaton, np.random.default_rng([seed, number]).random((texts, automaton.horizon)))
        prompt_ids = tokenizer(prompt).input_ids
        for row in drawn:
            state = automaton.start
            for step, token in enumerate(row):
                edges = np.arange(automaton.first_edges[state], ends[state])
                if len(edges) > 1:
                    values = rates[step + 1, automaton.targets[edges]].tolist()
                    yield Siblings(
                        prompt_ids + row[:step].tolist(),
                        automaton.tokens[edges].tolist(),
                        automaton.log_probs[edges].tolist(),
                        [values, values],
                    )
                state = automaton.targets[edges[automaton.tokens[edges] == token][0]]


def rollout_siblings(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict],
    judge: Score,
    *,
    max_new_tokens: int,
    top_k: int = 5,
    completions: int = 8,
    opponents: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> Iterator[Siblings]:
    """The most likely tokens after a quarter, a half and three quarters of a text, each completed several times.

    A completion's win rate is the share of independent texts for the prompt that the judge puts below it, ties half.

    Args:
        prompts: records of `read_prompts`; each gives one prefix a length, cut from its first text.
        completions: of each candidate, an even number; opponents: texts a prompt.
    """
    settings = dict(method="plain", batch_size=batch_size)
    texts = [*generate_texts(lm, tokenizer, prompts, num_samples=opponents, seed=seed, max_new_tokens=max_new_tokens,
                             **settings)]  # fmt: skip
    rewards = np.array(judge(texts), dtype=float).reshape(len(prompts), opponents)
    ends, policy = end_tokens(lm, tokenizer), ModelPolicy(lm, vocabulary=len(tokenizer))
    for length in (max_new_tokens // 4, max_new_tokens // 2, 3 * max_new_tokens // 4):
        for number, prompt in enumerate(prompts):
            prompt_ids = encode_prompt(tokenizer, prompt.get("prompt_ids", prompt.get("prompt")))
            written = texts[number * opponents]["response_ids"][:length]
            if len(written) < length or written[-1] in ends:
                continue
            policy.start(*(x.to(lm.device) for x in left_pad([prompt_ids + written])))
            log_probs, tokens = policy.log_probs()[0].topk(top_k)
            starts = [[*written, token] for token in tokens.tolist()]
            whole = [
                {**prompt, "prompt_number": number, "sample": i, "response_ids": start, "finished": start[-1] in ends}
                for start in starts
                for i in range(completions)
            ]
            asked = [{"prompt_ids": prompt_ids + start} for start in starts if start[-1] not in ends]
            left = max_new_tokens - length - 1
            rest = generate_texts(lm, tokenizer, asked, num_samples=completions, seed=seed + 1 + length + number,
                                  max_new_tokens=left, **settings)  # fmt: skip
            for record in (record for record in whole if not record["finished"]):
                record["response_ids"] = record["response_ids"] + next(rest)["response_ids"]
            for record in whole:
                record["response"] = tokenizer.decode(record["response_ids"], skip_special_tokens=True)
            ours = np.array(judge(whole), dtype=float).reshape(top_k, completions)
            others = rewards[number, 1:]
            wins = (1 + np.sign(ours[..., None] - others)).mean(-1) / 2
            yield Siblings(prompt_ids + written, tokens.tolist(), log_probs.tolist(), wins.T.tolist())
