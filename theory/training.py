"""Reward models trained by `pargs_min.train` on pairs sampled from an enumerable world.

The models read a world's token ids as they are, after a prompt of one token, whose id is the next free one.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from pargs_min.data import Pair
from pargs_min.train import train_reward_model
from theory.bradley_terry import labels_of, partial_reward_of
from theory.policies import tokenwise
from theory.world import Levels, World, bradley_terry_labels, finished, model_reward

BETA = 1.0


def training_world() -> World:
    """Two words and an end token, three steps, Bradley-Terry labels."""
    world = World.random(0, 3, 3, reward_scale=2.0)
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def sampled_pairs(world: World, count: int, seed: int) -> list[Pair]:
    """Pairs (Y, Y') from ref x ref, labelled once each by the world's labeler; responses with their end token."""
    rng = np.random.default_rng(seed)
    y, other = rng.choice(len(world.prefixes[-1]), size=(2, count), p=np.exp(world.log_ref[-1]))
    wins = rng.random(count) < labels_of(world)[y, other]
    responses = [row[:n].tolist() for row, n in zip(world.prefixes[-1], world.lengths, strict=True)]
    chosen, rejected = np.where(wins, y, other), np.where(wins, other, y)
    return [Pair(prompt_of(world), responses[c], responses[r]) for c, r in zip(chosen, rejected, strict=True)]


def prompt_of(world: World) -> list[int]:
    """The token that stands before every response."""
    return [world.vocabulary]


def tiny_reward_model(
    world: World, seed: int, initializer_range: float = 0.2
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An untrained GPT-2 of 2 layers and width 32 with a scalar head, and a tokenizer that names its special tokens."""
    torch.manual_seed(seed)
    names = {str(token): token for token in range(world.vocabulary)}
    names |= {"<prompt>": world.vocabulary, "<pad>": world.vocabulary + 1}
    config = GPT2Config(
        vocab_size=len(names), n_positions=max(8, 1 + world.horizon), n_embd=32, n_layer=2, n_head=2, num_labels=1,
        initializer_range=initializer_range, activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one kernel
        bos_token_id=world.eos, eos_token_id=world.eos, pad_token_id=names["<pad>"],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names)), eos_token=str(world.eos), pad_token="<pad>"
    )
    return GPT2ForSequenceClassification(config), tokenizer


def trained_scores(
    world: World,
    pairs: list[Pair],
    *,
    steps: int,
    seed: int,
    objective: str = "partial",
    initializer_range: float = 0.2,
    batch_size: int = 128,
) -> Levels:
    """The scores of a tiny GPT-2 after so many steps of `batch_size` pairs, read at every prefix by itself."""
    model, tokenizer = tiny_reward_model(world, seed, initializer_range)
    with tempfile.TemporaryDirectory() as folder, nothing_old_is_garbage():
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-2,
            weight_decay=0.0, lr_scheduler_type="cosine", seed=seed, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        train_reward_model(model, tokenizer, pairs, args=args, objective=objective)
    return [model_reward(model, prompt_of(world), prefixes) for prefixes in world.prefixes]


@contextmanager
def nothing_old_is_garbage() -> Iterator[None]:
    """Spares transformers, which collects garbage whenever it trains, looking through all that was there before."""
    if ours := not gc.get_freeze_count():
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def pair_accuracy(world: World, scores: Levels, *, hold: bool = False) -> list[float]:
    """P(the preferred response is ahead after i tokens | the prefixes differ), i = 1..T, over pairs from ref x ref.

    Ties count 1/2. A response that has ended is read at its
    i-th token, an end token, as training on prefixes compares it; with `hold` it keeps the score of its own end.
    """
    ref = np.exp(world.log_ref[-1])
    wins, held, accuracies = np.outer(ref, ref) * labels_of(world), scores[0], []
    for i in range(1, world.horizon + 1):
        ended = hold & world.down(i, finished(world.prefixes[i - 1], world.eos))
        held = np.where(ended, world.down(i, held), scores[i])
        place = world.ancestors(i)
        counted = wins * (place[:, None] != place)
        margins = held[place][:, None] - held[place]
        accuracies.append(float((counted * (np.sign(margins) + 1) / 2).sum() / counted.sum()))
    return accuracies


def exact_policy(world: World) -> np.ndarray:
    """log q over A_T of the tokenwise policy of the population minimiser, pairs compared up to the longer length."""
    return world.paths(tokenwise(world, partial_reward_of(world, "extend"), BETA))[-1]


def trained_policy(world: World, count: int, *, steps: int, seed: int = 0) -> np.ndarray:
    """log q over A_T of the tokenwise policy of a model trained on `count` sampled pairs."""
    scores = trained_scores(world, sampled_pairs(world, count, seed), steps=steps, seed=seed)
    return world.paths(tokenwise(world, scores, BETA))[-1]
