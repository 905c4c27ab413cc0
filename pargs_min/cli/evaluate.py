"""`pargs evaluate`: what texts are worth, in one table."""

from argparse import ArgumentParser
from pathlib import Path

from pargs_min.codec import Codec
from pargs_min.evaluation.compare import compare, file_labels, read_files, with_kl_to
from pargs_min.evaluation.tables import markdown, panels, write_comparison
from pargs_min.experiments.judging import named_judge
from pargs_min.models import load_language_model, load_tokenizer
from pargs_min.plots import intervals, save
from pargs_min.texts import text_log_probs

JUDGE = """toy (the gold reward of the embedded world), a reward model (a folder or a hub id), MODULE:FUNCTION of
(prompts, responses), or URL#MODEL, a language model behind an OpenAI-compatible address (with the key from
OPENAI_API_KEY). May be given several times."""
REFERENCE = """Take every KL to this language model, which reads the texts again: for texts of fine-tuned models, whose
own KL is to themselves."""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="pargs evaluate", description=evaluate.__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="Texts of `pargs generate`, one file per method.")
    add("--judge", action="append", default=[], metavar="JUDGE", help=JUDGE)
    add("--against", metavar="FILE", help="Count how often the others beat this file, text by text.")
    add("--reference", metavar="MODEL", help=REFERENCE)
    about = "For the table, the figure, and each judge's answers. Default: %(default)s."
    add("--output-dir", "--output_dir", type=Path, default="runs/evaluation", metavar="DIR", help=about)
    return parser


def evaluate(arguments: list[str]) -> None:
    """Judge texts of any methods over the same prompts: one table, every number with its standard error."""
    options = _parser().parse_args(arguments)
    folder, against = options.output_dir, [options.against] if options.against else []
    labels = file_labels([*options.files, *against])
    files = read_files(labels)
    if options.reference:
        lm = load_language_model(options.reference)
        codec = Codec.of(lm, load_tokenizer(options.reference))
        for label, texts in files.items():
            files[label] = with_kl_to(options.reference, texts, text_log_probs(lm, codec, texts))
    judges = [named_judge(name, folder / "verdicts.jsonl") for name in dict.fromkeys(options.judge)]
    comparison = compare(files, judges, *(labels[Path(file)] for file in against))
    write_comparison(comparison, folder)
    if shown := panels(comparison):
        save(intervals(shown), folder / "evaluation.png")
    print(markdown(comparison))
    print(f"saved {folder}")
