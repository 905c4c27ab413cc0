"""The demonstration: a miniature of it end to end, and what it says of its numbers."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from pargs_min import demo
from pargs_min.demo import Size, run, verdicts


def row(method, gold, kl, se=0.01, **more):
    return {"method": method, "beta": 1.0, "n": None, "gold": gold, "gold_se": se, "kl": kl, **more}


def test_who_is_ahead_is_read_off_the_curve_at_equal_kl():
    rows = [
        row("plain", -1.0, 0.0),
        row("pargs", 1.0, 2.0),
        row("args", -0.5, 1.0),
        row("best-of-n", 0.99, 2.0, n=16),
        row("best-of-n", 0.5, 1.0, n=4),
        row("args", 0.0, 9.0),
    ]
    assert verdicts(rows) == [
        "at 1.00 nats sampled PARGS (0.00) is ahead of args beta=1 (-0.50 at 1.00)",
        "at 2.00 nats sampled PARGS (1.00) is level with best-of-16 (0.99 at 2.00)",
        "at 1.00 nats sampled PARGS (0.00) is behind best-of-4 (0.50 at 1.00)",
        "at 2.00 nats sampled PARGS (1.00) is ahead of args beta=1 (0.00 at 9.00)",
    ]


def test_the_whole_job_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "two_processes", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(demo, "QUICK", Size(5, 40, 20, 2, 2, 6, 40))
    monkeypatch.setattr(demo, "BETAS", (1.0,))
    monkeypatch.setattr(demo, "BEST_OF", (2,))
    said = []
    rows = run(tmp_path, quick=True, say=said.append)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert {"method", "beta", "gold", "gold_se", "kl", "distinct2", "off_grammar", "cost"} <= set(rows[0])
    assert [r["method"] for r in rows] == ["plain", "args", "args-greedy", "pargs", "pargs-greedy", "best-of-n"]
    assert [len(r["models"]) for r in rows] == [1, 2, 2, 2, 2, 2]  # every reward model is shown
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["cost"] == 1
    for picture in ("reward_vs_kl.png", "prefix_accuracy.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    trained = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/model.safetensors")}
    assert len(trained) == 5
    again = run(tmp_path, quick=True, say=said.append)  # reuses what it trained, and writes the same texts
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/model.safetensors")} == trained
    assert [(r["gold"], r["kl"]) for r in again] == [(r["gold"], r["kl"]) for r in rows]
