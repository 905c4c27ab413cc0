"""The gold reward of generated texts, as a judge reads it: off token ids, end token included."""

from collections.abc import Sequence
from functools import cache

from pargs_min.world.journey import END, OFF_GRAMMAR, Journey

_world = cache(Journey)  # its automata take a second


def gold_rewards(prompts: Sequence[str], responses: Sequence[Sequence[int]]) -> list[float]:
    """The gold reward of each response (token ids); a response without an end token is off the grammar.

    Raises:
        ValueError: for a prompt that is not one of the world's.
    """
    end, golds = _world().vocabulary[END], _world().gold(prompts, responses)
    return [gold if end in ids else OFF_GRAMMAR for gold, ids in zip(golds, responses, strict=True)]


def off_grammar(gold: float) -> float:
    """1.0 for the gold reward of a text that the grammar cannot have written, else 0.0."""
    return float(gold == OFF_GRAMMAR)
