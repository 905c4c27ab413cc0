"""Models in: what is loaded is whole, and what we save gives transformers the same numbers."""

import contextlib
import io
import json

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    pipeline,
)
from transformers.utils import logging

from pargs_min.codec import Codec, left_pad
from pargs_min.decode import ModelPolicy, generate
from pargs_min.models import (
    default_device,
    load_config,
    load_guide,
    load_language_model,
    load_reward_model,
    load_tokenizer,
    save_reward_model,
)
from pargs_min.reading import record_rewards, text_rewards
from pargs_min.reward_model import final_rewards, recorded
from pargs_min.scoring import SiblingScorer, model_rewards
from pargs_min.texts import choose_scorer, generate_texts
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_codec import chat_tokenizer
from tests.test_reward_model import word_tokenizer


@pytest.mark.parametrize("padding", [None, "<end>", "a"], ids=["no pad", "pad is end", "own pad"])
def test_what_we_save_gives_transformers_the_same_number(tmp_path, padding):
    """In AutoModelForSequenceClassification and in the pipeline, for whole responses that end in the end token."""
    tokenizer = word_tokenizer(pad_token=padding)
    tiny_lm("llama", 10, eos_token_id=0, pad_token_id=None).float().save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    model = load_reward_model(tmp_path / "lm", tokenizer, head="scalar")
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
        model = load_reward_model(tmp_path, head="scalar")
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
    assert load_language_model(tmp_path).dtype == load_reward_model(tmp_path, head="scalar").dtype == torch.float32
    assert load_language_model(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert not load_language_model(tmp_path).training
    assert recorded(load_reward_model(tmp_path, head="scalar")) == {}


def test_a_language_model_gives_no_rewards(tmp_path):
    tiny_lm().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(GPT2LMHeadModel\) is not a sequence-classification .* `pargs train`"):
        load_reward_model(tmp_path)


def change_weights(folder, change) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights | {"value_head.weight": weights.pop("score.weight")}, r"score\.weight is missing"),
        (lambda weights: weights | {"value_head.weight": torch.zeros(1, 16)}, r"value_head\.weight has no place"),
        (lambda weights: {k: v for k, v in weights.items() if ".h.1." not in k}, r"h\.1\..* is missing.*and \d+ more"),
    ],
    ids=["renamed head", "a second head", "a layer deleted"],
)
def test_a_reward_model_is_whole(tmp_path, change, says):
    tiny_reward_model().float().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        load_reward_model(tmp_path)


@pytest.mark.parametrize(
    ("layers", "says"), [(1, r"h\.1\.\S+ has no place"), (3, r"h\.2\.\S+ is missing")], ids=["fewer", "more"]
)
@pytest.mark.parametrize("head", [None, "scalar"])
def test_a_file_with_other_layers_than_the_configuration_is_refused(tmp_path, layers, says, head):
    tiny_lm().float().save_pretrained(tmp_path)
    change_config(tmp_path, n_layer=layers)
    with pytest.raises(ValueError, match=says):
        load_reward_model(tmp_path, head=head) if head else load_language_model(tmp_path)


def test_a_reward_model_is_no_language_model(tmp_path):
    tiny_reward_model().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight has no place"):
        load_language_model(tmp_path)


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED = {
    "half the weights": (lambda folder: cut(folder / "model.safetensors"), r"model\.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors"),
    "weights are text": (lambda folder: (folder / "model.safetensors").write_text("weights"), r"model\.safetensors"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors"),
    "half a configuration": (lambda folder: cut(folder / "config.json"), r"config\.json"),
    "configuration is a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "unknown kind": (lambda folder: change_config(folder, model_type="nonsense"), "nonsense"),
    "a width of text": (lambda folder: change_config(folder, n_embd="wide"), "cannot load|n_embd"),
    "a width that fits nothing": (lambda folder: change_config(folder, n_embd=15), "cannot load|wte"),
    "another vocabulary": (lambda folder: change_config(folder, vocab_size=7), r"wte\.weight is \(11, 16\), not \(7"),
    "record is a list": (lambda folder: change_config(folder, pargs=["partial"]), r"config\.json: pargs must not be"),
    "unknown objective": (lambda folder: change_config(folder, pargs={"objective": "x"}), r"pargs\.objective must not"),
    "unknown form": (
        lambda folder: change_config(folder, pargs={"prompt_format": 3}),
        r"pargs\.prompt_format must not",
    ),
    "architectures is a number": (lambda folder: change_config(folder, architectures=3), "cannot load"),
    "half a generation configuration": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos'),
        r"generation_config\.json is damaged",
    ),
    "an end that is no id": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [[1]]}'),
        r"generation_config\.json: eos_token_id must not be \[\[1\]\]",
    ),
    "unknown end": (lambda folder: change_config(folder, pargs={"append_eos": "no"}), r"pargs\.append_eos must not"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_folder_is_an_error_that_names_it_and_the_file(tmp_path, damage, says):
    folder = tmp_path / "rm"
    tiny_reward_model().float().save_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=says) as error:
        load_reward_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"model": 3}', ""])
def test_a_damaged_tokenizer_is_an_error_that_names_it(tmp_path, content):
    word_tokenizer(pad_token=None).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"cannot load '{tmp_path}'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_a_folder_is_never_run(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    tiny_lm().float().save_pretrained(tmp_path)
    word_tokenizer(pad_token=None).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    names = dict(AutoConfig="evil.C", AutoModelForCausalLM="evil.M", AutoTokenizer=["evil.M", "evil.M"])
    if kind == "model":
        change_config(tmp_path, auto_map=names, model_type="nonsense")
    else:
        change_config(tmp_path, model_type="nonsense")
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(auto_map=names, tokenizer_class="M")))
    for load in (load_language_model, load_tokenizer):
        with contextlib.suppress(ValueError):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        default_device(device)


def test_a_type_of_weights_that_is_none_is_named(tmp_path):
    tiny_lm().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        load_language_model(tmp_path, dtype="nonsense")


def test_a_bidirectional_head_is_read_in_float32(tmp_path):
    """In bfloat16 the rewards of many texts would be equal."""
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).bfloat16().save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, dtype="auto")
    ids = torch.randint(64, (80, 6), generator=torch.Generator().manual_seed(0))
    assert len(set(final_rewards(model, ids, torch.ones_like(ids)).tolist())) == 80


@pytest.mark.parametrize("padding", ["<end>", None])
def test_a_model_from_elsewhere_is_read_as_transformers_reads_it(tmp_path, padding):
    """Where its padding is the end token, that is the token before the end; guided, it is asked for whole texts."""
    tokenizer = word_tokenizer(pad_token=padding)
    model = tiny_reward_model(pad_token_id=tokenizer.pad_token_id).float()
    for text in ("b c d <end>", "e f"):
        batch = tokenizer(text, return_tensors="pt")
        assert_close(final_rewards(model, batch.input_ids, batch.attention_mask), model(**batch).logits[:, 0])
    end = tokenizer.eos_token_id
    if padding is None:
        assert isinstance(choose_scorer(model, 9, (end,)), SiblingScorer)
    else:
        with pytest.warns(UserWarning, match=rf"takes an end token \({end}\) for padding"):
            scorer = choose_scorer(model, 9, (end,))
        scorer.start(*left_pad([[2, 3]]))
        before = model(torch.tensor([[2, 3]])).logits[:, 0]
        assert_close(scorer.score(torch.tensor([[end]]))[0], before)


@pytest.mark.parametrize(
    "ask",
    [
        model_rewards,
        lambda model: text_rewards(model, word_tokenizer(), Codec(word_tokenizer()), [{"prompt_ids": [2]}]),
    ],
)
def test_a_reward_model_in_training_mode_is_refused(ask):
    with pytest.raises(ValueError, match="training mode"):
        ask(tiny_reward_model().train())(torch.tensor([[2, 3]]), torch.tensor([[1, 1]]))


def test_a_recurrent_language_model_is_refused():
    config = AutoConfig.for_model("mamba", vocab_size=11, hidden_size=16, num_hidden_layers=1)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="is recurrent"):
        generate(ModelPolicy(lm), None, torch.tensor([[2, 3]]), beta=0.0, top_k=0, max_new_tokens=2)


@pytest.mark.parametrize("record", [3, ["partial"], {"objective": ["x"]}, {"prompt_format": {}}])
def test_what_training_recorded_with_a_language_model_is_checked_too(tmp_path, record):
    tiny_lm().float().save_pretrained(tmp_path)
    change_config(tmp_path, pargs=record)
    for load in (load_language_model, load_guide):
        with pytest.raises(ValueError, match=r"config\.json: pargs"):
            load(tmp_path)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    tiny_lm("llama", 9).float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has token ids up to 9, and .* has 9 rows"):
        load_reward_model(tmp_path, word_tokenizer(), head="scalar")
    with pytest.raises(ValueError, match=r"has token ids up to 9, and .* has 7 rows"):
        record_rewards(tiny_reward_model(vocabulary=7), word_tokenizer())


def test_constants_of_old_checkpoints_are_no_weights(tmp_path):
    tiny_lm().float().save_pretrained(tmp_path)
    masks = {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    change_weights(tmp_path, lambda weights: weights | masks)
    load_language_model(tmp_path)
    change_weights(tmp_path, lambda weights: weights | {"transformer.h.9.mlp.c_fc.bias": torch.ones(48)})
    with pytest.raises(ValueError, match=r"c_fc\.bias has no place"):
        load_language_model(tmp_path)


def test_what_lies_beside_a_model_does_not_matter_but_an_adapter(tmp_path):
    tiny_lm().float().save_pretrained(tmp_path)
    for name in ("._config.json", "consolidated.safetensors", "trainer_state.json"):
        (tmp_path / name).write_text("version https://git-lfs")
    load_language_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json.*merge"):
        load_language_model(tmp_path)


def test_padding_is_no_token_that_ends_a_text(tmp_path):
    """Nor a turn of a chat: transformers would read r(response) before it."""
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = "<|end|>"
    tiny_lm(vocabulary=12).float().save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, tokenizer, head="scalar")
    assert tokenizer.pad_token == "<unk>"
    assert model.config.pad_token_id == 3


def test_models_that_find_the_end_of_a_text_by_its_padding_are_given_it():
    config = AutoConfig.for_model(
        "ctrl", vocab_size=11, n_embd=16, dff=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=3, n_positions=16
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [[5, 6], [7, 8, 9, 4], [10]]
    alone = torch.cat([final_rewards(model, *left_pad([row])) for row in rows])
    assert_close(final_rewards(model, *left_pad(rows)), alone, rtol=1e-4, atol=1e-6)
    assert len(set(alone.tolist())) == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_layers_that_accelerate_places_give_the_same_texts(tmp_path, family):
    """Here a layer on disk and the rest in memory, which is all that can be split on a machine without GPUs."""
    tokenizer, made = tiny_tokenizer(), {"lm": tiny_lm, "rm": tiny_reward_model}
    for name, make in made.items():
        make(family, vocabulary=14, tie_word_embeddings=False).float().save_pretrained(tmp_path / name)

    def texts(lm, rm):
        settings = dict(method="args", top_k=4, num_samples=2, max_new_tokens=6, prompt_format="text")
        found = generate_texts(lm, tokenizer, [{"prompt": "a b"}, {"prompt": "c"}], reward_model=rm, **settings)
        return [(text["response_ids"], text["kl"], text["reward"]) for text in found]

    def loaded(device):
        return [
            load(tmp_path / name, device=device) for load, name in ((load_language_model, "lm"), (load_guide, "rm"))
        ]

    want = texts(*loaded("cpu"))
    assert texts(*loaded("auto")) == want
    split = loaded("cpu")
    for model, head in zip(split, ("lm_head", "score"), strict=True):
        body, layers = model.base_model, "h" if family == "gpt2" else "layers"
        places = {f"{model.base_model_prefix}.{name}": "cpu" for name, _ in body.named_children() if name != layers}
        places |= {f"{model.base_model_prefix}.{layers}.{n}": place for n, place in enumerate(("cpu", "disk"))}
        dispatch_model(model, places | {head: "cpu"}, offload_dir=tmp_path / head, skip_keys=["past_key_values"])
        assert any(weight.is_meta for weight in model.parameters())
    assert texts(*split) == want


def test_a_model_that_does_not_fit_on_the_gpus_is_refused(tmp_path, monkeypatch):
    """What accelerate leaves in memory or on disk would be read outside its hooks."""
    tiny_lm(vocabulary=14).float().save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def offloaded(*arguments, **keywords):
        model, report = load(*arguments, **keywords)
        return model.to("meta"), report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offloaded)
    with pytest.raises(ValueError, match="does not fit on the GPUs of this machine together"):
        load_language_model(tmp_path, device="auto")
