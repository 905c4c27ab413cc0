"""A vocabulary head that learns from a scalar one: what the guide is asked, and what the head then says."""

import pytest
import torch
from torch.testing import assert_close

from pargs_min.data import Text
from pargs_min.decode import ModelPolicy, Warp, generate
from pargs_min.distil import candidate_rewards, collate_taught, taught, train_distilled, vocabulary_headed
from pargs_min.losses import distillation_loss
from pargs_min.reward_model import prefix_rewards
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_train import arguments

VOCABULARY, BETA = 14, 2.0
TEXTS = [Text([2, 9, 3], [7, 1]), Text([5], [8, 9, 10, 11]), Text([4, 6], [12]), Text([3], [10, 10, 1])]


def scalar(seed=1, **changes):
    return tiny_reward_model(vocabulary=VOCABULARY, seed=seed, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **changes)


def language_model(seed=0):
    return tiny_lm(vocabulary=VOCABULARY, seed=seed)


def alone(model, ids):
    return prefix_rewards(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("warp", [None, Warp(temperature=0.7, top_k=3)])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_guide_is_asked_for_the_candidates_at_every_prefix(size, warp):
    """Against each text and candidate by itself; prompts and responses of all lengths, in the order they came.

    The reference has a row that the tokenizer lacks: no candidate.
    """
    lm, guide = tiny_lm(vocabulary=VOCABULARY + 1, seed=0), scalar()
    found = taught(TEXTS, guide, lm, tiny_tokenizer(), top_k=5, warp=warp, batch_size=size)
    assert [text[:2] for text in found] == [text[:2] for text in TEXTS]
    for text in found:
        assert text.candidates.shape == text.ref_log_probs.shape == text.rewards.shape == (len(text.response_ids), 5)
        for place in range(len(text.response_ids)):
            prefix = text.prompt_ids + text.response_ids[:place]
            log_probs = lm(input_ids=torch.tensor([prefix])).logits[:, -1, :VOCABULARY].log_softmax(-1)
            log_probs = (log_probs if warp is None else warp(log_probs))[0]
            kept = 5 if warp is None else 3
            assert_close(text.ref_log_probs[place], log_probs.topk(5).values, rtol=0, atol=1e-12)
            assert set(text.candidates[place, :kept].tolist()) == set(log_probs.topk(kept).indices.tolist())
            rewards = torch.stack([alone(guide, [*prefix, one]) for one in text.candidates[place].tolist()])
            rewards[kept:] = 0
            assert_close(text.rewards[place], rewards, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("few", [1, 64])  # candidates are looked up, or all tokens multiplied
def test_the_loss_is_that_of_every_prefix_by_itself(few, tmp_path, monkeypatch):
    monkeypatch.setattr("pargs_min.distil.FEW", few)
    lm, guide, model = language_model(), scalar(), scalar(2, num_labels=VOCABULARY)
    found = taught(TEXTS, guide, lm, tiny_tokenizer(), top_k=5)
    batch = collate_taught(found, pad_id=0)
    rewards = candidate_rewards(model, batch["input_ids"], batch["attention_mask"], batch["candidates"])
    losses, least = [], []
    for row, text in enumerate(found):
        for place in range(len(text.response_ids)):
            prefix = text.prompt_ids + text.response_ids[:place]
            mine = torch.stack([alone(model, [*prefix, one]) for one in text.candidates[place].tolist()])
            assert_close(rewards[row, len(prefix) - 1], mine, rtol=0, atol=1e-12)
            losses.append(distillation_loss(mine, text.rewards[place], text.ref_log_probs[place], BETA))
            least.append(distillation_loss(text.rewards[place], text.rewards[place], text.ref_log_probs[place], BETA))
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=3)
    with torch.enable_grad():
        metrics = train_distilled(model, tiny_tokenizer(), found, found, beta=BETA, args=args)
    assert metrics["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    divergence = (torch.stack(losses) - torch.stack(least)).mean().item()
    assert metrics["eval_divergence"] == pytest.approx(divergence, rel=1e-5)


def test_a_head_of_zeros_stands_on_the_guides_body_and_leaves_the_guide_alone():
    guide = scalar()
    model = vocabulary_headed(guide)
    assert guide.score.out_features == 1
    assert model.score.weight.shape == (VOCABULARY, 16)
    assert not model.score.weight.any()
    for ours, theirs in zip(model.base_model.parameters(), guide.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs


def random_texts(lm, count, seed):
    """Samples of the reference, of up to six tokens behind prompts of one to three."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for length in (1, 2, 3):
        prompts = torch.randint(2, VOCABULARY, (count // 3, length), generator=generator)
        uniforms = torch.rand(len(prompts), 6, generator=generator)
        settings = dict(beta=0.0, top_k=0, max_new_tokens=6, eos=1, uniforms=uniforms)
        written = generate(ModelPolicy(lm), None, prompts, **settings)
        responses = zip(prompts.tolist(), written.tokens.tolist(), written.lengths.tolist(), strict=True)
        texts += [Text(prompt, tokens[:n]) for prompt, tokens, n in responses]
    return texts


def ordered_alike(ours, theirs):
    """How often (N, K) rewards order two candidates of a prefix as others do."""
    ours, theirs = (rewards[:, :, None] - rewards[:, None] for rewards in (ours, theirs))
    return (ours.sign() == theirs.sign())[theirs != 0].double().mean().item()


@pytest.mark.trains
@pytest.mark.parametrize("seed", range(3))
def test_the_head_ranks_candidates_as_the_guide_does(tmp_path, seed):
    """On texts for other prompts, and better than the best ranking that does not read the prefix.

    Behind each bound stands the least favourable number of eight seeds, without vector instructions.
    """
    lm, guide, tokenizer = language_model(seed), scalar(seed + 10), tiny_tokenizer()
    for name, parameter in guide.named_parameters():
        parameter.data *= 2 if "attn" in name else 1  # or the last token alone would nearly tell the reward
    texts, others = random_texts(lm, 384, 2 * seed), random_texts(lm, 48, 2 * seed + 1)
    model, divergences = vocabulary_headed(guide), []
    data = [taught(some, guide, lm, tokenizer, top_k=6) for some in (texts, others)]
    for steps, rate in ((1, 0.0), (150, 5e-3)):
        args = arguments(tmp_path, max_steps=steps, learning_rate=rate, per_device_train_batch_size=32)
        divergences.append(train_distilled(model, tokenizer, *data, beta=BETA, args=args)["eval_divergence"])
    assert divergences[1] < divergences[0] / 3  # 5.9

    batch = collate_taught(data[1], pad_id=0)
    asked = batch["labels"] == 0
    candidates, theirs = batch["candidates"][asked], batch["rewards"][asked]
    with torch.no_grad():
        ours = candidate_rewards(model, batch["input_ids"], batch["attention_mask"], batch["candidates"])
    above = theirs - theirs.mean(-1, keepdim=True)
    table = above.new_zeros(VOCABULARY).scatter_reduce(
        0, candidates.flatten(), above.flatten(), "mean", include_self=False
    )
    blind = ordered_alike(table[candidates], theirs)
    assert ordered_alike(ours[asked], theirs) > blind + 0.02  # 0.042


def test_what_cannot_be_distilled_is_refused(tmp_path):
    lm, guide, tokenizer = language_model(), scalar(), tiny_tokenizer()
    how, found = dict(beta=BETA, args=arguments(tmp_path)), taught(TEXTS, guide, lm, tokenizer)
    with pytest.raises(ValueError, match="texts is empty; write some with `pargs generate --method plain`"):
        train_distilled(vocabulary_headed(guide), tokenizer, [], **how)
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"beta \(--beta\) must be a positive number, got"):
            train_distilled(vocabulary_headed(guide), tokenizer, found, **how | dict(beta=beta))
    with pytest.raises(ValueError, match="no vocabulary head"):
        train_distilled(guide, tokenizer, found, **how)
    headed, small = scalar(num_labels=VOCABULARY), tiny_reward_model(vocabulary=11)
    for refused in (lambda: vocabulary_headed(headed), lambda: taught(TEXTS, headed, lm, tokenizer)):
        with pytest.raises(ValueError, match="has a vocabulary head already"):
            refused()
    for refused in (
        lambda: taught(TEXTS, small, lm, tokenizer),
        lambda: train_distilled(vocabulary_headed(small), tokenizer, found, **how),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            refused()
    guide.config.pargs = dict(objective="win")
    with pytest.raises(ValueError, match="trained with --objective win, whose guidance needs more"):
        vocabulary_headed(guide)
    with pytest.raises(ValueError, match="must have one shape"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), BETA)
