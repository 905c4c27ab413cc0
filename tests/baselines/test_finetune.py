"""The fine-tuned rivals on a world small enough to enumerate: both come to the exact RLHF policy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from pargs_min.baselines.dpo import train_dpo
from pargs_min.baselines.genarm import train_genarm
from pargs_min.baselines.ppo import (
    Models,
    PPOSettings,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    rollout,
    train_ppo,
)
from pargs_min.data import Pair, Text
from pargs_min.reward_model import prefix_rewards
from pargs_min.train import train_language_model
from tests.strategies import rows

END, STEPS, BETA, PROMPT = 1, 3, 1.5, [2]
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "a": 2, "b": 3})),
    pad_token="<pad>",
    eos_token="<end>",
)
YS = sorted({y[: y.index(END) + 1] if END in y else y for y in itertools.product(range(4), repeat=STEPS)})
REWARDS = torch.from_numpy(np.random.default_rng(3).normal(size=len(YS)))  # a response that is cut counts as it stands


def tiny(kind, seed):
    """A random GPT-2 of four tokens."""
    torch.manual_seed(seed)
    return kind(
        GPT2Config(
            vocab_size=4, n_positions=8, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2, bos_token_id=END,
            eos_token_id=END, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, num_labels=1,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def log_probs(model):
    """(40,) log pi(y) of every response."""
    ids = torch.tensor([[*PROMPT, *y, *[0] * (STEPS - len(y))] for y in YS])
    found = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (found * (torch.arange(STEPS) < torch.tensor([[len(y)] for y in YS]))).sum(1)


def reward_fn(ids, mask):
    """The table, for texts behind the one prompt."""
    texts = [tuple(row[keep.bool()].tolist()[len(PROMPT) :]) for row, keep in zip(ids, mask, strict=True)]
    return torch.tensor([REWARDS[YS.index(y)] for y in texts], dtype=torch.float32)


def kl_to_rlhf(model, ref_log_probs):
    """KL(pi || pi_T) in nats, exactly."""
    ours, best = log_probs(model), (ref_log_probs + BETA * REWARDS).log_softmax(-1)
    return (ours.exp() * (ours - best)).sum().item()


def sampled_pairs(count, ref_log_probs, seed=0):
    """Two responses of the reference each, labelled by Bradley-Terry noise on the reward."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(YS), size=(count, 2), p=ref_log_probs.softmax(-1).numpy())
    wins = rng.random(count) < torch.sigmoid(REWARDS[drawn[:, 0]] - REWARDS[drawn[:, 1]]).numpy()
    ordered = np.where(wins[:, None], drawn, drawn[:, ::-1])
    return [Pair(PROMPT, list(YS[a]), list(YS[b])) for a, b in ordered if a != b]


def arguments(folder, **changes):
    quiet = dict(save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, report_to=[], seed=0)
    return TrainingArguments(str(folder), **quiet | changes)


# ---- language models that guide ----


@pytest.mark.trains
def test_reweighted_texts_make_the_rlhf_policy(tmp_path):
    """Over three seeds of everything 2 % of the divergence is left, and a tenth is allowed."""
    before = after = 0.0
    for seed in range(3):
        model, rng = tiny(GPT2LMHeadModel, seed), np.random.default_rng(seed)
        ref = log_probs(model)
        drawn = rng.choice(len(YS), size=8000, p=ref.softmax(-1).numpy())
        texts = [Text(PROMPT, list(YS[y]), float(REWARDS[y])) for y in drawn]
        before += kl_to_rlhf(model, ref)
        args = arguments(tmp_path, max_steps=100, per_device_train_batch_size=128, learning_rate=3e-3)
        train_language_model(model, TOKENIZER, texts, args=args, beta=BETA)
        after += kl_to_rlhf(model, ref)
    assert before > 3
    assert after < before / 10


@pytest.mark.trains
def test_an_autoregressive_reward_model_orders_responses_by_their_reward(tmp_path):
    """Over texts of the reference the correlation of log pi_r(y) and r(y) goes from at most .38 to at least .94."""
    for seed in range(3):
        model, found = tiny(GPT2LMHeadModel, seed), []
        ref = log_probs(model)
        args = arguments(tmp_path, max_steps=100, per_device_train_batch_size=128, learning_rate=3e-3)
        for train in (lambda *_, **__: None, train_genarm):
            train(model, TOKENIZER, sampled_pairs(8000, ref, seed), args=args)
            spread = np.cov(np.stack([log_probs(model), REWARDS]), aweights=ref.softmax(-1).numpy())
            found.append(spread[0, 1] / np.sqrt(spread[0, 0] * spread[1, 1]))
        assert found[0] < 0.5
        assert found[1] > 0.8


# ---- DPO ----


@pytest.mark.trains
def test_dpo_comes_to_the_rlhf_policy(tmp_path):
    """Over three seeds of everything a fifth of the divergence is left, the sampling error of so many pairs; half of it
    is allowed."""
    before, after, accuracies = 0.0, 0.0, []
    for seed in range(3):
        model = tiny(GPT2LMHeadModel, seed)
        ref = log_probs(model)
        before += kl_to_rlhf(model, ref)
        args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=128, learning_rate=2e-3)
        pairs, held_out = sampled_pairs(8000, ref, seed), sampled_pairs(200, ref, seed + 100)
        accuracies.append(train_dpo(model, TOKENIZER, pairs, held_out, beta=BETA, args=args)["eval_rewards/accuracies"])
        after += kl_to_rlhf(model, ref)
        assert not model.training
        assert "forward" not in vars(model)
    assert before > 3
    assert after < before / 2
    assert np.mean(accuracies) > 0.6  # 0.71


def test_dpo_reads_the_ids_of_our_pairs_and_its_loss_is_the_definition(tmp_path):
    """Before any step the loss is log 2; after some, that of log-ratios by plain forward passes."""
    model, args = tiny(GPT2LMHeadModel, 0), arguments(tmp_path, max_steps=3, learning_rate=1e-3)
    ref = dict(zip(YS, log_probs(model), strict=True))
    pairs = [Pair(PROMPT, [3, END], [2, 2, 0]), Pair(PROMPT, [END], [3, 3, END]), Pair(PROMPT, [2, 2, 2], [0, END])]
    metrics = train_dpo(model, TOKENIZER, pairs, pairs, beta=BETA, args=args)
    now = dict(zip(YS, log_probs(model), strict=True))
    ratios = {y: now[y] - ref[y] for y in YS}
    margins = torch.stack([ratios[tuple(p.chosen_ids)] - ratios[tuple(p.rejected_ids)] for p in pairs]) / BETA
    assert margins.abs().max() > 0.01
    assert metrics["eval_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_every_held_out_pair_counts_once_in_what_dpo_reports(tmp_path, size):
    model = tiny(GPT2LMHeadModel, 0)
    ref = dict(zip(YS, log_probs(model), strict=True))
    pairs = sampled_pairs(200, log_probs(model))
    args = arguments(tmp_path, max_steps=20, learning_rate=1e-3, per_device_eval_batch_size=size)
    metrics = train_dpo(model, TOKENIZER, pairs[5:], pairs[:5], beta=BETA, args=args)
    now = dict(zip(YS, log_probs(model), strict=True))
    margins = [now[c] - ref[c] - now[r] + ref[r] for c, r in ((tuple(p[1]), tuple(p[2])) for p in pairs[:5])]
    wins = sum(float(margin > 0) for margin in margins)
    assert 0 < wins < 5
    assert metrics["eval_rewards/accuracies"] == pytest.approx(wins / 5)
    loss = -torch.nn.functional.logsigmoid(torch.stack(margins) / BETA).mean()
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_dpo_needs_a_positive_beta(tmp_path, beta):
    with pytest.raises(ValueError, match="beta must be a positive number"):
        train_dpo(tiny(GPT2LMHeadModel, 0), TOKENIZER, [], beta=beta, args=arguments(tmp_path))


# ---- PPO ----

SETTINGS = dict(beta=BETA, max_new_tokens=STEPS, batch_size=128, minibatch_size=64, learning_rate=2e-3)


def run(model, reward=reward_fn, prompts=(PROMPT,), checkpoint=None, save_every=20, **changes):
    settings = PPOSettings(**SETTINGS | changes)
    value_model = tiny(GPT2ForSequenceClassification, settings.seed + 1)
    return train_ppo(model, value_model, reward, prompts, [END], settings, checkpoint, save_every)


@pytest.mark.trains
def test_ppo_comes_to_the_rlhf_policy():
    """Over four seeds of everything 15 % of the divergence is left after 20 updates, and 25 % is allowed. (With half or
    twice the beta, PPO leaves 30 % or more.)

    What an update reports is of texts that were drawn before it: within 5 standard errors of the exact mean under the
    policy of then, by the normal approximation to 128 texts, which each of the 24 numbers misses with probability 6e-7.
    """
    before = after = 0.0
    for seed in range(4):
        model = tiny(GPT2LMHeadModel, seed)
        ref = log_pi = log_probs(model)
        before += kl_to_rlhf(model, ref)
        for numbers in run(model, updates=20, minibatch_size=128, seed=seed):
            if numbers["update"] in (1, 2, 20):
                for name, values in (("reward", REWARDS), ("kl", log_pi - ref)):
                    mean = (log_pi.exp() * values).sum()
                    error = ((log_pi.exp() * (values - mean).square()).sum() / SETTINGS["batch_size"]).sqrt().item()
                    assert numbers[name] == pytest.approx(mean.item(), abs=5 * error + 1e-5)
            log_pi = log_probs(model)
        after += kl_to_rlhf(model, ref)
    assert before > 4
    assert after < before / 4


def test_an_interrupted_ppo_run_goes_on_to_the_same_weights(tmp_path):
    whole, parts, file = tiny(GPT2LMHeadModel, 0), tiny(GPT2LMHeadModel, 0), tmp_path / "checkpoint.pt"
    list(run(whole, updates=5))
    list(itertools.islice(run(parts, updates=5, checkpoint=file, save_every=2), 3))
    again = tiny(GPT2LMHeadModel, 5)
    assert [numbers["update"] for numbers in run(again, updates=5, checkpoint=file)] == [3, 4, 5]
    assert torch.equal(log_probs(again), log_probs(whole))
    with pytest.raises(ValueError, match="was made with other settings"):
        next(run(again, updates=5, checkpoint=file, clip=0.1))
    with pytest.raises(ValueError, match="was made with other prompts"):
        next(run(again, updates=6, checkpoint=file, prompts=[[3]]))
    with pytest.raises(ValueError, match="was made with another reward model"):
        next(run(again, updates=6, checkpoint=file, reward=lambda ids, mask: reward_fn(ids, mask) + 0.1))


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def half(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    updates = run(tiny(GPT2LMHeadModel, 0), updates=3, checkpoint=tmp_path / "checkpoint.pt", save_every=1)
    assert [next(updates)["update"] for _ in range(2)] == [1, 2]
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        next(updates)
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole


@torch.no_grad()
def test_a_rollout_knows_of_each_text_what_the_text_alone_says():
    """Prompts of unequal lengths, padded; log-probabilities, values and rewards by a forward pass for each text."""
    model, value_model, ref = tiny(GPT2LMHeadModel, 0), tiny(GPT2ForSequenceClassification, 1), tiny(GPT2LMHeadModel, 2)
    settings = PPOSettings(**SETTINGS | dict(batch_size=12, beta=0.5))
    models, prompts = Models(model, value_model, ref), [[2], [3, 2, 0, 3]]
    batch = rollout(models, lambda ids, mask: ids[:, -1].float(), prompts, [END], settings, update=0)
    assert batch["mask"][:, 0].sum() == 6  # half of the texts are of each prompt
    for row in range(12):
        n = int(batch["written"][row].sum())
        ids = batch["ids"][row][batch["mask"][row].bool()][None]
        start = ids.shape[1] - n
        ours, theirs = (
            m(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
            for m in (model, ref)
        )
        values = prefix_rewards(value_model, ids, torch.ones_like(ids))[0, start - 1 : -1]
        assert_close(batch["old_log_probs"][row, :n], ours)
        assert_close(batch["old_values"][row, :n], values)
        assert_close(batch["kl"][row], (ours - theirs).sum())
        rewards = (theirs - ours) / 0.5
        rewards[-1] += batch["scores"][row]
        advantages = gae(rewards[None], values[None], torch.ones(1, n, dtype=torch.bool))[0]
        assert_close(batch["returns"][row, :n], advantages + values)


@torch.no_grad()
def test_a_rollout_knows_no_ids_but_the_tokenizers():
    """A model may have more rows, which mean nothing."""
    model, value_model = tiny(GPT2LMHeadModel, 0), tiny(GPT2ForSequenceClassification, 1)
    settings, rows = PPOSettings(**SETTINGS | dict(batch_size=12)), END + 1
    models = Models(model, value_model, tiny(GPT2LMHeadModel, 2), vocabulary=rows)
    batch = rollout(models, lambda ids, mask: ids[:, -1].float(), [[2]], [END], settings, update=0)
    drawn = batch["ids"][:, 1:]
    assert drawn.max() < rows < model.config.vocab_size
    first = model(input_ids=torch.tensor([[2]])).logits[0, -1, :rows].log_softmax(-1)
    assert_close(batch["old_log_probs"][:, 0], first[drawn[:, 0]])


def test_the_first_ratio_is_one():
    """With one pass over one minibatch nothing is clipped: the rollout's log-probabilities are those of the update."""
    numbers = next(run(tiny(GPT2LMHeadModel, 0), passes=1, minibatch_size=128))
    assert numbers["clipped"] == 0
    assert numbers["policy_loss"] == pytest.approx(0, abs=1e-5), "whitened advantages have mean zero"


def test_long_gradients_are_cut():
    """To next to nothing, here: below Adam's eps weights hardly move."""
    moved = []
    for norm in (1.0, 1e-10):
        model = tiny(GPT2LMHeadModel, 0)
        before = log_probs(model)
        next(run(model, max_grad_norm=norm))
        moved.append((log_probs(model) - before).abs().max())
    assert moved[1] < 1e-3 < 0.1 < moved[0]


def test_a_batch_of_one_token_leaves_numbers():
    """Its advantages have no spread to be divided by."""
    model = tiny(GPT2LMHeadModel, 0)
    list(run(model, lambda ids, mask: ids[:, -1].float(), batch_size=1, minibatch_size=1, max_new_tokens=1, updates=2))
    assert all(weight.isfinite().all() for weight in model.parameters())


@given(rows(st.integers(1, 6), -5.0, 5.0), rows(st.just(6), -5.0, 5.0), st.floats(0, 1))
def test_gae_is_its_definition(rewards, values, lam):
    width = rewards.shape[1]
    values, lengths = values[:, :width], torch.tensor([width, 1, (width + 1) // 2])
    written = torch.arange(width) < lengths[:, None]
    found = gae(rewards, values, written, lam)
    for row, n in enumerate(lengths.tolist()):
        r, v = rewards[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        deltas = [r[t] + v[t + 1] - v[t] for t in range(n)]
        wanted = [sum(lam ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        assert_close(found[row], torch.tensor(wanted + [0.0] * (width - n), dtype=torch.float64))


def test_the_policy_gradient_stops_where_the_ratio_is_clipped():
    log_probs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    clipped_policy_loss(log_probs, torch.zeros(5), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.2).sum().backward()
    assert_close(log_probs.grad, torch.tensor([0.0, 0.5, -0.5, 0.0, 0.0]).exp() * torch.tensor([0, 1, -1, 0, -2]))


def test_the_value_loss_takes_the_worse_of_value_and_clipped_value():
    losses = clipped_value_loss(torch.tensor([1.0, 0.1, -3.0]), torch.zeros(3), torch.ones(3), 0.2)
    assert_close(losses, torch.tensor([0.32, 0.405, 8.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=0.0), "beta must be a positive number"),
        (dict(updates=0), "updates must be at least 1"),
        (dict(prompts=()), "prompts is empty"),
        (dict(save_every=0), "save_every must be at least 1, got 0"),
        (dict(lam=1.1), r"lam in 0..1, got 0.1 and 1.1"),
        (dict(lam=float("nan")), r"lam in 0..1"),
        (dict(value_weight=-0.1), "value_weight must be at least 0"),
    ],
)
def test_bad_arguments_of_ppo_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        next(run(tiny(GPT2LMHeadModel, 0), **change))


def test_ppo_that_diverges_stops_before_it_saves(tmp_path):
    updates = run(tiny(GPT2LMHeadModel, 0), updates=1, learning_rate=1e37, checkpoint=tmp_path / "checkpoint.pt")
    with pytest.raises(FloatingPointError, match="training diverged at update 1; lower --learning-rate"):
        next(updates)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_reward_that_is_not_finite_stops_ppo():
    with pytest.raises(FloatingPointError, match="row 0: the reward of a text is not finite"):
        next(run(tiny(GPT2LMHeadModel, 0), reward=lambda ids, mask: torch.full(ids.shape[:1], float("nan"))))
