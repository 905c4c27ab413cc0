"""The command line, one file for each group of commands.

A command's file is imported when it is called, so that `pargs --help` is instant; there heavy imports stand on top.
"""

import sys
import warnings
from importlib import import_module

COMMANDS = {  # name: its file, what it does
    "demo": ("study", "train, decode and compare on a small embedded world, from start to end"),
    "train": ("train", "train a reward model on every prefix of the responses of preference pairs"),
    "generate": ("decode", "generate texts for a file of prompts, guided by a reward model or not"),
    "trace": ("decode", "show one text token by token: what could have followed, what was drawn"),
    "evaluate": ("evaluate", "judge texts of any methods over the same prompts, in one table"),
    "study": ("study", "answer one of nine questions by a grid of experiments"),
    "benchmark": ("benchmark", "measure what a guided token costs"),
    "dpo": ("finetune", "fine-tune the language model itself on preference pairs, to compare with"),
    "ppo": ("finetune", "fine-tune the language model itself on a reward model's scores, to compare with"),
}
USAGE = "usage: pargs COMMAND [options]   (pargs COMMAND --help)\n\n" + "\n".join(
    f"  {name:10} {does}" for name, (_, does) in COMMANDS.items()
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 if `pargs benchmark --check` misses a target; 2 for input that cannot be used, or does not
        fit into memory; 130 when interrupted.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    warnings.formatwarning = lambda message, *_, **__: f"pargs: warning: {message}\n"
    try:
        if name not in COMMANDS:
            raise ValueError(f"no command {name!r}; there are {', '.join(COMMANDS)} (pargs --help)")
        command = getattr(import_module(f"pargs_min.cli.{COMMANDS[name][0]}"), name)
        return command(rest) or 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print("pargs: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pargs: interrupted", file=sys.stderr)
        return 130
