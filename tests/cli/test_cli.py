import gc
import json
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from pargs_min import methods
from pargs_min.cli import main
from pargs_min.cli.train import RECIPES, rated
from pargs_min.codec import Codec, special_ids
from pargs_min.models import load_reward_model, load_tokenizer, save_reward_model
from pargs_min.reading import record_rewards
from pargs_min.records import read_responses
from pargs_min.reward_model import has_vocabulary_head, prefix_rewards, recorded
from pargs_min.texts import generate_texts
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_codec import TURNS, chat_tokenizer

WORDS = "abcdefg"


@pytest.fixture
def lm(tmp_path):
    """The folder of a tiny language model."""
    folder = tmp_path / "lm"
    tiny_lm(vocabulary=14, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"{w} {v}", "chosen": f"a {w}", "rejected": f"b {v} c"} for w in WORDS for v in WORDS]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def train(lm, pairs, out, *more):
    few = ["--max-steps", "2", "--save-steps", "1", "--disable-tqdm", "True", "--use-cpu", "True"]
    return main(["train", "--model", str(lm), "--dataset", str(pairs), "--output-dir", str(out), *few, *more])


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"]])
def test_a_reader_that_leaves_is_no_error(arguments):
    """As in `pargs --help | head -1`."""
    end, pipe = os.pipe()
    os.close(end)
    command, buffered = [sys.executable, "-m", "pargs_min", *arguments], os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=buffered)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_is_instant():
    code = "import sys; from pargs_min.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train a reward model" in done.stdout
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split("\n")[-2].split())


def test_train_saves_a_model_that_transformers_loads_and_that_says_how_it_was_made(lm, pairs, tmp_path, capsys):
    assert train(lm, pairs, tmp_path / "out", "--eval-fraction", "0.2") == 0
    out = capsys.readouterr().out
    assert "49 read, 49 kept" in out
    assert "eval_accuracy_50_percent" in out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pargs == {
        "objective": "partial",
        "tail": "extend",
        "reduction": "prefix",
        "append_eos": True,
        "prompt_format": "text",
    }
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")("a b </s>")["input_ids"]])
    with torch.no_grad():
        own = prefix_rewards(model, ids, torch.ones_like(ids))[:, -1:]
        torch.testing.assert_close(model(ids).logits, own)


def test_responses_that_were_cut_are_compared_up_to_the_shorter_one(lm, pairs, tmp_path, capsys):
    assert train(lm, pairs, tmp_path / "out", "--no-append-eos") == 0
    settings = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.pargs
    assert (settings["objective"], settings["tail"], settings["append_eos"]) == ("partial", "min", False)
    assert train(lm, pairs, tmp_path / "other", "--no-append-eos", "--tail", "extend") == 2
    assert "drop one of the two" in capsys.readouterr().err


def test_an_earlier_run_is_gone_on_with_or_left_alone(lm, pairs, tmp_path, capsys):
    assert train(lm, pairs, tmp_path / "out") == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert train(lm, pairs, tmp_path / "out", "--seed", "5") == 2
    assert "add --resume" in capsys.readouterr().err
    assert train(lm, pairs, tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert train(lm, pairs, tmp_path / "out", "--overwrite", "--seed", "5") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights


def test_a_trained_model_is_never_replaced_unasked_and_the_one_that_is_read_never(lm, pairs, tmp_path, capsys):
    whole = ["--save-strategy", "no"]
    assert train(lm, pairs, tmp_path / "out", *whole) == 0
    weights, original = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", lm))
    assert train(lm, pairs, tmp_path / "out", *whole, "--seed", "5") == 2
    assert "holds config.json, which would be replaced" in capsys.readouterr().err
    assert train(lm, pairs, lm, *whole, "--overwrite") == 2
    assert "is a model that is read" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert (lm / "model.safetensors").read_bytes() == original


@pytest.mark.parametrize("change", ["pairs", "model", "learning rate"])
def test_a_run_goes_on_with_the_contents_it_began_with(lm, pairs, tmp_path, capsys, change):
    """Under the same names; what was trained stays."""
    assert train(lm, pairs, tmp_path / "out") == 0
    weights, more = (tmp_path / "out" / "model.safetensors").read_bytes(), []
    if change == "pairs":
        pairs.write_text(
            pairs.read_text().replace("chosen", "-").replace("rejected", "chosen").replace("-", "rejected")
        )
    elif change == "model":
        tiny_lm(vocabulary=14, seed=3).float().save_pretrained(lm)
    else:
        more = ["--learning-rate", "5e-3"]
    assert train(lm, pairs, tmp_path / "out", "--resume", *more) == 2
    what = {"pairs": "content of dataset", "model": "content of model", "learning rate": "learning_rate"}[change]
    assert f"was made with other options ({what} " in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_is_a_reward_model_that_knows_its_form(lm, pairs, tmp_path):
    assert train(lm, pairs, tmp_path / "out") == 0
    folder = tmp_path / "out" / "checkpoint-2"
    assert recorded(load_reward_model(folder)) == recorded(load_reward_model(tmp_path / "out"))
    assert recorded(load_reward_model(folder))["prompt_format"] == "text"
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(tmp_path / "out").get_vocab()


@pytest.mark.parametrize(
    ("more", "differ"),
    [
        (["--objective", "full"], "(objective 'partial' there, 'full' now; tail 'extend' there, None now; "),
        (["--tail", "min", "--reduction", "pair"], "(tail 'extend' there, 'min' now; reduction 'prefix' there, 'pair'"),
        (["--dataset", "others.jsonl"], "pairs.jsonl' there, 'others.jsonl' now)"),
        (["--seed", "5"], "(seed 42 there, 5 now)"),
    ],
)
def test_a_run_goes_on_with_the_options_it_began_with(lm, pairs, tmp_path, capsys, monkeypatch, more, differ):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others.jsonl").write_text(pairs.read_text())
    assert train(lm, pairs, tmp_path / "out") == 0
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert train(lm, pairs, tmp_path / "out", "--resume", *more) == 2
    assert differ in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    assert train(lm, pairs, tmp_path / "out", "--resume", "--tail", "extend") == 0  # the default, spelled out


def test_what_a_run_began_with_is_checked_before_anything_is_loaded(lm, pairs, tmp_path, capsys):
    assert train(lm, pairs, tmp_path / "out") == 0
    assert train("nowhere/at-all", "nowhere.jsonl", tmp_path / "out", "--resume") == 2
    assert "'nowhere/at-all' now" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "dpo"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-length", "0"], "max_length (--max-length) must be at least 1, got 0"),
        (["--label-smoothing-factor", "0.1"], "(--label-smoothing-factor) must be 0.0, got 0.1"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(tmp_path, capsys, command, more, message):
    nowhere = ["--model", "nowhere/at-all", "--dataset", "nowhere.jsonl", "--output-dir", str(tmp_path)]
    assert main([command, *nowhere, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_texts_longer_than_the_model_reads_are_not_asked_of_it(lm, pairs, tmp_path, capsys, command):
    options = ["--model", str(lm), "--dataset", str(pairs), "--output-dir", str(tmp_path / "out"), "--max-length", "65"]
    assert main([command, *options, "--use-cpu", "True"]) == 2
    assert "max_length (--max-length) 65 is beyond the model's context of 64" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_training_that_diverges_leaves_no_model(lm, pairs, tmp_path, capsys, command):
    out = tmp_path / "out"
    options = ["--model", str(lm), "--dataset", str(pairs), "--output-dir", str(out), "--learning-rate", "1e38"]
    options += [
        "--optim",
        "sgd",
        "--warmup-steps",
        "0",
        "--max-steps",
        "3",
        "--disable-tqdm",
        "True",
        "--use-cpu",
        "True",
    ]
    assert main([command, *options]) == 2
    assert "training diverged at step 2; lower --learning-rate" in capsys.readouterr().err
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize(("objective", "method"), [("partial", "pargs"), ("farma", "farma")])
def test_a_model_trained_by_adapters_is_an_ordinary_one_that_guides(
    lm, pairs, prompts, tmp_path, capsys, objective, method
):
    assert train(lm, pairs, tmp_path / "out", "--lora-rank", "2", "--objective", objective) == 0
    assert train(lm, pairs, tmp_path / "out", "--resume") == 2
    assert "lora_rank 2 there, None now" in capsys.readouterr().err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pargs["lora_rank"] == 2
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch", "transformers"}
    guide = ["--reward-model", str(tmp_path / "out"), "--top-k", "4"]
    assert generate(lm, prompts, tmp_path / "texts.jsonl", *guide) == 0


def test_held_out_pairs_may_be_a_file_of_their_own(lm, pairs, tmp_path, capsys):
    assert train(lm, pairs, tmp_path / "out", "--eval-dataset", str(pairs)) == 0
    assert "eval_pairs                   49" in capsys.readouterr().out


def test_a_benchmark_is_reported_subset_by_subset(lm, pairs, tmp_path, capsys):
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    bench = [one | {"subset": "easy" if n % 7 else "hard", "id": n} for n, one in enumerate(records)]
    bench.append({"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, bench)))
    assert train(lm, pairs, tmp_path / "out", "--eval-dataset", str(tmp_path / "bench.jsonl")) == 0
    found = dict(re.findall(r"^(eval_\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    model, tokenizer = load_reward_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    won = {name: [] for name in ("easy", "hard", None)}
    codec = Codec(tokenizer, "text")
    for one in bench:
        prompt, sides = codec.encode(one["prompt"], [one["chosen"], one["rejected"]], True)
        ids = [torch.tensor([prompt + side]) for side in sides]
        chosen, rejected = (prefix_rewards(model, one, torch.ones_like(one))[0, -1].item() for one in ids)
        won[one.get("subset")].append((chosen > rejected) + 0.5 * (chosen == rejected))
    for name in ("easy", "hard"):
        assert float(found[f"eval_accuracy/{name}"]) == pytest.approx(sum(won[name]) / len(won[name]), abs=1e-3)
    assert float(found["eval_accuracy"]) == pytest.approx(sum(map(sum, won.values())) / 50, abs=1e-3)
    assert "eval_accuracy/None" not in found


def test_prompts_of_two_forms_are_refused_before_training(lm, pairs, tmp_path, capsys):
    mixed = tmp_path / "mixed.jsonl"
    chat = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    mixed.write_text(pairs.read_text() + "\n" + json.dumps(chat))
    for more in (["--dataset", str(mixed)], ["--eval-dataset", str(mixed)]):
        assert train(lm, pairs, tmp_path / "out", *more) == 2
        assert "prompts must all have one form, got chat, text" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "absent.jsonl"], "absent.jsonl"),
        (["--model", "absent"], "cannot load 'absent'"),
        (["--max-length", "2"], "raise --max-length"),
        (["--lora-rank", "0"], "lora_rank (--lora-rank) must be at least 1"),
        (["--eval-fraction", "2"], "eval-fraction"),
        (["--beta", "1"], "--beta"),
    ],
)
def test_bad_input_is_one_line_and_status_2(lm, pairs, tmp_path, capsys, more, message):
    assert train(lm, pairs, tmp_path / "out", *more) == 2
    err = capsys.readouterr().err
    assert err.startswith("pargs: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_command_names_those_there_are(capsys):
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "usage: pargs COMMAND" in capsys.readouterr().out


def generate(lm, prompts, out, *more):
    few = ["--num-samples", "2", "--max-new-tokens", "5", "--device", "cpu"]
    return main(["generate", "--model", str(lm), "--prompts", str(prompts), "--output", str(out), *few, *more])


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a b\nc\nd e f\n")
    return file


def test_a_trained_model_guides_and_every_text_says_how_it_was_made(lm, pairs, prompts, tmp_path, capsys):
    assert train(lm, pairs, tmp_path / "rm") == 0
    out = tmp_path / "out.jsonl"
    assert generate(lm, prompts, out, "--reward-model", str(tmp_path / "rm"), "--beta", "2", "--top-k", "4") == 0
    records = [json.loads(line) for line in out.open()]
    assert [(r["prompt"], r["sample"]) for r in records] == [(p, s) for p in ("a b", "c", "d e f") for s in (0, 1)]
    assert records[0]["settings"]["beta"] == 2
    assert {"response", "response_ids", "ref_log_prob", "kl", "reward", "finished"} <= set(records[0])


def test_controlled_decoding_from_samples_to_texts(lm, pairs, prompts, tmp_path, capsys):
    """A full-sequence reward model rates samples, a value model learns their prefixes, and guides."""
    assert train(lm, pairs, tmp_path / "rm", "--objective", "full") == 0
    samples = tmp_path / "samples.jsonl"
    plain = ["--method", "plain", "--num-samples", "4"]
    assert generate(lm, prompts, tmp_path / "chats.jsonl", *plain) == 0
    assert generate(lm, prompts, samples, *plain, "--prompt-format", "text") == 0
    value = ["--objective", "value", "--reward-model", str(tmp_path / "rm"), "--eval-fraction", "0.4"]
    assert train(lm, tmp_path / "chats.jsonl", tmp_path / "value", *value) == 2
    assert "write texts with --prompt-format text" in capsys.readouterr().err
    assert train(lm, samples, tmp_path / "value", *value) == 0
    assert "eval_correlation" in capsys.readouterr().out
    out, guide = tmp_path / "out.jsonl", ["--reward-model", str(tmp_path / "value")]
    assert generate(lm, prompts, out, "--method", "cd", *guide, "--top-k", "4") == 0
    assert "warning" not in capsys.readouterr().err
    smc = ["--method", "smc", "--particles", "3", "--final-reward-model", str(tmp_path / "rm"), "--top-k", "4"]
    assert generate(lm, prompts, tmp_path / "smc.jsonl", *guide, *smc) == 0
    assert train(lm, samples, tmp_path / "bad", "--objective", "value") == 2
    error = capsys.readouterr().err
    assert "written by `pargs generate --method plain`" in error
    assert "made by `pargs train --objective full`" in error


@pytest.fixture
def samples(lm, prompts, tmp_path, capsys):
    """Texts of the reference, four for each prompt."""
    file = tmp_path / "samples.jsonl"
    plain = ["--method", "plain", "--num-samples", "4", "--prompt-format", "text"]
    assert generate(lm, prompts, file, *plain) == 0
    return file


@pytest.fixture
def rater(lm, pairs, tmp_path, capsys):
    """A reward model of whole texts."""
    assert train(lm, pairs, tmp_path / "rater", "--objective", "full") == 0
    capsys.readouterr()
    return tmp_path / "rater"


@pytest.mark.parametrize(
    ("objective", "more", "method", "made"),
    [
        ("win", [], "win", {}),
        ("farma", [], "farma", {}),
        ("autoregressive", [], "genarm", {}),
        ("soft", ["--lambda", "2"], "soft", {"lam": 2.0}),
        ("reweighted", ["--beta", "2"], "reweighted", {"beta": 2.0}),
        ("partial", ["--soft-labels-from"], "pargs", {"soft_labels": True, "tail": "extend"}),
    ],
)
def test_every_objective_makes_a_model_that_guides(
    lm, pairs, samples, rater, prompts, tmp_path, capsys, recwarn, objective, more, method, made
):
    """And says so; guided by it nothing is warned of."""
    recipe = RECIPES[objective]
    data = samples if recipe.on_texts or more == ["--soft-labels-from"] else pairs
    more = [*more, str(rater)] if data == samples and not recipe.on_texts else more
    more = [*more, "--reward-model", str(rater)] if recipe.on_texts else more
    split = ["--objective", objective, "--eval-fraction", "0.4"]
    assert train(lm, data, tmp_path / "out", *split, *more) == 0
    said = capsys.readouterr().out
    assert "eval_loss" in said
    counted = re.search(r"texts per prompt: 4, effective under exp\(beta \* reward\): (.+)", said)
    assert bool(counted) == (data == samples)
    if counted:
        counts = [float(part.split()[0]) for part in counted[1].split(", ")]
        assert 4 >= counts[0] > counts[-1] >= 1
        assert counts == sorted(counts, reverse=True)
    few = [one for one in recwarn.list if "only 4 texts per prompt are effective" in str(one.message)]
    assert len(few) == (objective == "reweighted")
    recwarn.clear()
    recorded_with = json.loads((tmp_path / "out" / "config.json").read_text())["pargs"]
    made |= {"objective": objective, "prompt_format": "text"} | ({"append_eos": True} if data == pairs else {})
    assert recorded_with.items() >= made.items()
    assert ("append_eos" in recorded_with) == (data == pairs)  # texts say of themselves whether they ended
    guide = ["--reward-model", str(tmp_path / "out"), "--method", method, "--beta", "2", "--top-k", "4"]
    assert generate(lm, prompts, tmp_path / "guided.jsonl", *guide) == 0
    assert not recwarn.list
    assert train(lm, data, tmp_path / "out", *split, *more, "--resume") == 0


@pytest.mark.parametrize("closed", [TURNS, TURNS.replace("<|end|> ", "<|end|> : : ")])
def test_texts_to_train_on_are_rated_as_a_judge_reads_them(closed, tmp_path, monkeypatch):
    """Also by a published model of chats, whose template writes more behind an answer. It has left before training."""
    tokenizer, rm, alive = chat_tokenizer(closed), tiny_reward_model(vocabulary=12), []
    lm = tiny_lm(vocabulary=12)
    lm.generation_config.eos_token_id = 0
    for part in (rm, tokenizer):
        part.save_pretrained(tmp_path / "rm")

    def load(*given, **settings):
        alive.append(weakref.ref(model := load_reward_model(*given, **settings)))
        return model

    monkeypatch.setattr("pargs_min.models.load_reward_model", load)
    settings = dict(prompts=[{"prompt": "a b"}, {"prompt": "d"}], method="plain", num_samples=6, max_new_tokens=8)
    texts = [*generate_texts(lm, tokenizer, prompt_format="chat", **settings)]
    assert {text["finished"] for text in texts} == {True, False}
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    records, args = read_responses(tmp_path / "texts.jsonl"), TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    form, encode = rated(str(tmp_path / "rm"), tokenizer, None, args, "chat")
    found, _ = encode(records)
    judged = record_rewards(load_reward_model(str(tmp_path / "rm")), tokenizer)(texts)
    assert form == "chat"
    words = [
        not set(text["response_ids"][:-1]) & special_ids(tokenizer) for text in texts
    ]  # which a judge's text lacks
    assert sum(words) > 6
    for text, reward, alike in zip(found, judged, words, strict=True):
        assert not alike or text.reward == pytest.approx(reward, rel=1e-5)
    gc.collect()
    assert [ref() for ref in alive] == [None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["soft"], "--objective soft learns from texts of the reference (--dataset, written by `pargs generate"),
        (["reweighted"], "(--reward-model, made by `pargs train --objective full`): give both"),
        (["win", "--reward-model", "rm"], "--reward-model is for --objective value, soft, reweighted, got win"),
        (["full", "--soft-labels-from", "rm"], "--soft-labels-from is for --objective partial, got full"),
        (["full", "--lambda", "2"], "--lambda is for --objective soft, got full"),
        (["full", "--tail", "min"], "--tail is for --objective partial, got full"),
        (["win", "--reduction", "pair"], "--reduction is for --objective partial, got win"),
        (
            ["partial", "--soft-labels-from", "rm", "--reduction", "prefix"],
            "--reduction is for --objective partial, got partial with --soft-labels-from",
        ),
        (["soft", "--reward-model", "rm", "--no-append-eos"], "--no-append-eos is for preference pairs"),
        (["soft", "--reward-model", "rm", "--beta", "2"], "--beta is for --objective reweighted, got soft"),
        (["soft", "--distil-from", "rm", "--reward-model", "rm"], "--distil-from takes objective and labels from its"),
        (["partial", "--distil-from", "rm", "--soft-labels-from", "rm"], "drop --objective and the like"),
        (["partial", "--distil-from", "rm", "--top-k", "-1"], "top_k (--top-k) must be at least 1, or 0 for the whole"),
        (["partial", "--distil-from", "rm", "--beta", "0"], "beta (--beta) must be a positive number, got 0.0"),
        (["partial", "--top-k", "3"], "--top-k is for --distil-from"),
        (["soft", "--reward-model", "rm", "--lambda", "0"], "lam (--lambda) must be a positive number, got 0.0"),
        (["soft", "--reward-model", "rm", "--lambda", "nan"], "lam (--lambda) must be a positive number, got nan"),
        (["reweighted", "--reward-model", "rm", "--beta", "-1"], "beta (--beta) must be a positive number, got -1.0"),
        (["partial", "--load-best", "--eval-fraction", "0"], "--load-best needs held-out records: give --eval-dataset"),
    ],
)
def test_options_of_objectives_that_cannot_be_are_refused(lm, pairs, tmp_path, capsys, more, message):
    assert train(lm, pairs, tmp_path / "out", "--objective", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("objective", "method"), [("partial", "pargs"), ("soft", "soft")])
def test_a_distilled_head_guides_under_the_method_of_its_guide(
    lm, pairs, samples, rater, prompts, tmp_path, capsys, recwarn, objective, method
):
    scalar, out = tmp_path / "scalar", tmp_path / "out"
    soft = ["--objective", "soft", "--reward-model", str(rater)]
    assert train(lm, *(pairs, scalar) if objective == "partial" else (samples, scalar, *soft)) == 0
    distil = ["--distil-from", str(scalar), "--beta", "2", "--top-k", "4", "--eval-fraction", "0.4"]
    assert train(lm, samples, out, *distil) == 0
    assert "eval_divergence" in capsys.readouterr().out
    model = load_reward_model(out)
    assert has_vocabulary_head(model)
    assert recorded(model).items() >= {"objective": objective, "distilled": {"beta": 2.0, "top_k": 4}}.items()
    recwarn.clear()
    guide = ["--reward-model", str(out), "--method", method, "--beta", "2", "--top-k", "4"]
    assert generate(lm, prompts, tmp_path / "guided.jsonl", *guide) == 0
    assert not recwarn.list
    assert train(lm, samples, out, *distil, "--resume") == 0
    assert train(lm, samples, scalar, *distil, "--overwrite") == 2
    assert load_reward_model(scalar).score.out_features == 1
    assert train(lm, samples, tmp_path / "twice", "--distil-from", str(out)) == 2
    assert "has a vocabulary head already" in capsys.readouterr().err
    assert train(lm, pairs, tmp_path / "bad", "--distil-from", str(scalar)) == 2
    assert "texts of the reference, written by `pargs generate --method plain`" in capsys.readouterr().err
    tokens = json.loads((scalar / "tokenizer.json").read_text("utf-8"))
    tokens["model"]["vocab"] |= {"a": 8, "b": 7}
    (scalar / "tokenizer.json").write_text(json.dumps(tokens))
    assert train(lm, samples, tmp_path / "bad", "--distil-from", str(scalar)) == 2
    assert "the tokenizers of language model and reward model differ at 2 ids" in capsys.readouterr().err


def test_texts_of_a_guide_that_was_trained_on_ids_can_be_learned_from_and_judged(lm, prompts, tmp_path):
    pairs = tmp_path / "ids.jsonl"
    pair = {"prompt_ids": [2, 7], "chosen_ids": [8, 1], "rejected_ids": [9, 10, 1]}
    pairs.write_text((json.dumps(pair) + "\n") * 4)
    full = ["--objective", "full", "--eval-fraction", "0"]
    assert train(lm, pairs, tmp_path / "rater", *full) == 0
    few = ["--method", "plain", "--num-samples", "2"]
    assert generate(lm, prompts, tmp_path / "texts.jsonl", *few) == 0
    soft = ["--objective", "soft", "--reward-model", str(tmp_path / "rater"), "--eval-fraction", "0"]
    assert train(lm, tmp_path / "texts.jsonl", tmp_path / "out", *soft) == 0
    assert recorded(load_reward_model(tmp_path / "out"))["prompt_format"] == "ids"
    (tmp_path / "asked.jsonl").write_text('{"prompt_ids": [2, 7]}\n')
    assert generate(lm, tmp_path / "asked.jsonl", tmp_path / "of_ids.jsonl", *few) == 0
    judge = ["--judge", str(tmp_path / "rater"), "--output-dir", str(tmp_path / "report")]
    assert main(["evaluate", str(tmp_path / "of_ids.jsonl"), *judge]) == 0


def test_texts_that_cannot_be_learned_from_are_refused(lm, pairs, rater, prompts, tmp_path, capsys):
    soft = ["--objective", "soft", "--reward-model", str(rater)]
    assert train(lm, pairs, tmp_path / "out", *soft) == 2
    error = capsys.readouterr().err
    assert "no field `response`" in error
    assert "texts of the reference, written by `pargs generate --method plain`" in error
    one = ["--method", "plain", "--num-samples", "1", "--prompt-format", "text"]
    assert generate(lm, prompts, tmp_path / "one.jsonl", *one) == 0
    for more in (["reweighted", "--reward-model"], ["partial", "--soft-labels-from"]):
        assert train(lm, tmp_path / "one.jsonl", tmp_path / "out", "--objective", *more, str(rater)) == 2
        assert "--num-samples N" in capsys.readouterr().err


def test_the_checkpoint_with_the_least_held_out_loss_is_saved(lm, pairs, tmp_path, capsys):
    more = ["--load-best", "--max-steps", "6", "--learning-rate", "0.1"]
    assert train(lm, pairs, tmp_path / "out", *more) == 0
    state = json.loads(max((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    losses = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
    assert len(losses) == 6  # --save-steps 1
    printed = re.search(r"^eval_loss +(\S+)", capsys.readouterr().out, re.MULTILINE)
    assert float(printed[1]) == pytest.approx(min(losses), rel=1e-3)


def test_fine_tuned_rivals_write_folders_that_generate_takes(lm, pairs, prompts, tmp_path, capsys):
    few = ["--max-steps", "2", "--save-steps", "1", "--disable-tqdm", "True", "--use-cpu", "True", "--beta", "2"]
    made = ["dpo", "--model", str(lm), "--dataset", str(pairs), "--output-dir", str(tmp_path / "dpo"), *few]
    assert main(made) == 0
    assert "eval_rewards/accuracies" in capsys.readouterr().out
    recorded_with = json.loads((tmp_path / "dpo" / "config.json").read_text())["pargs"]
    assert recorded_with == {"objective": "dpo", "beta": 2.0, "append_eos": True, "prompt_format": "text"}
    assert main(made) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*made, "--resume", "--beta", "3"]) == 2
    assert "(beta 2.0 there, 3.0 now)" in capsys.readouterr().err
    assert main([*made, "--resume"]) == 0
    assert train(lm, pairs, tmp_path / "rm", "--objective", "full") == 0
    few = ["--updates", "2", "--batch-size", "4", "--minibatch-size", "2", "--max-new-tokens", "5", "--device", "cpu"]
    made = ["ppo", "--model", str(lm), "--prompts", str(pairs), "--reward-model", str(tmp_path / "rm")]
    made += ["--output-dir", str(tmp_path / "ppo"), *few]
    assert main(made) == 0
    assert [json.loads(line)["update"] for line in (tmp_path / "ppo" / "log.jsonl").open()] == [1, 2]
    assert main(made) == 2
    with (tmp_path / "ppo" / "log.jsonl").open("a") as log:  # interrupted after an update that no checkpoint holds
        log.write('{"update": 3, "reward": 9}\n{"upd')
    assert main([*made, "--resume", "--updates", "4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "log.jsonl").open()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["reward"] != 9
    for rival in ("dpo", "ppo"):
        assert generate(tmp_path / rival, prompts, tmp_path / f"{rival}.jsonl", "--method", "plain") == 0
        assert (tmp_path / rival / "model.safetensors").exists()


def test_a_log_that_cannot_be_read_is_said_before_training_and_kept(lm, prompts, tmp_path, capsys):
    guide = load_reward_model(lm, head="scalar")
    save_reward_model(guide, tiny_tokenizer(), tmp_path / "rm")
    log = tmp_path / "ppo" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("update 1\n")
    few = ["--updates", "1", "--max-new-tokens", "4"]
    models = ["--model", str(lm), "--reward-model", str(tmp_path / "rm"), "--device", "cpu"]
    assert main(["ppo", *models, "--prompts", str(prompts), "--output-dir", str(log.parent), *few]) == 2
    assert "log.jsonl:1: not JSON" in capsys.readouterr().err
    assert [file.name for file in log.parent.iterdir()] == ["log.jsonl"]
    assert log.read_text() == "update 1\n"


def test_progress_is_said_where_stderr_is_no_terminal(lm, prompts, tmp_path, capsys):
    assert generate(lm, prompts, tmp_path / "out.jsonl", "--method", "plain") == 0
    assert "generating: 100%" in capsys.readouterr().err


def test_an_output_file_is_continued_or_left_alone(lm, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert generate(lm, prompts, out, "--method", "plain") == 0
    whole = out.read_text()
    assert generate(lm, prompts, out, "--method", "plain") == 2
    assert "continue it with --resume" in capsys.readouterr().err
    out.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"torn')
    assert generate(lm, prompts, out, "--method", "plain", "--resume", "--batch-size", "1") == 0
    ids = [[json.loads(line)["response_ids"] for line in text.splitlines()] for text in (whole, out.read_text())]
    assert ids[0] == ids[1]
    assert generate(lm, prompts, out, "--method", "plain", "--resume", "--seed", "1") == 2
    assert "was made with other settings" in capsys.readouterr().err
    prompts.write_text("a b\nd\nd e f\n")
    assert generate(lm, prompts, out, "--method", "plain", "--resume", "--shard", "0/2") == 2
    assert "out.jsonl:3 was written for another prompt number 1" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 6


def test_shards_are_joined_by_cat_resumed_each_and_taken_by_evaluate(lm, prompts, tmp_path, capsys):
    whole, parts = tmp_path / "whole.jsonl", [tmp_path / f"part{i}.jsonl" for i in range(2)]
    assert generate(lm, prompts, whole, "--method", "plain") == 0
    for i, part in enumerate(parts):
        assert generate(lm, prompts, part, "--method", "plain", "--shard", f"{i}/2") == 0
    part = parts[1].read_text().splitlines(keepends=True)
    parts[1].write_text("".join(part[:1]))
    capsys.readouterr()
    assert generate(lm, prompts, parts[1], "--method", "plain", "--shard", "1/2", "--resume") == 0
    assert "wrote 3 texts" in capsys.readouterr().out
    joined = tmp_path / "joined.jsonl"
    joined.write_text("".join(part.read_text() for part in parts))
    records = [[json.loads(line) for line in file.open()] for file in (joined, whole)]
    exact = ["prompt", "prompt_number", "sample", "response", "response_ids", "finished", "settings"]
    ours, theirs = ([[record[name] for name in exact] for record in some] for some in records)
    assert ours == theirs
    folder = str(tmp_path / "report")
    assert main(["evaluate", str(joined), str(whole), "--against", str(whole), "--output-dir", folder]) == 0
    joined.write_text(parts[1].read_text())  # a part that is missing is made good without --shard
    capsys.readouterr()
    assert generate(lm, prompts, joined, "--method", "plain", "--resume") == 0
    assert "wrote 2 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "plain", "--shard", "4/4"], "shard (--shard) must be i/n"),
        (["--method", "pargs"], "needs a reward model"),
        (["--method", "plain", "--top-k", "9"], "candidates of guided methods, and plain has none"),
        (["--method", "plain", "--ref-top-p", "1.5"], "ref_top_p must be above 0 and at most 1, got 1.5"),
        (["--method", "plain", "--max-new-tokens", "500"], "exceeds the context"),
        (["--method", "plain", "--device", "auto", "--compile"], "--compile captures the steps of one device"),
        (["--method", "plain", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--method", "plain", "--model", "nowhere/at-all"], "cannot load 'nowhere/at-all'"),
        (["--method", "plain", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_to_generate_is_one_line_and_status_2(lm, prompts, tmp_path, capsys, more, message):
    assert generate(lm, prompts, tmp_path / "out.jsonl", *more) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("pargs: error: ")
    assert message in err


def test_a_guide_that_shares_layers_is_not_spread_over_devices(lm, prompts, tmp_path, capsys):
    guide = tiny_reward_model(vocabulary=14).float()
    save_reward_model(guide, tiny_tokenizer(), tmp_path / "rm", objective="partial", shared_layers=1)
    more = ["--reward-model", str(tmp_path / "rm"), "--device", "auto"]
    assert generate(lm, prompts, tmp_path / "out.jsonl", *more) == 2
    assert "is read on one device: drop --device auto" in capsys.readouterr().err


def test_out_of_memory_is_one_line_and_keeps_what_was_written(lm, prompts, tmp_path, capsys, monkeypatch):
    def short_of_memory(policy, reward, prompt_ids, mask, **settings):
        if len(prompt_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loop(policy, reward, prompt_ids, mask, **settings)

    loop, out, whole = methods.generate, tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert generate(lm, prompts, whole, "--method", "plain") == 0
    monkeypatch.setattr(methods, "generate", short_of_memory)
    assert generate(lm, prompts, out, "--method", "plain", "--batch-size", "1", "--shard", "0/3") == 0
    assert generate(lm, prompts, out, "--method", "plain", "--batch-size", "2", "--resume") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("pargs: error: out of memory while decoding 2 texts at once")
    assert generate(lm, prompts, out, "--method", "plain", "--batch-size", "1", "--resume") == 0
    ids = [[json.loads(line)["response_ids"] for line in file.open()] for file in (out, whole)]
    assert ids[0] == ids[1]


def test_a_broken_model_stops_and_writes_no_text(lm, prompts, tmp_path, capsys):
    model = tiny_lm(vocabulary=14).float()
    model.lm_head.weight.data[:] = float("nan")
    model.save_pretrained(lm)
    assert generate(lm, prompts, tmp_path / "out.jsonl", "--method", "plain") == 2
    assert "row 0, step 0" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_two_processes_train_what_one_does(lm, tmp_path, capsys):
    file, held_out, out = tmp_path / "unequal.jsonl", tmp_path / "held_out.jsonl", [tmp_path / "one", tmp_path / "two"]
    records = [{"prompt": w, "chosen": "a " * n, "rejected": f"b {w}"} for n, w in enumerate(WORDS + "a", 1)]
    file.write_text("\n".join(map(json.dumps, records)))
    held_out.write_text("\n".join(map(json.dumps, records[1:6])))  # batches that cannot be shared out evenly
    options = ["--model", str(lm), "--dataset", str(file), "--eval-dataset", str(held_out), "--max-steps", "2"]
    options += ["--optim", "sgd", "--learning-rate", "0.1", "--per-device-eval-batch-size", "2"]
    options += ["--save-strategy", "no", "--disable-tqdm", "True", "--use-cpu", "True"]
    assert main(["train", *options, "--output-dir", str(out[0]), "--per-device-train-batch-size", "4"]) == 0
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pargs_min", "train", *options]
    two += ["--output-dir", str(out[1]), "--per-device-train-batch-size", "2"]
    done = subprocess.run([sys.executable, "-m", *two], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [
        dict(re.findall(r"^(eval_(?:loss|acc)\S*) +(\S+)$", text, re.M))
        for text in (capsys.readouterr().out, done.stdout)
    ]
    assert said[0] == said[1]
    assert "eval_loss" in said[0]
    one, two = (AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in out)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_chats_are_trained_to_the_end_that_their_template_writes(tmp_path, monkeypatch):
    """Also where the shorter response of a pair is continued."""
    tokenizer = chat_tokenizer()
    tiny_lm(vocabulary=12).float().save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    record = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b c", "rejected": "d"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    seen = []

    def remember(model, tokenizer, pairs, held_out, **how):
        seen.append((pairs[0].chosen_ids, how["end"]))
        return {}

    monkeypatch.setitem(RECIPES, "partial", RECIPES["partial"]._replace(train=remember))
    assert train(tmp_path / "lm", tmp_path / "pairs.jsonl", tmp_path / "rm", "--eval-fraction", "0") == 0
    assert seen == [([9, 10, 0], 0)]
    assert recorded(load_reward_model(tmp_path / "rm"))["prompt_format"] == "chat"
