"""The loop: exactly the policy of the equation, row by row, and the same inside transformers' own generate."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pargs_min import minimal
from pargs_min.decode import (
    ModelPolicy,
    RewardGuidance,
    Warp,
    WarpedPolicy,
    generate,
    greedy,
    response_log_probs,
    row_uniforms,
    sample,
)
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import LanguageModelScorer, ReencodeScorer, SiblingScorer, WinTilt
from tests.strategies import left_padded, tiny_lm, tiny_reward_model

EXACT = dict(rtol=0, atol=1e-12)
VOCABULARY, END = 5, 1
FAMILIES = [("gpt2", "gpt2"), ("llama", "qwen2")]


def models(vocabulary=11, lm="gpt2", rm="llama"):
    return tiny_lm(lm, vocabulary), tiny_reward_model(rm, vocabulary)


def enumerated(policy, reward, ids, vocabulary, steps, **settings):
    """Every path of tokens through `generate`, as one batch."""
    paths = torch.tensor(list(itertools.product(range(vocabulary), repeat=steps)))
    tokens = iter(paths.T)
    ids = ids.expand(len(paths), -1)
    return generate(policy, reward, ids, max_new_tokens=steps, draw=lambda *_: next(tokens), **settings)


@torch.no_grad()
@pytest.mark.parametrize(("lm", "rm"), FAMILIES)
def test_the_sequence_distribution_is_the_enumerated_one(lm, rm):
    """Vocabulary 5, all paths of three tokens: at every prefix softmax(ref_log_probs + beta * rewards)."""
    lm, rm = models(VOCABULARY, lm, rm)
    prompt = torch.tensor([[2, 3]])
    paths = enumerated(ModelPolicy(lm), SiblingScorer(rm), prompt, VOCABULARY, 3, beta=1.7, top_k=0, eos=END)
    checked = set()
    for tokens, length, log_probs, rewards in zip(
        paths.tokens, paths.lengths, paths.log_probs, paths.rewards, strict=True
    ):
        for i in range(length):
            prefix = torch.cat([prompt[0], tokens[:i]])
            texts = torch.cat([prefix.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
            reward = prefix_rewards(rm, texts, torch.ones_like(texts))[:, -1]
            expected = (lm(input_ids=prefix[None]).logits[0, -1].log_softmax(-1) + 1.7 * reward).log_softmax(-1)
            assert_close(log_probs[i], expected[tokens[i]], **EXACT)
            assert_close(rewards[i], reward[tokens[i]], **EXACT)
            checked.add((*prefix.tolist(), int(tokens[i])))
    assert len(checked) == 5 + 4 * 5 + 16 * 5  # every token after every unfinished prefix
    strings = {tuple(row.tolist()): p for row, p in zip(paths.tokens, paths.log_probs.sum(-1).exp(), strict=True)}
    assert sum(strings.values()).item() == pytest.approx(1.0, abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("settings", [dict(top_k=2), dict(top_k=1), dict(top_k=4, min_ref_prob=0.2)])
def test_tokens_that_are_no_candidates_keep_the_reference(settings):
    """Enumerated, every next token after every prefix of two: the rest as the reference has it, with rewards nan."""
    lm, rm = models(VOCABULARY)
    policy, scorer, prompt = ModelPolicy(lm), SiblingScorer(rm), torch.tensor([[2, 3]])
    paths = enumerated(policy, scorer, prompt, VOCABULARY, 3, beta=1.7, **settings)
    total, rest = paths.log_probs.sum(-1).exp().sum(), paths.rewards.isnan()
    assert total.item() == pytest.approx(1, abs=1e-12)
    assert 0 < rest.sum() < rest.numel()
    assert_close(paths.log_probs[rest], paths.ref_log_probs[rest], **EXACT)
    truncated = enumerated(policy, scorer, prompt, VOCABULARY, 3, beta=1.7, truncate=True, **settings)
    assert (truncated.log_probs[rest] == -torch.inf).all()
    # What the candidates share is what the reference gives them: the first 25 paths of each first token tell of it.
    first = slice(None, None, VOCABULARY**2)
    inside = ~rest[first, 0]
    mass = paths.ref_log_probs[first, 0][inside].exp().sum()
    assert_close(paths.log_probs[first, 0][inside].exp(), mass * truncated.log_probs[first, 0][inside].exp(), **EXACT)


@torch.no_grad()
def test_a_language_model_guides_towards_itself():
    """Relative to the reference, at the beta it was trained for, over all tokens: the guided policy is that model."""
    lm, guide = tiny_lm("gpt2", VOCABULARY), tiny_lm("llama", VOCABULARY, seed=3)
    prompt = torch.tensor([[2, 3]])
    scorer = LanguageModelScorer(guide, beta=1.5)
    paths = enumerated(ModelPolicy(lm), scorer, prompt, VOCABULARY, 3, beta=1.5, top_k=0)
    own = enumerated(ModelPolicy(guide), None, prompt, VOCABULARY, 3, beta=0.0, top_k=0)
    assert_close(paths.log_probs, own.log_probs, **EXACT)
    twice = enumerated(ModelPolicy(lm), LanguageModelScorer(guide), prompt, VOCABULARY, 1, beta=0.7, top_k=0)
    expected = (paths.ref_log_probs[::25, 0] + 0.7 * own.log_probs[::25, 0]).log_softmax(-1)
    assert_close(twice.log_probs[:, 0], expected, **EXACT)


@torch.no_grad()
def test_the_win_tilt():
    lm, rm = models(VOCABULARY)
    scorer, prompt, eta = SiblingScorer(rm), torch.tensor([[2, 3]]), 2.0
    found = enumerated(ModelPolicy(lm), WinTilt(scorer, eta), prompt, VOCABULARY, 1, beta=1.0, top_k=0)
    logits = enumerated(ModelPolicy(lm), scorer, prompt, VOCABULARY, 1, beta=0.0, top_k=0).rewards
    weights = found.ref_log_probs.exp() * (1 + (math.exp(eta) - 1) * logits.sigmoid())
    assert_close(found.log_probs.exp(), weights / weights.sum(), **EXACT)
    with pytest.raises(ValueError, match=r"eta of the method win\) must be a finite number, got inf"):
        WinTilt(scorer, math.inf)


@torch.no_grad()
def test_the_reference_is_the_model_as_its_users_sample_it():
    """The distribution that transformers' own generate draws from, and it is what is guided, and what KLs are to."""
    lm, rm = models()
    ids, mask = left_padded(4, 2)
    theirs = lm.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        temperature=0.7, top_k=8, top_p=0.8, min_p=0.05, pad_token_id=0,
    ).scores[0]  # fmt: skip
    policy = WarpedPolicy(ModelPolicy(lm), Warp(0.7, 8, 0.8, 0.05))
    steps = []
    settings = dict(top_k=0, max_new_tokens=1, on_step=steps.append)
    generate(policy, None, ids, mask, beta=0.0, **settings)
    assert_close(steps[0].log_probs.float(), theirs.log_softmax(-1), rtol=0, atol=1e-5)
    assert 1 < steps[0].log_probs.isfinite().sum(-1).min() < 8
    found = generate(policy, SiblingScorer(rm), ids, mask, beta=2.0, **settings)
    out = steps[0].ref_log_probs.isneginf()
    assert torch.equal(steps[1].rewards.isnan(), out)
    tilted = (steps[0].ref_log_probs + 2.0 * steps[1].rewards.nan_to_num()).log_softmax(-1)
    assert_close(steps[1].log_probs, tilted, **EXACT)
    again = response_log_probs(
        lm, torch.cat([ids, found.tokens], 1), torch.cat([mask, mask[:, -1:]], 1), 1, policy.warp
    )
    assert_close(found.ref_log_probs, again, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(temperature=0.0), "ref_temperature must be a positive number"),
        (dict(top_k=-1), "ref_top_k must be at least 1, or 0 for all tokens, got -1"),
        (dict(top_p=0.0), "ref_top_p must be above 0 and at most 1"),
        (dict(min_p=1.5), "ref_min_p must be between 0 and 1"),
    ],
)
def test_a_warp_out_of_range_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        Warp(**setting)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_beta_zero_truncated_is_transformers_own_top_k_sampling(top_k):
    lm, rm = models()
    ids, mask = left_padded(4)
    steps = []
    generate(
        ModelPolicy(lm), SiblingScorer(rm), ids, mask, beta=0.0, top_k=top_k, truncate=True, max_new_tokens=1,
        on_step=steps.append,
    )  # fmt: skip
    logits = lm(input_ids=ids).logits[:, -1]
    theirs = TopKLogitsWarper(top_k)(ids, logits).softmax(-1)
    ours = torch.zeros_like(theirs).scatter(1, steps[0].candidates, steps[0].log_probs.exp())
    assert_close(ours, theirs, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(("lm", "rm"), FAMILIES)
@pytest.mark.parametrize("draw", [sample, greedy])
def test_cached_batched_decoding_equals_the_naive_loop(lm, rm, draw):
    """No cache, no batch, no padding, one reward pass per candidate (`minimal`): the same tokens and numbers."""
    lm, rm = tiny_lm(lm), tiny_reward_model(rm, pad_token_id=None)  # so that transformers' own pooling reads any token
    ids, mask = left_padded(6, 2, 4)
    uniforms = row_uniforms(0, range(3), [0, 0, 0], 12)
    settings, steps = dict(beta=2.0, top_k=4, max_new_tokens=12, eos=END, pad=0), []
    ours = generate(
        ModelPolicy(lm), SiblingScorer(rm), ids, mask, draw=draw, uniforms=uniforms, on_step=steps.append, **settings
    )
    for row in range(3):
        text = ids[row][mask[row].bool()]
        for i, (step, u) in enumerate(zip(steps, uniforms[row], strict=False)):
            log_probs = minimal.guided_policy(lm, rm, text, beta=2.0, k=4)
            assert_close(step.log_probs[row], log_probs[step.candidates[row]], **EXACT)
            token = draw(log_probs[None], u[None])[0]
            assert ours.tokens[row, i] == token
            assert_close(ours.log_probs[row, i], log_probs[token], **EXACT)
            ref_log_probs = lm(input_ids=text[None]).logits[0, -1].log_softmax(-1)
            assert_close(ours.ref_log_probs[row, i], ref_log_probs[token], **EXACT)
            text = torch.cat([text, token[None]])
            if text[-1] == END:
                break
        n = int(ours.lengths[row])
        assert n == i + 1
        assert (ours.tokens[row, n:] == 0).all()
        assert not ours.log_probs[row, n:].any()
        assert not ours.rewards[row, n:].any()


def test_what_is_drawn_from_needs_no_normaliser():
    log_probs = torch.tensor([[0.1, 0.1]]).log().expand(2, -1)
    assert sample(log_probs, torch.tensor([0.4, 0.6])).tolist() == [0, 1]


@pytest.mark.parametrize(("ends", "pad", "row"), [(0, None, [0, 0, 0]), ((0, 4), None, [0, 0, 0]), (4, 0, [4, 0, 0])])
def test_id_zero_may_end_a_text_and_pad_it(ends, pad, row):
    tokens = iter([[7, row[0]], [5, 5], [6, 6]])
    settings = dict(beta=1.0, top_k=0, max_new_tokens=3, eos=ends, pad=pad, draw=lambda *_: torch.tensor(next(tokens)))
    found = generate(ModelPolicy(models()[0]), None, *left_padded(3, 3), **settings)
    assert found.tokens.tolist() == [[7, 5, 6], row]
    assert found.lengths.tolist() == [3, 1]


def test_uniforms_hit_each_candidate_as_often_as_it_is_likely():
    """Exactly: the share of a grid of uniforms that picks a candidate is its probability, to one grid cell."""
    log_probs = torch.tensor([0.1, 0.0, 0.55, 0.35], dtype=torch.float64).log()
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    picked = sample(log_probs.expand(1000, -1), grid).bincount(minlength=4)
    assert picked.tolist() == [100, 0, 550, 350]


def test_the_smallest_and_the_largest_uniform_never_pick_what_is_impossible():
    log_probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(2, -1)
    assert sample(log_probs, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


@pytest.mark.parametrize("uniform", [0.4999999, 0.49999999, 0.5, 0.99999, 1 - 2**-53])
def test_what_has_no_probability_is_not_drawn_though_sums_be_rounded(uniform, monkeypatch):
    """A GPU adds up in parallel, and its sums may fall, or rise, where nothing is added."""
    rounded = torch.tensor([[0.0, 0.5, 0.5 - 1e-7, 0.5 + 1e-7, 1.0 - 1e-7, 1.0]], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda probs, dim: rounded)
    log_probs = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.5, 0.0]], dtype=torch.float64).log()
    drawn = sample(log_probs, torch.tensor([uniform], dtype=torch.float64))
    assert drawn.tolist() == [1 if uniform < 0.5 else 4]


def test_uniforms_belong_to_seed_prompt_and_sample():
    rows = row_uniforms(7, [0, 0, 1], [0, 1, 0], 50)
    assert len(rows.unique()) == 150
    assert torch.equal(row_uniforms(7, [1], [0], 20)[0], rows[2, :20])
    assert not torch.equal(row_uniforms(8, [1], [0], 50)[0], rows[2])
    assert ((rows >= 0) & (rows < 1)).all()
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        row_uniforms(-1, [0], [0], 1)


@torch.no_grad()
def test_end_tokens_end_a_row_and_several_may_be_given():
    lm, _ = models()
    ids, mask = left_padded(3, 3, 3, 3)
    first = generate(
        ModelPolicy(lm),
        None,
        ids,
        mask,
        beta=0.0,
        top_k=0,
        max_new_tokens=8,
        uniforms=row_uniforms(0, range(4), [0] * 4, 8),
    )
    assert first.lengths.tolist() == [8] * 4  # no end token, no end
    ends = {int(first.tokens[0, 2]), int(first.tokens[1, 5])}
    again = generate(
        ModelPolicy(lm),
        None,
        ids,
        mask,
        beta=0.0,
        top_k=0,
        max_new_tokens=8,
        eos=ends,
        pad=0,
        uniforms=row_uniforms(0, range(4), [0] * 4, 8),
    )
    for row, length in enumerate(again.lengths.tolist()):
        where = [i for i, t in enumerate(first.tokens[row].tolist()) if t in ends]
        assert length == (where[0] + 1 if where else 8)
        kept = min(length, again.tokens.shape[1])
        assert torch.equal(again.tokens[row, :kept], first.tokens[row, :kept])


@torch.no_grad()
def test_each_step_calls_log_probs_score_and_push_once_in_that_order():
    calls = []

    class Table:
        def __init__(self, name):
            self.name = name

        def start(self, ids, mask):
            calls.append(f"{self.name}.start")

        def log_probs(self):
            calls.append("log_probs")
            return torch.zeros(1, 3).log_softmax(-1)

        def score(self, candidates, ref_log_probs):
            calls.append("score")
            return torch.zeros(1, 3)

        def push(self, tokens):
            calls.append(f"{self.name}.push")

    generate(Table("policy"), Table("reward"), torch.tensor([[0]]), beta=1.0, top_k=0, max_new_tokens=2)
    step = ["log_probs", "score", "policy.push", "reward.push"]
    assert calls == ["policy.start", "reward.start", *step, *step]


class Broken:
    """A reward that breaks at a given step for the last row."""

    def __init__(self, value, step):
        self.value, self.step = value, step

    def start(self, ids, mask):
        self.now = 0

    def score(self, candidates, ref_log_probs):
        rewards = torch.zeros(candidates.shape)
        if self.now == self.step:
            rewards[-1, 1] = self.value
        return rewards

    def push(self, tokens):
        self.now += 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 3])
def test_a_reward_that_is_not_finite_stops_with_step_and_row(value, step):
    lm, _ = models()
    with pytest.raises(FloatingPointError, match=f"row 2, step {step}: a reward is not finite"):
        generate(ModelPolicy(lm), Broken(value, step), *left_padded(3, 3, 3), beta=1.0, top_k=4, max_new_tokens=4)


def test_what_becomes_of_a_row_after_its_end_does_not_matter():
    """The second row ends at once, and two steps later its reward is not a number. The loop ends with the last row."""
    tokens, steps = iter([[3, END], [4, 4], [END, 4]]), []
    settings = dict(beta=1.0, top_k=0, max_new_tokens=9, eos=END, on_step=steps.append)
    draw = dict(draw=lambda *_: torch.tensor(next(tokens)))
    found = generate(ModelPolicy(models()[0]), Broken(float("nan"), 2), *left_padded(3, 3), **settings, **draw)
    assert found.tokens.tolist() == [[3, 4, END], [END, END, END]]
    assert len(steps) == 3


def test_a_sum_that_overflows_draws_nothing():
    """Beta is in range, but not what it makes of a reward: log-probabilities are nan, of all candidates."""
    lm = models()[0].float()
    scorer = ReencodeScorer(lambda ids, mask: 9.0 * ids[:, -1].float())
    with pytest.raises(FloatingPointError, match=r"row 0, step 0: .* a log-probability is not a number"):
        generate(ModelPolicy(lm), scorer, *left_padded(3), top_k=4, max_new_tokens=2, beta=1e38)


def test_a_language_model_without_numbers_is_caught_too():
    lm, _ = models()
    lm.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="row 0, step 0"):
        generate(ModelPolicy(lm), None, *left_padded(3), beta=0.0, top_k=0, max_new_tokens=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(top_k=-1), "top_k must lie between 1 and the vocabulary size 11"),
        (dict(top_k=12), "top_k must lie between 1 and the vocabulary size 11"),
        (dict(beta=float("nan")), "beta must be a finite number"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(max_new_tokens=61), "exceed the language model's context of 64"),
        (dict(uniforms=torch.zeros(1, 3)), r"uniforms must be \(1, 2\)"),
        (dict(prompt_ids=torch.zeros(1, 0, dtype=torch.long)), "P >= 1"),
        (dict(mask=torch.tensor([[1, 1, 1, 0]])), "padded on the left"),
        (dict(mask=torch.tensor([[1, 1]])), "prompt_ids and mask must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    lm, rm = models()
    good = dict(prompt_ids=left_padded(4)[0], beta=1.0, top_k=3, max_new_tokens=2)
    generate(ModelPolicy(lm), SiblingScorer(rm), **good)
    with pytest.raises(ValueError, match=message):
        generate(ModelPolicy(lm), SiblingScorer(rm), **{**good, **change})


def test_the_reward_models_context_counts_as_well():
    lm, rm = tiny_lm("llama", max_position_embeddings=128), tiny_reward_model("gpt2")
    with pytest.raises(ValueError, match="exceed the reward model's context of 64"):
        generate(ModelPolicy(lm), SiblingScorer(rm), *left_padded(4), beta=1.0, top_k=3, max_new_tokens=61)


def test_a_language_model_in_training_mode_is_refused():
    lm, _ = models()
    with pytest.raises(ValueError, match="training mode"):
        generate(ModelPolicy(lm.train()), None, *left_padded(4), beta=0.0, top_k=3, max_new_tokens=2)


# --- the same guidance inside transformers' generate -----------------------------------------------------------------


def transformers_generate(lm, rm, ids, mask, scorer=SiblingScorer, **settings):
    guidance = RewardGuidance(scorer(rm), mask, beta=2.0, top_k=4)
    common = dict(max_new_tokens=10, eos_token_id=END, pad_token_id=0, top_k=0)
    return lm.generate(ids, attention_mask=mask, logits_processor=[guidance], **{**common, **settings})


@pytest.mark.parametrize(("lm", "rm"), FAMILIES)
def test_reward_guidance_gives_the_same_tokens_when_greedy(lm, rm):
    lm, rm = models(lm=lm, rm=rm)
    ids, mask = left_padded(6, 2, 4)
    theirs = transformers_generate(lm, rm, ids, mask, do_sample=False)[:, 6:]
    settings = dict(beta=2.0, top_k=4, max_new_tokens=10, eos=END, pad=0, draw=greedy)
    ours = generate(ModelPolicy(lm), SiblingScorer(rm), ids, mask, **settings)
    assert torch.equal(theirs, ours.tokens)


def test_reward_guidance_gives_the_same_scores_at_the_same_ids_when_sampling():
    lm, rm = models()
    ids, mask = left_padded(6, 2, 4)
    torch.manual_seed(0)
    theirs = transformers_generate(
        lm, rm, ids, mask, do_sample=True, num_return_sequences=2, output_scores=True, return_dict_in_generate=True
    )
    ids, mask, tokens = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), theirs.sequences[:, 6:]
    replayed, steps = iter(tokens.T), []

    settings = dict(beta=2.0, top_k=4, max_new_tokens=tokens.shape[1], eos=END, pad=0)
    settings |= dict(draw=lambda *_: next(replayed))  # choose what transformers drew
    generate(ModelPolicy(lm), SiblingScorer(rm), ids, mask, on_step=steps.append, **settings)
    for step, scores in zip(steps, theirs.scores, strict=True):
        at = scores.log_softmax(-1).gather(1, step.candidates)[step.alive]
        assert_close(at.double(), step.log_probs[step.alive], rtol=0, atol=1e-5)  # transformers' scores are float32
        assert scores.isfinite().all()


def test_reward_guidance_stands_behind_the_warpers_of_the_reference():
    """Warpers before it are the reference's: what they leave is guided, as a `WarpedPolicy` is."""
    lm, rm = models()
    ids, mask = left_padded(6, 2, 4)
    guidance = RewardGuidance(SiblingScorer(rm), mask, beta=2.0, top_k=0, min_ref_prob=0.01)
    warpers = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.8), guidance]
    settings = dict(max_new_tokens=1, do_sample=True, top_k=0, output_scores=True, return_dict_in_generate=True)
    theirs = lm.generate(ids, attention_mask=mask, logits_processor=warpers, pad_token_id=0, **settings).scores[0]
    policy, steps = WarpedPolicy(ModelPolicy(lm), Warp(temperature=0.7, top_p=0.8)), []
    settings = dict(beta=2.0, top_k=0, min_ref_prob=0.01, max_new_tokens=1, on_step=steps.append)
    generate(policy, SiblingScorer(rm), ids, mask, **settings)
    assert_close(theirs.softmax(-1).double(), steps[0].log_probs.exp(), rtol=0, atol=1e-6)
    assert (theirs.isneginf().any(-1)).all()


@pytest.mark.parametrize(
    "settings",
    [dict(num_beams=3), dict(num_beams=3, do_sample=True), dict(prompt_lookup_num_tokens=2), "assistant"],
    ids=["beam search", "beam sampling", "prompt lookup", "assisted decoding"],
)
def test_what_moves_rows_is_refused(settings):
    lm, rm = models()
    settings = dict(assistant_model=tiny_lm("gpt2", seed=5)) if settings == "assistant" else settings
    ids, mask = torch.tensor([[2, 3, 2, 3, 2, 3]]), torch.ones(1, 6, dtype=torch.long)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="not with beam search or assisted decoding"):
        transformers_generate(lm, rm, ids, mask, max_new_tokens=20, eos_token_id=None, **settings)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "padded on the left"),
        (torch.ones(2, 3), r"got \(2, 4\) and \(2, 3\)"),
        (torch.ones(3, 4), r"got \(2, 4\) and \(0, 4\)"),
    ],
)
def test_a_mask_of_other_prompts_is_refused(mask, message):
    lm, rm = models()
    guidance = RewardGuidance(SiblingScorer(rm), mask, beta=2.0, top_k=4)
    with pytest.raises(ValueError, match=message):
        lm.generate(left_padded(4, 4)[0], logits_processor=[guidance], max_new_tokens=2, pad_token_id=0)


def test_a_text_that_outgrows_the_reward_model_is_refused_and_padding_does_not_count():
    lm, rm = tiny_lm("llama", max_position_embeddings=128), tiny_reward_model("gpt2")
    ids, mask = torch.full((2, 30), 3), (torch.arange(30) >= torch.tensor([[20], [10]])).long()  # the longer has 20
    settings = dict(eos_token_id=None, do_sample=False)
    assert transformers_generate(lm, rm, ids, mask, max_new_tokens=44, **settings).shape == (2, 74)
    with pytest.raises(ValueError, match="a text of 65 tokens exceeds the reward model's context of 64"):
        transformers_generate(lm, rm, ids, mask, max_new_tokens=45, **settings)


def test_one_guidance_serves_one_call():
    lm, rm = models()
    ids, mask = left_padded(6)
    settings = dict(attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    settings["logits_processor"] = [RewardGuidance(SiblingScorer(rm), mask, beta=2.0, top_k=4)]
    lm.generate(ids, **settings)
    with pytest.raises(ValueError, match="needs a RewardGuidance of its own"):
        lm.generate(ids, **settings)


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [(1e38, FloatingPointError, "row 0, token 3: .* not a number"), (1e39, ValueError, "beta must be a finite number")],
)
def test_reward_guidance_draws_nothing_from_what_is_no_number(beta, error, message):
    lm, scorer = models()[0].float(), ReencodeScorer(lambda ids, mask: 9.0 * ids[:, -1].float())
    ids, mask = left_padded(3)
    guidance = RewardGuidance(scorer, mask, beta=beta, top_k=4)
    with pytest.raises(error, match=message):
        lm.generate(ids, attention_mask=mask, logits_processor=[guidance], max_new_tokens=2, pad_token_id=0)


def test_reward_guidance_stops_at_a_reward_that_is_not_finite():
    lm, _ = models()
    with pytest.raises(FloatingPointError, match="row 0, token 4: a reward is not finite"):
        transformers_generate(lm, None, *left_padded(3), scorer=lambda rm: Broken(float("nan"), 1), eos_token_id=None)


@torch.no_grad()
def test_any_reward_function_guides():
    """A reward of 1 for each token 7 in the text: with a large beta nothing else is written while 7 is a candidate."""
    lm, _ = models()
    scorer = ReencodeScorer(lambda ids, mask: (ids == 7).sum(-1).double())
    result = generate(ModelPolicy(lm), scorer, *left_padded(3, 5), beta=1000.0, top_k=0, max_new_tokens=4)
    assert (result.tokens == 7).all()
    assert (result.rewards[:, -1] - result.rewards[:, 0] == 3).all()
