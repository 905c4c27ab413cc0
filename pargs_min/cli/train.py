"""`pargs train`: what guides, by every objective; and what it shares with `pargs dpo`."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pargs_min import data, models, trainer
from pargs_min import train as training
from pargs_min.baselines.farma import train_farma
from pargs_min.baselines.genarm import train_genarm
from pargs_min.cli.hub import model_card, push
from pargs_min.cli.options import choice, parse
from pargs_min.cli.resuming import differences
from pargs_min.codec import Codec, check_vocabularies
from pargs_min.decode import Warp, recorded_warp
from pargs_min.distil import Taught, taught, train_distilled, vocabulary_headed
from pargs_min.frozen import frozen_trunk
from pargs_min.lora import lora_config
from pargs_min.memory import enough_memory
from pargs_min.reading import closing_ids, id_rewards
from pargs_min.records import Preference, Response, read_preferences, read_responses
from pargs_min.reward_model import context_length, recorded
from pargs_min.store import check_results, content, read_json, results, write_json
from pargs_min.trunk import copy_trunk

Records = tuple[list, list]  # to train on, and of --eval-dataset
KEPT = "pargs.json"  # the options of a run, next to its checkpoints
# Of transformers' options, those that a resumed run must not change. A batch may be taken in smaller parts: what counts
# is the `records_per_step` of all of them.
WEIGHTS_DEPEND_ON = {
    "seed", "data_seed", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "warmup_ratio", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "bf16", "fp16", "train_sampling_strategy", "ignore_data_skip", "neftune_noise_alpha",
    "average_tokens_across_devices",
}  # fmt: skip
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # at which texts are counted (`effective`)
NOT_IN_THE_WEIGHTS = ("resume", "overwrite", "output_dir", "save_every", "device")  # of our own


@dataclass(kw_only=True)
class DataOptions:
    """What is trained, and on what: options of `pargs train` and `pargs dpo`.

    Args:
        model: Language model, the reference: a folder or a hub id.
        dataset: Preference pairs, as for `pargs train`.
        append_eos: End responses with the end token; --no-append-eos if they were cut.
        max_length: Tokens per text at most; prompts are cut. Default: the model's context.
        eval_dataset: Records to evaluate on, instead of held-out ones. Pairs that name their `subset`, as those of
            RewardBench do, also give the accuracy of each; beside chats, a prompt of text is a user's message.
        eval_fraction: Share of prompts to hold out, with all their records; 0 for none.
        load_best: Keep the checkpoint with the least held-out loss, not the last. Evaluates whenever a checkpoint is
            saved, by default after every tenth of the steps.
        resume: Continue from the last checkpoint in --output-dir, if there is one.
        overwrite: Replace the model and the checkpoints in --output-dir.

    Raises:
        ValueError: if `max_length` is below 1.
    """

    model: str
    dataset: str
    append_eos: bool = True
    max_length: int | None = None
    eval_dataset: str | None = None
    eval_fraction: float = 0.1
    load_best: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length (--max-length) must be at least 1, got {self.max_length}")

    def tokens(self, *models: PreTrainedModel) -> int | None:
        """Tokens of a text, at most: `max_length`, or all that these models read. Raises ValueError if that is less."""
        most = min(filter(None, map(context_length, models)), default=None)
        if self.max_length and most and self.max_length > most:
            raise ValueError(f"max_length (--max-length) {self.max_length} is beyond the model's context of {most}")
        return self.max_length or most


class Recipe(NamedTuple):
    """How an objective is trained."""

    train: Callable  # (model, tokenizer, items, held-out items, args=, lora_rank=, resume=, and `takes`) -> metrics
    takes: tuple[str, ...] = ()  # options that it is told, and that are recorded with the model
    on_texts: bool = False  # rated samples of the reference; else preference pairs
    language_model: bool = False  # else a reward model
    head: Literal["scalar", "vocab"] = "scalar"  # of a reward model that it trains from a language model


# Objective -> how it is trained.
RECIPES = {
    "partial": Recipe(training.train_reward_model, ("objective", "tail", "reduction")),
    "full": Recipe(training.train_reward_model, ("objective",)),
    "win": Recipe(training.train_reward_model, ("objective",)),
    "farma": Recipe(train_farma, head="vocab"),
    "autoregressive": Recipe(train_genarm, language_model=True),
    "value": Recipe(training.train_value_model, ("objective",), on_texts=True),
    "soft": Recipe(training.train_value_model, ("objective", "lam"), on_texts=True),
    "reweighted": Recipe(training.train_language_model, ("beta",), on_texts=True, language_model=True),
}
SOFT_LABELS = Recipe(training.train_partial_on_texts, ("tail",), on_texts=True)  # "partial" with --soft-labels-from
DISTILLED = Recipe(train_distilled, ("beta", "top_k"), on_texts=True)  # with --distil-from


@dataclass(kw_only=True)
class TrainOptions(DataOptions):
    """Options of `pargs train`.

    Args:
        model: Language model or reward model to start from: a folder or a hub id. With --distil-from: the reference.
        dataset: Preference pairs: a .jsonl or .jsonl.gz file, or a hub data set as owner/name or owner/name:split
            (needs the extra `hub`). With --reward-model, --soft-labels-from or --distil-from: texts of the reference,
            written by `pargs generate --method plain`.
        objective: From pairs: compare every prefix (partial: PARGS) or whole responses only (full: ARGS), or predict
            at every prefix whether its response wins (win); other papers' are farma, with a vocabulary head, and
            autoregressive (GenARM), a language model. From texts and the rewards of a whole-text model: predict
            at every prefix the mean reward (value: controlled decoding) or the soft value (soft), or train a language
            model on the texts, drawn again in proportion to exp(beta * reward) (reweighted).
        reward_model: Whole-text model to rate the texts, for the objectives that learn from texts.
        soft_labels_from: For --objective partial: whole-text model to rate texts, all of whose pairs within a prompt
            are then compared with soft labels.
        lam: For --objective soft: weight of the reward in the soft value, in nats per unit of reward. Default: 1.
        distil_from: Scalar guide, whose body gets a vocabulary head, a number for each token that may come next: it
            is to guide as the scalar one does, by one query per token for any --top-k. Its objective, and so the
            method, stays the guide's.
        beta: For --objective reweighted, and with --distil-from: weight of the reward, in nats per unit of reward;
            other values can be asked for when decoding. Default: 1.
        top_k: With --distil-from: candidates per prefix that the guide is asked for, 0 for the whole vocabulary.
            Default: 10.
        tail: Compare prefixes up to the longer response, with end tokens after the shorter one (extend), or up to the
            shorter one (min). Default: extend, or min with --no-append-eos.
        reduction: Weight every prefix (the default), or every pair, equally.
        lora_rank: Train the head, plus adapters of this rank on all remaining linear layers, instead of all weights.
            They are merged in the end, and an ordinary model is saved (needs the extra `lora`). Use a larger
            --learning-rate, such as 1e-4. With --bf16 the other weights are held in bfloat16.
        shared_layers: Train only what is above the embeddings and this many lowest layers, which stay those of the
            language model. Next to it the guide then needs memory for its upper layers alone; and a guide that is asked
            once per step (reweighted, autoregressive or with a vocabulary head) computes those alone.

    Raises:
        ValueError: for options that exclude each other, or are out of range.
    """

    objective: str = choice(RECIPES, "partial")
    reward_model: str | None = None
    soft_labels_from: str | None = None
    distil_from: str | None = None
    lam: float | None = field(default=None, metadata={"aliases": ["--lambda"]})
    beta: float | None = None
    top_k: int | None = None
    tail: Literal["extend", "min"] | None = None
    reduction: Literal["prefix", "pair"] | None = None
    lora_rank: int | None = None
    shared_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail == "extend" and not self.append_eos:
            raise ValueError("--tail extend appends end tokens and --no-append-eos forbids them: drop one of the two")
        if self.soft_labels_from is not None and self.objective != "partial":
            raise ValueError(f"--soft-labels-from is for --objective partial, got {self.objective}")
        if self.distil_from is not None and (self.objective != "partial" or self.soft_labels_from is not None):
            raise ValueError("--distil-from takes objective and labels from its guide: drop --objective and the like")
        if self.reward_model is not None and not RECIPES[self.objective].on_texts:
            learners = ", ".join(name for name, recipe in RECIPES.items() if recipe.on_texts)
            raise ValueError(f"--reward-model is for --objective {learners}, got {self.objective}")
        if self.reward_model is None and RECIPES[self.objective].on_texts:
            raise ValueError(
                f"--objective {self.objective} learns from texts of the reference (--dataset, written by `pargs "
                "generate --method plain`) and from what a whole-text model says of them (--reward-model, made by "
                "`pargs train --objective full`): give both"
            )
        if self.recipe.on_texts and not self.append_eos:
            raise ValueError("--no-append-eos is for preference pairs: texts say of themselves whether they ended")
        defaults = dict(lam=1.0, beta=1.0, tail="extend" if self.append_eos else "min", reduction="prefix")
        for name, default in defaults.items():
            flag, value = "--lambda" if name == "lam" else f"--{name}", getattr(self, name)
            if name not in self.recipe.takes and value is not None:
                takers = ", ".join(one for one in RECIPES if name in RECIPES[one].takes)
                raise ValueError(f"{flag} is for --objective {takers}, got {self.learning}")
            if name in self.recipe.takes and value is None:
                setattr(self, name, default)
            elif isinstance(value, float) and not 0 < value < math.inf:
                raise ValueError(f"{name} ({flag}) must be a positive number, got {value}")
        if self.top_k is not None and self.distil_from is None:
            raise ValueError("--top-k is for --distil-from; else it is said when decoding")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k (--top-k) must be at least 1, or 0 for the whole vocabulary, got {self.top_k}")
        if self.lora_rank is not None:
            lora_config(self.lora_rank)  # raises where the rank is below 1, or peft is missing

    @property
    def learning(self) -> str:
        """The objective, and what it learns from where an option says so."""
        names = ("soft_labels_from", "distil_from")
        given = [f" with --{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        return self.objective + "".join(given)

    @property
    def recipe(self) -> Recipe:
        if self.distil_from is not None:
            return DISTILLED
        return SOFT_LABELS if self.soft_labels_from else RECIPES[self.objective]


# Where we differ from transformers' defaults: one pass, since reward models overfit on the second, and a step size for
# pretrained language models (tiny ones want 1e-3).
DEFAULTS = dict(num_train_epochs=1, learning_rate=1e-5, warmup_steps=0.05, logging_steps=10, save_total_limit=1)


def train(arguments: list[str]) -> None:
    """Train a model that guides: by default a reward model on every prefix of the responses of preference pairs."""
    options, args = begin(train, arguments, TrainOptions, output_dir="runs/reward_model")
    if options.distil_from is not None:
        return distil(options, args)
    recipe, rater = options.recipe, options.reward_model or options.soft_labels_from
    records = read(options, partial(read_texts, rater) if recipe.on_texts else read_preferences)
    form = data.training_form(*records)  # an error now, not after training

    set_seed(args.seed)  # draws the new head
    tokenizer = models.load_tokenizer(options.model)
    dtype = torch.bfloat16 if options.lora_rank and args.bf16 else torch.float32
    if recipe.language_model:
        model = models.load_language_model(options.model, dtype=dtype)
    else:
        model = models.load_reward_model(options.model, tokenizer, dtype=dtype, head=recipe.head)

    limit = options.tokens(model)
    if recipe.on_texts:
        form, encode = rated(rater, tokenizer, limit, args, form)
    else:
        asked = dict(max_length=limit, append_eos=options.append_eos, form=form)
        encode = partial(data.encode_preferences, tokenizer=tokenizer, **asked)
    subsets = {} if recipe.on_texts or recipe.language_model else in_subsets(records[1])
    benchmark = {name: encode(some)[0] for name, some in subsets.items()}
    told = {name: getattr(options, name) for name in recipe.takes}
    made = dict(objective=options.objective) | told | dict(prompt_format=form)
    made |= {name: value for name in ("lora_rank", "shared_layers") if (value := getattr(options, name)) is not None}
    made |= {} if options.soft_labels_from is None else dict(soft_labels=True)
    made |= dict(reference=sampled_as(records)) if recipe.on_texts else dict(append_eos=options.append_eos)
    if "tail" in told:
        told["end"] = Codec(tokenizer, form).end

    def fit(items: list, held_out: list, **settings: Any) -> dict[str, float]:
        if recipe.on_texts and args.process_index == 0:
            print(effective(items))
        metrics = recipe.train(model, tokenizer, items, held_out, lora_rank=options.lora_rank, **told, **settings)
        for name, some in benchmark.items():
            metrics[f"eval_accuracy/{name}"] = training.prefix_accuracy(model, some).accuracy[-1].item()
        return metrics

    if recipe.language_model:
        model.config.pargs = made
    else:
        models.record(model, **made)
    with frozen_trunk(model, options.shared_layers):
        fit_and_save(options, args, records, encode, fit, model, tokenizer)


def in_subsets(preferences: Sequence[Preference]) -> dict[str, list[Preference]]:
    """The preferences of each subset of a benchmark, such as RewardBench, by its name."""
    names = dict.fromkeys(one.subset for one in preferences if one.subset is not None)
    return {name: [one for one in preferences if one.subset == name] for name in names}


def distil(options: TrainOptions, args: TrainingArguments) -> None:
    """Train a vocabulary head on the body of a scalar guide."""
    name, device, size = str(options.distil_from), str(args.device), args.per_device_eval_batch_size
    records = read(options, partial(read_texts, name))
    form, sampled = data.records_form([one for some in records for one in some]), sampled_as(records)

    set_seed(args.seed)
    tokenizer = models.load_tokenizer(name)
    check_vocabularies(models.load_tokenizer(options.model), tokenizer)
    model = vocabulary_headed(models.load_reward_model(name, tokenizer))
    reference = models.load_language_model(options.model)
    form = recorded(model).get("prompt_format", form)
    limit = options.tokens(model, reference)

    def encode(some: Sequence[Response]) -> tuple[list[Taught], dict[str, int]]:
        """The guide and the reference are on the device no longer than they are asked."""
        check_forms(some, form, name)
        texts, counts = data.encode_texts(some, tokenizer, limit, form)
        guide = models.load_reward_model(name, tokenizer, device=device)
        lm = models.load_language_model(options.model, device=device)
        how: dict[str, Any] = dict(top_k=options.top_k, warp=Warp(**sampled), batch_size=size)
        with enough_memory(f"asking a guide, --per-device-eval-batch-size {size}", "lower it, or --max-length"):
            return taught(texts, guide, lm, tokenizer, **how), counts

    told: dict[str, Any] = dict(beta=options.beta, top_k=options.top_k)
    made = recorded(model) | dict(prompt_format=form, reference=sampled, distilled=told)
    made.pop("shared_layers", None)  # the guide's, whose weights are all trained unless they are asked for here
    if options.shared_layers is not None:
        copy_trunk(model, reference, options.shared_layers)
        made["shared_layers"] = options.shared_layers
    del reference
    models.record(model, **made)
    fit = partial(train_distilled, model, tokenizer, beta=told["beta"], lora_rank=options.lora_rank)
    with frozen_trunk(model, options.shared_layers):
        fit_and_save(options, args, records, encode, fit, model, tokenizer)


def read_texts(rater: str, name: str) -> list[Response]:
    """The texts of a file. Raises ValueError, saying what makes such a file, if it cannot be read."""
    try:
        return read_responses(name)
    except ValueError as error:
        raise ValueError(
            f"{error}; what {rater} reads are texts of the reference, written by `pargs generate --method plain`"
        ) from None


def sampled_as(records: Records) -> dict:
    """How the reference was sampled that wrote the texts (`Warp`). Raises ValueError if it was not always the same."""
    warps = {recorded_warp(text.reference, text.source): text.source for some in records for text in some}
    if len(warps) > 1:
        (one, source), (other, its) = [*warps.items()][:2]
        raise ValueError(f"the reference was sampled as {one} in {source} and as {other} in {its}: give texts of one")
    return vars(next(iter(warps)))


def effective(texts: Sequence[data.Text]) -> str:
    """Says how many of a prompt's texts are effective at several betas: so few of them decide what a beta pays."""
    counts = [f"{data.effective_texts(texts, beta).mean():.3g} at beta {beta:g}" for beta in BETAS]
    each = len(texts) / len(data.by_prompt(texts))
    return f"texts per prompt: {each:.3g}, effective under exp(beta * reward): {', '.join(counts)}"


def rated(
    name: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, args: TrainingArguments, form: str
) -> tuple[str, Callable]:
    """The form of prompts that a reward model of the same vocabulary reads, and an encoder of texts that it also rates.

    The model is in memory no longer than it rates: training needs the room.

    Raises:
        ValueError: if the texts were written for prompts of another form.
    """
    own = models.load_tokenizer(name)
    check_vocabularies(tokenizer, own)
    theirs = (getattr(models.load_config(name), "pargs", None) or {}).get("prompt_format", form)
    codec, device, size = Codec(own, theirs), str(args.device), args.per_device_eval_batch_size

    def encode(records: Sequence[Response]) -> tuple[list[data.Text], dict[str, int]]:
        check_forms(records, theirs, name)
        rater = models.load_reward_model(name, device=device)
        room = (context_length(rater) or math.inf) - len(closing_ids(rater, codec))
        limit = min(max_length or math.inf, room)
        texts, counts = data.encode_texts(records, tokenizer, None if limit == math.inf else int(limit), theirs)
        with enough_memory(f"rating texts, --per-device-eval-batch-size {size}", "lower it, or --max-length"):
            return training.rate(texts, id_rewards(rater, codec), batch_size=size, device=device), counts

    return theirs, encode


def check_forms(texts: Sequence[Response], form: str, name: str) -> None:
    """Raises ValueError if texts were written for prompts of another form than a reward model was trained on; one that
    was trained on ids reads those of any form."""
    for text in texts:
        if form != "ids" and text.form not in (None, "ids", form):
            raise ValueError(
                f"{text.source} continues a prompt of the form {text.form}, and {name} was trained on {form} "
                f"prompts: write texts with --prompt-format {form}"
            )


# What `pargs train` and `pargs dpo` share: begin, read, fit_and_save.


def begin(command: Callable, arguments: list[str], kind: type, **defaults: Any) -> tuple[Any, TrainingArguments]:
    """The command's options and transformers' own; `defaults` are those of the latter, besides DEFAULTS.

    Raises:
        ValueError: if --output-dir holds checkpoints, and neither --resume nor --overwrite is given; if its run had
            other options, data or models, and is to be resumed; for settings of transformers that `check_settings`
            refuses.
    """
    defaults = DEFAULTS | dict(dataloader_pin_memory=torch.accelerator.is_available()) | defaults
    with trainer.usable_settings():
        options, args = parse(command, arguments, kind, TrainingArguments, defaults=defaults)
    if options.load_best:
        keep_best(args)
    if args.push_to_hub and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", args.hub_model_id or ""):
        raise ValueError(
            f"hub_model_id (--hub-model-id) must be OWNER/NAME to push to (--push-to-hub), got {args.hub_model_id!r}"
        )
    args.hub_model_id = args.hub_model_id if args.push_to_hub else None
    args.push_to_hub = False  # not by Trainer, and not its checkpoints: `fit_and_save` pushes what is whole
    trainer.check_settings(args, options.resume)
    if options.resume:
        check_same(Path(args.output_dir), recipe(options, args))
    elif not options.overwrite and (found := trainer.last_checkpoint(args.output_dir)):
        raise ValueError(f"there are checkpoints ({found}): add --resume or --overwrite, or another --output-dir")
    return options, args


def keep_best(args: TrainingArguments) -> None:
    """Let training end with the weights of the checkpoint whose held-out loss is least.

    Checkpoints are saved when held-out records are evaluated, and the other way round; where the settings name neither,
    after every tenth of the steps.
    """
    if args.eval_strategy != "no":
        args.save_strategy, args.save_steps = SaveStrategy(args.eval_strategy.value), args.eval_steps
    elif (args.save_strategy, args.save_steps) != (SaveStrategy.STEPS, TrainingArguments.save_steps):
        args.eval_strategy, args.eval_steps = IntervalStrategy(args.save_strategy.value), args.save_steps
    if args.eval_strategy == "no":
        args.eval_strategy, args.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
        args.eval_steps = args.save_steps = 0.1
    args.do_eval = args.load_best_model_at_end = True
    args.metric_for_best_model, args.greater_is_better = "eval_loss", False


def recipe(options: Any, args: TrainingArguments | None = None) -> dict:
    """What a model is made from, files by their content; kept next to checkpoints, for --resume to compare."""
    files = ("model", "dataset", "eval_dataset", "reward_model", "soft_labels_from", "distil_from", "value_model")
    read = {f"content of {name}": content(file) for name in files if (file := getattr(options, name, None))}
    ours = {name: value for name, value in vars(options).items() if name not in NOT_IN_THE_WEIGHTS}
    theirs = args.to_dict() if args else {}
    used = {name: value for name, value in theirs.items() if name in WEIGHTS_DEPEND_ON}
    if args:
        used["records_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return json.loads(json.dumps(ours | read | used, default=str))


def check_same(folder: Path, made_from: dict) -> None:
    """Raises ValueError if the folder's run had another `recipe`."""
    if (kept := folder / KEPT).exists() and (differ := differences(read_json(kept), made_from)):
        raise ValueError(
            f"{folder} was made with other options ({differ}): resume with the same, or choose another --output-dir"
        )


def read(options: DataOptions, reader: Callable[[str], list]) -> Records:
    """The records to train on, and those of --eval-dataset."""
    return reader(options.dataset), reader(options.eval_dataset) if options.eval_dataset else []


def fit_and_save(
    options: DataOptions,
    args: TrainingArguments,
    records: Records,
    encode: Callable,
    fit: Callable,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Encode, hold out, train, save with a model card, report, and push if that is asked for.

    Args:
        records: from `read`.
        encode: records -> items to train on, and counts.
        fit: (items, held-out items, args=, resume=) -> metrics; trains the model in place.

    Raises:
        OSError: if the model cannot be pushed; it has been saved.
    """
    first = args.process_index == 0
    say = print if first else lambda *_: None
    named = ("model", "reward_model", "soft_labels_from", "distil_from")
    folder, sources = Path(args.output_dir), tuple(getattr(options, name, None) for name in named)
    goes_on = options.resume and trainer.last_checkpoint(folder) is not None
    replace = options.overwrite or (goes_on and (folder / KEPT).exists())  # the model of a run that goes on is its own
    place: dict[str, Any] = dict(overwrite=replace, sources=sources)
    if first:
        check_results(folder, *models.WRITTEN, **place)

    def prepare(some: list) -> list:
        items, counts = encode(some)
        say("records:", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        return items

    items, held_out = (prepare(some) if some else [] for some in records)
    if not held_out:
        items, held_out = data.split_by_prompt(items, options.eval_fraction, args.seed)
    if options.load_best and not held_out:
        raise ValueError("--load-best needs held-out records: give --eval-dataset, or an --eval-fraction above 0")

    base = getattr(options, "distil_from", None) or options.model
    about: dict[str, Any] = dict(name=args.hub_model_id or folder.resolve().name, base=base, dataset=options.dataset)
    about |= {} if models.is_classifier(models.load_config(options.model)) else dict(reference=options.model)
    about |= dict(counts={"learned from": len(items), "held out": len(held_out)})
    with results(folder, *models.WRITTEN, **place) if first else nullcontext():
        if first and options.resume:
            check_same(folder, recipe(options, args))  # again, now that nobody else writes there
        if first and not goes_on:
            for old in trainer.checkpoints(folder):
                shutil.rmtree(old)
            write_json(folder / KEPT, recipe(options, args))
        metrics = fit(items, held_out, args=args, resume=options.resume)
        if first:
            models.save(model, tokenizer, folder, model_card(model, tokenizer, metrics=metrics, **about))
    say("\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items()))
    say(f"saved {args.output_dir}")

    # Several processes end at once: one that left while others still talk to it could make them fail.
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    if first and args.hub_model_id:
        print("pushed to", push(folder, args.hub_model_id, private=args.hub_private_repo, token=args.hub_token))
