"""One cell of an experiment: generate and judge its texts, test its reward model (`recipes` makes what it needs)."""

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
from transformers import PreTrainedModel

from pargs_min.benchmark.ways import Way, token_seconds, weight_bytes
from pargs_min.codec import Codec
from pargs_min.data import encode_texts
from pargs_min.decode import Step
from pargs_min.evaluation.statistics import FrontierPoint, distinct_n, mean_and_error, prompt_means, rlhf_frontier
from pargs_min.experiments import concordance
from pargs_min.experiments.recipes import PARTIAL, Recipe, guide, make
from pargs_min.experiments.setup import Lab, generated, judge_of, judged, made_from, material
from pargs_min.methods import FINE_TUNED, METHODS, Method, as_is
from pargs_min.models import default_device, load_language_model
from pargs_min.records import read_jsonl, read_responses
from pargs_min.reward_model import context_length, is_language_model, prefix_rewards
from pargs_min.scoring import model_rewards
from pargs_min.store import kept, read_json, write_json, write_lines
from pargs_min.texts import text_log_probs
from pargs_min.train import prefix_accuracy, rate

# Seeds, plus that of the world, of the reference's own texts, which no cell shares: to estimate the RLHF policy from,
# and to correlate rewards of prefixes on.
PLAIN, CORRELATED = 2 * 10**6, 3 * 10**6
EXAMPLES = 3  # texts that are shown of each method on a model of one's own
PRICED, PRICED_PROMPTS = 32, 4  # tokens and prompts by which a token is priced
TRIMMED = 0.05  # of the times at either end, before their mean is taken
CAP = "learned RLHF"  # in place of a method: the RLHF policy of a learned reward of whole texts


@dataclass(frozen=True)
class Cell:
    """What is measured: the texts of a method, the quality of a reward model, or both.

    Args:
        seed: of everything that is trained or drawn.
        method: one of `METHODS` or `FINE_TUNED`, or `CAP`; its settings are beta, top_k, min_ref_prob, guide_below, n
            and particles.
        recipe: of the reward model; final: of the one that smc weighs whole texts by.
        quality: whether the reward model itself is measured.
        timed: whether its price beside plain generation is measured.
        lab: the name of the lab, where a sweep has several.

    >>> str(Cell(0, "args", beta=2.0)), str(Cell(0, "best-of-n", n=4))
    ('args beta=2', 'best-of-n n=4')
    """

    seed: int
    method: str | None = None
    beta: float | None = None
    top_k: int | None = None
    min_ref_prob: float | None = None
    guide_below: float | None = None
    n: int | None = None
    particles: int | None = None
    recipe: Recipe | None = None
    final: Recipe | None = None
    quality: bool = False
    timed: bool | None = None
    lab: str = ""

    def __str__(self) -> str:
        named = ((name, getattr(self, name)) for name in ("beta", "guide_below", "n", "particles"))
        return " ".join([self.name or "", *(f"{name}={value:g}" for name, value in named if value is not None)])

    @property
    def name(self) -> str | None:
        """Its method, and what its reward model differs in from the method's own.

        >>> Cell(0, "pargs", recipe=Recipe("partial", labels="soft")).name
        'pargs (soft labels)'
        """
        of = self.recipe or PARTIAL
        differs = ["soft labels"] * (of.labels == "soft") + ["vocabulary head"] * (of.head == "vocab")
        differs += ["shared layers"] * (of.shared_layers is not None)
        return f"{self.method} ({', '.join(differs)})" if differs else self.method

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
    return [Cell(seed, method, beta=b, **{"recipe": recipes[method]} | settings) for method in methods for b in betas]


# ---- what cells share ----


def plain_texts(lab: Lab) -> Path:
    """Texts of the reference that no cell shares."""

    def written(file: Path) -> None:
        write_lines(file, generated(lab, material(lab).prompts, lab.plain_samples, seed=PLAIN + lab.seed))

    return kept(lab.file("plain_texts.jsonl"), made_from(lab, "model", "prompts", **_plain_settings(lab)), written)


def _plain_settings(lab: Lab) -> dict[str, object]:
    """What `plain_texts` depend on, beside files."""
    return dict(plain_samples=lab.plain_samples, form=material(lab).form, world_seed=lab.seed)


def plain_rewards(lab: Lab) -> np.ndarray:
    """(prompts, N) the judge's rewards of `plain_texts`."""

    def rated(file: Path) -> None:
        rewards = judged(lab, [text for text, _ in read_jsonl(plain_texts(lab))])
        with file.open("wb") as out:
            np.save(out, np.reshape(rewards, (len(material(lab).prompts), -1)))

    source = made_from(lab, "model", "prompts", "judge", **_plain_settings(lab))
    return np.load(kept(lab.file("plain_rewards.npy"), source, rated))


@cache
def learned_rewards(lab: Lab, recipe: Recipe, seed: int) -> np.ndarray:
    """(prompts, N) rewards of `plain_texts` by a reward model of whole texts."""
    made, model = material(lab), guide(lab, recipe, seed)
    texts, _ = encode_texts(read_responses(plain_texts(lab)), made.tokenizer, context_length(model), made.form)
    found = rate(texts, model_rewards(model), batch_size=lab.batch_size, device=default_device())
    return np.reshape([text.reward for text in found], (len(made.prompts), -1))


def rlhf_policies(lab: Lab, betas: Sequence[float]) -> list[FrontierPoint]:
    """The RLHF policies of the judge's reward, estimated from `plain_rewards`; those that too few samples tell of are
    left out."""
    return _policies(plain_rewards(lab), betas)


def _policies(rewards: np.ndarray, betas: Sequence[float], **learned: np.ndarray) -> list[FrontierPoint]:
    return rlhf_frontier(rewards, betas, least=min(50, rewards.shape[1] / 2), **learned)


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
        of texts, each a mean over prompts: reward, kl (nats per text; left out where it is infinite, as that of
        fine-tuned models to a nucleus may be), length (tokens), calls (forward passes of one row by any model, per
        text), seconds (per text), distinct2 (among the texts of a prompt), second (the second judge's reward), examples
        (the first text for some prompts, on a model of one's own), the judge's further
        measures, time and memory (`price`), gap (`rlhf_gap`), flips and, with `guide_below`, asked (`Flips`); and
        by_prompt, the reward of each prompt. Of `CAP` only reward, kl and gap.
        of a guide: training, the seconds that it took, and whole, its accuracy on held-out pairs where it learned from
        pairs; else see `quality`.
    """
    if cell.method == CAP:
        return _cap(lab, cell)
    flips = Flips()
    found = _text_measures(lab, cell, write(lab, cell, flips)) if cell.method else {}
    if cell.method and cell.writes.guided and not cell.writes.rows:
        found |= {"flips": flips.share} | ({} if cell.guide_below is None else {"asked": flips.asked})
    if guide_or_tuned := cell.recipe or cell.tuned:
        told = read_json(make(lab, guide_or_tuned, cell.seed) / "training.json")
        found |= {"training": told["seconds"]}
        if guide_or_tuned.training.source == "pairs" and "accuracy" in told:  # else of pairs that a model has labelled
            found |= {"whole": told["accuracy"]}
    if cell.timed:
        found |= price(lab, cell)
    if cell.quality and cell.recipe:
        found |= quality(lab, guide(lab, cell.recipe, cell.seed))
    return found


class Flips:
    """How often guidance changes the likeliest token of a step, and is needed at all; an `on_step` of `generate`."""

    def __init__(self) -> None:
        self.changed = self.guided = self.steps = 0

    def __call__(self, step: Step) -> None:
        changed = step.log_probs.argmax(-1) != step.ref_log_probs.argmax(-1)
        self.changed += int((changed & step.alive).sum())
        self.guided += int((step.alive & ~step.rewards.isnan().all(-1)).sum())
        self.steps += int(step.alive.sum())

    @property
    def share(self) -> float:
        return self.changed / self.steps

    @property
    def asked(self) -> float:
        return self.guided / self.steps


def _cap(lab: Lab, cell: Cell) -> dict:
    """What the RLHF policy of a learned reward is worth to the judge: guides that learn from that reward aim at it.

    Texts of the reference, weighed by exp(beta R) of the learned R. Nothing where too few of them tell.
    """
    if not (cell.recipe and cell.beta):
        raise ValueError(f"{CAP} needs a recipe and a beta, got {cell}")
    points = _policies(plain_rewards(lab), [cell.beta], learned=learned_rewards(lab, cell.recipe, cell.seed))
    found = {"reward": points[0].reward, "kl": points[0].kl} if points else {}
    gap = rlhf_gap(lab, cell, found) if found else None
    return found if gap is None else found | {"gap": gap}


def write(lab: Lab, cell: Cell, on_step: Flips | None = None) -> list[dict]:
    """The texts of a cell, as records of `generate_texts`; their `kl` is to the lab's reference."""
    made, settings = material(lab), _settings(lab, cell)
    settings |= {"on_step": on_step} if cell.writes.guided else {}
    if cell.tuned:
        settings["lm"] = load_language_model(make(lab, cell.tuned, cell.seed), device=default_device())
    texts = generated(lab, made.prompts, lab.samples, method=cell.writes.name, seed=cell.seed, **settings)
    if cell.tuned:
        by_reference = text_log_probs(made.lm, Codec.of(made.lm, made.tokenizer, made.form), texts, lab.batch_size)
        texts = [text | {"kl": text["ref_log_prob"] - other} for text, other in zip(texts, by_reference, strict=True)]
    return texts


def _settings(lab: Lab, cell: Cell) -> dict:
    """What `generate_texts` is told for a cell, its reward models included."""
    names = ("beta", "top_k", "min_ref_prob", "guide_below", "n", "particles")
    roles = {"reward_model": cell.recipe, "final_reward_model": cell.final}
    settings: dict = {name: value for name in names if (value := getattr(cell, name)) is not None}
    return settings | {role: guide(lab, recipe, cell.seed) for role, recipe in roles.items() if recipe}


def price(lab: Lab, cell: Cell) -> dict:
    """What a guided token costs where a plain one costs 1, one text at a time: time, and memory of the weights."""
    made = material(lab)
    steps, settings = min(PRICED, lab.max_new_tokens), _settings(lab, cell)
    seconds: dict[str, list[float]] = {"plain": [], "guided": []}

    def way(prompt: dict, **how) -> Way:
        limits: dict[str, Any] = dict(prompts=[prompt], num_samples=1, max_new_tokens=steps, batch_size=1)
        return lambda tick: generated(lab, **limits, **how, on_step=lambda step: tick())

    for prompt in made.prompts[:PRICED_PROMPTS]:
        ways = {"plain": way(prompt), "guided": way(prompt, method=cell.writes.name, seed=cell.seed, **settings)}
        for name, times in token_seconds(ways, made.lm.device).items():
            seconds[name] += times[1:]  # without what the first step of all warms up
    plain, guided = (stats.trim_mean(times, TRIMMED) for times in seconds.values())
    memory = weight_bytes(made.lm, settings["reward_model"]) / weight_bytes(made.lm)
    return {"time": float(guided / plain), "memory": memory}


def _text_measures(lab: Lab, cell: Cell, texts: list[dict]) -> dict:
    rewards, prompts = judged(lab, texts), [text["prompt_number"] for text in texts]

    def mean(values: Iterable[float]) -> float:
        return mean_and_error([*values], prompts)[0]

    ids = [text["response_ids"] for text in texts]
    groups = [ids[first : first + lab.samples] for first in range(0, len(ids), lab.samples)]
    found = {
        "reward": mean(rewards),
        "length": mean(map(len, ids)),
        "calls": mean(text["cost"]["model_calls"] for text in texts),
        "seconds": mean(text["cost"]["seconds"] for text in texts),
        "distinct2": statistics.fmean(distinct_n(group, 2) for group in groups),
        "by_prompt": prompt_means(rewards, prompts).tolist(),
    }
    if all(map(math.isfinite, kls := [text["kl"] for text in texts])):
        found["kl"] = mean(kls)
    found |= {name: mean(map(of_reward, rewards)) for name, of_reward in judge_of(lab, lab.judge).measures.items()}
    if lab.second_judge:
        found["second"] = mean(judged(lab, texts, lab.second_judge))
    if not lab.world:
        found["examples"] = [text["response"] for text in texts[:: lab.samples][:EXAMPLES]]
    gap = rlhf_gap(lab, cell, found)
    return found if gap is None else found | {"gap": gap}


def rlhf_gap(lab: Lab, cell: Cell, found: dict) -> float | None:
    """KL(pi || RLHF policy) in nats per text, for the RLHF policy pi* of the judge's reward R at the cell's beta (T0):

        (beta E_pi*[R] - KL(pi* || pi_ref)) - (beta E_pi[R] - KL(pi || pi_ref))

    that is, beta times how much less pi has of the objective E[R] - KL / beta than the best policy. None for policies
    without beta (that of win is none), with one text per prompt or an infinite KL, and where too few samples tell of
    pi*.
    """
    if "kl" not in found or cell.beta is None or cell.writes.greedy or cell.writes.tilt is not as_is:
        return None
    best = rlhf_policies(lab, [cell.beta])
    return cell.beta * (best[0].reward - found["reward"]) - best[0].kl + found["kl"] if best else None


@torch.no_grad()
def quality(lab: Lab, model: PreTrainedModel) -> dict:
    """What a reward model knows, measured on texts that it was not trained on; of a language model the ranking alone.

    accuracy        pairs ordered as labelled, after 1, 2, ... tokens, of held-out pairs (`prefix_accuracy`)
    whole           the last of them: accuracy on whole responses
    concordance     candidate pairs ranked as their completions' win rates (`concordance`)
    gain            the same, weighted by the squared gap: by what there is to win
    ceiling         concordance of two halves of the completions: about the least that a perfect reward model has
    final           rank correlation of r(y_1:i) with the reward of the whole text by the same model, after 1, 2, ...
    gold            the same with the judge's reward; both within each prompt, on texts of the reference
    """
    ranked = concordance.ranking(model, siblings(lab), material(lab).lm)
    if is_language_model(model):
        return ranked
    accuracy = prefix_accuracy(model, material(lab).held_out, batch_size=lab.batch_size).accuracy
    texts, gold = _plain_texts(lab)
    scores = _prefix_scores(lab, model, texts)
    return {
        "accuracy": np.pad(accuracy, (0, lab.max_new_tokens), mode="edge")[: lab.max_new_tokens].tolist(),
        "whole": accuracy[-1].item(),
        **ranked,
        "final": _correlations(scores, scores[:, -1], lab.samples),
        "gold": _correlations(scores, np.array(gold), lab.samples),
    }


@cache
def _plain_texts(lab: Lab) -> tuple[list[dict], list[float]]:
    """Texts of the reference, and their rewards."""
    texts = generated(lab, material(lab).prompts, lab.samples, seed=CORRELATED + lab.seed)
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
