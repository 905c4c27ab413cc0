"""A tiny lab, and sweeps without processes of their own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pargs_min.experiments import sweep
from pargs_min.experiments.setup import Lab
from tests.strategies import tiny_lm, tiny_tokenizer

WORDS = "abcdefg"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A lab of a tiny model with pairs that prefer one word; quick to measure anything on."""
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tiny_lm(vocabulary=14, **no_dropout).float().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    pairs = [{"prompt": f"{w} {v}", "chosen": f"a {w}", "rejected": f"b {v} c"} for w in WORDS for v in WORDS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": w}) for w in "bc"))
    return Lab(
        folder=str(tmp_path),
        model=str(tmp_path / "lm"),
        pairs=str(tmp_path / "pairs.jsonl"),
        prompts=str(tmp_path / "prompts.jsonl"),
        judge="tests.experiments.test_measure:vowels",
        max_new_tokens=8,
        samples=3,
        plain_samples=40,
        batch_size=8,
        pairs_per_step=8,
        learning_rate=1e-3,
        ppo_updates=1,
    )


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are measured in this process, which tests can patch."""
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
