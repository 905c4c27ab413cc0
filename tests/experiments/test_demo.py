"""The demonstration: a miniature of it from start to end."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from pargs_min.cli import main
from pargs_min.experiments import demo
from pargs_min.experiments.demo import run
from pargs_min.experiments.setup import embedded
from pargs_min.world.journey import HELD_OUT_PROMPTS, OFF_GRAMMAR, Journey

pytestmark = pytest.mark.trains


@pytest.mark.usefixtures("one_process")
def test_the_whole_job_in_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "small", lambda folder, seed: replace(embedded(folder, quick=True), epochs=3.2))
    run(tmp_path, quick=True)
    everything = capsys.readouterr().out
    assert [stage in everything for stage in ("[1/3]", "[2/3]", "[3/3]")] == [True] * 3
    for word in ("gold", "KL", "nats", "off-grammar", "passes", "beta"):  # each is said before or beside the table
        assert word in everything

    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert len(rows) <= 8
    assert {row["method"] for row in rows} >= {"plain", "args", "pargs", "cd"}
    assert ["|", "pargs", "|", "2"] in [line.split()[:4] for line in everything.splitlines()]
    assert "±" not in (tmp_path / "demo.md").read_text()  # nothing varies in one run
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    texts = re.findall(r"^    (plain|args|pargs) +-?\d\.\d\d  .+", everything, re.MULTILINE)
    assert texts == ["plain", "args", "pargs"]
    assert everything.count(f'"{HELD_OUT_PROMPTS[0]}" under three methods') == 1

    trained = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")}
    assert len(trained) == 4  # the reference and a reward model of each kind
    command = re.search(r"pargs (trace .+)\\\n(.+)\n", everything).groups()
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(" ".join(command))) == 0
    assert (tmp_path / "trace.html").exists()
    capsys.readouterr()

    run(tmp_path, quick=True)  # reuses what it trained, and says the same
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")} == trained
    assert capsys.readouterr().out == everything


def test_what_is_said_of_the_world_is_so():
    """The example is a journey, and gold lies where the text says: by the tables of the automata, which are exact."""
    (example,) = (line.strip() for line in demo.__doc__.splitlines() if line.startswith("    "))
    prompt, response = example.split(" : ")
    assert Journey().gold([f"{prompt} :"], [response]) == [2.5]
    golds = {reward for automaton in Journey().automata.values() for reward in automaton.rewards}
    said = re.search(r"from (\S+) to (\S+), or (\S+) for", " ".join(demo.__doc__.split())).groups()
    assert (min(golds - {OFF_GRAMMAR}), max(golds), OFF_GRAMMAR) == tuple(map(float, said))
