"""Files out: those that grow line by line and outlive an interruption, and those that appear whole or not at all.

    appending      add JSON records to a file, one per line, as its only writer; half a line that an interrupted run
                   left is cut off first
    aside          write next to a file or folder, and take its place when all is written
    kept           what is made once, and known by the content of what it was made from
    results        a folder that one run at a time writes to, and that loses nothing unless asked to

What such files hold is read back by `records.read_jsonl`.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
        _lock(file, path)
        file.truncate(len(whole_lines(path.read_bytes(), path)))

        def append(record: Mapping) -> None:
            known = json.loads(json.dumps(record), parse_constant=lambda name: None)
            file.write(json.dumps(known, ensure_ascii=False).encode() + b"\n")
            file.flush()

        yield append


def _lock(file: IO | int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, also by kill -9
    except BlockingIOError:
        raise ValueError(f"another run is writing {path}; wait for it, or write elsewhere") from None


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


def content(name: str | os.PathLike) -> str:
    """What tells contents apart: 16 hex digits of a file, or of all files of a folder; of the hub, the name itself.

    >>> content("owner/model")
    'owner/model'
    """
    path, found = Path(name), hashlib.sha256()
    if not path.exists():
        return str(name)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            with file.open("rb") as bytes_of_it:
                found.update(hashlib.file_digest(bytes_of_it, "sha256").digest())
    return found.hexdigest()[:16]


def kept(path: str | os.PathLike, made_from: Mapping[str, object], make: Callable[[Path], object]) -> Path:
    """A file or folder that is made once, by `make`; `path` itself.

    A note next to it says what it was made from, and what it holds.

    Args:
        made_from: all that it depends on, by name: settings, and `content` of files.

    Raises:
        ValueError: if it was made from something else, or has been changed since.
    """
    path, made_from = Path(path), json.loads(json.dumps(made_from, default=str))
    note = path.with_name(f"{path.name}.made.json")
    if not path.exists():
        with aside(path) as unfinished:
            make(unfinished)
            write_json(note, {"from": made_from, "content": content(unfinished)})
    known = json.loads(note.read_text("utf-8")) if note.exists() else {"from": {}, "content": None}
    differ = [name for name in made_from if known["from"].get(name) != made_from[name]]
    if differ or known["content"] != content(path):
        what = f"was made from other {', '.join(differ)}" if differ else "has changed since it was made"
        raise ValueError(f"{path} {what}: choose another folder, or delete it")
    return path


@contextmanager
def results(
    folder: str | os.PathLike, last: str, *, overwrite: bool, sources: Iterable[str | None] = ()
) -> Iterator[Path]:
    """Context manager: the folder that a command writes its results to, and nobody else in the meantime.

    Args:
        last: the file of the results that is written last.
        overwrite: whether results that are there may be replaced.
        sources: models that are read, which are never replaced.

    Raises:
        ValueError: if it holds results, is one of the sources, or another run is writing there.
    """
    folder = Path(folder)
    for source in filter(None, sources):
        if folder.exists() and Path(source).exists() and folder.samefile(source):
            raise ValueError(f"--output-dir {folder} is a model that is read, which would be lost: choose another one")
    if (folder / last).exists() and not overwrite:
        raise ValueError(f"--output-dir {folder} holds {last} of an earlier run: choose another one, or --overwrite it")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        yield folder
    finally:
        os.close(lock)


def write_lines(path: str | os.PathLike, records: Iterable[Mapping]) -> None:
    """Write a JSONL file, whole or not at all."""
    with aside(path) as unfinished, appending(unfinished) as append:
        for record in records:
            append(record)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a value as indented JSON, whole or not at all. Raises ValueError for nan, which JSON does not have."""
    with aside(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), "utf-8")
