"""The named methods: what each of them is, exactly."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from pargs_min.decode import Generation, ModelPolicy, generate, greedy, row_uniforms
from pargs_min.methods import METHODS, Batch, Setup, response_rewards
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import SiblingScorer, model_rewards
from tests.strategies import left_padded, tiny_lm, tiny_reward_model

SETTINGS = dict(top_k=0, max_new_tokens=5, eos=1, pad=0)


def write(name, policy, ids, mask, *, scorer=None, reward_fn=None, beta=0.0, rows=1, uniforms=None, **settings):
    uniforms = torch.rand(rows * len(ids), settings["max_new_tokens"]) if uniforms is None else uniforms
    setup = Setup(policy, settings, beta, scorer, reward_fn, rows)
    return METHODS[name].write(METHODS[name], setup, Batch(ids, mask, uniforms, torch.empty(0)))


@pytest.mark.parametrize("method", ["pargs", "args", "pargs-greedy", "args-greedy"])
def test_guided_methods_are_one_call_of_generate(method):
    lm, rm = tiny_lm(), tiny_reward_model()
    ids, mask = left_padded(4, 2)
    uniforms = row_uniforms(0, [0, 1], [0, 0], 5)
    guide = dict(scorer=SiblingScorer(rm), beta=2.0)
    ours, _ = write(method, ModelPolicy(lm), ids, mask, uniforms=uniforms, **guide, **SETTINGS)
    draw = dict(draw=greedy) if "greedy" in method else {}
    same = generate(ModelPolicy(lm), SiblingScorer(rm), ids, mask, beta=2.0, uniforms=uniforms, **draw, **SETTINGS)
    assert torch.equal(ours.tokens, same.tokens)


def test_best_of_n_is_the_best_of_n_different_samples():
    lm, rm = tiny_lm(), tiny_reward_model()
    ids, mask = left_padded(4, 2)
    uniforms = row_uniforms(0, [0] * 6 + [1] * 6, [*range(6), *range(6)], 5)
    rewarded = dict(reward_fn=model_rewards(rm), rows=6)
    best, _ = write("best-of-n", ModelPolicy(lm), ids, mask, uniforms=uniforms, **rewarded, **SETTINGS)
    for row in range(2):
        prompt = ids[row][mask[row].bool()]
        texts, rewards = [], []
        for u in uniforms[6 * row : 6 * row + 6]:
            alone = prompt[None], torch.ones(1, len(prompt))
            sample, _ = write("plain", ModelPolicy(lm), *alone, uniforms=u[None], **SETTINGS)
            text = sample.tokens[0, : sample.lengths[0]]
            whole = torch.cat([prompt, text])[None]
            texts.append(text.tolist())
            rewards.append(prefix_rewards(rm, whole, torch.ones_like(whole))[0, -1].item())
        assert len(set(map(tuple, texts))) > 1
        assert best.tokens[row, : best.lengths[row]].tolist() == texts[rewards.index(max(rewards))]


def test_best_of_n_draws_from_the_closed_form():
    """Exactly: over all pairs of one-token responses, P(best of 2 = y) is what their reward order says."""
    lm, rm = tiny_lm(vocabulary=5), tiny_reward_model(vocabulary=5)
    ids, mask = left_padded(3, vocabulary=5)
    with torch.no_grad():
        ref = lm(input_ids=ids).logits[0, -1].softmax(-1)
        texts = torch.cat([ids.expand(5, -1), torch.arange(5)[:, None]], 1)
        reward = prefix_rewards(rm, texts, torch.ones_like(texts))[:, -1]
    at_most = torch.stack([ref[reward <= r].sum() for r in reward])
    below = torch.stack([ref[reward < r].sum() for r in reward])
    middle = ref.cumsum(0) - ref / 2  # a uniform that draws each token
    found = torch.zeros(5, dtype=torch.float64)
    for a, b in itertools.product(range(5), repeat=2):
        how = dict(reward_fn=model_rewards(rm), rows=2, uniforms=middle[[a, b], None], top_k=0, max_new_tokens=1)
        best, _ = write("best-of-n", ModelPolicy(lm), ids, mask, **how)
        found[best.tokens[0, 0]] += ref[a] * ref[b]
    assert_close(found, at_most**2 - below**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_text_whose_reward_is_not_finite_is_never_the_best(value):
    broken = torch.tensor([0.0, 1.0, 0.0, value])
    how = dict(reward_fn=lambda ids, mask: broken, rows=2)
    with pytest.raises(FloatingPointError, match="row 3: the reward of a text is not finite"):
        write("best-of-n", ModelPolicy(tiny_lm()), *left_padded(3, 2), **how, **SETTINGS)


def test_response_rewards_see_the_end_token_and_no_padding():
    rm = tiny_reward_model("llama")
    ids, mask = left_padded(4, 2)
    generation = Generation(torch.tensor([[5, 1, 0], [6, 7, 1]]), torch.tensor([2, 3]), *[torch.zeros(2, 3)] * 3)
    got = response_rewards(model_rewards(rm), ids, mask, generation)
    for row, response in enumerate(([5, 1], [6, 7, 1])):
        text = torch.cat([ids[row][mask[row].bool()], torch.tensor(response)])[None]
        assert_close(got[row], prefix_rewards(rm, text, torch.ones_like(text))[0, -1], rtol=0, atol=1e-12)


def test_the_mean_path_kl_is_the_divergence():
    """Exactly: weighted by their probability, the paths of the guided policy average to its KL from the reference."""
    lm, rm = tiny_lm(vocabulary=5), tiny_reward_model(vocabulary=5)
    ids, _ = left_padded(3, vocabulary=5)
    settings, steps = dict(beta=2.0, top_k=0, max_new_tokens=1), []
    each = [
        generate(
            ModelPolicy(lm),
            SiblingScorer(rm),
            ids,
            draw=lambda *_, k=k: torch.tensor([k]),
            on_step=steps.append,
            **settings,
        )
        for k in range(5)
    ]
    policy, ref = steps[0].log_probs[0], steps[0].ref_log_probs[0]
    mean = sum(policy[k].exp() * METHODS["pargs"].kl(path)[0] for k, path in enumerate(each))
    assert_close(mean, (policy.exp() * (policy - ref)).sum(), rtol=0, atol=1e-12)
    assert_close(METHODS["pargs-greedy"].kl(each[0]), -ref[:1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("limits", [dict(top_k=0), dict(top_k=2, truncate=True), dict(top_k=0, temperature=0.3)])
def test_the_mean_path_kl_of_best_of_n_is_never_below_its_divergence(limits):
    """Exactly, over all pairs of one-token samples; also where these are not of the whole reference."""
    lm, rm = tiny_lm(vocabulary=5), tiny_reward_model(vocabulary=5)
    ids, mask = left_padded(3, vocabulary=5)
    steps = []
    write("plain", ModelPolicy(lm), ids, mask, max_new_tokens=1, on_step=steps.append, **limits)
    policy, ref, k = steps[0].log_probs[0].exp(), steps[0].ref_log_probs[0], steps[0].candidates.shape[1]
    law, mean = dict.fromkeys(range(k), 0.0), 0.0
    for pair in itertools.product(range(k), repeat=2):
        draws = dict(draw=lambda *_, pair=pair: steps[0].candidates[0, list(pair)], max_new_tokens=1)
        rewarded = dict(reward_fn=model_rewards(rm), rows=2)
        best, kl = write("best-of-n", ModelPolicy(lm), ids, mask, **rewarded, **draws, **limits)
        chance = policy[list(pair)].prod().item()
        law[steps[0].candidates[0].tolist().index(best.tokens[0, 0])] += chance
        mean += chance * kl.item()
    divergence = sum(p * (math.log(p) - ref[i].item()) for i, p in law.items() if p)
    assert divergence < mean < divergence + math.log(2) - 1 / 2
    if limits == dict(top_k=0):
        assert mean == pytest.approx(math.log(2) - 1 / 2)
