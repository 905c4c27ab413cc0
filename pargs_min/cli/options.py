"""Options of the commands: each field of a dataclass becomes a flag (transformers' `HfArgumentParser`)."""

from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from typing import Any

from transformers.hf_argparser import HfArg, HfArgumentParser

MODEL = "Language model, the reference: a folder or a hub id."
BETA = "Weight of the reward, in nats per unit of reward: the inverse of the beta of DPO and TRL."
DEVICE = "Default: cuda if available, else cpu."


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None: what that means is said by the option's help. Descriptions keep their lines."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def choice(names: Iterable[str], default: str, help: str) -> Any:
    """A field for one of these names: for names that a table holds, where `Literal` would be a second list of them."""
    return HfArg(default=default, help=help, metadata={"choices": tuple(names)})


def parse(
    command: Callable, arguments: list[str], *kinds: type, defaults: dict | None = None, **settings: Any
) -> tuple:
    """One instance of each dataclass, from a command's arguments.

    Args:
        command: names the program, and its docstring describes it.
        defaults: name -> value, where they differ from those of the dataclasses.
        settings: of argparse's parser.

    Raises:
        ValueError: for a flag that there is not, and for whatever the dataclasses themselves refuse.
        SystemExit: from argparse, for --help and for a value that is missing or of the wrong type.
    """
    about = dict(prog=f"pargs {command.__name__}", description=command.__doc__, formatter_class=_Help)
    parser = HfArgumentParser(kinds, **about | settings)
    parser.set_defaults(**defaults or {})
    return parser.parse_args_into_dataclasses(arguments)
