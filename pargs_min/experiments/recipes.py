"""How the models of experiments are made: one table, from an objective to what it learns from, how long and how fast.

What a cell needs is trained once, under a name that says how, and shared by all cells of a lab.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from pargs_min.baselines.farma import train_farma
from pargs_min.baselines.genarm import train_genarm
from pargs_min.baselines.ppo import PPOSettings, train_ppo
from pargs_min.codec import Codec, end_tokens
from pargs_min.data import Text, by_prompt, encode_texts
from pargs_min.distil import taught, train_distilled, vocabulary_headed
from pargs_min.experiments.setup import Lab, generated, made_from, material
from pargs_min.frozen import frozen_trunk
from pargs_min.models import (
    default_device,
    load_guide,
    load_language_model,
    load_reward_model,
    load_tokenizer,
    record,
    save,
)
from pargs_min.records import read_responses
from pargs_min.reward_model import LANGUAGE_MODELS, context_length
from pargs_min.scoring import model_rewards
from pargs_min.store import kept, write_json, write_lines
from pargs_min.train import rate, train_language_model, train_partial_on_texts, train_reward_model, train_value_model
from pargs_min.trunk import copy_trunk

SAMPLES = 10**6  # plus that of the world: seed of the reference's texts that models learn from, which no cell shares
HELD_OUT = 17  # one in so many is held out, to choose a model by; prime, so that every prompt has its part
EVALUATIONS = 8  # of a model that is chosen so, while it is trained
TOLD = ("loss", "accuracy")  # of held-out data, what is told of a model


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Args:
        objective: a name of `methods.OBJECTIVES`, or "ppo".
        pairs: how many of the training pairs; None means all (not for what learns from texts).
        labels: "soft" (partial): of texts of the reference, by the full-sequence reward model; None: the pairs' own.
        head: "vocab": a vocabulary head, distilled from the scalar guide of these labels; None: a scalar one.
        start: family, layers and width of a model with random weights; None starts from the reference.
        lengths: first and last prefix length to train on (partial); no end where the last is None.
        beta: of the policy that it is trained for (soft, reweighted, dpo, ppo).
        shared_layers: how many of its lowest layers stay the reference's; None: as the lab says.

    >>> str(Recipe("partial", pairs=500, lengths=(1, 8)))
    'partial, pairs=500, lengths=1-8'
    """

    objective: str
    pairs: int | None = None
    labels: str | None = None
    head: str | None = None
    start: tuple[str, int, int] | None = None
    lengths: tuple[int, int | None] | None = None
    beta: float | None = None
    shared_layers: int | None = None

    def __str__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join([settings.pop("objective"), *(f"{name}={_joined(settings[name])}" for name in settings)])

    def folder_name(self, seed: int) -> str:
        """A folder name that says how a model was made.

        >>> Recipe("partial", pairs=500, lengths=(1, 8)).folder_name(seed=3)
        'partial-pairs=500-lengths=1-8-seed=3'
        """
        return f"{self}, seed={seed}".replace(", ", "-")

    @property
    def training(self) -> "Training":
        if self.head == DISTILLED.head:
            return TRAINING["distilled"]
        return TRAINING[f"{self.labels} labels" if self.labels else self.objective]

    @property
    def ingredients(self) -> list["Recipe"]:
        """The models that this one is made from: what learns from texts, and PPO, need a full-sequence reward model."""
        needed = {"pairs": [], "guide": [FULL, SOFT_LABELS]}
        return needed.get(self.training.source, [FULL])


def _joined(value: object) -> str:
    return "-".join(str(part or "end") for part in value) if isinstance(value, tuple) else str(value)


PARTIAL, FULL, VALUE = Recipe("partial"), Recipe("full"), Recipe("value")
SOFT_LABELS = Recipe("partial", labels="soft")
DISTILLED = Recipe("partial", labels="soft", head="vocab")
NEED_TRL = {"dpo"}


class Training(NamedTuple):
    """How an objective is trained.

    Args:
        by: trains a model in place: (lab, recipe, model, tokenizer, data, held_out, args) -> metrics.
        source: what it learns from: "pairs", or what the full-sequence reward model says of texts of the reference
            ("texts") or of its own ("rollouts"), or what a scalar guide says of the reference's candidates ("guide").
        per_step: examples per training step, times the lab's pairs per step.
        steps: times those that the lab's epochs over its pairs take.
        rate: the lab's learning rate for it.
        head: of its reward model.
        warm: it starts from the full-sequence reward model instead of the reference.
        rates: times that rate; the one with the least held-out loss is kept.
        chosen: the step with the least held-out loss is kept.
    """

    by: Callable[..., dict[str, float]]
    source: str = "pairs"
    per_step: float = 1.0
    steps: float = 1.0
    rate: str = "learning_rate"
    head: str = "scalar"
    warm: bool = False
    rates: tuple[float, ...] = (1.0,)
    chosen: bool = False


def make(lab: Lab, recipe: Recipe, seed: int) -> Path:
    """The folder of a model, trained now unless it is there; training.json in it says how long that took, and more."""

    def trained(folder: Path) -> None:
        for one in recipe.ingredients:
            make(lab, one, seed)
        found = (_by_ppo if recipe.training.source == "rollouts" else _train)(lab, recipe, seed, folder)
        write_json(folder / "training.json", found)

    how = dict(recipe=str(recipe), training=recipe.training[1:], seed=seed)
    source = made_from(lab, "model", "pairs", "held_out", **how)
    return kept(folder(lab, recipe, seed), source, trained)


def folder(lab: Lab, recipe: Recipe, seed: int) -> Path:
    """Where a model is kept."""
    return lab.file("models") / recipe.folder_name(seed)


def shared_layers(lab: Lab, recipe: Recipe) -> int | None:
    """How many of a model's lowest layers stay the reference's."""
    return lab.shared_layers if recipe.shared_layers is None else recipe.shared_layers


def guide(lab: Lab, recipe: Recipe, seed: int) -> PreTrainedModel:
    """A reward model, or a language model that guides, trained now unless it is there."""
    return load_guide(make(lab, recipe, seed), device=default_device())


def _train(lab: Lab, recipe: Recipe, seed: int, folder: Path) -> dict[str, float]:
    how, tokenizer = recipe.training, load_tokenizer(lab.model)
    shared = shared_layers(lab, recipe)
    data: list[Any] = rated(lab, seed) if how.source in ("texts", "guide") else material(lab).pairs[: recipe.pairs]
    held_out, labelled = [], material(lab).held_out if how.source == "pairs" else []
    best: dict[str, float] = {}
    began = time.perf_counter()
    if how.chosen or len(how.rates) > 1:
        held_out, data = (
            [one for number, one in enumerate(data) if (number // 2 % HELD_OUT == 0) is out] for out in (True, False)
        )  # two at a time, for texts are compared with others for their prompt
    for factor in how.rates:
        set_seed(seed)
        model = guide(lab, FULL, seed) if how.warm else _untrained(lab, recipe, tokenizer, seed)
        with TemporaryDirectory() as checkpoints:
            args = _arguments(lab, recipe, len(data), factor * getattr(lab, how.rate), checkpoints, seed)
            with frozen_trunk(model, shared):
                metrics = how.by(lab, recipe, model, tokenizer, data, held_out or labelled, args)
        found = {"rate": factor} | {name: metrics[f"eval_{name}"] for name in TOLD if f"eval_{name}" in metrics}
        if not best or found["loss"] < best["loss"]:
            best, kept_model = found, model
    known: dict[str, Any] = dict(objective=recipe.objective, prompt_format=material(lab).form)
    known |= {"append_eos": lab.append_eos} if how.source == "pairs" else {"reference": vars(lab.warp)}
    known |= {"distilled": {"beta": DISTILLED_AT}} if how.source == "guide" else {}
    known |= {name: value for name, value in (("beta", recipe.beta), ("shared_layers", shared)) if value is not None}
    record(kept_model, **known)
    save(kept_model, tokenizer, folder)
    return {"seconds": time.perf_counter() - began, **best}


def _untrained(lab: Lab, recipe: Recipe, tokenizer: Tokenizer, seed: int) -> PreTrainedModel:
    if recipe.head == DISTILLED.head:
        model = vocabulary_headed(guide(lab, SOFT_LABELS, seed)).cpu()
        if recipe.shared_layers is not None:
            copy_trunk(model, load_language_model(lab.model), recipe.shared_layers)
        return model
    if recipe.start:
        return _new_model(*recipe.start, tokenizer)
    if recipe.objective in LANGUAGE_MODELS:
        return load_language_model(lab.model)
    return load_reward_model(lab.model, tokenizer, head=recipe.training.head)


def _new_model(family: str, layers: int, width: int, tokenizer: Tokenizer) -> PreTrainedModel:
    """A reward model with random weights, heads of 16 dimensions, for texts of up to 64 tokens."""
    sizes = dict(hidden_size=width, intermediate_size=3 * width, max_position_embeddings=64)
    sizes |= dict(
        num_hidden_layers=layers, num_attention_heads=width // 16, vocab_size=Codec(tokenizer).vocabulary, num_labels=1
    )
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id)
    config = AutoConfig.for_model(family, eos_token_id=tokenizer.eos_token_id, **sizes, **ids)
    return AutoModelForSequenceClassification.from_config(config)


def _arguments(lab: Lab, recipe: Recipe, examples: int, rate: float, folder: str, seed: int) -> TrainingArguments:
    """Trainer's arguments: the lab's epochs over its pairs, or as many steps for other data."""
    how, on_cpu = recipe.training, default_device() == "cpu"
    pairs = len(material(lab).pairs) if how.source in ("texts", "guide") else examples
    steps, batch = max(1, round(how.steps * lab.epochs * pairs / lab.pairs_per_step)), lab.pairs_per_step * how.per_step
    pace = dict(max_steps=steps, warmup_steps=steps // 20, per_device_train_batch_size=max(1, round(batch)))
    where = dict(output_dir=folder, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu)
    quiet = dict(logging_strategy="no", disable_tqdm=True, report_to="none", save_strategy="no")
    quiet |= dict(per_device_eval_batch_size=max(1, round(batch)))
    if how.chosen:
        every = max(1, steps // EVALUATIONS)
        quiet |= dict(eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every)
        quiet |= dict(load_best_model_at_end=True, metric_for_best_model="loss", save_only_model=True)
        quiet |= dict(save_total_limit=1)
    return TrainingArguments(seed=seed, learning_rate=rate, **pace, **where, **quiet)


# ---- objectives ----


def _by_pairs(lab, recipe, model, tokenizer, pairs, held_out, args):
    """On every prefix of the pairs, or on whole responses."""
    how: dict[str, Any] = dict(objective=recipe.objective, lengths=recipe.lengths or (1, None), **_tail(lab, tokenizer))
    return train_reward_model(model, tokenizer, pairs, held_out, args=args, lora_rank=lab.lora_rank, **how)


def _by_soft_labels(lab, recipe, model, tokenizer, texts, held_out, args):
    how = dict(group_size=GROUP, lora_rank=lab.lora_rank, **_tail(lab, tokenizer))
    return train_partial_on_texts(model, tokenizer, texts, held_out, args=args, **how)


def _tail(lab: Lab, tokenizer: Tokenizer) -> dict[str, Any]:
    return dict(tail="extend" if lab.append_eos else "min", end=Codec(tokenizer, material(lab).form).end)


def _by_values(lab, recipe, model, tokenizer, texts, held_out, args):
    how = dict(objective=recipe.objective, lam=recipe.beta or 1.0, lora_rank=lab.lora_rank)
    return train_value_model(model, tokenizer, texts, held_out, args=args, **how)


def _by_distilling(lab, recipe, model, tokenizer, texts, held_out, args):
    """Its guide is the model that it starts from, with a scalar head."""
    how = dict(warp=lab.warp, batch_size=args.per_device_eval_batch_size)
    enough = texts[:: max(1, len(texts) // DISTILLED_FROM)]  # of every prompt
    teacher = guide(lab, SOFT_LABELS, args.seed)
    data = [taught(some, teacher, material(lab).lm, tokenizer, **how) for some in (enough, held_out)]
    del teacher  # training needs the room
    return train_distilled(model, tokenizer, *data, beta=DISTILLED_AT, args=args, lora_rank=lab.lora_rank)


def _by_reweighting(lab, recipe, model, tokenizer, texts, held_out, args):
    several = ([text for some in by_prompt(part) if len(some) > 1 for text in some] for part in (texts, held_out))
    how = dict(beta=recipe.beta, lora_rank=lab.lora_rank)
    return train_language_model(model, tokenizer, *several, args=args, **how)


def _by_its_own(train, lab, recipe, model, tokenizer, pairs, held_out, args):
    """For baselines whose training knows no more than pairs."""
    return train(model, tokenizer, pairs, held_out, args=args, lora_rank=lab.lora_rank)


def _by_dpo(lab, recipe, model, tokenizer, pairs, held_out, args):
    from pargs_min.baselines.dpo import train_dpo  # TRL is an extra

    return train_dpo(model, tokenizer, pairs, held_out, beta=recipe.beta, args=args)


def _by_ppo(lab: Lab, recipe: Recipe, seed: int, folder: Path) -> dict[str, float]:
    tokenizer, model = load_tokenizer(lab.model), load_language_model(lab.model, device=default_device())
    began, (rater, critic) = time.perf_counter(), (guide(lab, FULL, seed) for _ in range(2))
    settings: dict[str, Any] = dict(beta=recipe.beta, max_new_tokens=lab.max_new_tokens, seed=seed)
    settings |= dict(updates=lab.ppo_updates, learning_rate=lab.ppo_learning_rate)
    settings |= dict(batch_size=2 * lab.pairs_per_step, minibatch_size=lab.pairs_per_step)
    prompts, ends = _training_prompts(lab), end_tokens(model, tokenizer)
    set_seed(seed)
    task = model_rewards(rater), prompts, ends, PPOSettings(**settings)
    for _ in train_ppo(model, critic, *task, vocabulary=Codec(tokenizer).vocabulary):
        pass
    save(model, tokenizer, folder)
    return {"seconds": time.perf_counter() - began}


DISTILLED_FROM = 8000  # texts or a few more: the teacher is asked at each of their tokens
DISTILLED_AT = 2.0  # the beta at which a distilled guide is to be like its teacher
GROUP = 8  # texts of a prompt that are compared with each other
TRAINING = {
    "partial": Training(_by_pairs),
    "full": Training(_by_pairs),
    "win": Training(_by_pairs),
    "soft labels": Training(
        _by_soft_labels, source="texts", per_step=1 / GROUP, steps=2, warm=True, rates=(2.0,), chosen=True
    ),
    "distilled": Training(_by_distilling, source="guide", chosen=True),
    "value": Training(_by_values, source="texts", steps=2, chosen=True),
    "soft": Training(_by_values, source="texts", steps=6, chosen=True),
    "reweighted": Training(_by_reweighting, source="texts", steps=4, rates=(2.0,), chosen=True),
    "farma": Training(partial(_by_its_own, train_farma), head="vocab", rates=(0.3, 1.0, 3.0), chosen=True),
    "autoregressive": Training(partial(_by_its_own, train_genarm), rates=(0.1, 0.3, 1.0), chosen=True),
    "dpo": Training(_by_dpo, rate="dpo_learning_rate", rates=(0.3, 1.0, 3.0)),
    "ppo": Training(_by_ppo, source="rollouts"),
}


# ---- texts of the reference that models learn from ----


def _training_prompts(lab: Lab) -> list[list[int]]:
    """The prompts of the training pairs, each once."""
    return [list(ids) for ids in dict.fromkeys(tuple(pair.prompt_ids) for pair in material(lab).pairs)]


def samples(lab: Lab) -> Path:
    """Texts of the reference: two for each training pair, for the same prompts, an even number for each; or as the lab
    says."""

    def sampled(file: Path) -> None:
        prompts = [{"prompt_ids": ids} for ids in _training_prompts(lab)][: lab.text_prompts]
        write_lines(file, generated(lab, prompts, text_count(lab) // len(prompts), seed=SAMPLES + lab.seed))

    source = made_from(lab, "model", "pairs", "held_out", world_seed=lab.seed)
    return kept(lab.file("samples.jsonl"), source, sampled)


def text_count(lab: Lab) -> int:
    """How many `samples` there are."""
    prompts = len(_training_prompts(lab)[: lab.text_prompts])
    return prompts * (lab.texts_per_prompt or 2 * math.ceil(len(material(lab).pairs) / prompts))


def rated(lab: Lab, seed: int) -> list[Text]:
    """The samples, rated by the full-sequence reward model of this seed."""
    made = material(lab)
    texts, _ = encode_texts(read_responses(samples(lab)), made.tokenizer, context_length(made.lm), made.form)

    def rewards(file: Path) -> None:
        reward_fn, device = model_rewards(guide(lab, FULL, seed)), default_device()
        found = rate(texts, reward_fn, batch_size=lab.batch_size, device=device)
        with file.open("wb") as out:
            np.save(out, [text.reward for text in found])

    source = made_from(lab, "model", "pairs", "held_out", seed=seed)
    known = np.load(kept(lab.file("models") / f"rated-seed={seed}.npy", source, rewards)).tolist()
    return [text._replace(reward=reward) for text, reward in zip(texts, known, strict=True)]
