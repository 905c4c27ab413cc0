"""One generation as records, as lines and as a page, which is read with html.parser as a browser would."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pargs_min.cli import main
from pargs_min.decode import Drawn, ModelPolicy, Step, generate, row_uniforms
from pargs_min.methods import path_kl
from pargs_min.models import save_reward_model
from pargs_min.scoring import SiblingScorer
from pargs_min.trace import drawn, records, to_html, to_text, token_names, visible
from tests.strategies import left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

TOP_K, BETA, STEPS = 3, 1.5, 7


def run(eos: int | None = None):
    """A guided generation of two prompts, and what `on_step` saw."""
    steps, (ids, mask) = [], left_padded(4, 2)
    generation = generate(
        ModelPolicy(tiny_lm()),
        SiblingScorer(tiny_reward_model()),
        ids,
        mask,
        beta=BETA,
        top_k=TOP_K,
        max_new_tokens=STEPS,
        eos=eos,
        uniforms=row_uniforms(0, [0, 1], [0, 0], STEPS),
        on_step=steps.append,
    )
    return generation, steps


class Page(HTMLParser):
    """The parts of a page: tags as they open, text by tag, table rows, links and their targets."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.ids = [], [], [], [], []
        self.text: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append({"class": dict(attributes).get("class", ""), "cells": []})
        if tag in ("td", "th"):
            self.rows[-1]["cells"].append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)
            if "td" in self.open or "th" in self.open:
                self.rows[-1]["cells"][-1] += data


@pytest.fixture(scope="module")
def traced():
    generation, steps = run()
    return generation, records(steps, token_names(tiny_tokenizer()), row=1, shown=3)


def test_the_records_are_the_generation(traced):
    generation, trace = traced
    assert [record["step"] for record in trace] == list(range(STEPS))
    assert 0 < generation.rewards[1].isnan().sum() < STEPS, "some drawn tokens were no candidates"
    for i, record in enumerate(trace):
        token = drawn(record)
        assert token["id"] == generation.tokens[1, i]
        assert math.log(token["ref_prob"]) == pytest.approx(float(generation.ref_log_probs[1, i]))
        assert math.log(token["prob"]) == pytest.approx(float(generation.log_probs[1, i]))
        reward = float(generation.rewards[1, i])
        assert token["reward"] == (None if math.isnan(reward) else reward)
    total = sum(record["nats"] for record in trace)
    assert total == pytest.approx(float(path_kl("pargs", generation)[1]))
    assert json.loads(json.dumps(trace)) == trace


def test_every_step_obeys_the_equation_and_leaves_nothing_out(traced):
    _, trace = traced
    for record in trace:
        listed, others = record["candidates"], record["others"]
        for sort in ("prob", "ref_prob"):
            assert sum(c[sort] for c in listed) + others[sort] == pytest.approx(1)
        asked = [c for c in listed if c["reward"] is not None]
        assert [c["prob"] for c in listed if c["reward"] is None] == [c["ref_prob"] for c in listed if c not in asked]
        tilted = [c["ref_prob"] * math.exp(BETA * c["reward"]) for c in asked]
        for a, b in zip(asked, tilted, strict=True):
            assert a["prob"] / asked[0]["prob"] == pytest.approx(b / tilted[0])
        assert [c["prob"] for c in asked] == sorted((c["prob"] for c in asked), reverse=True)


def test_a_drawn_token_may_be_next_to_impossible_for_the_reference():
    """Its probability underflows to 0, the logarithm of which is none; its nats are those of the path all the same."""
    ref_log_probs, log_probs = torch.tensor([[0.0, -800.0]]), torch.tensor([[-1.0, -0.5]])
    drawn_one = Drawn(torch.tensor([5]), ref_log_probs[:, 1], log_probs[:, 1], torch.zeros(1))
    step = Step(0, torch.tensor([[4, 5]]), ref_log_probs, torch.zeros(1, 2), log_probs, drawn_one, torch.tensor([True]))
    trace = records([step], str)
    assert drawn(trace[0])["ref_prob"] == 0
    assert trace[0]["nats"] == 799.5
    assert "799.50 nats over the whole text" in to_html(trace, "title", {})


def test_the_drawn_token_is_listed_however_few_are_shown():
    _, steps = run()
    for record in records(steps, str, row=0, shown=1):
        assert sum(c["drawn"] for c in record["candidates"]) == 1
        assert len(record["candidates"]) <= 2
    with pytest.raises(ValueError, match="shown must be at least 1"):
        records(steps, str, shown=0)


def test_a_row_stops_where_its_text_ended():
    _, steps = run()
    first = int(records(steps, str, row=0)[2]["candidates"][0]["id"])
    for eos in {first, *(int(step.drawn.tokens[0]) for step in steps)}:
        generation, steps = run(eos)
        for row in (0, 1):
            assert len(records(steps, str, row=row)) == generation.lengths[row]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" to", "␣to"),
        ("a\n\n", "a⏎⏎"),
        ("\t\r", "⇥␍"),
        ("", "<empty>"),
        ("\u202e", "<U+202E>"),  # would turn the rest of the line around
        ("\u200b", "<U+200B>"),
        ("\x1b[2J", "<U+001B>[2J"),  # would clear the terminal
        ("\u0301", "◌\u0301"),
        ("naïve", "naïve"),
        ("日本", "日本"),
    ],
)
def test_what_does_not_show_is_shown(token, shown):
    assert visible(token) == shown


class Pieces:
    """What `token_names` asks of a tokenizer, for pieces of the three kinds."""

    pieces = ("Ġto", "▁to", "ĠâĢ", "<end>", None)
    texts = (" to", "to", " \ufffd", "<end>", "")

    def convert_ids_to_tokens(self, token):
        return self.pieces[token]

    def decode(self, ids):
        return self.texts[ids[0]]


def test_tokens_are_named_by_their_text():
    assert list(map(token_names(Pieces()), range(5))) == ["␣to", "␣to", "ĠâĢ", "<end>", "<4>"]


def candidate(token: str, *, is_drawn: bool = False) -> dict:
    return {"id": 1, "token": token, "ref_prob": 0.25, "reward": -1.5, "prob": 0.5, "drawn": is_drawn}


def record(tokens: list[str], chosen: int, step: int = 0) -> dict:
    candidates = [candidate(token, is_drawn=i == chosen) for i, token in enumerate(tokens)]
    others = {"ref_prob": 0.1, "prob": 0.2}
    return {"step": step, "candidates": candidates, "others": others, "nats": math.log(2)}


def test_the_page_holds_every_number_of_the_records(traced):
    _, trace = traced
    page = Page(to_html(trace, "one text", {"beta": BETA}))
    body = [row for row in page.rows if row["cells"][1:] != ["reference", "reward", "guided"]]
    expected = []
    for step in trace:
        for c in step["candidates"]:
            mark = "drawn" if c["drawn"] else ""
            expected.append((mark, c["token"] + mark, c["ref_prob"], c["reward"], c["prob"]))
        others = step["others"]
        expected.append(("rest", "others", others["ref_prob"], None, others["prob"]))
    assert len(body) == len(expected)
    for row, (kind, token, ref_prob, reward, prob) in zip(body, expected, strict=True):
        name, *numbers = row["cells"]
        assert (row["class"], name) == (kind, token)
        for shown, value in zip(numbers, (ref_prob, reward, prob), strict=True):
            assert shown == "" if value is None else float(shown) == pytest.approx(value, rel=0.5, abs=6e-4)
    assert "".join(page.text["caption"]) == "".join(f"Step {i + 1}: " for i in range(len(trace)))
    assert page.text["dd"] == [str(BETA)]


def test_the_page_needs_nothing_else(traced):
    _, trace = traced
    page = Page(to_html(trace, "one text", {}))
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    targets = [a["href"] for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "a"]
    assert targets == [f"#{i}" for i in page.ids] == [f"#step-{i + 1}" for i in range(STEPS)]
    for a in page.attributes:
        assert not {"src", "background", "action"} & set(a)
        assert not any(name.startswith("on") for name in a)
    style = "".join(page.text["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = [a["content"] for a in page.attributes if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert all(f"@media {medium}" in style for medium in ("(prefers-color-scheme: dark)", "print"))


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4), st.text(max_size=12))
def test_no_text_breaks_out_of_the_page(tokens, prompt):
    plain, odd = (
        Page(to_html([record(words, 0)], title, {title: title}))
        for words, title in ((["x"] * len(tokens), "x"), ([visible(t) for t in tokens], visible(prompt)))
    )
    assert odd.tags == plain.tags
    names = [row["cells"][0] for row in odd.rows[1:-1]]
    assert names == [visible(t) + ("drawn" if i == 0 else "") for i, t in enumerate(tokens)]


def test_a_script_in_a_prompt_stays_a_text():
    evil = '"><script>alert(1)</script>&lt;$title${x}'
    page = Page(to_html([record([evil], 0)], evil, {evil: evil}))
    assert "script" not in page.tags
    assert page.text["title"] == page.text["h1"] == page.text["dt"] == page.text["dd"] == [evil]
    assert page.text["a"] == [evil]


def test_colours_say_which_way_guidance_moved_a_token():
    up, down, same = (record(["x"], 0, step) for step in range(3))
    down["nats"], same["nats"] = math.log(0.1 / 0.25), math.log(0.26 / 0.25)
    page = Page(to_html([up, down, same], "t", {}))
    classes = [a["class"] for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "a"]
    assert classes == ["up", "down", "same"]


def test_lines_of_text_stand_under_each_other():
    text = to_text([record(["日本", "x", "e\u0301a"], 1)])
    header, *lines, rest = text.splitlines()
    assert header == "step 1     token   reference    reward  guided"
    assert lines == [
        "           日本        0.250    -1.500   0.500  ##########",
        "        >  x           0.250    -1.500   0.500  ##########",
        "           e\u0301a          0.250    -1.500   0.500  ##########",
    ]
    assert rest == "           others      0.100             0.200  ####"


def test_small_numbers_are_not_called_zero():
    small = record(["x"], 0)
    small["candidates"][0]["ref_prob"] = 2.4e-7
    assert "2e-07" in to_text([small])
    small["candidates"][0]["ref_prob"] = 0.0
    assert "0.000" in to_text([small])


@pytest.fixture
def models(tmp_path):
    """Options that name a tiny language model and a reward model of its prefixes."""
    tokenizer, guide = tiny_tokenizer(), tiny_reward_model(vocabulary=14).float()
    tiny_lm(vocabulary=14).float().save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    save_reward_model(guide, tokenizer, tmp_path / "guide", objective="partial", append_eos=True, prompt_format="text")
    return ["--model", str(tmp_path / "lm"), "--reward-model", str(tmp_path / "guide")]


def test_the_command_traces_the_text_that_generate_writes(models, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a b c\n")
    same = [*models, "--max-new-tokens", "6", "--top-k", "4", "--beta", "2", "--seed", "3"]
    written = tmp_path / "texts.jsonl"
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(written), "--num-samples", "2"]
    assert main(["generate", *same, *prompts]) == 0
    *_, last = map(json.loads, written.read_text().splitlines())
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["trace", *same, "--prompt", "a b c", "--sample", "1", "--shown", "2", "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = tiny_tokenizer().convert_ids_to_tokens(last["response_ids"])
    assert [line.split()[1] for line in lines if line.lstrip().startswith(">")] == tokens
    read = Page(page.read_text("utf-8"))
    assert read.text["a"] == tokens
    assert f"{last['kl']:.2f} nats" in "".join(read.text["p"])
    assert "a b c" in read.text["dd"]


def test_the_command_refuses_what_it_cannot_do(models, tmp_path, capsys):
    there = tmp_path / "page.html"
    there.write_text("mine")
    for more, message in (
        (["--output", str(there)], "exists: name another file"),
        (["--shown", "0"], "shown at least 1"),
        (["--sample", "-1"], "sample must be at least 0"),
    ):
        assert main(["trace", *models, "--prompt", "a", *more]) == 2
        assert message in capsys.readouterr().err
    assert there.read_text() == "mine"
