"""What a command may replace, go on from, and must refuse: files that are there before it begins."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pargs_min.cli import main
from pargs_min.models import load_tokenizer, save
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_codec import chat_tokenizer

WORDS = "abcdefg"
QUIET = ["--disable-tqdm", "True", "--use-cpu", "True", "--report-to", "none"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder, the working directory, with a language model, a reward model, pairs and prompts."""
    monkeypatch.chdir(tmp_path)
    save(tiny_lm(vocabulary=14, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).float(), tiny_tokenizer(), "lm")
    rm = tiny_reward_model(vocabulary=14).float()
    rm.config.pargs = {"objective": "full", "prompt_format": "text"}
    save(rm, tiny_tokenizer(), "rm")
    records = [{"prompt": f"{w} {v}", "chosen": f"a {w}", "rejected": f"b {v} c"} for w in WORDS for v in WORDS]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    Path("prompts.txt").write_text("a b\nc\nd e f\n")
    return tmp_path


def train(out, *more, model="lm", data="pairs.jsonl"):
    few = ["--max-steps", "2", "--save-steps", "1", "--save-total-limit", "5", *QUIET]
    return main(["train", "--model", str(model), "--dataset", str(data), "--output-dir", str(out), *few, *more])


def ppo(out, *more):
    few = ["--updates", "2", "--batch-size", "4", "--minibatch-size", "2", "--max-new-tokens", "4", "--device", "cpu"]
    models = ["--model", "lm", "--reward-model", "rm", "--prompts", "prompts.txt"]
    return main(["ppo", *models, "--output-dir", str(out), *few, "--save-every", "1", *more])


def generate(out, *more):
    few = ["--max-new-tokens", "4", "--method", "plain", "--prompt-format", "text", "--device", "cpu"]
    return main(["generate", "--model", "lm", "--prompts", "prompts.txt", "--output", str(out), *few, *more])


def weights(folder):
    return Path(folder, "model.safetensors").read_bytes()


def refused(capsys, *parts):
    """One line of error that holds all parts."""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pargs: error: ")
    assert all(part in last for part in parts), last
    return True


@pytest.mark.parametrize("command", [train, ppo])
def test_resuming_replaces_no_model_of_another(made, capsys, command):
    shutil.copytree("lm", "own")
    assert command("own", "--resume") == 2
    assert refused(capsys, "holds config.json, which would be replaced")
    assert weights("own") == weights("lm")
    assert command("other") == 0
    for one in Path("other").iterdir():  # a checkpoint without the recipe of its run
        if "checkpoint" in one.name:
            (shutil.copytree if one.is_dir() else shutil.copy)(one, Path("own", one.name))
    assert command("own", "--resume") == 2
    assert weights("own") == weights("lm")
    for more in (["--resume"], ["--resume", "--overwrite"]):
        assert command("other", *more, "--seed", "5") == 2


def test_a_finished_run_without_checkpoints_is_not_begun_again_by_resuming(made, capsys):
    assert train("out", "--save-strategy", "no") == 0
    assert train("out", "--save-strategy", "no", "--resume") == 2
    assert refused(capsys, "holds config.json, which would be replaced")
    assert train("out", "--save-strategy", "no", "--resume", "--seed", "5") == 2
    assert refused(capsys, "seed 42 there, 5 now")


def test_a_run_that_another_has_replaced_since_is_not_resumed(made, capsys, monkeypatch):
    """Its recipe is compared again when nobody else writes there any more."""
    assert train("out") == 0

    def replaced(*_):
        recipe = json.loads(Path("out/pargs.json").read_text())
        Path("out/pargs.json").write_text(json.dumps(recipe | {"objective": "full"}))
        return [], []

    monkeypatch.setattr("pargs_min.data.split_by_prompt", replaced)
    assert train("out", "--resume") == 2
    assert refused(capsys, "objective 'full' there, 'partial' now")


def test_a_model_in_the_output_folder_is_not_lost(made, capsys):
    assert train("out") == 0
    assert train("out", "--overwrite", model="out/checkpoint-2") == 2
    assert refused(capsys, "holds out/checkpoint-2, which is a model that is read")
    assert Path("out/checkpoint-2").exists()


def test_a_new_model_has_no_file_of_the_old_one(made):
    assert train("out") == 0
    assert load_tokenizer("out").chat_template
    shutil.copytree("lm", "bare")
    Path("bare/chat_template.jinja").unlink()
    Path("out/notes.txt").write_text("mine")
    assert train("out", "--overwrite", model="bare") == 0
    assert not load_tokenizer("out").chat_template
    assert Path("out/notes.txt").exists()
    assert not Path("out/model.unfinished").exists()


@pytest.mark.parametrize("name", ["sd15.safetensors", "spm.model", "tokenizer.json", "README.md"])
def test_no_file_of_others_is_replaced_unasked(made, capsys, monkeypatch, name):
    """A model is saved as files of many names; a folder that holds one of them need not hold a model."""
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    monkeypatch.setattr("pargs_min.data.encode_preferences", lambda *_, **__: pytest.fail("it was begun"))
    for command in (train, ppo):
        assert command("out") == 2
        assert refused(capsys, f"holds {name}, which would be replaced")
        assert Path("out", name).read_text() == "mine"
    monkeypatch.undo()
    os.chdir(made)
    Path("out/tokenizer-runs").mkdir()
    Path("out/tokenizer-runs/log").write_text("mine")
    assert train("out", "--overwrite") == 0
    assert Path("out/tokenizer-runs/log").exists()


def test_a_model_that_is_half_replaced_is_none(made, monkeypatch):
    """config.json goes first and comes last."""
    moved = []

    def killed(file, target):
        moved.append(target.name)
        assert not Path("lm/config.json").exists()
        if len(moved) > 1:
            raise InterruptedError

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(InterruptedError):
        save(tiny_lm(vocabulary=14, seed=3).float(), tiny_tokenizer(), "lm")
    assert "config.json" not in moved


@pytest.mark.parametrize(
    "more",
    [
        ["--per-device-train-batch-size", "4"],
        ["--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "3"],
        ["--train-sampling-strategy", "sequential"],
        ["--ignore-data-skip", "True"],
        ["--neftune-noise-alpha", "5"],
        ["--average-tokens-across-devices", "False"],
    ],
)
def test_settings_that_change_the_weights_are_those_of_the_run(made, capsys, more):
    eight = ["--per-device-train-batch-size", "8"]
    assert train("out", *eight) == 0
    assert train("out", *eight, *more, "--resume") == 2
    assert refused(capsys, "was made with other options")
    assert train("out", "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "4", "--resume") == 0


def test_data_from_a_pipe_trains_and_is_never_the_same_again(made, capsys):
    def through_a_pipe(*more):
        end, pipe = os.pipe()
        with os.fdopen(pipe, "wb") as file:  # it fits into the pipe
            file.write(Path("pairs.jsonl").read_bytes())
        try:
            return train("out", *more, data=f"/dev/fd/{end}")
        finally:
            os.close(end)

    assert through_a_pipe() == 0
    assert through_a_pipe("--resume") == 2
    assert refused(capsys, "content of dataset", "cannot be read again")


def test_what_is_written_into_a_models_folder_does_not_change_the_model(made):
    for _ in range(2):
        assert train("lm/rm", "--resume") == 0
        assert generate("lm/texts.jsonl", "--resume") == 0


def test_ppo_goes_on_from_another_place(made, capsys):
    assert ppo("out") == 0
    assert ppo(made / "out", "--resume", "--save-every", "2") == 0
    Path("out").rename("moved")
    assert ppo("moved", "--resume") == 0
    assert ppo("moved", "--resume", "--reward-model", "lm") == 2
    assert refused(capsys, "was made with other options")


def test_what_is_only_called_like_a_checkpoint_is_none(made):
    assert train("out") == 0
    Path("out/checkpoint-notes.txt").write_text("mine")
    shutil.copytree("out/checkpoint-2", "out/checkpoint-old")
    for more in ("--resume", "--overwrite"):
        assert train("out", more) == 0
    assert Path("out/checkpoint-notes.txt").exists()
    assert Path("out/checkpoint-old").exists()


def test_a_file_of_texts_takes_more_samples(made, capsys):
    for size in ("1", "4"):
        assert generate(f"{size}.jsonl", "--num-samples", "2") == 0
        assert generate(f"{size}.jsonl", "--num-samples", "3", "--batch-size", size, "--resume") == 0
        assert "wrote 3 texts" in capsys.readouterr().out
    assert generate("1.jsonl", "--num-samples", "1", "--resume") == 0
    assert "wrote 0 texts" in capsys.readouterr().out
    assert generate("whole.jsonl", "--num-samples", "3") == 0

    def read(file):
        records = map(json.loads, Path(file).read_text().splitlines())
        return {(one["prompt_number"], one["sample"]): (one["response_ids"], one["ref_log_prob"]) for one in records}

    assert len(read("whole.jsonl")) == 9
    for size in ("1", "4"):
        for key, (ids, log_prob) in read(f"{size}.jsonl").items():
            assert ids == read("whole.jsonl")[key][0]
            assert log_prob == pytest.approx(read("whole.jsonl")[key][1], rel=1e-5)


@pytest.mark.parametrize("name", ["answers.jsonl", "verdicts.jsonl", "evaluation.md"])
def test_an_evaluation_does_not_replace_what_it_reads(made, capsys, name):
    assert generate(f"ev/{name}") == 0
    before = Path("ev", name).read_bytes()
    Path("link").symlink_to("ev")
    assert main(["evaluate", f"ev/{name}", "--output-dir", "link"]) == 2
    assert refused(capsys, f"ev/{name} is read, and would be replaced")
    assert Path("ev", name).read_bytes() == before


def test_an_evaluation_belongs_together(made, monkeypatch):
    """No figure of an earlier one stays, and its JSON is written last."""
    assert generate("a.jsonl") == 0
    Path("plain.jsonl").write_text(json.dumps({"instruction": "a b", "output": "x"}) + "\n")
    assert main(["evaluate", "a.jsonl", "--output-dir", "ev"]) == 0
    assert Path("ev/evaluation.png").exists()
    assert main(["evaluate", "plain.jsonl", "--output-dir", "ev", "--overwrite"]) == 0
    assert not Path("ev/evaluation.png").exists()

    def full(*_):
        assert not Path("ev/evaluation.json").exists()
        raise OSError("full")

    monkeypatch.setattr("pargs_min.cli.evaluate.save", full)
    assert main(["evaluate", "a.jsonl", "--output-dir", "ev", "--overwrite"]) == 2
    assert not Path("ev/evaluation.json").exists()


# ---- damage ----


def half(data):
    return data[: len(data) // 2]


DAMAGE = {"half": half, "empty": lambda data: b"", "a list": lambda data: b"[]"}
each_damage = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


@each_damage
def test_a_damaged_checkpoint_is_named(made, capsys, damage):
    assert train("out") == 0
    checkpoint = Path("out/checkpoint-2")
    files = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json", "model.safetensors"]
    for file in [*(checkpoint / name for name in files), Path("out/pargs.json")]:
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert train("out", "--resume") == 2
        assert refused(capsys, file.name, "is damaged" if damage(whole) != b"[]" else file.name)
        file.write_bytes(whole)
    assert train("out", "--resume") == 0


@each_damage
def test_a_damaged_checkpoint_of_ppo_is_named(made, capsys, damage):
    assert ppo("out") == 0
    for name in ("checkpoint.pt", "pargs.json"):
        whole = Path("out", name).read_bytes()
        Path("out", name).write_bytes(damage(whole))
        assert ppo("out", "--resume", "--updates", "3") == 2
        assert refused(capsys, f"out/{name} is damaged")
        Path("out", name).write_bytes(whole)


FULL = """
import resource, sys
from pargs_min.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("share", [0.3, 1.5])
def test_a_full_disk_is_one_line(made, share):
    """Files cannot have more than a share of the weights' bytes: first the weights fail, then the optimizer's state."""
    limit = str(int(share * len(weights("lm"))))
    few = ["--model", "lm", "--dataset", "pairs.jsonl", "--max-steps", "1", "--save-steps", "1", *QUIET]
    command = [sys.executable, "-c", FULL, limit, "train", *few, "--output-dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pargs: error: out cannot be written" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-train-epochs", "0", "--max-steps", "-1"], "num_train_epochs (--num-train-epochs) must be a positive"),
        (["--num-train-epochs", "-1", "--max-steps", "-1"], "num_train_epochs"),
        (["--num-train-epochs", "nan", "--max-steps", "-1"], "num_train_epochs"),
        (["--max-steps", "0"], "max_steps (--max-steps) must be at least 1"),
        (["--per-device-eval-batch-size", "0"], "per_device_eval_batch_size (--per-device-eval-batch-size) must be"),
        (["--per-device-train-batch-size", "-1"], "per_device_train_batch_size"),
        (["--learning-rate", "nan"], "learning_rate (--learning-rate) must be"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--max-grad-norm", "nan"], "max_grad_norm (--max-grad-norm) must be a number, got nan"),
        (["--deepspeed", "x.json"], "deepspeed"),
        (["--optim", "adamw_bnb_8bit"], "transformers cannot train with these settings"),
        (["--lr-scheduler-kwargs", '{"nope": 1}'], "transformers cannot train with these settings"),
        (["--metric-for-best-model", "nope", "--load-best-model-at-end", "--eval-strategy", "steps"], "nope"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_one_line(made, capsys, more, message):
    assert train("out", "--eval-steps", "1", *more) == 2
    assert refused(capsys, message)
    assert not Path("out/config.json").exists()


def test_what_cannot_value_texts_is_said_before_ppo_begins(made, capsys):
    save(tiny_reward_model(vocabulary=14, max_position_embeddings=6).float(), tiny_tokenizer(), "short")
    save(tiny_reward_model(vocabulary=14).float(), chat_tokenizer(), "other")
    for model, said in (("short", "context of 6"), ("other", "differ at")):
        assert ppo("out", "--value-model", model) == 2
        assert refused(capsys, said)
        assert not Path("out").exists()


@pytest.mark.parametrize("number", ["0", "-5", "99999999999999999999"])
@pytest.mark.parametrize("name", ["num-samples", "max-new-tokens", "n"])
def test_counts_are_checked_before_anything_is_counted_up(made, capsys, name, number):
    assert generate("out.jsonl", f"--{name}", number) == 2
    assert refused(capsys, f"{name.replace('-', '_')} must be at least 1, and at most 1,000,000, got {number}")


def test_who_wants_what_another_makes_waits_for_it(tmp_path):
    from pargs_min.store import kept

    begun, may_end, made = threading.Event(), threading.Event(), []

    def make(path):
        made.append(path)
        begun.set()
        assert may_end.wait(10)
        path.write_text("whole")

    def want():
        kept(tmp_path / "x", {"seed": 0}, make)

    first, second = (threading.Thread(target=want) for _ in range(2))
    first.start()
    assert begun.wait(10)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    may_end.set()
    first.join()
    second.join()
    assert len(made) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x", "x.made.json"]
