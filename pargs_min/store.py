"""Files out: those that grow line by line and outlive an interruption, and those that appear whole or not at all.

    appending      add JSON records to a file, one per line; half a line that an interrupted run left is cut off first
    aside          write next to a file or folder, and take its place when all is written

What such files hold is read back by `records.read_jsonl`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appending(path: str | os.PathLike) -> Iterator[Callable[[Mapping], None]]:
    """Context manager: a function that appends one record as a whole line of JSON, at once.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        whole = path.read_bytes().rfind(b"\n") + 1
        file.truncate(whole)

        def append(record: Mapping) -> None:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()

        yield append


@contextmanager
def aside(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a path to write a file or a new folder to, which becomes `path` if nothing is raised.

    So `path`, once there, is whole. What an earlier run left unfinished is removed.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    yield unfinished
    unfinished.replace(path)


def write_lines(path: str | os.PathLike, records: Iterable[Mapping]) -> None:
    """Write a JSONL file, whole or not at all."""
    with aside(path) as unfinished, appending(unfinished) as append:
        for record in records:
            append(record)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a value as indented JSON, whole or not at all. Raises ValueError for nan, which JSON does not have."""
    with aside(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), "utf-8")
