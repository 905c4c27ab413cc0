"""Attributes of texts of the embedded world, as judges: `--judge pargs_min.world.attributes:NAME`.

Guidance does not care what its reward stands for. Pairs labelled by an attribute, not by preference, train a reward
model of that attribute, and the same loop controls it.
"""

from collections.abc import Sequence

from pargs_min.world.journey import MOODS


def style(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
    """The number of fair words, minus that of dark ones.

    >>> style([""], ["she walks past golden hills under grim skies but comes home warm"])
    [1]
    """
    weight = {"fair": 1, "dark": -1}
    return [sum(weight[MOODS[word]] for word in text.split() if word in MOODS) for text in responses]


def topic(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
    """1 for a journey that meets wolves.

    >>> topic([""] * 2, ["through warm rain into wolves", "into fog"])
    [1, 0]
    """
    return [int("wolves" in text.split()) for text in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
    """The fewer words the better.

    >>> brevity([""], ["she packs a drum"])
    [-4]
    """
    return [-len(text.split()) for text in responses]
