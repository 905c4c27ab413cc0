"""Prompts, noisy preference pairs and a judge of cheerfulness, for the recipe in SMALL_GPU.md.

    python tutorials/cheerful.py prompts FOLDER        # asked.jsonl to make pairs from, prompts.jsonl to decode for
    python tutorials/cheerful.py pairs TEXTS FOLDER    # pairs.jsonl to train guides on, judge_pairs.jsonl for a judge

The three sets of prompts share no topic. A text is preferred to another one with the probability of Bradley and Terry:
sigmoid(4 (c - c')), where c is its VADER sentiment in [-1, 1]. `tutorials.cheerful:compound` judges by c itself.
It needs VADER: pip install vaderSentiment.
"""

import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path

TRAIN = """the weather, a train ride, a dog, the sea, a birthday, an old house, breakfast, a storm, a garden, the moon,
a teacher, a long walk, a letter, winter, a river, a bakery, the night, a market, an exam, a hospital, a farm,
a broken cup, a song, a neighbour, a job interview, a bicycle, a museum, a library, a football match, the rain"""
JUDGE = """a bridge, the desert, a cat, a wedding, the kitchen, a forest, a phone call, a mountain, autumn, a lost key,
a painter, an island, a bus stop, the news, a restaurant, a grandmother, a fire, a boat, a school, a holiday, a doctor,
a shop, a window, a horse, a queue, a factory, a picnic, an airport, a clock, a village"""
TEST = """a lake, a sister, the city, a funeral, a piano, snow, a hotel, an accident, the sun, a soldier, a circus,
a road, a prison, a flower, a friend, a war, a party, a tree, a flood, a baby, the office, a church, a beach,
an illness, a castle, a film, a theatre, an uncle, a desk, spring, a goodbye, a dream"""
SCALE = 4.0  # of the noise in the labels


def asked(topics: str) -> list[list[dict]]:
    """Prompts for a chat model: one message each."""
    said = [f"Write two sentences about {topic}." for topic in topics.replace("\n", " ").split(", ")]
    return [[{"role": "user", "content": content}] for content in said]


def compound(prompts: list[str], responses: list[str]) -> list[float]:
    """The VADER sentiment of each response, in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    return [judge.polarity_scores(response)["compound"] for response in responses]


def pairs(texts: dict[str, list[str]], topics: str, rng: random.Random) -> list[dict]:
    """Pairs of the texts (what was asked -> responses) for these topics, labelled with noise."""
    found = []
    for prompt in asked(topics):
        responses = texts[prompt[0]["content"]]
        for first, second in zip(responses[::2], responses[1::2], strict=True):
            if first.strip() and second.strip() and first != second:
                one, other = compound([], [first, second])
                if rng.random() >= 1 / (1 + math.exp(-SCALE * (one - other))):
                    first, second = second, first
                found.append({"prompt": prompt, "chosen": first, "rejected": second})
    return found


def write(file: Path, records: Iterable[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(what: str, *rest: str) -> None:
    folder = Path(rest[-1])
    if what == "prompts":
        for name, topics in (("asked", f"{TRAIN}, {JUDGE}"), ("prompts", TEST)):
            write(folder / f"{name}.jsonl", ({"prompt": prompt} for prompt in asked(topics)))
        return
    texts: dict[str, list[str]] = {}
    for line in Path(rest[0]).read_text(encoding="utf-8").splitlines():
        text = json.loads(line)
        texts.setdefault(text["prompt"][0]["content"], []).append(text["response"])
    rng = random.Random(0)
    for name, topics in (("pairs", TRAIN), ("judge_pairs", JUDGE)):
        write(folder / f"{name}.jsonl", pairs(texts, topics, rng))


if __name__ == "__main__":
    main(*sys.argv[1:])
