"""Files of texts that a run continues where an earlier one was interrupted, or writes a part of."""

import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain, islice
from pathlib import Path

from pargs_min.records import check_text, read_jsonl
from pargs_min.store import appending


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        ValueError: if it is not of this form, or i does not lie between 0 and n - 1.

    >>> parse_shard("0/4")
    (0, 4)
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(
            f"shard (--shard) must be i/n, part i of n counted from 0, such as 0/4 to 3/4 of four; got {text!r}"
        )
    return int(i), int(n)


def write_records(
    path: str | os.PathLike, records: Iterable[dict], settings: dict, earlier: int | None = None
) -> Iterator[dict]:
    """Append each record, with the run's settings, to a JSONL file as it comes, and pass it on.

    Args:
        earlier: records that the file held when they were read (`read_done`); None means not to look.

    Raises:
        ValueError: if another run is writing the file, or has done so since.
    """
    records = iter(records)
    first = [*islice(records, 1)]  # what is refused leaves no file
    with appending(path) as append:
        if earlier not in (None, sum(1 for _ in read_jsonl(path, growing=True))):
            raise ValueError(
                f"another run has written {path} since this one began: go on with --resume, or name another file"
            )
        for record in chain(first, records):
            append(record | {"settings": settings})
            yield record


def read_done(path: str | os.PathLike, settings: dict, prompts: list[dict]) -> dict[tuple[int, int], list[int] | None]:
    """(prompt number, sample number) of the records that an interrupted run left, and the prompt's ids of each.

    Raises:
        ValueError: naming file and line, if they were made with other settings or for other prompts than these, or are
            no records of such a run.
    """
    if not Path(path).exists():
        return {}
    done: dict[tuple[int, int], list[int] | None] = {}
    for record, source in read_jsonl(path, growing=True):
        check_text(record, source)
        number, sample = record["prompt_number"], record["sample"]
        asked = {"prompt": None} | prompts[number] if number < len(prompts) else {"prompt_number": None}
        if (number, sample) in done:
            raise ValueError(f"{source}: prompt {number} has sample {sample} already; write to another file")
        done[number, sample] = record.get("prompt_ids")
        if differ := differences(record.get("settings", {}), settings):
            raise ValueError(f"{source} was made with other settings ({differ}); write to another file")
        if any(name in asked and record.get(name) != asked[name] for name in ("prompt", "prompt_ids", "prompt_number")):
            raise ValueError(
                f"{source} was written for another prompt number {number}: the prompts have changed since; write to "
                "another file"
            )
    return done


def time_of(path: str | os.PathLike) -> datetime | None:
    """The time that the chat template was told in an interrupted run, for the rest of it to read the same prompts."""
    first, _ = next(read_jsonl(path, growing=True), ({}, "")) if Path(path).exists() else ({}, "")
    return datetime.fromisoformat(first["now"]) if "now" in first else None


def differences(theirs: dict, ours: dict) -> str:
    """Which of our settings an earlier run had otherwise; empty where none.

    >>> differences({"seed": 5, "beta": 1.0}, {"seed": 6, "beta": 1.0})
    'seed 5 there, 6 now'
    """
    return "; ".join(
        f"{key} {theirs.get(key)!r} there, {value!r} now" for key, value in ours.items() if theirs.get(key) != value
    )
