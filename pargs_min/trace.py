"""One generation, token by token: what could have followed at each step, what it was worth, what was drawn.

    records      the steps that `generate(..., on_step=...)` reported -> plain records
    to_text      records -> lines for a terminal
    to_html      texts, each with its records -> one page that needs nothing else: no font, no library, no network
    read_page    such a page -> its texts

A record of a step:

    {"step": 3, "candidates": [{"id", "token", "candidate", "ref_prob", "reward", "prob", "drawn"}, ...],
     "others": {"ref_prob", "prob"}, "rest": true, "unlisted": 0, "nats": 0.7}

ref_prob is the reference's probability, prob the guided one, both over the whole vocabulary; reward is null for a
token that was no candidate, and for all tokens of a step that `guide_below` left unguided. `others` adds up all tokens
that are not listed, `rest` says whether they are worth a row, and `unlisted` counts the candidates among them. nats is
log prob - log ref_prob of the drawn token: how far guidance moved it; over a text's tokens the sum is its kl.
"""

import base64
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, UndefinedError
from transformers import PreTrainedTokenizerBase

from pargs_min.decode import Step
from pargs_min.methods import METHODS, as_is

MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # Unicode categories that a reader would not see


def visible(token: str) -> str:
    r"""A token's text with invisible characters made visible; combining marks get something to stand on.

    >>> visible(" to\n"), visible("\u202e"), visible("")
    ('␣to⏎', '<U+202E>', '<empty>')
    """
    shown = "".join(MARKS.get(c) or (f"<U+{ord(c):04X}>" if unicodedata.category(c) in INVISIBLE else c) for c in token)
    return "◌" + shown if unicodedata.combining(shown[:1] or " ") else shown or "<empty>"


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """The text of a token id; where a token is half a character, the tokenizer's own piece."""

    def text(token: int) -> str:
        piece, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
        if piece is None or "\ufffd" in text:
            return piece or f"<{token}>"
        # sentencepiece drops the blank of a first word
        return " " + text if piece.startswith("▁") and not text.startswith(" ") else text

    return text


def token_names(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """The name of a token id: its text, as `visible` writes it."""
    text = token_texts(tokenizer)
    return lambda token: visible(text(token))


def records(steps: Sequence[Step], name: Callable[[int], str], *, row: int = 0, shown: int = 10) -> list[dict]:
    """One record for each step of one row, up to the row's end.

    Args:
        steps: what `on_step` was called with, in order.
        name: token id -> text, see `token_names` and `token_texts`.
        row: of the batch.
        shown: candidates listed per step, >= 1: the likeliest under the guided policy, and the one that was drawn.

    Raises:
        ValueError: if `shown` is less than 1.

    >>> import torch
    >>> from pargs_min.decode import Drawn
    >>> log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> drawn = torch.tensor([5]), log_probs[:, 1], log_probs[:, 1], torch.zeros(1)
    >>> step = Step(0, torch.tensor([[4, 5, 6]]), log_probs, torch.zeros(1, 3), log_probs, Drawn(*drawn),
    ...             torch.tensor([True]), log_probs < 0)
    >>> [record] = records([step], str, shown=1)
    >>> [(c["token"], round(c["prob"], 3), c["drawn"]) for c in record["candidates"]]
    [('4', 0.5, False), ('5', 0.3, True)]
    >>> round(record["others"]["prob"], 3)
    0.2
    """
    if shown < 1:
        raise ValueError(f"shown must be at least 1 candidate per step, got {shown}")
    return [_record(step, name, row, shown) for step in steps if step.alive[row]]


def _record(step: Step, name: Callable[[int], str], row: int, shown: int) -> dict:
    token, *numbers = (column[row].item() for column in step.drawn)
    asked = step.candidates, step.eligible, step.ref_log_probs, step.log_probs, step.rewards
    known = {ids: rest for ids, *rest in zip(*(of_all[row].tolist() for of_all in asked), strict=True)}
    order = sorted(known, key=lambda one: -known[one][2])
    listed = [one for place, one in enumerate(order) if place < shown or one == token] + [token] * (token not in known)
    known[token] = [token in known and known[token][0], *numbers]
    candidates = [_candidate(one, name(one), *known[one]) | {"drawn": one == token} for one in listed]
    others = {sort: max(0.0, 1 - sum(one[sort] for one in candidates)) for sort in ("ref_prob", "prob")}
    unlisted = sum(eligible for eligible, *_ in known.values()) - sum(one["candidate"] for one in candidates)
    record = {"step": step.number, "candidates": candidates, "others": others, "rest": max(others.values()) > 1e-6}
    ref_log_prob, log_prob, _ = numbers
    return record | {"unlisted": unlisted, "nats": log_prob - ref_log_prob}


def _candidate(token: int, name: str, eligible: bool, ref_log_prob: float, log_prob: float, reward: float) -> dict:
    found = {"id": token, "token": name, "candidate": eligible, "ref_prob": math.exp(ref_log_prob)}
    return found | {"reward": None if math.isnan(reward) else reward, "prob": math.exp(log_prob)}


def drawn(record: Mapping) -> dict:
    """The token of a step that was drawn."""
    return next(candidate for candidate in record["candidates"] if candidate["drawn"])


def _reward(reward: float | None) -> str:
    return "" if reward is None else f"{reward:.3f}"


def _number(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 or probability == 0 else f"{probability:.0e}"


# As text -------------------------------------------------------------------------------------------------------------


def to_text(trace: Sequence[Mapping]) -> str:
    """The records as lines: one table per step, `>` before the token that was drawn, a bar for its guided probability.

    >>> print(to_text([{"step": 0, "candidates": [
    ...     {"id": 7, "token": "rope", "ref_prob": 0.2, "reward": 1.5, "prob": 0.5, "drawn": True}],
    ...     "others": {"ref_prob": 0.8, "prob": 0.5}, "rest": True}]))
    step 1     token   reference    reward  guided
            >  rope        0.200     1.500   0.500  ##########
               others      0.800             0.500  ##########
    """
    lines = []
    for record in trace:
        listed = _rows(record)
        width = max(5, *(_columns(row["token"]) for row in listed))
        title = f"step {record['step'] + 1}"
        lines.append(f"{title:11}{'token':{width}}  reference    reward  guided")
        for row in listed:
            padded = row["token"] + " " * (width - _columns(row["token"]))
            numbers = f"{_number(row['ref_prob']):>9}{row['reward']:>10}{_number(row['prob']):>8}"
            mark, bar = ">" if row["kind"] == "drawn" else "", "#" * round(20 * row["prob"])
            lines.append(f"{mark:>9}  {padded}  {numbers}  {bar}".rstrip())
    return "\n".join(lines)


def _rows(record: Mapping) -> list[dict]:
    """What both forms show of a step: its candidates, and the others in one row."""
    kinds = {True: "drawn", False: ""}
    rows = [c | {"reward": _reward(c["reward"]), "kind": kinds[c["drawn"]]} for c in record["candidates"]]
    if record["rest"]:
        rows.append(record["others"] | {"token": "others", "reward": "", "kind": "rest"})
    return rows


def _columns(text: str) -> int:
    """The columns that a text takes in a terminal: two for a wide character, none for a combining mark."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# As a page -----------------------------------------------------------------------------------------------------------


def to_html(texts: Sequence[Mapping]) -> str:
    """One page: of each text its tokens, links to their steps, and the candidates of every step; texts side by side.

    A slider and a switch in the page compute all probabilities anew, with another beta, or with the tokens that are no
    candidates kept or cut (`trace.js`). They change nothing of the path that was written.

    Args:
        texts: {"settings": name -> value of the run, among them method, beta, truncate and temperature; "steps": its
            records}.
    """
    page = Environment(loader=PackageLoader("pargs_min", ""), autoescape=True, trim_blocks=True)
    page.policies["json.dumps_kwargs"] = {}  # settings stay in their order
    runs = [text["settings"] for text in texts]
    return page.get_template("trace.html").render(
        texts=texts,
        title=f"{', '.join(settings['method'] for settings in runs)}, token by token",
        shared={name: value for name, value in runs[0].items() if all(one.get(name) == value for one in runs)},
        **dict(drawn=drawn, rows=_rows, number=_number, why_fixed=_why_fixed, sha256=_sha256),
    )


def _why_fixed(text: Mapping) -> str | None:
    """Why what another beta would make of a text cannot be told from its records; None where it can."""
    settings, method = text["settings"], METHODS[text["settings"]["method"]]
    reasons = {
        f"no reward guides {method.name}": not method.guided,
        f"the rewards of {method.name} are computed with it": method.tilt is not as_is,
        "a temperature other than 1 depends on every token, and few are listed": settings["temperature"] != 1,
        "not all candidates are listed (--shown)": any(step["unlisted"] for step in text["steps"]),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _sha256(source: str) -> str:
    """How a content security policy names a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def read_page(path: str | os.PathLike) -> list[dict]:
    """The texts of a page that `to_html` wrote, as it was given them.

    Raises:
        ValueError: if the file is no such page.
    """
    try:
        [found] = re.findall(
            r'<script type="application/json" id="texts">(.*?)</script>', Path(path).read_text("utf-8")
        )
        texts = json.loads(found)
        to_html(texts)
    except (ValueError, TypeError, AttributeError, LookupError, UndefinedError):
        raise ValueError(f"{path} must be a page that `pargs trace` wrote and nobody changed") from None
    return texts
