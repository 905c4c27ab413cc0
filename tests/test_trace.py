"""One generation as records, as lines and as a page, which is read with html.parser as a browser would."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pargs_min.trace as module
from pargs_min.cli import main
from pargs_min.decode import Drawn, ModelPolicy, Step, generate, row_uniforms
from pargs_min.methods import sampled_kl
from pargs_min.models import save_reward_model
from pargs_min.scoring import SiblingScorer
from pargs_min.trace import drawn, read_page, records, to_html, to_text, token_names, visible
from tests.browser import CHROMIUM, browser
from tests.strategies import left_padded, tiny_lm, tiny_reward_model, tiny_tokenizer

TOP_K, BETA, STEPS = 3, 1.5, 7


def run(eos: int | None = None, **changes):
    """A guided generation of two prompts, and what `on_step` saw."""
    steps, (ids, mask) = [], left_padded(4, 2)
    uniforms = row_uniforms(0, [0, 1], [0, 0], STEPS)
    settings = dict(beta=BETA, top_k=TOP_K, max_new_tokens=STEPS, eos=eos, uniforms=uniforms, on_step=steps.append)
    models = ModelPolicy(tiny_lm()), SiblingScorer(tiny_reward_model())
    return generate(*models, ids, mask, **settings | changes), steps


def page_of(*traces: list[dict], **changes) -> str:
    """A page of texts with these steps."""
    settings = dict(method="pargs", beta=BETA, truncate=False, temperature=1.0, prompt="a b c") | changes
    return to_html([{"settings": settings, "steps": trace} for trace in traces])


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
    assert total == pytest.approx(float(sampled_kl(generation)[1]))
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
    alive, eligible = torch.tensor([True]), torch.tensor([[True, True]])
    step = Step(0, torch.tensor([[4, 5]]), ref_log_probs, torch.zeros(1, 2), log_probs, drawn_one, alive, eligible)
    trace = records([step], str)
    assert drawn(trace[0])["ref_prob"] == 0
    assert trace[0]["nats"] == 799.5
    assert Page(page_of(trace)).text["output"] == ["799.50"]


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
    numbers = {"ref_prob": 0.25, "reward": -1.5, "prob": 0.5}
    return {"id": 1, "token": token, "candidate": True, "drawn": is_drawn} | numbers


def record(tokens: list[str], chosen: int, step: int = 0) -> dict:
    candidates = [candidate(token, is_drawn=i == chosen) for i, token in enumerate(tokens)]
    others = {"others": {"ref_prob": 0.1, "prob": 0.2}, "rest": True, "unlisted": 0}
    return {"step": step, "candidates": candidates, "nats": math.log(2)} | others


def test_the_page_holds_every_number_of_the_records(traced):
    _, trace = traced
    page = Page(page_of(trace))
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
    assert page.text["dd"] == ["pargs", str(BETA), "False", "1.0", "a b c"]


def test_the_page_needs_nothing_else_and_may_load_nothing(traced):
    _, trace = traced
    page = Page(page_of(trace))
    assert not {"link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    targets = [a["href"] for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "a"]
    assert targets == [f"#{i}" for i in page.ids if i.startswith("step")]
    assert targets == [f"#step-1-{i + 1}" for i in range(STEPS)]
    for a in page.attributes:
        assert not {"src", "background", "action", "style"} & set(a)
        assert not any(name.startswith("on") for name in a)
    style, (held, script) = "".join(page.text["style"]), page.text["script"]
    assert "url(" not in style
    assert "@import" not in style
    assert json.loads(held)[0]["steps"] == trace
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (script, style)]
    policy = [a["content"] for a in page.attributes if a.get("http-equiv") == "Content-Security-Policy"]
    only = "default-src 'none'; script-src '{}'; style-src '{}'; base-uri 'none'; form-action 'none'"
    assert policy == [only.format(*hashes)]
    assert all(f"@media {medium}" in style for medium in ("(prefers-color-scheme: dark)", "print"))


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4), st.text(max_size=12))
def test_no_text_breaks_out_of_the_page(tokens, prompt):
    plain, odd = (
        Page(page_of([record(words, 0)], prompt=title))
        for words, title in ((["x"] * len(tokens), "x"), ([visible(t) for t in tokens], visible(prompt)))
    )
    assert odd.tags == plain.tags
    names = [row["cells"][0] for row in odd.rows[1:-1]]
    assert names == [visible(t) + ("drawn" if i == 0 else "") for i, t in enumerate(tokens)]


EVIL = '"></script><!--<script>alert(1)</script>&lt;$title${x}\u2028'


def test_a_script_in_a_text_stays_a_text(tmp_path):
    html = page_of([record([EVIL], 0)], **{"prompt": EVIL, EVIL: EVIL})
    page = Page(html)
    assert page.tags.count("script") == html.count("<script") == html.count("</script") == 2
    assert "<!--" not in html
    assert page.text["dt"][-1] == EVIL
    assert page.text["dd"][-2:] == page.text["a"] * 2 == [EVIL] * 2
    (tmp_path / "page.html").write_text(html, "utf-8")
    [read] = read_page(tmp_path / "page.html")
    assert [*read["settings"]] == ["method", "beta", "truncate", "temperature", "prompt", EVIL]
    assert drawn(read["steps"][0])["token"] == EVIL


@pytest.mark.parametrize("page", ["", "<html>", '<script type="application/json" id="texts">[{}]</script>', "\xff"])
def test_what_is_no_page_of_a_trace_is_refused(page, tmp_path):
    (tmp_path / "page.html").write_bytes(page.encode("latin-1"))
    with pytest.raises(ValueError, match=r"page\.html must be a page that `pargs trace` wrote"):
        read_page(tmp_path / "page.html")


# What the page computes ----------------------------------------------------------------------------------------------


def by_script(jobs: list) -> list[list[dict]]:
    """What the page's script makes of each (steps, beta, cut), in node: no page is there, so no control."""
    parts = (Path(module.__file__).with_name(name).read_text("utf-8") for name in ("tokens.js", "trace.js"))
    stub = "const document = {getElementById: () => ({textContent: '[]'}), querySelectorAll: () => []};"
    ask = "const jobs = JSON.parse(require('fs').readFileSync(0, 'utf-8'));"
    ask += "console.log(JSON.stringify(jobs.map(([steps, beta, cut]) => steps.map((one) => guided(one, beta, cut)))))"
    command = ["node", "-e", "\n".join([*parts, ask]).replace('"use strict";', '"use strict";' + stub, 1)]
    return json.loads(
        subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("candidates", [{}, {"min_ref_prob": 0.1}, {"guide_below": 0.2, "min_ref_prob": 0.1}])
def test_the_page_computes_what_python_does_at_every_beta_along_the_path(candidates, truncate):
    """The loop itself, made to take the same path with another beta, is the oracle."""
    settings = dict(top_k=6 if candidates else TOP_K) | candidates
    generation, steps = run(truncate=truncate, **settings)
    written = records(steps, str, row=1)
    unguided = [all(one["reward"] is None for one in step["candidates"]) for step in written]
    assert (0 < sum(unguided) < STEPS) == ("guide_below" in candidates)
    assert all(drawn(step)["candidate"] for step in written) == truncate
    ways = [*itertools.product((BETA, 0.0, 0.4, -3.0, 20.0, 3000.0), (False, True))]
    for (beta, cut), found in zip(ways, by_script([(written, *way) for way in ways]), strict=True):
        path = iter(generation.tokens.T)
        how = settings | dict(beta=beta, truncate=cut, draw=lambda *_, path=path: next(path))
        _, again = run(**how)
        for new, step, was in zip(found, records(again, str, row=1), written, strict=True):
            probs = {one["id"]: one["prob"] for one in step["candidates"]}
            assert new["probs"] == pytest.approx([probs[one["id"]] for one in was["candidates"]], rel=1e-11, abs=1e-300)
            assert new["others"] == pytest.approx(step["others"]["prob"], rel=1e-12, abs=1e-12)
            nats = -math.inf if new["nats"] is None else new["nats"]  # JSON knows no infinity
            assert nats == pytest.approx(step["nats"], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "shown", "why"),
    [
        ({}, 3, None),
        ({"method": "win"}, 3, "the rewards of win are computed with it"),
        ({"method": "plain"}, 3, "no reward guides plain"),
        ({"temperature": 0.7}, 3, "a temperature other than 1 depends on every token, and few are listed"),
        ({}, 2, "not all candidates are listed (--shown)"),
    ],
)
def test_no_slider_where_another_beta_cannot_be_told(changes, shown, why):
    page = Page(page_of(records(run()[1], str, shown=shown), **changes))
    assert page.tags.count("input") == (0 if why else 3)
    assert (f"No slider for beta: {why}." in page.text["p"]) == bool(why)


def test_controls_are_inputs_with_labels_and_start_as_written(traced):
    for beta, truncate, low, high in ((BETA, True, "0", "6"), (-0.5, False, "-2", "0"), (0.0, False, "0", "4")):
        page = Page(page_of(traced[1], beta=beta, truncate=truncate))
        slider, kept, cut = (a for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "input")
        assert (float(slider["value"]), slider["min"], slider["max"]) == (beta, low, high)
        assert ["checked" in one for one in (kept, cut)] == [not truncate, truncate]
        assert page.text["legend"] == ["other tokens"]
        assert page.text["label"] == ["beta ", "kept", "cut"]
        assert {"hidden": None, "class": "controls"} in page.attributes  # until the script runs


ROWS = "[...document.querySelectorAll('td.guided')].map((one) => one.innerText.trim())"
WIDTHS = "[...document.querySelectorAll('td.guided rect')].map((one) => one.getAttribute('width'))"
STATE = f"[{ROWS}, {WIDTHS}, [...document.querySelectorAll('.text a, output')].map((one) => one.outerHTML)]"


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_reader_moves_the_slider_by_keyboard_and_back(traced, tmp_path):
    generation, _ = traced
    page = tmp_path / "page.html"
    page.write_text(page_of(traced[1]), "utf-8")

    def python(beta: float, cut: bool) -> list[str]:
        path = iter(generation.tokens.T)
        _, steps = run(beta=beta, truncate=cut, draw=lambda *_: next(path))
        again = records(steps, str, row=1, shown=TOP_K)
        known = [{one["id"]: one["prob"] for one in step["candidates"]} for step in again]
        listed = [[known[i][one["id"]] for one in step["candidates"]] for i, step in enumerate(traced[1])]
        return [module._number(p) for i, one in enumerate(listed) for p in (*one, again[i]["others"]["prob"])]

    with browser() as reader:
        reader.open(page, width=360)
        before = reader.run(STATE)
        assert before[0] == python(BETA, cut=False)
        assert reader.run("document.documentElement.scrollWidth <= innerWidth")
        for _ in range(2):  # past the explanation to the slider
            reader.press("Tab", 9)
        assert reader.run("document.activeElement.type") == "range"
        for _ in range(10):
            reader.press("ArrowRight", 39)
        assert reader.run("document.querySelector('.controls b').innerText") == "2.1"
        moved = reader.run(STATE)
        assert moved[0] == python(2.1, cut=False)
        assert all(now != was for now, was in zip(moved[1:], before[1:], strict=True))
        for _ in range(10):
            reader.press("ArrowLeft", 37)
        assert reader.run(STATE) == before

        reader.press("Tab", 9)  # to the switch
        reader.press("ArrowRight", 39)
        cut = [0.0 if float(p) < 1e-6 else float(p) for p in python(BETA, cut=True)]  # others: 1 - 1, as rounded
        assert list(map(float, reader.run(ROWS))) == cut
        assert reader.run("document.querySelector('output').innerText") == "−∞"
        reader.press("Tab", 9)
        assert reader.run("document.activeElement.type") == "button"
        reader.run("document.activeElement.click()")
        assert reader.run(STATE) == before
        assert not reader.complaints

        for width in (360, 1200):  # a token leads to its step, which the slider and the text above do not cover
            reader.open(page, width=width, height=500)
            reader.run("document.querySelectorAll('.text a')[3].click()")
            covered = "document.querySelector('.top').getBoundingClientRect().bottom"
            assert 0 < reader.run(covered) < reader.run("document.querySelector(':target').getBoundingClientRect().top")

        reader.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.evil = 1'}))")
        assert reader.run("window.evil") is None
        assert "Content Security Policy" in "".join(reader.complaints)


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_texts_stand_beside_each_other_and_move_alone(traced, tmp_path):
    page, (_, trace) = tmp_path / "page.html", traced
    page.write_text(page_of(trace, [record([EVIL], 0)], trace), "utf-8")
    tops = "[...document.querySelectorAll('article')].map((one) => one.getBoundingClientRect().top)"
    totals = "[...document.querySelectorAll('output')].map((one) => one.innerText)"
    with browser() as reader:
        reader.open(page, width=1300)
        assert len(set(reader.run(tops))) == 1
        before = reader.run(totals)
        third = "const [, , it] = document.querySelectorAll('input[type=range]'); it.value = 6;"
        reader.run(f"{{ {third} it.dispatchEvent(new Event('input', {{bubbles: true}})) }}")
        after = reader.run(totals)
        assert [now == was for now, was in zip(after, before, strict=True)] == [True, True, False]
        reader.open(page, width=360)
        assert len(set(reader.run(tops))) == 3
        assert reader.run("document.documentElement.scrollWidth <= innerWidth")
        assert not reader.complaints


def test_colours_say_which_way_guidance_moved_a_token():
    up, down, same = (record(["x"], 0, step) for step in range(3))
    down["nats"], same["nats"] = math.log(0.1 / 0.25), math.log(0.26 / 0.25)
    page = Page(page_of([up, down, same]))
    classes = [a["class"] for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "a"]
    assert classes == ["up", "down", "same"]


def test_a_sum_that_rounds_to_zero_has_no_sign():
    assert Page(page_of([record(["x"], 0) | {"nats": -1e-7}])).text["output"] == ["0.00"]


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
    assert read.text["output"] == [f"{last['kl']:.2f}"]
    assert "a b c" in read.text["dd"]


def test_the_command_shows_texts_beside_each_other(models, tmp_path, capsys):
    pages = [str(tmp_path / f"{name}.html") for name in ("plain", "args", "all")]
    same = ["--max-new-tokens", "6", "--prompt", "a b c"]
    assert main(["trace", *models[:2], *same, "--method", "plain", "--output", pages[0]]) == 0
    with pytest.warns(UserWarning, match="args with a reward model of prefixes"):
        assert main(["trace", *models, *same, "--method", "args", "--top-k", "3", "--output", pages[1]]) == 0
    assert main(["trace", *models, *same, "--beta", "2", "--output", pages[2], "--beside", *pages[:2]]) == 0
    texts = read_page(pages[2])
    assert [text["settings"]["method"] for text in texts] == ["pargs", "plain", "args"]
    assert texts[1:] == [*read_page(pages[0]), *read_page(pages[1])]
    page = Page(Path(pages[2]).read_text("utf-8"))
    assert page.text["h1"] == ["pargs, plain, args, token by token"]
    assert page.tags.count("article") == 3
    assert len(set(page.ids)) == len(page.ids)
    assert page.text["dd"].count("a b c") == 1  # what is the same is said once
    assert [value for value in page.text["dd"] if value in ("1.0", "2.0")].count("2.0") == 1


def test_the_command_refuses_what_it_cannot_do(models, tmp_path, capsys):
    there = tmp_path / "page.html"
    there.write_text("mine")
    other = tmp_path / "other.html"
    other.write_text(page_of([record(["x"], 0)], prompt="b"))
    for more, message in (
        (["--output", str(there)], "exists: name another file"),
        (["--shown", "0"], "shown at least 1"),
        (["--sample", "-1"], "sample must be at least 0"),
        (["--beside", str(other)], "beside is for the page: name it with --output"),
        (["--output", str(tmp_path / "new.html"), "--beside", str(other)], "the same prompt 'a', and one is of 'b'"),
        (["--output", str(tmp_path / "new.html"), "--beside", str(there)], "must be a page that `pargs trace` wrote"),
        (["--output", str(tmp_path / "new.html"), "--beside", str(tmp_path / "none.html")], "No such file"),
    ):
        assert main(["trace", *models, "--prompt", "a", *more]) == 2
        assert message in capsys.readouterr().err
    assert there.read_text() == "mine"
