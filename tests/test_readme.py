"""What the README and its pages promise is there: commands, their options, equations, code, links."""

import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from transformers import GenerationConfig

from pargs_min.cli import main
from pargs_min.models import load_reward_model, load_tokenizer, save_reward_model
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "tutorials/README.md",
    "tutorials/COMMANDS.md",
    "tutorials/RESULTS.md",
    "tutorials/SMALL_GPU.md",
    "tutorials/SERVING.md",
]
TEXT = {page: (ROOT / page).read_text("utf-8") for page in [*PAGES, "theory/README.md"]}
README = TEXT["README.md"]
# (name, options) of each call of the command line; one that continues on the next line is one call.
SHOWN = "\n".join(re.sub(r"\\\n *", "", TEXT[page]) for page in PAGES)
CALLS = re.findall(r"^ {4}.*?(?:pargs|-m pargs_min) ([a-z]+)\b(.*)$", SHOWN, re.MULTILINE)
CALLS += re.findall(r"`pargs ([a-z]+)\b([^`]*)`", SHOWN)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_two_commands_set_everything_up():
    demo, test = (line.strip() for line in README.splitlines() if line.startswith("    python -m venv"))
    assert demo == "python -m venv .venv && .venv/bin/pip install -e . -c constraints.txt && .venv/bin/pargs demo"
    assert test == "python -m venv .venv && .venv/bin/pip install -e '.[test]' -c constraints.txt && .venv/bin/pytest"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.parametrize("command", sorted(dict(CALLS)))
def test_commands_take_the_options_that_are_shown(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = {flag for name, options in CALLS if name == command for flag in re.findall(r"--[\w-]+", options)}
    assert shown <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(pargs_min\.[\w.]+)`", "".join(TEXT.values())))))
def test_equations_live_where_the_table_says(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute, None) or import_module(name)
    assert found.__doc__


def test_its_code_runs_on_what_the_demonstration_leaves(tmp_path, monkeypatch, capsys):
    demo = tmp_path / "runs" / "demo"
    shutil.copytree(ROOT / "pargs_min" / "world" / "reference_model", demo / "reference")
    untrained = load_reward_model(demo / "reference", head="scalar")
    save_reward_model(untrained, load_tokenizer(demo / "reference"), demo / "models" / "partial-labels=soft-seed=0")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"\w+ \w+", capsys.readouterr().out)


@pytest.mark.parametrize("page", TEXT)
def test_links_within_the_project_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", TEXT[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), anchor


def anchors(text: str) -> set[str]:
    """How the headings of a page are linked: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_links_every_tutorial_and_page():
    for path in [*(ROOT / "tutorials").glob("*.ipynb"), *(ROOT / page for page in PAGES[1:])]:
        assert f"]({path.relative_to(ROOT).as_posix()})" in README


def test_guidance_inside_transformers_is_the_guided_policy_alone(monkeypatch):
    """Whatever the generation configuration of the model holds."""
    lm, tokenizer, asked = tiny_lm(vocabulary=14), tiny_tokenizer(), []
    warped = dict(do_sample=True, temperature=0.2, top_p=0.3, top_k=2, min_p=0.4, repetition_penalty=3.0)
    lm.generation_config = GenerationConfig(eos_token_id=[1, 5], **warped)
    sample = type(lm)._sample
    monkeypatch.setattr(
        type(lm), "_sample", lambda self, *a, **k: asked.append(k["logits_processor"]) or sample(self, *a, **k)
    )
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT["tutorials/COMMANDS.md"], re.MULTILINE | re.DOTALL)
    given = dict(lm=lm, tokenizer=tokenizer, reward_model=tiny_reward_model(vocabulary=14), prompts=["a b", "c"])
    exec(compile(code.replace("=64", "=9"), "COMMANDS.md", "exec"), given)
    assert [type(one).__name__ for one in asked[0]] == ["RewardGuidance"]
    assert lm.generation_config.eos_token_id == [1, 5]
