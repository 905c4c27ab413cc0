"""How far work has come, also where stderr is no terminal."""

from transformers.utils import logging

from pargs_min import progress as module
from pargs_min.progress import progress


def said(capsys, monkeypatch, seconds: float = 0.0) -> list[str]:
    monkeypatch.setattr(module, "SECONDS", seconds)
    for _ in progress(range(3), desc="rewards"):
        pass
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_it_is_lines(capsys, monkeypatch):
    lines = said(capsys, monkeypatch)
    assert [line.split("|")[0] for line in lines] == ["rewards:  33%", "rewards:  67%", "rewards: 100%"]
    assert not any("\r" in line for line in lines)


def test_quick_work_is_one_line(capsys, monkeypatch):
    assert len(said(capsys, monkeypatch, seconds=60.0)) == 1


def test_it_is_silent_where_transformers_is(capsys, monkeypatch):
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        assert said(capsys, monkeypatch) == []
    finally:
        if enabled:
            logging.enable_progress_bar()
