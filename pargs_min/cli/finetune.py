"""`pargs dpo` and `pargs ppo`: fine-tuning of the language model itself, to compare with."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import set_seed

from pargs_min.baselines.ppo import PPOSettings, train_ppo
from pargs_min.cli.options import parse
from pargs_min.cli.train import KEPT, DataOptions, begin, check_same, fit_and_save, read, recipe
from pargs_min.codec import Codec, check_vocabularies
from pargs_min.data import encode_preferences, records_form
from pargs_min.memory import enough_memory
from pargs_min.models import WRITTEN, default_device, load_language_model, load_reward_model, load_tokenizer, save
from pargs_min.progress import progress
from pargs_min.reading import id_rewards
from pargs_min.records import read_jsonl, read_preferences, read_prompts
from pargs_min.reward_model import is_causal, recorded
from pargs_min.store import results, write_json, write_lines
from pargs_min.texts import longest_text


@dataclass(kw_only=True)
class DPOOptions(DataOptions):
    """Options of `pargs dpo`.

    Args:
        beta: Weight of the reward, in nats per unit of reward: the inverse of the beta of DPO and TRL.
    """

    beta: float = 1.0


def dpo(arguments: list[str]) -> None:
    """Fine-tune the language model itself on preference pairs (DPO, by TRL), to compare with."""
    try:
        from pargs_min.baselines.dpo import train_dpo
    except ImportError as error:
        raise ValueError(f"DPO needs TRL ({error}): pip install 'pargs-min[baselines]'") from None
    options, args = begin(dpo, arguments, DPOOptions, output_dir="runs/dpo", learning_rate=1e-6)
    records = read(options, read_preferences)
    model, tokenizer = load_language_model(options.model), load_tokenizer(options.model)
    limits = dict(max_length=options.tokens(model), append_eos=options.append_eos)
    encode = partial(encode_preferences, tokenizer=tokenizer, **limits)
    form = records_form([record for some in records for record in some])
    model.config.pargs = dict(objective="dpo", beta=options.beta, append_eos=options.append_eos, prompt_format=form)
    fit = partial(train_dpo, model, tokenizer, beta=options.beta)
    fit_and_save(options, args, records, encode, fit, model, tokenizer)


@dataclass(kw_only=True)
class PPOOptions:
    """Options of `pargs ppo` besides `PPOSettings`.

    Args:
        model: Language model, the reference: a folder or a hub id.
        prompts: As for `pargs generate`; a file of preference pairs will do.
        reward_model: Rates whole texts: a folder or a hub id, of the same vocabulary.
        value_model: Starts the value function. Default: the reward model.
        output_dir: For the model, log.jsonl and the checkpoint.
        save_every: Updates between two checkpoints.
        device: Default: cuda if available, else cpu.
        resume: Continue from the checkpoint in --output-dir, if there is one.
        overwrite: Replace the model and the checkpoint in --output-dir.
    """

    model: str
    prompts: str
    reward_model: str
    value_model: str | None = None
    output_dir: Path = Path("runs/ppo")
    save_every: int = 20
    device: str | None = None
    resume: bool = False
    overwrite: bool = False


def ppo(arguments: list[str]) -> None:
    """Fine-tune the language model itself on a reward model's scores (PPO), to compare with."""
    options, settings = parse(ppo, arguments, PPOOptions, PPOSettings)
    folder, checkpoint = options.output_dir, options.output_dir / "checkpoint.pt"
    if checkpoint.exists() and not (options.resume or options.overwrite):
        raise ValueError(f"{folder} holds the checkpoint of an earlier run: add --resume, or choose another folder")
    if options.resume:
        check_same(folder, recipe(options))
    prompts, device = read_prompts(options.prompts), default_device(options.device)

    model, tokenizer = load_language_model(options.model, device=device), load_tokenizer(options.model)
    value, theirs = options.value_model or options.reward_model, load_tokenizer(options.reward_model)
    for other in (theirs, load_tokenizer(value)):
        check_vocabularies(tokenizer, other)
    reward_model = load_reward_model(options.reward_model, device=device)
    set_seed(settings.seed)  # draws the head of a value function that starts from a language model
    value_model = load_reward_model(value, head="scalar", device=device)
    if not is_causal(value_model):
        raise ValueError(f"{value} has no value at every token: give a causal --value-model, such as {options.model}")

    codec = Codec.of(model, tokenizer, recorded(reward_model).get("prompt_format"))
    prompt_ids, often = [codec.prompt(prompt) for prompt in prompts], options.save_every
    longest_text(prompt_ids, settings.max_new_tokens, model, reward_model, value_model)
    scores, ends = id_rewards(reward_model, Codec(theirs, codec.form)), codec.ends or ()
    model.config.pargs = {"prompt_format": codec.form}
    sources = options.model, options.reward_model, options.value_model
    goes_on = options.resume and checkpoint.exists()
    replace = options.overwrite or (goes_on and (folder / KEPT).exists())  # the model of a run that goes on is its own
    doing = f"training with --batch-size {settings.batch_size} --minibatch-size {settings.minibatch_size}"
    lower = enough_memory(doing, "lower them or --max-new-tokens, and start anew")
    with results(folder, *WRITTEN, overwrite=replace, sources=sources), lower:
        log = folder / "log.jsonl"
        logged = [line for line, _ in read_jsonl(log, growing=True)] if log.exists() else []
        if options.resume:
            check_same(folder, recipe(options))  # again, now that nobody else writes there
        if not goes_on:
            checkpoint.unlink(missing_ok=True)
            write_json(folder / KEPT, recipe(options))
        task = scores, prompt_ids, ends, settings, checkpoint, often, codec.vocabulary
        updates = train_ppo(model, value_model, *task)
        write_log(log, logged, updates, settings.updates)
        save(model, tokenizer, folder)
    print(f"saved {folder}")


def write_log(log: Path, logged: list[dict], updates: Iterable[dict], total: int) -> None:
    """Log the numbers of every update, each when it is done, behind what is logged.

    What an interrupted run logged after its last checkpoint is dropped: those updates are made again.
    """
    shown = progress(updates, desc="updates", total=total, unit="update")
    for numbers in shown:
        logged = [line for line in logged if line.get("update") in range(numbers["update"])] + [numbers]
        write_lines(log, logged)
        shown.set_postfix({name: f"{numbers[name]:.3g}" for name in ("reward", "kl", "length")}, refresh=False)
