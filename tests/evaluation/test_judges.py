"""Judges: each reads what it should, and nothing that it says is guessed."""

import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from pargs_min.evaluation.judges import ChatJudge, both_orders, load_judge
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
    with pytest.raises(ValueError, match="cannot be loaded: it is LlamaForCausalLM, not a sequence-classification"):
        load_judge(str(tmp_path))


def test_a_text_longer_than_the_judge_reads_is_named(tmp_path):
    save_reward_model(tiny_reward_model("gpt2"), word_tokenizer(WORDS, pad_token="<pad>"), tmp_path)
    long = text(response=" ".join("c" * 63), ids=[4] * 63, prompt_number=7, sample=2)
    with pytest.raises(ValueError, match=r"prompt number 7, sample 2: 65 tokens, and judge .* reads at most 64"):
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
    )
    monkeypatch.chdir(tmp_path)
    assert load_judge("odd_judges:words").score([text()] * 2) == ["good", None]
    assert load_judge("odd_judges:array").score([text()] * 2) == [1.0, 2.0]
    for name in ("one", "none"):
        with pytest.raises(ValueError, match="must return one number for each of 2 texts, got"):
            load_judge(f"odd_judges:{name}").score([text()] * 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be loaded: No module named 'no_such_module'"),
        ("json:no_such_function", "cannot be loaded: module 'json' has no attribute"),
        ("json:", "expected MODULE:FUNCTION"),
        ("/no/such/folder", "judge '/no/such/folder' cannot be loaded"),
        ("http://127.0.0.1:1/v1", "names no model; write it behind the address"),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_judge(name)


# A language model behind an address


class Server:
    """A local server that replies with `reply(content of the request)`; it counts what it is asked."""

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
    return [text(response=response, sample=i) for i, response in enumerate(responses)]


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
    "said", [b'{"error": {"message": "busy", "code": 429}}', b"<html>busy</html>", b"[]", b'{"choices": []}', None]
)
def test_an_answer_without_a_message_is_handed_on_and_asked_for_again(serve, tmp_path, said):
    """Status 200 notwithstanding; what holds no message of the model is no verdict of it."""
    said = [said, said]
    server = serve(lambda content: said.pop() if said else longer(content))
    judge = ChatJudge(server.address, "m", tmp_path / "v.jsonl")
    ((answer, _),) = judge.compare(texts("aa"), texts("b"))
    assert "busy" in answer or "[]" in answer or "null" in answer
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


def test_a_broken_cache_is_named_by_line(tmp_path):
    (tmp_path / "v.jsonl").write_text('{"address": "x", "request": {}, "reply": "[[A]]"}\nno\n')
    with pytest.raises(ValueError, match=r"v.jsonl:2: not a verdict"):
        ChatJudge("x", "m", tmp_path / "v.jsonl")


def test_an_address_where_nobody_listens_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"does not answer: .*refused"):
            ChatJudge("http://127.0.0.1:9/v1", "m", tmp_path / "v.jsonl", pauses=(0,)).compare(texts("a"), texts("b"))
