from __future__ import annotations

import copy
import random
import sys
import warnings
from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraModel
from transformers import AutoModelForSequenceClassification, TrainingArguments
from transformers.pytorch_utils import Conv1D

from pargs_min import minimal, train
from pargs_min.baselines.farma import train_farma
from pargs_min.baselines.genarm import train_genarm
from pargs_min.data import Pair, Text, at_response_tokens, by_prompt, centred, collate, reweighted
from pargs_min.distil import taught, train_distilled
from pargs_min.losses import bradley_terry_loss, prefix_value_loss, soft_value_loss
from pargs_min.models import save_reward_model
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import model_rewards
from pargs_min.train import (
    objective_functions,
    prefix_accuracy,
    rate,
    token_log_probs,
    train_language_model,
    train_partial_on_texts,
    train_reward_model,
    train_value_model,
)
from pargs_min.trainer import last_checkpoint

from .strategies import tiny_config, tiny_lm, tiny_reward_model, tiny_tokenizer, token_pairs

END = 1


def arguments(folder, **changes):
    defaults = dict(
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    return TrainingArguments(str(folder), **{**defaults, **changes})


def random_pairs(count, seed=0):
    """Pairs of unequal lengths; the chosen response begins with token 7, the rejected one with 8: that is all."""
    words = random.Random(seed)

    def response(first):
        return [first, *(words.randrange(9, 14) for _ in range(words.randrange(6))), END]

    return [Pair([words.randrange(2, 7)], response(7), response(8)) for _ in range(count)]


def reward_model(seed=1, **changes):
    return tiny_reward_model(vocabulary=14, seed=seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- training ----


# What is claimed of a trained model is claimed of three. All of them learn from noise-free labels in float64, so their
# numbers hardly depend on the processor; behind each bound stands the least favourable number of eight seeds.
three_seeds = pytest.mark.parametrize("seed", range(3))


@pytest.mark.trains
@three_seeds
@pytest.mark.parametrize("objective", ["partial", "full"])
def test_training_learns_which_response_is_better(tmp_path, objective, seed):
    model, pairs = reward_model(seed), random_pairs(64, seed=2 * seed)
    metrics = train_reward_model(
        model,
        tiny_tokenizer(),
        pairs,
        random_pairs(32, seed=2 * seed + 1),
        args=arguments(tmp_path, max_steps=60, per_device_train_batch_size=16),
        objective=objective,
    )
    assert metrics["eval_accuracy"] > 0.95  # 1
    assert metrics["eval_loss"] < 0.3  # 0.006
    assert not model.training


@pytest.mark.parametrize("killed_after", [3, 7])
def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path, monkeypatch, killed_after):
    pairs = random_pairs(12)  # three batches an epoch: checkpoint 2 falls within an epoch, 6 between two

    def run(folder, resume=False):
        torch.manual_seed(resume)  # what went before must not matter
        model = tiny_reward_model(vocabulary=14, seed=resume + 1)  # with dropout; what is resumed replaces the weights
        args = arguments(tmp_path / folder, max_steps=8, save_strategy="steps", save_steps=2)
        train_reward_model(model, tiny_tokenizer(), pairs, args=args, resume=resume)
        return weights(model)

    expected = run("whole")
    compute_loss, calls = train.PairTrainer.compute_loss, []

    def killed(self, *rest, **keywords):
        calls.append(1)
        if len(calls) > killed_after:
            raise KeyboardInterrupt
        return compute_loss(self, *rest, **keywords)

    monkeypatch.setattr(train.PairTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.undo()
    (tmp_path / "killed" / "checkpoint-8").mkdir()  # killed while it wrote this one
    assert last_checkpoint(tmp_path / "killed").endswith(f"checkpoint-{killed_after - 1}")
    assert torch.equal(run("killed", resume=True), expected)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_out_of_memory_says_what_to_lower_and_a_lower_batch_size_goes_on(tmp_path, monkeypatch, error):
    """Half the batch twice is the same training, from the checkpoint on."""
    pairs = random_pairs(12)

    def run(folder, size, parts, resume=False):
        model = reward_model()
        steps = dict(max_steps=6, save_strategy="steps", save_steps=2, optim="sgd", learning_rate=0.1)
        parts = dict(per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        args = arguments(tmp_path / folder, **steps, **parts)
        train_reward_model(model, tiny_tokenizer(), pairs, args=args, resume=resume)
        return weights(model)

    expected = run("whole", 4, 1)
    compute_loss = train.PairTrainer.compute_loss

    def short_of_memory(self, model, inputs, *rest, **keywords):
        if self.state.global_step == 3 and len(inputs["chosen_lengths"]) > 2:
            raise error
        return compute_loss(self, model, inputs, *rest, **keywords)

    monkeypatch.setattr(train.PairTrainer, "compute_loss", short_of_memory)
    message = (
        "out of memory while training with --per-device-train-batch-size 4 .*the same training fits in less with "
        "--per-device-train-batch-size 2 --gradient-accumulation-steps 2 or --gradient-checkpointing True, from the "
        "last checkpoint with --resume; another one with --lora-rank 16, --bf16 True, a lower --max-length"
    )
    with pytest.raises(MemoryError, match=message):
        run("short", 4, 1)
    assert last_checkpoint(tmp_path / "short").endswith("checkpoint-2")
    torch.testing.assert_close(run("short", 2, 2, resume=True), expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_weight(tmp_path):
    trained = []
    for checkpointing in (False, True):
        model = tiny_reward_model("llama", vocabulary=14)
        args = arguments(tmp_path, gradient_checkpointing=checkpointing, optim="sgd")
        train_reward_model(model, tiny_tokenizer(), random_pairs(12), args=args)
        trained.append(weights(model))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-12)


def test_resuming_where_there_is_nothing_starts_anew(tmp_path):
    model, other = reward_model(), reward_model()
    train_reward_model(model, tiny_tokenizer(), random_pairs(8), args=arguments(tmp_path / "a"), resume=True)
    train_reward_model(other, tiny_tokenizer(), random_pairs(8), args=arguments(tmp_path / "b"))
    assert torch.equal(weights(model), weights(other))
    assert last_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_the_models_own_forward_is_back_afterwards(tmp_path, precision):
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", 14, num_labels=1))
    train_reward_model(model, tiny_tokenizer(), random_pairs(8), args=arguments(tmp_path, max_steps=1, **precision))
    assert "forward" not in vars(model)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(IndexError):
        train_reward_model(model, tiny_tokenizer(), [Pair([99], [5], [6])], args=arguments(tmp_path))
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(objective="value"), "objective"), (dict(tail="cut"), "tail"), (dict(reduction="sum"), "reduction")],
)
def test_unknown_names_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(4), args=arguments(tmp_path), **changes)


def test_a_bidirectional_model_is_refused(tmp_path):
    config = tiny_config("bert", 14, num_labels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    bert = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="no reward at every token"):
        train_reward_model(bert, tiny_tokenizer(), random_pairs(4), args=arguments(tmp_path))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc-per-node=2"):
        train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(4), args=args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(label_smoothing_factor=0.1), r"\(--label-smoothing-factor\) must be 0.0, got 0.1: these losses have no"),
        (dict(bf16_full_eval=True), r"\(--bf16-full-eval\) must be False, got True: it would round the weights"),
        (dict(fp16_full_eval=True), r"\(--fp16-full-eval\) must be False"),
        (dict(train_sampling_strategy="group_by_length"), r"must be random or sequential, got group_by_length"),
        (dict(batch_eval_metrics=True), "--batch-eval-metrics"),
        (dict(eval_use_gather_object=True), "--eval-use-gather-object"),
        (dict(gradient_accumulation_steps=0), "must be at least 1, got 0"),
        (dict(dataloader_drop_last=True), "it would drop held-out records, too"),
        (dict(resume_from_checkpoint="run"), "training here does not read it; take --resume"),
        (dict(save_only_model=True), r"save_only_model \(--save-only-model\) leaves checkpoints that --resume cannot"),
    ],
)
def test_settings_that_would_be_ignored_or_do_harm_are_refused(tmp_path, change, message):
    settings = dict(args=arguments(tmp_path, **change), resume="save_only_model" in change)
    with pytest.raises(ValueError, match=message):
        train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(4), **settings)


def test_checkpoints_without_an_optimizer_are_not_resumed(tmp_path):
    saved = dict(save_strategy="steps", save_steps=2)
    args = arguments(tmp_path, save_only_model=True, **saved)
    train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(4), args=args)
    with pytest.raises(ValueError, match=r"checkpoint-4 holds no optimizer.pt \(was it made with --save-only-model"):
        train_reward_model(
            reward_model(), tiny_tokenizer(), random_pairs(4), args=arguments(tmp_path, **saved), resume=True
        )


@pytest.mark.parametrize(("breaks", "seen", "kept"), [(3, 4, "checkpoint-2"), (2, 2, None), (4, 4, "checkpoint-2")])
def test_training_that_diverges_stops_and_leaves_no_broken_checkpoint(tmp_path, monkeypatch, breaks, seen, kept):
    """Weights that break between two checkpoints are seen in the next loss; else before they are written."""
    training_step = train.PairTrainer.training_step

    def breaking(self, *inputs, **settings):
        if self.state.global_step + 1 == breaks:
            self.optimizer.param_groups[0]["lr"] = float("nan")
        return training_step(self, *inputs, **settings)

    monkeypatch.setattr(train.PairTrainer, "training_step", breaking)
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=2)
    with pytest.raises(FloatingPointError, match=f"training diverged at step {seen}; lower --learning-rate"):
        train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(8), args=args)
    assert (found := last_checkpoint(tmp_path)) == (kept and str(tmp_path / kept)), found
    args = arguments(tmp_path, max_steps=breaks)
    with pytest.raises(FloatingPointError, match=f"training diverged at step {breaks}"):
        train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(8), args=args)


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    model = reward_model()
    model.score.weight.data[:] = float("inf")
    with pytest.raises(FloatingPointError, match="training diverged at step 1; lower --learning-rate"):
        train_reward_model(model, tiny_tokenizer(), random_pairs(8), args=arguments(tmp_path))


def test_no_training_loss_is_reported_that_depends_on_how_a_run_was_divided(tmp_path, capsys):
    """transformers' own is of one process, of the steps since the last start, and 0 where nothing is left to train."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, logging_strategy="steps", logging_steps=3)
    for resume in (False, True):
        metrics = train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(8), args=args, resume=resume)
        assert "train_runtime" in metrics
        assert "train_loss" not in metrics
        assert "train_loss" not in capsys.readouterr().out


def test_the_last_checkpoint_is_the_one_with_the_largest_number(tmp_path):
    for step in (9, 10, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# ---- objectives ----


@given(token_pairs())
def test_the_full_objective_reads_the_last_token_of_each_response(pairs):
    model = reward_model()
    batch = collate(pairs, pad_id=0)
    rewards = at_response_tokens(prefix_rewards(model, batch["input_ids"], batch["attention_mask"]), batch)
    loss, items = objective_functions("full", "extend", "prefix")
    expected = [[whole_reward(model, p.prompt_ids + p[side]) for p in pairs] for side in (1, 2)]
    actual = loss(*rewards, batch["chosen_lengths"], batch["rejected_lengths"])
    torch.testing.assert_close(actual, bradley_terry_loss(*torch.tensor(expected, dtype=torch.float64)))
    assert (items(batch) != -100).sum() == len(pairs)


@given(token_pairs(), st.sampled_from(["extend", "min"]))
def test_the_partial_objective_counts_its_prefixes(pairs, tail):
    batch = collate(pairs, pad_id=0)
    count = {"extend": max, "min": min}[tail]
    expected = sum(count(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert (objective_functions("partial", tail, "prefix")[1](batch) != -100).sum() == expected
    assert (objective_functions("partial", tail, "pair")[1](batch) != -100).sum() == len(pairs)


@pytest.mark.parametrize("settings", [dict(objective="full"), dict(lengths=(5, None))])
def test_the_loss_on_held_out_pairs_does_not_depend_on_the_batch_size(tmp_path, settings):
    model, losses = reward_model(), []
    for size in (1, 4, 32, 33):
        args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=size)
        metrics = train_reward_model(
            model, tiny_tokenizer(), random_pairs(4), random_pairs(33, seed=1), args=args, **settings
        )
        losses.append(metrics["eval_loss"])
    assert losses == pytest.approx([losses[-1]] * 4, rel=1e-9)


@pytest.mark.parametrize(("tail", "last"), [("extend", max), ("min", min)])
def test_the_partial_loss_is_that_of_every_prefix_on_its_own(tmp_path, tail, last):
    model, held_out = reward_model(), random_pairs(6, seed=1)
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=6)
    metrics = train_reward_model(model, tiny_tokenizer(), random_pairs(4), held_out, args=args, tail=tail)
    pairs = [
        (prompt, *(ids[: last(len(chosen), len(rejected))] for ids in (chosen, rejected)))
        for prompt, chosen, rejected in held_out
    ]
    expected = minimal.prefix_loss(model, [tuple(map(torch.tensor, pair)) for pair in pairs], END)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-9)


def test_the_shorter_response_may_go_on_with_id_zero(tmp_path):
    held_out, args = [Pair([2], [7, 0], [8, 9, 9, 0])], arguments(tmp_path, max_steps=1, learning_rate=0.0)
    metrics = train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(4), held_out, args=args, end=0)
    expected = minimal.prefix_loss(reward_model(), [tuple(map(torch.tensor, held_out[0]))], 0)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


# ---- adapters of low rank ----


def family_model(family, seed=1):
    return tiny_reward_model(family, vocabulary=14, seed=seed, **FAMILIES[family])


FAMILIES = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "llama": {}}


@three_seeds
@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_head_are_trained_and_merging_changes_no_reward(tmp_path, monkeypatch, family, seed):
    model, pairs, seen = family_model(family, seed), random_pairs(64, seed=2 * seed), {}
    torch.manual_seed(seed)  # the adapters
    before, head = {name: p.clone() for name, p in model.named_parameters()}, model.score.weight.clone()
    ids = torch.randint(2, 14, (4, 9), generator=torch.Generator().manual_seed(0))
    merge = LoraModel.merge_and_unload

    def look(adapters):
        seen["gradients"] = {name for name, p in model.named_parameters() if p.requires_grad}
        seen["adapted"] = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        seen["rewards"] = prefix_rewards(model, ids, torch.ones_like(ids)).detach()
        return merge(adapters)

    monkeypatch.setattr(LoraModel, "merge_and_unload", look)
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=16)
    linear = {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    metrics = train_reward_model(
        model, tiny_tokenizer(), pairs, random_pairs(32, seed=2 * seed + 1), args=args, lora_rank=2
    )
    assert seen["adapted"] == linear - {"score"}
    assert {name for name in seen["gradients"] if ".lora_" not in name} == {"score.weight"}
    assert len(seen["gradients"]) == 2 * len(seen["adapted"]) + 1
    torch.testing.assert_close(prefix_rewards(model, ids, torch.ones_like(ids)), seen["rewards"], rtol=0, atol=1e-5)
    assert metrics["eval_accuracy"] > 0.95  # 1
    assert metrics["eval_loss"] < 0.5  # 0.09

    after = dict(model.named_parameters())
    assert list(after) == list(before)  # an ordinary model again
    assert all(p.requires_grad for p in after.values())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {f"{name}.weight" for name in linear}
    assert not torch.equal(model.score.weight, head)
    name = "model.layers.0.mlp.up_proj.weight" if family == "llama" else "transformer.h.0.mlp.c_fc.weight"
    change = after[name] - before[name]
    assert torch.linalg.matrix_rank(change, rtol=1e-6) == 2


def test_what_adapters_leave_on_disk_needs_no_peft(tmp_path):
    model = family_model("llama").float()
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    train_reward_model(model, tiny_tokenizer(), random_pairs(16), args=args, lora_rank=2)
    save_reward_model(model, tiny_tokenizer(), tmp_path)
    ids = torch.randint(2, 14, (4, 9), generator=torch.Generator().manual_seed(0))
    rewards = prefix_rewards(model, ids, torch.ones_like(ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "lora_rank")
    torch.testing.assert_close(prefix_rewards(loaded, ids, torch.ones_like(ids)), rewards, rtol=0, atol=0)


def test_adapters_are_resumed_to_the_weights_of_an_uninterrupted_run(tmp_path, monkeypatch):
    pairs = random_pairs(12)

    def run(folder, resume=False, rank=2):
        torch.manual_seed(resume)
        model = tiny_reward_model(vocabulary=14)  # with dropout
        args = arguments(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=2)
        train_reward_model(model, tiny_tokenizer(), pairs, args=args, resume=resume, lora_rank=rank)
        return weights(model)

    expected = run("whole")
    compute_loss, calls = train.PairTrainer.compute_loss, []

    def killed(self, *rest, **keywords):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return compute_loss(self, *rest, **keywords)

    monkeypatch.setattr(train.PairTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.undo()
    for rank in (3, None):
        with pytest.raises(ValueError, match=rf"checkpoint-2 was made with lora_rank \(--lora-rank\) 2, not {rank}"):
            run("killed", resume=True, rank=rank)
    assert torch.equal(run("killed", resume=True), expected)


@pytest.mark.trains
@three_seeds
def test_value_models_take_adapters_too(tmp_path, seed):
    model = family_model("llama", seed)
    args = arguments(tmp_path, max_steps=120, per_device_train_batch_size=16, learning_rate=3e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    texts, held_out = random_texts(64, 2 * seed), random_texts(32, 2 * seed + 1)
    torch.manual_seed(seed)  # the adapters
    metrics = train_value_model(model, tiny_tokenizer(), texts, held_out, args=args, lora_rank=2)
    assert metrics["eval_correlation"] > 0.5  # 0.9
    assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_over_bfloat16_weights_are_float32_and_may_be_checkpointed(tmp_path):
    model, dtypes = family_model("llama").bfloat16(), []
    step = train.PairTrainer.compute_loss
    args = arguments(tmp_path, bf16=True, gradient_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.PairTrainer,
            "compute_loss",
            lambda self, *rest, **keywords: (
                dtypes.append({p.dtype for p in model.parameters() if p.requires_grad}),
                step(self, *rest, **keywords),
            )[1],
        )
        train_reward_model(model, tiny_tokenizer(), random_pairs(16), args=args, lora_rank=2)
    assert dtypes == [{torch.float32}] * 4
    assert model.score.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "message"), [(0, "must be at least 1, got 0"), (2, "needs peft .*pargs-min.lora")])
def test_a_bad_rank_and_a_missing_peft_are_reported(tmp_path, monkeypatch, rank, message):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=rf"lora_rank \(--lora-rank\) {message}"):
        train_reward_model(reward_model(), tiny_tokenizer(), random_pairs(4), args=arguments(tmp_path), lora_rank=rank)


# ---- value models ----


def random_texts(count, seed=0):
    """Texts of which the first token decides half of the reward and the last but one the rest."""
    pairs = random_pairs(count, seed)
    texts = [Text(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    return [text._replace(reward=float(text.response_ids[0] == 7) + text.response_ids[-2] / 10) for text in texts]


@pytest.mark.trains
@three_seeds
def test_every_prefix_learns_the_expected_reward(tmp_path, seed):
    """After the first token the value is the mean reward of the texts that go on from it."""
    model, texts = reward_model(seed), random_texts(128, 2 * seed)
    args = arguments(tmp_path, max_steps=150, per_device_train_batch_size=32, lr_scheduler_type="cosine")
    metrics = train_value_model(model, tiny_tokenizer(), texts, random_texts(64, 2 * seed + 1), args=args)
    assert metrics["eval_correlation"] > metrics["eval_correlation_25_percent"] > 0.5  # 0.94 and 0.93
    for first in (7, 8):
        starting = [text for text in texts if text.response_ids[0] == first]
        mean = sum(text.reward for text in starting) / len(starting)
        values = []
        for text in starting:
            ids = torch.tensor([[*text.prompt_ids, first]])
            values.append(prefix_rewards(model, ids, torch.ones_like(ids))[0, -1].item())
        assert sum(values) / len(values) == pytest.approx(mean, abs=0.1)  # 0.05


def test_pairs_that_are_too_short_to_be_compared_count_nothing(tmp_path):
    model = reward_model()
    before = weights(model)
    args = arguments(tmp_path, max_steps=1, weight_decay=0.0)
    train_reward_model(model, tiny_tokenizer(), random_pairs(4), args=args, lengths=(30, None))
    assert torch.equal(weights(model), before)


def test_responses_cannot_be_continued_without_an_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    for method, data in ((train_reward_model, random_pairs(4)), (train_partial_on_texts, random_texts(4))):
        with pytest.raises(ValueError, match='the tokenizer has none: take "min"'):
            method(reward_model(), tokenizer, data, args=arguments(tmp_path))


def test_the_trainers_value_loss_is_that_of_single_texts(tmp_path):
    model, texts = reward_model(), random_texts(9)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=4)
    metrics = train_value_model(model, tiny_tokenizer(), texts, texts, args=args)
    squares = []
    for prompt, response, reward in texts:
        ids = torch.tensor([prompt + response])
        values = prefix_rewards(model, ids, torch.ones_like(ids))[:, len(prompt) :]
        loss = prefix_value_loss(values, torch.tensor([reward]), torch.tensor([len(response)]))
        squares += [loss.item()] * len(response)
    assert metrics["eval_loss"] == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_texts_are_rated_as_wholes():
    model, texts = reward_model(), random_texts(5)
    for text in rate(texts, model_rewards(model), batch_size=3):
        ids = torch.tensor([text.prompt_ids + text.response_ids])
        assert text.reward == pytest.approx(prefix_rewards(model, ids, torch.ones_like(ids))[0, -1].item())
    with pytest.raises(ValueError, match="texts must have finite rewards, got 1 without"):
        train_value_model(model, tiny_tokenizer(), [texts[0], Text([2], [7])], args=None)


# ---- other losses, and what else learns from rated texts ----


def language_model(seed=1):
    return tiny_lm(vocabulary=14, seed=seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def vocabulary_model(seed=1):
    return reward_model(seed, num_labels=14)


def by_objective(name):
    """(model, train, data, held-out data) of an objective."""
    texts, held_out = random_texts(12), random_texts(9, seed=1)
    asked = dict(guide=reward_model(5), reference=language_model(), tokenizer=tiny_tokenizer(), top_k=5)
    told = [taught(some, **asked) for some in (texts, held_out)]
    pairs, held_out_pairs = random_pairs(12), random_pairs(9, seed=1)
    shortest = dict(tail="min", reduction="pair")
    return {
        "partial": (reward_model, {}, train_reward_model, pairs, held_out_pairs),
        "partial, min, by pair": (reward_model, shortest, train_reward_model, pairs, held_out_pairs),
        "win": (reward_model, dict(objective="win"), train_reward_model, pairs, held_out_pairs),
        "farma": (vocabulary_model, {}, train_farma, pairs, held_out_pairs),
        "autoregressive": (language_model, {}, train_genarm, pairs, held_out_pairs),
        "value": (reward_model, {}, train_value_model, texts, held_out),
        "soft": (reward_model, dict(objective="soft", lam=1.5), train_value_model, texts, held_out),
        "soft labels": (reward_model, dict(group_size=3), train_partial_on_texts, texts, held_out),
        "reweighted": (language_model, dict(beta=1.5), train_language_model, several(texts), several(held_out)),
        "distilled": (vocabulary_model, dict(beta=1.5), train_distilled, *told),
    }[name]


def several(texts):
    """Of the prompts with at least two texts."""
    return [text for some in by_prompt(texts) if len(some) > 1 for text in some]


NAMES = ["partial", "partial, min, by pair", "win", "farma", "autoregressive", "value", "soft", "soft labels"]
NAMES += ["reweighted", "distilled"]
each = pytest.mark.parametrize("name", NAMES)
few_texts = pytest.mark.filterwarnings(
    "ignore:at beta .* texts per prompt are effective", "ignore:the held-out loss of the soft values"
)


@each
@few_texts
def test_the_held_out_loss_does_not_depend_on_the_batch_size(tmp_path, name):
    make, settings, method, data, held_out = by_objective(name)
    metrics = []
    for size in (1, 2, 32):
        args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=size)
        found = method(make(), tiny_tokenizer(), data, held_out, args=args, **settings)
        metrics.append({key: value for key, value in found.items() if "second" not in key and "runtime" not in key})
    assert metrics[0] == pytest.approx(metrics[2], rel=1e-6)
    assert metrics[1] == pytest.approx(metrics[2], rel=1e-6)


@each
@few_texts
def test_parts_of_a_batch_weigh_as_one_batch(tmp_path, name):
    make, settings, method, data, _ = by_objective(name)
    trained = []
    for size, parts in ((4, 1), (1, 4)):
        model = make()
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        method(model, tiny_tokenizer(), data, args=arguments(tmp_path, max_steps=2, optim="sgd", **sizes), **settings)
        trained.append(weights(model))
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-12)


@each
@few_texts
def test_a_run_that_is_resumed_equals_one_that_was_not_interrupted(tmp_path, name):
    make, settings, method, data, _ = by_objective(name)

    def run(folder, resume=False, **changes):
        model = make(seed=resume + 1)
        args = arguments(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, **changes)
        method(model, tiny_tokenizer(), data, args=args, resume=resume, **settings)
        return weights(model)

    whole = run("run", learning_rate=1e-3)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    checkpoint.rename(tmp_path / "last")
    assert torch.equal(run("run", resume=True, learning_rate=1e-3), whole)


@pytest.mark.trains
@each
@few_texts
def test_training_lowers_the_held_out_loss_and_restores_the_model(tmp_path, name):
    make, settings, method, data, held_out = by_objective(name)
    losses = []
    for steps in (1, 60):
        model = make()
        args = arguments(tmp_path, max_steps=steps, learning_rate=1e-2 if steps > 1 else 0.0)
        losses.append(method(model, tiny_tokenizer(), data, held_out, args=args, **settings)["eval_loss"])
        assert not model.training
        assert "forward" not in vars(model)
    assert losses[1] < losses[0]


def log_prob(lm, prompt, response):
    """(n,) log-probability of each token of one response, by the model's own forward."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        found = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[len(prompt) - 1 :]


def evaluated(tmp_path, name):
    """(model, held-out data, its loss) before any step."""
    make, settings, method, data, held_out = by_objective(name)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=4)
    return make(), held_out, method(make(), tiny_tokenizer(), data, held_out, args=args, **settings)["eval_loss"]


def test_the_autoregressive_loss_is_that_of_single_responses(tmp_path):
    lm, pairs, loss = evaluated(tmp_path, "autoregressive")
    sides = [[log_prob(lm, p.prompt_ids, response) for response in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    margins = torch.stack([chosen.sum() - rejected.sum() for chosen, rejected in sides])
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-9)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0)
    metrics = train_genarm(lm, tiny_tokenizer(), pairs, pairs, args=args)
    assert metrics["eval_accuracy"] == pytest.approx((margins > 0).double().mean().item())
    halves = [[side[: (max(map(len, both)) + 1) // 2].sum() for side in both] for both in sides]
    right = [chosen > rejected for chosen, rejected in halves]
    assert metrics["eval_accuracy_50_percent"] == pytest.approx(sum(right).item() / len(right))


@few_texts
def test_the_reweighted_loss_is_that_of_texts_drawn_again(tmp_path):
    lm, texts, loss = evaluated(tmp_path, "reweighted")
    drawn = reweighted(texts, 1.5, seed=42)  # the seed of transformers' arguments
    tokens = torch.cat([log_prob(lm, text.prompt_ids, text.response_ids) for text in drawn])
    assert loss == pytest.approx(-tokens.mean().item(), rel=1e-9)


@few_texts
def test_the_soft_loss_weighs_a_text_against_the_others_of_its_prompt(tmp_path):
    model, texts, loss = evaluated(tmp_path, "soft")
    trained_on, texts = centred(random_texts(12), texts, lam=1.5)
    highest = max(text.reward for text in trained_on)
    total = tokens = 0
    for prompt, response, reward in texts:
        values = prefix_rewards(model, torch.tensor([prompt + response]), torch.ones(1, len(prompt + response)))
        terms = values[:, len(prompt) :], torch.tensor([reward]), torch.tensor([len(response)])
        total += soft_value_loss(*terms, lam=1.5, highest=highest).item() * len(response)
        tokens += len(response)
    assert loss == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.trains
def test_soft_values_that_know_less_than_nothing_say_so(tmp_path):
    """One of two words is good in the texts learned from; held out it is bad, or good as well."""

    def texts(good):
        return [Text([4, 5], [word, 7], float(word == good)) for word in (8, 9)] * 4

    def train(held_out):
        args = arguments(tmp_path, max_steps=30, learning_rate=0.01, seed=0)
        settings = dict(args=args, objective="soft", lam=2.0)
        return train_value_model(reward_model(), tiny_tokenizer(), texts(8), held_out, **settings)["eval_loss"]

    with pytest.warns(UserWarning, match=r"held-out loss of the soft values is \d.* below 2"):
        assert train(texts(9)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert train(texts(8)) < 1


def test_soft_values_do_not_know_by_how_much_one_prompt_is_better_than_another(tmp_path):
    """A number added to all rewards of a prompt changes no weight; before, it decided which prompts counted."""

    def trained(texts):
        torch.manual_seed(0)
        model, args = reward_model(), arguments(tmp_path, max_steps=3, learning_rate=0.01)
        train_value_model(model, tiny_tokenizer(), texts, args=args, objective="soft", lam=2.0)
        return torch.cat([weights.detach().flatten() for weights in model.parameters()])

    texts = random_texts(12)
    shifted = [text._replace(reward=text.reward + 7 * sum(text.prompt_ids)) for text in texts]
    torch.testing.assert_close(trained(shifted), trained(texts), rtol=0, atol=1e-5)


def test_the_farma_loss_asks_for_every_next_token(tmp_path):
    model, pairs, loss = evaluated(tmp_path, "farma")
    losses = []
    for prompt, chosen, rejected in pairs:
        margin = whole_reward(model, prompt + chosen) - whole_reward(model, prompt + rejected)
        gaps = [
            whole_reward(model, prompt + chosen[:i])
            - max(whole_reward(model, [*prompt, *chosen[:i], token]) for token in range(14))
            for i in range(1, len(chosen))
        ]
        squares = sum(gap**2 for gap in gaps) / len(gaps)
        losses.append(torch.nn.functional.softplus(torch.tensor(-margin)).item() + squares)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("tail", ["extend", "min"])
def test_soft_labels_compare_all_pairs_of_a_prompt(tmp_path, tail):
    model, texts = reward_model(), random_texts(6, seed=1)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=2)
    texts = [text._replace(prompt_ids=[3 + (i > 6)]) for i, text in enumerate(texts)]  # seven and five
    found = train_partial_on_texts(model, tiny_tokenizer(), texts, texts, args=args, group_size=9, tail=tail)
    losses, right = [], []
    for one, other in [pair for some in by_prompt(texts) for pair in combinations(some, 2)]:
        sizes = len(one.response_ids), len(other.response_ids)
        label = torch.tensor(one.reward - other.reward).sigmoid()
        for i in range(1, (max if tail == "extend" else min)(*sizes) + 1):
            sides = [(text.response_ids + [END] * 9)[:i] for text in (one, other)]
            ahead = whole_reward(model, one.prompt_ids + sides[0]) - whole_reward(model, one.prompt_ids + sides[1])
            wins = torch.tensor([ahead, -ahead], dtype=torch.float64).sigmoid().log()
            losses.append(-(label * wins[0] + (1 - label) * wins[1]).item())
        if one.response_ids != other.response_ids:
            whole = [whole_reward(model, text.prompt_ids + text.response_ids) for text in (one, other)]
            right.append((whole[0] > whole[1]) == (one.reward > other.reward))
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["eval_pairs"] == len(right)


def test_few_effective_texts_are_warned_of(tmp_path):
    texts = [Text([2], [7, END], 1.0), Text([2], [8, END], -1.0)]
    args = arguments(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match=r"at beta 2 only 1\.04 texts per prompt are effective, fewer than 100"):
        metrics = train_language_model(language_model(), tiny_tokenizer(), texts, args=args, beta=2.0)
    assert metrics["effective_texts_mean"] == pytest.approx(1.0366, abs=1e-3)


@few_texts
def test_models_of_the_wrong_kind_are_refused(tmp_path):
    args, texts, pairs = arguments(tmp_path), several(random_texts(12)), random_pairs(4)
    with pytest.raises(ValueError, match="no probability for the next token"):
        train_language_model(reward_model(), tiny_tokenizer(), texts, args=args, beta=1.0)
    with pytest.raises(ValueError, match="no probability for the next token"):
        train_genarm(reward_model(), tiny_tokenizer(), pairs, args=args)
    with pytest.raises(ValueError, match="no vocabulary head"):
        train_farma(reward_model(), tiny_tokenizer(), pairs, args=args)
    with pytest.raises(ValueError, match="no reward at every token"):
        train_value_model(language_model(), tiny_tokenizer(), texts, args=args)
    with pytest.raises(ValueError, match='objective must be "value" or "soft", got \'hard\''):
        train_value_model(reward_model(), tiny_tokenizer(), texts, args=args, objective="hard")
    for lam in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lam \(--lambda\) must be a positive number"):
            train_value_model(reward_model(), tiny_tokenizer(), texts, args=args, objective="soft", lam=lam)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_is_asked_for_response_tokens_alone(family):
    """Where all rows hold prompts there are no logits: of a large vocabulary they take more memory than all else."""
    lm, asked = tiny_lm(family, vocabulary=14), list[int]()
    texts = [([3, 2, 4, 5], [7, 8, END]), ([6, 2], [9, END]), ([2, 3, 4, 5, 6], [10])]
    rows = [prompt + response for prompt, response in texts]
    ids, mask = (
        torch.tensor([row + [0] * (7 - len(row)) for row in some]) for some in (rows, [[1] * len(r) for r in rows])
    )
    hook = lm.get_output_embeddings().register_forward_hook(lambda head, args, logits: asked.append(logits.shape[1]))
    found = token_log_probs(lm, ids, mask, torch.tensor([len(prompt) for prompt, _ in texts]))
    hook.remove()
    assert asked == [7 - 2 + 1]  # from the token before the first response on
    assert found.shape == ids.shape
    for row, (prompt, response) in enumerate(texts):
        for place in range(len(prompt), len(prompt + response)):
            logits = lm(input_ids=torch.tensor([rows[row][:place]])).logits[0, -1]
            assert found[row, place] == pytest.approx(logits.log_softmax(-1)[rows[row][place]].item(), abs=1e-5)


@few_texts
def test_language_models_take_adapters_too(tmp_path):
    lm = language_model()
    before = copy.deepcopy(lm).state_dict()
    args = arguments(tmp_path, max_steps=3)
    train_language_model(lm, tiny_tokenizer(), several(random_texts(12)), args=args, beta=1.0, lora_rank=2)
    assert list(lm.state_dict()) == list(before)
    moved = {name for name, weight in lm.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".attn." in name or ".mlp." in name for name in moved)


# ---- evaluation ----


def whole_reward(model, ids):
    with torch.no_grad():
        return float(prefix_rewards(model, torch.tensor([ids]), torch.ones(1, len(ids)))[0, -1])


def naive_prefix_accuracy(model, pairs):
    """One forward pass for every prefix of every response; the definition, slowly."""
    accuracy, counts = [], []
    for i in range(1, max(len(ids) for pair in pairs for ids in pair[1:]) + 1):
        outcomes = []
        for prompt, chosen, rejected in pairs:
            if chosen[:i] != rejected[:i]:
                margin = whole_reward(model, prompt + chosen[:i]) - whole_reward(model, prompt + rejected[:i])
                outcomes.append(0.5 * (1 + (margin > 0) - (margin < 0)))
        accuracy.append(sum(outcomes) / len(outcomes) if outcomes else float("nan"))
        counts.append(len(outcomes))
    return torch.tensor(accuracy, dtype=torch.float64), torch.tensor(counts)


@given(token_pairs(), st.integers(1, 3))
@example([Pair([5], [6], [6]), Pair([5], [6], [6, 0]), Pair([5, 5], [6, 7, 8], [6, 7])], 3)  # 0 is also the padding
@settings(max_examples=50)
def test_prefix_accuracy_in_one_pass_equals_one_pass_per_prefix(pairs, batch_size):
    model = reward_model()
    accuracy, counts = naive_prefix_accuracy(model, pairs)
    actual = prefix_accuracy(model, pairs, batch_size=batch_size)
    torch.testing.assert_close(actual.accuracy, accuracy, equal_nan=True)
    assert actual.pairs.tolist() == counts.tolist()


def test_equal_rewards_are_half_right():
    model = reward_model()
    torch.nn.init.zeros_(model.score.weight)
    accuracy, pairs = prefix_accuracy(model, [Pair([5], [6, 7], [6, 8])])
    torch.testing.assert_close(accuracy, torch.tensor([float("nan"), 0.5], dtype=torch.float64), equal_nan=True)
    assert pairs.tolist() == [0, 1]
    with pytest.raises(ValueError, match="pairs is empty"):
        prefix_accuracy(model, [])


@pytest.mark.parametrize("tail", ["extend", "min"])
def test_trainer_reports_the_same_accuracies(tmp_path, tail):
    model, held_out = reward_model(), random_pairs(23, seed=1)
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=4)
    metrics = train_reward_model(model, tiny_tokenizer(), random_pairs(8), held_out, args=args, tail=tail)
    accuracy = prefix_accuracy(model, held_out).accuracy
    longest = [max(len(p.chosen_ids), len(p.rejected_ids)) for p in held_out]
    assert max(longest) == len(accuracy) == 7
    for length in (1, 2, 4):
        assert metrics[f"eval_accuracy_after_{length}"] == pytest.approx(float(accuracy[length - 1]))
    assert metrics["eval_accuracy"] == pytest.approx(float(accuracy[-1]))
    assert "eval_accuracy_after_8" not in metrics
    assert metrics["eval_pairs"] == 23
    halves = [Pair(p[0], *(ids[: (n + 1) // 2] for ids in p[1:])) for p, n in zip(held_out, longest, strict=True)]
    assert metrics["eval_accuracy_50_percent"] == pytest.approx(float(prefix_accuracy(model, halves).accuracy[-1]))
