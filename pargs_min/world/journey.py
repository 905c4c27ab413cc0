"""The world that the package carries with it: a traveller packs one thing, and much later it matters.

    the sailor leaves for the island : she packs a small flute and walks the ridge past golden hills into wolves
    but comes home warm with songs

A grammar writes such journeys, 8 to 24 words, for twelve prompts (a role and a place). Each road of a place has its
own trouble, each item helps in one trouble, and only a traveller who carries the right thing comes home. So the item
and the road, neutral words at the start, all but settle the ending, and no later word undoes them; the words on the way
mislead (under fair skies a traveller strays from her road). The gold reward depends on how the journey ends. All of it
is a finite automaton over words, so values are known exactly (`automaton.py`).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import product, takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pargs_min.world.automaton import Array, Automaton, sample

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
HORIZON = 25  # tokens in the longest journey, its end token included
OFF_GRAMMAR = -3.5  # the gold reward of a word string that the grammar cannot have written

# The words: openings and adjectives with their weights; the items that help in each trouble; what each role packs most
# often; the trouble of each road of a place; the mood of each word for a sight, and the sights; what the words of an
# ending, and gifts, add to the gold reward.
OPENINGS, ADJECTIVES, HELP, HABIT, ROADS, MOODS, SIGHTS, HOME, AWAY, GIFTS = json.loads(
    Path(__file__).with_suffix(".json").read_text("utf-8")
).values()
TROUBLES = tuple(HELP)
CLOSINGS = (3, END, 0.0), *((1, f"with {gift}", value) for gift, value in GIFTS.items())  # weight, words, gold
USE = {item: trouble for trouble, items in HELP.items() for item in items}

DEPARTURE = "the {} leaves for the {} :"
PROMPTS = tuple(DEPARTURE.format(role, place) for role in HABIT for place in ROADS)
HELD_OUT_PROMPTS = tuple(map(DEPARTURE.format, HABIT, ("mountain", "forest", "island", "mountain")))  # one per role
TRAIN_PROMPTS = tuple(prompt for prompt in PROMPTS if prompt not in HELD_OUT_PROMPTS)

# A place in the story, and a way on from it: how likely, which words, and the place they lead to.
Place = tuple
Way = tuple[Fraction | int, str, Place]
# A state of the automaton: all that can still be written, as ((words, place after them), probability) pairs.
State = tuple[tuple[tuple[str, Place], Fraction], ...]
Moves = list[dict[str, tuple[Fraction, int]]]  # of each state, by number: word -> (probability, next state)


@dataclass(frozen=True)
class Journey:
    """The grammar and its gold reward.

    Args:
        stay_home_reward: gold of never leaving; 0 makes it a safe exit.
        luck: P(home | trouble she is not prepared for): how far a first mistake can still be undone.

    >>> world = Journey()
    >>> world.gold(["the baker leaves for the forest :"] * 2, ["she packs a drum and then stays home", "she packs"])
    [-2.0, -3.5]
    """

    stay_home_reward: float = -2.0
    luck: Fraction = Fraction(1, 200)

    def ways(self, place: Place) -> Iterator[Way]:
        """The grammar: the ways on from a place in the story. Their weights are proportional to probabilities."""
        match place:
            case "start", role, land:
                yield from ((n, f"{opening} packs a", ("packing", role, land)) for n, opening in OPENINGS)
            case "packing", role, land:
                for (n, adjective), (item, use) in product(ADJECTIVES, USE.items()):
                    yield n * (3 if item == HABIT[role] else 1), f"{adjective} {item}".lstrip(), ("packed", use, land)
            case "packed", use, land:
                for road, trouble in ROADS[land].items():
                    yield 23, f"and walks the {road}", ("road", use, trouble, "plain", 2)
                yield 8, "and then stays home", ("end", self.stay_home_reward)
            case "road", use, own, mood, sights_left:
                for trouble, p in trouble_ahead(use, own, mood).items():
                    yield p, f"into {trouble}", ("trouble", trouble == use)
                for preposition in SIGHTS if sights_left else ():
                    yield Fraction(1, len(SIGHTS)), preposition, ("sight", preposition, use, own, sights_left - 1)
            case "sight", preposition, use, own, sights_left:
                for (word, mood), noun in product(MOODS.items(), SIGHTS[preposition]):
                    yield 1, f"{word} {noun}", ("road", use, own, mood, sights_left)
            case "trouble", prepared:
                home = Fraction(17, 20) if prepared else self.luck
                yield home, "but comes home", ("ending", True)
                yield 1 - home, "and ends up", ("ending", False)
            case "ending", at_home:
                reward, feelings = (2.0, HOME) if at_home else (-2.0, AWAY)
                for (word, value), (n, phrase, more) in product(feelings.items(), CLOSINGS):
                    yield n, f"{word} {phrase}", ("end", reward + value + more)
            case "end", _:
                yield 1, END, place

    @property
    @cache  # noqa: B019 - equal worlds, of which there are few, are made once
    def _stories(self) -> dict[str, tuple[list[State], Moves]]:
        """For each prompt its states, the first one first, and the moves from each."""
        stories, moves_from = {}, cache(self._moves)
        for prompt in PROMPTS:
            _, role, *_, land, _ = prompt.split()
            states = [self._state([("", ("start", role, land), Fraction(1))])]
            number, moves = {states[0]: 0}, []
            for state in states:  # grows as it is read
                onward = moves_from(state)
                states += dict.fromkeys(then for *_, then in onward if then not in number)
                moves.append({word: (p, number.setdefault(then, len(number))) for word, p, then in onward})
            stories[prompt] = states, moves
        return stories

    def _moves(self, state: State) -> list[tuple[str, Fraction, State]]:
        """The next words of a state: each with its probability and what can be written after it."""
        rest = defaultdict(list)
        for (words, place), p in state:
            word, _, left = words.partition(" ")
            rest[word].append((left, place, p))
        return [(word, Fraction(sum(p for *_, p in options)), self._state(options)) for word, options in rest.items()]

    def _state(self, options: Iterable[tuple[str, Place, Fraction]]) -> State:
        """The state of these (words, place after them, weight): what can follow, equal continuations added up.

        Prefixes that the same words may follow, to the same places, share a state: the automaton forgets the rest.
        """
        future: dict[tuple[str, Place], Fraction] = defaultdict(Fraction)
        for left, place, p in options:
            ways = [(1, left, place)] if left else [*self.ways(place)]
            weights = sum(weight for weight, *_ in ways)
            for weight, words, then in ways:
                future[words, then] += p * Fraction(weight) / weights
        total = sum(future.values())
        return tuple((key, p / total) for key, p in future.items())

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every word and its id: pad, end, unknown, then the words of prompts and journeys in alphabetical order."""
        words = {word for _, moves in self._stories.values() for move in moves for word in move}
        words |= {word for prompt in PROMPTS for word in prompt.split()}
        return {word: i for i, word in enumerate([PAD, END, UNKNOWN, *sorted(words - {END})])}

    @cached_property
    def words(self) -> list[str]:
        """The word of each id."""
        return list(self.vocabulary)

    @cached_property
    def automata(self) -> dict[str, Automaton]:
        """The automaton of each prompt; the reward of an unfinished state is that of an off-grammar text."""
        automata, ids = {}, self.vocabulary
        for prompt, (states, moves) in self._stories.items():
            edges = [(i, ids[word], j, float(p)) for i, onward in enumerate(moves) for word, (p, j) in onward.items()]
            sources, tokens, targets, p = map(np.array, zip(*edges, strict=True))
            rewards = np.array([_final_reward(state) for state in states])
            automata[prompt] = Automaton(sources, tokens, targets, np.log(p), rewards, start=0, horizon=HORIZON)
        return automata

    def write(self, uniforms: Array, prompts: Sequence[str] = PROMPTS) -> tuple[NDArray[np.int64], Array]:
        """Journeys by the grammar itself, row i for prompts[i % len(prompts)]: tokens and their log-probabilities.

        uniforms (N, HORIZON) in [0, 1); results (N, HORIZON), after the end more end tokens, of log-probability 0.
        """
        tokens, log_probs = np.empty(uniforms.shape, dtype=np.int64), np.empty(uniforms.shape)
        for i, prompt in enumerate(prompts):
            rows = slice(i, None, len(prompts))
            tokens[rows], log_probs[rows] = sample(self.automata[prompt], uniforms[rows])
        return tokens, log_probs

    def gold(self, prompts: Sequence[str], responses: Sequence[str | Sequence[int]]) -> list[float]:
        """The gold reward of each response, as text or as token ids, to its prompt.

        A response ends at its first end token, if it has one. What the grammar cannot have written, an unfinished
        journey included, is worth OFF_GRAMMAR. Raises ValueError for a prompt that is not among PROMPTS.
        """
        return [self._gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _gold(self, prompt: str, response: str | Sequence[int]) -> float:
        stories = self._stories
        if prompt not in stories:
            raise ValueError(f"prompt must be one of the world's twelve (PROMPTS), got {prompt!r}")
        (states, moves), state = stories[prompt], 0
        words = response.split() if isinstance(response, str) else map(self.words.__getitem__, response)
        for word in (*takewhile(END.__ne__, words), END):
            if word not in moves[state]:
                return OFF_GRAMMAR
            _, state = moves[state][word]
        return _final_reward(states[state])


def _final_reward(state: State) -> float:
    (words, place), _ = state[0]
    return place[1] if words == END and len(state) == 1 else OFF_GRAMMAR


def trouble_ahead(use: str, own: str, mood: str) -> dict[str, Fraction]:
    """P(trouble) for a traveller who packed against `use`, on a road of the trouble `own`, after the last mood she saw.

    Dark moods keep her on her road, where she meets its own trouble; under fair ones she strays to where what she
    packed is of no use.
    """
    likely, p = (use, Fraction(3, 20)) if mood == "fair" else (own, Fraction(19 if mood == "dark" else 13, 20))
    return {trouble: p if trouble == likely else (1 - p) / (len(TROUBLES) - 1) for trouble in TROUBLES}
