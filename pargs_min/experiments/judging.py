"""The judges by name: those of `evaluation/`, and the gold reward of the embedded world."""

import os
from collections.abc import Sequence

from pargs_min.evaluation.judges import Judge, load_judge
from pargs_min.evaluation.reading import prompt_text
from pargs_min.world.gold import gold_rewards, off_grammar


def named_judge(name: str, verdicts: str | os.PathLike = "verdicts.jsonl") -> Judge:
    """The judge of that name: "toy" is the gold reward of the embedded world, any other see `load_judge`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if name == "toy":
        return Judge(name, score=_gold_rewards, measures={"off_grammar": off_grammar})
    return load_judge(name, verdicts)


def _gold_rewards(texts: Sequence[dict]) -> list[float]:
    return gold_rewards([prompt_text(text) for text in texts], [text["response_ids"] for text in texts])
