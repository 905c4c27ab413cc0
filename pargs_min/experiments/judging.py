"""The judges by name: those of `evaluation/`, and the gold reward of the embedded world."""

import os
from functools import cache

from pargs_min.evaluation.judges import Judge, load_judge
from pargs_min.reading import Texts, prompt_text
from pargs_min.records import has_ids
from pargs_min.world.journey import END, OFF_GRAMMAR, Journey

_world = cache(Journey)  # its automata take a second


def named_judge(name: str, verdicts: str | os.PathLike = "verdicts.jsonl") -> Judge:
    """The judge of that name: "toy" is the gold reward of the embedded world, any other see `load_judge`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if name == "toy":
        return Judge(name, score=gold_rewards, measures={"off_grammar": lambda gold: float(gold == OFF_GRAMMAR)})
    return load_judge(name, verdicts)


def gold_rewards(texts: Texts) -> list[float]:
    """The gold reward of generated texts, read off their token ids; one without an end token is off the grammar.

    Raises:
        ValueError: for a prompt that is not one of the world's, or a text without token ids.
    """
    for text in texts:
        if not has_ids(text):
            raise ValueError(
                f"prompt number {text['prompt_number']}, sample {text['sample']} has no `response_ids`, which the "
                "judge toy reads"
            )
    end, responses = _world().vocabulary[END], [text["response_ids"] for text in texts]
    golds = _world().gold([prompt_text(text) for text in texts], responses)
    return [gold if end in ids else OFF_GRAMMAR for gold, ids in zip(golds, responses, strict=True)]
