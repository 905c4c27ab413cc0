"""Files out: whole lines, and whole files or none."""

import json

import pytest

from pargs_min.records import read_jsonl
from pargs_min.store import appending, aside, write_json


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


def test_every_record_is_on_disk_at_once(tmp_path):
    with appending(tmp_path / "log.jsonl") as append:
        append({"a": 1})
        assert (tmp_path / "log.jsonl").read_text() == '{"a": 1}\n'


def test_a_file_of_half_a_line_is_written_from_its_start(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"a"')
    assert not [*read_jsonl(file, growing=True)]
    with appending(file) as append:
        append({"a": 1})
    assert file.read_text() == '{"a": 1}\n'


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
