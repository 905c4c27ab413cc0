"""The embedded world as a laboratory: a tiny reference language model and its preference pairs.

The world itself is `journey.py`. The reference is a GPT-2 trained on journeys for all prompts. Preference pairs are its
own samples, labelled with Bradley-Terry noise on the gold reward, which nothing is trained on. They are made for
TRAIN_PROMPTS alone: a reward model meets the role and the place of each of HELD_OUT_PROMPTS, but never both together.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, xlogy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pargs_min.codec import encode_prompt
from pargs_min.decode import ModelPolicy, generate, row_uniforms
from pargs_min.models import load_config, load_language_model, load_tokenizer
from pargs_min.progress import progress
from pargs_min.store import appending, aside, once
from pargs_min.world.journey import END, HORIZON, PAD, PROMPTS, TRAIN_PROMPTS, UNKNOWN, Journey

SHIPPED = Path(__file__).with_name("reference_model")  # what `reference` trains at its defaults
STEPS, BATCH_SIZE, LEARNING_RATE = 3000, 64, 3e-3  # of the reference; its learning rate at the highest
WORST_GAP = 0.1  # nats per text: a reference further from the grammar may not know what decides an ending
ROUNDS = 4  # of STEPS, at most


def word_tokenizer(world: Journey) -> PreTrainedTokenizerFast:
    """One token per word, split at blanks; padding, end and unknown tokens have ids of their own."""
    words = Tokenizer(models.WordLevel(world.vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def reference(
    folder: str | Path, world: Journey | None = None, *, seed: int = 0, steps: int = STEPS, worst_gap: float = WORST_GAP
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the reference on journeys for all prompts, each seen once; load it if the folder holds it already.

    Training goes on by further rounds of as many steps, each with a learning rate that rises and falls, until the
    reference is near enough to the grammar: now and then the first round does not find what decides an ending.

    A GPT-2 of 2 layers, width 64 and 4 heads (about 110,000 parameters), of the configuration of the SHIPPED one, saved
    with its tokenizer as an ordinary hub folder. A round takes about 80 seconds on one core.

    Args:
        steps: of a round.
        worst_gap: the largest `grammar_gap` that is accepted, in nats per text; infinite for an early reference, of one
            round.

    Raises:
        ValueError: if its gap is larger after four rounds, or if the folder holds a model made with other arguments.
            What staying home is worth does not count: it changes no text.
    """
    folder, world = Path(folder), world or Journey()
    made_with = dict(luck=str(world.luck), seed=seed, steps=steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)

    def make(unfinished: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(load_config(SHIPPED))
        rng = np.random.default_rng(seed)
        for _ in range(ROUNDS):
            _train(model.train(), world, rng, steps)
            if worst_gap == math.inf or grammar_gap(model.eval(), world)[0] <= worst_gap:
                break
        model.config.journey = made_with
        model.save_pretrained(unfinished)
        word_tokenizer(world).save_pretrained(unfinished)

    once(folder, make)
    model = load_language_model(folder)
    if (found := getattr(model.config, "journey", "other code")) != made_with:
        raise ValueError(
            f"{folder} holds a model made with {found}, not with {made_with}: choose another folder, or delete this one"
        )
    if worst_gap < math.inf and (gap := grammar_gap(model, world)[0]) > worst_gap:
        raise ValueError(
            f"the reference in {folder} is {gap:.2f} nats per text from the grammar, and at most {worst_gap:g} are "
            "accepted: what it has not learned no reward can guide; take another seed or more steps, or pass "
            "worst_gap=math.inf for an early reference"
        )
    return model, load_tokenizer(folder)


@torch.no_grad()
def grammar_gap(model: PreTrainedModel, world: Journey, *, journeys: int = 1200, seed: int = 1) -> tuple[float, float]:
    """KL(grammar || model) in nats per text, and its standard error.

        E_y sum_i KL(p(. | y_<i) || model(. | y_<i))

    Every step's divergence is exact; the mean is over `journeys` of the grammar, in equal parts for all prompts.
    """
    ends, gaps = world.vocabulary[END], np.zeros((journeys, HORIZON))
    tokens, _ = world.write(np.random.default_rng(seed).random(gaps.shape))
    prompts = np.resize(_prompt_ids(world), (journeys, len(_prompt_ids(world)[0])))
    logits = model(input_ids=torch.from_numpy(np.hstack([prompts, tokens]))).logits[:, prompts.shape[1] - 1 : -1]
    log_probs = logits.double().log_softmax(-1).numpy()
    for number, automaton in enumerate(world.automata[prompt] for prompt in PROMPTS):
        rows = np.arange(number, journeys, len(PROMPTS))
        known, then = np.zeros((2, len(automaton.rewards), len(world.vocabulary)))
        known[automaton.sources, automaton.tokens] = np.exp(automaton.log_probs)
        then[automaton.sources, automaton.tokens] = automaton.targets
        states, written = np.full(len(rows), automaton.start), np.full(len(rows), True)
        for step in range(HORIZON):
            p, drawn = known[states], tokens[rows, step]
            gaps[rows, step] = written * (xlogy(p, p) - p * log_probs[rows, step]).sum(1)
            states, written = then[states, drawn].astype(int), written & (drawn != ends)
    texts = gaps.sum(1)
    return float(texts.mean()), float(texts.std(ddof=1) / math.sqrt(journeys))


def _prompt_ids(world: Journey) -> list[list[int]]:
    return [[world.vocabulary[word] for word in prompt.split()] for prompt in PROMPTS]


def _train(model: PreTrainedModel, world: Journey, rng: np.random.Generator, steps: int) -> None:
    tokens, _ = world.write(rng.random((steps * BATCH_SIZE, HORIZON)))
    prompts = np.resize(_prompt_ids(world), (len(tokens), len(_prompt_ids(world)[0])))
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
