"""The embedded world as a laboratory: a tiny reference language model, its preference pairs and its frontier.

The world itself is `journey.py`. The reference is a GPT-2 trained on the journeys of all prompts; preference pairs are
its own samples, labelled by Bradley-Terry noise on the gold reward, which nobody optimises. Pairs are made for
TRAIN_PROMPTS alone, so a reward model meets role and place of each of HELD_OUT_PROMPTS, but never both together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logsumexp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import tqdm

from pargs_min.decode import ModelPolicy, generate, row_uniforms
from pargs_min.world.automaton import Array, entropy, expected_length
from pargs_min.world.journey import (
    END,
    HELD_OUT_PROMPTS,
    HORIZON,
    OFF_GRAMMAR,
    PAD,
    PROMPTS,
    TRAIN_PROMPTS,
    UNKNOWN,
    Journey,
)

__all__ = [
    "HELD_OUT_PROMPTS",
    "HORIZON",
    "OFF_GRAMMAR",
    "PROMPTS",
    "TRAIN_PROMPTS",
    "FrontierPoint",
    "Journey",
    "frontier",
    "reference",
    "reference_gap",
    "responses",
    "word_tokenizer",
    "write_pairs",
]


def word_tokenizer(world: Journey) -> PreTrainedTokenizerFast:
    """One token a word, words apart by blanks; pad, end and unknown tokens have ids of their own."""
    words = Tokenizer(WordLevel(world.vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def reference(
    folder: str | Path,
    world: Journey | None = None,
    *,
    seed: int = 0,
    steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the reference on journeys of all prompts, each read once, or load it if the folder holds it already.

    A GPT-2 of 2 layers, width 64 and 4 heads (about 110,000 parameters), saved with its tokenizer as an ordinary hub
    folder. About 40 seconds on one core. Raises ValueError if the folder holds a model made with other arguments; what
    staying home is worth is none of them, since it changes no text.
    """
    folder, world = Path(folder), world or Journey()
    made_with = dict(luck=str(world.luck), seed=seed, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    if not folder.exists():
        tokenizer, model = word_tokenizer(world), _new_model(world, seed)
        _train(model, world, seed, steps, batch_size, learning_rate)
        model.config.journey = made_with
        unfinished = folder.with_name(f"{folder.name}.unfinished")  # so that the folder, once there, is whole
        for part in (model, tokenizer):
            part.save_pretrained(unfinished)
        unfinished.rename(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if getattr(model.config, "journey", None) != made_with:
        raise ValueError(
            f"folder {folder} holds a model made with {getattr(model.config, 'journey', 'other code')}, "
            f"not with {made_with}: choose another folder or delete this one"
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _new_model(world: Journey, seed: int) -> GPT2LMHeadModel:
    end, pad = world.vocabulary[END], world.vocabulary[PAD]
    config = GPT2Config(
        vocab_size=len(world.vocabulary),
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one kernel
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _train(
    model: PreTrainedModel, world: Journey, seed: int, steps: int, batch_size: int, learning_rate: float
) -> None:
    uniforms = np.random.default_rng(seed).random((steps * batch_size, HORIZON))
    ids, labels = _with_prompts(world, world.write(uniforms)[0])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    progress = tqdm(zip(ids.split(batch_size), labels.split(batch_size), strict=True), "reference model", steps)
    for x, y in progress:
        loss = model(input_ids=x, labels=y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"{loss.item():.3f} nats a token", refresh=False)


def _with_prompts(world: Journey, tokens: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Ids (N, P + T) of prompts and journeys (N, T) of `Journey.write`, and labels that leave out, by -100, the prompt
    and the end tokens after the first."""
    prompt_ids = np.array([[world.vocabulary[word] for word in prompt.split()] for prompt in PROMPTS])
    prompt_ids = np.resize(prompt_ids, (len(tokens), prompt_ids.shape[1]))
    ends = tokens == world.vocabulary[END]
    labels = np.where(ends.cumsum(1) - ends > 0, -100, tokens)
    ids, labels = np.hstack([prompt_ids, tokens]), np.hstack([np.full_like(prompt_ids, -100), labels])
    return torch.from_numpy(ids), torch.from_numpy(labels)


@torch.no_grad()
def reference_gap(model: PreTrainedModel, world: Journey, *, texts: int = 2400, seed: int = 1) -> dict[str, float]:
    """How close the reference comes to the automaton, on fresh journeys of the grammar; all in nats.

    model, automaton: per token, on the same texts; entropy: the automaton's exact rate, entropy / expected length; gap:
    model minus automaton per text, an unbiased estimate of KL(automaton || model), with its standard error gap_se.
    """
    tokens, log_probs = world.write(np.random.default_rng([seed, texts]).random((texts, HORIZON)))
    ids, labels = _with_prompts(world, tokens)
    losses = [
        cross_entropy(model(input_ids=x).logits[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").sum(1)
        for x, y in zip(ids.split(256), labels.split(256), strict=True)
    ]
    by_model, by_automaton, count = torch.cat(losses).double().numpy(), -log_probs.sum(1), int((labels != -100).sum())
    gap = by_model - by_automaton
    exact = [
        (entropy(automaton), expected_length(automaton, world.vocabulary[END])) for automaton in world.automata.values()
    ]
    return {
        "model": by_model.sum() / count,
        "automaton": by_automaton.sum() / count,
        "entropy": sum(h for h, _ in exact) / sum(n for _, n in exact),
        "gap": gap.mean(),
        "gap_se": gap.std(ddof=1) / len(gap) ** 0.5,
    }


def write_pairs(
    file: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: Journey,
    *,
    pairs: int = 4000,
    seed: int = 0,
    prompts: Sequence[str] = TRAIN_PROMPTS,
    batch_size: int = 500,
) -> int:
    """Write preference pairs: two samples of the reference each, the chosen one drawn with P = sigmoid(gold - gold').

    JSONL records {prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids}; responses without their end token.
    Pair i is of prompts[i % len(prompts)]. A pair with a response that did not end within HORIZON tokens is left out;
    returns how many were. Off-grammar responses stay: they are part of the reference.
    """
    left_out, unfinished = 0, Path(f"{file}.unfinished")
    with unfinished.open("w", encoding="utf-8") as out, tqdm(total=pairs, desc="preference pairs") as progress:
        for first in range(0, pairs, batch_size):
            numbers = range(first, min(first + batch_size, pairs))
            asked = [prompts[i % len(prompts)] for i in numbers]
            two = [responses(model, tokenizer, asked, [2 * i + k for i in numbers], seed) for k in (0, 1)]
            prompt_ids, uniforms = tokenizer(asked).input_ids, _label_uniforms(asked, numbers, seed)
            for prompt, ids, u, *pair in zip(asked, prompt_ids, uniforms, *two, strict=True):
                if None in pair:
                    left_out += 1
                    continue
                gold = world.gold([prompt] * 2, pair)
                chosen, rejected = pair if u < expit(gold[0] - gold[1]) else reversed(pair)
                record = {"prompt": prompt, "chosen": world.text(chosen), "rejected": world.text(rejected)}
                record |= {"prompt_ids": ids, "chosen_ids": chosen, "rejected_ids": rejected}
                out.write(json.dumps(record) + "\n")
            progress.update(len(numbers))
    unfinished.rename(file)
    return left_out


def _label_uniforms(prompts: Sequence[str], numbers: Sequence[int], seed: int) -> list[float]:
    """The number that draws each pair's label: the next of the stream that drew its first response."""
    rows = row_uniforms(seed, map(PROMPTS.index, prompts), [2 * i for i in numbers], HORIZON + 1)
    return rows[:, -1].tolist()


def responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    samples: Sequence[int],
    seed: int,
) -> list[list[int] | None]:
    """One sample of the reference a row, ids without the end token; None where HORIZON tokens brought no end.

    Row i is sample number samples[i] of prompts[i], whatever the other rows are (`row_uniforms`).
    """
    ids = torch.tensor(tokenizer(list(prompts)).input_ids)
    uniforms = row_uniforms(seed, map(PROMPTS.index, prompts), samples, HORIZON)
    end = tokenizer.eos_token_id
    settings = dict(beta=0.0, top_k=0, max_new_tokens=HORIZON, eos=end, uniforms=uniforms)
    drawn = generate(ModelPolicy(model), None, ids, **settings)
    rows = [row[:n] for row, n in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)]
    return [row[:-1] if row[-1] == end else None for row in rows]


class FrontierPoint(NamedTuple):
    """The best expected reward at a KL (nats a response), and the effective sample size that it rests on."""

    beta: float
    reward: float
    kl: float
    effective_samples: float


def frontier(gold: Array, betas: Sequence[float], least: float = 500.0) -> list[FrontierPoint]:
    """The RLHF frontier of the model that wrote the samples: their weights are w = exp(beta gold) / sum exp(beta gold).

    Reward sum_n w_n gold_n and KL sum_n w_n log(N w_n), self-normalised for each prompt and averaged over prompts;
    effective samples 1 / sum_n w_n^2, added over prompts. Points with fewer than `least` are left out.

    gold (prompts, N): gold rewards of N samples of each prompt.

    >>> [round(point.reward, 6) for point in frontier(np.array([[0.0, 1.0] * 600]), [0.0, 1.0])]  # sigmoid(beta)
    [0.5, 0.731059]
    """
    points = []
    for beta in betas:
        log_weights = beta * gold - logsumexp(beta * gold, axis=1, keepdims=True)
        weights = np.exp(log_weights)
        reward = (weights * gold).sum(1).mean()
        kl = (weights * (log_weights + math.log(gold.shape[1]))).sum(1).mean()
        points.append(FrontierPoint(beta, float(reward), float(kl), float((1 / (weights**2).sum(1)).sum())))
    return [point for point in points if point.effective_samples >= least]
