"""Files of texts beside each other: what is counted, with what, and what is refused."""

import json
import math
import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pargs_min.cli import main
from pargs_min.cli.resuming import write_records
from pargs_min.codec import Codec, encode_prompt
from pargs_min.evaluation.compare import compare, distinct, file_labels, read_files, rouge_l, with_kl_to
from pargs_min.evaluation.judges import Judge
from pargs_min.evaluation.statistics import interval_over_prompts, mean_and_error, wilson, win_rate
from pargs_min.evaluation.tables import KL, markdown, panels, write_comparison
from pargs_min.experiments.judging import gold_rewards
from pargs_min.records import read_prompts, read_texts
from pargs_min.store import content
from pargs_min.texts import generate_texts, text_log_probs
from tests.strategies import tiny_lm, tiny_reward_model, tiny_tokenizer


def text(prompt_number, sample, response, **more):
    record = {
        "prompt": f"prompt {prompt_number}",
        "prompt_number": prompt_number,
        "sample": sample,
        "response": response,
        "response_ids": [ord(letter) for letter in response],
        "finished": True,
        "method": "plain",
        "kl": float(len(response)),
    }
    return record | more


def write(path, texts):
    path.write_text("".join(json.dumps(record) + "\n" for record in texts))
    return path


def length(texts):
    return [len(record["response"]) for record in texts]


LENGTH = Judge("length", score=length)
LIKES_A = Judge("likes a", compare=lambda ours, theirs: [float("a" in record["response"]) for record in ours])
ONE = [text(0, 0, "aa"), text(0, 1, "bbbb"), text(1, 0, "c"), text(1, 1, "d")]
TWO = [text(0, 0, "a"), text(0, 1, "bbbb"), text(1, 0, "cc"), text(1, 1, "dd")]


def test_every_number_of_a_row_is_that_of_its_function():
    result = compare({"one": ONE, "two": TWO}, [LENGTH], against="one")
    one, two = result.rows
    groups = [0, 0, 1, 1]
    for row, lengths in ((one, [2, 4, 1, 1]), (two, [1, 4, 2, 2])):
        mean, error = mean_and_error(lengths, groups)
        low, high = interval_over_prompts(lengths, groups)
        want = {"mean": mean, "error": error, "low": low, "high": high}
        assert row["judges"]["length"]["reward"] == row["kl"] == row["length"] == want
        assert (row["prompts"], row["texts"], row["finished"]["mean"]) == (2, 4, 1.0)
    assert one["judges"]["length"]["win_rate"] is None
    won = two["judges"]["length"]["win_rate"]
    assert (won["rate"], won["wins"], won["ties"], won["losses"]) == (0.625, 2, 1, 1)
    assert (won["low"], won["high"]) == (0, 1)  # Student's interval, cut
    assert won["error_over_prompts"] == mean_and_error([0, 0.5, 1, 1], groups)[1] > 0
    assert result.answers[4] == {"file": "two", "prompt_number": 0, "sample": 0, "length": 1}


def test_texts_are_paired_by_prompt_and_sample_where_both_files_have_them():
    more = [text(0, 5, "zzzzzzz"), *TWO]
    rows = compare({"one": ONE, "more": more}, [LENGTH], against="one").rows
    won = rows[1]["judges"]["length"]["win_rate"]
    assert (won["wins"], won["ties"], won["losses"]) == (2, 1, 1)


def test_more_samples_of_the_same_prompts_make_no_win_rate_more_certain():
    """A pair a prompt has Wilson's interval; the same outcomes ten times over have one at least as wide."""

    def won(ours, theirs, samples):
        one, two = (
            [text(n, i, "x" * size) for n, size in enumerate(sizes) for i in range(samples)] for sizes in (theirs, ours)
        )
        return compare({"one": one, "two": two}, [LENGTH], "one").rows[1]["judges"]["length"]["win_rate"]

    single, tenfold = (won([1, 4, 2, 2, 2, 5, 5, 5], [2, 4, 1, 1, 1, 1, 9, 9], samples) for samples in (1, 10))
    assert single == win_rate([0, 0.5, 1, 1, 1, 1, 0, 0], range(8))
    assert (single["low"], single["high"]) == (wilson(4, 8)[0], wilson(5, 8)[1])
    assert tenfold["rate"] == single["rate"]
    assert tenfold["high"] - tenfold["low"] > 0.7 * (single["high"] - single["low"])
    assert (tenfold["wins"], tenfold["error_over_prompts"]) == (40, single["error_over_prompts"])
    always = won([2, 3, 4], [1, 1, 1], 10)
    assert (always["low"], always["high"]) == wilson(3, 3)
    assert won([2], [1], 3)["low"] is None


def test_every_prompt_counts_once_in_a_win_rate():
    one = [text(0, 0, "aa"), text(0, 1, "aa"), text(0, 2, "aa"), text(1, 0, "aa")]
    two = [text(0, 0, "a"), text(0, 1, "a"), text(0, 2, "a"), text(1, 0, "aaa")]
    assert compare({"one": one, "two": two}, [LENGTH], "one").rows[1]["judges"]["length"]["win_rate"]["rate"] == 0.5


def test_a_judge_that_compares_has_wins_and_no_reward():
    result = compare({"one": ONE, "two": TWO}, [LIKES_A], against="one")
    assert result.rows[0]["judges"]["likes a"] == {"reward": None, "win_rate": None, "out_of_format": 0}
    assert result.rows[1]["judges"]["likes a"]["win_rate"]["wins"] == 1
    assert [answer["likes a"] for answer in result.answers] == [None] * 4 + [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="judge likes a compares texts: say with which"):
        compare({"one": ONE}, [LIKES_A])


def test_answers_out_of_format_are_counted_kept_and_not_guessed(tmp_path):
    def odd(texts):
        return ["3", 1.0, float("nan"), 5.0] if texts[0]["response"] == "a" else length(texts)

    unclear = Judge("unclear", compare=lambda ours, theirs: [["A?", "[[B]]"], 1.0, 0.5, 0.0][: len(ours)])
    result = compare({"one": ONE, "two": TWO}, [Judge("odd", score=odd), unclear], against="one")
    judged = result.rows[1]["judges"]["odd"]
    assert judged["out_of_format"] == 2
    assert judged["reward"]["mean"] == 3.0
    assert (judged["win_rate"]["wins"], judged["win_rate"]["losses"]) == (1, 1)  # 1 against 4, 5 against 1
    judged = result.rows[1]["judges"]["unclear"]
    assert (judged["out_of_format"], judged["win_rate"]["rate"]) == (1, (1 + 0.25) / 2)  # over prompts
    write_comparison(result, tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert kept[4]["odd"] == "3"
    assert kept[4]["unclear"] == ["A?", "[[B]]"]
    nothing = compare({"one": ONE}, [Judge("silent", score=lambda texts: [None] * len(texts))]).rows[0]
    assert nothing["judges"]["silent"] == {"reward": None, "win_rate": None, "out_of_format": 4}


def test_numbers_of_numpy_are_kept_as_numbers(tmp_path):
    judge = Judge("numpy", score=lambda texts: [np.float32(1.5), np.int64(2), {1}, None])
    write_comparison(compare({"one": ONE}, [judge]), tmp_path)
    kept = [json.loads(line)["numpy"] for line in (tmp_path / "answers.jsonl").open()]
    assert kept == [1.5, 2, "{1}", None]


def test_diversity_is_among_the_samples_of_a_prompt():
    words = [text(0, 0, "the cat sat"), text(0, 1, "the dog sat"), text(1, 0, "one two"), text(1, 1, "one two")]
    pytest.importorskip("rouge_score")
    row = compare({"words": words}).rows[0]
    assert rouge_l(words[:2]) == pytest.approx(2 / 3)
    assert row["rouge_l"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(rouge_l(words[:1]))
    pairs = [rouge_l([a, b]) for a, b in ((words[0], words[1]), (words[0], words[2]), (words[1], words[2]))]
    assert rouge_l(words[:3]) == pytest.approx(sum(pairs) / 3)
    assert compare({"words": [words[0], words[2]]}).rows[0]["rouge_l"] is None


def test_distinct_n_is_over_as_many_samples_in_every_file():
    """Or the file with more texts would look less diverse."""
    more = [*ONE, text(0, 2, "aa")]
    result = compare({"one": ONE, "more": more})
    assert result.rows[0]["distinct_1"] == result.rows[1]["distinct_1"]
    assert result.rows[0]["distinct_1"]["mean"] == (distinct(ONE[:2], 1) + distinct(ONE[2:], 1)) / 2 == (2 / 6 + 1) / 2
    assert result.rows[0]["distinct_2"]["mean"] == 2 / 4  # the second prompt has no bigram
    assert "the prompts have 2 to 3 samples: distinct-n is over 2 of each" in result.notes


def test_a_judge_that_guided_a_method_is_reported(tmp_path):
    folder = str(tmp_path)
    settings = {"settings": {"reward_model": folder + "/."}}
    files = {"guided": [text(0, 0, "a", method="pargs", **settings)], "scored": [text(0, 0, "a", **settings)]}
    notes = compare(files, [Judge(folder, score=length)]).notes
    assert [note for note in notes if "guided" in note] == notes
    assert notes[0].startswith(f"the judge {folder} guided guided: its reward says how well it was optimised")
    assert not compare(files, [LENGTH]).notes
    (tmp_path / "config.json").write_text("{}")
    copied = {"settings": {"reward_model": "elsewhere", "contents": {"reward_model": content(folder)}}}
    assert compare({"copy": [text(0, 0, "a", method="pargs", **copied)]}, [Judge(folder, score=length)]).notes
    smc = text(0, 0, "a", method="smc", settings={"reward_model": "another", "final_reward_model": folder})
    assert compare({"smc": [smc]}, [Judge(folder, score=length)]).notes[0].startswith(f"the judge {folder} guided smc")


def test_kl_to_another_model_is_left_out_and_a_bound_is_marked():
    def by(model, **more):
        return [text(0, 0, "a", settings={"model": model}, **more), text(1, 0, "b", settings={"model": model}, **more)]

    bounds = {"best": by("ref", method="best-of-n"), "smc": by("ref", method="smc")}
    result = compare({"plain": by("ref"), "dpo": by("dpo")} | bounds, against="plain")
    assert [row["kl"] and row["kl"]["mean"] for row in result.rows] == [1.0, None, 1.0, 1.0]
    (note,) = (note for note in result.notes if note.startswith("dpo"))
    assert note.endswith("its KL, to its own model, is left out (--reference MODEL takes all to one)")
    table = markdown(result).splitlines()
    assert "≤ 1 " in table[4]
    assert "≤ 1 " in table[5]
    assert [note.split(":")[0] for note in result.notes[1:]] == [
        "the KL of best-of-n is an upper bound",
        "the KL of smc is an upper bound",
    ]
    assert "≤" not in table[2] + table[3]
    shown = panels(result)
    assert shown[KL]["best"] == shown[KL]["smc"] == (1.0, 0.0, 1.0)  # a line from 0
    assert shown[KL]["plain"][1] > 0


def test_a_text_that_the_other_reference_never_writes_is_named():
    written = text(0, 0, "a") | {"kl": 0.0, "ref_log_prob": -1.0, "reference": {"top_k": 2}}
    with pytest.raises(ValueError, match=r"cannot have been written by base, sampled with .*: its KL is infinite"):
        with_kl_to("base", [written], [-math.inf])


def test_kl_is_to_the_reference_as_it_was_sampled():
    cold = [text(n, 0, "a") | {"reference": {"temperature": 0.5}} for n in range(2)]
    found = compare({"usual": [text(n, 0, "a") for n in range(2)], "cold": cold}, [LENGTH], "usual")
    assert [row["kl"] is None for row in found.rows] == [False, True]
    assert any("sampled with temperature 0.5" in note for note in found.notes)


def test_kl_is_to_weights_and_not_to_names():
    def by(*models):
        made = [{"model": name, "contents": {"model": content}} for name, content in models]
        return [text(number, 0, "a", ref_log_prob=-2.0, settings=settings) for number, settings in enumerate(made)]

    one, moved, retrained = (by((name, key), (name, key)) for name, key in (("lm", "x"), ("./lm", "x"), ("lm", "y")))
    files = {"one": one, "moved": moved, "retrained": retrained, "mixed": by(("lm", "x"), ("lm", "y"))}
    result = compare(files)
    assert [row["kl"] and row["kl"]["mean"] for row in result.rows] == [1.0, 1.0, None, None]
    assert result.notes[0].startswith("retrained was written by lm (y), one by lm (x): its KL")
    assert result.notes[1].startswith("mixed was written by lm (x) and lm (y), one by lm (x)")
    assert compare({name: files[name] for name in ("mixed", "one")}, against="mixed").rows[0]["kl"] is None
    taken = {name: with_kl_to("base", texts, [-3.0, -3.0]) for name, texts in files.items()}
    assert None not in [row["kl"] for row in compare(taken).rows]


def test_cost_is_reported_where_it_was_recorded():
    paid = [text(n, 0, "a", cost={"seconds": 2.0 + n, "model_calls": 30}) for n in (0, 1)]
    free = [text(n, 0, "a") for n in (0, 1)]
    paid_row, free_row = compare({"paid": paid, "free": free}).rows
    assert (paid_row["seconds"]["mean"], paid_row["model_calls"]["mean"]) == (2.5, 30.0)
    assert free_row["seconds"] is free_row["model_calls"] is None


def test_a_judge_adds_measures_of_its_answers():
    judge = Judge("odd", score=lambda texts: [-3.5, 1.0, 2.0, 2.0], measures={"off_grammar": lambda a: float(a < 0)})
    result = compare({"one": ONE}, [judge])
    assert result.rows[0]["off_grammar"]["mean"] == 0.25
    assert "off grammar" in markdown(result)


def test_the_table_has_a_line_a_file_and_no_empty_column():
    result = compare({"one": ONE, "two": TWO}, [LENGTH, Judge("http://x/v1#gpt", compare=LIKES_A.compare)], "one")
    head, rule, one, two, *_ = markdown(result).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names[:5] == ["file", "texts", "reward (length)", "wins (length)", "wins (gpt)"]
    assert "seconds" not in names
    assert len({len(line) for line in (head, rule, one, two)}) == 1
    cells = dict(zip(names, [cell.strip() for cell in two.strip("|").split("|")], strict=True))
    assert cells["wins (length)"].endswith("2/1/1")
    assert cells["wins (length)"].startswith("62% [")
    assert cells["reward (length)"] == "2.25 ± 0.25 [-0.927, 5.43]"
    assert cells["texts"] == "4 of 2"


def test_judges_with_one_last_name_have_columns_of_their_own():
    judges = [
        Judge(f"{folder}/rm", score=lambda texts, x=x: [x] * len(texts)) for x, folder in ((1.0, "a"), (2.0, "b"))
    ]
    result = compare({"one": ONE}, judges)
    assert {"reward (a/rm)", "reward (b/rm)"} <= {cell.strip() for cell in markdown(result).split("|")}
    assert {panels(result)[f"reward ({name}/rm)"]["one"][0] for name in "ab"} == {1.0, 2.0}


def test_one_prompt_has_no_error_and_the_files_are_still_valid(tmp_path):
    result = compare({"one": ONE[:2], "two": TWO[:2]}, [LENGTH], "one")
    assert result.rows[0]["kl"] == {"mean": 3.0, "error": None, "low": None, "high": None}
    write_comparison(result, tmp_path)
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["rows"] == json.loads(json.dumps(result.rows))
    assert (tmp_path / "evaluation.md").read_text() == markdown(result) + "\n"
    assert panels(result)["reward (length)"]["one"] == (3.0, 3.0, 3.0)


def test_the_figure_shows_intervals():
    shown = panels(compare({"one": ONE, "two": TWO}, [LENGTH], "one"))
    assert set(shown) == {"reward (length)", "share won (length)", KL}
    assert shown["reward (length)"]["two"] == (2.25, *interval_over_prompts([1, 4, 2, 2], [0, 0, 1, 1]))
    assert shown["share won (length)"] == {"two": (0.625, 0.0, 1.0)}


def test_no_two_files_have_one_label():
    names = [os.fsdecode(b"q\xff.jsonl"), r"q\xff.jsonl", "x.jsonl", "a/x.jsonl", "x.jsonl.jsonl"]
    labels = file_labels(names)
    assert len(set(labels.values())) == len(labels) == 5


def test_files_are_read_in_any_order_and_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / "a" / "x.jsonl", ONE[::-1]), write(tmp_path / "b" / "x.jsonl", ONE)]
    paths.append(write(tmp_path / "y.jsonl", TWO))
    assert read_files(file_labels([*paths, paths[0]])) == {str(paths[0]): ONE, str(paths[1]): ONE, "y": TWO}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (ONE[:2], r"two and one differ in 1 prompts: number 1 \(missing, not 'prompt 1'\)"),
        ([*ONE, text(7, 0, "x")], r"number 7 \('prompt 7', not missing\)"),
        ([*ONE[:2], text(1, 0, "x", prompt="other")], r"number 1 \('other', not 'prompt 1'\)"),
    ],
)
def test_files_of_other_prompts_are_refused(tmp_path, others, message):
    paths = [write(tmp_path / "one.jsonl", ONE), write(tmp_path / "two.jsonl", others)]
    with pytest.raises(ValueError, match=message):
        read_files(file_labels(paths))


def test_texts_whose_prompts_are_ids_alone_are_read_and_told_apart(tmp_path):
    def by_ids(*ids):
        record = text(0, 0, "a") | {"prompt_ids": [*ids]}
        return [{name: value for name, value in record.items() if name != "prompt"}]

    paths = [write(tmp_path / f"{i}.jsonl", by_ids(*ids)) for i, ids in enumerate(([7, 8], [7, 8], [7, 9]))]
    files = read_files(file_labels(paths[:2]))
    assert compare(files, [LENGTH], "0").rows[1]["judges"]["length"]["win_rate"]["ties"] == 1
    with pytest.raises(ValueError, match=r"number 0 \(\[7, 9\], not \[7, 8\]\)"):
        read_files(file_labels(paths))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "x.jsonl holds no texts"),
        ("\n", "x.jsonl holds no texts"),
        ("GOOD\nno\n", "x.jsonl:2: not JSON"),
        ("GOOD\n[1]\n", "x.jsonl:2: expected a JSON object, got"),
        ('{"prompt": "a", "chosen": "b"}\n', "x.jsonl:1: not a record of `pargs generate`: no field `prompt_number`"),
        (json.dumps(text(0, 1, "a") | {"response": None}), "x.jsonl:1: `response` must not be null"),
        (json.dumps(text(0, 1, "a") | {"kl": "0.1"}), 'x.jsonl:1: `kl` must not be "0.1"'),
        (json.dumps(text(0, 1, "a", kl=math.nan)), "x.jsonl:1: not JSON .field .kl. holds NaN, Infinity"),
        (json.dumps(text(0, 1, "a", kl=math.inf)), "x.jsonl:1: not JSON .field .kl. holds NaN, Infinity"),
        (json.dumps(text(0, 1, "a", kl=True)), "x.jsonl:1: `kl` must not be true"),
        (json.dumps(text(0, 1, "a", kl=10**400)), "x.jsonl:1: `kl` must not be 1000"),
        (json.dumps(text(0, 1, "a", kl=1e300)), r"x.jsonl:1: `kl` must not be 1e\+300"),
        (json.dumps(text(-1, 1, "a")), "x.jsonl:1: `prompt_number` must not be -1"),
        (json.dumps(text(0, True, "a")), "x.jsonl:1: `sample` must not be true"),
        (json.dumps(text(0, 2**31, "a")), "x.jsonl:1: `sample` must not be 2147483648"),
        (json.dumps(text(0, 1, "a", response_ids=[[]])), r"x.jsonl:1: `response_ids` must not be \[\[\]\]"),
        (json.dumps(text(0, 1, "a", response_ids=[2**31])), "x.jsonl:1: `response_ids` must not be"),
        (json.dumps(text(0, 1, "a", response_ids=[False])), "x.jsonl:1: `response_ids` must not be"),
        (json.dumps(text(0, 1, "a", prompt_ids=[-1])), "x.jsonl:1: `prompt_ids` must be a list of token ids"),
        (json.dumps(text(0, 1, "a", prompt=None)), "x.jsonl:1: no field `prompt`"),
        (json.dumps(text(0, 1, "a", cost={"seconds": math.inf})), "x.jsonl:1: not JSON .field 'seconds' holds NaN"),
        (json.dumps(text(0, 1, "a", cost={"seconds": "1"})), "x.jsonl:1: `cost` must not be"),
        (json.dumps(text(0, 1, "a", settings={"model": 5})), "x.jsonl:1: `settings` must not be {.model.: 5}"),
        (json.dumps(text(0, 1, "a", now="today")), "x.jsonl:1: `now` must not be"),
        (json.dumps(text(0, 1, "a", system="Be kind.")), "x.jsonl:1: `system` would be left out"),
        ("GOOD\n\nGOOD\n", "x.jsonl:3: prompt 0 has sample 0 already"),
    ],
)
def test_malformed_lines_are_named(tmp_path, lines, message):
    path = tmp_path / "x.jsonl"
    path.write_text(lines.replace("GOOD", json.dumps(ONE[0])))
    with pytest.raises(ValueError, match=message):
        read_texts(path)


ALPACA_EVAL = [
    {"dataset": "d", "instruction": question, "output": answer, "generator": "x"}
    for question, answer in [("Hi", "Hello"), ("Bye", "Go"), ("Hi", "Hey"), ("Bye", "")]
]


@pytest.mark.parametrize("form", ["array", "lines"])
def test_records_of_alpaca_eval_are_numbered_as_they_come(tmp_path, form):
    lines = "".join(json.dumps(record) + "\n" for record in ALPACA_EVAL)
    (tmp_path / "x.json").write_text(json.dumps(ALPACA_EVAL, indent=1) if form == "array" else lines)
    texts = read_texts(tmp_path / "x.json")
    names = ("prompt_number", "sample", "prompt", "response", "response_ids")
    assert [[text[name] for name in names] for text in texts] == [
        [0, 0, "Hi", "Hello", []], [0, 1, "Hi", "Hey", []], [1, 0, "Bye", "Go", []], [1, 1, "Bye", "", []],
    ]  # fmt: skip


def test_the_input_of_an_instruction_belongs_to_its_prompt(tmp_path):
    records = [ALPACA_EVAL[0] | {"input": given} for given in ("", None, "a text")]
    (tmp_path / "x.json").write_text(json.dumps(records))
    texts = read_texts(tmp_path / "x.json")
    assert [(text["prompt"], text["sample"]) for text in texts] == [("Hi", 0), ("Hi", 1), ("Hi\n\na text", 0)]
    assert [prompt["prompt"] for prompt in read_prompts(tmp_path / "x.json")] == ["Hi", "Hi", "Hi\n\na text"]


def test_texts_go_to_alpaca_eval_and_come_back(tmp_path, monkeypatch, capsys):
    """The first sample of each prompt, one file per method; nothing that is there is lost unasked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    asked = ["Hi", [{"role": "user", "content": "Bye"}]]
    for path, answer in (("one.jsonl", "é"), ("b/one.jsonl", "no")):
        write(tmp_path / path, [text(n, i, answer + "abc"[i], prompt=asked[n]) for n in (0, 1) for i in (1, 0)])
    command = ["evaluate", "one.jsonl", "b/one.jsonl", "--output-dir", "out", "--export", "alpacaeval"]
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "alpacaeval-b%2Fone.jsonl.json"
    theirs.write_text("mine")
    assert main(command) == 2
    assert "holds alpacaeval-b%2Fone.jsonl.json, which would be replaced" in capsys.readouterr().err
    assert [theirs.read_text(), len([*theirs.parent.iterdir()])] == ["mine", 1]
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(theirs.read_text("utf-8")) == [
        {"instruction": asked, "output": "noa", "generator": "b/one.jsonl"} for asked in ("Hi", "Bye")
    ]
    again = read_texts(tmp_path / "out" / "alpacaeval-one.jsonl.json")
    assert [(one["prompt"], one["response"], one["sample"]) for one in again] == [("Hi", "éa", 0), ("Bye", "éa", 0)]
    assert read_prompts(tmp_path / "out" / "alpacaeval-one.jsonl.json")[0]["prompt"] == "Hi"
    mine = ["evaluate", str(theirs), "--output-dir", "out", "--export", "alpacaeval", "--overwrite"]
    theirs.rename("out/alpacaeval-alpacaeval-x.json")  # as it would be called for alpacaeval-x.json elsewhere
    Path("alpacaeval-x.json").symlink_to("out/alpacaeval-alpacaeval-x.json")
    assert main([*mine[:1], "alpacaeval-x.json", *mine[2:]]) == 2
    assert "alpacaeval-x.json is read, and would be replaced" in capsys.readouterr().err


def test_a_file_that_is_named_in_two_ways_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [*file_labels(["one.jsonl", tmp_path / "two.jsonl", tmp_path / "x" / ".." / "one.jsonl"]).values()] == [
        "one",
        "two",
    ]
    Path("judge.py").write_text("def lengths(prompts, responses):\n    return [*map(len, responses)]\n")
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", [text(0, 0, name), text(1, 0, name)])
    files = ["evaluate", "one.jsonl", "two.jsonl", "--against", str(tmp_path / "one.jsonl")]
    judges = ["--judge", "judge:lengths"]
    assert main([*files, *judges, "--output-dir", "out"]) == 0
    assert [row["file"] for row in json.loads(Path("out/evaluation.json").read_text())["rows"]] == ["one", "two"]


def test_the_table_is_shown_though_it_cannot_be_saved(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "one.jsonl", [text(0, 0, "a"), text(1, 0, "a")])
    monkeypatch.setattr("pargs_min.cli.evaluate.write_comparison", Mock(side_effect=OSError("No space left")))
    assert main(["evaluate", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "| one  | 2 of 2 |" in said.out
    assert "No space left" in said.err


@pytest.mark.parametrize("name", ["evaluation.md", "evaluation.png", "answers.jsonl"])
def test_nothing_is_judged_for_a_folder_where_it_would_replace_anything(name, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "one.jsonl", [text(0, 0, "a")])
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr("pargs_min.cli.evaluate.named_judge", lambda *_: pytest.fail("it was judged"))
    assert main(["evaluate", str(file), "--judge", "toy", "--output-dir", str(tmp_path)]) == 2
    assert f"holds {name}, which would be replaced" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "prompt number 1 has system, user;"),
        ([{"role": "assistant", "content": "b"}], "prompt number 1 has assistant;"),
        (None, "prompt number 1 has token ids alone;"),
    ],
)
def test_prompts_that_alpaca_eval_does_not_know_are_not_exported(tmp_path, capsys, prompt, message):
    file = write(tmp_path / "one.jsonl", [text(0, 0, "a"), text(1, 0, "a", prompt=prompt, prompt_ids=[3])])
    assert main(["evaluate", str(file), "--output-dir", str(tmp_path / "out"), "--export", "alpacaeval"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_without_ids_are_judged_and_their_tokens_not_counted(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(ALPACA_EVAL))
    ours, theirs = read_texts(tmp_path / "x.json"), [text(n, i, "abc") for n in range(2) for i in range(2)]
    row, other = compare({"ours": ours, "theirs": theirs}, [LENGTH], "theirs").rows
    assert row["judges"]["length"]["reward"]["mean"] == (5 + 3 + 2 + 0) / 4
    assert {name: row[name] for name in ("length", "distinct_1", "distinct_2", "kl")} == dict.fromkeys(
        ("length", "distinct_1", "distinct_2", "kl")
    )
    assert (other["length"]["mean"], row["rouge_l"] is None) == (3, False)
    assert math.isnan(distinct([ours[0], theirs[0]], 1))
    with pytest.raises(ValueError, match=r"prompt number 0, sample 0 has no `kl`: .*--reference"):
        with_kl_to("base", ours, [0.0] * 4)
    with pytest.raises(ValueError, match=r"prompt number 0, sample 0 has no `response_ids`, which the judge toy reads"):
        gold_rewards(ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "record 5: `output` must be text"),
        ({"instruction": ["Hi"]}, "record 5: `instruction` and `input` must be text"),
        ({"input": ["a text"]}, "record 5: `instruction` and `input` must be text"),
        ({"response_ids": [[]]}, r"record 5: `response_ids` must not be \[\[\]\]"),
    ],
)
def test_records_of_alpaca_eval_that_say_less_or_more_are_named(tmp_path, change, message):
    (tmp_path / "x.json").write_text(json.dumps([*ALPACA_EVAL, ALPACA_EVAL[0] | change]))
    with pytest.raises(ValueError, match=f"x.json: {message}"):
        read_texts(tmp_path / "x.json")


def test_against_must_be_one_of_the_files():
    with pytest.raises(ValueError, match="against must be one of one, got 'two'"):
        compare({"one": ONE}, against="two")


def test_the_command_prints_the_table_and_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one.jsonl", ONE)
    write(tmp_path / "two.jsonl", TWO)
    (tmp_path / "lengths.py").write_text("def length(prompts, responses): return [len(r) for r in responses]")
    assert main(["evaluate", "two.jsonl", "--judge", "lengths:length", "--against", "one.jsonl"]) == 0
    want = compare({"two": TWO, "one": ONE}, [Judge("lengths:length", score=length)], "one")
    printed = capsys.readouterr().out
    assert printed.startswith(markdown(want))
    assert {file.name for file in (tmp_path / "runs" / "evaluation").iterdir()} == {
        "answers.jsonl",
        "evaluation.json",
        "evaluation.md",
        "evaluation.png",
    }


def test_whatever_a_file_is_called_the_table_stays_a_table(tmp_path, capsys):
    names = ["a|b", "a\nb\r| c |", "a\\", os.fsdecode(b"a\xff")]
    files = [write(tmp_path / f"{name}.jsonl", ONE) for name in names]
    assert main(["evaluate", *map(str, files), "--output-dir", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "evaluation.md").read_text("utf-8").rstrip("\n").split("\n")
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line) for line in table if line.startswith("|")]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert [row[1].strip() for row in cells[2:]] == [r"a\|b", r"a b \| c \|", r"a\\", r"a\\xff"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two.jsonl"], "two.jsonl"),
        (["one.jsonl", "--judge", "nobody:judges"], "judge 'nobody:judges' cannot be loaded"),
        (["one.jsonl", "--judge", "http://127.0.0.1:9/v1#m"], "say with which (--against FILE)"),
        (["one.jsonl", "--judge", "toy"], "prompt must be one of the world's twelve"),
    ],
)
def test_bad_input_of_the_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one.jsonl", ONE)
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\n Tried"), RuntimeError("no memory")])
def test_a_judge_that_does_not_fit_is_one_line_and_other_errors_are_not_hidden(tmp_path, monkeypatch, capsys, error):
    def too_large(*_, **__):
        raise error

    monkeypatch.setattr("pargs_min.evaluation.judges.load_reward_model", too_large)
    file = write(tmp_path / "one.jsonl", ONE)
    asked = ["evaluate", str(file), "--judge", "some/judge", "--output-dir", str(tmp_path / "out")]
    if isinstance(error, torch.OutOfMemoryError):
        assert main(asked) == 2
        assert capsys.readouterr().err == "pargs: error: out of memory: CUDA out of memory. Tried\n"
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            main(asked)


def test_every_kl_can_be_taken_to_one_model(tmp_path):
    """Guided texts keep theirs; those of another model are of that model's log-ratio to the reference, text by text.

    The reference is read in float32.
    """
    lm, tuned, tokenizer = tiny_lm(vocabulary=14), tiny_lm(vocabulary=14, seed=5), tiny_tokenizer()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    prompts, settings = [{"prompt": "a b"}, {"prompt": "c"}], dict(num_samples=3, max_new_tokens=5)
    guided = dict(method="args", reward_model=tiny_reward_model(vocabulary=14), top_k=4)
    ways = {"guided": (lm, guided), "tuned": (tuned, dict(method="plain"))}
    for name, (model, more) in ways.items():
        texts = [*generate_texts(model, tokenizer, prompts, **more, **settings)]
        list(write_records(tmp_path / f"{name}.jsonl", texts, {"model": name}))
    files = [str(tmp_path / f"{name}.jsonl") for name in ways]
    report = tmp_path / "report"
    assert main(["evaluate", *files, "--reference", str(tmp_path / "lm"), "--output-dir", str(report)]) == 0
    rows = json.loads((report / "evaluation.json").read_text())["rows"]
    written = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ways}
    assert rows[0]["kl"]["mean"] == pytest.approx(np.mean([text["kl"] for text in written["guided"]]), abs=2e-6)
    other = [text["ref_log_prob"] - by_hand(lm, tokenizer, text) for text in written["tuned"]]
    assert rows[1]["kl"]["mean"] == pytest.approx(np.mean(other), abs=2e-6)
    assert np.mean(other) > 0.1


def by_hand(lm, tokenizer, text):
    prompt, response = encode_prompt(tokenizer, text["prompt"], "chat"), text["response_ids"]
    log_probs = lm(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))


def test_texts_whose_prompts_were_read_in_different_forms_are_not_compared(tmp_path):
    for name, form in (("plain", "chat"), ("pargs", "text")):
        record = {"prompt": "a", "prompt_number": 0, "sample": 0, "response": "b", "response_ids": [3]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record | {"prompt_format": form}) + "\n")
    files = file_labels([tmp_path / "plain.jsonl", tmp_path / "pargs.jsonl"])
    with pytest.raises(ValueError, match=r"chat in plain, text in pargs.*one --prompt-format"):
        read_files(files)


def test_texts_keep_their_kl_to_the_model_that_wrote_them(tmp_path):
    """Which is 0 for its own samples, in whatever type it wrote them: it is known by its weights, not by its name."""
    for name in ("lm", "copy"):
        tiny_lm(vocabulary=14).bfloat16().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    asked = [
        "generate",
        "--model",
        str(tmp_path / "lm"),
        "--method",
        "plain",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    asked += ["--num-samples", "3", "--max-new-tokens", "9", "--device", "cpu"]
    assert main([*asked, "--output", str(tmp_path / "texts.jsonl")]) == 0
    texts = read_texts(tmp_path / "texts.jsonl")
    again = text_log_probs(tiny_lm(vocabulary=14).float(), Codec(tiny_tokenizer()), texts)
    assert max(abs(text["ref_log_prob"] - log_prob) for text, log_prob in zip(texts, again, strict=True)) > 1e-3
    assert max(abs(text["kl"]) for text in with_kl_to(str(tmp_path / "copy"), texts, again)) < 1e-6
    tiny_lm(vocabulary=14, seed=3).bfloat16().save_pretrained(tmp_path / "copy")
    assert max(abs(text["kl"]) for text in with_kl_to(str(tmp_path / "copy"), texts, again)) > 1e-3
