"""What clients of OpenAI's interface send and get: requests that are checked field by field, and answers.

Beyond that interface a request may name `method`, `beta` and `top_k`. `temperature` and `top_p` are those of the
reference, which is then guided; at temperature 0 the most likely token is always taken. Log-probabilities are those of
the guided policy, and have `guidance` beside them: each token's record of `trace.records`.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pargs_min.codec import Codec
from pargs_min.serving import SHOWN
from pargs_min.trace import drawn

# Fields that are accepted where they ask for nothing, and otherwise refused; and those that change no text.
NEUTRAL: dict[str, list] = {name: [None, 0] for name in ("frequency_penalty", "presence_penalty")}
NEUTRAL |= {"logit_bias": [None, {}], "best_of": [None, 1], "echo": [None, False], "suffix": [None, ""]}
NEUTRAL |= {"tools": [None, []], "functions": [None, []], "response_format": [None, {"type": "text"}]}
UNREAD = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
LOWEST = -9999.0  # stands for the logarithm of 0, which JSON lacks


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    return text


WholeText = Annotated[str, AfterValidator(_whole)]


class Strict(BaseModel):
    """Nothing is guessed: "1" is no number, and what is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class Request(Strict):
    """What both kinds of requests may say; None stands for what the server was started with."""

    model: str | None = None
    method: str | None = None
    beta: float | None = Field(None, ge=-1e6, le=1e6)
    top_k: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if name not in UNREAD and not (name in NEUTRAL and value in NEUTRAL[name])
        }

    @field_validator("stream_options")  # which comes after stream
    @classmethod
    def of_a_stream(cls, options: StreamOptions | None, others: ValidationInfo) -> StreamOptions | None:
        if options and not others.data.get("stream"):
            raise ValueError("only for streams: set stream to true, or leave it out")
        return options

    @property
    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [one for one in found if one]


class CompletionRequest(Request):
    prompt: WholeText | list[WholeText] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=SHOWN)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each text or ids."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return self.prompt if several else [self.prompt]  # type: ignore[list-item, return-value]

    @property
    def shown(self) -> int | None:
        """Candidates to list of each token; None: its log-probability is not asked for."""
        return self.logprobs


class Part(Strict):
    type: Literal["text"]
    text: WholeText


class Message(Strict):
    role: WholeText
    content: WholeText | list[Part]

    def as_record(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=SHOWN)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        return [[message.as_record() for message in self.messages]]

    @property
    def shown(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Reader:
    """The text of a response as far as it is settled, while its tokens come.

    What may be the beginning of a stop string, or half a character, is held back.
    """

    def __init__(self, codec: Codec, stops: Sequence[str]):
        self.codec, self.stops = codec, stops
        self.ids: list[int] = []
        self.said = ""

    def add(self, token: int) -> tuple[str, bool]:
        """What can be said now that this token has come, and whether a stop string has: it is not said itself."""
        self.ids.append(token)
        text = self.codec.text(self.ids)
        if found := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            return self._say(text[: min(found)]), True
        text = text.rstrip("\ufffd")
        most = len(text) + 1
        begun = [n for stop in self.stops for n in range(1, min(len(stop), most)) if text.endswith(stop[:n])]
        return self._say(text[: len(text) - max(begun, default=0)]), False

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._say(self.codec.text(self.ids))

    def _say(self, text: str) -> str:
        new, self.said = text[len(self.said) :], max(self.said, text, key=len)
        return new


def as_chat(tokens: Sequence[tuple[str, dict]]) -> dict:
    """Log-probabilities as chats list them, from each token's text and its record of `trace.records`."""

    def entry(text: str, prob: float) -> dict:
        return {"token": text, "logprob": _log(prob), "bytes": [*text.encode()]}

    content = [
        entry(text, drawn(record)["prob"])
        | {"top_logprobs": [entry(one["token"], one["prob"]) for one in record["candidates"]]}
        for text, record in tokens
    ]
    return {"content": content, "refusal": None, "guidance": [record for _, record in tokens]}


def as_completion(tokens: Sequence[tuple[str, dict]], offset: int) -> dict:
    """The same as completions list them; `offset` is that of the first token in the response, in characters."""
    texts, records = [text for text, _ in tokens], [record for _, record in tokens]
    top = [{one["token"]: _log(one["prob"]) for one in record["candidates"]} for record in records]
    offsets = [offset + length for length in accumulate(map(len, texts), initial=0)][:-1]
    found = {"tokens": texts, "token_logprobs": [_log(drawn(record)["prob"]) for record in records]}
    return found | {"top_logprobs": top, "text_offset": offsets, "guidance": records}


def _log(prob: float) -> float:
    return math.log(prob) if prob > 0 else LOWEST


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
