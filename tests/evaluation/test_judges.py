"""Judges: each reads what it should, and nothing that it says is guessed."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from pargs_min.evaluation.judges import load_judge
from pargs_min.models import save_reward_model
from pargs_min.texts import generate_texts
from tests.strategies import tiny_config, tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_reward_model import word_tokenizer

WORDS = "<pad> <end> a b c d e f g h i"


def text(prompt="a b", response="c d", ids=(4, 5, 1), **more):
    record = {"prompt_number": 0, "sample": 0, "prompt": prompt, "response": response, "response_ids": [*ids]}
    return record | {"finished": True} | more


# Models


def test_a_reward_model_judges_exactly_what_it_guided(tmp_path):
    """The reward of every record comes back, end token and prompt format included."""
    tokenizer, rm = word_tokenizer(WORDS, pad_token="<pad>"), tiny_reward_model("llama")
    save_reward_model(rm, tokenizer, tmp_path, objective="partial", append_eos=True, prompt_format="text")
    prompts = [{"prompt": "a b c"}, {"prompt": "d"}]
    settings = dict(method="pargs", reward_model=rm, beta=1.0, top_k=0, num_samples=16, max_new_tokens=6)
    texts = list(generate_texts(tiny_lm(), tokenizer, prompts, **settings))
    assert {t["finished"] for t in texts} == {True, False}
    got = load_judge(str(tmp_path)).score(texts)
    assert got == pytest.approx([t["reward"] for t in texts], rel=1e-9)


def test_a_judge_with_another_vocabulary_reads_the_text_and_its_own_end_token(tmp_path):
    other, rm = word_tokenizer("i h g f e d c b a <end> <pad>", pad_token="<pad>"), tiny_reward_model("llama")
    save_reward_model(rm, other, tmp_path, objective="full", append_eos=True, prompt_format="text")
    judge = load_judge(str(tmp_path))
    finished, cut = judge.score([text(), text(ids=(4, 5), finished=False)])
    assert finished == pytest.approx(_reward(rm, other, "a b c d <end>"), rel=1e-9)
    assert cut == pytest.approx(_reward(rm, other, "a b c d"), rel=1e-9)


@pytest.mark.parametrize("end", [0, 50256])  # padding here, and beyond this vocabulary
def test_an_empty_response_ends_with_the_end_token_of_the_judge(tmp_path, end):
    other, rm = word_tokenizer("<pad> <end> a b c d e f g h i", pad_token="<pad>"), tiny_reward_model("llama")
    save_reward_model(rm, other, tmp_path, objective="full", append_eos=True, prompt_format="text")
    got = load_judge(str(tmp_path)).score([text(response="", ids=[end])])
    assert got == pytest.approx([_reward(rm, other, "a b <end>")], rel=1e-9)


def test_a_published_model_reads_a_chat(tmp_path):
    tokenizer, rm = tiny_tokenizer(), tiny_reward_model("llama", vocabulary=14)
    rm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    want = _reward(rm, tokenizer, "<s> user : a b assistant : c d", add_special_tokens=False)
    asked = [{"role": "user", "content": "a b"}]
    assert load_judge(str(tmp_path)).score([text(), text(asked)]) == pytest.approx([want, want], rel=1e-9)


def test_a_published_causal_model_without_a_chat_template_reads_text_and_its_end_token(tmp_path):
    tokenizer, rm = tiny_tokenizer(), tiny_reward_model("llama", vocabulary=14)
    tokenizer.chat_template = None
    rm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_judge(str(tmp_path)).score([text()]) == pytest.approx(
        [_reward(rm, tokenizer, "a b c d </s>")], rel=1e-9
    )


def test_a_bidirectional_model_reads_two_segments(tmp_path):
    """As transformers' own tokenizer and model do it, one text at a time; padding changes nothing."""
    torch.manual_seed(0)
    config = tiny_config(
        "bert", 14, num_labels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = tiny_tokenizer(start=False)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = _segments()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [text("a b", "c d"), text("a", "b c d e f")]
    fresh = AutoTokenizer.from_pretrained(tmp_path)
    batches = [fresh(t["prompt"], t["response"], return_tensors="pt") for t in texts]
    assert batches[0]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    want = [model(**batch).logits.item() for batch in batches]
    assert load_judge(str(tmp_path)).score(texts) == pytest.approx(want, rel=1e-9)


def _segments():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)])


def _reward(model, tokenizer, words, **settings):
    with torch.no_grad():
        hidden = model.model(**tokenizer(words, return_tensors="pt", **settings)).last_hidden_state
        return model.score(hidden)[0, -1, 0].item()


def test_a_language_model_is_no_judge(tmp_path):
    """It would load, with a head drawn at random."""
    tiny_lm("llama").save_pretrained(tmp_path)
    word_tokenizer(WORDS, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*\(LlamaForCausalLM\) is not a sequence"):
        load_judge(str(tmp_path))


def test_a_text_longer_than_the_judge_reads_is_named(tmp_path):
    save_reward_model(tiny_reward_model("gpt2"), word_tokenizer(WORDS, pad_token="<pad>"), tmp_path)
    long = text(response=" ".join("c" * 63), ids=[4] * 63, prompt_number=7, sample=2)
    with pytest.raises(ValueError, match=r"prompt number 7, sample 2: 65 tokens, and GPT2For.* reads at most 64"):
        load_judge(str(tmp_path)).score([text(), long])


# Functions


def test_a_function_gets_prompts_and_responses(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def length(prompts, responses): return [len(p + r) for p, r in zip(prompts, responses)]"
    )
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "a"}]
    assert load_judge("my_judges:length").score([text(), text(chat, "b")]) == [6, 8]


def test_what_a_function_says_is_handed_on_as_it_came(tmp_path, monkeypatch):
    (tmp_path / "odd_judges.py").write_text(
        "import numpy\n"
        "def words(prompts, responses): return ['good', None]\n"
        "def array(prompts, responses): return numpy.array([1.0, 2.0])\n"
        "def one(prompts, responses): return [1.0]\n"
        "def none(prompts, responses): return None\n"
        "from fractions import Fraction\n"
        "def thirds(prompts, responses): return Fraction(1, 3), Fraction(2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_judge("odd_judges:words").score([text()] * 2) == ["good", None]
    assert load_judge("odd_judges:array").score([text()] * 2) == [1.0, 2.0]
    assert [(type(one), one) for one in load_judge("odd_judges:thirds").score([text()] * 2)] == [
        (float, 1 / 3),
        (float, 2 / 3),
    ]
    for name in ("one", "none"):
        with pytest.raises(ValueError, match="must return one number for each of 2 texts, got"):
            load_judge(f"odd_judges:{name}").score([text()] * 2)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("f = [", "cannot be loaded; .*SyntaxError"),
        ("raise RuntimeError('no key')", "cannot be loaded; .*no key"),
        ("import sys; sys.exit(3)", r"cannot be loaded; .*SystemExit\(3\)"),
        ("import os; os.chdir('/'); f = len", "cannot be loaded; .*it changes the working directory"),
        ("def f(prompts, responses): return prompts['a']", "fails: TypeError"),
        ("def f(prompts): return prompts", "fails: TypeError"),
        ("import sys\ndef f(prompts, responses): sys.exit()", "fails: SystemExit"),
        ("import os\ndef f(prompts, responses): os.chdir('/'); return [1.0]", "fails: .*changes the working directory"),
        ("def f(prompts, responses): raise GeneratorExit", "fails: GeneratorExit"),
        ("def f(prompts, responses): return [1.7e308]", "fails: .*must lie within ±1e.100, got 1.7e.308"),
        ("class A:\n def __repr__(self): 1 / 0\ndef f(prompts, responses): return [A()]", "fails: ZeroDivisionError"),
        ("class A(list):\n def __iter__(self): 1 / 0\ndef f(prompts, responses): return A([1])", "fails: ZeroDivision"),
        ("def f(prompts, responses): return ['\\ud800']", "fails: UnicodeEncodeError"),
    ],
)
def test_whatever_a_function_does_it_is_named_and_the_working_directory_stays(tmp_path, monkeypatch, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wild_judges", raising=False)
    (tmp_path / "wild_judges.py").write_text(code)
    with pytest.raises(ValueError, match=f"judge 'wild_judges:f' {message}"):
        load_judge("wild_judges:f").score([text()])
    assert Path.cwd() == tmp_path


def test_an_interrupt_is_no_fault_of_the_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow_judges.py").write_text("def f(prompts, responses): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_judge("slow_judges:f").score([text()])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be loaded; .*No module named 'no_such_module'"),
        ("json:no_such_function", "cannot be loaded; .*module 'json' has no attribute"),
        ("json:", "expected MODULE:FUNCTION"),
        ("/no/such/folder", "judge '/no/such/folder' cannot be loaded"),
        ("http://127.0.0.1:1/v1", "names no model; write it behind the address"),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_judge(name)
