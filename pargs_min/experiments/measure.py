"""One cell of an experiment: train the models that it needs, generate and judge its texts, test its reward model.

What a cell needs is trained once, under a name that says how, and shared by all cells of a lab.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from pargs_min.baselines.ppo import PPOSettings, train_ppo
from pargs_min.codec import Codec, end_tokens
from pargs_min.data import encode_texts
from pargs_min.evaluation.statistics import FrontierPoint, distinct_n, mean_and_error, prompt_means, rlhf_frontier
from pargs_min.experiments import concordance
from pargs_min.experiments.setup import Lab, generated, judge_of, judged, made_from, material
from pargs_min.methods import FINE_TUNED, METHODS, Method
from pargs_min.models import (
    default_device,
    load_language_model,
    load_reward_model,
    load_tokenizer,
    save,
    save_reward_model,
)
from pargs_min.records import read_responses
from pargs_min.reward_model import context_length, prefix_rewards
from pargs_min.scoring import model_rewards
from pargs_min.store import kept, write_json, write_lines
from pargs_min.texts import text_log_probs
from pargs_min.train import prefix_accuracy, rate, train_reward_model, train_value_model

# Seeds of the reference's own texts, which no cell shares: to train value models on, to estimate the RLHF policy from,
# and to correlate rewards of prefixes on.
SAMPLES, PLAIN, CORRELATED = 10**6, 2 * 10**6, 3 * 10**6


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Args:
        objective: "partial", "full" or "value": a reward model; "dpo" or "ppo": a language model.
        pairs: how many of the training pairs; None means all (not for value).
        head: "scalar" (None) or "vocab".
        start: family, layers and width of a model with random weights; None starts from the reference.
        lengths: first and last prefix length to train on (partial); no end where the last is None.
        beta: of the policy that DPO and PPO train for.

    >>> str(Recipe("partial", pairs=500, lengths=(1, 8)))
    'partial, pairs=500, lengths=1-8'
    """

    objective: str
    pairs: int | None = None
    head: str | None = None
    start: tuple[str, int, int] | None = None
    lengths: tuple[int, int | None] | None = None
    beta: float | None = None

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
    def ingredients(self) -> list["Recipe"]:
        """The models that this one is made from: value models and PPO learn from a full-sequence reward model."""
        return MADE_FROM.get(self.objective, [])


def _joined(value: object) -> str:
    return "-".join(str(part or "end") for part in value) if isinstance(value, tuple) else str(value)


PARTIAL, FULL, VALUE = Recipe("partial"), Recipe("full"), Recipe("value")
MADE_FROM = {"value": [FULL], "ppo": [FULL]}
NEED_TRL = {"dpo"}


@dataclass(frozen=True)
class Cell:
    """What is measured: the texts of a method, the quality of a reward model, or both.

    Args:
        seed: of everything that is trained or drawn.
        method: one of `METHODS` or `FINE_TUNED`; beta, top_k, n and particles are its settings.
        recipe: of the reward model; final: of the one that smc weighs whole texts by.
        quality: whether the reward model itself is measured.
        lab: the name of the lab, where a sweep has several.

    >>> str(Cell(0, "args", beta=2.0)), str(Cell(0, "best-of-n", n=4))
    ('args beta=2', 'best-of-n n=4')
    """

    seed: int
    method: str | None = None
    beta: float | None = None
    top_k: int | None = None
    n: int | None = None
    particles: int | None = None
    recipe: Recipe | None = None
    final: Recipe | None = None
    quality: bool = False
    lab: str = ""

    def __str__(self) -> str:
        named = ((name, getattr(self, name)) for name in ("beta", "n", "particles"))
        return " ".join([self.method or "", *(f"{name}={value:g}" for name, value in named if value is not None)])

    @property
    def writes(self) -> Method:
        """How its language model generates: by the method itself; what is fine-tuned is sampled."""
        return METHODS[self.method if self.method in METHODS else "plain"]

    @property
    def tuned(self) -> Recipe | None:
        """The fine-tuned language model that it needs."""
        return Recipe(self.method, beta=self.beta) if self.method in FINE_TUNED else None

    @property
    def recipes(self) -> list[Recipe]:
        """All models that it needs, but for what those are made from."""
        return [recipe for recipe in (self.recipe, self.final, self.tuned) if recipe]


def guided(seed: int, methods: Sequence[str], betas: Sequence[float], **settings: Any) -> list[Cell]:
    """Cells of guided methods at each beta, with the reward models that the methods are for; settings are of `Cell`."""
    recipes = {method: Recipe(METHODS[method].objective or "partial") for method in methods}
    return [Cell(seed, method, beta=b, recipe=recipes[method], **settings) for method in methods for b in betas]


# ---- what cells need ----


def make(lab: Lab, recipe: Recipe, seed: int) -> Path:
    """The folder of a model, trained now unless it is there."""
    train = {"dpo": _train_by_dpo, "ppo": _train_by_ppo}.get(recipe.objective, _train_reward_model)

    def trained(folder: Path) -> None:
        set_seed(seed)
        train(lab, recipe, seed, folder)

    source = made_from(lab, "model", "pairs", "held_out", recipe=str(recipe), seed=seed)
    return kept(lab.file("models") / recipe.folder_name(seed), source, trained)


def reward_model(lab: Lab, recipe: Recipe, seed: int) -> PreTrainedModel:
    """A reward model, trained now unless it is there."""
    return load_reward_model(make(lab, recipe, seed), device=default_device())


def _train_reward_model(lab: Lab, recipe: Recipe, seed: int, folder: Path) -> None:
    tokenizer, pairs = load_tokenizer(lab.model), material(lab).pairs[: recipe.pairs]
    if recipe.start:
        model = _new_model(*recipe.start, tokenizer)
    else:
        model = load_reward_model(lab.model, tokenizer, head=recipe.head or "scalar")
    args = _arguments(lab, folder, len(pairs), lab.learning_rate, seed)
    if recipe == VALUE:
        texts, _ = encode_texts(read_responses(samples(lab)), tokenizer, context_length(model), material(lab).form)
        reward_fn, device = model_rewards(reward_model(lab, FULL, seed)), default_device()
        rated = rate(texts, reward_fn, batch_size=lab.batch_size, device=device)
        train_value_model(model, tokenizer, rated, args=args)
    else:
        tail, lengths = "extend" if lab.append_eos else "min", recipe.lengths or (1, None)
        how: dict[str, Any] = dict(objective=recipe.objective, tail=tail, lengths=lengths)
        train_reward_model(model, tokenizer, pairs, args=args, end=Codec(tokenizer, material(lab).form).end, **how)
    recorded = {"objective": recipe.objective, "append_eos": lab.append_eos, "prompt_format": material(lab).form}
    save_reward_model(model, tokenizer, folder, **recorded)


def _new_model(family: str, layers: int, width: int, tokenizer: Tokenizer) -> PreTrainedModel:
    """A reward model with random weights, heads of 16 dimensions, for texts of up to 64 tokens."""
    sizes = dict(hidden_size=width, intermediate_size=3 * width, max_position_embeddings=64)
    sizes |= dict(
        num_hidden_layers=layers, num_attention_heads=width // 16, vocab_size=Codec(tokenizer).vocabulary, num_labels=1
    )
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id)
    config = AutoConfig.for_model(family, eos_token_id=tokenizer.eos_token_id, **sizes, **ids)
    return AutoModelForSequenceClassification.from_config(config)


def _train_by_dpo(lab: Lab, recipe: Recipe, seed: int, folder: Path) -> None:
    from pargs_min.baselines.dpo import train_dpo  # TRL is an extra

    tokenizer, model, pairs = load_tokenizer(lab.model), load_language_model(lab.model), material(lab).pairs
    args = _arguments(lab, folder, len(pairs), lab.dpo_learning_rate, seed)
    settings: dict[str, Any] = dict(beta=recipe.beta, args=args)
    train_dpo(model, tokenizer, pairs, **settings)
    save(model, tokenizer, folder)


def _train_by_ppo(lab: Lab, recipe: Recipe, seed: int, folder: Path) -> None:
    tokenizer, model = load_tokenizer(lab.model), load_language_model(lab.model, device=default_device())
    rater, critic = (reward_model(lab, FULL, seed) for _ in range(2))
    settings: dict[str, Any] = dict(beta=recipe.beta, max_new_tokens=lab.max_new_tokens, seed=seed)
    settings |= dict(updates=lab.ppo_updates, learning_rate=lab.ppo_learning_rate)
    settings |= dict(batch_size=2 * lab.pairs_per_step, minibatch_size=lab.pairs_per_step)
    prompts, ends = _training_prompts(lab), end_tokens(model, tokenizer)
    for _ in train_ppo(model, critic, model_rewards(rater), prompts, ends, PPOSettings(**settings)):
        pass
    save(model, tokenizer, folder)


def _arguments(lab: Lab, folder: Path, pairs: int, learning_rate: float, seed: int) -> TrainingArguments:
    """Trainer's arguments: the lab's epochs over so many pairs."""
    steps, on_cpu = max(1, round(lab.epochs * pairs / lab.pairs_per_step)), default_device() == "cpu"
    pace = dict(max_steps=steps, warmup_steps=steps // 20, per_device_train_batch_size=lab.pairs_per_step)
    quiet = dict(save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none")
    where = dict(output_dir=str(folder), use_cpu=on_cpu, dataloader_pin_memory=not on_cpu)
    return TrainingArguments(seed=seed, learning_rate=learning_rate, **pace, **quiet, **where)


def _training_prompts(lab: Lab) -> list[list[int]]:
    """The prompts of the training pairs, each once."""
    return [list(ids) for ids in dict.fromkeys(tuple(pair.prompt_ids) for pair in material(lab).pairs)]


def samples(lab: Lab) -> Path:
    """Texts of the reference that value models learn from: two for each training pair, for the same prompts."""

    def sampled(file: Path) -> None:
        prompts = [{"prompt_ids": ids} for ids in _training_prompts(lab)]
        per_prompt = math.ceil(2 * len(material(lab).pairs) / len(prompts))
        write_lines(file, generated(lab, prompts, per_prompt, seed=SAMPLES))

    return kept(lab.file("samples.jsonl"), made_from(lab, "model", "pairs", "held_out"), sampled)


def plain_rewards(lab: Lab) -> np.ndarray:
    """(prompts, N) rewards of texts of the reference that no cell shares."""

    def rated(file: Path) -> None:
        prompts = material(lab).prompts
        rewards = judged(lab, generated(lab, prompts, lab.plain_samples, seed=PLAIN))
        with file.open("wb") as out:
            np.save(out, np.reshape(rewards, (len(prompts), -1)))

    source = made_from(lab, "model", "prompts", "judge", plain_samples=lab.plain_samples)
    return np.load(kept(lab.file("plain_rewards.npy"), source, rated))


def rlhf_policies(lab: Lab, betas: Sequence[float]) -> list[FrontierPoint]:
    """The RLHF policies of the judge's reward, estimated from `plain_rewards`; those that too few samples tell of are
    left out."""
    rewards = plain_rewards(lab)
    return rlhf_frontier(rewards, betas, least=min(500, rewards.size / 4))


def siblings(lab: Lab) -> list[concordance.Siblings]:
    """Candidates after prefixes of the reference, and how often their completions win; exact in the embedded world."""

    def found(file: Path) -> None:
        exact, rollouts = concordance.exact_siblings, concordance.rollout_siblings
        write_json(file, [*(exact(lab, replace(lab.world)) if lab.world else rollouts(lab))])

    file = kept(lab.file("siblings.json"), made_from(lab, "model", "pairs", "prompts", "judge"), found)
    return [concordance.Siblings(*one) for one in json.loads(file.read_text("utf-8"))]


# ---- measuring one cell ----


def measure(lab: Lab, cell: Cell) -> dict:
    """All that is known of a cell.

    Returns:
        of texts, each a mean over prompts: reward, kl (nats per text), length (tokens), calls (forward passes of one
        row by any model, per text), seconds (per text), distinct2 (among the texts of a prompt), the judge's further
        measures, gap (`rlhf_gap`); and by_prompt, the reward of each prompt.
        of a reward model: see `quality`.
    """
    found = _text_measures(lab, cell, write(lab, cell)) if cell.method else {}
    if cell.quality and cell.recipe:
        found |= quality(lab, reward_model(lab, cell.recipe, cell.seed))
    return found


def write(lab: Lab, cell: Cell) -> list[dict]:
    """The texts of a cell, as records of `generate_texts`; their `kl` is to the lab's reference."""
    made, names = material(lab), ("beta", "top_k", "n", "particles")
    settings: dict = {name: value for name in names if (value := getattr(cell, name)) is not None}
    roles = {"reward_model": cell.recipe, "final_reward_model": cell.final}
    settings |= {role: reward_model(lab, recipe, cell.seed) for role, recipe in roles.items() if recipe}
    if cell.tuned:
        settings["lm"] = load_language_model(make(lab, cell.tuned, cell.seed), device=default_device())
    texts = generated(lab, made.prompts, lab.samples, method=cell.writes.name, seed=cell.seed, **settings)
    if cell.tuned:
        by_reference = text_log_probs(made.lm, Codec.of(made.lm, made.tokenizer, made.form), texts, lab.batch_size)
        texts = [text | {"kl": text["ref_log_prob"] - other} for text, other in zip(texts, by_reference, strict=True)]
    return texts


def _text_measures(lab: Lab, cell: Cell, texts: list[dict]) -> dict:
    rewards, prompts = judged(lab, texts), [text["prompt_number"] for text in texts]

    def mean(values: Iterable[float]) -> float:
        return mean_and_error([*values], prompts)[0]

    ids = [text["response_ids"] for text in texts]
    groups = [ids[first : first + lab.samples] for first in range(0, len(ids), lab.samples)]
    found = {
        "reward": mean(rewards),
        "kl": mean(text["kl"] for text in texts),
        "length": mean(map(len, ids)),
        "calls": mean(text["cost"]["model_calls"] for text in texts),
        "seconds": mean(text["cost"]["seconds"] for text in texts),
        "distinct2": statistics.fmean(distinct_n(group, 2) for group in groups),
        "by_prompt": prompt_means(rewards, prompts).tolist(),
    }
    found |= {name: mean(map(of_reward, rewards)) for name, of_reward in judge_of(lab).measures.items()}
    gap = rlhf_gap(lab, cell, found)
    return found if gap is None else found | {"gap": gap}


def rlhf_gap(lab: Lab, cell: Cell, found: dict) -> float | None:
    """KL(pi || RLHF policy) in nats per text, for the RLHF policy pi* of the judge's reward R at the cell's beta (T0):

        (beta E_pi*[R] - KL(pi* || pi_ref)) - (beta E_pi[R] - KL(pi || pi_ref))

    that is, beta times how much less pi has of the objective E[R] - KL / beta than the best policy. None for policies
    without beta or with one text per prompt, and where too few samples tell of pi*.
    """
    if cell.beta is None or cell.writes.greedy:
        return None
    best = rlhf_policies(lab, [cell.beta])
    return cell.beta * (best[0].reward - found["reward"]) - best[0].kl + found["kl"] if best else None


@torch.no_grad()
def quality(lab: Lab, model: PreTrainedModel) -> dict:
    """What a reward model knows, measured on texts that it was not trained on.

    accuracy        pairs ordered as labelled, after 1, 2, ... tokens, of held-out pairs (`prefix_accuracy`)
    whole           the last of them: accuracy on whole responses
    concordance     candidate pairs ranked as their completions' win rates (`concordance`)
    gain            the same, weighted by the squared gap: by what there is to win
    ceiling         what noise leaves a perfect reward model to reach of either
    final           rank correlation of r(y_1:i) with the reward of the whole text by the same model, after 1, 2, ...
    gold            the same with the judge's reward; both within each prompt, on texts of the reference
    """
    accuracy = prefix_accuracy(model, material(lab).held_out, batch_size=lab.batch_size).accuracy
    texts, gold = _plain_texts(lab)
    scores = _prefix_scores(lab, model, texts)
    return {
        "accuracy": accuracy[: lab.max_new_tokens].tolist(),
        "whole": accuracy[-1].item(),
        **concordance.ranking(model, siblings(lab)),
        "final": _correlations(scores, scores[:, -1], lab.samples),
        "gold": _correlations(scores, np.array(gold), lab.samples),
    }


@cache
def _plain_texts(lab: Lab) -> tuple[list[dict], list[float]]:
    """Texts of the reference, and their rewards."""
    texts = generated(lab, material(lab).prompts, lab.samples, seed=CORRELATED)
    return texts, judged(lab, texts)


def _prefix_scores(lab: Lab, model: PreTrainedModel, texts: list[dict]) -> np.ndarray:
    """(N, T) rewards after 1, 2, ... tokens; a text that has ended keeps its last."""
    rows, codec = [], Codec(material(lab).tokenizer)
    for text in texts:
        prompt = codec.prompt(text)
        ids = torch.tensor([prompt + text["response_ids"]], device=model.device)
        rewards = prefix_rewards(model, ids, torch.ones_like(ids))[0, len(prompt) :].double().cpu().numpy()
        rows.append(np.pad(rewards, (0, lab.max_new_tokens - len(rewards)), mode="edge"))
    return np.array(rows)


def _correlations(scores: np.ndarray, rewards: np.ndarray, samples: int) -> list[float]:
    """Spearman's, within each prompt, averaged over the prompts where there is anything to correlate; (T,)."""
    means = []
    for column in scores.T:
        pairs = zip(column.reshape(-1, samples), rewards.reshape(-1, samples), strict=True)
        known = [stats.spearmanr(*pair).statistic for pair in pairs if np.ptp(pair[0]) and np.ptp(pair[1])]
        means.append(statistics.fmean(map(float, known)) if known else math.nan)
    return means
