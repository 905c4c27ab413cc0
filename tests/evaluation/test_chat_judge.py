"""A language model as a judge: asked in both orders, never twice, and nothing that it says is guessed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pargs_min.evaluation import chat_judge
from pargs_min.evaluation.chat_judge import ChatJudge, both_orders
from pargs_min.evaluation.judges import load_judge


class Server:
    """A local server that replies with `reply(content of the request)`; it counts what it is asked.

    A reply of bytes is a whole body, and one that can be called answers itself, on the handler.
    """

    def __init__(self, reply):
        self.asked, self.keys, self.failures, lock = [], [], [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(request)
                    server.keys.append(self.headers["Authorization"])
                    status = server.failures.pop() if server.failures else 200
                content = reply(request["messages"][0]["content"])
                if callable(content):
                    return content(self)
                body = (
                    content
                    if isinstance(content, bytes)
                    else json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
                )
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # who asked may have left
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []
    yield lambda reply: servers.append(Server(reply)) or servers[-1]
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def longer(content):
    """The verdict of a judge that likes length."""
    a, b = content.partition("[Response A]\n")[2].split("\n\n[Response B]\n")
    return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "They are equal: [[TIE]]"


def texts(*responses):
    return [{"prompt": "a b", "response": response, "sample": i} for i, response in enumerate(responses)]


def test_a_judge_that_likes_length_prefers_the_longer_in_either_order(serve, tmp_path):
    server = serve(longer)
    judge = load_judge(f"{server.address}#some-model", tmp_path / "verdicts.jsonl")
    assert judge.compare(texts("long one", "b", "x", "same"), texts("short", "bb", "y", "same")) == [1, 0, 0.5, 0.5]
    assert len(server.asked) == 6  # equal texts are not asked about
    assert {request["model"] for request in server.asked} == {"some-model"}


def test_a_judge_that_likes_the_first_place_ties_everything(serve, tmp_path):
    judge = ChatJudge(serve(lambda content: "[[A]]").address, "m", tmp_path / "v.jsonl")
    assert judge.compare(texts("a", "b"), texts("c", "d")) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("reply", "swapped", "outcome"),
    [
        ("A", "B", 1), ("B", "A", 0), ("A", "A", 0.5), ("B", "B", 0.5), ("TIE", "TIE", 0.5),
        ("A", "TIE", 0.5), ("TIE", "A", 0.5), ("B", "TIE", 0.5), ("TIE", "B", 0.5),
    ],
)  # fmt: skip
def test_only_what_wins_in_both_orders_wins(reply, swapped, outcome):
    assert both_orders(f"[[{reply}]]", f"I say [[{swapped}]].") == outcome


def test_what_one_address_said_is_not_taken_for_anothers(serve, tmp_path):
    first, second = serve(lambda content: "[[A]]"), serve(longer)
    assert ChatJudge(first.address, "m", tmp_path / "v.jsonl").compare(texts("aa"), texts("b")) == [0.5]
    assert ChatJudge(second.address, "m", tmp_path / "v.jsonl").compare(texts("aa"), texts("b")) == [1]
    assert len(second.asked) == 2


def test_nothing_is_paid_for_twice(serve, tmp_path):
    server, file = serve(longer), tmp_path / "new folder" / "v.jsonl"
    first = ChatJudge(server.address, "m", file).compare(texts("aa"), texts("b"))
    with file.open("a") as cache:
        cache.write('{"address": "torn')
    again = ChatJudge(server.address, "m", file)
    assert first == again.compare(texts("aa"), texts("b")) == [1]
    assert again.compare(texts("b"), texts("aa")) == [0]  # the same two questions
    assert len(server.asked) == 2
    assert again.compare(texts("aa", "aaa"), texts("b", "b")) == [1, 1]
    assert len(server.asked) == 4
    assert len([json.loads(line) for line in file.open()]) == 4
    ChatJudge(server.address, "another", file).compare(texts("aa"), texts("b"))
    assert len(server.asked) == 6


@pytest.mark.parametrize("reply", ["I like A", "[[A]] or [[B]]", ""])
def test_a_reply_that_is_no_verdict_is_kept_raw(serve, tmp_path, reply):
    judge = ChatJudge(serve(lambda content: reply).address, "m", tmp_path / "v.jsonl")
    (answer,) = judge.compare(texts("a"), texts("b"))
    assert isinstance(answer, list)
    kept = {json.loads(line)["reply"] for line in (tmp_path / "v.jsonl").open()}
    assert kept == set(answer)
    assert answer == [reply] * 2


@pytest.mark.parametrize(
    "said",
    [
        b'{"error": {"message": "busy", "code": 429}}',
        b"<html>busy</html>",
        b"[]",
        b'{"choices": []}',
        b"[" * 10**5,
        None,
    ],
)
def test_an_answer_without_a_message_is_handed_on_and_asked_for_again(serve, tmp_path, said):
    """Status 200 notwithstanding; what holds no message of the model is no verdict of it."""
    said = [said, said]
    server = serve(lambda content: said.pop() if said else longer(content))
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl")
    ((answer, _),) = judge.compare(texts("aa"), texts("b"))
    assert "busy" in answer or "[" in answer or "null" in answer
    assert (tmp_path / "v.jsonl").read_text() == ""
    assert judge.compare(texts("aa"), texts("b")) == [1]
    assert len(server.asked) == 4


def test_a_busy_server_is_asked_again(serve, tmp_path):
    server = serve(longer)
    server.failures = [500, 429, 503]
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl", pauses=(0, 0, 0), workers=1)
    assert judge.compare(texts("aa"), texts("b")) == [1]
    assert len(server.asked) == 5


def test_a_server_that_stays_busy_is_named_and_what_it_said_is_kept(serve, tmp_path):
    server = serve(longer)
    server.failures = [503, 503, 503, 200]
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl", pauses=(0, 0), workers=1)
    with pytest.raises(ValueError, match=r"#m does not answer: HTTP Error 503.*kept in .*v.jsonl"):
        judge.compare(texts("aa"), texts("b"))
    assert len(list((tmp_path / "v.jsonl").open())) == 1
    ChatJudge(server.address, "m", tmp_path / "v.jsonl").compare(texts("aa"), texts("b"))
    assert len(server.asked) == 5


def test_a_request_that_is_refused_is_not_repeated(serve, tmp_path):
    server = serve(lambda content: b"invalid api key")
    server.failures = [401] * 9
    with pytest.raises(ValueError, match=r"HTTP Error 401.* invalid api key"):
        ChatJudge(server.address, "m", tmp_path / "v.jsonl", workers=1).compare(texts("aa"), texts("b"))
    assert len(server.asked) <= 2


def test_the_key_comes_from_the_environment_and_is_not_written(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    server = serve(longer)
    ChatJudge(server.address, "m", tmp_path / "v.jsonl").compare(texts("aa"), texts("b"))
    assert set(server.keys) == {"Bearer a-secret"}
    assert "a-secret" not in (tmp_path / "v.jsonl").read_text()
    monkeypatch.delenv("OPENAI_API_KEY")
    ChatJudge(server.address, "m", tmp_path / "w.jsonl").compare(texts("aa"), texts("b"))
    assert server.keys[2:] == [None, None]


def redirect(to):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


def drip(handler):
    """The head of an answer whose body never ends, a byte at a time."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.02)


def failing(judge):
    with pytest.raises(ValueError, match="does not answer") as error:
        judge.compare(texts("aa"), texts("b"))
    return str(error.value)


def test_a_question_that_is_refused_leaves_the_others_their_answers(serve, tmp_path):
    """As a request that is wrong itself ends the run."""

    def refuse(handler):
        handler.send_error(400, "content policy")

    judge = ChatJudge(
        serve(lambda said: refuse if "bad" in said else longer(said)).address, "m", tmp_path / "v", workers=1
    )
    with pytest.raises(ValueError, match="400: content policy"):
        judge.compare(texts("bad"), texts("b"))
    assert judge.compare(texts("aa"), texts("b")) == [1.0]
    (refused,) = judge.compare(texts("bad"), texts("b"))
    assert "400: content policy" in refused[0]


def test_the_key_does_not_follow_a_redirect(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    other = serve(longer)
    judge = ChatJudge(serve(lambda content: redirect(other.address)).address, "m", tmp_path / "v.jsonl")
    assert f"HTTP Error 302: Found {other.address}" in failing(judge)
    assert not other.asked


def test_a_key_that_the_server_quotes_is_not_shown(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret\n")  # as `export OPENAI_API_KEY=$'...'` may leave it
    server = serve(lambda content: b"no such key: a-secret")
    server.failures = [401]
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl", workers=1)
    assert "401: Unauthorized  no such key: OPENAI_API_KEY" in failing(judge)
    assert judge.compare(texts("a"), texts("b")) == [["no such key: OPENAI_API_KEY"] * 2]
    assert set(server.keys) == {"Bearer a-secret"}


@pytest.mark.parametrize(
    "quoted", [r"a/se+\"c\\", r"a\/se+\"c\\", r"a\u002fse\u002b\u0022c\u005C", r"a\\\/se+\\\"c\\\\"]
)
@pytest.mark.parametrize(
    "form", ['{"choices": [{"message": {"content": "[[A]] %s"}}]}', '{"error": "no such key: %s"}']
)
def test_a_key_that_the_server_quotes_with_escapes_is_not_shown(serve, tmp_path, monkeypatch, quoted, form):
    monkeypatch.setenv("OPENAI_API_KEY", 'a/se+"c\\')
    server = serve(lambda content: (form % quoted).encode())
    server.failures = [401]
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl", workers=1)
    seen = failing(judge) + str(judge.compare(texts("a"), texts("b"))) + (tmp_path / "v.jsonl").read_text()
    assert "OPENAI_API_KEY" in seen
    assert "se+" not in seen
    assert "u002fse" not in seen


@pytest.mark.parametrize("key", ["a-sec\nret", "a-sécret"])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is no key") as error:
        ChatJudge("http://127.0.0.1:9/v1", "m", tmp_path / "v.jsonl")
    assert "ret" not in str(error.value)


@pytest.mark.parametrize("address", ["https://me:a-secret@host/v1", "https://host/v1?key=a-secret"])
def test_an_address_with_a_key_is_refused_and_not_shown(tmp_path, address):
    with pytest.raises(ValueError, match="holds no user, password or query") as error:
        ChatJudge(address, "m", tmp_path / "v.jsonl")
    assert "a-secret" not in str(error.value)


def test_an_answer_has_an_end(serve, tmp_path, monkeypatch):
    """In bytes, and in time: a server that sends a byte now and then outlives every timeout of its socket."""
    monkeypatch.setattr(chat_judge, "SECONDS", 0.5)
    began = time.monotonic()
    judge = ChatJudge(serve(lambda content: drip).address, "m", tmp_path / "v.jsonl", pauses=())
    assert "no whole answer within 0.5 seconds" in failing(judge)
    assert time.monotonic() - began < 5
    monkeypatch.setattr(chat_judge, "SECONDS", 60)
    monkeypatch.setattr(chat_judge, "BYTES", 1000)
    judge = ChatJudge(serve(lambda content: "x" * 1000).address, "m", tmp_path / "v.jsonl", pauses=())
    assert "its answer has more than 1000 bytes" in failing(judge)


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (404, 1), (409, 3), (422, 1), (500, 3)])
def test_every_status_is_named(serve, tmp_path, status, tries):
    server = serve(lambda content: b"because")
    server.failures = [status] * 9
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl", pauses=(0, 0), workers=1)
    message = failing(judge)
    assert f"HTTP Error {status}: " in message
    assert "because" in message
    assert len(server.asked) == tries


INTERRUPTED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs that a shell runs in the background ignore
from pargs_min.evaluation.chat_judge import ChatJudge
text = {"prompt": "a", "response": "b"}
ChatJudge(sys.argv[1], "m", sys.argv[2]).compare([text] * 30, [text | {"response": str(i)} for i in range(30)])
"""


def test_an_interrupt_is_heard_while_a_judge_does_not_answer(serve, tmp_path):
    asked, released = threading.Event(), threading.Event()
    server = serve(lambda content: asked.set() or (released.wait(60) and "[[A]]"))
    command = [sys.executable, "-c", INTERRUPTED, server.address, tmp_path / "v.jsonl"]
    with subprocess.Popen(command, env=os.environ | {"no_proxy": "127.0.0.1"}, stderr=subprocess.DEVNULL) as run:
        try:
            assert asked.wait(60)
            run.send_signal(signal.SIGINT)
            assert run.wait(20) == -signal.SIGINT
        finally:
            run.kill()
            released.set()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<think>[[B]]? No.</think>\n[[A]]", 1.0),
        ("[[B]] at first </think> [[A]]", 1.0),  # the chat template opened it
        ("<think>x</think><think>[[B]]</think>[[A]]", 1.0),
        ("<think>[[A]], surely", None),
        ("<think>a</think> <think>[[A]]", None),
        ("<think>[[A]]</think>", None),
        ("[[A]] <think> or [[B]]", None),
    ],
)
def test_a_verdict_is_read_from_the_answer_and_not_from_the_reasoning(reply, verdict):
    assert both_orders(reply, "[[B]]") == (verdict or [reply, "[[B]]"])


def test_half_a_character_in_a_reply_is_kept_as_a_question_mark(serve, tmp_path):
    judge = ChatJudge(serve(lambda content: "[[TIE]] \ud83d").address, "m", tmp_path / "v.jsonl")
    assert judge.compare(texts("aa"), texts("b")) == [0.5]
    assert {json.loads(line)["reply"] for line in (tmp_path / "v.jsonl").open()} == {"[[TIE]] ?"}
    ChatJudge("http://127.0.0.1:9/v1", "m", tmp_path / "v.jsonl")


BROKEN = {
    "no": "not JSON",
    '{"address": "x", "request": {}}': "not a verdict",
    '{"address": "x", "request": [], "reply": ""}': "not a verdict",
    '{"address": "x", "request": {}, "reply": null}': "not a verdict",
    '{"address": 1, "request": {}, "reply": ""}': "not a verdict",
    "[]": "object",
}


@pytest.mark.parametrize(("line", "message"), BROKEN.items(), ids=BROKEN)
def test_a_broken_cache_is_named_by_line(tmp_path, line, message):
    request = {"messages": [{"role": "user", "content": "Which?"}]}
    good = json.dumps({"address": "x", "request": request, "reply": "[[A]]"})
    (tmp_path / "v.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=rf"v.jsonl:2: .*{message}"):
        ChatJudge("x", "m", tmp_path / "v.jsonl")


def test_an_address_where_nobody_listens_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"does not answer: .*refused"):
            ChatJudge("http://127.0.0.1:9/v1", "m", tmp_path / "v.jsonl", pauses=(0,)).compare(texts("a"), texts("b"))
