"""The embedded world in miniature: a journey of a few words, small enough to enumerate, for the tutorials.

    flute ridge grim wolves home <end>      she packs a flute, walks the ridge, past grim hills, into wolves, comes home

Each road has its own trouble, each item helps in one trouble, and only who carries the right one comes home. So two
neutral words at the start settle the ending, and no later word undoes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from theory.world import World, bradley_terry_labels

USE = {"flute": "wolves", "rope": "floods"}
TROUBLE = {"ridge": "wolves", "coast": "floods"}
GOLD = {"home": 2.0, "lost": -2.0, "stays": -1.0}
WORDS = (*USE, *TROUBLE, "golden", "grim", *USE.values(), *GOLD, "<end>")
END = WORDS.index("<end>")


def ways(words: Sequence[str]) -> dict[str, float]:
    """ref(. | words), by word."""
    match words:
        case []:
            return {"flute": 0.5, "rope": 0.5}
        case [*_, "home" | "lost" | "stays"]:
            return {"<end>": 1.0}
        case [_]:
            return {"ridge": 0.45, "coast": 0.45, "stays": 0.1}
        case [_, _]:
            return {"golden": 0.5, "grim": 0.5}
        case [_, road, _]:
            return {trouble: 0.9 if trouble == TROUBLE[road] else 0.1 for trouble in USE.values()}
        case [item, *_, trouble]:
            home = 0.9 if trouble == USE[item] else 0.05
            return {"home": home, "lost": 1.0 - home}
    raise ValueError(f"words={words!r}, expected the beginning of a journey")


def miniature() -> World:
    """34 journeys of at most 6 tokens, the end token included, and Bradley-Terry labels on their gold reward.

    >>> world = miniature()
    >>> text(world.prefixes[-1][0])
    'flute ridge golden wolves home <end>'
    """
    probabilities, rewards, open_ends = {}, {}, [[]]
    for words in open_ends:  # grows as it is read
        row = ways(words)
        probabilities[ids(words)] = [row.get(word, 0.0) for word in WORDS]
        if "<end>" in row:
            rewards[ids([*words, "<end>"])] = GOLD[words[-1]]
        else:
            open_ends += [[*words, word] for word in row]
    world = World.from_tables(probabilities, rewards, horizon=6, eos=END)
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def ids(words: Sequence[str]) -> tuple[int, ...]:
    """The token ids of words."""
    return tuple(WORDS.index(word) for word in words)


def text(prefix: Sequence[int]) -> str:
    """The words of a prefix, up to its end token."""
    words = [WORDS[token] for token in prefix]
    return " ".join(words[: words.index("<end>") + 1] if "<end>" in words else words)
