"""Files out: whole lines, and whole files or none."""

import gzip
import json
import math
import signal
import subprocess
import sys

import pytest

from pargs_min.records import read_jsonl
from pargs_min.store import appending, aside, content, kept, results, write_json


def test_half_a_line_is_skipped_by_the_reader_and_cut_off_by_the_next_writer(tmp_path):
    file = tmp_path / "new folder" / "log.jsonl"
    with appending(file) as append:
        append({"a": "é"})
    assert file.read_text("utf-8") == '{"a": "é"}\n'
    with file.open("ab") as broken:
        broken.write(b'{"a": 2, "b"')
    assert [record for record, _ in read_jsonl(file, growing=True)] == [{"a": "é"}]
    assert file.read_bytes().endswith(b'"b"')  # reading changes nothing
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not JSON"):
        list(read_jsonl(file))
    with appending(file) as append:
        append({"a": 3})
    assert [(record, source) for record, source in read_jsonl(file)] == [
        ({"a": "é"}, f"{file}:1"),
        ({"a": 3}, f"{file}:2"),
    ]


FOREIGN = {
    "one line without its end": b"my only notes",
    "one object without its end": b'{"a": 1}',
    "one line of TeX": rb"{\bf only}",
    "notes behind records": b'{"a": 1}\nmy notes',
    "an array": b'{"a": 1}\n[1, 2',
    "an archive": gzip.compress(b'{"a": 1}\n'),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_ends_in_what_no_run_left_is_refused_and_kept(tmp_path, data):
    file = tmp_path / "log.jsonl"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"log\.jsonl ends in b.*, which no interrupted run left"):
        [*read_jsonl(file, growing=True)]
    with pytest.raises(ValueError, match="which no interrupted run left"), appending(file):
        pass
    assert file.read_bytes() == data


def test_an_array_is_not_continued(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}]\n')
    assert [*read_jsonl(tmp_path / "a.json")] == [({"a": 1}, f"{tmp_path / 'a.json'}: record 1")]
    with pytest.raises(ValueError, match=r"a\.json:1: expected a JSON object, got list"):
        [*read_jsonl(tmp_path / "a.json", growing=True)]


def test_a_file_has_one_writer(tmp_path):
    file = tmp_path / "log.jsonl"
    with appending(file) as append:
        append({"a": 1})
        with pytest.raises(ValueError, match=r"another run is writing .*log\.jsonl"), appending(file):
            pass
        append({"a": 2})
    with appending(file) as append:
        append({"a": 3})
    assert [record["a"] for record, _ in read_jsonl(file)] == [1, 2, 3]


WRITER = """
import sys, time
from pargs_min.store import appending
with appending(sys.argv[1]) as append:
    append({"a": 1})
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_writer_that_is_killed_leaves_the_file_to_others(tmp_path):
    file = tmp_path / "log.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, file], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(ValueError, match="another run is writing"), appending(file):
            pass
        writer.send_signal(signal.SIGKILL)
    with appending(file) as append:
        append({"a": 2})
    assert [record["a"] for record, _ in read_jsonl(file)] == [1, 2]


def test_what_is_written_can_be_read(tmp_path):
    with appending(tmp_path / "log.jsonl") as append:
        append({"a": [math.nan, math.inf, 1.5], "b": "é"})
    assert [record for record, _ in read_jsonl(tmp_path / "log.jsonl")] == [{"a": [None, None, 1.5], "b": "é"}]


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_written_aside_appears_whole_or_not_at_all(tmp_path, folder):
    path = tmp_path / "made" / "thing"

    def write(unfinished, text):
        if folder:
            unfinished.mkdir()
        (unfinished / "file" if folder else unfinished).write_text(text)
        assert not path.exists()

    def interrupted():
        with aside(path) as unfinished:
            write(unfinished, "half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert not path.exists()
    with aside(path) as unfinished:
        write(unfinished, "whole")
    assert (path / "file" if folder else path).read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["thing"]


def test_json_is_replaced_as_a_whole_and_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_what_is_kept_is_made_once_and_known_by_what_it_was_made_from(tmp_path):
    made = []

    def make(path):
        made.append(path)
        path.write_text("whole")

    for _ in range(2):
        assert kept(tmp_path / "x.txt", {"pairs": "abc", "seed": 0}, make).read_text() == "whole"
    assert len(made) == 1
    with pytest.raises(ValueError, match=r"x\.txt was made from other pairs, seed"):
        kept(tmp_path / "x.txt", {"pairs": "abd", "seed": 1}, make)
    (tmp_path / "x.txt").write_text("half")
    with pytest.raises(ValueError, match=r"x\.txt has changed since"):
        kept(tmp_path / "x.txt", {"pairs": "abc", "seed": 0}, make)
    (tmp_path / "x.txt.made.json").unlink()
    with pytest.raises(ValueError, match=r"x\.txt was made from other"):
        kept(tmp_path / "x.txt", {"pairs": "abc", "seed": 0}, make)


@pytest.mark.parametrize("note", ["", "[]", '{"from": 1}', "{}", '{"from": {'])
def test_a_damaged_note_is_named(tmp_path, note):
    kept(tmp_path / "x", {"seed": 0}, lambda path: path.write_text("whole"))
    (tmp_path / "x.made.json").write_text(note)
    with pytest.raises(ValueError, match=r"x\.made\.json is damaged: choose another folder, or delete it"):
        kept(tmp_path / "x", {"seed": 0}, lambda path: path.write_text("whole"))


def test_content_of_a_model_is_that_of_its_own_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = content(tmp_path)
    (tmp_path / "texts.jsonl").write_text("{}")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{}")
    assert content(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("1")
    assert content(tmp_path) != before


def test_content_is_that_of_files_and_not_their_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "x").write_text("1")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    (tmp_path / "b" / "deep" / "x").write_text("2")
    assert content(tmp_path / "a") != content(tmp_path / "b")
    (tmp_path / "a" / "deep" / "x").rename(tmp_path / "a" / "x")
    assert len({content(tmp_path / name) for name in ("a", "b", "b/deep/x")}) == 3


def test_results_are_never_replaced_unasked_nor_written_twice_at_once(tmp_path):
    with results(tmp_path / "new", "last.json", overwrite=False) as folder:
        (folder / "last.json").write_text("{}")
        with pytest.raises(ValueError, match="another run is writing"), results(folder, "other", overwrite=True):
            pass
    with (
        pytest.raises(ValueError, match=r"holds last\.json, which would be replaced"),
        results(folder, "last.json", overwrite=False),
    ):
        pass
    with results(folder, "last.json", overwrite=True), results(tmp_path / "else", "last.json", overwrite=False):
        pass
    sources = [None, str(folder)]
    with (
        pytest.raises(ValueError, match="is a model that is read"),
        results(folder, "x", overwrite=True, sources=sources),
    ):
        pass
