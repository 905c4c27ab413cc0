"""Options of the commands: each field of a dataclass becomes a flag (transformers' `HfArgumentParser`).

The help of a flag is what the dataclass's docstring says under "Args:".
"""

import re
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from dataclasses import field
from inspect import cleandoc
from typing import Any

from transformers import HfArgumentParser


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None and []: the option's help says what they mean. Descriptions keep their lines."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def choice(names: Iterable[str], default: str | None) -> Any:
    """A field for one of these names: for names that a table holds, where `Literal` would be a second list of them."""
    return field(default=default, metadata={"choices": tuple(names)})


def parse(command: Callable, arguments: list[str], *kinds: type, defaults: dict | None = None, **about: Any) -> tuple:
    """One instance of each dataclass, from a command's arguments.

    Args:
        command: names the program, and its docstring describes it.
        kinds: dataclasses whose docstrings explain every field, and every option of the `parents`.
        defaults: name -> value, where they differ from those of the dataclasses.
        about: settings of argparse's parser. What its `parents` parse comes last, as a namespace.

    Raises:
        ValueError: for a flag that there is not, and for whatever the dataclasses themselves refuse.
        SystemExit: from argparse, for --help and for a value that is missing or of the wrong type.
    """
    about = dict(prog=f"pargs {command.__name__}", description=command.__doc__, formatter_class=_Help) | about
    parser = HfArgumentParser(kinds, **about)
    parser.set_defaults(**defaults or {})
    helps = {name: text for kind in kinds for name, text in explained(kind).items()}
    for action in parser._actions:
        action.help = action.help or helps.get(action.dest)
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def explained(kind: type) -> dict[str, str]:
    """Field -> what the docstrings of the dataclass and of its bases say about it under "Args:".

    >>> class Fruit:
    ...     '''What to eat.
    ...
    ...     Args:
    ...         kind: An apple,
    ...             or a pear.
    ...         count: How many.
    ...     '''
    >>> explained(Fruit)
    {'kind': 'An apple, or a pear.', 'count': 'How many.'}
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = cleandoc(base.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        found |= re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found.items()}
