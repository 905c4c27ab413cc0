"""What users hold on to: public names, commands, their options and defaults. A change of this table is a decision."""

import argparse
import re
import sys
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

import pargs_min
from pargs_min.cli import COMMANDS, main
from pargs_min.cli.decode import DecodeOptions
from pargs_min.cli.options import explained

NAMES = """
    Generation LanguageModelScorer ModelPolicy ReencodeScorer RewardGuidance SiblingScorer Warp WarpedPolicy
    bradley_terry_loss check_vocabularies encode_preferences encode_prompt end_tokens final_rewards generate
    generate_texts greedy guided_log_probs keep_rest load_guide load_reward_model model_rewards
    partial_bradley_terry_loss prefix_accuracy prefix_rewards read_preferences read_prompts row_uniforms sample
    save_reward_model split_by_prompt tempered text_rewards top_k_candidates train_reward_model truncate_rest
"""
# Every option as on the command line, without the dashes: name! is required, name=value has a default, {} are choices.
# Of transformers' own options for `train` and `dpo` only those are listed whose default is ours.
OPTIONS = {
    "demo": "output-dir quick=False seed=0",
    "train": """
        model! dataset! append-eos=True max-length eval-dataset eval-fraction=0.1 load-best=False resume=False
        overwrite=False objective=partial{partial,full,win,farma,autoregressive,value,soft,reweighted} reward-model
        soft-labels-from distil-from lam beta top-k tail{extend,min} reduction{prefix,pair}
        lora-rank shared-layers output-dir=runs/reward_model num-train-epochs=1 learning-rate=1e-05 warmup-steps=0.05
        logging-steps=10
        save-total-limit=1
    """,
    "generate": """
        model! reward-model beta=1.0 top-k min-ref-prob=0.0 truncate=False guide-below max-new-tokens=64
        temperature=1.0
        ref-temperature=1.0 ref-top-k=0 ref-top-p=1.0 ref-min-p=0.0 seed=0 device
        dtype=auto{float32,bfloat16,float16,auto} prompt-format{text,dialogue,chat,ids}
        prompts! output!
        method=pargs{plain,pargs,pargs-greedy,args,args-greedy,cd,soft,reweighted,win,genarm,farma,implicit,best-of-n,smc}
        final-reward-model
        num-samples=1 n=10 particles=8 batch-size=8 compile=False shard=0/1 resume=False
    """,
    "trace": """
        model! reward-model beta=1.0 top-k min-ref-prob=0.0 truncate=False guide-below max-new-tokens=64
        temperature=1.0
        ref-temperature=1.0 ref-top-k=0 ref-top-p=1.0 ref-min-p=0.0 seed=0 device
        dtype=auto{float32,bfloat16,float16,auto} prompt-format{text,dialogue,chat,ids}
        prompt! method=pargs{plain,pargs,pargs-greedy,args,args-greedy,cd,soft,reweighted,win,genarm,farma,implicit}
        output beside=[] shown=10 sample=0
    """,
    "serve": """
        model! reward-model beta=1.0 top-k min-ref-prob=0.0 truncate=False guide-below max-new-tokens=512
        temperature=1.0
        ref-temperature=1.0 ref-top-k=0 ref-top-p=1.0 ref-min-p=0.0 device
        dtype=auto{float32,bfloat16,float16,auto} prompt-format{text,dialogue,chat,ids}
        method=pargs{plain,pargs,pargs-greedy,args,args-greedy,cd,soft,reweighted,win,genarm,farma,implicit}
        name host=127.0.0.1 port=8000 api-key-file rows=32 waiting=64 max-top-k max-length max-body=1048576
        log-prompts=False
    """,
    "evaluate": "files! judge=[] against reference export{alpacaeval} output-dir=runs/evaluation overwrite=False",
    "study": """
        output-dir=runs/study seeds=3 seed=0 worlds processes=2 quick=False methods=[] betas=[] model dataset prompts
        judge held-out max-new-tokens=64 samples=16 plain-samples=64 batch-size=32 pairs-per-step=16
        epochs=1.0 learning-rate=1e-05 dpo-learning-rate=1e-06 ppo-learning-rate=1e-05 ppo-updates=100 append-eos=True
        text-prompts texts-per-prompt lora-rank shared-layers ref-temperature=1.0 ref-top-k=0 ref-top-p=1.0
        ref-min-p=0.0 second-judge
    """,
    "benchmark": """
        config=tiny{tiny,gpt2,smollm2-135m,gpt2-large,llama-1b,llama-7b} model reward-model top-k=10 batch-size=1
        prompt-length=128 tokens=8 rounds=7 dtype=float32{float32,bfloat16,float16} device threads=1 quick=False
        check=False output-dir=runs/benchmark
    """,
    "dpo": """
        model! dataset! append-eos=True max-length eval-dataset eval-fraction=0.1 load-best=False resume=False
        overwrite=False beta=1.0
        output-dir=runs/dpo num-train-epochs=1 learning-rate=1e-06 warmup-steps=0.05 logging-steps=10
        save-total-limit=1
    """,
    "ppo": """
        model! prompts! reward-model! value-model output-dir=runs/ppo save-every=20 device resume=False
        overwrite=False beta=1.0 max-new-tokens=64 updates=200 batch-size=64 passes=4 minibatch-size=16
        learning-rate=1e-05 clip=0.2
        value-weight=0.1 lam=0.95 max-grad-norm=1.0 seed=0
    """,
}


class Built(Exception):
    """Carries the parser of a command, when it is about to parse."""


@pytest.fixture
def built(monkeypatch):
    """Command -> its parser."""

    def raise_it(self, *_, **__):
        raise Built(self)

    def parser(name):
        with pytest.raises(Built) as caught:
            main([name, *(["beta"] if name == "study" else [])])
        return caught.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", raise_it)
    return parser


def described(action):
    name = max(action.option_strings, key=lambda flag: flag.count("-"), default=action.dest).removeprefix("--")
    default = "" if action.default is None else f"={action.default}"
    choices = "" if action.choices is None else f"{{{','.join(action.choices)}}}"
    return name + ("!" if action.required else "") + default + choices


def ours(parser):
    """An action per option, without the --no-... of flags; of TrainingArguments only those whose default is ours."""
    options = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if "num_train_epochs" not in options:
        return options.values()
    theirs = HfArgumentParser(TrainingArguments)
    names = {field.name for field in fields(TrainingArguments)}
    same = {name for name in names & options.keys() if theirs.get_default(name) == options[name].default}
    same.add("dataloader_pin_memory")  # ours, and it depends on the machine
    return [action for name, action in options.items() if name not in same]


def test_public_names():
    assert pargs_min.__all__ == NAMES.split()


def test_commands():
    assert list(COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_defaults(name, built):
    assert set(map(described, ours(built(name)))) == set(OPTIONS[name].split())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_explained_and_taken_in_both_spellings(name, built):
    for action in built(name)._actions:
        assert action.help
        flags = {flag.removeprefix("--") for flag in action.option_strings if flag.startswith("--")}
        assert flags == {flag.replace("_", "-") for flag in flags} | {flag.replace("-", "_") for flag in flags}
    assert "(default: None)" not in built(name).format_help()


def test_an_option_that_no_docstring_explains_has_no_help(built, monkeypatch):
    monkeypatch.setattr(DecodeOptions, "__doc__", "".join(re.split(r"\n +seed: .*", DecodeOptions.__doc__)))
    assert [action.dest for action in built("trace")._actions if not action.help] == ["seed"]


@pytest.mark.parametrize("name", OPTIONS)
def test_docstrings_explain_only_options_that_there_are(name, built):
    parser = built(name)
    for kind in getattr(parser, "dataclass_types", []):
        assert explained(kind).keys() <= {action.dest for action in parser._actions}


@pytest.mark.parametrize("name", ["threads", "batch-size", "prompt-length"])
def test_a_benchmark_of_nothing_is_refused(name, capsys):
    assert main(["benchmark", f"--{name}", "0"]) == 2
    assert f"(--{name}) must be at least 1, got 0" in capsys.readouterr().err


def test_options_are_read_from_the_command_line_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "pargs.args").write_text("--seeds 0")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "pargs")])
    assert main(["study", "beta", "--processes", "0"]) == 2
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err
