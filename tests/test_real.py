"""Checks on a real pretrained model and real preferences; they need `--real=DIR` and skip without it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pargs_min.cli import main
from pargs_min.data import encode_preferences
from pargs_min.decode import ModelPolicy, generate
from pargs_min.models import load_reward_model
from pargs_min.records import read_preferences
from pargs_min.reward_model import final_rewards
from pargs_min.scoring import SiblingScorer

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("file", "append_eos", "expected"),
    [
        ("story_pairs.jsonl", False, dict(read=1440, kept=1440)),
        ("polite_pairs.jsonl", True, dict(read=1100, kept=1094, identical=6)),
        ("hh_harmless_1000.jsonl.gz", True, dict(read=1000, kept=981, too_long=19, empty=0, prompts_cut=278)),
        ("hh_harmless_1000.jsonl.gz", False, dict(read=1000, empty=3)),
    ],
)
def test_published_preferences_are_read_and_what_does_not_fit_is_counted(real, file, append_eos, expected):
    tokenizer = AutoTokenizer.from_pretrained(real / "stories260K")
    pairs, counts = encode_preferences(read_preferences(real / file), tokenizer, 512, append_eos)
    assert expected.items() <= counts.items()
    assert all(len(pair.prompt_ids) + len(response) <= 512 for pair in pairs for response in pair[1:])


@torch.no_grad()
def test_a_pretrained_model_is_guided_by_the_rewards_of_whole_texts_read_at_every_prefix(real):
    """Each reward of the loop is that of its text read alone, by a head on the pretrained backbone."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(real / "stories260K")
    lm = AutoModelForCausalLM.from_pretrained(real / "stories260K")
    rm = load_reward_model(real / "stories260K", head="scalar")
    prompt = torch.tensor([tokenizer("Once upon a time, there was").input_ids])
    result = generate(ModelPolicy(lm), SiblingScorer(rm), prompt, beta=3.0, top_k=10, max_new_tokens=20, truncate=True)
    for i in range(20):
        text = torch.cat([prompt, result.tokens[:, : i + 1]], 1)
        alone = final_rewards(rm, text, torch.ones_like(text))
        torch.testing.assert_close(result.rewards[:, i], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.trains
def test_the_two_commands_raise_the_reward_of_real_texts(real, tmp_path, capsys):
    """Three reward models; each guides 160 texts, and rates them 7 to 9 standard errors above 160 plain ones."""
    apart = [standard_errors_apart(real, tmp_path / str(seed), str(seed)) for seed in range(3)]
    assert min(apart) > 3
    assert sum(apart) / len(apart) ** 0.5 > 8


def standard_errors_apart(real, folder, seed):
    """How far the mean reward of guided texts is above that of plain ones, by a model trained with this seed."""
    folder.mkdir()
    model, rm, outputs = str(real / "stories260K"), str(folder / "rm"), {}
    train = ["train", "--model", model, "--dataset", str(real / "story_pairs.jsonl"), "--no-append-eos"]
    train += ["--output-dir", rm, "--learning-rate", "1e-3", "--max-steps", "60", "--per-device-train-batch-size", "8"]
    train += ["--save-strategy", "no", "--disable-tqdm", "True", "--use-cpu", "True", "--seed", seed]
    assert main(train) == 0
    for method in ("plain", "pargs"):
        outputs[method] = folder / f"{method}.jsonl"
        options = ["--model", model, "--prompts", str(real / "story_prompts.jsonl"), "--reward-model", rm]
        options += ["--method", method, "--beta", "3", "--num-samples", "8", "--batch-size", "160"]
        options += ["--output", str(outputs[method]), "--max-new-tokens", "24", "--device", "cpu", "--seed", seed]
        assert main(["generate", *options]) == 0
    plain, guided = (
        torch.tensor([json.loads(line)["reward"] for line in outputs[method].open()]) for method in ("plain", "pargs")
    )
    assert len(plain) == len(guided) == 160
    error = ((plain.var() + guided.var()) / 160).sqrt()
    return float((guided.mean() - plain.mean()) / error)
