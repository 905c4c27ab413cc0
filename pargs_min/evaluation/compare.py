"""Files of texts, by any methods for the same prompts, beside each other: one row per file, each number with its error.

read_files -> compare -> write_comparison, markdown, panels
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from pargs_min.evaluation.judges import Judge, is_number
from pargs_min.evaluation.statistics import distinct_n, estimate, outcome, win_rate
from pargs_min.methods import BOUNDED, METHODS
from pargs_min.records import has_ids, read_texts
from pargs_min.store import content

NOTES = json.loads(Path(__file__).with_name("notes.json").read_text("utf-8"))  # templates of what a reader must know
Files = Mapping[str, list[dict]]  # label -> records of `pargs generate`
# What a judge says of each text of a file: its answers, and 1 (won), 0.5 or 0 (lost) against the text's partner.
Verdicts = tuple[list, list]


class Comparison(NamedTuple):
    """One row per file; every answer of every judge, as it came; and what a reader of the rows must know."""

    rows: list[dict]
    answers: list[dict]
    notes: list[str]


def file_labels(paths: Sequence[str | os.PathLike]) -> dict[Path, str]:
    """What to call each file: its name without the suffix, or its whole path where two names are equal; no two alike. A
    file that is named twice, in whatever way, is one.

    >>> file_labels(["runs/plain.jsonl", "a/pargs.jsonl", "b/pargs.jsonl"])[Path("a/pargs.jsonl")]
    'a/pargs.jsonl'
    """
    named: dict[str, Path] = {}
    for path in paths:
        named.setdefault(os.path.realpath(path), Path(path))
    files = [*named.values()]
    names = Counter(file.stem for file in files)
    labels: dict[Path, str] = {}
    for file in files:
        label = os.fsencode(file.stem if names[file.stem] == 1 else file).decode(errors="backslashreplace")
        while label in labels.values():
            label += " (2)"
        labels[file] = label
    return labels


def read_files(labels: Mapping[Path, str]) -> dict[str, list[dict]]:
    """The texts of each file, by its label.

    Raises:
        ValueError: as `read_texts`; if a file's prompts are not those of the first, naming the prompts that differ, or
            were read in another form.
    """
    files = {label: read_texts(path) for path, label in labels.items()}
    (first, there), *others = ((label, _prompts(texts)) for label, texts in files.items())
    for label, here in others:
        if differ := sorted({number for number, _ in here.items() ^ there.items()}):
            pairs = [(n, here.get(n, "missing"), there.get(n, "missing")) for n in differ[:3]]
            shown = "; ".join(f"number {n} ({mine:.60}, not {other:.60})" for n, mine, other in pairs)
            raise ValueError(
                f"{label} and {first} differ in {len(differ)} prompts: {shown}; compare files that were generated, to "
                "the end, from the same prompts"
            )
    said = ((label, text.get("prompt_format")) for label, texts in files.items() for text in texts)
    if len(forms := {form: label for label, form in said if form}) > 1:
        shown = ", ".join(f"{form} in {label}" for form, label in forms.items())
        raise ValueError(f"the prompts were read in different forms ({shown}): generate with one --prompt-format")
    return files


def compare(files: Files, judges: Sequence[Judge] = (), against: str | None = None) -> Comparison:
    """Judge and measure each file.

    Args:
        against: the file that the others are compared with text by text: the same sample for the same prompt.

    Returns:
        rows: file, method, prompts, texts, `judges` (by name: reward, win_rate, out_of_format), kl_is_bound, and the
            measures below. Each is {mean, error, low, high} over prompts, see `estimate`, or None where the records do
            not have it.

            kl              nats per text from the model that the file `against` (or the first) was written by
            distinct_1, _2  `distinct_n` among a prompt's samples, of as many as the poorest prompt of all files has
            rouge_l         ROUGE-L F among a prompt's samples, pair by pair: the smaller, the more diverse
            length          tokens per text, its end token included
            finished        share of texts that ended by themselves
            ...             the judges' further measures
            seconds, model_calls    per text, from the `cost` of the records

    Raises:
        ValueError: if `against` is not among the files, or a judge that compares texts is given without it.
    """
    if against is not None and against not in files:
        raise ValueError(f"against must be one of {', '.join(files)}, got {against!r}")
    judged = [(judge, _judge(judge, files, against)) for judge in judges]
    samples = {len(group) for texts in files.values() for group in _by_prompt(texts)}
    reference = against or next(iter(files))
    rows, answers = [], []
    for label, texts in files.items():
        verdicts = [(judge, by_file[label]) for judge, by_file in judged]
        row = {"file": label} | _row(texts, verdicts, min(samples))
        rows.append(row if [*_models(texts)] == [*_models(files[reference])][:1] else row | {"kl": None})
        for i, text in enumerate(texts):
            said = {judge.name: mine[i] for judge, (mine, _) in verdicts}
            answers.append({"file": label, "prompt_number": text["prompt_number"], "sample": text["sample"]} | said)
    return Comparison(rows, answers, [*_notes(files, judges, reference, samples)])


def _judge(judge: Judge, files: Files, against: str | None) -> dict[str, Verdicts]:
    """The verdicts on the texts of each file.

    A text has no outcome (None) where it has no partner, or one of the two no number. For a judge that compares, the
    answer is the outcome, or whatever it said in its place.
    """
    if judge.compare and against is None:
        raise ValueError(f"judge {judge.name} compares texts: say with which (--against FILE)")
    texts = {label: {(text["prompt_number"], text["sample"]): text for text in mine} for label, mine in files.items()}
    scores = {label: dict(zip(texts[label], judge.score(files[label]), strict=True)) for label in files if judge.score}
    partners, verdicts = texts[against] if against else {}, {}
    for label, ours in texts.items():
        paired = [key for key in ours if label != against and key in partners]
        if judge.compare:
            said = judge.compare([ours[key] for key in paired], [partners[key] for key in paired])
            answers = won = dict(zip(paired, said, strict=True))
        else:
            answers = scores[label]
            pairs = {key: (answers[key], scores[against or label][key]) for key in paired}
            won = {key: outcome(*pair) for key, pair in pairs.items() if all(map(is_number, pair))}
        verdicts[label] = [*map(answers.get, ours)], [*map(won.get, ours)]
    return verdicts


def _row(texts: list[dict], judged: Sequence[tuple[Judge, Verdicts]], samples: int) -> dict:
    """What is said and measured of the texts of a file, in the order of the table's columns."""
    prompts, groups = [text["prompt_number"] for text in texts], _by_prompt(texts)

    def mean(measure: Callable[[dict], Any]) -> dict | None:
        values = [measure(text) for text in texts]
        return None if None in values else estimate(values, prompts)

    def among_samples(measure: Callable[[list[dict]], float]) -> dict | None:
        return _of_numbers(estimate, map(measure, groups), range(len(groups)))

    return {
        "method": ", ".join(dict.fromkeys(str(text.get("method", "")) for text in texts)),
        "prompts": len(groups),
        "texts": len(texts),
        "judges": {
            judge.name: {
                "reward": _of_numbers(estimate, answers, prompts) if judge.score else None,
                "win_rate": _of_numbers(win_rate, outcomes, prompts),
                "out_of_format": sum(not is_number(answer) for answer in answers if judge.score or answer is not None),
            }
            for judge, (answers, outcomes) in judged
        },
        "kl_is_bound": any(text.get("method") in BOUNDED for text in texts),
        "kl": mean(lambda text: text.get("kl")),
        "distinct_1": among_samples(lambda group: distinct(group[:samples], 1)),
        "distinct_2": among_samples(lambda group: distinct(group[:samples], 2)),
        "rouge_l": among_samples(rouge_l),
        "length": mean(lambda text: len(text["response_ids"]) if has_ids(text) else None),
        "finished": mean(lambda text: text.get("finished")),
        **{
            name: estimate([measure(answer) for answer in answers], prompts)
            for judge, (answers, _) in judged
            for name, measure in judge.measures.items()
        },
        "seconds": mean(lambda text: text.get("cost", {}).get("seconds")),
        "model_calls": mean(lambda text: text.get("cost", {}).get("model_calls")),
    }


def _of_numbers(statistic: Callable[..., dict], values: Iterable, prompts: Iterable[int]) -> dict | None:
    """`estimate` or `win_rate` of those values that are numbers; None where none is."""
    known = [pair for pair in zip(values, prompts, strict=True) if is_number(pair[0])]
    return statistic(*zip(*known, strict=True)) if known else None


def distinct(texts: list[dict], n: int) -> float:
    """`distinct_n` of the token ids of some texts; nan where one has none."""
    return distinct_n([text["response_ids"] for text in texts], n) if all(map(has_ids, texts)) else math.nan


def rouge_l(texts: list[dict]) -> float:
    """Mean ROUGE-L F over all pairs of texts; nan for a single text, or without the extra `metrics`.

    rouge-score's own tokeniser keeps the letters a-z and digits alone: nothing can be said of texts without any.

    Source: Lin (2004), ROUGE; the diversity of arXiv 2406.07780.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return math.nan
    score = RougeScorer(["rougeL"]).score
    pairs = [score(one["response"], other["response"])["rougeL"].fmeasure for one, other in combinations(texts, 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan


def _notes(files: Files, judges: Sequence[Judge], reference: str, samples: set[int]) -> Iterator[str]:
    for judge in judges:
        by_it = partial(_guided_by, judge=judge.name, known=content(judge.name))
        if guided := [label for label, texts in files.items() if any(map(by_it, texts))]:
            yield NOTES["guided"].format(judge=judge.name, files=", ".join(guided))
    ours = _models(files[reference])
    for label, texts in files.items():
        if [*(theirs := _models(texts))] != [*ours][:1]:
            names = dict(theirs=_named(theirs), ours=_named(ours))
            yield NOTES["kl"].format(file=label, reference=reference, **names)
    if min(samples) < max(samples):
        yield NOTES["samples"].format(fewest=min(samples), most=max(samples))
    methods = {text.get("method") for texts in files.values() for text in texts}
    for name in [name for name in BOUNDED if name in methods]:
        yield NOTES["bound"].format(method=name, bound=METHODS[name].bound)


def _guided_by(text: dict, judge: str, known: str) -> bool:
    """By name, or by content where a record tells that of its models."""
    settings, method = text.get("settings", {}), METHODS.get(text.get("method", ""))
    roles = [role for role in ("reward_model", "final_reward_model") if settings.get(role) is not None]
    same = (
        known == settings.get("contents", {}).get(role) or os.path.realpath(settings[role]) == os.path.realpath(judge)
        for role in roles
    )
    return (method is None or method.needs_reward) and any(same)


def with_kl_to(reference: str, texts: list[dict], ref_log_probs: Sequence[float]) -> list[dict]:
    """The texts with their `kl` to another model than the one that wrote them.

        log pi(y) - log pi_ref(y) = kl + log pi_writer(y) - log pi_ref(y)

    where pi_writer is the language model that a method guided: the records hold `kl` and `ref_log_prob` of it. Where
    that has the very weights of the other model, `kl` stays: read again, in another type or batch, it would be blurred.

    Args:
        reference: its folder or hub id.
        ref_log_probs: log pi_ref of each response, in nats, see `texts.text_log_probs`.

    Raises:
        ValueError: for a text without `kl` or `ref_log_prob`, or one that the other model cannot have written.

    >>> text = {"kl": 0.5, "ref_log_prob": -3.0, "settings": {"model": "tuned"}}
    >>> with_kl_to("base", [text], [-4.0])[0]["kl"]
    1.5
    """
    for text in texts:
        if missing := {"kl", "ref_log_prob"} - text.keys():
            raise ValueError(
                f"prompt number {text['prompt_number']}, sample {text['sample']} has no `{min(missing)}`: only texts "
                "of `pargs generate` can be taken to another reference (--reference)"
            )
    known, found = content(reference), []
    for text, log_prob in zip(texts, ref_log_probs, strict=True):
        if log_prob == -math.inf:
            raise ValueError(
                f"prompt number {text['prompt_number']}, sample {text['sample']} cannot have been written by "
                f"{reference}, sampled with {text['reference']}: its KL is infinite; compare texts that were generated "
                "without such a cut (--ref-top-k, --ref-top-p, --ref-min-p)"
            )
        settings = text.get("settings", {})
        own = settings.get("contents", {}).get("model") == known
        kl = text["kl"] if own else text["kl"] + text["ref_log_prob"] - log_prob
        now = {"model": reference, "contents": settings.get("contents", {}) | {"model": known}}
        found.append(text | {"kl": kl, "settings": settings | now})
    return found


def _models(texts: list[dict]) -> dict[str | None, str | None]:
    """What the texts' `kl` is to: the content of a language model (its name, where a record does not have it), and how
    it was sampled -> its name."""
    found: dict[str | None, str | None] = {}
    for text in texts:
        settings, warp = text.get("settings", {}), text.get("reference", {})
        model = settings.get("contents", {}).get("model", settings.get("model"))
        sampled = ", ".join(f"{name} {value}" for name, value in sorted(warp.items()))
        found[f"{model}, sampled with {sampled}" if sampled else model] = settings.get("model")
    return found


def _named(models: dict[str | None, str | None]) -> str:
    """Names, with the content where it is not the name."""
    both = [f"{name}" if known == name else f"{name} ({known})" for known, name in models.items()]
    return " and ".join(both)


def _prompts(texts: list[dict]) -> dict[int, str]:
    return {text["prompt_number"]: repr(text["prompt"] or text.get("prompt_ids")) for text in texts}


def _by_prompt(texts: list[dict]) -> list[list[dict]]:
    number = itemgetter("prompt_number")
    return [list(group) for _, group in groupby(sorted(texts, key=number), number)]
