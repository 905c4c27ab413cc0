"""What is known of the candidates after one prefix: exact values, rollouts, and who orders them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pargs_min.experiments import concordance as module
from pargs_min.experiments.concordance import (
    Siblings,
    ceiling,
    concordance,
    exact_siblings,
    rollout_siblings,
    score_siblings,
)
from pargs_min.experiments.setup import Lab, material
from pargs_min.reward_model import final_rewards
from pargs_min.store import write_lines
from pargs_min.world.journey import END, HELD_OUT_PROMPTS, Journey
from pargs_min.world.reference import word_tokenizer
from tests.strategies import tiny_lm, tiny_reward_model


def some_prefixes(seed: int, count: int = 5):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, count)
    values = [rng.integers(0, 4, n) / 4 for n in sizes]  # some are equal
    log_probs = [np.log(rng.dirichlet(np.ones(n))) for n in sizes]
    return [rng.normal(size=n) for n in sizes], values, log_probs


@pytest.mark.parametrize("power", [0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_concordance_is_its_definition_pair_by_pair(seed, power):
    scores, values, log_probs = some_prefixes(seed)
    scores[0][0] = scores[0][1]
    alike = total = 0.0
    for s, w, p in zip(scores, values, log_probs, strict=True):
        for i in range(len(s)):
            for j in range(i):
                weight = np.exp(p[i]) * np.exp(p[j]) * (w[i] != w[j]) * abs(w[i] - w[j]) ** power
                total += weight
                alike += weight * (0.5 if s[i] == s[j] else (s[i] > s[j]) == (w[i] > w[j]))
    assert concordance(scores, values, log_probs, power) == pytest.approx(alike / total, abs=1e-12)


def test_the_values_agree_with_themselves_and_disagree_with_their_opposites():
    _, values, log_probs = some_prefixes(0)
    assert concordance([np.exp(v) for v in values], values, log_probs) == pytest.approx(1)
    assert concordance([-v for v in values], values, log_probs) == pytest.approx(0)
    assert concordance([0 * v for v in values], values, log_probs) == pytest.approx(0.5)
    assert np.isnan(concordance(values, [0 * v for v in values], log_probs))


def test_candidates_are_scored_as_texts_that_end_in_them():
    """Prefixes of unequal length, unequal numbers of candidates, several batches."""
    model = tiny_reward_model()
    some = [Siblings([3, 4], [2, 5], [], []), Siblings([6, 7, 8], [9, 2, 3], [], []), Siblings([5], [4], [], [])]
    for one, scores in zip(some, score_siblings(model, some, batch_size=2), strict=True):
        assert len(scores) == len(one.candidates)
        for token, found in zip(one.candidates, scores, strict=True):
            text = torch.tensor([[*one.prefix_ids, token]])
            assert found == pytest.approx(final_rewards(model, text, torch.ones_like(text)).item(), abs=1e-12)


@pytest.mark.parametrize(("objective", "beta"), [("reweighted", 2.0), ("autoregressive", None)])
def test_candidates_are_scored_as_a_language_model_implies(objective, beta):
    lm, model = tiny_lm(seed=0), tiny_lm(seed=1)
    model.config.pargs = {"objective": objective} | ({"beta": beta} if beta else {})
    some = [Siblings([3, 4], [2, 5], [], []), Siblings([6, 7, 8], [9, 2, 3], [], []), Siblings([5], [4], [], [])]
    for one, scores in zip(some, score_siblings(model, some, lm, batch_size=2), strict=True):
        ours, theirs = (m(torch.tensor([one.prefix_ids])).logits[0, -1].log_softmax(-1) for m in (model, lm))
        expected = (ours - theirs) / beta if beta else ours
        assert scores == pytest.approx(expected[one.candidates].tolist(), abs=1e-12)


def test_the_exact_win_rate_of_a_prefix_is_the_mean_of_its_siblings(lab, monkeypatch):
    """From one choice of a journey to the next: W(a) = sum_t ref(t | a) W(at), and 1/2 at its beginning."""
    world = Journey()
    tokenizer, prompt = word_tokenizer(world), HELD_OUT_PROMPTS[0]
    start, value, before, choices = len(tokenizer(prompt).input_ids), 0.5, None, 0
    made = SimpleNamespace(tokenizer=tokenizer, prompts=[{"prompt": prompt}])
    monkeypatch.setattr(module, "material", lambda lab: made)
    for one in exact_siblings(replace(lab, samples=3), world):
        probabilities, rates = np.exp(one.log_probs), np.array(one.win_rates[0])
        assert probabilities.sum() == pytest.approx(1)
        first = len(one.prefix_ids) == start
        if not first:
            taken = one.prefix_ids[len(before.prefix_ids)]
            value = before.win_rates[0][before.candidates.index(taken)]
        assert probabilities @ rates == pytest.approx(0.5 if first else value, abs=1e-12)
        words = [world.words[token] for token in one.prefix_ids[start:]]
        assert END not in words
        before, choices = one, choices + 1
    assert choices > 10
    assert ceiling([before]) == 1


@pytest.fixture
def unjudged(lab, monkeypatch) -> Lab:
    """A lab whose judge finds all texts alike."""
    monkeypatch.setattr(module, "judged", lambda lab, texts: [0.0] * len(texts))
    return lab


def prompted(lab: Lab, *prompts: str, **settings) -> Lab:
    write_lines(lab.prompts, [{"prompt": prompt} for prompt in prompts])
    return replace(lab, **settings)


def test_rollouts_complete_each_candidate_and_count_its_wins(lab, monkeypatch):
    seen = []

    def judged(lab, texts):
        seen.extend(texts)
        return [sum(text["response_ids"]) % 5 for text in texts]

    monkeypatch.setattr(module, "judged", judged)
    lab = prompted(lab, "a b", "c", max_new_tokens=12)
    tokenizer = material(lab).tokenizer
    found = [*rollout_siblings(lab, top_k=3, completions=4, opponents=6)]
    assert found
    opponents, wholes = [seen[:6], seen[6:12]], seen[12:]
    assert len(wholes) == len(found) * 3 * 4
    for i, one in enumerate(found):
        mine = wholes[12 * i : 12 * (i + 1)]
        number = mine[0]["prompt_number"]
        others = [sum(text["response_ids"]) % 5 for text in opponents[number][1:]]
        prompt = tokenizer(mine[0]["prompt"]).input_ids
        for j, text in enumerate(mine):
            k, m = divmod(j, 4)
            written = prompt + text["response_ids"]
            assert written[: len(one.prefix_ids) + 1] == [*one.prefix_ids, one.candidates[k]]
            assert len(text["response_ids"]) == 12 or text["response_ids"][-1] == tokenizer.eos_token_id
            reward = sum(text["response_ids"]) % 5
            wins = np.mean([0.5 * ((reward > other) + (reward >= other)) for other in others])
            assert one.win_rates[m][k] == pytest.approx(wins)


def test_every_prefix_has_completions_of_its_own_seed(unjudged, monkeypatch):
    """Also where one prompt's number makes up for another's length."""
    seeds, generated = [], module.generated

    def recorded(*arguments, seed, **settings):
        seeds.append(seed)
        return generated(*arguments, seed=seed, **settings)

    monkeypatch.setattr(module, "generated", recorded)
    found = [*rollout_siblings(prompted(unjudged, *"abcdefg"), top_k=2, completions=2, opponents=2)]
    assert len(seeds) == 1 + len(found) > 10
    assert len(set(seeds)) == len(seeds)


def test_the_shortest_texts_have_siblings_at_their_first_token(unjudged):
    """A quarter of three tokens is none: the prefix is the prompt."""
    lab = prompted(unjudged, "a b", max_new_tokens=3)
    first, *_ = rollout_siblings(lab)
    assert first.prefix_ids == material(lab).tokenizer("a b").input_ids


def test_what_the_reference_is_never_sampled_to_write_is_no_candidate(unjudged):
    """As in a nucleus; prefixes with one candidate have nothing to order."""
    lab = prompted(unjudged, *"abcdefg", max_new_tokens=12, ref_top_p=0.3)
    found = [*rollout_siblings(lab, completions=2, opponents=2)]
    sizes = {len(one.candidates) for one in found}
    assert sizes
    assert sizes <= {2, 3, 4}
    assert not [*rollout_siblings(replace(lab, ref_top_k=1), completions=2, opponents=2)]
    for one in found:
        assert np.isfinite(one.log_probs).all()
        assert np.shape(one.win_rates) == (2, len(one.candidates))
