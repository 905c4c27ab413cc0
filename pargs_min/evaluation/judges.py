"""Who says what a text is worth.

    MODEL                a sequence-classification reward model: a folder or a hub id
    module:function      any Python function of (prompts, responses) -> list of numbers
    URL#MODEL            a language model behind an OpenAI-compatible address, asked which of two responses is better

A judge answers with numbers. Anything else that it says is handed on as it came, to be counted and kept, and never read
as a number.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Real
from typing import Any

from pargs_min.evaluation.chat_judge import ChatJudge
from pargs_min.models import default_device, load_reward_model, load_tokenizer
from pargs_min.progress import progress
from pargs_min.reading import Texts, prompt_text, record_rewards
from pargs_min.reward_model import check_rates_texts

BATCH = 32  # texts that a reward model reads together
LARGEST = 1e100  # reward, so that no mean or variance overflows


@dataclass(frozen=True)
class Judge:
    """Scores texts one by one, or compares them in pairs: it has one of the two functions.

    Args:
        score: texts -> one reward per text.
        compare: ours, theirs -> 1 (ours is better), 0.5 (tie) or 0 per pair.
        measures: further columns of a comparison: name -> function of the judge's answer on a text.
    """

    name: str
    score: Callable[[Texts], list] | None = None
    compare: Callable[[Texts, Texts], list] | None = None
    measures: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)


def load_judge(name: str, verdicts: str | os.PathLike = "verdicts.jsonl") -> Judge:
    """The judge of that name (see the top of this file).

    Args:
        verdicts: where the replies of a language model are kept, so that none is paid for twice.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if name.startswith(("http://", "https://")):
        address, _, model = name.partition("#")
        if not model:
            raise ValueError("a judge's address names no model; write it behind the address: URL#MODEL")
        return Judge(name, compare=ChatJudge(address, model, verdicts).compare)
    return Judge(name, score=function_judge(name) if _is_function(name) else model_judge(name))


def _is_function(name: str) -> bool:
    return ":" in name and "://" not in name and not os.path.exists(name)


def is_number(value: object) -> bool:
    """Whether a judge's answer counts.

    >>> [is_number(value) for value in (1, 0.5, "0.5", None, float("nan"), True, 10**400)]
    [True, True, False, False, False, False, False]
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def judge_code(name: str) -> str | None:
    """The file of a function's module; None for judges of other kinds. Raises ValueError if there is no such module."""
    if not _is_function(name):
        return None
    with _code_of_others(f"judge {name!r} cannot be loaded; expected MODULE:FUNCTION"):
        spec = find_spec(name.partition(":")[0])
        return spec.origin if spec else None


def function_judge(name: str) -> Callable[[Texts], list]:
    """`module:function` of (prompts, responses), two lists of strings; the working directory is searched first."""
    module, _, function = name.partition(":")
    with _code_of_others(f"judge {name!r} cannot be loaded; expected MODULE:FUNCTION"):
        judge = getattr(importlib.import_module(module), function)

    def score(texts: Texts) -> list:
        prompts, responses = [prompt_text(text) for text in texts], [text["response"] for text in texts]
        with _code_of_others(f"judge {name!r} fails"):
            answer = judge(prompts, responses)
            answer = answer.tolist() if hasattr(answer, "tolist") else answer
            if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == len(texts):
                return [_checked(one) for one in answer]
            raise TypeError(f"it must return one number for each of {len(texts)} texts, got {answer!r:.60}")

    return score


def _checked(answer: Any) -> Any:
    """A number as a float, anything else as JSON holds it. Raises ValueError for one too large to take means of."""
    if not is_number(answer):
        return json.loads(json.dumps(answer, default=repr, ensure_ascii=False).encode())
    if abs(number := float(answer)) > LARGEST:
        raise ValueError(f"rewards must lie within ±{LARGEST:g}, got {number:g}")
    return number


@contextmanager
def _code_of_others(what: str) -> Iterator[None]:
    """Context manager: whatever it raises, a ValueError says what. Its modules are searched in the working directory
    first, which it must leave alone."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
        if os.getcwd() != here:
            raise RuntimeError("it changes the working directory")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error!r}") from error
    finally:
        os.chdir(here)
        sys.path.remove(here)


def model_judge(name: str) -> Callable[[Texts], list[float]]:
    """A classifier with one label; each kind reads a text in the form that it was trained on (`record_rewards`).

    Raises:
        ValueError: if there is no such model, or it is not a reward model.
    """
    try:
        model, tokenizer = load_reward_model(name, dtype="auto", device=default_device()), load_tokenizer(name)
        check_rates_texts(model)
    except ValueError as error:
        raise ValueError(
            f"judge {name!r} cannot be loaded: {error}; expected a reward model, MODULE:FUNCTION or URL#MODEL"
        ) from error
    rewards = record_rewards(model, tokenizer)

    def score(texts: Texts) -> list[float]:
        starts = progress(range(0, len(texts), BATCH), desc="judging")
        return [reward for i in starts for reward in rewards(texts[i : i + BATCH])]

    return score
