"""Files of texts, of any methods over the same prompts, beside each other: one row a file, every number with its error.

read_files -> compare -> write_comparison, markdown, panels
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from pargs_min.evaluation.judges import Judge, is_number
from pargs_min.evaluation.statistics import (
    bootstrap_interval,
    count_outcomes,
    distinct_n,
    mean_and_error,
    outcome,
    wilson,
)
from pargs_min.records import read_texts

Files = Mapping[str, list[dict]]  # label -> records of `pargs generate`


class Comparison(NamedTuple):
    """One row a file; every answer of every judge, as it came; and what a reader of the rows must know."""

    rows: list[dict]
    answers: list[dict]
    notes: list[str]


def file_labels(paths: Sequence[str | os.PathLike]) -> dict[Path, str]:
    """What to call each file: its name without its ending, or its whole path where two names are equal.

    >>> file_labels(["runs/plain.jsonl", "a/pargs.jsonl", "b/pargs.jsonl"])[Path("a/pargs.jsonl")]
    'a/pargs.jsonl'
    """
    paths = list(dict.fromkeys(map(Path, paths)))
    names = [path.stem for path in paths]
    return {path: path.stem if names.count(path.stem) == 1 else str(path) for path in paths}


def read_files(labels: Mapping[Path, str]) -> dict[str, list[dict]]:
    """The texts of each file, by its label.

    Raises:
        ValueError: as `read_texts`, or if the files' prompts differ, naming them.
    """
    files = {label: read_texts(path) for path, label in labels.items()}
    check_same_prompts(files)
    return files


def check_same_prompts(files: Files) -> None:
    """Check that all files have the prompts of the first.

    Raises:
        ValueError: naming the file and the prompts that differ.
    """
    prompts = {
        label: {text["prompt_number"]: text["prompt"] or text.get("prompt_ids") for text in texts}
        for label, texts in files.items()
    }
    first, *others = prompts
    for label in others:
        here, there = prompts[label], prompts[first]
        differ = [
            f"number {n} ({f'{here[n]!r:.60}' if n in here else 'missing'}, not "
            f"{f'{there[n]!r:.60}' if n in there else 'missing'})"
            for n in sorted(here.keys() | there.keys())
            if n not in here or n not in there or here[n] != there[n]
        ]
        if differ:
            raise ValueError(
                f"{label} and {first} differ in {len(differ)} prompts: {'; '.join(differ[:3])}; compare files that "
                "were generated, to the end, from the same prompts"
            )


def compare(files: Files, judges: Sequence[Judge] = (), against: str | None = None) -> Comparison:
    """Judge and measure each file.

    Args:
        against: the file that the others are compared with text by text: the same sample of the same prompt.

    Returns:
        rows: file, method, prompts, texts, `judges` (by name: reward, win_rate, out_of_format), and the measures below.
            Each measure is {mean, error, low, high}, the error over prompts and the bootstrap interval of 95%, or None
            where the records do not have it; error, low and high are None for a single prompt.

            kl              nats a text from the model that the file `against` (or the first) was written by
            distinct_1, _2  `distinct_n` among a prompt's samples, of as many as the poorest prompt of all files has
            rouge_l         ROUGE-L F among a prompt's samples, pair by pair: the smaller, the more diverse
            length          tokens a text, its end token included
            finished        share of texts that ended by themselves
            seconds, calls  cost a text (`cost` of the records: seconds, model_calls)
            ...             the judges' further measures

    Raises:
        ValueError: if `against` is not among the files, or a judge that compares texts is given without it.
    """
    if against is not None and against not in files:
        raise ValueError(f"against must be one of {', '.join(files)}, got {against!r}")
    answers, outcomes = {}, {}
    for judge in judges:
        answers[judge.name], outcomes[judge.name] = _judge(judge, files, against)
    samples = min(len(texts) for group in files.values() for texts in _by_prompt(group).values())
    notes = [*_notes(files, judges, against, samples)]
    rows = []
    for label, texts in files.items():
        row = {
            "file": label,
            "method": ", ".join(dict.fromkeys(str(text.get("method", "")) for text in texts)),
            "prompts": len(_by_prompt(texts)),
            "texts": len(texts),
            "judges": {
                judge.name: _summary(judge, texts, answers[judge.name][label], outcomes[judge.name][label])
                for judge in judges
            },
            "kl_is_bound": any(text.get("method") in KL_BOUNDS for text in texts),
        }
        row |= {name: _mean(texts, measure) for name, measure in MEASURES.items()}
        if _model(texts) != _model(files[against or next(iter(files))]):
            row["kl"] = None
        for n in (1, 2):
            row[f"distinct_{n}"] = _among_samples(texts, lambda group, n=n: distinct(group[:samples], n))
        row["rouge_l"] = _among_samples(texts, rouge_l)
        for judge in judges:
            for name, measure in judge.measures.items():
                row[name] = _estimate([measure(answer) for answer in answers[judge.name][label]], _groups(texts))
        rows.append(row)
    kept = [
        {"file": label, "prompt_number": text["prompt_number"], "sample": text["sample"]}
        | {name: answers[name][label][i] for name in answers}
        for label, texts in files.items()
        for i, text in enumerate(texts)
    ]
    return Comparison(rows, kept, notes)


KL_BOUNDS = {  # methods whose `kl` is an upper bound in the mean, and what it is
    "best-of-n": "log n - (n - 1)/n more than that of its samples",
    "smc": "what all its particles tell, not the text alone",
}
MEASURES: dict[str, Callable[[dict], float | None]] = {
    "kl": lambda text: text.get("kl"),
    "length": lambda text: len(text["response_ids"]),
    "finished": lambda text: text.get("finished"),
    "seconds": lambda text: text.get("cost", {}).get("seconds"),
    "model_calls": lambda text: text.get("cost", {}).get("model_calls"),
}


def _judge(judge: Judge, files: Files, against: str | None) -> tuple[dict[str, list], dict[str, list]]:
    """(answers, outcomes) of each file, one a text: what the judge said, and who won against the text's partner.

    An outcome is None where a text has no partner, or one of the two has no number.
    """
    pairs = {label: _partners(texts, files[against]) if against else [] for label, texts in files.items()}
    pairs |= {against: []}
    if judge.score:
        answers = {label: judge.score(texts) for label, texts in files.items()}
        won = {label: [_outcome(answers[label][i], answers[against][j]) for i, j in pairs[label]] for label in files}
    elif against is None:
        raise ValueError(f"judge {judge.name} compares texts: say with which (--against FILE)")
    else:
        answers = None
        won = {
            label: judge.compare([texts[i] for i, _ in pairs[label]], [files[against][j] for _, j in pairs[label]])
            for label, texts in files.items()
        }
    outcomes = {label: _at([i for i, _ in pairs[label]], won[label], len(texts)) for label, texts in files.items()}
    return answers or outcomes, outcomes


def _partners(ours: list[dict], theirs: list[dict]) -> list[tuple[int, int]]:
    """Places of the texts that are the same sample of the same prompt."""
    place = {_key(text): j for j, text in enumerate(theirs)}
    return [(i, place[_key(text)]) for i, text in enumerate(ours) if _key(text) in place]


def _outcome(ours: object, theirs: object) -> float | None:
    return outcome(ours, theirs) if is_number(ours) and is_number(theirs) else None


def _at(places: list[int], values: list, length: int) -> list:
    row = [None] * length
    for i, value in zip(places, values, strict=True):
        row[i] = value
    return row


def _summary(judge: Judge, texts: list[dict], answers: list, outcomes: list) -> dict:
    answered = answers if judge.score else [answer for answer in answers if answer is not None]
    scores = [(a, text["prompt_number"]) for a, text in zip(answers, texts, strict=True) if is_number(a)]
    rate = [(o, text["prompt_number"]) for o, text in zip(outcomes, texts, strict=True) if is_number(o)]
    return {
        "reward": _estimate(*zip(*scores, strict=True)) if judge.score and scores else None,
        "win_rate": _win_rate(*map(list, zip(*rate, strict=True))) if rate else None,
        "out_of_format": sum(not is_number(answer) for answer in answered),
    }


def _win_rate(outcomes: list[float], groups: list[int]) -> dict:
    """Wilson's interval is for one pair a prompt; several of one prompt resemble each other, so prompts are drawn."""
    rate, prompts = count_outcomes(outcomes)._asdict(), len(set(groups))
    mean, error = mean_and_error(outcomes, groups)
    if 1 < prompts < len(groups):
        low, high = bootstrap_interval(outcomes, groups)
        low, high = (low, high) if low < high else wilson(mean * prompts, prompts)  # no two prompts differ
        rate |= {"rate": mean, "low": low, "high": high}
    elif prompts < len(groups):
        rate |= {"low": None, "high": None}
    return rate | {"error_over_prompts": _known(error)}


def _mean(texts: list[dict], measure: Callable[[dict], float | None]) -> dict | None:
    values = [measure(text) for text in texts]
    return None if None in values else _estimate(values, _groups(texts))


def _among_samples(texts: list[dict], measure: Callable[[list[dict]], float]) -> dict | None:
    values = {number: measure(group) for number, group in _by_prompt(texts).items()}
    values = {number: value for number, value in values.items() if not math.isnan(value)}
    return _estimate([*values.values()], [*values]) if values else None


def _estimate(values: Sequence[float], groups: Sequence[int]) -> dict:
    numbers = (*mean_and_error(values, groups), *bootstrap_interval(values, groups))
    return dict(zip(("mean", "error", "low", "high"), map(_known, numbers), strict=True))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def distinct(texts: list[dict], n: int) -> float:
    """`distinct_n` of the token ids of some texts."""
    return distinct_n([text["response_ids"] for text in texts], n)


def rouge_l(texts: list[dict]) -> float:
    """Mean ROUGE-L F of all pairs of texts; nan for a single text, or without the extra `metrics`.

    rouge-score's own tokeniser reads letters a-z and digits only: nothing can be said of texts without any.

    Source: Lin (2004), ROUGE; the diversity of arXiv 2406.07780.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return math.nan
    score = RougeScorer(["rougeL"]).score
    pairs = [score(a["response"], b["response"])["rougeL"].fmeasure for a, b in combinations(texts, 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan


def _notes(files: Files, judges: Sequence[Judge], against: str | None, samples: int) -> Iterator[str]:
    for judge in judges:
        guided = [label for label, texts in files.items() if any(_guided_by(text, judge.name) for text in texts)]
        if guided:
            yield (
                f"the judge {judge.name} guided {', '.join(guided)}: its reward says how well it was optimised, not "
                "how good the texts are; add a judge that no method has seen"
            )
    reference = against or next(iter(files))
    for label, texts in files.items():
        if _model(texts) != _model(files[reference]):
            yield (
                f"{label} was written by {_model(texts)}, {reference} by {_model(files[reference])}: its KL, to its "
                "own model, is left out (--reference MODEL takes all to one)"
            )
    counts = {len(group) for texts in files.values() for group in _by_prompt(texts).values()}
    if len(counts) > 1:
        yield f"the prompts have {min(counts)} to {max(counts)} samples: distinct-n is over {samples} of each"
    for method, bound in KL_BOUNDS.items():
        if any(text.get("method") == method for texts in files.values() for text in texts):
            yield f"the KL of {method} is an upper bound: {bound}"


def _guided_by(text: dict, judge: str) -> bool:
    settings = text.get("settings", {})
    models = [settings.get(role) for role in ("reward_model", "final_reward_model")]
    same = (os.path.realpath(model) == os.path.realpath(judge) for model in models if model is not None)
    return text.get("method") != "plain" and any(same)


def with_kl_to(reference: str, texts: list[dict], ref_log_probs: Sequence[float]) -> list[dict]:
    """The texts with their `kl` to another model than the one that wrote them.

        log pi(y) - log pi_ref(y) = kl + log pi_writer(y) - log pi_ref(y)

    where pi_writer is the language model that a method guided, of which the records have `kl` and `ref_log_prob`.

    Args:
        reference: its name, for the table.
        ref_log_probs: log pi_ref of each response, in nats, see `lab.text_log_probs`.

    >>> text = {"kl": 0.5, "ref_log_prob": -3.0, "settings": {"model": "tuned"}}
    >>> with_kl_to("base", [text], [-4.0])[0]["kl"]
    1.5
    """
    moved = []
    for text, ref_log_prob in zip(texts, ref_log_probs, strict=True):
        kl = text["kl"] + text["ref_log_prob"] - ref_log_prob
        moved.append(text | {"kl": kl, "settings": text.get("settings", {}) | {"model": reference}})
    return moved


def _model(texts: list[dict]) -> str | None:
    """Which language model the texts' `kl` is to."""
    return texts[0].get("settings", {}).get("model")


def _key(text: dict) -> tuple[int, int]:
    return text["prompt_number"], text["sample"]


def _groups(texts: list[dict]) -> list[int]:
    return [text["prompt_number"] for text in texts]


def _by_prompt(texts: list[dict]) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for text in texts:
        groups.setdefault(text["prompt_number"], []).append(text)
    return groups
