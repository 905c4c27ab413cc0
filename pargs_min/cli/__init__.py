"""The command line: one function per command. Heavy imports stay inside them, so that `pargs --help` is instant."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what cannot be used or does not fit, 130 when interrupted."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    warnings.formatwarning = lambda message, *_, **__: f"pargs: warning: {message}\n"
    try:
        if name not in COMMANDS:
            raise ValueError(f"no command {name!r}; there are {', '.join(COMMANDS)} (pargs --help)")
        return COMMANDS[name](rest) or 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print("pargs: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pargs: interrupted", file=sys.stderr)
        return 130


@dataclass
class TrainOptions:
    """What `pargs train` takes besides transformers' TrainingArguments."""

    model: str = field(metadata={"help": "Language model or reward model to start from: a folder or a hub id."})
    dataset: str = field(
        metadata={
            "help": "Preference pairs: a .jsonl or .jsonl.gz file, or a hub data set as owner/name or owner/name:split "
            "(needs the extra `hub`). For the objective value: texts that `pargs generate --method plain` wrote."
        }
    )
    objective: Literal["partial", "full", "value"] = field(
        default="partial",
        metadata={
            "help": "Compare every prefix (PARGS) or whole responses only (ARGS); or let every prefix predict the "
            "reward of its whole text (controlled decoding)."
        },
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "For the objective value: the full-sequence reward model that rates the texts."},
    )
    tail: Literal["extend", "min"] | None = field(
        default=None,
        metadata={
            "help": "Compare prefixes up to the longer response, the shorter one continued with end tokens, or up to "
            "the shorter one. Default: extend, or min with --no-append-eos."
        },
    )
    head: Literal["scalar", "vocab"] = field(
        default="scalar",
        metadata={
            "help": "What a language model gets: one reward per prefix, or one per next token, with which decoding "
            "asks the reward model once a token, for any --top-k."
        },
    )
    reduction: Literal["prefix", "pair"] = field(
        default="prefix", metadata={"help": "Weigh every prefix alike, or every pair (partial; see losses.py)."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train the head and adapters of this rank instead of all weights; they are merged in the end, and "
            "what is saved is an ordinary reward model (needs the extra `lora`). Wants a larger --learning-rate, such "
            "as 1e-4. With --bf16 the other weights are held in bfloat16."
        },
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End each response with the end token; --no-append-eos if they were cut at a length limit."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of prompt and response at most; prompts are cut. Default: the model's context."},
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Records to evaluate on, as --dataset, instead of held-out ones."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the prompts to hold out, with all their records; 0 for none."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --output-dir, if any."})


# Where we differ from transformers' defaults: one pass, since reward models overfit on the second, and a step size for
# pretrained language models (tiny ones want 1e-3).
TRAIN_DEFAULTS = dict(
    output_dir="runs/reward_model",
    num_train_epochs=1,
    learning_rate=1e-5,
    warmup_steps=0.05,
    logging_steps=10,
    save_total_limit=1,
)


def train(arguments: list[str]) -> None:
    """Train a reward model on every prefix of the responses of preference pairs."""
    from functools import partial

    import torch
    from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

    from pargs_min.codec import check_vocabularies, prompt_format
    from pargs_min.data import encode_preferences, encode_texts, split_by_prompt
    from pargs_min.models import load_reward_model, save_reward_model
    from pargs_min.records import read_preferences, read_responses
    from pargs_min.reward_model import context_length
    from pargs_min.scoring import model_rewards
    from pargs_min.lora import lora_config
    from pargs_min.train import last_checkpoint, rate, train_reward_model, train_value_model

    parser = HfArgumentParser((TrainOptions, TrainingArguments), prog="pargs train", description=train.__doc__)
    parser.set_defaults(**TRAIN_DEFAULTS, dataloader_pin_memory=torch.accelerator.is_available())
    options, args = parser.parse_args_into_dataclasses(arguments)
    tail = options.tail or ("extend" if options.append_eos else "min")
    if tail == "extend" and not options.append_eos:
        raise ValueError("--tail extend appends end tokens and --no-append-eos forbids them: drop one of the two")
    if last_checkpoint(args.output_dir) and not options.resume:
        raise ValueError(
            f"{args.output_dir} holds checkpoints of an earlier run: add --resume, or choose another --output-dir"
        )
    valued = options.objective == "value"
    if valued != (options.reward_model is not None):
        raise ValueError("--objective value and --reward-model go together: its rewards are what prefixes predict")
    lora = {} if options.lora_rank is None else dict(lora_rank=options.lora_rank)
    if lora:
        lora_config(options.lora_rank)  # said now, not after the data have been read
    read = read_responses if valued else read_preferences
    records = read(options.dataset)
    eval_records = read(options.eval_dataset) if options.eval_dataset else []
    form = prompt_format(record.prompt for record in (*records, *eval_records))  # an error now, not after training
    set_seed(args.seed)  # the new head
    with loading(options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        dtype = torch.bfloat16 if lora and args.bf16 else torch.float32
        model = load_reward_model(options.model, tokenizer, dtype=dtype, head=options.head)

    settings = dict(objective=options.objective)
    if valued:
        encode, fit = encode_texts, train_value_model
        with loading(options.reward_model):
            check_vocabularies(tokenizer, AutoTokenizer.from_pretrained(options.reward_model))
            rater = load_reward_model(options.reward_model).to(args.device).eval()
    else:
        settings |= dict(tail=tail, reduction=options.reduction)
        encode = partial(encode_preferences, append_eos=options.append_eos)
        fit = partial(train_reward_model, **settings)

    def prepare(records):
        items, counts = encode(records, tokenizer, options.max_length or context_length(model))
        if args.process_index == 0:
            print("records:", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        return rate(items, model_rewards(rater), device=args.device) if valued else items

    items = prepare(records)
    if eval_records:
        held_out = prepare(eval_records)
    else:
        items, held_out = split_by_prompt(items, options.eval_fraction, args.seed)
    keep_options(args, vars(options) | {"tail": tail})
    metrics = fit(model, tokenizer, items, held_out, args=args, resume=options.resume, **lora)
    if args.process_index == 0:
        save_reward_model(
            model,
            tokenizer,
            args.output_dir,
            append_eos=options.append_eos,
            prompt_format=form,
            **settings,
            **lora,
        )
        print("\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items()))
        print(f"saved {args.output_dir}")
    leave_together()


@dataclass(kw_only=True)
class DecodeOptions:
    """What the commands that decode share."""

    model: str = field(metadata={"help": "Language model: a folder or a hub id."})
    reward_model: str | None = field(default=None, metadata={"help": "Folder or hub id; not needed for plain."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the reward, in nats per unit of reward."})
    top_k: int | None = field(
        default=None,
        metadata={"help": "Candidates per step, 0 for the whole vocabulary. Default: 10 when guided, otherwise 0."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of the longest response."})
    temperature: float = field(default=1.0, metadata={"help": "Divides log pi_ref + beta * r."})
    seed: int = field(default=0, metadata={"help": "With prompt and sample number it fixes a text."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16, or auto: what each checkpoint holds."}
    )


def load_models(options: DecodeOptions) -> dict:
    """Language model, reward models and their tokenizers, by their names in `generate_texts`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pargs_min.memory import enough_memory
    from pargs_min.models import load_reward_model

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    smaller = f"take --dtype bfloat16 (it is {options.dtype}), smaller models, or --device cpu"
    with loading(options.model), enough_memory(f"loading {options.model}", smaller):
        loaded = {"tokenizer": AutoTokenizer.from_pretrained(options.model)}
        loaded["lm"] = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(device)
    for role in ("reward", "final_reward"):
        if name := getattr(options, f"{role}_model", None):
            with loading(name), enough_memory(f"loading {name} beside {options.model}", smaller):
                loaded[f"{role}_tokenizer"] = AutoTokenizer.from_pretrained(name)
                loaded[f"{role}_model"] = load_reward_model(name, dtype=options.dtype).to(device)
    return loaded


@dataclass(kw_only=True)
class GenerateOptions(DecodeOptions):
    """What `pargs generate` takes."""

    prompts: str = field(metadata={"help": "JSONL records with a `prompt` (text or messages), or text, one a line."})
    output: str = field(metadata={"help": "JSONL file to write, one record a text, as they come."})
    method: Literal["plain", "pargs", "pargs-greedy", "args", "args-greedy", "cd", "best-of-n", "smc"] = field(
        default="pargs",
        metadata={
            "help": "pargs and smc want a reward model trained with --objective partial, args and best-of-n full, "
            "cd value."
        },
    )
    final_reward_model: str | None = field(
        default=None, metadata={"help": "What smc weighs whole texts by. Default: --reward-model."}
    )
    num_samples: int = field(default=1, metadata={"help": "Texts per prompt."})
    n: int = field(default=10, metadata={"help": "Samples behind each text of best-of-n."})
    particles: int = field(default=8, metadata={"help": "Particles behind each text of smc."})
    batch_size: int = field(default=8, metadata={"help": "Texts decoded together; they do not change each other."})
    compile: bool = field(
        default=False,
        metadata={"help": "Compile the steps of both models, for a GPU; it takes a minute, and for each batch size."},
    )
    shard: str = field(
        default="0/1",
        metadata={
            "help": "Part i of n of the prompts alone, as i/n, i from 0: start n processes, on any machines, each with "
            "an --output of its own; the files joined (cat) hold what one process would write."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Continue the output file of an interrupted run."})


def generate(arguments: list[str]) -> None:
    """Write texts for a file of prompts, guided by a reward model or not."""
    import os

    from tqdm.auto import tqdm
    from transformers import HfArgumentParser

    from pargs_min.records import read_prompts
    from pargs_min.texts import generate_texts, parse_shard, read_done, shard_range, write_records

    (options,) = HfArgumentParser(
        GenerateOptions, prog="pargs generate", description=generate.__doc__
    ).parse_args_into_dataclasses(arguments)
    shard = parse_shard(options.shard)
    prompts = read_prompts(options.prompts)
    settings = {name: value for name, value in vars(options).items() if name not in NOT_IN_THE_TEXT}
    if os.path.exists(options.output) and not options.resume:
        raise ValueError(f"output {options.output} exists: continue it with --resume, or name another file")
    done = read_done(options.output, settings, prompts)
    names = ["method", "beta", "top_k", "max_new_tokens", "temperature", "num_samples", "n", "particles"]
    names += ["batch_size", "seed"]
    texts = generate_texts(
        prompts=prompts,
        compiled=options.compile,
        shard=shard,
        done=done,
        **load_models(options),
        **{name: getattr(options, name) for name in names},
    )
    part = shard_range(len(prompts), shard)
    total, earlier = len(part) * options.num_samples, sum(number in part for number, _ in done)
    for _ in tqdm(
        write_records(options.output, texts, settings), total=total, initial=earlier, unit="text", disable=None
    ):
        pass
    print(f"wrote {total - earlier} texts to {options.output}")


# May change when a run resumes: a text does not depend on them.
NOT_IN_THE_TEXT = ("prompts", "output", "batch_size", "device", "compile", "shard", "resume")


@dataclass(kw_only=True)
class TraceOptions(DecodeOptions):
    """What `pargs trace` takes."""

    prompt: str = field(metadata={"help": "The text to continue."})
    method: Literal["plain", "pargs", "pargs-greedy", "args", "args-greedy", "cd"] = field(
        default="pargs", metadata={"help": "As in `pargs generate`."}
    )
    output: str | None = field(default=None, metadata={"help": "HTML page to write. Default: none, lines only."})
    shown: int = field(default=10, metadata={"help": "Candidates listed a step; the one drawn always is."})
    sample: int = field(default=0, metadata={"help": "Which of the prompt's samples, from 0."})


def trace(arguments: list[str]) -> None:
    """Show one text token by token: what could have followed, what it was worth, what was drawn."""
    from pathlib import Path

    from transformers import HfArgumentParser

    from pargs_min.texts import generate_texts
    from pargs_min.trace import records, to_html, to_text, token_names

    (options,) = HfArgumentParser(
        TraceOptions, prog="pargs trace", description=trace.__doc__
    ).parse_args_into_dataclasses(arguments)
    if options.output and Path(options.output).exists():
        raise ValueError(f"output {options.output} exists: name another file")
    if options.sample < 0 or options.shown < 1:
        raise ValueError(f"sample must be at least 0 and shown at least 1, got {options.sample} and {options.shown}")
    loaded = load_models(options)
    names, steps = ["method", "beta", "top_k", "max_new_tokens", "temperature", "seed"], []
    list(
        generate_texts(
            prompts=[{"prompt": options.prompt}],
            num_samples=options.sample + 1,
            done=[(0, earlier) for earlier in range(options.sample)],
            on_step=steps.append,
            **loaded,
            **{name: getattr(options, name) for name in names},
        )
    )
    seen = records(steps, token_names(loaded["tokenizer"]), shown=options.shown)
    print(to_text(seen))
    if options.output:
        said = {name: value for name, value in vars(options).items() if name not in ("output", "shown", "device")}
        title = f"{options.method}, token by token"
        Path(options.output).write_text(to_html(seen, title, said), encoding="utf-8")
        print(f"wrote {options.output}")


@dataclass
class DPOOptions:
    """What `pargs dpo` takes besides transformers' TrainingArguments."""

    model: str = field(metadata={"help": "Language model, the reference to start from: a folder or a hub id."})
    dataset: str = field(metadata={"help": "Preference pairs, as for `pargs train`."})
    beta: float = field(
        default=1.0,
        metadata={"help": "Weight of the reward, in nats per unit of reward; the inverse of what DPO calls beta."},
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End each response with the end token; --no-append-eos if they were cut at a length limit."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of prompt and response at most; prompts are cut. Default: the model's context."},
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Pairs to evaluate on, instead of held-out ones."})
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the prompts to hold out, with all their pairs; 0 for none."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --output-dir, if any."})


def dpo(arguments: list[str]) -> None:
    """Fine-tune the language model itself on preference pairs (DPO, by TRL), to compare with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

    from pargs_min.data import encode_preferences, split_by_prompt
    from pargs_min.records import read_preferences
    from pargs_min.reward_model import context_length
    from pargs_min.train import last_checkpoint

    try:
        from pargs_min.baselines.dpo import train_dpo
    except ImportError as error:
        raise ValueError(f"DPO is TRL's ({error}): pip install 'pargs-min[baselines]'") from None

    parser = HfArgumentParser((DPOOptions, TrainingArguments), prog="pargs dpo", description=dpo.__doc__)
    parser.set_defaults(**TRAIN_DEFAULTS | dict(output_dir="runs/dpo", learning_rate=1e-6))
    parser.set_defaults(dataloader_pin_memory=torch.accelerator.is_available())
    options, args = parser.parse_args_into_dataclasses(arguments)
    if last_checkpoint(args.output_dir) and not options.resume:
        raise ValueError(
            f"{args.output_dir} holds checkpoints of an earlier run: add --resume, or choose another --output-dir"
        )
    with loading(options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

    def prepare(name: str):
        length = options.max_length or context_length(model)
        pairs, counts = encode_preferences(read_preferences(name), tokenizer, length, options.append_eos)
        if args.process_index == 0:
            print("records:", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        return pairs

    pairs = prepare(options.dataset)
    if options.eval_dataset:
        held_out = prepare(options.eval_dataset)
    else:
        pairs, held_out = split_by_prompt(pairs, options.eval_fraction, args.seed)
    keep_options(args, vars(options))
    metrics = train_dpo(model, tokenizer, pairs, held_out, beta=options.beta, args=args, resume=options.resume)
    if args.process_index == 0:
        for part in (model, tokenizer):
            part.save_pretrained(args.output_dir)
        print("\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items()))
        print(f"saved {args.output_dir}")
    leave_together()


@dataclass
class PPOOptions:
    """What `pargs ppo` takes besides `PPOSettings`."""

    model: str = field(metadata={"help": "Language model, the reference to start from: a folder or a hub id."})
    prompts: str = field(metadata={"help": "As for `pargs generate`; a file of preference pairs will do."})
    reward_model: str = field(metadata={"help": "Rates whole texts: a folder or hub id of the same vocabulary."})
    value_model: str | None = field(
        default=None, metadata={"help": "What the value function starts from. Default: the reward model."}
    )
    output_dir: str = field(default="runs/ppo", metadata={"help": "For the model, log.jsonl and the checkpoint."})
    save_every: int = field(default=20, metadata={"help": "Updates between two checkpoints."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    resume: bool = field(default=False, metadata={"help": "Go on from the checkpoint in --output-dir, if any."})


def ppo(arguments: list[str]) -> None:
    """Fine-tune the language model itself on a reward model's scores (PPO), to compare with."""
    import json
    from pathlib import Path

    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

    from pargs_min.baselines.ppo import PPOSettings, train_ppo
    from pargs_min.codec import check_vocabularies, encode_prompt, end_tokens
    from pargs_min.models import load_reward_model
    from pargs_min.records import read_prompts
    from pargs_min.scoring import model_rewards

    parser = HfArgumentParser((PPOOptions, PPOSettings), prog="pargs ppo", description=ppo.__doc__)
    options, settings = parser.parse_args_into_dataclasses(arguments)
    folder = Path(options.output_dir)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not options.resume:
        raise ValueError(f"{folder} holds the checkpoint of an earlier run: add --resume, or choose another folder")
    prompts = read_prompts(options.prompts)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with loading(options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    with loading(options.reward_model):
        check_vocabularies(tokenizer, AutoTokenizer.from_pretrained(options.reward_model))
        reward_model = load_reward_model(options.reward_model).to(device).eval()
    set_seed(settings.seed)  # the value function's head, where it starts from a language model
    with loading(options.value_model or options.reward_model):
        value_model = load_reward_model(options.value_model or options.reward_model).to(device)
    form = (getattr(reward_model.config, "pargs", None) or {}).get("prompt_format")
    encoded = [encode_prompt(tokenizer, prompt.get("prompt_ids", prompt.get("prompt")), form) for prompt in prompts]
    folder.mkdir(parents=True, exist_ok=True)
    ends = end_tokens(model, tokenizer)
    updates = train_ppo(
        model, value_model, model_rewards(reward_model), encoded, ends, settings, checkpoint, options.save_every
    )
    log, first = folder / "log.jsonl", None
    with tqdm(updates, total=settings.updates, disable=None) as progress:
        for numbers in progress:
            if first is None:
                first = numbers["update"]
                cut_log(log, first)
            progress.set_postfix({name: f"{numbers[name]:.3g}" for name in ("reward", "kl", "length")})
            with log.open("a") as file:
                file.write(json.dumps(numbers) + "\n")
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    print(f"saved {folder}")


def cut_log(log, first: int) -> None:
    """Drop the lines of a log that are written again: those of the updates from `first` on, since the checkpoint."""
    import json

    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = (line for line in lines if line.endswith("\n"))
    log.write_text("".join(line for line in whole if json.loads(line)["update"] < first))


@dataclass
class DemoOptions:
    """What `pargs demo` takes."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Models, figures and results. Default: runs/demo, or runs/demo-quick with --quick."},
    )
    quick: bool = field(default=False, metadata={"help": "Everything much smaller: a minute, and numbers to match."})
    seed: int = field(
        default=0, metadata={"help": "Of the reference, the pairs, the first reward model and the texts."}
    )


def demo(arguments: list[str]) -> None:
    """Train, decode and compare on a small embedded world, start to end."""
    from pathlib import Path

    from transformers import HfArgumentParser

    from pargs_min.experiments.demo import run

    (options,) = HfArgumentParser(DemoOptions, prog="pargs demo", description=demo.__doc__).parse_args_into_dataclasses(
        arguments
    )
    folder = Path(options.output_dir or ("runs/demo-quick" if options.quick else "runs/demo"))
    folder.mkdir(parents=True, exist_ok=True)
    with loading(str(folder)):
        run(folder, quick=options.quick, seed=options.seed)


def evaluate(arguments: list[str]) -> None:
    """Judge texts of any methods over the same prompts: one table, every number with its error."""
    from argparse import ArgumentParser
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pargs_min.codec import Codec
    from pargs_min.evaluation.compare import compare, file_labels, read_files, with_kl_to
    from pargs_min.evaluation.tables import markdown, panels, write_comparison
    from pargs_min.experiments.judging import named_judge
    from pargs_min.plots import intervals, save
    from pargs_min.texts import text_log_probs

    parser = ArgumentParser(prog="pargs evaluate", description=evaluate.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="Texts of `pargs generate`, a file a method.")
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="JUDGE",
        help="toy (the gold reward of the embedded world), a reward model (folder or hub id), MODULE:FUNCTION of "
        "(prompts, responses), or URL#MODEL, a language model behind an OpenAI-compatible address (the key from "
        "OPENAI_API_KEY). May be given several times.",
    )
    parser.add_argument("--against", metavar="FILE", help="Count how often the others beat this file, text by text.")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="Take every KL to this language model, which reads the texts again: for texts of fine-tuned models, whose "
        "own KL is to themselves.",
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="runs/evaluation",
        metavar="DIR",
        help="For table, figure, and each judge's answers. Default: %(default)s.",
    )
    options = parser.parse_args(arguments)
    folder, against = Path(options.output_dir), [options.against] if options.against else []
    labels = file_labels([*options.files, *against])
    files = read_files(labels)
    if options.reference:
        with loading(options.reference):
            tokenizer = AutoTokenizer.from_pretrained(options.reference)
            lm = AutoModelForCausalLM.from_pretrained(options.reference).eval()
        files = {
            label: with_kl_to(options.reference, texts, text_log_probs(lm, Codec.of(lm, tokenizer), texts))
            for label, texts in files.items()
        }
    judges = []
    for name in dict.fromkeys(options.judge):
        with loading(name):
            judges.append(named_judge(name, folder / "verdicts.jsonl"))
    comparison = compare(files, judges, *(labels[Path(file)] for file in against))
    write_comparison(comparison, folder)
    if shown := panels(comparison):
        save(intervals(shown), folder / "evaluation.png")
    print(markdown(comparison))
    print(f"saved {options.output_dir}")


@dataclass
class BenchmarkOptions:
    """What `pargs benchmark` takes."""

    config: Literal["tiny", "gpt2", "gpt2-large", "llama-7b"] = field(
        default="tiny", metadata={"help": "Shape of models with random weights; tiny has 4 layers of width 256."}
    )
    model: str | None = field(default=None, metadata={"help": "Or a language model: a folder or a hub id."})
    reward_model: str | None = field(
        default=None, metadata={"help": "And a reward model with a scalar head. Default: a new head on --model."}
    )
    top_k: int = field(default=10, metadata={"help": "Candidates per step."})
    batch_size: int = field(default=1, metadata={"help": "Texts decoded together."})
    prompt_length: int = field(default=128, metadata={"help": "Tokens of each prompt."})
    tokens: int = field(default=8, metadata={"help": "Tokens written by each way in each round."})
    rounds: int = field(default=7, metadata={"help": "Of interleaved runs, of which medians are taken."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    threads: int = field(
        default=1, metadata={"help": "Of the CPU. One is timed in processor time, so that other programs do not count."}
    )
    quick: bool = field(default=False, metadata={"help": "Only the table of ways: no growth, no training."})
    check: bool = field(
        default=False, metadata={"help": "Instead, measure what the project promises on the CPU; status 1 if missed."}
    )
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Report as JSON, tables and figure."})


def benchmark(arguments: list[str]) -> int:
    """Measure what a guided token costs, beside plain generation and the published loops."""
    import json
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM, HfArgumentParser

    from pargs_min.benchmark.report import draw, markdown, run
    from pargs_min.benchmark.targets import check
    from pargs_min.benchmark.ways import Models, models_of_shape, with_vocabulary_head
    from pargs_min.models import load_reward_model
    from pargs_min.plots import save

    (options,) = HfArgumentParser(
        BenchmarkOptions, prog="pargs benchmark", description=benchmark.__doc__
    ).parse_args_into_dataclasses(arguments)
    torch.set_num_threads(options.threads)
    if options.check:
        return 0 if check(options.rounds) else 1
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        models = models_of_shape(options.config, dtype, device)
    else:
        with loading(options.model):
            lm = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
        name = options.reward_model or options.model
        with loading(name):
            scalar = load_reward_model(name, dtype=dtype).to(device).eval()
        models = Models(lm, scalar, with_vocabulary_head(scalar))
    names = ["top_k", "batch_size", "prompt_length", "tokens", "rounds", "quick"]
    report = run(models, **{name: getattr(options, name) for name in names})
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(report | {"options": vars(options)}, indent=2))
    (folder / "benchmark.md").write_text(markdown(report) + "\n")
    save(draw(report), folder / "benchmark.png")
    print(markdown(report))
    print(f"saved {folder}")
    return 0


@dataclass
class StudyOptions:
    """What `pargs study NAME` takes. Without --model it runs on the embedded world."""

    output_dir: str = field(
        default="runs/study",
        metadata={"help": "Models, tables, figures. Studies share what they train; an interrupted one goes on here."},
    )
    seeds: int = field(default=3, metadata={"help": "Of everything that is trained or drawn."})
    seed: int = field(default=0, metadata={"help": "The first of them."})
    processes: int = field(default=2, metadata={"help": "That train and decode side by side; 1 on a GPU."})
    quick: bool = field(default=False, metadata={"help": "So small that it shows nothing but that it runs."})
    model: str | None = field(default=None, metadata={"help": "Language model: a folder or a hub id."})
    dataset: str | None = field(default=None, metadata={"help": "Preference pairs, as for `pargs train`."})
    prompts: str | None = field(default=None, metadata={"help": "To write for, as for `pargs generate`."})
    judge: str | None = field(default=None, metadata={"help": "Scores texts, as for `pargs evaluate`."})
    held_out: str | None = field(default=None, metadata={"help": "Pairs to test on; by default a tenth of --dataset."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of the longest response."})
    samples: int = field(default=16, metadata={"help": "Texts a prompt."})
    batch_size: int = field(default=32, metadata={"help": "Texts decoded together."})
    pairs_per_step: int = field(default=16, metadata={"help": "Pairs a training step."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of reward models."})
    dpo_learning_rate: float = field(default=1e-6, metadata={"help": "Of DPO."})
    ppo_learning_rate: float = field(default=1e-5, metadata={"help": "Of PPO."})
    ppo_updates: int = field(default=100, metadata={"help": "Batches of texts that PPO learns from."})
    append_eos: bool = field(default=True, metadata={"help": "--no-append-eos if responses were cut at a limit."})


def study(arguments: list[str]) -> None:
    """Answer one of nine questions by a grid of experiments (`pargs study` lists them)."""
    from argparse import RawTextHelpFormatter
    from dataclasses import fields
    from pathlib import Path

    import torch
    from transformers import HfArgumentParser

    from pargs_min.experiments import studies as questions
    from pargs_min.experiments.measure import Lab, embedded

    name, *rest = arguments or ["--help"]
    parser = HfArgumentParser(
        StudyOptions, prog="pargs study NAME", description=questions.__doc__, formatter_class=RawTextHelpFormatter
    )
    if name in ("-h", "--help"):
        parser.parse_args(["--help"])
    if name not in questions.NAMES:
        raise ValueError(f"no study {name!r}; there are {', '.join(questions.NAMES)}")
    (options,) = parser.parse_args_into_dataclasses(rest)
    if options.seeds < 1 or options.processes < 1:
        raise ValueError(f"--seeds and --processes must be at least 1, got {options.seeds} and {options.processes}")
    folder, given = Path(options.output_dir), ("model", "dataset", "prompts", "judge")
    missing = [f"--{one}" for one in given if getattr(options, one) is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"a study of your own model needs {', '.join(missing)}, too")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1 if options.model is None else torch.get_num_threads())
    with loading(options.model or str(folder)):
        if options.model is None:
            lab = embedded(folder, quick=options.quick)
        else:
            shared = {field.name for field in fields(Lab)} & vars(options).keys()
            settings = {name: getattr(options, name) for name in shared}
            lab = Lab(folder=str(folder), pairs=options.dataset, **settings)
        seeds = range(options.seed, options.seed + options.seeds)
        print(questions.run(name, lab, folder, seeds=seeds, processes=options.processes, quick=options.quick))
    print(f"saved {name}.md, {name}.json and {name}.png in {folder}")


def keep_options(args, options: dict) -> None:
    """Write what a training run is made from beside its checkpoints, or compare with what they were made from.

    Args:
        args: transformers' TrainingArguments.
        options: the command's own.

    Raises:
        ValueError: if there is a checkpoint to resume from, and its run had other options or another seed.
    """
    import json
    from pathlib import Path

    from pargs_min.texts import differences
    from pargs_min.train import last_checkpoint

    ours = {name: value for name, value in options.items() if name != "resume"} | {"seed": args.seed}
    file = Path(args.output_dir) / "pargs.json"
    if last_checkpoint(args.output_dir):
        if file.exists() and (differ := differences(json.loads(file.read_text("utf-8")), ours)):
            raise ValueError(
                f"the checkpoints in {args.output_dir} were made with other options ({differ}): resume with theirs, or "
                "choose another --output-dir"
            )
    elif args.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(ours, indent=1), "utf-8")


def leave_together() -> None:
    """The end of training in several processes: none leaves while another still talks to it, or it may end badly."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Load models without transformers' report on each, and with errors that name the model."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    finally:
        logging.set_verbosity(level)


COMMANDS = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "trace": trace,
    "evaluate": evaluate,
    "study": study,
    "benchmark": benchmark,
    "dpo": dpo,
    "ppo": ppo,
}
USAGE = "usage: pargs COMMAND [options]   (pargs COMMAND --help)\n\n" + "\n".join(
    f"  {name:10} {' '.join(command.__doc__.split())}" for name, command in COMMANDS.items()
)
