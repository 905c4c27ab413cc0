"""The judge that is a language model behind an OpenAI-compatible address."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pargs_min.progress import progress
from pargs_min.reading import Texts, prompt_text
from pargs_min.records import read_jsonl
from pargs_min.store import appending

QUESTION = Path(__file__).with_name("question.txt").read_text("utf-8").removesuffix("\n")
SECONDS = 120  # to wait for an answer


@dataclass
class ChatJudge:
    """A language model, asked which of two responses is better, in both orders.

    A response wins if it is preferred in both orders; where the orders disagree it is a tie, for models prefer the
    response that they read first. The key, if the address wants one, is read from the environment (OPENAI_API_KEY).

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
        self.address = self.address.rstrip("/")
        self.replies: dict[str, str] = {}  # by address and request, as JSON
        kept = read_jsonl(self.verdicts, growing=True) if os.path.exists(self.verdicts) else ()
        for verdict, source in kept:
            try:
                self.replies[json.dumps([verdict["address"], verdict["request"]], sort_keys=True)] = verdict["reply"]
            except KeyError as error:
                raise ValueError(f"{source}: not a verdict (it has no {error}); remove the line") from None

    def compare(self, ours: Texts, theirs: Texts) -> list:
        """1, 0.5 or 0 per pair; the two raw replies where one of them is not a verdict. Equal texts are a tie."""
        pairs = [(_question(one, other), _question(other, one)) for one, other in zip(ours, theirs, strict=True)]
        asked = sorted({question for pair in pairs for question in pair if pair[0] != pair[1]})
        with appending(self.verdicts) as append, ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(partial(self._ask, append), asked)
            replies = dict(zip(asked, progress(answers, desc=self.model, total=len(asked)), strict=True))
        return [both_orders(replies[a], replies[b]) if a != b else 0.5 for a, b in pairs]

    def _ask(self, append: Callable[[dict], None], question: str) -> str:
        """The reply; what the model said is kept, other answers (an error, say) may be better another time."""
        messages = [{"role": "user", "content": question}]
        request = {"model": self.model, "temperature": 0, "messages": messages}
        if (key := json.dumps([self.address, request], sort_keys=True)) in self.replies:
            return self.replies[key]
        if (reply := _message(answer := self._post(request))) is None:
            return answer
        append({"address": self.address, "request": request, "reply": reply})
        return self.replies.setdefault(key, reply)

    def _post(self, request: dict) -> str:
        """The answer to a request, as it came."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        asked = Request(f"{self.address}/chat/completions", json.dumps(request).encode(), headers)
        pauses = iter(self.pauses)
        while True:
            try:
                with urlopen(asked, timeout=SECONDS) as answer:
                    return answer.read().decode(errors="replace")
            except (OSError, HTTPException) as error:
                refused = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 409, 425, 429)
                if refused or (pause := next(pauses, None)) is None:
                    said = error.read().decode(errors="replace")[:300] if isinstance(error, HTTPError) else ""
                    raise ValueError(
                        f"judge {self.address}#{self.model} does not answer: {error} {said}; what it has said so far "
                        f"is kept in {self.verdicts}, and the same command goes on from there"
                    ) from error
                time.sleep(pause)


def _question(first: dict, second: dict) -> str:
    return QUESTION.format(prompt=prompt_text(first), a=first["response"], b=second["response"])


def _message(answer: str) -> str | None:
    """What the model said; None where the answer has another form."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def both_orders(reply: str, swapped_reply: str) -> float | list[str]:
    """The outcome for the response that was A first and B second; both replies where one of them is no verdict.

    >>> both_orders("[[A]]", "[[B]]"), both_orders("[[A]]", "[[A]]"), both_orders("[[B]]", "[[TIE]]")
    (1.0, 0.5, 0.5)
    >>> both_orders("I like A", "[[B]]")
    ['I like A', '[[B]]']
    """
    first, second = (set(re.findall(r"\[\[(A|B|TIE)\]\]", text)) for text in (reply, swapped_reply))
    if len(first) != 1 or len(second) != 1:
        return [reply, swapped_reply]
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((*first, *second), 0.5)
