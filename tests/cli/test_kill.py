"""Commands that are killed at a random moment, as by `kill -9`, and called again: nothing is lost, nothing half."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pargs_min.cli import main
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pargs_min.cli.decode", "pargs_min.cli.finetune", "pargs_min.cli.study"])
PROMPTS = [{"prompt": f"{a} {b}"} for a in "abc" for b in "abcd"]
PAIRS = [{"prompt": f"{a} {b}", "chosen": f"a {a} b", "rejected": f"b {b}"} for a in "abcd" for b in "abcdefg"]


def say_nothing() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def call(arguments: list[str]) -> None:
    say_nothing()
    raise SystemExit(main(arguments))


def started(arguments: list[str]):
    process = FORKS.Process(target=call, args=(arguments,))
    process.start()
    return process


def finished(arguments: list[str]) -> float:
    """Seconds of a run to its end."""
    began, process = time.monotonic(), started(arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def killed(arguments: list[str], after: float) -> None:
    process = started(arguments)
    process.join(after)
    process.kill()
    process.join()


@pytest.fixture
def made(tmp_path):
    """Tiny models and files to call commands with."""
    tiny_lm(vocabulary=14, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).float().save_pretrained(tmp_path / "lm")
    rm = tiny_reward_model(vocabulary=14).float()
    rm.config.pargs = {"objective": "full", "prompt_format": "text"}
    rm.save_pretrained(tmp_path / "rm")
    for folder in ("lm", "rm"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    for name, records in (("prompts", PROMPTS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def without_seconds(file: Path) -> list[dict]:
    return [{name: value for name, value in json.loads(line).items() if name != "cost"} for line in file.open()]


@pytest.mark.parametrize("seed", range(3))
def test_texts(made, seed):
    asked = ["generate", "--model", f"{made}/lm", "--reward-model", f"{made}/rm", "--prompts", f"{made}/prompts.jsonl"]
    asked += [
        "--method",
        "args",
        "--num-samples",
        "4",
        "--max-new-tokens",
        "20",
        "--batch-size",
        "3",
        "--device",
        "cpu",
        "--resume",
        "--output",
    ]
    seconds = finished([*asked, f"{made}/whole.jsonl"])
    for _ in range(3):
        killed([*asked, f"{made}/cut.jsonl"], random.Random(seed).uniform(0, seconds))
    finished([*asked, f"{made}/cut.jsonl"])
    whole, cut = (without_seconds(made / f"{name}.jsonl") for name in ("whole", "cut"))
    assert len(whole) == 48
    assert cut == whole


@pytest.mark.parametrize("command", ["train", "ppo"])
def test_training(made, command):
    """Weights and the log are those of a run that was left alone."""
    asked = [command, "--model", f"{made}/lm", "--resume"]
    if command == "train":
        asked += ["--dataset", f"{made}/pairs.jsonl", "--per-device-train-batch-size", "2", "--save-steps", "2"]
        asked += ["--num-train-epochs", "2", "--use-cpu", "True", "--report-to", "none"]
    else:
        asked += ["--prompts", f"{made}/prompts.jsonl", "--reward-model", f"{made}/rm", "--updates", "12"]
        asked += ["--save-every", "3", "--batch-size", "8", "--max-new-tokens", "6", "--device", "cpu"]
    seconds = finished([*asked, "--output-dir", f"{made}/whole"])
    for moment in (0.5, 0.8, 0.95):
        killed([*asked, "--output-dir", f"{made}/cut"], moment * seconds)
    finished([*asked, "--output-dir", f"{made}/cut"])
    whole, cut = ((made / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    if command == "ppo":
        whole, cut = ((made / name / "log.jsonl").read_text() for name in ("whole", "cut"))
        assert whole == cut


def test_a_study_and_its_workers(made, monkeypatch):
    """Those of a killed study end by themselves; a second one finds what is whole, and makes the rest."""
    (made / "judge.py").write_text("def length(prompts, responses): return [float(len(one)) for one in responses]\n")
    monkeypatch.chdir(made)
    asked = ["study", "partial-vs-full", "--model", "lm", "--dataset", "pairs.jsonl", "--prompts", "prompts.jsonl"]
    asked += ["--judge", "judge:length", "--max-new-tokens", "4", "--samples", "2", "--seeds", "1", "--quick"]
    asked += ["--methods", "args", "pargs (soft labels)"]
    process = started([*asked, "--output-dir", "study"])
    while not list(made.glob("study/models/*")):
        time.sleep(0.1)
        assert process.is_alive()
    workers = children(process.pid)
    process.kill()
    process.join()
    check_ended(workers)
    finished([*asked, "--output-dir", "study"])
    assert not [*made.glob("study/**/*.unfinished")]
    assert "pargs (soft labels) minus others" in (made / "study" / "partial-vs-full.md").read_text()


def test_a_study_that_is_interrupted_ends_at_once_and_keeps_what_it_made(made):
    """As by Ctrl-C, which reaches its workers, too: one line, no traceback, status 130."""
    asked = ["study", "partial-vs-full", "--model", "lm", "--dataset", "pairs.jsonl", "--prompts", "prompts.jsonl"]
    asked += ["--judge", "rm", "--max-new-tokens", "4", "--samples", "2", "--seeds", "1", "--quick"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pargs_min", *asked, "--output-dir", "study"],
        cwd=made,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )
    while not (whole := list(made.glob("study/models/*/config.json"))):
        time.sleep(0.1)
        assert process.poll() is None
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "pargs: interrupted"
    assert "Traceback" not in said
    check_ended(workers)
    assert all(file.exists() for file in whole)


def check_ended(workers: list[int]) -> None:
    """Workers see within moments that their study has ended."""
    assert workers
    end = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < end, "workers outlive their study"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_an_evaluation(made):
    """Its results are whole or not there."""
    asked = ["generate", "--model", f"{made}/lm", "--method", "plain", "--prompts", f"{made}/prompts.jsonl"]
    asked += ["--max-new-tokens", "20"]
    finished([*asked, "--output", f"{made}/plain.jsonl"])
    asked = ["evaluate", f"{made}/plain.jsonl", "--judge", f"{made}/rm", "--output-dir"]
    seconds = finished([*asked, f"{made}/whole"])
    for share in (0.3, 0.6, 0.8, 0.9):
        killed([*asked, f"{made}/{share}"], share * seconds)
        if (made / str(share) / "evaluation.json").exists():
            for name in ("evaluation.json", "evaluation.md", "answers.jsonl"):
                assert (made / str(share) / name).read_text() == (made / "whole" / name).read_text()
        else:
            finished([*asked, f"{made}/{share}"])


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="no such signal")
def test_a_request_to_end_is_obeyed(made):
    asked = ["generate", "--model", f"{made}/lm", "--method", "plain", "--prompts", f"{made}/prompts.jsonl"]
    asked += ["--max-new-tokens", "20"]
    process = started([*asked, "--num-samples", "500", "--output", f"{made}/out.jsonl"])
    while not (made / "out.jsonl").exists():
        time.sleep(0.05)
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM
