"""Who says what a text is worth.

    MODEL                a sequence-classification reward model: a folder or a hub id
    module:function      any Python function of (prompts, responses) -> list of numbers
    URL#MODEL            a language model behind an OpenAI-compatible address, asked which of two responses is better

A judge answers with numbers. Whatever else comes out of it is handed on as it came, to be counted and kept, and never
read as a number.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from pargs_min.codec import encode_prompt, encode_responses, left_pad
from pargs_min.models import load_reward_model
from pargs_min.records import Messages, is_messages
from pargs_min.reward_model import context_length, final_rewards, is_causal

Texts = Sequence[dict]  # records of `pargs generate`


@dataclass(frozen=True)
class Judge:
    """Scores texts one by one, or compares them in pairs: it has one of the two functions.

    Args:
        score: texts -> one reward per text.
        compare: ours, theirs -> 1 (ours is better), 0.5 (tie) or 0 per pair.
        measures: further columns of a comparison: name -> function of the judge's answer on a text.
    """

    name: str
    score: Callable[[Texts], list] | None = None
    compare: Callable[[Texts, Texts], list] | None = None
    measures: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)


def load_judge(name: str, verdicts: str | os.PathLike = "verdicts.jsonl") -> Judge:
    """The judge of that name (see the top of this file).

    Args:
        verdicts: where the replies of a language model are kept, so that none is paid for twice.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if name.startswith(("http://", "https://")):
        address, _, model = name.partition("#")
        if not model:
            raise ValueError(f"judge {name!r} names no model; write it behind the address: {name}#MODEL")
        return Judge(name, compare=ChatJudge(address, model, verdicts).compare)
    if ":" in name and not os.path.exists(name):
        return Judge(name, score=function_judge(name))
    return Judge(name, score=model_judge(name))


def is_number(value: object) -> bool:
    """Whether a judge's answer counts.

    >>> [is_number(value) for value in (1, 0.5, "0.5", None, float("nan"), True)]
    [True, True, False, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < float("inf")


def function_judge(name: str) -> Callable[[Texts], list]:
    """`module:function` of (prompts, responses), two lists of strings; modules are looked for here first, as by -m."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"judge {name!r} cannot be loaded: {error}; expected MODULE:FUNCTION") from error
    finally:
        sys.path.remove(os.getcwd())

    def score(texts: Texts) -> list:
        answer = judge([prompt_text(text) for text in texts], [text["response"] for text in texts])
        answer = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(answer, Sequence) or isinstance(answer, str) or len(answer) != len(texts):
            raise ValueError(
                f"judge {name!r} must return one number for each of {len(texts)} texts, got {answer!r:.60}"
            )
        return list(answer)

    return score


def prompt_text(record: dict) -> str:
    """The prompt as text, for judges that read text.

    >>> prompt_text({"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    'user: Hi\\n\\nassistant: Hello'
    """
    prompt = record["prompt"]
    if is_messages(prompt):
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt number {record['prompt_number']} has no text, and the judge reads text; add `prompt`")
    return prompt


def model_judge(name: str, batch_size: int = 32) -> Callable[[Texts], list[float]]:
    """A one-label classifier; each kind reads a text in the form that it was trained on.

    A model that `pargs train` wrote reads ids, in its recorded prompt format, end token included. Of the others, those
    with a chat template read a chat, bidirectional ones (BERT's kind) a pair of texts, causal ones text and end token.

    Raises:
        ValueError: if there is no such model, or it is not a reward model.
    """
    try:
        architectures = AutoConfig.from_pretrained(name).architectures or []
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
            raise ValueError(f"it is {', '.join(architectures) or 'no model'}, not a sequence-classification model")
        model = load_reward_model(name, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"judge {name!r} cannot be loaded: {error}; expected a reward model, MODULE:FUNCTION or URL#MODEL"
        ) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ours = getattr(model.config, "pargs", None)
    as_pairs = ours is None and not tokenizer.chat_template and not is_causal(model)

    @torch.no_grad()
    def score(texts: Texts) -> list[float]:
        if as_pairs:
            rows = [tokenizer(prompt_text(text), text["response"]) for text in texts]
        elif ours is None and tokenizer.chat_template:
            rows = [{"input_ids": ids} for ids in _as_chats(tokenizer, texts)]
        else:
            rows = [{"input_ids": ids} for ids in _as_ids(tokenizer, texts, ours or {})]
        limit = context_length(model)
        for row, text in zip(rows, texts, strict=True):
            if limit is not None and len(row["input_ids"]) > limit:
                raise ValueError(
                    f"prompt number {text['prompt_number']}, sample {text['sample']}: {len(row['input_ids'])} tokens, "
                    f"and judge {name!r} reads at most {limit}; generate shorter texts (--max-new-tokens)"
                )
        rewards = []
        for batch in tqdm(
            [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)], desc="judging", disable=None
        ):
            if as_pairs:
                inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
                rewards += model(**inputs).logits[:, 0].tolist()
            else:
                ids, mask = left_pad([row["input_ids"] for row in batch])
                rewards += final_rewards(model, ids.to(model.device), mask.to(model.device)).tolist()
        return rewards

    return score


def _as_chats(tokenizer, texts: Texts) -> Iterator[list[int]]:
    for text in texts:
        prompt = text["prompt"] if is_messages(text["prompt"]) else [{"role": "user", "content": prompt_text(text)}]
        chat: Messages = [*prompt, {"role": "assistant", "content": text["response"]}]
        yield tokenizer.apply_chat_template(chat, return_dict=False)


def _as_ids(tokenizer, texts: Texts, settings: dict) -> Iterator[list[int]]:
    """Prompt and response as ids, with the end token where the text ended.

    Ids that this tokenizer decodes to the response are its own, and read as they were drawn; others are encoded anew.
    """
    encoded = encode_responses(tokenizer, [text["response"] for text in texts])
    for text, ids in zip(texts, encoded, strict=True):
        prompt = encode_prompt(tokenizer, text["prompt"] or prompt_text(text), settings.get("prompt_format"))
        if _are_own(tokenizer, text):
            ids = text["response_ids"]
        elif text.get("finished") and settings.get("append_eos", True) and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        yield prompt + ids


def _are_own(tokenizer, text: dict) -> bool:
    """An empty response tells less: every tokenizer's special tokens decode to it, and so do ids that it lacks."""
    ids = text["response_ids"]
    if not text["response"] and text.get("finished") and ids[-1:] != [tokenizer.eos_token_id]:
        return False
    return max(ids, default=0) < len(tokenizer) and tokenizer.decode(ids, skip_special_tokens=True) == text["response"]


QUESTION = """\
Which of two responses to a prompt is better? Weigh how helpful, relevant, correct and well written they are. Neither \
their length nor their order matters. Answer with one of [[A]], [[B]] or, if they are equally good, [[TIE]], and \
nothing else.

[Prompt]
{prompt}

[Response A]
{a}

[Response B]
{b}"""


class ChatJudge:
    """A language model behind an OpenAI-compatible address, asked which of two responses is better, in both orders.

    A response wins if it is preferred in both orders; where the orders disagree it is a tie, for models prefer the
    response that they read first. The key, if the address wants one, is read from the environment (OPENAI_API_KEY).

    Args:
        address: up to and without `/chat/completions`, such as https://api.openai.com/v1.
        verdicts: JSONL file of {address, request, reply}, one line per reply; what it holds is not asked again.
            An answer without a message of the model is handed on, and not kept.
        question: the request, with {prompt}, {a} and {b}; replies must hold one of [[A]], [[B]], [[TIE]].
        pauses: seconds before each new try, when the address cannot be reached, is too busy, or fails.
        workers: requests at a time.

    Source: Zheng et al. (2023), arXiv 2306.05685 (both orders, ties); the win rates of arXiv 2406.07780.
    """

    def __init__(
        self,
        address: str,
        model: str,
        verdicts: str | os.PathLike,
        *,
        question: str = QUESTION,
        pauses: Sequence[float] = (1, 2, 4, 8, 16),
        timeout: float = 120.0,
        workers: int = 8,
    ):
        self.address, self.model, self.verdicts, self.question = address.rstrip("/"), model, Path(verdicts), question
        self.pauses, self.timeout, self.workers = pauses, timeout, workers
        self.replies = self._read_verdicts()

    def compare(self, ours: Texts, theirs: Texts) -> list:
        """1, 0.5 or 0 per pair; the two raw replies where one of them is not a verdict. Equal texts are a tie."""
        pairs = [
            (self._request(a, a["response"], b["response"]), self._request(a, b["response"], a["response"]))
            if a["response"] != b["response"]
            else None
            for a, b in zip(ours, theirs, strict=True)
        ]
        requests = {request for pair in pairs if pair for request in pair}
        replies = self.replies | self._ask_all(requests - self.replies.keys())
        return [0.5 if pair is None else both_orders(*(replies[request] for request in pair)) for pair in pairs]

    def _request(self, text: dict, a: str, b: str) -> str:
        content = self.question.format(prompt=prompt_text(text), a=a, b=b)
        return json.dumps({"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]})

    def _ask_all(self, requests: set[str]) -> dict[str, str]:
        """The reply to each; what the model said is kept, other answers (an error, say) may be better another time."""
        pool, replies = ThreadPoolExecutor(self.workers), {}
        self.verdicts.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.verdicts.open("a", encoding="utf-8") as file:
                asked = {pool.submit(self._ask, request): request for request in sorted(requests)}
                for answer in tqdm(as_completed(asked), desc=self.model, total=len(asked), disable=None):
                    request = asked[answer]
                    said = answer.result()
                    reply = _content(said)
                    replies[request] = said if reply is None else reply
                    if reply is None:
                        continue
                    self.replies[request] = reply
                    line = {"address": self.address, "request": json.loads(request), "reply": reply}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
        finally:
            pool.shutdown(cancel_futures=True)
        return replies

    def _ask(self, request: str) -> str:
        """The answer, as it came."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        for pause in (*self.pauses, None):
            try:
                with urlopen(
                    Request(f"{self.address}/chat/completions", request.encode(), headers), timeout=self.timeout
                ) as answer:
                    return answer.read().decode(errors="replace")
            except (OSError, HTTPException) as error:
                refused = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 409, 425, 429)
                if refused or pause is None:
                    said = error.read().decode(errors="replace")[:300] if isinstance(error, HTTPError) else ""
                    raise ValueError(
                        f"judge {self.address}#{self.model} does not answer: {error} {said}; what it has said so far "
                        f"is kept in {self.verdicts}, and the same command goes on from there"
                    ) from error
                time.sleep(pause)
        raise AssertionError  # the last pause is None

    def _read_verdicts(self) -> dict[str, str]:
        """Replies so far, by request; a half-written last line is removed."""
        if not self.verdicts.exists():
            return {}
        whole, _, broken = self.verdicts.read_bytes().rpartition(b"\n")
        if broken:
            os.truncate(self.verdicts, len(whole) + 1 if whole else 0)
        replies = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                verdict = json.loads(line)
                if verdict["address"] == self.address:
                    replies[json.dumps(verdict["request"])] = verdict["reply"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.verdicts}:{number}: not a verdict ({error!r}); remove the line") from None
        return replies


def _content(answer: str) -> str | None:
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
