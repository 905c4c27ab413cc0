"""`pargs serve`: a guided model behind OpenAI's interface."""

import socket
from dataclasses import dataclass, replace
from pathlib import Path

from pargs_min.cli.decode import ModelOptions, load
from pargs_min.cli.options import choice, parse
from pargs_min.codec import Codec, check_vocabularies
from pargs_min.decode import ModelPolicy
from pargs_min.methods import METHODS, Method, tokenwise
from pargs_min.reward_model import context_length, is_language_model, recorded
from pargs_min.scoring import ReencodeScorer, SiblingScorer
from pargs_min.serving import LOCAL
from pargs_min.texts import Tokens, check_guide, check_prompts, choose_scorer, common_form, language_model_scorer
from pargs_min.trunk import share_trunk

TOKENWISE = {name: method for name, method in METHODS.items() if method.write is tokenwise}
PROBES = {"chat": [{"role": "user", "content": "Why?"}], "ids": [0]}  # prompts, by form


@dataclass(kw_only=True)
class ServeOptions(ModelOptions):
    """Options of `pargs serve`, besides those of `Tokens`, which requests may change: --max-new-tokens is the most that
    one may ask for.

    Args:
        method: How tokens are chosen, as in `pargs generate`. A request may ask for plain instead, and at temperature 0
            for the most likely token.
        name: What clients call the model. Default: the last part of --model.
        host: Address to listen at. Others than those of this machine alone need --api-key-file.
        port: Port to listen at.
        api_key_file: A file whose one line clients must send as their API key.
        rows: Texts that are written together, at most.
        waiting: Texts that wait, at most; whoever comes then is told to try again later.
        max_top_k: Candidates per step that a request may ask for, at most. Default: all, for guides that are asked once
            per step, and 100 for others.
        max_length: Tokens of the longest text, prompt and response. Default: as many as the models can read.
        max_body: Bytes of the longest request.
        log_prompts: Write to stderr what clients ask.
    """

    method: str = choice(TOKENWISE, "pargs")
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    rows: int = 32
    waiting: int = 64
    max_top_k: int | None = None
    max_length: int | None = None
    max_body: int = 2**20
    log_prompts: bool = False


def serve(arguments: list[str]) -> None:
    """Serve a guided model to OpenAI's clients, at /v1/completions and /v1/chat/completions; a playground is at /."""
    options, how = parse(serve, arguments, ServeOptions, Tokens, defaults={"max_new_tokens": 512})
    try:
        import uvicorn

        from pargs_min.serving.app import Server, app_of
    except ImportError as error:
        raise ValueError(f"a server needs FastAPI and uvicorn ({error}): pip install 'pargs-min[serve]'") from None
    key, place = api_key(options), bound(options.host, options.port)
    served = offer(options, how)
    app = app_of(served, key=key, local=options.host in LOCAL, most=options.max_body)
    served.engine.thread.start()
    host, port = place.getsockname()[:2]
    print(
        f"serving {served.name} at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)", flush=True
    )
    Server(uvicorn.Config(app, log_level="warning"), served.engine).run([place])


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which is taken before models are loaded. Raises ValueError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, so that asyncio sends tokens at once
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"host {host} and port {port} cannot be used ({error}): choose another --port") from None
    return place


def api_key(options: ServeOptions) -> str | None:
    """The key that clients must send. Raises ValueError where the server would be open to others without one."""
    if options.api_key_file is None:
        if options.host not in LOCAL:
            raise ValueError(f"host {options.host} is open to other machines: give an API key (--api-key-file)")
        return None
    key = options.api_key_file.read_text("utf-8").strip()
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"api_key_file {options.api_key_file} must hold one line of at least 16 visible ASCII characters"
        )
    return key


def offer(options: ServeOptions, how: Tokens):
    """Models, engine and limits, from the options.

    Raises:
        ValueError: for an option out of range, or a guide that cannot serve this language model.
    """
    from pargs_min.serving.app import Served
    from pargs_min.serving.engine import Engine, Text

    for name in ("rows", "waiting", "max_length", "max_body", "max_top_k"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if how.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {how.max_new_tokens}")
    if how.guide_below is not None:
        raise ValueError("guide_below (--guide-below) is for single texts, and a server writes several together")
    method = METHODS[options.method]
    if method.guided:
        how = replace(how, top_k=10 if how.top_k is None else how.top_k)
    elif options.reward_model or how.top_k is not None or how.min_ref_prob or how.truncate:
        raise ValueError(
            "plain has no reward model and no candidates: drop --reward-model, --top-k, --min-ref-prob and --truncate"
        )
    loaded = load(options)
    lm, tokenizer, guide = loaded["lm"], loaded["tokenizer"], loaded.get("reward_model")
    form = common_form(options.prompt_format, *filter(None, [guide])) or recorded(lm).get("prompt_format")
    codec = Codec.of(lm, tokenizer, form)
    context = min(filter(None, [options.max_length, context_length(lm), guide and context_length(guide)]), default=None)
    scorer = _scorer(method, how, lm, guide, codec, loaded["reward_tokenizer"], context) if method.guided else None
    settings = dict(device=lm.device, rows=options.rows, room=options.waiting)
    engine = Engine(ModelPolicy(lm, codec.vocabulary), scorer, codec.ends or (), **settings)
    engine.submit([Text([0], method, how, (0, 0, 0), lambda what: None)])
    engine.turn()  # what cannot be is said now, and not to a client
    engine.running.clear()
    most = options.max_top_k or (100 if isinstance(scorer, (SiblingScorer, ReencodeScorer)) else None)
    name = options.name or Path(options.model).name
    methods = {"plain": METHODS["plain"], method.name: method}
    return Served(name, codec, engine, method, how, methods, context, most, options.log_prompts)


def _scorer(method: Method, how: Tokens, lm, guide, codec: Codec, tokenizer, context: int | None):
    check_guide(method.name, how.warp, guide)
    check_vocabularies(codec.tokenizer, tokenizer)
    probe = [{"prompt": PROBES.get(codec.form or "", "Why?")}]
    check_prompts(Codec(tokenizer, codec.form), probe, [codec.prompt(one) for one in probe])
    share_trunk(lm, guide)
    if is_language_model(guide):
        return language_model_scorer(lm, guide, codec.vocabulary)
    return choose_scorer(guide, context or 2**31, codec.ends or (), lm)
