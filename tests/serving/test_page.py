"""The playground in headless Chromium, as one reads it, by mouse and by keyboard, over a real server."""

import json
import time
from urllib.request import Request, urlopen

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pargs_min import trace
from pargs_min.codec import Codec
from pargs_min.decode import ModelPolicy
from pargs_min.methods import METHODS
from pargs_min.serving.app import Served
from pargs_min.serving.engine import Engine
from pargs_min.texts import Tokens, choose_scorer
from tests.browser import CHROMIUM, browser
from tests.serving.conftest import running
from tests.strategies import tiny_lm, tiny_reward_model
from tests.test_codec import chat_tokenizer
from tests.test_reward_model import word_tokenizer

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")

SEED, CTRL = 14, 2
WORDS = " ".join(["<end>", *"abc", *(f"w{i}" for i in range(36))])
HTML = "<b>{}</b> <img/src=x{}/onerror=evil=1> <script>evil={}</script> &lt;{} <a/href={}> '\"{}"
TEXT = "[...document.querySelectorAll('.text')].map((one) => one.textContent)"
FITS = "document.documentElement.scrollWidth <= innerWidth"
STATUS = "document.getElementById('status').textContent"


def served(tokenizer=None, form="text", name="tiny", methods=("pargs", "plain"), slow=0.0, fails=None, **how):
    """A server of tiny models, of which each step takes `slow` seconds more, and the one numbered `fails` fails."""
    tokenizer = tokenizer or word_tokenizer(WORDS)
    lm, guide = (
        make(vocabulary=len(tokenizer), bos_token_id=None, eos_token_id=None) for make in (tiny_lm, tiny_reward_model)
    )
    guide.score.weight.data *= 4
    guide.config.pargs = {"objective": "partial", "append_eos": True, "prompt_format": form}
    codec = Codec.of(lm, tokenizer, form)
    engine = Engine(ModelPolicy(lm, codec.vocabulary), choose_scorer(guide, 64, codec.ends), codec.ends)
    step, steps = engine._step, []

    def slowed():
        time.sleep(slow)
        steps.append(None)
        if len(steps) == fails:
            raise FloatingPointError("a reward is not finite")
        step()

    engine._step = slowed
    offered = {method: METHODS[method] for method in methods}
    how = Tokens(**{"beta": 2.0, "top_k": 8, "max_new_tokens": 20} | how)
    return Served(name, codec, engine, METHODS[methods[0]], how, offered, context=64)


def asked(address, prompt="a b c", chat=False, method="pargs", **settings):
    """The text that the server gives as a whole, and the records of its tokens."""
    form = {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 10}
    body = (form if chat else {"prompt": prompt, "logprobs": 10}) | {"method": method, "seed": SEED} | settings
    url = f"{address}/v1/{'chat/' if chat else ''}completions"
    with urlopen(Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})) as answer:
        [choice] = json.load(answer)["choices"]
    return choice["message"]["content"] if chat else choice["text"], choice["logprobs"]["guidance"]


@pytest.fixture(scope="module")
def tab():
    with browser() as found:
        yield found


@pytest.fixture
def reader(tab):
    """A reader who ends without complaints, but for answers that say that something is wrong."""
    tab.complaints.clear()
    yield tab
    tab.run("1")  # reads what was not read yet
    assert [one for one in tab.complaints if '"source": "network"' not in one] == []


@pytest.fixture(scope="module")
def address():
    with running(served()) as found:
        yield found


def until(reader, script, seconds=30):
    deadline = time.monotonic() + seconds
    while not reader.run(script):
        assert time.monotonic() < deadline, (script, reader.run("document.body.innerText"), reader.complaints)
        time.sleep(0.02)


def visit(reader, address, **how):
    reader.open(address, **how)
    until(reader, f"{STATUS} !== 'Connecting …'")


def generate(reader, prompt="a b c", status="Done."):
    """By keyboard: the prompt has the focus from the start."""
    reader.run(f"document.getElementById('seed').value = {SEED}")
    reader.write(prompt)
    reader.press("Enter", 13, CTRL)
    until(reader, f"{STATUS} === {json.dumps(status)}")


def texts(reader):
    return reader.run(TEXT)


def table(reader, kind="guided"):
    rows = f"document.querySelectorAll('.{kind} tbody tr')"
    return reader.run(
        f"[...{rows}].map((row) => [row.className, ...[...row.children].map((one) => one.innerText.trim())])"
    )


def assert_shows(found, record):
    """The table has this record's numbers; a batch of other texts may move their last bits."""
    candidates = record["candidates"]
    others = [record["others"] | {"token": "others", "reward": None, "drawn": False}] * record["rest"]
    assert len(found) == len(candidates) + len(others)
    for (kind, name, *numbers), one in zip(found, candidates + others, strict=True):
        assert name.replace("\n", "") == trace.visible(one["token"]) + "drawn" * one["drawn"]
        assert (kind == "drawn") == one["drawn"]
        wanted = [one["ref_prob"], one["reward"], one["prob"]]
        assert [bool(number) for number in numbers] == [number is not None for number in wanted]
        for number, other in zip(numbers, wanted, strict=True):
            assert not number or float(number) == pytest.approx(other, abs=6e-4)


def test_plain_and_guided_texts_are_those_of_the_interface(reader, address):
    visit(reader, address)
    generate(reader)
    wanted = [asked(address, method=method) for method in ("plain", "pargs")]
    assert texts(reader) == [text for text, _ in wanted]
    assert wanted[0][0] != wanted[1][0]
    for kind, (_, records) in zip(("plain", "guided"), wanted, strict=True):
        moved = [record["nats"] for record in records]
        classes = reader.run(f"[...document.querySelectorAll('.{kind} .text span')].map((one) => one.className)")
        assert classes == ["up" if nats > 0.1 else "down" if nats < -0.1 else "same" for nats in moved]
        end = reader.run(f"document.querySelector('.{kind} .end').textContent")
        assert end.startswith(f"{len(records)} tokens, ")
    assert {"up", "down"} < {*classes}
    assert f", {sum(moved):+.2f} nats by guidance, ".replace("-", "−") in end
    assert "tiny" in reader.run("document.title")


def test_a_chat_is_asked_as_a_chat(reader):
    with running(served(chat_tokenizer(), "chat", max_new_tokens=9)) as address:
        visit(reader, address)
        generate(reader, "a b")
        wanted = [asked(address, "a b", chat=True, method=method) for method in ("plain", "pargs")]
        assert texts(reader) == [text for text, _ in wanted]
        reader.click(".guided .text span")
        assert_shows(table(reader), wanted[1][1][0])


def test_a_click_shows_the_candidates_of_a_token_and_another_hides_them(reader, address):
    visit(reader, address)
    generate(reader)
    for kind, method in (("guided", "pargs"), ("plain", "plain")):
        _, records = asked(address, method=method)
        assert not reader.run(f"document.querySelector('.{kind} table').checkVisibility()")
        for place in (3, 5):
            token = f".{kind} .text span:nth-child({place})"
            reader.click(token)
            found = table(reader, kind)
            if kind == "guided":
                assert_shows(found, records[place - 1])
            else:
                assert [row[1].removesuffix("drawn").strip() for row in found] == [
                    *(trace.visible(one["token"]) for one in records[place - 1]["candidates"]),
                    *["others"] * records[place - 1]["rest"],
                ]
            assert reader.run(f"document.querySelector('.{kind} caption').innerText").startswith(f"Token {place}: ")
        assert reader.run(f"document.querySelectorAll('.{kind} [aria-pressed=true]').length") == 1
        reader.click(token)
        assert not reader.run(f"document.querySelector('.{kind} table').checkVisibility()")


def test_beta_moves_the_guided_text_alone_unless_the_prompt_has_changed(reader, address):
    visit(reader, address)
    generate(reader)
    before = texts(reader)
    marked = reader.run("document.querySelector('.plain .text span').marked = true")
    reader.run("document.getElementById('beta').focus()")
    for _ in range(3):
        reader.press("ArrowLeft", 37)
    assert reader.run("document.getElementById('shown').innerText") == "1.7"
    reader.press("End", 35)
    until(reader, f"document.querySelector('.guided h2').innerText.includes('beta 6') && {STATUS} === 'Done.'")
    wanted, _ = asked(address, beta=6.0)
    assert wanted != before[1]
    assert texts(reader) == [before[0], wanted]
    assert reader.run("document.querySelector('.plain .text span').marked") == marked  # it was not written again
    reader.run("document.getElementById('prompt').value = 'b'")
    reader.press("Home", 36)
    time.sleep(0.5)
    assert texts(reader) == [before[0], wanted]
    reader.click("button.main")
    until(reader, f"document.querySelector('.guided h2').innerText.includes('beta 0') && {STATUS} === 'Done.'")
    assert texts(reader) == [asked(address, "b", method="plain")[0]] * 2  # beta 0 is the reference


def test_settings_reach_the_server(reader, address):
    visit(reader, address)
    for name, value in (("temperature", "0.5"), ("top_p", "0.8"), ("max_tokens", "7")):
        reader.run(f"document.getElementById('{name}').focus()")
        reader.write(value)
    reader.run("document.getElementById('prompt').focus()")
    generate(reader)
    wanted = asked(address, temperature=0.5, top_p=0.8, max_tokens=7)
    assert texts(reader)[1] == wanted[0] != asked(address, max_tokens=7)[0]
    reader.click("#reseed")
    assert reader.run("document.getElementById('seed').value") != str(SEED)


def test_all_of_it_by_keyboard(reader, address):
    visit(reader, address, width=360)
    generate(reader)
    _, records = asked(address)

    def focused(what="id || document.activeElement.textContent"):
        return reader.run(f"document.activeElement.{what}")

    found = []
    for _ in range(8):
        reader.press("Tab", 9)
        found.append(focused("id || document.activeElement.textContent.trim()"))
    first = reader.run("document.querySelector('.plain .text span').textContent").strip()
    assert found == ["temperature", "top_p", "max_tokens", "seed", "Generate", "reseed", "beta", first]
    reader.press("Tab", 9)  # past the whole plain text
    assert focused("closest('article').className") == "guided"
    for _ in range(4):
        reader.press("ArrowRight", 39)
    reader.press("Enter", 13)
    assert_shows(table(reader), records[4])
    reader.press("ArrowLeft", 37)
    reader.press(" ", 32)
    assert_shows(table(reader), records[3])
    reader.press("End", 35)
    reader.press("Enter", 13)
    assert_shows(table(reader), records[-1])
    reader.press("ArrowRight", 39)  # there is none
    assert focused("matches('.guided .text span:last-child')")
    reader.press("Enter", 13)
    assert table(reader)
    assert not reader.run("document.querySelector('.guided table').checkVisibility()")


def test_text_of_a_model_is_shown_as_text(reader):
    words = " ".join(HTML.format(*[i] * 6) for i in range(6))
    with running(served(word_tokenizer(f"<end> a b c {words}"), name="<b>tiny</b>")) as address:
        visit(reader, address, width=360)
        generate(reader, "a b c")
        text, records = asked(address, "a b c")
        assert texts(reader)[1] == text
        assert all(word in text for word in ("<b>", "<img", "<script>", "&lt;", "<a/"))
        for place in range(len(records)):
            reader.run(f"document.querySelectorAll('.guided .text span')[{place}].click()")
            assert_shows(table(reader), records[place])
            assert reader.run(FITS)
        assert reader.run("document.querySelectorAll('main :is(img, script, a), h1 b, .text * *, tbody b').length") == 0
        assert reader.run("window.evil") is None
        assert reader.run("document.querySelector('h1').innerText") == "Playground <b>tiny</b>"


def test_bytes_that_are_no_character_can_be_chosen_and_change_no_text(reader):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with running(served(PreTrainedTokenizerFast(tokenizer_object=backend), top_k=50, max_new_tokens=19)) as address:
        visit(reader, address)
        generate(reader, "é")
        text, records = asked(address, "é")
        assert text.endswith("\ufffd")  # which is said last, and by no token
        assert texts(reader)[1] == text
        tokens = "[...document.querySelectorAll('.guided .text span')]"
        assert reader.run(f"{tokens}.length") == len(records)
        marks = reader.run(f"{tokens}.map((one) => [one.textContent, one.dataset.mark ?? ''])")
        assert any(mark for text, mark in marks if not text)
        assert all(mark for text, mark in marks if not text.strip())
        assert reader.run(f"{tokens}.every((one) => one.getBoundingClientRect().width > 3)")


def test_a_key_is_asked_for_and_used(reader):
    with running(served(), key="secret") as address:
        visit(reader, address)
        assert reader.run(STATUS) == "The server wants an API key."
        assert not reader.run("document.getElementById('ask').checkVisibility()")
        reader.write("wrong")
        reader.click("#unlock button")
        until(reader, f"{STATUS} === 'The server refuses this API key.'")
        reader.run("document.getElementById('key').select()")
        reader.write("secret")
        reader.click("#unlock button")
        until(reader, "document.getElementById('ask').checkVisibility()")
        assert not reader.run("document.getElementById('unlock').checkVisibility()")
        generate(reader)
        assert all(texts(reader))
        assert reader.run("document.cookie + Object.values(localStorage) + Object.values(sessionStorage)") == ""


def test_errors_are_shown_and_the_next_text_is_written(reader, address):
    visit(reader, address)
    generate(reader, "a " * 70, "a prompt of 70 tokens and 1 more exceed the context of 64")
    assert reader.run("document.querySelector('.plain .end').innerText") == "0 tokens, failed"
    reader.run("document.getElementById('prompt').value = ''")
    generate(reader)
    with running(served(fails=5)) as other:
        visit(reader, other)
        generate(reader, status="a reward is not finite; the weights may be damaged, or beta too large")
        assert any(texts(reader))  # four tokens of the first to come stay
        reader.click("button.main")
        until(reader, f"{STATUS} === 'Done.'")
    reader.click("button.main")  # the server has gone
    until(reader, f"{STATUS} === 'Failed to fetch'")


def test_stop_frees_the_server_and_keeps_the_text(reader, address):
    offered = served(slow=0.4)
    wholes = asked(address, method="plain"), asked(address, beta=6.0)
    with running(offered) as other:
        visit(reader, other)
        assert reader.run("document.getElementById('stop').disabled")
        generate(reader, status="Writing …")
        until(reader, f"{TEXT}.every((one) => one.length > 2)")
        reader.run("document.getElementById('beta').focus()")
        reader.press("End", 35)  # the guided text begins anew, the plain one goes on
        until(reader, "document.querySelector('.guided h2').innerText.includes('beta 6')")
        before = texts(reader)
        assert len(before[0]) > 2
        until(reader, f"{TEXT}[0].length > {len(before[0])} && {TEXT}[1].length > 2")
        assert "writing" in reader.run("document.querySelector('.guided .end').innerText")
        running_texts = [*offered.engine.running]
        reader.click("#stop")
        until(reader, f"{STATUS} === 'Stopped.'")
        plain, guided = texts(reader)
        for stopped, (whole, _) in zip((plain, guided), wholes, strict=True):
            assert whole.startswith(stopped)
            assert whole != stopped
        assert reader.run("document.getElementById('stop').disabled")
        assert "stopped" in reader.run("document.querySelector('.guided .end').innerText")
        deadline = time.monotonic() + 10
        while offered.engine.running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert running_texts
        assert all(len(text.ids) < 20 for text in running_texts)  # they were given up
        assert texts(reader) == [plain, guided]


def test_a_server_without_a_guide_has_one_text_and_no_slider(reader):
    with running(served(methods=["plain"])) as address:
        visit(reader, address)
        generate(reader)
        assert texts(reader) == [asked(address, method="plain")[0]]
        for hidden in ("#strength", ".guiding"):
            assert not reader.run(f"document.querySelector('{hidden}').checkVisibility()")


def test_events_are_read_whatever_the_network_cuts_them_into(reader, address):
    visit(reader, address)
    said = 'data: {"a": "é😀"}\n\ndata: {"b": 1}\n\n'
    script = f"""(async () => {{
        window.got = [];
        for (const end of ["data: [DONE]\\n\\n", "", "data: {{"]) {{
            const bytes = new TextEncoder().encode({json.dumps(said)} + end);
            const start = (to) => {{ bytes.forEach((_, i) => to.enqueue(bytes.slice(i, i + 1))); to.close(); }};
            const answer = new Response(new ReadableStream({{ start }}));
            try {{ for await (const one of events(answer)) got.push(JSON.stringify(one)); got.push("end"); }}
            catch (wrong) {{ got.push(wrong.message) }}
        }}
        window.ready = true;
    }})(), 0"""
    reader.run(script)
    until(reader, "window.ready")
    both = ['{"a":"é😀"}', '{"b":1}']
    assert reader.run("got") == [*both, "end", *both, "The answer broke off.", *both, "The answer broke off."]


def test_tokens_and_numbers_are_written_as_in_a_trace(reader, address):
    visit(reader, address)
    for token in (" to\n", "\t\r", "\u202e", "", "\u0301a", "\u200bx", "日本", "\u2028", "<b>"):
        assert reader.run(f"visible({json.dumps(token)})") == trace.visible(token)
    for number in (0.0, 1.0, 0.12345, 0.001, 9.4e-4, 2.4e-7, 1e-12):
        assert reader.run(f"number({number})") == trace._number(number)
    ways = [reader.run(f"way({nats})") for nats in (-0.11, -0.09, 0, 0.09, 0.11)]
    assert ways == ["down", "same", "same", "same", "up"]
    assert [reader.run(f"signed({nats})") for nats in (-1e-7, -0.126, 2)] == ["+0.00 nats", "−0.13 nats", "+2.00 nats"]


def test_nothing_is_wider_than_a_phone_and_the_slider_stays_in_sight(reader, address):
    visit(reader, address, width=360, height=640)
    assert reader.run(FITS)
    generate(reader)
    reader.click(".plain .text span")
    reader.click(".guided .text span:last-child")
    assert reader.run(FITS)
    tops = "[...document.querySelectorAll('article')].map((one) => one.getBoundingClientRect().top)"
    plain, guided = reader.run(tops)
    assert plain + 100 < guided
    box = "document.getElementById('strength').getBoundingClientRect()"
    reader.run("scrollTo(0, document.body.scrollHeight)")
    assert 0 <= reader.run(f"{box}.top") < reader.run(f"{box}.bottom") <= 100
    visit(reader, address, width=1200)
    assert len({*reader.run(tops)}) == 1


def test_every_field_has_a_label(reader, address):
    visit(reader, address)
    assert reader.run("[...document.querySelectorAll('input, textarea')].every((one) => one.labels.length === 1)")
