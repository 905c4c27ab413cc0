"""Steps that are left unguided: the policy of the formula, the same texts by every scorer, and the passes saved."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from pargs_min.decode import (
    ModelPolicy,
    NoReward,
    RewardGuidance,
    Warp,
    WarpedPolicy,
    generate,
    greedy,
    row_uniforms,
    sample,
)
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import (
    LanguageModelScorer,
    ReencodeScorer,
    SiblingScorer,
    VocabularyScorer,
    WinTilt,
    model_rewards,
    sibling_mask,
)
from pargs_min.static import StaticScorer
from pargs_min.trunk import TrunkScorer
from tests.strategies import SHAPES, left_padded, tiny_lm, tiny_reward_model
from tests.test_decode import enumerated
from tests.test_texts import texts
from tests.test_trunk import guide_above
from tests.test_trunk import language_model as language_model_of_three_layers

EXACT = dict(rtol=0, atol=1e-12, equal_nan=True)
VOCABULARY, END = 11, 1
SURE = [0.35, 0.4, 0.55, 1.0]  # from steps that are nearly all unguided to those alone that have no choice


def peaked_lm(vocabulary=VOCABULARY):
    """A language model that is sometimes sure."""
    lm = tiny_lm("gpt2", vocabulary)
    lm.lm_head.weight.data = 2 * lm.lm_head.weight.data
    return lm


def language_model():
    """log pi_r of a text's last token, by reading every text by itself."""

    def reward(ids, mask):
        model = tiny_lm("llama", seed=3)
        texts = zip(ids, mask.bool(), strict=True)
        return torch.stack([model(input_ids=t[m][None]).logits[0, -2].log_softmax(-1)[t[-1]] for t, m in texts])

    return reward


def window(width, num_labels=1):
    """A reward model whose layers see so many tokens."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    return tiny_reward_model("mistral", num_labels=num_labels, num_key_value_heads=2, sliding_window=width, **sizes)


SCORERS = {
    "siblings": (lambda: SiblingScorer(tiny_reward_model("llama")), lambda: model_rewards(tiny_reward_model("llama"))),
    "learned positions": (lambda: SiblingScorer(tiny_reward_model()), lambda: model_rewards(tiny_reward_model())),
    "vocabulary head": (
        lambda: VocabularyScorer(tiny_reward_model("gpt2", num_labels=VOCABULARY)),
        lambda: lambda *text: prefix_rewards(tiny_reward_model("gpt2", num_labels=VOCABULARY), *text)[:, -1],
    ),
    "attention windows": (
        lambda: VocabularyScorer(window(3, VOCABULARY)),
        lambda: lambda *text: prefix_rewards(window(3, VOCABULARY), *text)[:, -1],
    ),
    "language model": (lambda: LanguageModelScorer(tiny_lm("llama", seed=3)), lambda: language_model()),
}


@torch.no_grad()
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("guide_below", SURE)
def test_the_distribution_is_the_guided_one_or_the_references(guide_below, truncate):
    """Every path of three tokens. Guided where the likeliest token has less than P; else the candidates as they are."""
    lm, scorer, prompt = peaked_lm(5), SiblingScorer(tiny_reward_model("llama", 5)), torch.tensor([[2, 3]])
    settings, steps = dict(top_k=3, min_ref_prob=0.1, truncate=truncate), []
    gate = dict(guide_below=guide_below, on_step=steps.append)
    found = enumerated(ModelPolicy(lm), scorer, prompt, 5, 3, beta=1.7, **settings, **gate)
    guided, alone = (enumerated(ModelPolicy(lm), scorer, prompt, 5, 3, beta=b, **settings) for b in (1.7, 0.0))
    sure = torch.stack([(s.ref_log_probs.amax(1).exp() >= guide_below) for s in steps], 1)
    single = torch.stack([(s.ref_log_probs.exp() >= 0.1).sum(1) < 2 for s in steps], 1)
    expected = torch.where(sure | single, alone.log_probs, guided.log_probs)
    assert_close(found.log_probs, expected, **EXACT)
    assert_close(found.rewards, guided.rewards.masked_fill(sure | single, torch.nan), **EXACT)
    assert (sure | single).any()
    assert (guided.log_probs - expected).abs().nan_to_num().max() > 0.1 or guide_below == 1
    assert sum(log_prob.exp() for log_prob in found.log_probs.sum(1)).item() == pytest.approx(1, abs=1e-12)


@torch.no_grad()
def test_a_single_candidate_makes_no_difference_and_no_pass():
    """One token that the warp leaves is certain; one that is left as a candidate keeps what the reference gives it."""
    lm, rm, prompts, passes = peaked_lm(), tiny_reward_model("llama"), left_padded(4, 2, 3), []
    settings = dict(beta=3.0, max_new_tokens=6, uniforms=row_uniforms(0, range(3), [0] * 3, 6))
    for policy, candidates in (
        (WarpedPolicy(ModelPolicy(lm), Warp(top_k=1)), dict(top_k=4)),
        (ModelPolicy(lm), dict(top_k=1)),
        (ModelPolicy(lm), dict(top_k=4, min_ref_prob=1.0)),
        (ModelPolicy(lm), dict(top_k=1, truncate=True)),
    ):
        asked = generate(policy, SiblingScorer(rm), *prompts, **settings, **candidates)
        scorer = SiblingScorer(rm)
        hook = rm.base_model.register_forward_hook(lambda *_: passes.append(1))
        found = generate(policy, scorer, *prompts, guide_below=1.0, **settings, **candidates)
        hook.remove()
        assert torch.equal(found.tokens, asked.tokens)
        assert_close(found.log_probs, asked.log_probs, **EXACT)
        assert found.rewards.isnan().all()
    assert passes == [1] * 4  # the prompts


@torch.no_grad()
@pytest.mark.parametrize("draw", [sample, greedy])
@pytest.mark.parametrize("guide_below", SURE[:3])
@pytest.mark.parametrize("kind", SCORERS)
def test_every_scorer_reads_later_what_it_was_not_asked_for(kind, guide_below, draw):
    """Left-padded rows as one batch, by whole texts, and each row alone: the same tokens and numbers.

    Rows that need no guide are given none whatever the others need, and a row alone is scored where it needs it.
    """
    fast, naive = SCORERS[kind]
    lm, (ids, mask), uniforms = peaked_lm(), left_padded(6, 1, 4), row_uniforms(3, range(3), [0] * 3, 12)
    settings = dict(beta=2.0, top_k=4, max_new_tokens=12, eos=END, pad=0, guide_below=guide_below, draw=draw)
    found, slow = (
        generate(ModelPolicy(lm), scorer, ids, mask, uniforms=uniforms, **settings)
        for scorer in (fast(), ReencodeScorer(naive()))
    )
    assert torch.equal(found.tokens, slow.tokens)
    written = torch.arange(found.tokens.shape[1]) < found.lengths[:, None]
    guided = written & ~found.rewards.isnan()
    assert guided.any()
    assert (guided < written).any() or guide_below == 0.55
    for name in ("log_probs", "ref_log_probs", "rewards"):
        assert_close(getattr(found, name), getattr(slow, name), **EXACT)
    for row in range(3):
        scorer, asked, steps = fast(), [], []
        score = scorer.score
        scorer.score = lambda *step, score=score, asked=asked: asked.append(1) or score(*step)
        text = ids[row : row + 1, mask[row].bool()]
        alone = generate(
            ModelPolicy(lm), scorer, text, uniforms=uniforms[row : row + 1], on_step=steps.append, **settings
        )
        n = int(found.lengths[row])
        assert torch.equal(alone.tokens[0], found.tokens[row, :n])
        for name in ("log_probs", "ref_log_probs", "rewards"):
            assert_close(getattr(alone, name)[0], getattr(found, name)[row, :n], **EXACT)
        assert len(asked) == sum(bool(step.ref_log_probs.amax().exp() < guide_below) for step in steps)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["language model", "vocabulary head"])
def test_a_guide_above_a_shared_trunk_catches_up_as_well(kind):
    """It has the features of all tokens that the language model read in the meantime."""
    lm, prompts = language_model_of_three_layers(), left_padded(6, 2, 4)
    guide, make = guide_above(lm, kind)
    settings = dict(beta=0.5, top_k=4, max_new_tokens=12, uniforms=row_uniforms(0, range(3), [0] * 3, 12))
    for rows in (slice(0, 3), slice(1, 2)):  # from the first step on, and only later
        some = settings | dict(uniforms=settings["uniforms"][rows], guide_below=0.7)
        whole, upper = (
            generate(WarpedPolicy(ModelPolicy(lm), Warp(0.5)), scorer, *(x[rows] for x in prompts), **some)
            for scorer in (make(guide), TrunkScorer(lm, guide, 2, make))
        )
        assert torch.equal(upper.tokens, whole.tokens)
        assert_close(upper.rewards, whole.rewards, **EXACT)
        unknown = upper.rewards.isnan().all(0)
        assert 0 < unknown.sum() < 12 or len(upper.tokens) == 3


@torch.no_grad()
@pytest.mark.parametrize("most", [1024, 2])
@pytest.mark.parametrize("family", SHAPES)
def test_siblings_behind_several_tokens_are_scored_as_whole_texts(monkeypatch, family, most):
    """Nothing, two and three tokens since the prompt or the last pass, at once and in parts."""
    monkeypatch.setattr("pargs_min.scoring.MOST", most)
    model, (ids, mask) = tiny_reward_model(family), left_padded(5, 1, 3)
    fast, slow = SiblingScorer(model), ReencodeScorer(model_rewards(model))
    tokens = torch.randint(2, 11, (8, 3), generator=torch.Generator().manual_seed(1))
    for scorer in (fast, slow):
        scorer.start(ids, mask)
    for number, drawn in enumerate(tokens):
        if number in (2, 3, 6):
            candidates = tokens[:5].T
            assert_close(fast.score(candidates), slow.score(candidates), **EXACT)
        for scorer in (fast, slow):
            scorer.push(drawn)
    assert fast.cache.get_seq_length() == 5 + 6


def test_the_mask_of_several_tokens():
    sees = sibling_mask(torch.tensor([[0, 1]]), k=2, dtype=torch.float64, n=2)[0, 0] == 0
    assert sees.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]]


@torch.no_grad()
def test_a_text_that_outgrows_a_window_is_refused_before_the_pass():
    scorer = SiblingScorer(window(8))
    scorer.start(*left_padded(4))
    for token in torch.tensor([[2], [3], [4]]):
        scorer.push(token)
    assert scorer.score(torch.tensor([[5, 6]])).shape == (1, 2)
    scorer.push(torch.tensor([2]))
    with pytest.raises(ValueError, match="outgrows this reward model's attention window of 8"):
        scorer.score(torch.tensor([[5, 6]]))


@torch.no_grad()
def test_the_win_tilt_of_a_row_that_is_not_asked_for_is_the_reference():
    lm, prompts, steps = peaked_lm(), left_padded(6, 2, 4), []
    scorer = WinTilt(SiblingScorer(tiny_reward_model("llama")), 2.0)
    generate(ModelPolicy(lm), scorer, *prompts, beta=1.0, top_k=4, max_new_tokens=8, guide_below=0.4,
             on_step=steps.append)  # fmt: skip
    sure = torch.cat([step.ref_log_probs.amax(1).exp() >= 0.4 for step in steps])
    moved = torch.cat([(step.log_probs - step.ref_log_probs).abs().amax(1) for step in steps])
    assert moved[sure].max() < 1e-12 < 1e-3 < moved[~sure].min()


class SureAndOpen(NoReward):
    """A reference that is sure in its first row, never in its second, whatever was written; counts what it is asked."""

    asked = 0

    def log_probs(self):
        return torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]]).log()

    def score(self, candidates, ref_log_probs):
        self.asked += 1
        return super().score(candidates, ref_log_probs)


@pytest.mark.parametrize(("ends", "asked"), [(0, 1), (2, 3), (None, 5)])
def test_rows_that_have_ended_need_no_guide(ends, asked):
    tokens, both = iter([[2, 1 if number == ends else 2] for number in range(5)]), SureAndOpen()
    settings = dict(beta=1.0, top_k=0, max_new_tokens=5, eos=END, guide_below=0.8)
    generate(both, both, *left_padded(3, 3), draw=lambda *_: torch.tensor(next(tokens)), **settings)
    assert both.asked == asked


@torch.no_grad()
def test_reward_guidance_leaves_the_same_steps_unguided():
    lm, rm, (ids, mask) = peaked_lm(), tiny_reward_model("llama"), left_padded(6, 2, 4)
    settings = dict(beta=2.0, top_k=4, guide_below=0.4)
    guidance = RewardGuidance(SiblingScorer(rm), mask, **settings)
    theirs = lm.generate(
        ids, attention_mask=mask, logits_processor=[guidance], do_sample=False, max_new_tokens=10, eos_token_id=END,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    steps = []
    settings |= dict(max_new_tokens=10, eos=END, pad=0, draw=greedy, on_step=steps.append)
    ours = generate(ModelPolicy(lm), SiblingScorer(rm), ids, mask, **settings)
    assert torch.equal(theirs.sequences[:, 6:], ours.tokens)
    for step, scores in zip(steps, theirs.scores, strict=True):
        at = scores.log_softmax(-1).gather(1, step.candidates)[step.alive].double()
        assert_close(at, step.log_probs[step.alive], rtol=0, atol=1e-5)
    assert 0 < ours.rewards.isnan().sum() < ours.rewards.numel()


def test_texts_do_not_depend_on_their_batch_and_passes_are_counted():
    """Alone, a text has one pass of the reference per token, one of the guide where it was needed, one of the guide for
    all of a prompt but its last token, and one of it for the reward of the whole text."""
    settings = dict(method="pargs", guide_below=0.4, ref_temperature=0.5, num_samples=4)
    every, steps = [*texts(**settings | dict(guide_below=None), batch_size=1)], []
    alone = [*texts(**settings, batch_size=1, on_step=steps.append)]
    for text, other in zip(texts(**settings, batch_size=12), alone, strict=True):
        assert text["response_ids"] == other["response_ids"]
        assert text["kl"] == pytest.approx(other["kl"], abs=1e-12)
    needed = sum(bool(step.ref_log_probs.amax().exp() < 0.4) for step in steps)
    tokens, more = sum(len(text["response_ids"]) for text in alone), sum(len(text["prompt_ids"]) > 1 for text in alone)
    assert 0 < needed < tokens
    assert sum(text["cost"]["model_calls"] for text in alone) == tokens + needed + more + len(alone)
    tokens = sum(len(text["response_ids"]) for text in every)
    assert sum(text["cost"]["model_calls"] for text in every) == 2 * tokens + more + len(every)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guide_below=0.0), "guide_below must be a probability, above 0 and at most 1, got 0.0"),
        (dict(guide_below=80.0), "guide_below must be a probability, above 0 and at most 1, got 80.0"),
        (dict(method="smc", guide_below=0.5), "guide_below leaves steps without rewards, by which particles"),
        (dict(method="plain", guide_below=0.5), "guide_below are about the candidates of guided methods"),
        (dict(compiled=True, guide_below=0.5), r"guide_below \(--guide-below\) does not go with --compile"),
    ],
)
def test_what_does_not_go_with_it_is_named(settings, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        next(texts(**settings))


@torch.no_grad()
def test_a_compiled_scorer_takes_one_token_at_a_time():
    scorer = StaticScorer(tiny_reward_model("llama"), 20, backend="eager")
    scorer.start(*left_padded(3))
    with pytest.raises(RuntimeError, match="a compiled step reads one token: score"):
        scorer.push(torch.tensor([2]))
    scorer.score(torch.tensor([[2, 3]]))
    with pytest.raises(RuntimeError, match="once per step"):
        scorer.score(torch.tensor([[2, 3]]))
