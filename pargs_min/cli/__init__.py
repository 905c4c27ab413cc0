"""usage: pargs COMMAND [options]   (pargs COMMAND --help)

commands:
  demo       train, decode and compare on a small embedded world, from start to end
  train      train a reward model on every prefix of the responses of preference pairs
  generate   generate texts for a file of prompts, guided by a reward model or not
  trace      show one text token by token: what could have followed, what was drawn
  serve      serve a guided model behind OpenAI's interface, with a playground
  evaluate   judge texts of any methods over the same prompts, in one table
  study      answer an open question by a grid of experiments
  benchmark  measure what a guided token costs
  dpo        fine-tune the language model itself on preference pairs, to compare with
  ppo        fine-tune the language model itself on a reward model's scores, to compare with
"""

import os
import sys
import warnings
from importlib import import_module

# Command -> its file, imported when it is called: `pargs --help` is instant, and heavy imports stand on top of a file.
COMMANDS = dict(demo="study", train="train", generate="decode", trace="decode", serve="serve")
COMMANDS |= dict(evaluate="evaluate", study="study", benchmark="benchmark", dpo="finetune", ppo="finetune")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 if `pargs benchmark --check` misses a target; 2 for input that cannot be used, or does not
        fit into memory; 130 when interrupted; 141 when nobody reads its output any more (`| head`).
    """
    warnings.formatwarning = warning_line
    try:
        try:
            return _run(*(sys.argv[1:] if arguments is None else arguments) or ["--help"])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 141
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print("pargs: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except RuntimeError as error:
        from pargs_min.memory import is_out_of_memory  # torch has been imported by whoever raised this

        if not is_out_of_memory(error):
            raise
        print("pargs: error: out of memory:", " ".join(str(error).split())[:300], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pargs: interrupted", file=sys.stderr)
        return 130


def warning_line(message: Warning | str, *place: object, **source: object) -> str:
    """A warning without its place in the code; workers take the function over, so it has a name."""
    return f"pargs: warning: {message}\n"


def _run(name: str, *arguments: str) -> int:
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; there are {', '.join(COMMANDS)} (pargs --help)")
    command = getattr(import_module(f"pargs_min.cli.{COMMANDS[name]}"), name)
    return command([*arguments]) or 0
