"""From records to batches: tokenise preference pairs and texts, split them by prompt, resample and group, collate."""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pargs_min.codec import Codec, cut_left, prompt_format
from pargs_min.records import Preference, Response

Record = Preference | Response
SHOWN = 32  # texts of a file that show which tokenizer's ids it holds
ALONE = "no prompt has two texts to compare; write several with `pargs generate --method plain --num-samples N`"


class Pair(NamedTuple):
    """A preference as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Text(NamedTuple):
    """A prompt and one response as token ids, and the reward of the whole (nan if not rated)."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float = math.nan


def encode_preferences(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    append_eos: bool = True,
    form: str | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Tokenise preferences, and drop those that cannot be trained on.

    Args:
        max_length: tokens of prompt and response together, at most. Longer prompts are cut from the left; a pair whose
            longer response leaves no room for one token of its prompt is dropped.
        append_eos: end each response with the end token of the prompts' form (`Codec.end`), unless its ids end so
            already. Turn it off for responses that were cut at a length limit; empty responses then cannot be scored
            and are dropped.
        form: that the prompts are brought to; None means their own.

    Returns:
        The pairs, and counts: "read", "kept", "too_long", "empty", "identical" (chosen equals rejected: nothing to
        learn), and "prompts_cut" (of those kept).

    Raises:
        ValueError: naming the record, if it cannot be encoded; if no pair is left, or the tokenizer has no end token.
    """
    rows, counts = _encode(preferences, ("chosen", "rejected"), tokenizer, max_length, lambda _: append_eos, form)
    return [Pair(*row) for row in rows], counts


def encode_texts(
    responses: Sequence[Response],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    form: str | None = None,
) -> tuple[list[Text], dict[str, int]]:
    """Tokenise texts as `encode_preferences` does; a finished response ends with the end token, a cut one does not.

    Args:
        form: that the prompts are brought to; None means their own.

    Returns:
        The texts, and counts: "read", "kept", "too_long", "empty", "prompts_cut".

    Raises:
        ValueError: naming the record, if it cannot be encoded; if none is left, or the tokenizer has no end token.
    """
    codec = Codec(tokenizer, form)
    for one in responses[:SHOWN]:
        known = {"response": one.text, "response_ids": one.response, "finished": one.finished}
        if one.text and not codec.wrote(known):
            raise ValueError(
                f"{one.source}: its response_ids are not of the tokenizer {tokenizer.name_or_path}, by which they are "
                f"not {one.text!r:.60}; take texts of the model that is trained, or of one with its tokenizer"
            )
    rows, counts = _encode(responses, ("response",), tokenizer, max_length, lambda text: text.finished, form)
    return [Text(prompt_ids, response_ids) for prompt_ids, response_ids in rows], counts


def records_form(records: Iterable[Record]) -> str:
    """The form of the records' prompts (`prompt_format`); of texts that say so, what they were written for.

    Raises:
        ValueError: if there are several.
    """
    said = {record.form if isinstance(record, Response) else None for record in records}
    form = said.pop() if len(said) == 1 else None
    return form or prompt_format(record.prompt for record in records)


def training_form(records: Sequence[Record], eval_records: Sequence[Record] = ()) -> str:
    """The form of all prompts; beside chats, prompts of text to evaluate on may be users' messages without a role.

    Raises:
        ValueError: as `records_form`.
    """
    forms = [records_form(some) for some in (records, eval_records) if some]
    return "chat" if forms == ["chat", "text"] else records_form([*records, *eval_records])


def _encode(
    records: Sequence[Record],
    sides: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    ends: Callable[[Any], bool],
    form: str | None = None,
) -> tuple[list[list[list[int]]], dict[str, int]]:
    """[prompt_ids, response_ids of each side] of every record that can be trained on, and counts of all."""
    two = ("identical",) if len(sides) == 2 else ()
    counts = dict.fromkeys(("read", "kept", "too_long", "empty", *two, "prompts_cut"), 0)
    if not records:
        raise ValueError(_nothing_left(records, counts, max_length))
    rows, codec = [], Codec(tokenizer, form or records_form(records))
    if codec.form == "text" and tokenizer.chat_template:
        warnings.warn(
            "the prompts are text, which is continued as it stands though the tokenizer has a chat template; "
            'a guide of chats learns from messages: {"prompt": [{"role": "user", "content": ...}], ...}',
            stacklevel=2,
        )
    if codec.end is None and any(map(ends, records)):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no end token; set its eos_token, or train with "
            "append_eos=False"
        )
    longest: dict[tuple[int, ...], int] = {}  # response to each prompt, which is cut alike for all: it stays one prompt
    for record in records:
        try:
            prompt_ids, responses = codec.encode(record.prompt, [getattr(record, side) for side in sides], ends(record))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{record.source}: {error}") from error
        length = max(map(len, responses))
        counts["read"] += 1
        if two and responses[0] == responses[1]:
            counts["identical"] += 1
        elif not all(responses):
            counts["empty"] += 1
        elif max_length is not None and length >= max_length:
            counts["too_long"] += 1
        else:
            counts["kept"] += 1
            longest[tuple(prompt_ids)] = max(length, longest.get(tuple(prompt_ids), 0))
            rows.append([prompt_ids, *responses])
    if not rows:
        raise ValueError(_nothing_left(records, counts, max_length))
    if max_length is not None:
        for row in rows:
            whole, room = row[0], max_length - longest[tuple(row[0])]
            row[0] = cut_left(whole, room, tokenizer.bos_token_id)
            counts["prompts_cut"] += len(whole) > room
    return rows, counts


def _nothing_left(records: Sequence[Record], counts: dict[str, int], max_length: int | None) -> str:
    what = "pair" if "identical" in counts else "text"
    where = records[0].source if records else f"no {'preferences' if what == 'pair' else 'texts'} given"
    if counts.get("identical") == counts["read"]:
        return f"{where} and all that follow: chosen equals rejected everywhere; there is no preference to learn"
    return (
        f"{where} and all that follow: no {what} left of {counts['read']}: {counts['too_long']} responses longer than "
        f"max_length={max_length}, {counts['empty']} empty, {counts.get('identical', 0)} identical; raise "
        "--max-length, or append end tokens"
    )


def split_by_prompt(pairs: Sequence[Pair], fraction: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Hold out a fraction of the prompts, with all their pairs: (pairs to train on, pairs held out).

    Raises:
        ValueError: if `fraction` is not in [0, 1), or leaves one side without a prompt.

    >>> pairs = [Pair([prompt], [5], [6]) for prompt in (1, 2, 3, 3)]
    >>> train, held_out = split_by_prompt(pairs, 0.3)
    >>> {p.prompt_ids[0] for p in train} & {p.prompt_ids[0] for p in held_out}
    set()
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction (--eval-fraction) must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return list(pairs), []
    prompts = sorted({tuple(pair.prompt_ids) for pair in pairs})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, round(fraction * len(prompts)))])
    if len(held_out) == len(prompts):
        raise ValueError(f"cannot hold out {fraction} of {len(prompts)} prompts; give more prompts, or fraction 0")
    train = [pair for pair in pairs if tuple(pair.prompt_ids) not in held_out]
    return train, [pair for pair in pairs if tuple(pair.prompt_ids) in held_out]


# ---- rated samples of the reference ----


def by_prompt(texts: Iterable[Text]) -> list[list[Text]]:
    """The texts of each prompt, in order.

    >>> [len(some) for some in by_prompt([Text([1], [5]), Text([2], [5]), Text([1], [6])])]
    [2, 1]
    """
    found: dict[tuple[int, ...], list[Text]] = {}
    for text in texts:
        found.setdefault(tuple(text.prompt_ids), []).append(text)
    return list(found.values())


def reward_weights(texts: Sequence[Text], beta: float) -> Tensor:
    """softmax(beta r) over the texts of one prompt, in float64."""
    return (beta * torch.tensor([text.reward for text in texts], dtype=torch.float64)).softmax(0)


def effective_texts(texts: Iterable[Text], beta: float) -> Tensor:
    """(prompts,) effective sample size of each prompt's texts under weights exp(beta r): (sum w)^2 / sum w^2.

    Source: Kish (1965).

    >>> effective_texts([Text([1], [5], 0.0), Text([1], [6], 0.0), Text([2], [5], 0.0), Text([2], [6], 9.0)], beta=9.0)
    tensor([2., 1.], dtype=torch.float64)
    """
    return torch.stack([1 / reward_weights(some, beta).square().sum() for some in by_prompt(texts)])


def centred(*parts: Sequence[Text], lam: float) -> list[list[Text]]:
    """Each part's texts, with log mean exp(lam r) / lam over all texts of their prompt taken off their rewards; without
    texts that are alone with their prompt, whose weight would be 1 whatever they are worth.

    exp(lam r) is then 1 on average over the texts of each prompt, and n times `reward_weights`: a prompt whose texts
    all have large rewards does not outweigh the others. To the tilt of a policy, which compares texts of one prompt, a
    number taken off all of them is nothing.

    Raises:
        ValueError: if lam is not a positive number, or no prompt has two texts to compare.

    >>> rated = [Text([1], [5], 0.0), Text([1], [6], 0.0), Text([2], [5], 8.0), Text([2], [6], 8.0)]
    >>> [round(math.exp(2.0 * text.reward), 6) for text in centred(rated, lam=2.0)[0]]
    [1.0, 1.0, 1.0, 1.0]
    """
    if not 0 < lam < math.inf:
        raise ValueError(f"lam (--lambda) must be a positive number, got {lam}")
    groups = by_prompt(chain(*parts))
    if max(map(len, groups), default=2) < 2:
        raise ValueError(ALONE)
    levels = {}
    for some in (group for group in groups if len(group) > 1):
        rewards = torch.tensor([text.reward for text in some], dtype=torch.float64)
        levels[tuple(some[0].prompt_ids)] = float((lam * rewards).logsumexp(0) - math.log(len(some))) / lam
    kept = ([text for text in part if tuple(text.prompt_ids) in levels] for part in parts)
    return [[text._replace(reward=text.reward - levels[tuple(text.prompt_ids)]) for text in part] for part in kept]


def reweighted(texts: Sequence[Text], beta: float, seed: int = 0) -> list[Text]:
    """As many texts for each prompt, drawn from its own with probability softmax(beta r): samples of the RLHF policy.

    The draw is systematic: a text of weight w among n comes floor(n w) or ceil(n w) times.

    Raises:
        ValueError: if beta is not a positive number, or a prompt has a single text, whose weight says nothing.

    Source: Kitagawa (1996), systematic resampling.

    >>> [text.response_ids for text in reweighted([Text([1], [5], 0.0), Text([1], [6], 1.0)], beta=50.0)]
    [[6], [6]]
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, got {beta}")
    rng, drawn, groups = np.random.default_rng(seed), [], by_prompt(texts)
    if alone := sum(len(some) < 2 for some in groups):
        raise ValueError(
            f"{alone} of {len(groups)} prompts have one text each: reweighting compares the texts of a prompt; write "
            "several with `pargs generate --method plain --num-samples N`"
        )
    for some in groups:
        edges = reward_weights(some, beta).cumsum(0)[:-1].numpy()
        places = np.searchsorted(edges, (rng.random() + np.arange(len(some))) / len(some), side="right")
        drawn += [some[place] for place in places]
    return drawn


def in_groups(texts: Iterable[Text], size: int) -> list[list[Text]]:
    """The texts in groups of one prompt, at most `size` in each and about equally many; a text alone is left out.

    Raises:
        ValueError: if size is below 2, or no prompt has two texts.

    >>> [len(group) for group in in_groups([Text([1], [i]) for i in range(9)] + [Text([2], [5])], size=8)]
    [5, 4]
    """
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    groups = []
    for some in by_prompt(texts):
        count = math.ceil(len(some) / size)
        groups += [some[start::count] for start in range(count)]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        raise ValueError(ALONE)
    return groups


def collate(pairs: Sequence[Pair], pad_id: int, extend_with: int | None = None) -> dict[str, Tensor]:
    """A batch of B pairs as 2B rows, chosen responses first: one forward pass scores both sides.

    Args:
        pad_id: any id; padding is on the right, and masks come from lengths, never from ids.
        extend_with: the end token, to continue the shorter response of each pair with visible end tokens up to the
            longer one's length, as the partial objective wants with `tail="extend"`; None leaves responses as they are.

    Returns:
        `input_ids`, `attention_mask`: (2B, T); `prompt_lengths`, `chosen_lengths`, `rejected_lengths`: (B,) in tokens,
        the responses' own, not counting what they were extended by.

    >>> collate([Pair([1], [5, 6, 2], [2])], pad_id=0, extend_with=2)["input_ids"]
    tensor([[1, 5, 6, 2],
            [1, 2, 2, 2]])
    """
    longest = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    rows = [
        _row(pair.prompt_ids, pair[side], length, extend_with)
        for side in (1, 2)
        for pair, length in zip(pairs, longest, strict=True)
    ]
    prompts, chosen, rejected = torch.tensor([[len(ids) for ids in pair] for pair in pairs]).unbind(1)
    return _right_padded(rows, pad_id) | {
        "prompt_lengths": prompts,
        "chosen_lengths": chosen,
        "rejected_lengths": rejected,
    }


def collate_texts(texts: Sequence[Text], pad_id: int) -> dict[str, Tensor]:
    """A batch of B texts, padded on the right.

    Returns:
        `input_ids`, `attention_mask`: (B, T); `prompt_lengths`, `response_lengths`: (B,) in tokens; `rewards`: (B,).

    >>> collate_texts([Text([1], [5, 2], 0.5), Text([1], [2], 1.0)], pad_id=0)["input_ids"]
    tensor([[1, 5, 2],
            [1, 2, 0]])
    """
    return _right_padded([text.prompt_ids + text.response_ids for text in texts], pad_id) | {
        "prompt_lengths": torch.tensor([len(text.prompt_ids) for text in texts]),
        "response_lengths": torch.tensor([len(text.response_ids) for text in texts]),
        "rewards": torch.tensor([text.reward for text in texts]),
    }


def collate_groups(groups: Sequence[Sequence[Text]], pad_id: int, extend_with: int | None = None) -> dict[str, Tensor]:
    """A batch of groups of rated texts of one prompt as one row per text, and all P pairs within a group.

    The text with the higher reward is the chosen one.

    Args:
        extend_with: the end token, to continue every response up to the longest of its group, see `collate`.

    Returns:
        `input_ids`, `attention_mask`: (texts, T); `rows`: (2P,) the texts of the pairs, chosen ones first;
        `prompt_lengths`, `chosen_lengths`, `rejected_lengths`: (P,) in tokens; `won`: (P,) sigmoid of the difference of
        rewards; `group`: (P,) which group a pair is of.

    >>> collate_groups([[Text([1], [5], 0.0), Text([1], [6], 2.0)]], pad_id=0)["rows"]
    tensor([0, 1])
    """
    texts: list[Text] = []
    pairs, rows = [], []
    for number, group in enumerate(groups):
        longest = max(len(text.response_ids) for text in group)
        pairs += [(number, len(texts) + i, len(texts) + j) for i, j in combinations(range(len(group)), 2)]
        texts += sorted(group, key=lambda text: -text.reward)
        rows += [_row(text.prompt_ids, text.response_ids, longest, extend_with) for text in texts[-len(group) :]]
    batch = collate_texts(texts, pad_id) | _right_padded(rows, pad_id)
    group_of, chosen, rejected = torch.tensor(pairs).unbind(1)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "rows": torch.cat([chosen, rejected]),
        "prompt_lengths": batch["prompt_lengths"][chosen],
        "chosen_lengths": batch["response_lengths"][chosen],
        "rejected_lengths": batch["response_lengths"][rejected],
        "won": torch.sigmoid(batch["rewards"][chosen] - batch["rewards"][rejected]),
        "group": group_of,
    }


def _row(prompt_ids: list[int], response_ids: list[int], length: int, extend_with: int | None) -> list[int]:
    """Prompt and response; the response continued by end tokens up to so many, if there is an end token."""
    return prompt_ids + response_ids + ([] if extend_with is None else [extend_with] * (length - len(response_ids)))


def _right_padded(rows: Sequence[list[int]], pad_id: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def at_response_tokens(values: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The values at the tokens of the responses of a collated batch, right padded: (chosen, rejected), each (B, T').

    T' is the length of the longest response of the batch. What stands beyond a response and its extension is
    arbitrary.

    >>> batch = collate([Pair([1], [5, 6, 2], [7, 2])], pad_id=0)
    >>> at_response_tokens(batch["input_ids"], batch)
    (tensor([[5, 6, 2]]), tensor([[7, 2, 0]]))
    """
    width = int(torch.maximum(batch["chosen_lengths"], batch["rejected_lengths"]).max())
    chosen, rejected = from_columns(values, batch["prompt_lengths"].repeat(2), width).chunk(2)
    return chosen, rejected


def from_columns(values: Tensor, first: Tensor, width: int) -> Tensor:
    """(B, width) of each row's values from column first[b] on; beyond the last column the last value again.

    >>> from_columns(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([0, 1]), width=2)
    tensor([[0, 1],
            [4, 5]])
    """
    columns = first[:, None] + torch.arange(width, device=values.device)
    return values.gather(1, columns.clamp(max=values.shape[1] - 1))
