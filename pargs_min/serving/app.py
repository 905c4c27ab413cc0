"""The server: OpenAI's interface over an `Engine`, and a playground at `/`."""

import asyncio
import hmac
import json
import math
import re
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pargs_min.codec import Codec
from pargs_min.decode import Step, greedy
from pargs_min.memory import is_out_of_memory
from pargs_min.methods import Method
from pargs_min.serving import LOCAL
from pargs_min.serving.engine import Busy, Closing, Engine, Text
from pargs_min.serving.protocol import ChatRequest, CompletionRequest, Reader, as_chat, as_completion, error
from pargs_min.texts import Tokens
from pargs_min.trace import records, token_texts

HERE = Path(__file__).parent
PAGES = {"/": HERE / "page.html", "/page.css": HERE / "page.css", "/page.js": HERE / "page.js"}
PAGES |= {f"/{name}": HERE.parent / name for name in ("tokens.css", "tokens.js")}
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
SCHEMES = ("http", "https")
GONE_EVERY = 0.2  # seconds between two looks at whether a client that waits for a whole answer is still there
RETRY_AFTER = 2  # seconds, of an answer that says that too many wait


class Refused(Exception):
    """An answer that says what is wrong with a request."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        self.status, self.body = status, error(message, status, param, code)
        self.headers = {"Retry-After": str(RETRY_AFTER)} if status == 429 else {}


@dataclass
class Served:
    """What a server offers.

    Args:
        name: of the model, as clients name it.
        codec: of the language model, in the form that its guide was trained on.
        engine: running.
        method, how: of requests that say nothing else; `how.max_new_tokens` is the most that one may ask for.
        methods: those that a request may name.
        context: tokens of the longest text, prompt and response; None: no limit.
        max_top_k: candidates that a request may ask for; None: all.
        log_prompts: write what is asked to stderr.
    """

    name: str
    codec: Codec
    engine: Engine
    method: Method
    how: Tokens
    methods: dict[str, Method]
    context: int | None = None
    max_top_k: int | None = None
    log_prompts: bool = False

    def texts(self, asked: ChatRequest | CompletionRequest, loop, heard: asyncio.Queue) -> list[Text]:
        """One text for each prompt and choice, in order; what they tell comes to the queue, with their number.

        Raises:
            Refused: naming what cannot be.
        """
        if asked.model not in (None, self.name):
            raise Refused(f"there is no model {asked.model!r}; this is {self.name}", 404, "model", "model_not_found")
        method, how = self._method(asked), self._how(asked)
        if how.beta == 0 and not how.truncate:  # the reference, for which no guide need be asked
            method = replace(method, guided=False)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        if (many := len(asked.prompts) * (asked.n or 1)) > self.engine.room:
            raise Refused(f"{many} texts at once are more than may wait here ({self.engine.room})", param="n")
        encoded = [self._encode(prompt, asked) for prompt in asked.prompts]
        if not encoded:
            raise Refused("prompt is empty; give at least one", param="prompt")
        texts: list[Text] = []

        def hear(number: int, what: Any) -> None:
            with suppress(RuntimeError):  # the loop has closed, and nobody listens
                loop.call_soon_threadsafe(heard.put_nowait, (number, what))

        for prompt, ids in enumerate(encoded):
            tokens = replace(how, max_new_tokens=self._room(ids, asked))
            for sample in range(asked.n or 1):
                numbers = seed, prompt, sample
                texts.append(Text(ids, method, tokens, numbers, partial(hear, len(texts))))
        return texts

    def _method(self, asked: ChatRequest | CompletionRequest) -> Method:
        if asked.method is not None and asked.method not in self.methods:
            raise Refused(f"method must be one of {', '.join(self.methods)}, got {asked.method!r}", param="method")
        method = self.methods[asked.method] if asked.method else self.method
        return replace(method, draw=greedy) if asked.temperature == 0 else method

    def _how(self, asked: ChatRequest | CompletionRequest) -> Tokens:
        most = min(self.codec.vocabulary, self.max_top_k or self.codec.vocabulary)
        if asked.top_k is not None and not 0 < (asked.top_k or self.codec.vocabulary) <= most:
            raise Refused(f"top_k may be at most {most} here (0 means all tokens), got {asked.top_k}", param="top_k")
        warp = {"ref_temperature": asked.temperature or None, "ref_top_p": asked.top_p}
        changed: dict[str, Any] = {"beta": asked.beta, "top_k": asked.top_k} | warp
        return replace(self.how, **{name: value for name, value in changed.items() if value is not None})

    def _encode(self, prompt: Any, asked: ChatRequest | CompletionRequest) -> list[int]:
        chat = isinstance(asked, ChatRequest)
        if chat and not self.codec.tokenizer.chat_template:
            raise Refused(f"{self.name} has no chat template: ask /v1/completions", param="messages")
        try:
            return replace(self.codec, now=datetime.now()).prompt({"prompt": prompt})
        except Exception as wrong:  # of no kind of its own, where a tokenizer lacks a word
            raise Refused(str(wrong), param="messages" if chat else "prompt") from None

    def _room(self, ids: list[int], asked: ChatRequest | CompletionRequest) -> int:
        """The length limit of a response, in tokens."""
        wanted = getattr(asked, "max_completion_tokens", None) or asked.max_tokens
        most = self.how.max_new_tokens
        if wanted is not None and wanted > most:
            raise Refused(f"max_tokens may be at most {most} here, got {wanted}", param="max_tokens")
        room = math.inf if self.context is None else self.context - len(ids)
        if room < (wanted or 1):
            raise Refused(
                f"a prompt of {len(ids)} tokens and {wanted or 1} more exceed the context of {self.context}",
                param="max_tokens" if wanted else "prompt",
                code="context_length_exceeded",
            )
        return int(min(wanted or most, room))


@dataclass
class Choice:
    """What one text has said so far, as its client reads it."""

    number: int
    text: Text
    reader: Reader
    shown: int | None  # candidates to list of each token; None: nothing is asked of tokens
    name: Callable[[int], str]
    finish: str | None = None
    spelt: int = 0  # characters that its tokens have, as far as they are settled
    fresh: list[tuple[str, dict]] = field(default_factory=list)  # text and record of tokens not handed out yet

    def hear(self, what: tuple[Step, int] | Exception | None) -> str | None:
        """What is new in the text; None where it has ended before.

        Raises:
            Exception: the one that ended the text.
        """
        if isinstance(what, Exception):
            raise what
        if self.finish:
            return None
        if what is None:
            self.finish = "stop" if self.reader.codec.finished(self.reader.ids) else "length"
            return self.reader.rest()
        step, row = what
        new, stopped = self.reader.add(int(step.drawn.tokens[row]))
        if self.shown is not None:
            settled = self.reader.codec.text(self.reader.ids).rstrip("\ufffd")
            [record] = records([step], self.name, row=row, shown=max(1, self.shown))
            self.fresh.append((settled[self.spelt :], record | {"step": len(self.reader.ids) - 1}))
            self.spelt = max(self.spelt, len(settled))
        if stopped:
            self.finish, self.text.wanted = "stop", False
        return new

    def as_json(self, new: str, chat: bool, begun: bool | None = None) -> dict:
        """A choice of an answer with this text; of one that is streamed, `begun` says whether more came before."""
        fresh, self.fresh = self.fresh, []
        offset = self.spelt - sum(len(text) for text, _ in fresh)
        found: dict[str, Any] = {"index": self.number, "finish_reason": self.finish, "logprobs": None}
        if self.shown is not None:
            found["logprobs"] = as_chat(fresh) if chat else as_completion(fresh, offset)
        if not chat:
            return found | {"text": new}
        if begun is None:
            return found | {"message": {"role": "assistant", "content": new, "refusal": None}}
        return found | {"delta": {"content": new} if begun else {"role": "assistant", "content": new}}


class Answer:
    """The answer to one request, whole or as it comes.

    Raises:
        Refused: for what cannot be, before anything is written.
    """

    def __init__(self, served: Served, asked: ChatRequest | CompletionRequest):
        self.chat, self.asked, self.heard = isinstance(asked, ChatRequest), asked, asyncio.Queue[tuple[int, Any]]()
        texts = served.texts(asked, asyncio.get_running_loop(), self.heard)
        name = token_texts(served.codec.tokenizer)
        self.choices = [
            Choice(number, text, Reader(served.codec, asked.stops), asked.shown, name)
            for number, text in enumerate(texts)
        ]
        kind, begins = ("chat.completion", "chatcmpl-") if self.chat else ("text_completion", "cmpl-")
        about = {"id": begins + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        self.about = about | {"model": served.name}
        try:
            served.engine.submit(texts)
        except (Busy, Closing) as wrong:
            raise refusal(wrong) from None

    async def news(self) -> AsyncIterator[tuple[Choice, str]]:
        """What is new of each choice. Whoever stops listening frees its texts."""
        try:
            while not all(choice.finish for choice in self.choices):
                number, what = await self.heard.get()
                choice = self.choices[number]
                if (new := choice.hear(what)) is not None:
                    yield choice, new
        finally:
            for choice in self.choices:
                choice.text.wanted = False

    async def whole(self) -> dict:
        """The answer once it is complete."""
        said = dict.fromkeys(range(len(self.choices)), "")
        async for choice, new in self.news():
            said[choice.number] += new
        choices = [choice.as_json(said[choice.number], self.chat) for choice in self.choices]
        return self.about | {"choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events, one for each token, and at last [DONE]."""
        about = self.about | ({"object": "chat.completion.chunk"} if self.chat else {})
        usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        begun: set[int] = set()
        try:
            async for choice, new in self.news():
                part = choice.as_json(new, self.chat, choice.number in begun)
                begun.add(choice.number)
                yield event(about | {"choices": [part]} | ({"usage": None} if usage else {}))
            if usage:
                yield event(about | {"choices": [], "usage": self.usage()})
        except Exception as wrong:
            yield event(refusal(wrong).body)
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of all choices."""
        prompts = {choice.text.numbers[1]: len(choice.text.prompt_ids) for choice in self.choices}
        asked, written = sum(prompts.values()), sum(len(choice.reader.ids) for choice in self.choices)
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


def refusal(wrong: Exception) -> Refused:
    """What a client is told of an error while its texts wait or run; what nobody foresaw goes to stderr."""
    if isinstance(wrong, Refused):
        return wrong
    if isinstance(wrong, Busy):
        return Refused("too many texts wait; try again later", 429, code="rate_limit_exceeded")
    if isinstance(wrong, Closing):
        return Refused("the server is shutting down", 503)
    if is_out_of_memory(wrong):
        return Refused("out of memory: ask for a shorter text, or fewer candidates", 503)
    if isinstance(wrong, FloatingPointError):
        return Refused(f"{wrong}; the weights may be damaged, or beta too large", 500)
    traceback.print_exception(wrong, file=sys.stderr)
    return Refused("internal error", 500)


def app_of(served: Served, *, key: str | None = None, local: bool = True, most: int = 2**20) -> FastAPI:
    """The server as an ASGI application.

    Args:
        key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
        local: whether it is bound to this machine alone: requests that name another host are refused then, so that no
            web page can reach it under a name of its own.
        most: bytes of the longest body.
    """
    app = FastAPI(title="pargs-min", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, key=key, hosts=LOCAL if local else None, most=most)
    app.add_exception_handler(Exception, as_response)
    for kind in (Refused, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, as_response)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await respond(served, asked, request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await respond(served, asked, request)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [about(served)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        if name != served.name:
            raise Refused(f"there is no model {name!r}; this is {served.name}", 404, code="model_not_found")
        return about(served)

    @app.get("/health")
    async def health() -> Response:
        engine = served.engine
        found = {"running": len(engine.running), "waiting": len(engine.waiting)}
        return JSONResponse({"status": "closing" if engine.closing else "ok"} | found, 503 if engine.closing else 200)

    for path, page in PAGES.items():
        app.add_route(path, partial(show, page), methods=["GET"])
    return app


async def show(page: Path, request: Request) -> Response:
    return FileResponse(page, headers=SAFE)


async def respond(served: Served, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
    """The answer to one request. Where the client goes away, its texts are given up."""
    if served.log_prompts:
        print(json.dumps({"asked": asked.model_dump(exclude_none=True)}), file=sys.stderr, flush=True)
    answer = Answer(served, asked)
    if asked.stream:
        return StreamingResponse(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    whole = asyncio.ensure_future(answer.whole())
    while not whole.done():
        await asyncio.wait({whole}, timeout=GONE_EVERY)
        if await request.is_disconnected():
            whole.cancel()
            return Response(status_code=499)
    try:
        return JSONResponse(await whole)
    except Exception as wrong:
        raise refusal(wrong) from None


async def as_response(request: Request, wrong: Exception) -> Response:
    """What a client is told of an error, whichever it is."""
    if isinstance(wrong, RequestValidationError):
        wrong = invalid(wrong)
    elif isinstance(wrong, HTTPException):
        wrong = Refused(str(wrong.detail), wrong.status_code)
    refused = refusal(wrong)
    return JSONResponse(refused.body, refused.status, refused.headers)


def about(served: Served) -> dict:
    """The model as `/v1/models` lists it, and what a request may ask of it."""
    offers = {"method": served.method.name, "methods": [*served.methods], "beta": served.how.beta}
    offers |= {"chat": served.codec.form == "chat", "max_tokens": served.how.max_new_tokens}
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "pargs-min", "pargs": offers}


def invalid(wrong: RequestValidationError) -> Refused:
    """The first thing that is wrong with the fields of a request, by the field's name."""
    first = wrong.errors()[0]
    if first["type"] == "json_invalid":
        return Refused(f"the body is not JSON: {first['ctx']['error']}")
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return Refused("the body must be a JSON object, sent as Content-Type: application/json")
    said = "is not supported here" if first["type"] == "extra_forbidden" else first["msg"]
    return Refused(f"{'.'.join(path)}: {said}", param=path[0])


class Guard:
    """ASGI middleware: who may ask, under which host, and how much."""

    def __init__(self, app: ASGIApp, *, key: str | None, hosts: Sequence[str] | None, most: int):
        self.app, self.key, self.hosts, self.most = app, key, hosts, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if wrong := self._wrong(scope["path"], headers):
            await JSONResponse(wrong.body, wrong.status)(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"the body is longer than {self.most} bytes")
            return message

        await self.app(scope, limited, send)

    def _wrong(self, path: str, headers: dict[str, str]) -> Refused | None:
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.hosts and host.strip("[]") not in self.hosts:
            return Refused(f"this server answers to {self.hosts[0]} alone", 403)
        if self.hosts and headers.get("origin") not in (None, *(f"{kind}://{headers['host']}" for kind in SCHEMES)):
            return Refused("a page of another origin may not ask this server", 403)
        if self.key and path not in PAGES and path != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                return Refused(
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY", 401, code="invalid_api_key"
                )
        return None


class Server(uvicorn.Server):
    """Finishes what runs when it is told to stop, and refuses the rest."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig, frame) -> None:
        self.engine.close()
        super().handle_exit(sig, frame)
