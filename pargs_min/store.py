"""Files out: those that grow line by line and outlive an interruption, and those that appear whole or not at all.

    appending      add JSON records to a file, one per line, as its only writer; half a line that an interrupted run
                   left is cut off first
    aside          write next to a file or folder, and take its place when all is written

What such files hold is read back by `records.read_jsonl`.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pargs_min.records import whole_lines


@contextmanager
def appending(path: str | os.PathLike) -> Iterator[Callable[[Mapping], None]]:
    """Context manager: a function that appends one record as a whole line of JSON, at once; nan is written as null.

    Raises:
        ValueError: if another run is writing the file, or it ends in what no interrupted run left.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, also by kill -9
        except BlockingIOError:
            raise ValueError(f"another run is writing {path}; wait for it, or write to another file") from None
        file.truncate(len(whole_lines(path.read_bytes(), path)))

        def append(record: Mapping) -> None:
            known = json.loads(json.dumps(record), parse_constant=lambda name: None)
            file.write(json.dumps(known, ensure_ascii=False).encode() + b"\n")
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
