"""Experiments: one grid of cells, measured one by one and kept as they come.

A cell says what writes (a method with its settings, and the recipe of the model that it needs), or whose quality is
measured, and with which seed. What a cell needs is trained once, under a name that says how, and shared by all cells of
a folder. A grid that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
import signal
import statistics
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from scipy import stats
from scipy.special import logsumexp
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from pargs_min.baselines.ppo import PPOSettings, train_ppo
from pargs_min.codec import Codec, encode_prompt, end_tokens
from pargs_min.data import Pair, encode_preferences, encode_texts, split_by_prompt
from pargs_min.evaluation.judges import is_number
from pargs_min.evaluation.statistics import distinct_n, mean_and_error, prompt_means
from pargs_min.experiments.concordance import (
    Siblings,
    ceiling,
    exact_siblings,
    reward_model_concordance,
    rollout_siblings,
)
from pargs_min.experiments.judging import named_judge
from pargs_min.models import load_reward_model, save_reward_model
from pargs_min.records import read_preferences, read_prompts, read_responses
from pargs_min.reward_model import context_length, prefix_rewards
from pargs_min.scoring import model_rewards
from pargs_min.texts import generate_texts, text_log_probs
from pargs_min.train import prefix_accuracy, rate, train_reward_model, train_value_model
from pargs_min.world.journey import HELD_OUT_PROMPTS, HORIZON, OFF_GRAMMAR, TRAIN_PROMPTS, Journey
from pargs_min.world.reference import reference, write_pairs

Cell = dict[str, Any]  # what JSON can hold; see `measure`


@dataclass(frozen=True, eq=False)
class Lab:
    """What cells are measured on. All that is made stays in the folder."""

    folder: str
    model: str  # the reference: a folder or a hub id
    pairs: str  # preference pairs to train on, as for `pargs train`
    prompts: str  # to write for
    judge: str  # of whole texts, see `named_judge`
    held_out: str | None = None  # pairs to test reward models on; by default those of a tenth of the prompts
    world: dict | None = None  # arguments of the `Journey` that all this comes from, if it does
    max_new_tokens: int = 64
    samples: int = 16  # texts a prompt in every cell
    plain_samples: int = 64  # texts a prompt that the RLHF policy is reckoned from
    batch_size: int = 32  # texts decoded together
    pairs_per_step: int = 16
    epochs: float = 1.0
    learning_rate: float = 1e-5  # of reward models
    dpo_learning_rate: float = 1e-6
    ppo_learning_rate: float = 1e-5
    ppo_updates: int = 100
    append_eos: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "plain_samples", "batch_size", "pairs_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def embedded(
    folder: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    steps: int = 1500,
    pairs: int = 8000,
    held_out: int = 1000,
    **world,
) -> Lab:
    """The embedded world as a lab: its reference and its pairs, made now unless the folder has them.

    Args:
        quick: everything so small that nothing can be learned from it but that it runs.
        steps: of training the reference.
        pairs, held_out: how many to train on and to test on.
        world: arguments of `Journey`.
    """
    if quick:
        steps, pairs, held_out = 60, 200, 20
    journey = Journey(**world)
    lm, tokenizer = reference(folder / "reference", journey, seed=seed, steps=steps)
    for name, prompts, count in (("pairs", TRAIN_PROMPTS, pairs), ("held_out", HELD_OUT_PROMPTS, held_out)):
        if not (folder / f"{name}.jsonl").exists():
            write_pairs(folder / f"{name}.jsonl", lm, tokenizer, journey, pairs=count, seed=seed, prompts=prompts)
    asked = folder / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in HELD_OUT_PROMPTS))
    return Lab(
        folder=str(folder),
        model=str(folder / "reference"),
        pairs=str(folder / "pairs.jsonl"),
        held_out=str(folder / "held_out.jsonl"),
        prompts=str(asked),
        judge="toy",
        world={name: str(value) for name, value in world.items()},
        max_new_tokens=HORIZON,
        samples=2 if quick else 64,
        plain_samples=40 if quick else 4000,
        batch_size=16 if quick else 256,
        pairs_per_step=64,
        epochs=0.6 if quick else 3.2,
        learning_rate=1e-3,
        dpo_learning_rate=1e-4,
        ppo_learning_rate=3e-4,
        ppo_updates=2 if quick else 80,
    )


class Material(NamedTuple):
    """What a lab names, read into memory."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[dict]
    pairs: list[Pair]
    held_out: list[Pair]


@cache
def _material(frozen: str) -> Material:
    lab = Lab(**json.loads(frozen))
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    lm = AutoModelForCausalLM.from_pretrained(lab.model).to(device()).eval()
    encode = partial(encode_preferences, tokenizer=tokenizer, max_length=context_length(lm), append_eos=lab.append_eos)
    pairs, _ = encode(read_preferences(lab.pairs))
    if lab.held_out is None:
        pairs, held_out = split_by_prompt(pairs, 0.1)
    else:
        held_out, _ = encode(read_preferences(lab.held_out))
    return Material(lm, tokenizer, read_prompts(lab.prompts), pairs, held_out)


def material(lab: Lab) -> Material:
    """The material of a lab; read once a process."""
    return _material(json.dumps(asdict(lab)))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def judged(lab: Lab, texts: Sequence[dict]) -> list[float]:
    """The judge's reward of each text. Raises ValueError where it gives none."""
    judge = named_judge(lab.judge, Path(lab.folder) / "verdicts.jsonl")
    if judge.score is None:
        raise ValueError(f"judge {lab.judge} compares texts; give one that scores them one by one")
    answers = judge.score(texts)
    for text, answer in zip(texts, answers, strict=True):
        if not is_number(answer):
            raise ValueError(f"judge {lab.judge} answers {answer!r:.60} to {text['response']!r:.60}; expected a number")
    return [float(answer) for answer in answers]


# ---- what cells need ----


def model_name(recipe: dict, seed: int) -> str:
    """A folder name that says how a model was made.

    >>> model_name({"objective": "partial", "pairs": 500, "lengths": [1, 8]}, 3)
    'partial-pairs=500-lengths=1-8-seed=3'
    """
    parts = [f"{name}={value}" for name, value in recipe.items() if name != "objective" and value is not None]
    joined = "-".join([recipe["objective"], *parts, f"seed={seed}"])
    return re.sub(r"-+", "-", re.sub(r"[^\w.=-]+", "-", joined)).replace("=-", "=")


def ingredients(recipe: dict, seed: int) -> list[tuple[dict, int]]:
    """The models that a model is made from: values and PPO's rewards are those of a full-sequence reward model."""
    return [({"objective": "full"}, seed)] if recipe["objective"] in ("value", "ppo") else []


def make(lab: Lab, recipe: dict, seed: int) -> Path:
    """The folder of a model, trained now unless it is there.

    recipe, all but the first optional:
        objective   "partial", "full", "value": a reward model; "dpo", "ppo": a language model
        pairs       how many of the training pairs (by default all; not for value)
        head        "scalar" or "vocab"
        start       a model to start from (by default the reference), or {"family": ..., configuration}: random weights
        lengths     [first, last] prefix lengths to train on (partial), last None for no end
        beta        of the policy that DPO and PPO train for
    """
    folder = Path(lab.folder) / "models" / model_name(recipe, seed)
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")  # so that the folder, once there, is whole
        shutil.rmtree(unfinished, ignore_errors=True)
        train = {"dpo": _make_dpo, "ppo": _make_ppo}.get(recipe["objective"], _make_reward_model)
        train(lab, recipe, seed, unfinished)
        unfinished.rename(folder)
    return folder


def _make_reward_model(lab: Lab, recipe: dict, seed: int, folder: Path) -> None:
    set_seed(seed)
    pairs, objective = material(lab).pairs[: recipe.get("pairs")], recipe["objective"]
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    model = _start(recipe.get("start") or lab.model, tokenizer, recipe.get("head", "scalar"))
    items = _rated_texts(lab, recipe, seed) if objective == "value" else pairs
    args = arguments(folder, len(pairs), lab, seed, lab.learning_rate)
    settings = {} if objective == "value" else {"objective": objective}
    if objective == "partial":
        settings |= {"tail": "extend" if lab.append_eos else "min"}
        settings |= {"lengths": tuple(recipe["lengths"])} if recipe.get("lengths") else {}
    fit = train_value_model if objective == "value" else train_reward_model
    fit(model, tokenizer, items, args=args, **settings)
    recorded = {"objective": objective, "append_eos": lab.append_eos, "prompt_format": "text"}
    save_reward_model(model, tokenizer, folder, **recorded)


def arguments(folder: Path, pairs: int, lab: Lab, seed: int, learning_rate: float) -> TrainingArguments:
    """Trainer's arguments: the lab's epochs over so many pairs."""
    steps = max(1, round(lab.epochs * pairs / lab.pairs_per_step))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=lab.pairs_per_step,
        learning_rate=learning_rate,
        warmup_steps=steps // 20,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=device() == "cpu",
        dataloader_pin_memory=device() != "cpu",
    )


def _start(start: str | dict, tokenizer: PreTrainedTokenizerBase, head: str) -> PreTrainedModel:
    if isinstance(start, str):
        return load_reward_model(start, tokenizer, head=head)
    config = AutoConfig.for_model(start["family"], **{k: v for k, v in start.items() if k != "family"})
    config.update({"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id})
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return AutoModelForSequenceClassification.from_config(config)


def samples(lab: Lab) -> Path:
    """Texts of the reference that value models learn from: two for each pair, for the same prompts."""
    file = Path(lab.folder) / "samples.jsonl"
    if not file.exists():
        made = material(lab)
        prompts = [{"prompt_ids": list(ids)} for ids in dict.fromkeys(tuple(pair.prompt_ids) for pair in made.pairs)]
        settings = dict(method="plain", num_samples=math.ceil(2 * len(made.pairs) / len(prompts)), seed=10**6)
        settings |= dict(max_new_tokens=lab.max_new_tokens, batch_size=lab.batch_size)
        unfinished = file.with_suffix(".unfinished")
        with unfinished.open("w") as out:
            for record in generate_texts(made.lm, made.tokenizer, prompts, **settings):
                out.write(json.dumps(record) + "\n")
        unfinished.rename(file)
    return file


def _rated_texts(lab: Lab, recipe: dict, seed: int) -> list:
    made = material(lab)
    texts, _ = encode_texts(read_responses(samples(lab)), made.tokenizer, context_length(made.lm))
    rater = load_reward_model(make(lab, *ingredients(recipe, seed)[0])).to(device()).eval()
    return rate(texts, model_rewards(rater), batch_size=lab.batch_size, device=device())


def _make_dpo(lab: Lab, recipe: dict, seed: int, folder: Path) -> None:
    from pargs_min.baselines.dpo import train_dpo  # TRL is an extra

    set_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(lab.model), AutoModelForCausalLM.from_pretrained(lab.model)
    pairs = material(lab).pairs[: recipe.get("pairs")]
    args = arguments(folder, len(pairs), lab, seed, lab.dpo_learning_rate)
    train_dpo(model, tokenizer, pairs, beta=recipe["beta"], args=args)
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def _make_ppo(lab: Lab, recipe: dict, seed: int, folder: Path) -> None:
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    model = AutoModelForCausalLM.from_pretrained(lab.model).to(device())
    rater, critic = (load_reward_model(make(lab, *ingredients(recipe, seed)[0])).to(device()) for _ in range(2))
    settings = PPOSettings(
        beta=recipe["beta"],
        max_new_tokens=lab.max_new_tokens,
        updates=lab.ppo_updates,
        batch_size=2 * lab.pairs_per_step,
        minibatch_size=lab.pairs_per_step,
        learning_rate=lab.ppo_learning_rate,
        seed=seed,
    )
    prompts = [list(ids) for ids in dict.fromkeys(tuple(pair.prompt_ids) for pair in material(lab).pairs)]
    for _ in train_ppo(model, critic, model_rewards(rater.eval()), prompts, end_tokens(model, tokenizer), settings):
        pass
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def plain_rewards(lab: Lab) -> np.ndarray:
    """(prompts, N) rewards of texts of the reference that no cell shares: what the RLHF policy is reckoned from."""
    file = Path(lab.folder) / "plain_rewards.npy"
    if not file.exists():
        made = material(lab)
        settings = dict(num_samples=lab.plain_samples, max_new_tokens=lab.max_new_tokens, batch_size=lab.batch_size)
        texts = [*generate_texts(made.lm, made.tokenizer, made.prompts, method="plain", seed=2 * 10**6, **settings)]
        np.save(file, np.reshape(judged(lab, texts), (len(made.prompts), -1)))
    return np.load(file)


def siblings(lab: Lab) -> list[Siblings]:
    """Candidates after prefixes of the reference, and how often their completions win; exact in the embedded world."""
    file = Path(lab.folder) / "siblings.json"
    if not file.exists():
        made = material(lab)
        if lab.world is not None:
            world = Journey(**{name: Fraction(value) for name, value in lab.world.items()})
            found = exact_siblings(world, made.tokenizer, [p["prompt"] for p in made.prompts], texts=lab.samples)
        else:
            settings = dict(max_new_tokens=lab.max_new_tokens, batch_size=lab.batch_size)
            found = rollout_siblings(made.lm, made.tokenizer, made.prompts, partial(judged, lab), **settings)
        file.write_text(json.dumps([*found]))
    return [Siblings(*one) for one in json.loads(file.read_text())]


# ---- measuring one cell ----


def measure(lab: Lab, cell: Cell) -> dict:
    """All that is known of a cell.

    cell: seed, and
        method      one of `METHODS`, "dpo" or "ppo": texts are written for the lab's prompts and judged
        beta, top_k, n, particles    of the method
        recipe      of the reward model (`make`); final: of the one that smc weighs whole texts by
        quality     true: the reward model itself is measured

    Returns:
        of texts: reward, kl (nats), length (tokens), calls (passes of one row by any model, a text), seconds (a text),
        distinct2 (among a prompt's texts), off_grammar (embedded world), each a mean over prompts; by_prompt, rewards.
        of a reward model: see `quality`.
    """
    found = {}
    if cell.get("method"):
        found |= _text_measures(lab, cell, write(lab, cell))
    if cell.get("quality"):
        model = load_reward_model(make(lab, cell["recipe"], cell["seed"])).to(device()).eval()
        found |= quality(lab, model)
    return found


def write(lab: Lab, cell: Cell) -> list[dict]:
    """The texts of a cell, as records of `generate_texts`; their `kl` is to the lab's reference."""
    made, method, seed, models = material(lab), cell["method"], cell["seed"], {}
    lm, settings = made.lm, {name: cell[name] for name in ("beta", "top_k", "n", "particles") if name in cell}
    if method in ("dpo", "ppo"):
        folder = make(lab, {"objective": method, "beta": settings.pop("beta")}, seed)
        method, lm = "plain", AutoModelForCausalLM.from_pretrained(folder).to(device()).eval()
    for role, recipe in (("reward_model", cell.get("recipe")), ("final_reward_model", cell.get("final"))):
        if recipe and method != "plain":
            models[role] = load_reward_model(make(lab, recipe, seed)).to(device()).eval()
    settings |= dict(max_new_tokens=lab.max_new_tokens, num_samples=lab.samples, batch_size=lab.batch_size)
    texts = [*generate_texts(lm, made.tokenizer, made.prompts, method=method, seed=seed, **models, **settings)]
    if lm is not made.lm:
        by_reference = text_log_probs(made.lm, Codec.of(made.lm, made.tokenizer), texts, lab.batch_size)
        texts = [t | {"kl": t["ref_log_prob"] - other} for t, other in zip(texts, by_reference, strict=True)]
    return texts


def _text_measures(lab: Lab, cell: Cell, texts: list[dict]) -> dict:
    rewards, prompts = judged(lab, texts), [text["prompt_number"] for text in texts]

    def mean(values: Iterable[float]) -> float:
        return mean_and_error([*values], prompts)[0]

    groups: dict[int, list] = {}
    for text in texts:
        groups.setdefault(text["prompt_number"], []).append(text["response_ids"])
    found = {
        "reward": mean(rewards),
        "kl": mean(text["kl"] for text in texts),
        "length": mean(len(text["response_ids"]) for text in texts),
        "calls": mean(text["cost"]["model_calls"] for text in texts),
        "seconds": mean(text["cost"]["seconds"] for text in texts),
        "distinct2": statistics.fmean(distinct_n(group, 2) for group in groups.values()),
        "by_prompt": prompt_means(rewards, prompts).tolist(),
    }
    if lab.judge == "toy":
        found["off_grammar"] = mean(float(reward == OFF_GRAMMAR) for reward in rewards)
    gap = rlhf_gap(lab, cell, found)
    return found if gap is None else found | {"gap": gap}


def rlhf_gap(lab: Lab, cell: Cell, found: dict) -> float | None:
    """KL(pi || RLHF policy) in nats a text, for the RLHF policy of the judge's reward R at the cell's beta (T0):

        E_pi[log pi / pi_ref] - beta E_pi[R] + log Z,     Z = E_ref[exp(beta R)]

    with log Z by the lab's own samples of the reference. Divided by beta, it is by how much less the policy has of the
    objective E[R] - KL / beta than the best. None for policies without beta, or where Z rests on fewer than 500
    effective samples.
    """
    beta = cell.get("beta")
    if beta is None or cell["method"].endswith("-greedy"):
        return None
    log_weights = beta * plain_rewards(lab)
    total = logsumexp(log_weights, axis=1)
    effective = np.exp(2 * total - logsumexp(2 * log_weights, axis=1)).sum()
    if effective < min(500, log_weights.size / 4):
        return None
    log_z = float((total - math.log(log_weights.shape[1])).mean())
    return found["kl"] - beta * found["reward"] + log_z


@torch.no_grad()
def quality(lab: Lab, model: PreTrainedModel) -> dict:
    """What a reward model knows, measured on texts that it was not trained on.

    accuracy        pairs ordered as labelled, after 1, 2, ... tokens, of held-out pairs (`prefix_accuracy`)
    whole           the last of them: accuracy on whole responses
    concordance     siblings ordered as the win rates of their completions (`siblings.concordance`)
    gain            the same, each pair of siblings weighed by what there is to win
    final           rank correlation of r(y_1:i) with the reward of the whole text by the same model, after 1, 2, ...
    gold            the same with the judge's reward; both within each prompt, on texts of the reference
    """
    made = material(lab)
    accuracy = prefix_accuracy(model, made.held_out, batch_size=lab.batch_size).accuracy
    longest = min(len(accuracy), lab.max_new_tokens)
    found = {"accuracy": accuracy[:longest].tolist(), "whole": accuracy[-1].item()}
    known = siblings(lab)
    every_pair, by_gain = reward_model_concordance(model, known)
    found |= {"concordance": every_pair, "gain": by_gain, "ceiling": ceiling(known)}
    texts, gold = _plain_texts(json.dumps(asdict(lab)))
    scores = _prefix_scores(lab, model, texts)
    prompts = np.array([text["prompt_number"] for text in texts])
    found["final"] = _correlations(scores, scores[:, -1], prompts)
    found["gold"] = _correlations(scores, np.array(gold), prompts)
    return found


@cache
def _plain_texts(frozen: str) -> tuple[list[dict], list[float]]:
    """Texts of the reference, and their rewards."""
    lab = Lab(**json.loads(frozen))
    texts = write(lab, {"method": "plain", "seed": 3 * 10**6})
    return texts, judged(lab, texts)


def _prefix_scores(lab: Lab, model: PreTrainedModel, texts: list[dict]) -> np.ndarray:
    """(N, T) rewards after 1, 2, ... tokens; a text that has ended stays as it is."""
    rows = []
    for text in texts:
        prompt = encode_prompt(material(lab).tokenizer, text.get("prompt_ids", text.get("prompt")))
        ids = torch.tensor([prompt + text["response_ids"]], device=model.device)
        rewards = prefix_rewards(model, ids, torch.ones_like(ids))[0, len(prompt) :].double().cpu().numpy()
        rows.append(np.pad(rewards, (0, lab.max_new_tokens - len(rewards)), mode="edge"))
    return np.array(rows)


def _correlations(scores: np.ndarray, rewards: np.ndarray, prompts: np.ndarray) -> list[float]:
    """Spearman's, within each prompt, averaged over the prompts where there is anything to correlate."""
    return [
        _mean_known(
            stats.spearmanr(column[prompts == p], rewards[prompts == p]).statistic
            for p in np.unique(prompts)
            if np.ptp(column[prompts == p]) and np.ptp(rewards[prompts == p])
        )
        for column in scores.T
    ]


def _mean_known(values: Iterable[float]) -> float:
    values = [float(value) for value in values]
    return statistics.fmean(values) if values else math.nan


# ---- a grid of cells ----


def sweep(labs: dict[str, Lab], cells: Sequence[Cell], file: Path, processes: int = 2) -> list[dict]:
    """Measure every cell that the file does not hold yet, appending each as it comes; all records, in order of cells.

    A record is {"cell": ..., "found": ...}; a cell with `lab` is measured on the lab of that name, else on "".

    Raises:
        ValueError: if the file was made with other labs, or a cell needs what is not installed.
    """
    if any(cell.get("method") == "dpo" for cell in cells) and find_spec("trl") is None:
        raise ValueError("these cells train DPO, which is TRL's: pip install -e '.[baselines]' -c constraints.txt")
    done = _read(file, {name: asdict(lab) for name, lab in labs.items()})
    left = [cell for cell in cells if json.dumps(cell) not in done]
    stages: list[dict[str, tuple]] = [{}, {}]
    for cell in left:
        for recipe in (cell.get("recipe"), cell.get("final"), _tuned(cell)):
            for depth, (part, seed) in enumerate(_order(recipe, cell["seed"])):
                where = cell.get("lab", "")
                stages[depth][f"{where} {model_name(part, seed)}"] = labs[where], part, seed
    todo = [{n: j for n, j in stage.items() if not _made(*j)} for stage in stages]
    with workers(processes) as pool, file.open("a", encoding="utf-8") as out:
        total = len(left) + sum(map(len, todo))
        with transformers.utils.logging.tqdm(total=total, desc="models and cells", disable=None) as progress:
            try:
                _prepare(labs, left)
                for stage in todo:
                    for future in as_completed([pool.submit(make, *job) for job in stage.values()]):
                        future.result()
                        progress.update()
                futures = {pool.submit(measure, labs[cell.get("lab", "")], cell): cell for cell in left}
                for future in as_completed(futures):
                    record = {"cell": futures[future], "found": future.result()}
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    done[json.dumps(record["cell"])] = record
                    progress.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [done[json.dumps(cell)] for cell in cells]


def _order(recipe: dict | None, seed: int) -> Iterator[tuple[dict, int]]:
    """What has to be trained for a recipe, ingredients first; without ingredients it is of the first stage."""
    if recipe:
        yield from ingredients(recipe, seed)
        yield recipe, seed


def _tuned(cell: Cell) -> dict | None:
    return {"objective": cell["method"], "beta": cell["beta"]} if cell.get("method") in ("dpo", "ppo") else None


def _made(lab: Lab, recipe: dict, seed: int) -> bool:
    return (Path(lab.folder) / "models" / model_name(recipe, seed)).exists()


def _prepare(labs: dict[str, Lab], cells: Sequence[Cell]) -> None:
    """What several processes would otherwise make at once."""
    for name, lab in labs.items():
        mine = [cell for cell in cells if cell.get("lab", "") == name]
        if any((cell.get("recipe") or {}).get("objective") == "value" for cell in mine):
            samples(lab)
        if any(cell.get("method") for cell in mine):
            plain_rewards(lab)
        if any(cell.get("quality") for cell in mine):
            siblings(lab)


def _read(file: Path, labs: dict) -> dict[str, dict]:
    """The records of a file by their cells; the first line says which labs they are of."""
    head = json.dumps({"labs": labs})
    if not file.exists():
        file.write_text(head + "\n")
        return {}
    first, *lines = file.read_text("utf-8").split("\n")
    if first != head:
        raise ValueError(f"{file} was made with other settings: choose another --output-dir, or delete it")
    whole = [line for line in lines if line.endswith("}}")]
    file.write_text("\n".join([head, *whole]) + "\n")  # without the line that an interrupted run left
    records = [json.loads(line) for line in whole]
    return {json.dumps(record["cell"]): record for record in records}


def workers(processes: int) -> Executor:
    """Training and decoding share the cores; only the first process reports."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), quiet_worker)


def quiet_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it without a word; the first process says it
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def gather(records: Sequence[dict]) -> list[dict]:
    """One row a cell but for its seed: each number as {mean, error, low, high, seeds}, its values one a seed.

    The error is the standard error over seeds, low and high the ends of Student's 95 % interval; nan for one seed.
    Lists are averaged place by place. prompt_error is the standard error of the reward over prompts, seeds averaged.
    """
    rows: dict[str, list[dict]] = {}
    for record in records:
        same = {name: value for name, value in record["cell"].items() if name != "seed"}
        rows.setdefault(json.dumps(same), []).append(record["found"])
    return [json.loads(same) | _summary(found) for same, found in rows.items()]


def _summary(found: list[dict]) -> dict:
    summary: dict[str, Any] = {}
    for name, first in found[0].items():
        values = [one[name] for one in found if one.get(name) is not None]
        if isinstance(first, list):
            summary[name] = {"mean": np.mean(values, 0).tolist(), "seeds": values}
        else:
            summary[name] = interval(values)
    if "by_prompt" in summary:
        means = summary.pop("by_prompt")["mean"]
        summary["prompt_error"] = {"mean": mean_and_error(means, range(len(means)))[1], "error": math.nan}
    return summary


def interval(values: Sequence[float]) -> dict:
    """Mean, standard error and Student's 95 % interval of numbers that differ in their seed.

    >>> {name: round(value, 2) for name, value in interval([1.0, 3.0]).items() if name != "seeds"}
    {'mean': 2.0, 'error': 1.0, 'low': -10.71, 'high': 14.71}
    """
    mean, n = statistics.fmean(values), len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    half = error * float(stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan
    return {"mean": mean, "error": error, "low": mean - half, "high": mean + half, "seeds": list(values)}
