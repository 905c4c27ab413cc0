"""Siblings: the candidates after one prefix, what their completions are worth, and how well a reward model ranks them.

The guarantee that guidance never loses (`theory/`, T7) needs one thing of a partial reward: that it ranks siblings as
the win rates of their completions do. Accuracy on unrelated pairs does not tell.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pargs_min.codec import Codec, encode_prompt, left_pad
from pargs_min.data import Text
from pargs_min.decode import ModelPolicy, WarpedPolicy
from pargs_min.experiments.setup import Lab, generated, judged, material
from pargs_min.reward_model import is_language_model, recorded
from pargs_min.scoring import LanguageModelScorer, model_rewards
from pargs_min.train import rate
from pargs_min.world.automaton import Array, sample, win_rates
from pargs_min.world.journey import Journey

JOURNEYS = 64  # of the embedded world, per prompt, along which candidates are compared


class Siblings(NamedTuple):
    """The K candidates after one prefix.

    Args:
        prefix_ids: prompt and response so far.
        candidates: (K,) token ids.
        log_probs: (K,) under the reference, in nats.
        win_rates: (M, K) how often their completions beat whole responses to the prompt, by M independent estimates.
    """

    prefix_ids: list[int]
    candidates: list[int]
    log_probs: list[float]
    win_rates: list[list[float]]


def concordance(
    scores: Sequence[Array], values: Sequence[Array], log_probs: Sequence[Array], power: float = 0.0
) -> float:
    """Share of sibling pairs that scores rank as values do; ties of scores count half.

        sum_a sum_{t < t'} w [(s(at) - s(at')) (W(at) - W(at')) > 0]  /  sum_a sum_{t < t'} w,
        w = p(t | a) p(t' | a) |W(at) - W(at')|^power

    over the pairs whose values differ, for prefixes a that the reference has written. With power 0 all such pairs count
    alike. With power 2 they count by what there is to win: what a small tilt by s gains is Cov_t(W, s) =
    sum_{t < t'} p(t) p(t') (W(at) - W(at')) (s(at) - s(at')) (T7), and the best s is W itself.

    Args:
        scores, values, log_probs: for each prefix (K,) numbers, K may vary; log_probs in nats.

    Returns:
        In [0, 1]; nan where no two values differ.

    >>> concordance([np.array([3.0, 1.0, 2.0])], [np.array([0.9, 0.5, 0.1])], [np.log([0.5, 0.25, 0.25])])
    0.8
    """
    alike = total = 0.0
    for score, value, log_prob in zip(scores, values, log_probs, strict=True):
        first, second = np.triu_indices(len(score), 1)
        gap = np.abs(value[first] - value[second])
        weight = np.exp(log_prob[first] + log_prob[second]) * np.where(gap > 1e-12, gap**power, 0.0)
        agreement = np.sign(score[first] - score[second]) * np.sign(value[first] - value[second])
        alike += float(weight @ (1 + agreement)) / 2
        total += float(weight.sum())
    return alike / total if total else float("nan")


@torch.no_grad()
def score_siblings(
    model: PreTrainedModel, siblings: Sequence[Siblings], lm: PreTrainedModel | None = None, batch_size: int = 256
) -> list[Array]:
    """(K,) rewards of the candidates of each prefix: of the texts that end in them, or as a language model implies them
    beside the reference `lm`."""
    if is_language_model(model) and lm is not None:
        return [*_implied_rewards(model, siblings, lm, batch_size)]
    texts = [Text(one.prefix_ids, [token]) for one in siblings for token in one.candidates]
    rated = rate(texts, model_rewards(model), batch_size=batch_size, device=str(model.device))
    return np.split([text.reward for text in rated], np.cumsum([len(one.candidates) for one in siblings])[:-1])


def _implied_rewards(
    model: PreTrainedModel, siblings: Sequence[Siblings], lm: PreTrainedModel, batch_size: int
) -> Iterator[Array]:
    policy, scorer = ModelPolicy(lm), LanguageModelScorer(model, recorded(model).get("beta"))
    for some in (siblings[first : first + batch_size] for first in range(0, len(siblings), batch_size)):
        prefixes = [tensor.to(lm.device) for tensor in left_pad([one.prefix_ids for one in some])]
        for stepper in (policy, scorer):
            stepper.start(*prefixes)
        rows = [torch.tensor(one.candidates, device=lm.device) for one in some]
        candidates = pad_sequence(rows, batch_first=True)
        rewards = scorer.score(candidates, policy.log_probs().gather(1, candidates)).double().cpu().numpy()
        yield from (row[: len(one.candidates)] for row, one in zip(rewards, some, strict=True))


def ranking(
    model: PreTrainedModel, siblings: Sequence[Siblings], lm: PreTrainedModel | None = None
) -> dict[str, float]:
    """How well a guide ranks candidates by the win rates of their completions (`concordance`).

    Returns:
        concordance, for power 0; gain, for power 2; and the `ceiling`, how well the win rates know themselves.
    """
    scores, values = score_siblings(model, siblings, lm), [np.mean(one.win_rates, 0) for one in siblings]
    log_probs = [np.array(one.log_probs) for one in siblings]
    all_pairs, by_gain = (concordance(scores, values, log_probs, power) for power in (0, 2))
    return {"concordance": all_pairs, "gain": by_gain, "ceiling": ceiling(siblings)}


def ceiling(siblings: Sequence[Siblings]) -> float:
    """`concordance` of one half of the estimates with the other: what noise leaves for a perfect scorer to reach.

    It is 1 for exact win rates. A perfect scorer is compared with the mean of both halves, so it can pass it a little.
    """
    halves = [np.array_split(np.array(one.win_rates), 2) for one in siblings]
    first, second = ([half.mean(0) for half in side] for side in zip(*halves, strict=True))
    return concordance(first, second, [np.array(one.log_probs) for one in siblings])


def exact_siblings(lab: Lab, world: Journey) -> Iterator[Siblings]:
    """The next words wherever the grammar has a choice, along its own journeys, with the world's exact win rates."""
    for number, prompt in enumerate(prompt["prompt"] for prompt in material(lab).prompts):
        automaton, prompt_ids = world.automata[prompt], encode_prompt(material(lab).tokenizer, prompt)
        rates = win_rates(automaton)
        journeys = min(lab.samples, JOURNEYS)
        drawn, _ = sample(automaton, np.random.default_rng([0, number]).random((journeys, automaton.horizon)))
        for row in drawn:
            state = automaton.start
            for step, token in enumerate(row):
                edges = np.flatnonzero(automaton.sources == state)
                candidates, targets = automaton.tokens[edges], automaton.targets[edges]
                if len(edges) > 1:
                    values = rates[step + 1, targets].tolist()
                    log_probs = automaton.log_probs[edges].tolist()
                    yield Siblings(prompt_ids + row[:step].tolist(), candidates.tolist(), log_probs, [values, values])
                state = targets[candidates == token][0]


def rollout_siblings(lab: Lab, top_k: int = 5, completions: int = 8, opponents: int = 16) -> Iterator[Siblings]:
    """The most likely tokens after a quarter, a half and three quarters of a text, each completed several times.

    A completion's win rate is the share of independent texts for the prompt that the judge puts below it, ties half.
    Each of the lab's prompts gives one prefix per length, cut from its first text.

    Args:
        completions: of each candidate, an even number.
        opponents: texts per prompt.
    """
    lm, tokenizer, prompts, *_, form = material(lab)
    codec = Codec.of(lm, tokenizer, form)
    policy = WarpedPolicy(ModelPolicy(lm, vocabulary=codec.vocabulary), lab.warp)

    # What completions compete with.
    texts = generated(lab, prompts, opponents, seed=0)
    rewards = np.reshape(judged(lab, texts), (len(prompts), opponents))

    lengths = [lab.max_new_tokens * quarters // 4 for quarters in (1, 2, 3)]
    for pair, (length, number) in enumerate(product(lengths, range(len(prompts))), 1):
        written = texts[number * opponents]["response_ids"][:length]
        if len(written) < length or codec.finished(written):
            continue
        prefix = codec.prompt(prompts[number]) + written
        policy.start(*(x.to(lm.device) for x in left_pad([prefix])))
        likeliest = policy.log_probs()[0].topk(top_k)
        log_probs, tokens = (found[likeliest.values.isfinite()] for found in likeliest)  # the lab's warp rules some out
        if len(tokens) < 2:
            continue

        # Complete each candidate that does not end the text; every pair of length and prompt has its own seed.
        candidates, limit = tokens.tolist(), lab.max_new_tokens - length - 1
        open_ended = {token for token in candidates if limit and not codec.finished([token])}
        asked = [{"prompt_ids": [*prefix, token]} for token in candidates if token in open_ended]
        rest = iter(generated(lab, asked, completions, max_new_tokens=limit, seed=pair) if asked else [])
        whole = []
        for sample_number, token in enumerate(np.repeat(candidates, completions).tolist()):
            ids = [*written, token] + (next(rest)["response_ids"] if token in open_ended else [])
            found = {"response": codec.text(ids), "response_ids": ids, "finished": codec.finished(ids)}
            whole.append({**prompts[number], "prompt_number": number, "sample": sample_number, **found})

        # The first text of the prompt has lent its beginning, so it does not compete.
        ours = np.reshape(judged(lab, whole), (len(candidates), completions))
        wins = (1 + np.sign(ours[..., None] - rewards[number, 1:])).mean(-1) / 2
        yield Siblings(prefix, candidates, log_probs.tolist(), wins.T.tolist())
