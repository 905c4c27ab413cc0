"""Does the same method control a style, a topic, a length?"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pargs_min import plots
from pargs_min.codec import Codec, is_ids
from pargs_min.data import records_form
from pargs_min.experiments.measure import Cell, guided
from pargs_min.experiments.report import BETAS, KL_LABEL, Row, curves, grouped, kl
from pargs_min.experiments.setup import Lab, judged, made_from
from pargs_min.models import load_tokenizer
from pargs_min.records import read_preferences
from pargs_min.store import content, kept, write_lines

COLUMNS = ("reward", "prompt_error", "rlhf", "kl", "length")
ATTRIBUTES = ("style", "topic", "brevity")  # of `pargs_min.world.attributes`


def labs(lab: Lab, quick: bool) -> dict[str, Lab]:
    """The same texts, labelled anew by the attribute, which is also the judge."""
    if lab.world is None:
        return {"": relabelled(lab, "attribute", lab.judge)}
    return {name: relabelled(lab, name, f"pargs_min.world.attributes:{name}") for name in ATTRIBUTES}


def relabelled(lab: Lab, name: str, judge: str) -> Lab:
    """A lab with the given one's pairs, labelled by this judge; half the epochs are enough without noisy labels."""
    folder = lab.file(name)
    changed: dict[str, Any] = dict(folder=str(folder), judge=judge, world=None, epochs=lab.epochs / 2)
    other = replace(lab, plain_samples=min(lab.plain_samples, 400), **changed)
    for kind in ("pairs", "held_out"):
        if source := getattr(lab, kind):
            known = {kind: content(source)} | made_from(other, "model", "judge")
            changed[kind] = str(kept(folder / f"{kind}.jsonl", known, partial(write_by_reward, other, source)))
    return replace(other, **changed)


def write_by_reward(lab: Lab, source: str, file: Path) -> None:
    write_lines(file, by_reward(lab, source))


def by_reward(lab: Lab, source: str) -> Iterator[dict]:
    """The pairs of a file, the response with more of the judge's reward chosen; ties are left out."""
    pairs = read_preferences(source)
    codec, texts = Codec(load_tokenizer(lab.model), records_form(pairs)), []
    for number, pair in enumerate(pairs):
        _, encoded = codec.encode(pair.prompt, pair[1:3], finished=lab.append_eos)
        for sample, (response, ids) in enumerate(zip(pair[1:3], encoded, strict=True)):
            text = dict(prompt=readable(codec, pair.prompt), prompt_number=number, sample=sample)
            texts.append(text | dict(response=readable(codec, response), response_ids=ids, finished=lab.append_eos))
    rewards = judged(lab, texts)
    for pair, first, second in zip(pairs, rewards[::2], rewards[1::2], strict=True):
        if first != second:
            chosen, rejected = (pair.chosen, pair.rejected) if first > second else (pair.rejected, pair.chosen)
            record = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
            yield {f"{name}_ids" if is_ids(value) else name: value for name, value in record.items()}


def readable(codec: Codec, value: Any) -> Any:
    return codec.text(value) if is_ids(value) else value


def cells(lab: Lab, seed: int) -> list[Cell]:
    found = []
    for name in ATTRIBUTES if lab.world else ("",):
        found += [Cell(seed, "plain", lab=name), *guided(seed, ("args", "pargs"), BETAS[:3], lab=name)]
    return found


def draw(rows: list[Row], labs: Sequence[Lab]) -> plots.Figure:
    attributes = grouped(rows, "lab")
    drawing, axes = plots.panels(len(attributes), (3.9 * max(len(attributes), 2), 3.8))
    for panel, (name, group) in zip(axes, attributes.items(), strict=True):
        curves(panel, group, kl, "reward")
        panel.set(xlabel=KL_LABEL, ylabel=name or labs[0].judge)
    axes[0].legend(frameon=False, fontsize=8)
    return drawing
