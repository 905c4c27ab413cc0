"""`pargs generate` and `pargs trace`: texts of a language model, guided by a reward model or not."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pargs_min.cli.options import choice, parse
from pargs_min.cli.resuming import parse_shard, read_done, time_of, write_records
from pargs_min.codec import FORMS
from pargs_min.decode import Step
from pargs_min.memory import enough_memory
from pargs_min.methods import METHODS
from pargs_min.models import DTYPES, SPREAD, default_device, load_guide, load_language_model, load_tokenizer
from pargs_min.progress import progress
from pargs_min.records import read_prompts
from pargs_min.reward_model import recorded
from pargs_min.store import aside, content
from pargs_min.texts import Decoding, Tokens, generate_texts, shard_range
from pargs_min.trace import read_page, records, to_html, to_text, token_names


@dataclass(kw_only=True)
class ModelOptions:
    """Options of all that decodes: its models.

    Args:
        model: Language model, the reference: a folder or a hub id.
        reward_model: Reward model, or another guide: a folder or a hub id. plain needs none.
        prompt_format: Read prompts of text as they stand (text), as the turn of a human (dialogue), or as a user's
            message (chat). Default: as the reward model was trained; without one, chat where there is a chat template.
        device: cuda, cpu, or auto: layers of models too large for one GPU are spread over all. Default: cuda if
            available, else cpu.
        dtype: float32, bfloat16, float16, or auto: that of each checkpoint.
    """

    model: str
    reward_model: str | None = None
    prompt_format: str | None = choice(FORMS, None)
    device: str | None = None
    dtype: str = choice(DTYPES, "auto")


@dataclass(kw_only=True)
class DecodeOptions(ModelOptions):
    """Options of both commands, besides those of `Tokens`.

    Args:
        seed: Determines each text, together with its prompt and sample number.
    """

    seed: int = 0


@dataclass(kw_only=True)
class GenerateOptions(DecodeOptions):
    """Options of `pargs generate`, besides those of `Decoding`.

    Args:
        prompts: JSONL records with a `prompt` (text or messages), or plain text, one prompt per line; or a file of
            AlpacaEval, whose instructions are the prompts.
        output: JSONL file to write, one record per text, as they come.
        method: How each token is chosen. The guide must be trained with --objective partial for pargs and smc, full
            for args and best-of-n, value for cd, autoregressive for genarm, by `pargs dpo` for implicit; soft,
            reweighted, win and farma are named like their objectives.
        final_reward_model: Weights whole texts in smc. Default: --reward-model.
        num_samples: Texts per prompt. More than a file has continue it with --resume: in float32, as if it had been
            begun with so many; in half precision texts depend on their batches.
        batch_size: Texts decoded together; in float32 they do not affect each other.
        compile: Compile both models, for a GPU: takes about a minute per batch size.
        shard: Write part i of n only, as i/n, i from 0. Start n processes, on any machines, each with an --output of
            its own; concatenated, their files hold what one process would write.
        resume: Continue the output file of an interrupted run.
    """

    prompts: str
    output: Path
    method: str = choice(METHODS, "pargs")
    final_reward_model: str | None = None
    num_samples: int = 1
    batch_size: int = 8
    compile: bool = False
    shard: str = "0/1"
    resume: bool = False


@dataclass(kw_only=True)
class TraceOptions(DecodeOptions):
    """Options of `pargs trace`.

    Args:
        prompt: The text to continue.
        method: As in `pargs generate`.
        output: HTML page to write. Default: none, the trace is only printed.
        beside: Pages of earlier traces of the same prompt, whose texts --output shows beside this one.
        shown: Candidates listed per step; the one that was drawn is always among them. The page's slider for beta needs
            all candidates.
        sample: Which of the prompt's samples to show, from 0.
    """

    prompt: str
    method: str = choice((name for name, one in METHODS.items() if one.rows is None), "pargs")
    output: Path | None = None
    beside: list[Path] = field(default_factory=list)
    shown: int = 10
    sample: int = 0


# Options that may change when a run is resumed: texts do not depend on them.
NOT_IN_THE_TEXT = ("prompts", "output", "batch_size", "device", "compile", "shard", "resume", "num_samples")


def load(options: ModelOptions) -> dict:
    """The models and tokenizers of `generate_texts`, and the form of prompts that was asked for.

    Raises:
        ValueError: if a model cannot be loaded.
        MemoryError: if one does not fit, saying what to change.
    """
    device = SPREAD if options.device == SPREAD else default_device(options.device)
    where = dict(dtype=options.dtype, device=device)
    if device == SPREAD and getattr(options, "compile", False):
        raise ValueError("--compile captures the steps of one device: drop it, or --device auto")
    smaller = f"use --dtype bfloat16 (it is {options.dtype}), smaller models, or --device cpu"
    with enough_memory(f"loading {options.model}", smaller):
        loaded = {"tokenizer": load_tokenizer(options.model), "lm": load_language_model(options.model, **where)}
    for role in ("reward", "final_reward"):
        if name := getattr(options, f"{role}_model", None):
            with enough_memory(f"loading {name} beside {options.model}", smaller):
                loaded |= {f"{role}_tokenizer": load_tokenizer(name), f"{role}_model": load_guide(name, **where)}
    guides = [loaded[name] for name in ("reward_model", "final_reward_model") if name in loaded]
    if device == SPREAD and any(recorded(guide).get("shared_layers") for guide in guides):
        raise ValueError("a guide that shares layers with its language model is read on one device: drop --device auto")
    return loaded | {"prompt_format": options.prompt_format}


def generate(arguments: list[str]) -> None:
    """Generate texts for a file of prompts, guided by a reward model or not."""
    options, how = parse(generate, arguments, GenerateOptions, Decoding)
    shard, prompts = parse_shard(options.shard), read_prompts(options.prompts)
    if options.output.exists() and not options.resume:
        raise ValueError(f"output {options.output} exists: continue it with --resume, or name another file")
    settings = {name: value for name, value in vars(options).items() if name not in NOT_IN_THE_TEXT} | vars(how)
    models = {name: getattr(options, name) for name in ("model", "reward_model", "final_reward_model")}
    settings["contents"] = {name: content(model) for name, model in models.items() if model}
    done, now = read_done(options.output, settings, prompts), time_of(options.output) or datetime.now()

    more = vars(how) | dict(batch_size=options.batch_size, compiled=options.compile, shard=shard, done=done, now=now)
    more |= dict(method=options.method, seed=options.seed)
    texts = generate_texts(prompts=prompts, num_samples=options.num_samples, **more, **load(options))
    part = shard_range(len(prompts), shard)
    total = len(part) * options.num_samples
    earlier = sum(number in part and sample < options.num_samples for number, sample in done)
    written = write_records(options.output, texts, settings, len(done))
    for _ in progress(written, desc="generating", total=total, initial=earlier, unit="text"):
        pass
    print(f"wrote {total - earlier} texts to {options.output}")


def trace(arguments: list[str]) -> None:
    """Show one text token by token: what could have followed, what it was worth, what was drawn."""
    options, how = parse(trace, arguments, TraceOptions, Tokens)
    if options.output and options.output.exists():
        raise ValueError(f"output {options.output} exists: name another file")
    if options.sample < 0 or options.shown < 1:
        raise ValueError(f"sample must be at least 0 and shown at least 1, got {options.sample} and {options.shown}")
    if options.beside and not options.output:
        raise ValueError("beside is for the page: name it with --output")
    others = [text for page in options.beside for text in read_page(page)]
    if different := [prompt for text in others if (prompt := text["settings"].get("prompt")) != options.prompt]:
        raise ValueError(f"beside must be of the same prompt {options.prompt!r}, and one is of {different[0]!r}")
    loaded = load(options)
    steps: list[Step] = []
    earlier = dict.fromkeys((0, sample) for sample in range(options.sample))
    one = dict(prompts=[{"prompt": options.prompt}], num_samples=options.sample + 1, done=earlier, batch_size=1)
    one |= dict(method=options.method, seed=options.seed)
    list(generate_texts(**one, **vars(how), on_step=steps.append, **loaded))

    seen = records(steps, token_names(loaded["tokenizer"]), shown=options.shown)
    print(to_text(seen))
    if options.output:
        unsaid = ("output", "beside", "shown", "device")
        about = {name: value for name, value in vars(options).items() if name not in unsaid} | vars(how)
        with aside(options.output) as page:
            page.write_text(to_html([{"settings": about, "steps": seen}, *others]), "utf-8")
        print(f"wrote {options.output}")
