"""What the README promises is there: its commands, their options, its equations, its links."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LINES = re.sub(r"\\\n *", "", README).splitlines()  # a command that goes on in the next line is one
COMMANDS = [line.strip() for line in LINES if re.match(r"    (python|pargs) ", line)]


def test_two_commands_set_everything_up():
    demo, test = (line for line in COMMANDS if line.startswith("python -m venv"))
    assert demo == "python -m venv .venv && .venv/bin/pip install -e . -c constraints.txt && .venv/bin/pargs demo"
    assert test == "python -m venv .venv && .venv/bin/pip install -e '.[test]' -c constraints.txt && .venv/bin/pytest"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.parametrize("command", sorted({line.split()[1] for line in COMMANDS if line.startswith("pargs")}))
def test_commands_take_the_options_that_are_shown(command):
    run = subprocess.run(
        [sys.executable, "-m", "pargs_min", command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    shown = {flag for line in COMMANDS if line.startswith(f"pargs {command}") for flag in re.findall(r"--[\w-]+", line)}
    assert shown <= set(re.findall(r"--[\w-]+", run.stdout))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(pargs_min\.[\w.]+)`", README))))
def test_equations_live_where_the_table_says(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute) if module != "pargs_min" else import_module(name)
    assert found.__doc__


def test_links_within_the_project_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
