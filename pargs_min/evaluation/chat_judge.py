"""The judge that is a language model behind an OpenAI-compatible address."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pargs_min.progress import progress
from pargs_min.reading import Texts, prompt_text
from pargs_min.records import read_jsonl
from pargs_min.store import appending

QUESTION = Path(__file__).with_name("question.txt").read_text("utf-8").removesuffix("\n")
SECONDS = 120  # to wait for an answer, from its request to its last byte
BYTES = 1_000_000  # that an answer may have


@dataclass
class ChatJudge:
    """A language model, asked which of two responses is better, in both orders.

    A response wins if it is preferred in both orders; where the orders disagree it is a tie, for models prefer the
    response that they read first. The key, if the address wants one, is read from the environment (OPENAI_API_KEY),
    and sent to that address alone: redirects are not followed.

    Args:
        address: up to and without `/chat/completions`, such as https://api.openai.com/v1.
        verdicts: JSONL file of {address, request, reply}, one line per reply; what it holds is not asked again.
            An answer without a message of the model is handed on, and not kept.
        pauses: seconds before each new try, when the address cannot be reached, is too busy, or fails.
        workers: requests at a time.

    Source: Zheng et al. (2023), arXiv 2306.05685 (both orders, ties); the win rates of arXiv 2406.07780.
    """

    address: str
    model: str
    verdicts: str | os.PathLike
    pauses: Sequence[float] = (1, 2, 4, 8, 16)
    workers: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if "@" in parts.netloc or parts.query:
            raise ValueError("a judge's address holds no user, password or query; give its key as OPENAI_API_KEY")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("OPENAI_API_KEY is no key: it holds line breaks, or letters beyond ASCII")
        self.address = self.address.rstrip("/")
        self.replies: dict[str, str] = {}  # by address and request, as JSON
        kept = read_jsonl(self.verdicts, growing=True) if os.path.exists(self.verdicts) else ()
        for verdict, source in kept:
            asked = verdict.get("address"), verdict.get("request")
            if not (isinstance(asked[0], str) and isinstance(asked[1], dict) and isinstance(verdict.get("reply"), str)):
                raise ValueError(f"{source}: not a verdict {{address, request, reply}}; remove the line")
            self.replies[json.dumps(asked, sort_keys=True)] = verdict["reply"]

    def compare(self, ours: Texts, theirs: Texts) -> list:
        """1, 0.5 or 0 per pair; the two raw replies where one of them is not a verdict. Equal texts are a tie."""
        pairs = [(_question(one, other), _question(other, one)) for one, other in zip(ours, theirs, strict=True)]
        asked = sorted({question for pair in pairs for question in pair if pair[0] != pair[1]})
        replies: dict[str, str] = {}
        with appending(self.verdicts) as append, progress(desc=self.model, total=len(asked)) as bar:

            def work(questions: list[str]) -> None:
                for question in questions:
                    replies[question] = self._ask(append, question)
                    bar.update()

            for share in as_completed([in_thread(work, asked[i :: self.workers]) for i in range(self.workers)]):
                share.result()
        return [both_orders(replies[a], replies[b]) if a != b else 0.5 for a, b in pairs]

    def _ask(self, append: Callable[[dict], None], question: str) -> str:
        """The reply; what the model said is kept, other answers (an error, say) may be better another time."""
        messages = [{"role": "user", "content": question}]
        request = {"model": self.model, "temperature": 0, "messages": messages}
        if (key := json.dumps([self.address, request], sort_keys=True)) in self.replies:
            return self.replies[key]
        if (reply := _message(answer := self._post(request))) is None:
            return answer
        reply = self._without_key(reply)  # now that its escapes are read
        append({"address": self.address, "request": request, "reply": reply})
        return self.replies.setdefault(key, reply)

    def _post(self, request: dict) -> str:
        """The answer to a request, as it came; a request that is refused for what it holds gets the refusal, once the
        judge has answered any other."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        asked = Request(f"{self.address}/chat/completions", json.dumps(request).encode(), headers)
        pauses = iter(self.pauses)
        while True:
            try:
                return self._without_key(in_thread(_exchange, asked).result(SECONDS))
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) and error.code in (400, 413, 422) and self.replies:
                    return self._without_key(str(error))
                refused = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 409, 425, 429)
                if refused or (pause := next(pauses, None)) is None:
                    what = str(error) or f"no whole answer within {SECONDS} seconds"
                    raise ValueError(
                        f"judge {self.address}#{self.model} does not answer: {self._without_key(what)}; what it has "
                        f"said so far is kept in {self.verdicts}, and the same command goes on from there"
                    ) from None
                time.sleep(pause)

    def _without_key(self, text: str) -> str:
        """What a server says may quote the key, with JSON's escapes or without."""
        letters = "".join(map(_escaped, self.key))
        return re.sub(f"(?i:{letters})", "OPENAI_API_KEY", text) if self.key else text


def _escaped(letter: str) -> str:
    """A pattern of a letter as JSON, or JSON within JSON, may hold it."""
    slashes = r"\\*" if letter in '/"\\' else ""
    return rf"(?:{slashes}{re.escape(letter)}|\\+u{ord(letter):04x})"


class _NoRedirects(HTTPRedirectHandler):
    """The key is for one address, and would go along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _exchange(asked: Request) -> str:
    """The answer to a request; an error of HTTP says what came with it, and where a redirect leads."""
    try:
        with build_opener(_NoRedirects).open(asked, timeout=SECONDS) as answer:
            said = answer.read(BYTES + 1)
    except HTTPError as error:
        error.msg += f" {error.headers.get('Location', '')} {error.read(300).decode(errors='replace')}"
        raise
    if len(said) > BYTES:
        raise OSError(f"its answer has more than {BYTES} bytes")
    return said.decode(errors="replace")


def in_thread(function: Callable, *arguments: Any) -> Future:
    """Its result to come, from a thread that ends with the program: who waits for it can be interrupted."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _question(first: dict, second: dict) -> str:
    return QUESTION.format(prompt=prompt_text(first), a=first["response"], b=second["response"])


def _message(answer: str) -> str | None:
    """What the model said; None where the answer has another form."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return content.encode(errors="replace").decode() if isinstance(content, str) else None


def both_orders(reply: str, swapped_reply: str) -> float | list[str]:
    """The outcome for the response that was A first and B second; both replies where one of them is no verdict.

    What a model only thought (<think>...</think>) is not read.

    >>> both_orders("[[A]]", "[[B]]"), both_orders("[[A]]", "[[A]]"), both_orders("[[B]]", "[[TIE]]")
    (1.0, 0.5, 0.5)
    >>> both_orders("I like A", "[[B]]")
    ['I like A', '[[B]]']
    """
    first, second = (set(re.findall(r"\[\[(A|B|TIE)\]\]", _answer(text))) for text in (reply, swapped_reply))
    if len(first) != 1 or len(second) != 1:
        return [reply, swapped_reply]
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((*first, *second), 0.5)


def _answer(reply: str) -> str:
    """What follows a model's reasoning; nothing where the reasoning has no end."""
    answer = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).rpartition("</think>")[2]
    return "" if "<think>" in answer else answer
