"""`pargs evaluate`: what texts are worth, in one table."""

import os
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pargs_min.cli.options import choice, parse
from pargs_min.codec import Codec
from pargs_min.evaluation.compare import compare, file_labels, read_files, with_kl_to
from pargs_min.evaluation.tables import alpaca_eval_records, markdown, panels, write_comparison
from pargs_min.experiments.judging import named_judge
from pargs_min.memory import enough_memory
from pargs_min.models import default_device, load_language_model, load_tokenizer
from pargs_min.plots import intervals, save
from pargs_min.store import check_results, results, write_json
from pargs_min.texts import text_log_probs


@dataclass(kw_only=True)
class EvaluateOptions:
    """Options of `pargs evaluate`.

    Args:
        files: Texts of `pargs generate`, or outputs as AlpacaEval has them, one file per method; before the options.
        judge: toy (the gold reward of the embedded world), a reward model (a folder or a hub id), MODULE:FUNCTION of
            (prompts, responses), or URL#MODEL, a language model behind an OpenAI-compatible address (with the key from
            OPENAI_API_KEY). May be given several times.
        against: Count how often the others beat this file, text by text.
        reference: Take every KL to this language model, which reads the texts again: for texts of fine-tuned models,
            whose own KL is to themselves.
        export: alpacaeval writes each file once more, to alpacaeval-NAME.json in --output-dir, as AlpacaEval reads it
            (--model_outputs): the first sample of each prompt. It knows no turns: a prompt of messages must be a single
            one of the user.
        output_dir: For the table, the figure, and each judge's answers.
        overwrite: Replace those of an earlier evaluation in --output-dir.
    """

    against: str | None = None
    reference: str | None = None
    export: str | None = choice(["alpacaeval"], None)
    output_dir: Path = Path("runs/evaluation")
    overwrite: bool = False


REPEATED = ArgumentParser(add_help=False)  # what no field of a dataclass can say
REPEATED.add_argument("files", nargs="+", metavar="FILE")
REPEATED.add_argument("--judge", action="append", default=[])

RESULTS = ("evaluation.json", "evaluation.md", "evaluation.png", "answers.jsonl")
VERDICTS = "verdicts.jsonl"  # of chat judges, which the next evaluation goes on with


def evaluate(arguments: list[str]) -> None:
    """Judge texts of any methods over the same prompts: one table, every number with its standard error."""
    options, repeated = parse(evaluate, arguments, EvaluateOptions, parents=[REPEATED])
    folder, against = options.output_dir, [options.against] if options.against else []
    labels = file_labels([*repeated.files, *against])
    others = [label for file, label in labels.items() if against and file.samefile(against[0])]
    exported = {label: folder / f"alpacaeval-{quote(label, safe=' ()')}.json" for label in labels.values()}
    exported = exported if options.export else {}
    replaced = *RESULTS, *(path.name for path in exported.values())
    written = {(folder / name).resolve() for name in (*replaced, VERDICTS)}
    for file in labels:
        if file.resolve() in written:
            raise ValueError(f"{file} is read, and would be replaced: choose another --output-dir")
    files = read_files(labels)
    outputs = {path: alpaca_eval_records(files[label], label) for label, path in exported.items()}
    check_results(folder, *replaced, overwrite=options.overwrite)  # before anything is judged
    if options.reference:
        known = by_reference(options.reference, [*files.values()])
        files = {
            label: with_kl_to(options.reference, texts, ours)
            for (label, texts), ours in zip(files.items(), known, strict=True)
        }
    names = {os.path.realpath(name) if os.path.exists(name) else name: name for name in repeated.judge}
    judges = [named_judge(name, folder / VERDICTS) for name in names.values()]
    with results(folder, *replaced, overwrite=options.overwrite):
        comparison = compare(files, judges, *others)
        print(markdown(comparison))  # before anything is written, which may fail
        for name in ("evaluation.json", "evaluation.png"):  # what is there belongs together
            (folder / name).unlink(missing_ok=True)
        if shown := panels(comparison):
            save(intervals(shown), folder / "evaluation.png")
        for path, records in outputs.items():
            write_json(path, records)
        write_comparison(comparison, folder)
    print(f"saved {folder}")


def by_reference(name: str, files: list[list[dict]]) -> list[list[float]]:
    """The log-probability of each text of each file by this language model, which is in memory no longer than that."""
    lm = load_language_model(name, device=default_device())
    codec = Codec.of(lm, load_tokenizer(name))
    with enough_memory(f"reading texts by --reference {name}", "hide the GPU (CUDA_VISIBLE_DEVICES=), or free memory"):
        return [text_log_probs(lm, codec, texts) for texts in files]
