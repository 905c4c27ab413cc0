"""Prompts in, texts out: the same texts however a run is batched or divided."""

import itertools
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pargs_min import methods, smc
from pargs_min.cli.resuming import read_done, write_records
from pargs_min.codec import Codec, encode_prompt, left_pad
from pargs_min.decode import Warp
from pargs_min.memory import is_out_of_memory
from pargs_min.methods import METHODS
from pargs_min.reading import record_rewards, text_rewards
from pargs_min.reward_model import prefix_rewards
from pargs_min.scoring import ReencodeScorer, SiblingScorer
from pargs_min.texts import choose_scorer, generate_texts, shard_range, text_log_probs
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer
from tests.test_codec import TURNS, chat_tokenizer
from tests.test_reward_model import word_tokenizer

WORDS = "<pad> <end> a b c d e f g h i"
TOKENIZER = word_tokenizer(WORDS, pad_token="<pad>")
WINDOWED = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, sliding_window=9)
PROMPTS = [{"prompt": "a b c"}, {"prompt": "d"}, {"prompt": "e f", "prompt_ids": [3, 4]}]
SETTINGS = dict(max_new_tokens=6, beta=2.0, top_k=4, num_samples=3, seed=5)


def texts(method="pargs", objective="partial", append_eos=True, prompts=PROMPTS, rows=None, **changes):
    """rows: behind each text, of the methods that have several."""
    rm = tiny_reward_model("llama")
    rm.config.pargs = {"objective": objective, "append_eos": append_eos, "prompt_format": "text"}
    settings = {name: value for name, value in SETTINGS.items() if METHODS[method].guided or name != "top_k"}
    settings |= changes | ({METHODS[method].rows: rows} if rows and METHODS[method].rows else {})
    return generate_texts(tiny_lm("gpt2"), TOKENIZER, prompts, **dict(method=method, reward_model=rm) | settings)


@pytest.mark.parametrize("method", ["plain", "pargs", "best-of-n", "smc"])
def test_a_text_depends_on_its_own_numbers_alone(method):
    """Not on the batch, nor on what was done before."""
    whole = list(texts(method, rows=3, batch_size=16))
    assert [(r["prompt_number"], r["sample"]) for r in whole] == list(itertools.product(range(3), range(3)))
    assert len({tuple(r["response_ids"]) for r in whole}) > 3
    alone = list(texts(method, rows=3, batch_size=1))
    rest = list(texts(method, rows=3, batch_size=2, done=dict.fromkeys([(0, 0), (1, 2), (2, 2)])))
    ids = {(r["prompt_number"], r["sample"]): r["response_ids"] for r in whole}
    for record in alone + rest:
        assert record["response_ids"] == ids[record["prompt_number"], record["sample"]]
    assert len(rest) == 6


def test_the_kl_is_to_the_reference_as_it_is_sampled_and_the_record_says_how():
    """Which `text_log_probs` reads again, for texts of several references at once."""
    warped = dict(ref_temperature=0.5, ref_top_p=0.9)
    plain, guided, usual = (
        list(texts(method, **how)) for method, how in (("plain", warped), ("pargs", warped), ("pargs", {}))
    )
    assert [record["kl"] for record in plain] == pytest.approx([0.0] * 9, abs=1e-12)
    assert [record["reference"] for record in guided] == 9 * [vars(Warp(temperature=0.5, top_p=0.9))]
    assert not any("reference" in record for record in usual)
    lm = tiny_lm("gpt2")
    again = text_log_probs(lm, Codec.of(lm, TOKENIZER, "text"), [*guided, *usual, *plain], batch_size=4)
    assert again == pytest.approx([record["ref_log_prob"] for record in [*guided, *usual, *plain]], abs=1e-9)


def test_a_guide_fine_tuned_by_dpo_is_relative_to_the_reference_as_it_is():
    guide = tiny_lm(seed=3)
    guide.config.pargs = {"objective": "dpo", "beta": 1.0, "prompt_format": "text"}
    with pytest.raises(ValueError, match=r"leave out ref_temperature \(--ref-temperature\)"):
        next(texts("implicit", reward_model=guide, ref_temperature=0.3))
    next(texts("implicit", reward_model=guide, temperature=0.3))


def test_a_guide_that_rates_no_whole_texts_gives_none_a_reward():
    """A distilled one is right up to a constant per prefix, and a language model has no number at all."""
    distilled, lm, scalar = tiny_reward_model(num_labels=11), tiny_lm(seed=3), tiny_reward_model("llama")
    distilled.config.pargs = {"objective": "partial", "distilled": {"beta": 1.0}, "prompt_format": "text"}
    lm.config.pargs = {"objective": "reweighted", "beta": 1.0, "prompt_format": "text"}
    assert "reward" not in next(texts("pargs", reward_model=distilled))
    for method, models in (
        ("best-of-n", dict(reward_model=distilled)),
        ("smc", dict(reward_model=distilled)),
        ("smc", dict(reward_model=scalar, final_reward_model=distilled)),
        ("smc", dict(reward_model=scalar, final_reward_model=lm)),
    ):
        with pytest.raises(ValueError, match="rates no whole texts"):
            next(texts(method, **models))
    assert "reward" in next(texts("smc", reward_model=distilled, final_reward_model=scalar))


@pytest.mark.parametrize("method", ["plain", "best-of-n"])
@pytest.mark.parametrize("setting", [dict(top_k=2), dict(min_ref_prob=0.1), dict(truncate=True)])
def test_methods_without_candidates_refuse_settings_of_them(method, setting):
    with pytest.raises(ValueError, match=f"candidates of guided methods, and {method} has none; .* use ref_top_k"):
        next(texts(method, **setting))


def language_model_guide(objective="reweighted", **more):
    guide = tiny_lm("llama", seed=3)
    guide.config.pargs = {"objective": objective, "prompt_format": "text"} | more
    return guide


def test_a_language_model_guides_by_its_recorded_objective():
    """Reweighted for beta 2: at beta 2 over all tokens the texts are its own. They have no reward."""
    settings = dict(num_samples=3, seed=5, max_new_tokens=6)
    guided = texts("reweighted", reward_model=language_model_guide(beta=2.0), top_k=0)
    own = generate_texts(tiny_lm("llama", seed=3), TOKENIZER, PROMPTS, method="plain", **settings)
    for ours, theirs in zip(guided, own, strict=True):
        assert ours["response_ids"] == theirs["response_ids"]
        assert ours["kl"] == pytest.approx(theirs["ref_log_prob"] - ours["ref_log_prob"])
        assert "reward" not in ours
    lm, guide = tiny_lm("gpt2"), language_model_guide("autoregressive")
    [record] = texts("genarm", reward_model=guide, prompts=PROMPTS[:1], num_samples=1, top_k=0, max_new_tokens=1)
    codec = Codec.of(lm, TOKENIZER, "text")
    each = [record | {"response_ids": [token], "response": codec.text([token])} for token in range(11)]
    refs, theirs = (torch.tensor(text_log_probs(model, codec, each)) for model in (lm, guide))
    expected = (refs + 2.0 * theirs).log_softmax(-1)[record["response_ids"][0]]
    assert record["kl"] + record["ref_log_prob"] == pytest.approx(float(expected))


@pytest.mark.parametrize("method", ["best-of-n", "smc"])
def test_a_language_model_rates_no_whole_texts(method):
    with pytest.raises(ValueError, match=f"method {method} needs rewards of whole texts, and a language model"):
        next(texts(method, reward_model=language_model_guide()))


@pytest.mark.parametrize("method", ["pargs", "best-of-n", "smc"])
@pytest.mark.parametrize("n", [2, 5])
def test_shards_joined_are_one_run(method, n):
    """In order, number by number; with five parts of three prompts two of them are empty."""
    exact = ["prompt", "prompt_number", "sample", "response", "response_ids", "finished"]
    whole, joined = (
        [record for shard in shards for record in texts(method, rows=3, shard=shard)]
        for shards in ([(0, 1)], [(i, n) for i in range(n)])
    )
    assert [[r[k] for k in exact] for r in joined] == [[r[k] for k in exact] for r in whole]
    for name in ("ref_log_prob", "kl", "reward"):
        assert [r[name] for r in joined] == pytest.approx([r[name] for r in whole], abs=1e-12)


@given(st.integers(0, 50), st.integers(1, 60))
def test_shards_hold_every_prompt_once_and_are_of_one_size(prompts, n):
    parts = [shard_range(prompts, (i, n)) for i in range(n)]
    assert [number for part in parts for number in part] == list(range(prompts))
    assert {len(part) for part in parts} <= {prompts // n, prompts // n + 1}


def test_smc_with_one_particle_is_pargs():
    ours, pargs = (list(texts(method, **changes)) for method, changes in (("smc", dict(particles=1)), ("pargs", {})))
    assert [r["response_ids"] for r in ours] == [r["response_ids"] for r in pargs]
    assert [r["kl"] for r in ours] == pytest.approx([r["kl"] for r in pargs])
    assert [r["response_ids"] for r in texts("smc", particles=16)] != [r["response_ids"] for r in pargs]


def test_smc_reports_the_reward_it_weighed_by():
    whole = tiny_reward_model("qwen2", seed=3)
    for record in texts("smc", final_reward_model=whole, num_samples=1):
        prompt = PROMPTS[record["prompt_number"]]
        ids = prompt.get("prompt_ids") or TOKENIZER(prompt["prompt"])["input_ids"]
        text = torch.tensor([ids + record["response_ids"]])
        assert record["reward"] == pytest.approx(prefix_rewards(whole, text, torch.ones_like(text))[0, -1].item())


def test_records_say_what_was_written():
    for record in texts():
        ids = record["response_ids"]
        assert record["finished"] == (ids[-1] == 1)
        assert record["response"].split() == [WORDS.split()[i] for i in ids if i > 1]
        assert record["ref_log_prob"] < 0
    again = list(texts(prompts=[{"prompt": "b c"}], num_samples=1))  # prompt_ids won over prompt in the third
    assert len(again) == 1
    assert "reward" not in next(iter(generate_texts(tiny_lm(), TOKENIZER, PROMPTS, method="plain", max_new_tokens=2)))


def test_the_reward_of_a_record_is_that_of_its_last_prefix():
    lm, rm = tiny_lm(), tiny_reward_model()
    rm.config.pargs = {"objective": "partial"}
    for record in generate_texts(lm, TOKENIZER, PROMPTS, method="pargs", reward_model=rm, **SETTINGS):
        prompt = PROMPTS[record["prompt_number"]]
        ids = prompt.get("prompt_ids") or TOKENIZER(prompt["prompt"])["input_ids"]
        text = torch.tensor([ids + record["response_ids"]])
        assert record["reward"] == pytest.approx(prefix_rewards(rm, text, torch.ones_like(text))[0, -1].item())


@pytest.mark.parametrize(
    ("method", "objective", "append_eos", "warning"),
    [
        ("pargs", "full", True, r"whose scores of prefixes mean nothing\) is args; train one with --objective partial"),
        ("args", "partial", True, "with a reward model of prefixes is pargs; train one with --objective full"),
        ("cd", "partial", True, "cd with a reward model of prefixes is pargs; train one with --objective value"),
        ("pargs-greedy", "value", True, "with a value model is cd; train one with --objective partial"),
        ("pargs", "partial", False, "its reward of ending is extrapolation"),
    ],
)
def test_a_reward_model_used_for_what_it_was_not_trained_for_is_reported(method, objective, append_eos, warning):
    with pytest.warns(UserWarning, match=warning):
        next(texts(method, objective, append_eos))


@pytest.mark.parametrize(
    ("method", "objective"),
    [("pargs", "partial"), ("args-greedy", "full"), ("best-of-n", "full"), ("cd", "value"), ("smc", "full")],
)
def test_the_right_reward_model_draws_no_warning(method, objective):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(texts(method, objective))


def test_another_vocabulary_is_bridged_through_text_and_reported():
    other = word_tokenizer("i h g f e d c b a <end> <pad>", pad_token="<pad>")
    with pytest.warns(
        UserWarning,
        match=r"differ at 10 ids: 0 \('<pad>'\).*top_k reward passes over a whole text, here of up to 9 tok",
    ):
        record = next(texts(reward_tokenizer=other))
    assert record["response_ids"]


def test_every_end_token_ends_a_text_for_a_reward_model_of_another_vocabulary():
    """The end of the generation configuration, word "i", reaches it as its own end token."""
    lm, rm = tiny_lm("gpt2"), tiny_reward_model()
    other = word_tokenizer("i h g f e d c b a <end> <pad>", pad_token="<pad>")
    lm.generation_config.eos_token_id = 10
    settings = dict(method="best-of-n", reward_model=rm, reward_tokenizer=other, n=1, num_samples=20, max_new_tokens=4)
    with pytest.warns(UserWarning, match="differ at"):
        records = list(generate_texts(lm, TOKENIZER, PROMPTS[:1], **settings))
    ended = [record for record in records if record["response_ids"][-1] == 10]
    assert ended
    for record in ended:
        words = ["a", "b", "c", *TOKENIZER.convert_ids_to_tokens(record["response_ids"][:-1]), "<end>"]
        ids = torch.tensor([other.convert_tokens_to_ids([word for word in words if word != "<pad>"])])
        assert record["reward"] == pytest.approx(prefix_rewards(rm, ids, torch.ones_like(ids))[0, -1].item())


def test_model_calls_are_counted_by_the_row():
    """Plain: a pass a token. Guided: two, one more for the prompt, and one for the reward of the whole text."""
    settings = dict(prompts=[{"prompt": "a b c"}], num_samples=2, max_new_tokens=6)
    calls = {}
    for method in ("plain", "pargs", "best-of-n"):
        records = list(texts(method, rows=3, **settings))
        steps = max(len(r["response_ids"]) for r in records) if method != "best-of-n" else None
        calls[method] = records[0]["cost"]["model_calls"], steps
        assert records[0]["cost"]["seconds"] > 0
    assert calls["plain"] == (calls["plain"][1] + 1, calls["plain"][1])  # its reward is read once
    assert calls["pargs"] == (2 * calls["pargs"][1] + 2, calls["pargs"][1])  # the reward model reads the prompt first
    assert 3 * 2 + 1 <= calls["best-of-n"][0] <= 3 * (6 + 1) + 1


def test_the_calls_of_another_thread_are_not_counted():
    """Two threads write different texts with the same models, in turns: each record says what it says alone."""
    lm, rm, turns = tiny_lm("gpt2"), tiny_reward_model("llama"), Barrier(2)
    rm.config.pargs = {"objective": "partial", "prompt_format": "text"}

    def run(tokens, wait=None):
        settings = dict(method="pargs", reward_model=rm, beta=1.0, top_k=4)
        written = generate_texts(lm, TOKENIZER, PROMPTS[:1], max_new_tokens=tokens, on_step=wait, **settings)
        return [record["cost"]["model_calls"] for record in written]

    def waiting(step):
        if step.number == 0:
            turns.wait(timeout=60)  # both are within a batch

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda tokens: run(tokens, waiting), (3, 6)))
    assert together == [run(3), run(6)]


def test_the_scorer_is_chosen_by_what_is_right():
    assert isinstance(choose_scorer(tiny_reward_model("llama"), 60), SiblingScorer)
    windowed = tiny_reward_model("mistral", **WINDOWED)
    assert isinstance(choose_scorer(windowed, 9), SiblingScorer)
    with pytest.warns(UserWarning, match=r"window of 9. Falling back to whole texts: .* of up to 10 tokens, instead"):
        assert isinstance(choose_scorer(windowed, 10), ReencodeScorer)
    with pytest.warns(UserWarning, match="mpt scores candidates over one cache differently|cannot score"):
        assert isinstance(
            choose_scorer(tiny_reward_model("mpt", d_model=16, n_layers=2, n_heads=2), 10), ReencodeScorer
        )


def test_an_end_token_that_pads_is_noticed_though_it_be_id_zero():
    with pytest.warns(UserWarning, match=r"takes an end token \(0\) for padding"):
        assert isinstance(choose_scorer(tiny_reward_model("llama", pad_token_id=0), 60, (0,)), ReencodeScorer)


def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn():
    lm = tiny_lm(vocabulary=16)
    lm.get_output_embeddings().weight.data[11:] += 1.0  # the padding rows, made likely
    records = generate_texts(lm, TOKENIZER, PROMPTS, method="plain", num_samples=20, max_new_tokens=8)
    assert {i for record in records for i in record["response_ids"]} <= set(range(11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="pragmatic"), "method must be one of plain, pargs"),
        (dict(prompts=[]), "prompts is empty; give at least one"),
        (dict(num_samples=0), "num_samples must be at least 1"),
        (dict(n=0), "n must be at least 1"),
        (dict(method="smc", particles=0), "particles must be at least 1"),
        (dict(method="smc", temperature=0.5), "temperature must be 1 for smc"),
        (dict(final_reward_model=tiny_reward_model()), "final_reward_model .* is for method smc alone, not for pargs"),
        (dict(n=3), r"n \(--n\) has no effect with method pargs: leave it out"),
        (dict(method="smc", n=3), r"n \(--n\) has no effect with method smc"),
        (dict(method="best-of-n", particles=3), r"particles \(--particles\) has no effect with"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(method="args", reward_model=None), "method args needs a reward model"),
        (dict(ref_top_p=0.0), "ref_top_p must be above 0 and at most 1, got 0.0"),
        (dict(min_ref_prob=2.0), "min_ref_prob must be a probability, from 0 to 1, got 2.0"),
        (dict(top_k=12), "top_k must lie between 1 and the vocabulary size 11"),
        (dict(beta=float("inf")), "beta must be a finite number"),
        (
            dict(prompts=[{"prompt": "a"}, {"prompt": "a " * 60}]),
            "prompt number 1 has 60 tokens; with max_new_tokens=6",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*reward model of")
def test_bad_arguments_are_named(change, message):
    arguments = dict(method="pargs", reward_model=tiny_reward_model(), prompts=PROMPTS) | SETTINGS
    with pytest.raises(ValueError, match=message):
        list(generate_texts(tiny_lm(), TOKENIZER, **{**arguments, **change}))


def test_particles_are_chosen_by_other_numbers_than_draw_their_tokens(monkeypatch):
    """Else whoever drew a likely token would also be gone on with."""
    seen = []

    def recorded(*models, choices, uniforms, **settings):
        particles = smc.smc(*models, choices=choices, uniforms=uniforms, **settings)
        pick = type(particles).pick
        seen.append((uniforms, choices))
        monkeypatch.setattr(type(particles), "pick", lambda self, chosen: seen.append(chosen) or pick(self, chosen))
        return particles

    monkeypatch.setattr(methods, "smc", recorded)
    [*texts("smc", batch_size=100, particles=3)]
    (uniforms, choices), picks = seen
    numbers = torch.cat([uniforms.flatten(), choices.flatten(), picks.flatten()])
    assert numbers.numel() == 9 * (3 * 6 + 6 + 1)
    assert len(numbers.unique()) == numbers.numel()


def out_of_memory_above(rows, error):
    """A language model that runs out of memory for batches of more rows."""
    lm = tiny_lm("gpt2")

    def allocate(body, arguments, keywords):
        if len(keywords["input_ids"]) > rows:
            if error is None:
                torch.empty(2**50)  # the real thing
            raise error

    lm.register_forward_pre_hook(allocate, with_kwargs=True)
    return lm


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2147483648 bytes."),
    None,
]


@pytest.mark.parametrize("error", ERRORS, ids=["device", "cpu", "real"])
def test_out_of_memory_says_what_to_lower_and_loses_nothing(tmp_path, error):
    settings, file = dict(method="plain", num_samples=3, max_new_tokens=6, seed=5), tmp_path / "out.jsonl"
    list(write_records(tmp_path / "whole.jsonl", generate_texts(tiny_lm(), TOKENIZER, PROMPTS, **settings), settings))
    lm = out_of_memory_above(4, error)

    def run(**more):
        done = read_done(file, settings, PROMPTS)
        list(write_records(file, generate_texts(lm, TOKENIZER, PROMPTS, done=done, **settings, **more), settings))

    run(batch_size=4, shard=(0, 3))  # the texts of the first prompt
    with pytest.raises(MemoryError, match=OUT_OF_MEMORY) as raised:
        run(batch_size=6)
    assert is_out_of_memory(raised.value.__cause__)
    assert len(read_done(file, settings, PROMPTS)) == 3
    run(batch_size=3)
    whole, resumed = ([json.loads(line) for line in path.open()] for path in (tmp_path / "whole.jsonl", file))
    assert [r["response_ids"] for r in resumed] == [r["response_ids"] for r in whole]


OUT_OF_MEMORY = (
    "out of memory while decoding 6 texts at once, prompts of up to 3 tokens, --max-new-tokens 6: "
    "lower --batch-size .here to 3 or less. and go on with --resume"
)


@pytest.mark.parametrize(
    ("method", "rows", "flag"),
    [("plain", {}, ""), ("best-of-n", {"n": 3}, "--n, "), ("smc", {"particles": 3}, "--particles, ")],
)
def test_out_of_memory_for_a_single_text_names_what_else_there_is(method, rows, flag):
    lm, rm = out_of_memory_above(0, ERRORS[0]), tiny_reward_model()
    settings = dict(method=method, reward_model=rm, max_new_tokens=6)
    records = generate_texts(lm, TOKENIZER, PROMPTS, **settings, **rows, batch_size=1)
    message = f"it is one text, so --batch-size cannot help; write another file with less {flag}--max-new-tokens or the"
    with pytest.raises(MemoryError, match=message):
        next(records)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    lm = out_of_memory_above(0, RuntimeError("sizes differ"))
    with pytest.raises(RuntimeError, match="sizes differ"):
        next(generate_texts(lm, TOKENIZER, PROMPTS, method="plain", max_new_tokens=6))


@pytest.mark.parametrize("cut", [{}, dict(ref_top_k=4), dict(ref_top_p=0.8), dict(ref_min_p=0.3)])
@pytest.mark.parametrize("rows", [14, 17])  # as many as the tokenizer has ids, and more, which mean nothing
def test_a_text_has_the_log_probability_with_which_it_was_drawn(rows, cut):
    """Of unequal prompts and lengths, in batches; and another model gives it another one."""
    lm, other, tokenizer = tiny_lm(vocabulary=rows), tiny_lm(vocabulary=rows, seed=5), tiny_tokenizer()
    codec = Codec.of(lm, tokenizer)
    prompts = [{"prompt": "a b c"}, {"prompt": "d"}]
    texts = [*generate_texts(lm, tokenizer, prompts, method="plain", num_samples=9, max_new_tokens=6, **cut)]
    assert len({len(text["response_ids"]) for text in texts}) > 1
    drawn = [text["ref_log_prob"] for text in texts]
    np.testing.assert_allclose(text_log_probs(lm, codec, texts, batch_size=3), drawn, rtol=0, atol=1e-10)
    assert np.abs(np.subtract(text_log_probs(other, codec, texts), drawn)).min() > 1e-3
    assert (-math.inf in text_log_probs(other, codec, texts)) == bool(cut)  # which would not have written some of them


def test_texts_of_no_token_are_certain():
    lm, tokenizer = tiny_lm(vocabulary=14), tiny_tokenizer()
    empty = {"prompt": "a", "prompt_number": 0, "sample": 0, "response": "", "response_ids": [], "finished": False}
    assert text_log_probs(lm, Codec.of(lm, tokenizer), [empty]) == [0.0]


def test_texts_are_read_again_in_batches_that_fit(monkeypatch):
    lm, tokenizer, rows = tiny_lm(vocabulary=14), tiny_tokenizer(), []
    codec, prompts = Codec.of(lm, tokenizer), [{"prompt": "a b c"}]
    texts = [*generate_texts(lm, tokenizer, prompts, method="plain", num_samples=5, max_new_tokens=6)]
    whole = text_log_probs(lm, codec, texts)
    hook = lm.get_output_embeddings().register_forward_hook(lambda head, args, logits: rows.append(len(logits)))
    monkeypatch.setattr("pargs_min.texts.MOST_LOGITS", 2 * 7 * 14)  # of two texts, each of six tokens and one before
    assert text_log_probs(lm, codec, texts) == pytest.approx(whole, abs=1e-9)
    hook.remove()
    assert rows == [2, 2, 1]


def chats(method="plain", prompts=({"prompt": "a b"}, {"prompt": "c"}), lm=None, **settings):
    """Texts of a language model whose tokenizer has a chat template."""
    lm = lm or tiny_lm(vocabulary=14)
    return list(generate_texts(lm, tiny_tokenizer(), list(prompts), method=method, max_new_tokens=5, **settings))


def guide(form: str | None = None, **changes):
    rm = tiny_reward_model(vocabulary=14)
    rm.config.pargs = {"objective": "partial"} | ({"prompt_format": form} if form else {}) | changes
    return rm


def test_every_text_says_what_was_read_in_which_form():
    """Plain and guided, text and chats: a guide that weighs nothing changes nothing of the prompt."""
    for form in ("chat", "text"):
        plain = chats(prompt_format=form)
        weightless = chats("pargs", beta=0.0, reward_model=guide(form))
        for a, b in zip(plain, weightless, strict=True):
            assert a["prompt_ids"] == b["prompt_ids"] == encode_prompt(tiny_tokenizer(), a["prompt"], form)
            assert a["prompt_format"] == b["prompt_format"] == form
    with pytest.warns(UserWarning, match="text prompts become a user's message"):
        assert chats()[0]["prompt_format"] == "chat"
    lm = tiny_lm(vocabulary=14)
    lm.config.pargs = {"prompt_format": "dialogue"}
    assert chats(lm=lm)[0]["prompt_format"] == "dialogue"


@pytest.mark.parametrize(
    "settings",
    [
        dict(reward_model=guide("chat"), prompt_format="text"),
        dict(reward_model=guide("chat"), final_reward_model=guide("text"), method="smc"),
    ],
)
def test_the_models_of_a_run_have_one_form_of_prompts(settings):
    with pytest.raises(ValueError, match="cannot be chat and text at once"):
        chats(**{"method": "pargs"} | settings)


def test_a_resumed_run_forms_the_batches_of_a_whole_one():
    """So in half precision, where the rows of a batch change each other, it writes the same texts, too."""
    lm, rm = tiny_lm("llama", 14).bfloat16(), guide("text").bfloat16()
    prompts = [{"prompt": "a b c d e f g"[: 2 * n - 1]} for n in (1, 7, 3, 2, 6)]
    settings = dict(prompts=prompts, lm=lm, reward_model=rm, num_samples=4, seed=1, method="pargs", beta=3.0)
    whole = chats(batch_size=8, **settings)
    done = {(text["prompt_number"], text["sample"]): text["prompt_ids"] for text in whole[:5]}
    rest = chats(batch_size=8, done=done, **settings)
    assert [text["response_ids"] for text in rest] == [text["response_ids"] for text in whole[5:]]
    assert [text["ref_log_prob"] for text in rest] == [text["ref_log_prob"] for text in whole[5:]]


def test_a_guide_with_another_tokenizer_reads_chats_as_its_own_template_writes_them():
    """Closed where they have ended, and counted in its own tokens."""
    theirs, seen, rm = tiny_tokenizer(), [], tiny_reward_model(vocabulary=14)
    theirs.pad_token = None
    theirs.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    codec, prompt = Codec(tiny_tokenizer(), "chat"), {"prompt": [{"role": "user", "content": "a b"}]}
    forward = rm.base_model.register_forward_hook(lambda _, __, kwargs, ___: seen.append(kwargs), with_kwargs=True)
    ids, mask = left_pad([[*codec.prompt(prompt), 9], [*codec.prompt(prompt), 9, 10, 1]])
    found = text_rewards(rm, theirs, codec, [prompt])(ids, mask)
    forward.remove()
    rows = zip(seen[0]["input_ids"], seen[0]["attention_mask"].bool(), strict=True)
    read = [theirs.decode(row[keep]) for row, keep in rows]
    assert read == ["user a b </s> assistant c", "user a b </s> assistant c d </s>"]
    assert found.shape == (2,)
    with pytest.raises(ValueError, match=r"tokens, and GPT2For.* reads at most 64"):
        text_rewards(rm, theirs, codec, [prompt])(*left_pad([codec.prompt(prompt) + [9] * 60]))


@pytest.mark.parametrize(("method", "rows"), [("best-of-n", {"n": 2}), ("args", {})])
def test_the_reward_of_a_text_is_that_of_the_judge(method, rows):
    """Also of a published model of chats, which reads all that its template writes behind an answer."""
    tokenizer, lm = chat_tokenizer(TURNS.replace("<|end|> ", "<|end|> : ")), tiny_lm(vocabulary=12)
    lm.generation_config.eos_token_id = 0
    for record in ({}, {"objective": "full", "prompt_format": "chat"}, {"objective": "full", "prompt_format": "ids"}):
        rm = tiny_reward_model(vocabulary=12)
        rm.config.pargs = record
        prompts = [{"prompt": "a"}, {"prompt": "b c"}]
        settings = dict(method=method, reward_model=rm, num_samples=6, max_new_tokens=4, prompt_format="chat") | rows
        found = list(generate_texts(lm, tokenizer, prompts, **settings))
        assert {text["finished"] for text in found} == {True, False}
        assert record_rewards(rm, tokenizer)(found) == pytest.approx([text["reward"] for text in found], abs=1e-9)


def test_a_guide_of_the_same_words_and_another_template_reads_its_own():
    tokenizer, lm, rm = chat_tokenizer(), tiny_lm(vocabulary=12), tiny_reward_model(vocabulary=12)
    theirs = chat_tokenizer(TURNS.replace(" {{ m.role }} :", " {{ m.role }}"))
    rm.config.pargs = {"objective": "full", "prompt_format": "chat"}
    settings = dict(method="args", reward_model=rm, reward_tokenizer=theirs, top_k=3, max_new_tokens=3)
    with pytest.warns(UserWarning, match="reads prompt number 0 differently"):
        (text,) = generate_texts(lm, tokenizer, [{"prompt": "a"}], prompt_format="chat", **settings)
    assert record_rewards(rm, theirs)([text]) == pytest.approx([text["reward"]], abs=1e-9)


def test_a_text_of_two_prompts_is_nobodys():
    codec, rm = Codec(tiny_tokenizer(), "text"), tiny_reward_model(vocabulary=14)
    with pytest.raises(ValueError, match="a prompt begins with another one"):
        text_rewards(rm, tiny_tokenizer(), codec, [{"prompt": "a"}, {"prompt": "a b"}])
    text_rewards(rm, tiny_tokenizer(), codec, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])


def test_a_guide_is_for_the_reference_whose_texts_it_learned_from():
    rm = tiny_reward_model("llama")
    rm.config.pargs = {"objective": "soft", "prompt_format": "text", "reference": vars(Warp(temperature=0.7))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(texts("soft", reward_model=rm, ref_temperature=0.7))
    with pytest.warns(UserWarning, match=r"learned from texts of the reference sampled as Warp\(temperature=0.7"):
        next(texts("soft", reward_model=rm))


def test_a_reference_that_cannot_be_is_named():
    record = next(texts("plain")) | {"reference": {"heat": 2}}
    lm = tiny_lm("gpt2")
    with pytest.raises(ValueError, match=r"prompt number 0: `reference` says how .* 'heat'"):
        text_log_probs(lm, Codec.of(lm, TOKENIZER, "text"), [record])
