"""How long the jobs of an experiment will take on this machine, from a short measurement."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pargs_min.data import collate
from pargs_min.experiments import measure, recipes
from pargs_min.experiments.setup import Lab, generated, material
from pargs_min.models import default_device, load_reward_model, load_tokenizer, record
from pargs_min.reward_model import prefix_rewards

TOKENS = 6  # of the texts that are written to measure by
BACKWARD = 2  # times the price of reading forwards, through the layers that are trained
TEXTS = {"pairs": 2, "texts": 1, "guide": 1}  # that training reads for each of its examples


class Pace(NamedTuple):
    """Seconds that one process takes on a lab."""

    plain: float  # per text of the reference
    guided: float  # per text of a guided method, at one call per token
    read: float  # per text that a reward model reads


def pace(lab: Lab) -> Pace:
    """Measured with a new head on the lab's own model, by a few tokens of one batch of texts, and one of pairs."""
    made, device = material(lab), default_device()
    model = load_reward_model(lab.model, load_tokenizer(lab.model), head="scalar", device=device)
    record(model, objective="partial")
    prompts, tokens = made.prompts[: lab.batch_size], min(TOKENS, lab.max_new_tokens)
    many = max(1, min(lab.samples, lab.batch_size // len(prompts)))
    scale = lab.max_new_tokens / (tokens * len(prompts) * many)

    def text(**settings) -> float:
        return scale * _seconds(lambda: generated(lab, prompts, many, max_new_tokens=tokens, **settings))

    few = made.pairs[: lab.pairs_per_step]
    batch = collate(few, pad_id=0)
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        read = _seconds(lambda: prefix_rewards(model, ids, mask)) / len(ids)
    return Pace(text(), text(method="pargs", reward_model=model, beta=1.0), read)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def forecast(stages: Sequence[Sequence[tuple]], paces: dict[Lab, Pace], processes: int) -> float:
    """Seconds of all jobs, each a function, its lab and what else it takes, stage by stage in so many processes.

    >>> forecast([[(recipes.rated, "lab", 0)]], {}, 2)  # what no lab's pace is known for counts nothing
    0.0
    """
    total = 0.0
    for jobs in stages:
        seconds = [_job(paces[lab], make, lab, *rest) for make, lab, *rest in jobs if lab in paces]
        total += max(sum(seconds) / processes, max(seconds, default=0.0))
    return total


def _job(of: Pace, make: Callable, lab: Lab, *rest) -> float:
    made = material(lab)
    if make is measure.measure:
        (cell,) = rest
        rows = len(made.prompts) * lab.samples * (cell.n or cell.particles or 1)
        return rows * (of.guided if cell.writes.guided else of.plain) + (rows * of.read if cell.writes.rows else 0.0)
    if make is recipes.make:
        recipe, seed = rest
        how = recipe.training
        if recipes.folder(lab, recipe, seed).exists():
            return 0.0
        grouped = recipes.GROUP if recipe == recipes.SOFT_LABELS else TEXTS.get(how.source, 0)
        texts = how.steps * how.per_step * lab.epochs * len(made.pairs) * grouped
        different = 2 * len(made.pairs) if how.source == "pairs" else recipes.text_count(lab)
        trained = 1 - (recipes.shared_layers(lab, recipe) or 0) / made.lm.config.get_text_config().num_hidden_layers
        reads = texts * trained * (1 + BACKWARD) + min(texts, different) * (1 - trained)  # a frozen trunk reads once
        return of.read * reads * len(how.rates)
    written: dict[Callable, float] = {
        measure.plain_rewards: len(made.prompts) * lab.plain_samples * of.plain,
        recipes.samples: recipes.text_count(lab) * of.plain,
        recipes.rated: recipes.text_count(lab) * of.read,
    }
    return written.get(make, 0.0)


def told(seconds: float) -> str:
    """A length of time as one says it.

    >>> told(40), told(400), told(9000)
    ('about 1 minute', 'about 7 minutes', 'about 2 h 30 min')
    """
    minutes = max(1, math.ceil(seconds / 60))
    if minutes < 60:
        return f"about {minutes} minute{'s' * (minutes > 1)}"
    return f"about {minutes // 60} h {minutes % 60:02} min"
