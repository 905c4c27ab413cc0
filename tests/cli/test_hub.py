"""The card of a trained model, which must be true, and its way to the hub, of which there is none here."""
# ruff: noqa: F811 (the fixture `made` is another file's)

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from pargs_min.cli import main
from pargs_min.cli.hub import model_card, told
from tests.cli.test_replacing import made, refused, train  # noqa: F401
from tests.strategies import tiny_reward_model, tiny_tokenizer

RECORD = dict(objective="partial", tail="extend", append_eos=True, prompt_format="text")
ABOUT = dict(name="me/guide", base="owner/base", dataset="owner/pairs:train", reference="owner/base")
SAID = dict(counts={"learned from": 44}, metrics={"eval_accuracy": 0.75, "train_runtime": 12.3, "eval_loss": 0.5})


def card(**changes):
    model = tiny_reward_model(vocabulary=14)
    model.config.pargs = RECORD | changes
    return ModelCard(model_card(model, tiny_tokenizer(), **ABOUT, **SAID))


def blocks(text, language):
    return [part.partition("```")[0] for part in text.split(f"```{language}\n")[1:]]


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_what_the_card_says_can_be_run(made, monkeypatch, capsys, command):
    """The header is read by the hub's own reader; the command and the Python lines write texts."""
    if command == "dpo":
        pytest.importorskip("trl")
    few = ["--max-steps", "2", "--use-cpu", "True", "--disable-tqdm", "True", "--report-to", "none"]
    data = ["--model", str(made / "lm"), "--dataset", str(made / "pairs.jsonl"), "--output-dir", str(made / "guide")]
    assert main([command, *data, *few]) == 0
    found = ModelCard.load(made / "guide" / "README.md")
    kind = {"train": "text-classification", "dpo": "text-generation"}[command]
    assert (found.data.library_name, found.data.pipeline_tag, found.data.base_model) == ("transformers", kind, None)
    assert str(made) not in found.content
    assert "pairs.jsonl: 44 learned from, 5 held out" in found.text
    assert "`</s>`" in found.text
    assert "eval_loss" in found.text

    (line,) = blocks(found.text, "bash")
    words = line.split()
    assert words[:2] == ["pargs", "generate"]
    assert main([*words[1:], "--device", "cpu", "--max-new-tokens", "3"]) == 0
    assert len(Path("texts.jsonl").read_text().splitlines()) == 3
    (lines,) = blocks(found.text, "python")
    capsys.readouterr()
    exec(lines.replace('"..."', '"a b"').replace("**models", "**models, max_new_tokens=3"), {})
    assert capsys.readouterr().out.strip()


def test_the_card_says_how_the_guide_was_trained_and_is_to_be_used():
    found = card(reference=dict(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0), objective="soft", lam=2.0)
    assert (found.data.base_model, found.data.datasets) == ("owner/base", ["owner/pairs"])
    assert found.data.tags == ["pargs-min", "reward-guided-generation", "soft"]
    assert found.data.license is None
    (line,) = blocks(found.text, "bash")
    assert "--model owner/base --reward-model me/guide --method soft --beta 2.0 --ref-temperature 0.7 --pro" in line
    assert "method='soft', beta=2.0, ref_temperature=0.7" in blocks(found.text, "python")[0]
    assert "| eval_accuracy |   0.75 |" in found.text
    assert "train_runtime" not in found.text  # the same training writes the same card
    assert "| head              | one reward per prefix" in found.text
    assert "--beta 3 " in card(distilled=dict(beta=3, top_k=5)).text


def test_of_paths_the_last_part_alone_is_told(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    assert [told(str(tmp_path / "pairs.jsonl")), told(f"{tmp_path}/"), told("owner/name")] == [
        "pairs.jsonl", tmp_path.name, "owner/name",
    ]  # fmt: skip


def test_a_card_changes_no_model_and_replaces_nothing_unasked(made, capsys):
    assert train("out") == 0
    assert main([*GENERATE, "--output", "texts.jsonl"]) == 0
    with Path("out/README.md").open("a") as file:
        file.write("mine")
    assert main([*GENERATE, "--output", "texts.jsonl", "--num-samples", "2", "--resume"]) == 0
    Path("other").mkdir()
    Path("other/README.md").write_text("mine")
    assert train("other") == 2
    assert refused(capsys, "--output-dir other holds README.md")
    assert Path("other/README.md").read_text() == "mine"


GENERATE = ["generate", "--model", "lm", "--reward-model", "out", "--prompts", "prompts.txt", "--device", "cpu"]
GENERATE += ["--max-new-tokens", "4"]


# ---- pushing: no call of these leaves the machine ----


@pytest.fixture
def pushed(monkeypatch):
    """What the hub would have been asked; uploads take what the patterns let through."""
    asked = []

    def create_repo(self, name, **settings):
        asked.append((name, self.token, settings))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.append((repo_id, sorted(kept)))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return asked


PUSH = ["--push-to-hub", "True", "--hub-model-id", "me/guide"]


def test_the_saved_model_is_pushed_with_its_card_and_nothing_else(made, capsys, pushed):
    assert train("out", *PUSH, "--hub-token", "secret", "--hub-private-repo", "True") == 0
    assert "pushed to https://hub/me/guide" in capsys.readouterr().out
    (name, token, settings), (_, files) = pushed
    assert (name, token, settings) == ("me/guide", "secret", dict(private=True, exist_ok=True))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not [file for file in files if "checkpoint" in file or file == "pargs.json"]
    assert "--reward-model me/guide" in Path("out/README.md").read_text()
    assert json.loads(Path("out/config.json").read_text())["pargs"]["objective"] == "partial"
    assert "secret" not in "".join(file.read_text("utf-8") for file in Path("out").glob("*.json"))


def test_a_push_that_fails_is_one_line_after_the_model_has_been_saved(made, capsys, monkeypatch):
    def no_network(*_, **__):
        raise ConnectionResetError("no network\nat all")

    monkeypatch.setattr(HfApi, "create_repo", no_network)
    assert train("out", *PUSH) == 2
    assert refused(
        capsys, "out is saved, but cannot be pushed to me/guide (no network at all)", "hf upload me/guide out"
    )
    assert Path("out/config.json").exists()
    assert main([*GENERATE, "--output", "texts.jsonl"]) == 0


def test_the_way_out_that_a_failed_push_names_is_there():
    """`hf upload` knows these arguments."""
    hf = Path(sys.executable).with_name("hf")
    helped = subprocess.run([hf, "upload", "--help"], capture_output=True, text=True).stdout
    assert "--exclude" in helped
    assert "REPO_ID" in helped


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--push-to-hub", "True"],
            "hub_model_id (--hub-model-id) must be OWNER/NAME to push to (--push-to-hub), got None",
        ),
        ([*PUSH[:3], "not/a/name"], "(--push-to-hub), got 'not/a/name'"),
    ],
)
def test_where_it_goes_is_checked_before_training(made, capsys, more, message):
    assert train("out", *more) == 2
    assert refused(capsys, message)
    assert not Path("out").exists()
