"""A comparison on paper: a Markdown table, what its figure shows, and the files that keep it."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pargs_min.evaluation.compare import Comparison
from pargs_min.evaluation.judges import is_number
from pargs_min.markdown import markdown_table, one_line
from pargs_min.records import is_messages
from pargs_min.store import write_json


def markdown(comparison: Comparison) -> str:
    """The table and its notes; columns that no file has are left out."""
    lines = [_cells(row) for row in comparison.rows]
    names = [name for name in lines[0] if any(cells[name] for cells in lines)]
    table = markdown_table(names, [[cells[name] for name in names] for cells in lines], align="l" * len(names))
    return "\n".join([table, "", *(f"- {one_line(note)}" for note in comparison.notes)])


KL = "KL (nats; line from 0: at most)"


def panels(comparison: Comparison) -> dict[str, dict[str, tuple[float, float, float]]]:
    """What the figure shows: for each measure, (value, low, high) of each file that has it."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in comparison.rows:
        estimates: dict[str, Any] = {}
        for name, judged in _by_short_name(row["judges"]).items():
            estimates |= {f"reward ({name})": judged["reward"], f"share won ({name})": judged["win_rate"]}
        kl = row["kl"]
        estimates[KL] = kl | {"low": 0.0, "high": kl["mean"]} if kl and row["kl_is_bound"] else kl  # up to there
        for name, estimate in estimates.items():
            if estimate:
                value = estimate.get("mean", estimate.get("rate"))
                low, high = (value if estimate[end] is None else estimate[end] for end in ("low", "high"))
                found.setdefault(name, {})[row["file"]] = value, low, high
    return found


def write_comparison(comparison: Comparison, folder: str | os.PathLike) -> None:
    """evaluation.md, evaluation.json (rows and notes) and answers.jsonl (each judge's answer on each text, raw).

    The JSON comes last: where it is, so are the others.
    """
    folder = Path(folder)
    (folder / "evaluation.md").write_text(markdown(comparison) + "\n", "utf-8")
    lines = [json.dumps(answer, ensure_ascii=False, default=_plain) + "\n" for answer in comparison.answers]
    (folder / "answers.jsonl").write_text("".join(lines), "utf-8")
    write_json(folder / "evaluation.json", {"rows": comparison.rows, "notes": comparison.notes})


def alpaca_eval_records(texts: Sequence[dict], generator: str) -> list[dict[str, str]]:
    """What AlpacaEval reads as the outputs of a model: one text per prompt, the first sample.

    Args:
        texts: of `read_texts`, ordered by prompt and sample.
        generator: what AlpacaEval is to call the model.

    Raises:
        ValueError: for a prompt of token ids, or of messages other than a single one of the user: it has no turns.

    >>> text = {"prompt": [{"role": "user", "content": "1 + 1?"}], "prompt_number": 0, "response": "2"}
    >>> alpaca_eval_records([text], "plain")
    [{'instruction': '1 + 1?', 'output': '2', 'generator': 'plain'}]
    """
    first = {text["prompt_number"]: text for text in reversed(texts)}
    records = []
    for number, text in sorted(first.items()):
        prompt = text["prompt"]
        if is_messages(prompt) and [message["role"] for message in prompt] == ["user"]:
            prompt = prompt[0]["content"]
        if not isinstance(prompt, str):
            turns = ", ".join(message["role"] for message in prompt) if prompt else "token ids alone"
            raise ValueError(
                f"{generator}: prompt number {number} has {turns}; AlpacaEval takes one text, or a single message of "
                "the user (--export)"
            )
        records.append({"instruction": prompt, "output": text["response"], "generator": generator})
    return records


def _plain(answer: Any) -> float | str:
    """Numbers of numpy are no less numbers."""
    return float(answer) if is_number(answer) else repr(answer)


def _by_short_name(judges: dict[str, dict]) -> dict[str, dict]:
    """By the last part of each judge's name, or all of it where two would look the same."""
    short = {judge: os.path.basename(judge.rstrip("/")).rpartition("#")[2] for judge in judges}
    alike = Counter(short.values())
    return {name if alike[name] == 1 else judge: judges[judge] for judge, name in short.items()}


def _cells(row: dict) -> dict[str, str]:
    cells = {"file": row["file"], "texts": f"{row['texts']} of {row['prompts']}"}
    for name, judged in _by_short_name(row["judges"]).items():
        cells[f"reward ({name})"] = _plus_minus(judged["reward"], interval=True)
        cells[f"wins ({name})"] = _wins(judged["win_rate"])
        cells[f"no answer ({name})"] = str(judged["out_of_format"] or "")
    kl = _plus_minus(row["kl"])
    cells["KL (nats)"] = f"≤ {row['kl']['mean']:.3g}" if kl and row["kl_is_bound"] else kl
    measures = [name for name in row if name not in NO_MEASURES]
    return cells | {TITLES.get(name, name.replace("_", " ")): _plus_minus(row[name]) for name in measures}


NO_MEASURES = "file", "method", "prompts", "texts", "judges", "kl_is_bound", "kl"  # have columns of their own, or none
TITLES = {"distinct_1": "distinct-1", "distinct_2": "distinct-2", "rouge_l": "ROUGE-L", "length": "tokens"}


def _plus_minus(estimate: dict | None, interval: bool = False) -> str:
    if estimate is None:
        return ""
    text = _digits(estimate["mean"])
    if estimate["error"] is None:
        return text
    text = f"{text} ± {_digits(estimate['error'], 2)}"
    return f"{text} [{_digits(estimate['low'])}, {_digits(estimate['high'])}]" if interval else text


def _digits(number: float, digits: int = 3) -> str:
    """Rounding noise is zero."""
    return f"{round(number, 6) + 0.0:.{digits}g}"


def _wins(rate: dict | None) -> str:
    """Share won, its interval, and the counts won / tied / lost."""
    if rate is None:
        return ""
    ends = "" if rate["low"] is None else f" [{rate['low']:.0%}, {rate['high']:.0%}]"
    return f"{rate['rate']:.0%}{ends} {rate['wins']}/{rate['ties']}/{rate['losses']}"
