"""The embedded world as a laboratory: a tiny reference language model and its preference pairs.

The world itself is `journey.py`. The reference is a GPT-2 trained on journeys for all prompts. Preference pairs are its
own samples, labelled with Bradley-Terry noise on the gold reward, which nothing is trained on. They are made for
TRAIN_PROMPTS alone: a reward model meets the role and the place of each of HELD_OUT_PROMPTS, but never both together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pargs_min.codec import encode_prompt
from pargs_min.decode import ModelPolicy, generate, row_uniforms
from pargs_min.models import load_config, load_language_model, load_tokenizer
from pargs_min.progress import progress
from pargs_min.store import appending, aside, once
from pargs_min.world.journey import END, HORIZON, PAD, PROMPTS, TRAIN_PROMPTS, UNKNOWN, Journey

SHIPPED = Path(__file__).with_name("reference_model")  # what `reference` trains at its defaults
STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 64, 3e-3  # of the reference; its learning rate at the highest


def word_tokenizer(world: Journey) -> PreTrainedTokenizerFast:
    """One token per word, split at blanks; padding, end and unknown tokens have ids of their own."""
    words = Tokenizer(models.WordLevel(world.vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def reference(
    folder: str | Path, world: Journey | None = None, *, seed: int = 0, steps: int = STEPS
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the reference on journeys for all prompts, each seen once; load it if the folder holds it already.

    A GPT-2 of 2 layers, width 64 and 4 heads (about 110,000 parameters), of the configuration of the SHIPPED one, saved
    with its tokenizer as an ordinary hub folder. About 40 seconds on one core.

    Raises:
        ValueError: if the folder holds a model made with other arguments. What staying home is worth does not count: it
            changes no text.
    """
    folder, world = Path(folder), world or Journey()
    made_with = dict(luck=str(world.luck), seed=seed, steps=steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)

    def make(unfinished: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(load_config(SHIPPED))
        _train(model, world, seed, steps)
        model.config.journey = made_with
        model.save_pretrained(unfinished)
        word_tokenizer(world).save_pretrained(unfinished)

    once(folder, make)
    model = load_language_model(folder)
    if (found := getattr(model.config, "journey", "other code")) != made_with:
        raise ValueError(
            f"{folder} holds a model made with {found}, not with {made_with}: choose another folder, or delete this one"
        )
    return model, load_tokenizer(folder)


def _train(model: PreTrainedModel, world: Journey, seed: int, steps: int) -> None:
    tokens, _ = world.write(np.random.default_rng(seed).random((steps * BATCH_SIZE, HORIZON)))
    prompt_ids = [[world.vocabulary[word] for word in prompt.split()] for prompt in PROMPTS]
    prompts = np.resize(prompt_ids, (len(tokens), len(prompt_ids[0])))
    # The loss ignores the prompt, and end tokens after the first (label -100).
    ends = tokens == world.vocabulary[END]
    labels = torch.from_numpy(np.hstack([np.full_like(prompts, -100), np.where(ends.cumsum(1) > ends, -100, tokens)]))
    ids = torch.from_numpy(np.hstack([prompts, tokens]))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    batches = zip(ids.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    reported = progress(batches, desc="reference model", total=steps)
    for input_ids, targets in reported:
        loss = model(input_ids=input_ids, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        reported.set_postfix_str(f"{loss.item():.3f} nats per token", refresh=False)


def write_pairs(
    file: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: Journey,
    *,
    pairs: int = 4000,
    seed: int = 0,
    prompts: Sequence[str] = TRAIN_PROMPTS,
    batch_size: int = 250,
) -> None:
    """Write preference pairs: two samples of the reference each, the first one chosen with P = sigmoid(gold - gold').

    JSONL records {prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids}; responses without their end token.
    Pair i holds samples 2 i and 2 i + 1 for prompts[i % len(prompts)] (`row_uniforms`), whatever its batch is. A pair
    with a response that did not end within HORIZON tokens is left out; off-grammar responses stay, being part of the
    reference.
    """
    policy, end = ModelPolicy(model), tokenizer.eos_token_id
    settings: dict[str, Any] = dict(beta=0.0, top_k=0, max_new_tokens=HORIZON, eos=end)
    with aside(file) as unfinished, appending(unfinished) as append:
        for first in progress(range(0, pairs, batch_size), desc="preference pairs", unit="batch"):
            samples = range(2 * first, 2 * min(first + batch_size, pairs))
            asked = [prompts[sample // 2 % len(prompts)] for sample in samples]
            prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
            uniforms = row_uniforms(seed, map(PROMPTS.index, asked), samples, HORIZON + 1)
            drawn = generate(policy, None, torch.tensor(prompt_ids), uniforms=uniforms[:, :-1], **settings)
            responses = [row[: row.index(end)] if end in row else None for row in drawn.tokens.tolist()]
            # The number that follows those of a pair's first response draws its label.
            both = zip(asked[::2], responses[::2], responses[1::2], uniforms[::2, -1].tolist(), strict=True)
            for prompt, one, other, uniform in both:
                if one is not None and other is not None:
                    gold, other_gold = world.gold([prompt] * 2, [one, other])
                    chosen, rejected = (one, other) if uniform < expit(gold - other_gold) else (other, one)
                    ids = {"prompt": encode_prompt(tokenizer, prompt), "chosen": chosen, "rejected": rejected}
                    record = {name: tokenizer.decode(row) for name, row in ids.items()}
                    append(record | {f"{name}_ids": row for name, row in ids.items()})
