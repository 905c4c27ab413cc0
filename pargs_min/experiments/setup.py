"""What experiments are made on: a reference model, its preference pairs, prompts and a judge.

All of it is named by one frozen `Lab`, which is also the key that what was read or computed is kept under.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.data import Pair, encode_preferences, records_form, split_by_prompt
from pargs_min.decode import Warp
from pargs_min.evaluation.judges import Judge, is_number, judge_code
from pargs_min.experiments.judging import named_judge
from pargs_min.models import default_device, load_language_model, load_tokenizer
from pargs_min.progress import progress
from pargs_min.records import Preference, read_preferences, read_prompts
from pargs_min.reward_model import context_length
from pargs_min.store import content, kept, once, write_lines
from pargs_min.texts import generate_texts
from pargs_min.world.journey import HELD_OUT_PROMPTS, HORIZON, TRAIN_PROMPTS, Journey
from pargs_min.world.reference import SHIPPED, STEPS, WORST_GAP, reference, write_pairs


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Settings that all experiments of a lab share, which `pargs study` has options for.

    Args:
        held_out: Pairs to test on. Default: those of a tenth of the prompts.
        max_new_tokens: Length limit of a response, in tokens.
        samples: Texts per prompt.
        plain_samples: Texts of the reference per prompt, from which the RLHF policy is estimated.
        batch_size: Texts decoded together.
        pairs_per_step: Pairs per training step.
        epochs: Passes over the pairs.
        learning_rate: Learning rate of reward models.
        dpo_learning_rate: Learning rate of DPO.
        ppo_learning_rate: Learning rate of PPO.
        ppo_updates: Batches of texts that PPO learns from.
        append_eos: Use --no-append-eos if responses were cut at a length limit.
        text_prompts: How many of the pairs' prompts get texts of the reference, to learn from. Default: all.
        texts_per_prompt: So many of them for each, an even number. Default: two for each pair.
        lora_rank: Train adapters of this rank and the head instead of all weights.
        shared_layers: Train guides above the lowest so many layers alone, which stay the reference's.
        ref_temperature: How the reference is sampled, as for `pargs generate`.
        ref_top_k: As for `pargs generate`.
        ref_top_p: As for `pargs generate`.
        ref_min_p: As for `pargs generate`.
        second_judge: Scores texts as well, as --judge does.
    """

    held_out: str | None = None
    max_new_tokens: int = 64
    samples: int = 16
    plain_samples: int = 64
    batch_size: int = 32
    pairs_per_step: int = 16
    epochs: float = 1.0
    learning_rate: float = 1e-5
    dpo_learning_rate: float = 1e-6
    ppo_learning_rate: float = 1e-5
    ppo_updates: int = 100
    append_eos: bool = True
    text_prompts: int | None = None
    texts_per_prompt: int | None = None
    lora_rank: int | None = None
    shared_layers: int | None = None
    ref_temperature: float = 1.0
    ref_top_k: int = 0
    ref_top_p: float = 1.0
    ref_min_p: float = 0.0
    second_judge: str | None = None


@dataclass(frozen=True, kw_only=True)
class Lab(Sizes):
    """What experiments are made on, and the settings that they share; everything made stays in the folder.

    Args:
        model: the reference: a folder or a hub id.
        pairs: preference pairs to train on, as for `pargs train`.
        prompts: to generate for.
        judge: of whole texts, see `named_judge`.
        world: the embedded world that all this comes from, if it does.
        seed: of that world.

    Raises:
        ValueError: if a count is below 1, or texts_per_prompt is odd.
    """

    folder: str
    model: str
    pairs: str
    prompts: str
    judge: str
    world: Journey | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "samples", "plain_samples", "batch_size", "pairs_per_step", "text_prompts")
        for name in (*counts, "texts_per_prompt"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if (self.texts_per_prompt or 0) % 2:
            raise ValueError(f"texts_per_prompt must be even, got {self.texts_per_prompt}")

    def file(self, name: str) -> Path:
        """A file of the lab's folder."""
        return Path(self.folder) / name

    @property
    def warp(self) -> Warp:
        """How its reference is sampled."""
        return Warp(self.ref_temperature, self.ref_top_k, self.ref_top_p, self.ref_min_p)


def embedded(
    folder: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    steps: int = STEPS,
    pairs: int = 8000,
    held_out: int = 1000,
    world: Journey | None = None,
) -> Lab:
    """The embedded world as a lab: its reference and its pairs, made now unless the folder has them.

    The reference of the default arguments is shipped with the package, and copied.

    Args:
        quick: make everything so small that it shows only that it runs.
        seed: of the reference and the pairs.
        steps: training steps of the reference; with fewer than by default it is an early one, however far from the
            grammar.
        pairs, held_out: how many to train on and to test on.
    """
    sizes: dict[str, Any] = dict(samples=512, plain_samples=4000, epochs=3.2, ppo_updates=80)
    if quick:
        steps, pairs, held_out = 60, 200, 20
        sizes = dict(samples=2, plain_samples=40, epochs=0.6, ppo_updates=2)
    home, world = folder / "reference", world or Journey()
    if (seed, steps, world) == (0, STEPS, Journey()):
        once(home, partial(shutil.copytree, SHIPPED))
    worst = WORST_GAP if steps >= STEPS else math.inf
    lm, tokenizer = reference(home, world, seed=seed, steps=steps, worst_gap=worst)
    files = {name: folder / f"{name}.jsonl" for name in ("pairs", "held_out", "prompts")}
    for name, prompts, count in (("pairs", TRAIN_PROMPTS, pairs), ("held_out", HELD_OUT_PROMPTS, held_out)):
        settings: dict[str, Any] = dict(pairs=count, seed=seed, prompts=prompts)
        source = settings | {"reference": content(home), "world": as_json(world)}
        kept(files[name], source, partial(write_pairs, model=lm, tokenizer=tokenizer, world=world, **settings))
    asked = [{"prompt": prompt} for prompt in HELD_OUT_PROMPTS]
    kept(files["prompts"], {"prompts": asked}, partial(write_lines, records=asked))
    names = {name: str(path) for name, path in {"folder": folder, "model": home, **files}.items()}
    sizes["texts_per_prompt"] = 2 * (4 * pairs // len(TRAIN_PROMPTS)) or None  # eight for each pair
    sizes |= names | dict(learning_rate=1e-3, dpo_learning_rate=1e-4, ppo_learning_rate=3e-4)
    sizes |= dict(pairs_per_step=64, batch_size=256)
    # The world goes without the tables that it has built: labs travel to other processes.
    return Lab(**sizes, judge="toy", world=replace(world), seed=seed, max_new_tokens=HORIZON)


def numbered(folder: Path, quick: bool, seed: int) -> Lab:
    """The embedded world of a seed: reference, pairs and all that is made of them, in a folder that studies share."""
    return embedded(folder / f"world-{seed}", quick=quick, seed=seed)


class Material(NamedTuple):
    """What a lab names, read into memory."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[dict]
    pairs: list[Pair]
    held_out: list[Pair]
    form: str  # of the pairs' prompts, in which all prompts are read


@cache
def material(lab: Lab) -> Material:
    """The material of a lab, read once per process."""
    tokenizer = load_tokenizer(lab.model)
    lm = load_language_model(lab.model, device=default_device())

    def encoded(preferences: list[Preference]) -> list[Pair]:
        return encode_preferences(preferences, tokenizer, context_length(lm), lab.append_eos)[0]

    preferences = read_preferences(lab.pairs)
    pairs = encoded(preferences)
    held_out = encoded(read_preferences(lab.held_out)) if lab.held_out else []
    pairs, held_out = (pairs, held_out) if held_out else split_by_prompt(pairs, 0.1)
    return Material(lm, tokenizer, read_prompts(lab.prompts), pairs, held_out, records_form(preferences))


@cache
def contents(lab: Lab) -> dict[str, str]:
    """What tells apart the contents of what a lab names, read once per process."""
    named = {name: getattr(lab, name) for name in ("model", "pairs", "held_out", "prompts", "judge", "second_judge")}
    found = {name: content(file) for name, file in named.items() if file}
    code = {name: judge_code(named[name]) for name in ("judge", "second_judge") if named[name]}
    return found | {name: f"{named[name]} {content(file)}" for name, file in code.items() if file}


# Settings of a lab that what it makes depends on.
MAKING = {"append_eos", "max_new_tokens", "pairs_per_step", "epochs", "learning_rate", "dpo_learning_rate"}
MAKING |= {"ppo_learning_rate", "ppo_updates", "text_prompts", "texts_per_prompt", "lora_rank", "shared_layers", "warp"}


def made_from(lab: Lab, *files: str, **settings: object) -> dict[str, object]:
    """What something of a lab is made from, for `store.kept`: these files, by content, and settings."""
    return (
        {name: contents(lab).get(name) for name in files}
        | {name: as_json(getattr(lab, name)) for name in sorted(MAKING)}
        | settings
    )


def generated(lab: Lab, prompts: list[dict], num_samples: int, **settings) -> list[dict]:
    """Texts of the lab's length; those of the reference, unless settings name another model or method."""
    made = material(lab)
    limits = dict(num_samples=num_samples, max_new_tokens=lab.max_new_tokens, batch_size=lab.batch_size)
    limits |= {f"ref_{name}": value for name, value in vars(lab.warp).items()}
    settings = {"lm": made.lm, "tokenizer": made.tokenizer, "method": "plain"} | limits | settings
    settings |= {"prompt_format": made.form}
    total = len(prompts) * num_samples
    return [*progress(generate_texts(prompts=prompts, **settings), desc=f"{settings['method']} texts", total=total)]


@cache
def judge_of(lab: Lab, name: str) -> Judge:
    """The judge of that name, loaded once per process. Raises ValueError if it cannot be, or only compares texts."""
    judge = named_judge(name, lab.file("verdicts.jsonl"))
    if judge.score is None:
        raise ValueError(f"judge {name} compares texts; give one that scores them one by one")
    return judge


def load_judges(lab: Lab) -> None:
    """Load the lab's judges now, not when all models are trained. Raises ValueError as `judge_of`."""
    for name in filter(None, (lab.judge, lab.second_judge)):
        judge_of(lab, name)


def judged(lab: Lab, texts: Sequence[dict], judge: str | None = None) -> list[float]:
    """The reward of each text by the lab's judge, or another one.

    Raises:
        ValueError: if it gives none; and as `judge_of`.
    """
    name = judge or lab.judge
    score = judge_of(lab, name).score
    assert score is not None
    answers = score(texts)
    for text, answer in zip(texts, answers, strict=True):
        if not is_number(answer):
            raise ValueError(f"judge {name} answers {answer!r:.60} to {text['response']!r:.60}; expected a number")
    return [float(answer) for answer in answers]


def as_json(value: Any) -> Any:
    """The value as JSON holds it: dataclasses as objects without what is None, nan as null.

    >>> as_json({"a": (float("nan"), 1.0)})
    {'a': [None, 1.0]}
    """
    return json.loads(json.dumps(value, default=_plain), parse_constant=lambda name: None)


def _plain(value: Any) -> Any:
    if not is_dataclass(value) or isinstance(value, type):
        return str(value)
    return asdict(value, dict_factory=lambda items: {name: inner for name, inner in items if inner is not None})
