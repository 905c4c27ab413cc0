"""A partial reward model trained by `pargs_min.train` on pairs sampled from an enumerable world."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast, TrainingArguments

from pargs_min.data import Pair
from pargs_min.train import train_reward_model
from theory.bradley_terry import labels_of, partial_reward_of
from theory.policies import tokenwise
from theory.world import Levels, World, bradley_terry_labels, model_reward

WORDS = {"a": 0, "b": 1, "<end>": 2, "<prompt>": 3, "<pad>": 4}
PROMPT = [WORDS["<prompt>"]]
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
    return [Pair(PROMPT, responses[c], responses[r]) for c, r in zip(chosen, rejected, strict=True)]


def trained_scores(world: World, pairs: list[Pair], *, steps: int, seed: int) -> Levels:
    """The scores of a tiny GPT-2 after so many steps of 128 pairs, read at every prefix by itself."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=8, n_embd=32, n_layer=2, n_head=2, num_labels=1, initializer_range=0.2,
        bos_token_id=2, eos_token_id=2, pad_token_id=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(WORDS)), eos_token="<end>", pad_token="<pad>"
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=128, learning_rate=1e-2, weight_decay=0.0,
            lr_scheduler_type="cosine", seed=seed, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        train_reward_model(model, tokenizer, pairs, args=args)
    return [model_reward(model, PROMPT, prefixes) for prefixes in world.prefixes]


def exact_policy(world: World) -> np.ndarray:
    """log q over A_T of the tokenwise policy of the population minimiser, pairs compared up to the longer length."""
    return world.paths(tokenwise(world, partial_reward_of(world, "extend"), BETA))[-1]


def trained_policy(world: World, count: int, *, steps: int, seed: int = 0) -> np.ndarray:
    """log q over A_T of the tokenwise policy of a model trained on `count` sampled pairs."""
    scores = trained_scores(world, sampled_pairs(world, count, seed), steps=steps, seed=seed)
    return world.paths(tokenwise(world, scores, BETA))[-1]
