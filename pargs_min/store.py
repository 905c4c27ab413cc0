"""Files out: those that grow line by line and outlive an interruption, and those that appear whole or not at all.

    appending      add JSON records to a file, one per line, as its only writer; half a line that an interrupted run
                   left is cut off first
    aside          write next to a file or folder, and take its place when all is written
    replacing      write files to a folder beside those that they take the place of
    once           make what is not there, in one process at a time
    kept           what is made once, and known by the content of what it was made from
    results        a folder that one run at a time writes to, and that loses nothing unless asked to

What such files hold is read back by `records.read_jsonl`.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

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


@contextmanager
def replacing(folder: str | os.PathLike, old: Iterable[str], last: str) -> Iterator[Path]:
    """Context manager: a new folder for files that then move into `folder`, where they replace the old ones.

    Args:
        old: patterns of the names that the old files may have.
        last: the file that moves last, and is not there while the others do: where it is, all belong together.
    """
    folder, unfinished = Path(folder), Path(folder, "model.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    (folder / last).unlink(missing_ok=True)
    for file in [file for pattern in old for file in folder.glob(pattern)]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == last):
        file.replace(folder / file.name)
    unfinished.rmdir()


def content(name: str | os.PathLike) -> str:
    """What tells contents apart: 16 hex digits of a file, or of all files of a folder; of the hub, the name itself.

    A model's folder (with a config.json) may hold results, too: its own files are those directly in it, but for JSONL
    and the README.md, which changes no number.
    What is neither file nor folder is read once, and equals nothing.

    >>> content("owner/model")
    'owner/model'
    """
    path, found = Path(name), hashlib.sha256()
    if not path.exists():
        return str(name)
    if not (path.is_file() or path.is_dir()):
        return f"that cannot be read again ({uuid.uuid4().hex[:8]})"
    files = [path]
    if (path / "config.json").exists():
        files = [file for file in path.iterdir() if file.suffix != ".jsonl" and file.name != "README.md"]
    elif path.is_dir():
        files = [*path.rglob("*")]
    for file in sorted(files):
        if file.is_file():
            found.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            with file.open("rb") as bytes_of_it:
                found.update(hashlib.file_digest(bytes_of_it, "sha256").digest())
    return found.hexdigest()[:16]


def once(path: str | os.PathLike, make: Callable[[Path], object]) -> None:
    """Make a file or folder that is not there, by `make`, aside; who wants the same at the same time waits for it."""
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():
            with aside(path) as unfinished:
                make(unfinished)
        lock.unlink(missing_ok=True)  # now that nobody will ask for it


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

    def make_and_note(unfinished: Path) -> None:
        make(unfinished)
        write_json(note, {"from": made_from, "content": content(unfinished)})

    once(path, make_and_note)
    known = read_json(note, "from") if note.exists() else {"from": {}}
    differ = [name for name in made_from if known["from"].get(name) != made_from[name]]
    if differ or known.get("content") != content(path):
        what = f"was made from other {', '.join(differ)}" if differ else "has changed since it was made"
        raise ValueError(f"{path} {what}: choose another folder, or delete it")
    return path


@contextmanager
def saving(where: str | os.PathLike) -> Iterator[None]:
    """Context manager: what torch and safetensors raise on a full disk becomes an OSError that names the place."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{where} cannot be written: {error}") from error


def check_results(folder: str | os.PathLike, *names: str, overwrite: bool, sources: Iterable[str | None] = ()) -> None:
    """Find out, before any work is done for them, whether results can be written to a folder, which is made.

    Args:
        names: patterns of the names of all files that results would replace, whoever wrote those.
        overwrite: whether files that are there may be replaced.
        sources: models that are read, which are never replaced: they must not lie in the folder.

    Raises:
        ValueError: if it holds such a file, or is or holds one of the sources.
        OSError: if it cannot be written to.
    """
    folder = Path(folder)
    for source in filter(None, sources):
        if Path(source).exists() and Path(source).resolve().is_relative_to(folder.resolve()):
            what = "is" if folder.samefile(source) else f"holds {source}, which is"
            raise ValueError(f"--output-dir {folder} {what} a model that is read and would be lost: choose another one")
    if not overwrite and (there := [file.name for name in names for file in folder.glob(name)]):
        raise ValueError(
            f"--output-dir {folder} holds {there[0]}, which would be replaced: choose another one, or --overwrite it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def results(
    folder: str | os.PathLike, *names: str, overwrite: bool, sources: Iterable[str | None] = ()
) -> Iterator[Path]:
    """Context manager: the folder that a command writes its results to, and nobody else in the meantime.

    Args and errors as of `check_results`.

    Raises:
        ValueError: also if another run is writing there.
    """
    check_results(folder, *names, overwrite=overwrite, sources=sources)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, Path(folder))
        yield Path(folder)
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


def read_json(path: str | os.PathLike, *objects: str) -> dict:
    """The object that `write_json` wrote. Raises ValueError, naming the file, if it or one of its `objects` is none."""
    try:
        value = json.loads(Path(path).read_bytes())
        if all(isinstance(one, dict) for one in (value, *(value[name] for name in objects))):
            return value
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: choose another folder, or delete it")
