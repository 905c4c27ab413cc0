"""Models in: what is loaded is whole, and what we save gives transformers the same numbers."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from pargs_min.models import (
    load_config,
    load_language_model,
    load_reward_model,
    load_tokenizer,
    recorded,
    save_reward_model,
)
from pargs_min.reward_model import final_rewards
from tests.strategies import tiny_lm, tiny_reward_model
from tests.test_reward_model import word_tokenizer


@pytest.mark.parametrize("padding", [None, "<end>", "a"], ids=["no pad", "pad is end", "own pad"])
def test_what_we_save_gives_transformers_the_same_number(tmp_path, padding):
    """In AutoModelForSequenceClassification and in the pipeline, for whole responses that end in the end token."""
    tokenizer = word_tokenizer(pad_token=padding)
    tiny_lm("llama", 10, eos_token_id=0, pad_token_id=None).float().save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    model = load_reward_model(tmp_path / "lm", tokenizer)
    save_reward_model(model, tokenizer, tmp_path / "rm", objective="partial", tail="extend")

    texts = ["b c d <end>", "e f <end>"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "rm")(texts, return_tensors="pt", padding=True)
    ours = final_rewards(load_reward_model(tmp_path / "rm"), batch.input_ids, batch.attention_mask)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")(**batch).logits[:, 0]
    assert_close(theirs, ours)
    piped = pipeline("text-classification", str(tmp_path / "rm"))(texts, batch_size=2)
    assert_close(torch.tensor([out["score"] for out in piped]), ours.detach())
    assert (tmp_path / "rm" / "model.safetensors").exists()
    assert load_reward_model(tmp_path / "rm").config.pargs == {"objective": "partial", "tail": "extend"}
    assert tokenizer.pad_token != tokenizer.eos_token


def test_a_language_model_keeps_its_backbone_and_gets_a_head_from_the_global_stream(tmp_path):
    lm = tiny_lm("gpt2").float()
    lm.save_pretrained(tmp_path)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = load_reward_model(tmp_path)
        heads.append(model.score.weight.detach())
        assert_close(model.base_model.wte.weight, lm.transformer.wte.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    tiny_lm("gpt2").float().save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels; a reward model has one"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_language_model, load_reward_model])
def test_what_is_not_there_is_an_error_that_names_it(tmp_path, load):
    with pytest.raises(ValueError, match=r"cannot load '.*nowhere'"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["lm", "rm"])
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_weight_that_is_missing_or_misshapen_is_an_error_that_names_it(tmp_path, kind, damage):
    (tiny_lm() if kind == "lm" else tiny_reward_model()).float().save_pretrained(tmp_path)
    load, file = load_language_model if kind == "lm" else load_reward_model, tmp_path / "model.safetensors"
    load(tmp_path)
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight"))
    weight = weights.pop(name)
    if damage == "shape":
        weights[name] = weight[:, :-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight"):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_lm().float()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load"):
        load_language_model(tmp_path)


def test_loading_leaves_transformers_progress_bars_as_they_were(tmp_path):
    tiny_lm().float().save_pretrained(tmp_path)
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.enable_progress_bar()
    load_language_model(tmp_path)
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    load_language_model(tmp_path)
    assert not logging.is_progress_bar_enabled()
    if before[0]:
        logging.enable_progress_bar()
    assert logging.get_verbosity() == before[1]


def test_weights_are_float32_unless_asked_otherwise(tmp_path):
    tiny_lm().bfloat16().save_pretrained(tmp_path)
    assert load_language_model(tmp_path).dtype == load_reward_model(tmp_path).dtype == torch.float32
    assert load_language_model(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert not load_language_model(tmp_path).training
    assert recorded(load_reward_model(tmp_path)) == {}
