"""The judge that is a language model behind an OpenAI-compatible address."""

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pargs_min.evaluation.reading import Texts, prompt_text
from pargs_min.progress import progress
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
        self.replies: dict[str, str] = {}
        kept = read_jsonl(self.verdicts, growing=True) if os.path.exists(self.verdicts) else ()
        for verdict, source in kept:
            try:
                question = verdict["request"]["messages"][0]["content"]
                if (verdict["address"], verdict["request"]) == (self.address, self._request(question)):
                    self.replies[question] = verdict["reply"]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{source}: not a verdict ({error!r}); remove the line") from None

    def compare(self, ours: Texts, theirs: Texts) -> list:
        """1, 0.5 or 0 per pair; the two raw replies where one of them is not a verdict. Equal texts are a tie."""
        pairs = [self._questions(*pair) for pair in zip(ours, theirs, strict=True)]
        questions = {question for pair in pairs for question in pair}
        replies = self.replies | self._ask_all(questions - self.replies.keys())
        return [both_orders(*(replies[question] for question in pair)) if pair else 0.5 for pair in pairs]

    def _questions(self, one: dict, other: dict) -> list[str]:
        """In both orders; none where the texts are equal."""
        orders = (one["response"], other["response"]), (other["response"], one["response"])
        return [QUESTION.format(prompt=prompt_text(one), a=a, b=b) for a, b in orders if a != b]

    def _request(self, question: str) -> dict:
        return {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}

    def _ask_all(self, questions: set[str]) -> dict[str, str]:
        """The reply to each; what the model said is kept, other answers (an error, say) may be better another time."""
        pool, replies = ThreadPoolExecutor(self.workers), {}
        try:
            with appending(self.verdicts) as append:
                asked = {pool.submit(self._ask, question): question for question in sorted(questions)}
                for answer in progress(as_completed(asked), desc=self.model, total=len(asked)):
                    question, said = asked[answer], answer.result()
                    replies[question] = said
                    if (reply := _message(said)) is not None:
                        replies[question] = self.replies[question] = reply
                        append({"address": self.address, "request": self._request(question), "reply": reply})
        finally:
            pool.shutdown(cancel_futures=True)
        return replies

    def _ask(self, question: str) -> str:
        """The answer, as it came."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = Request(f"{self.address}/chat/completions", json.dumps(self._request(question)).encode(), headers)
        pauses = iter(self.pauses)
        while True:
            try:
                with urlopen(request, timeout=SECONDS) as answer:
                    return answer.read().decode(errors="replace")
            except (OSError, HTTPException) as error:
                if _refused(error) or (pause := next(pauses, None)) is None:
                    said = error.read().decode(errors="replace")[:300] if isinstance(error, HTTPError) else ""
                    raise ValueError(
                        f"judge {self.address}#{self.model} does not answer: {error} {said}; what it has said so far "
                        f"is kept in {self.verdicts}, and the same command goes on from there"
                    ) from error
                time.sleep(pause)


def _refused(error: Exception) -> bool:
    """Whether asking again is of no use."""
    return isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 409, 425, 429)


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
