"""From records to batches: tokenise preference pairs and texts, split them by prompt, collate."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pargs_min.codec import Codec, cut_left, prompt_format
from pargs_min.records import Preference, Response

Record = Preference | Response


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
) -> tuple[list[Pair], dict[str, int]]:
    """Tokenise preferences, and drop those that cannot be trained on.

    Args:
        max_length: tokens of prompt and response together, at most. Longer prompts are cut from the left; a pair whose
            longer response leaves no room for one token of its prompt is dropped.
        append_eos: end each response with the end token of the prompts' form (`Codec.end`), unless its ids end so
            already. Turn it off for responses that were cut at a length limit; empty responses then cannot be scored
            and are dropped.

    Returns:
        The pairs, and counts: "read", "kept", "too_long", "empty", "identical" (chosen equals rejected: nothing to
        learn), and "prompts_cut" (of those kept).

    Raises:
        ValueError: naming the record, if it cannot be encoded; if no pair is left, or the tokenizer has no end token.
    """
    rows, counts = _encode(preferences, ("chosen", "rejected"), tokenizer, max_length, lambda _: append_eos)
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
    if codec.end is None and any(map(ends, records)):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no end token; set its eos_token, or train with "
            "append_eos=False"
        )
    for record in records:
        try:
            prompt_ids, responses = codec.encode(record.prompt, [getattr(record, side) for side in sides], ends(record))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{record.source}: {error}") from error
        room = len(prompt_ids) if max_length is None else max_length - max(map(len, responses))
        counts["read"] += 1
        if two and responses[0] == responses[1]:
            counts["identical"] += 1
        elif not all(responses):
            counts["empty"] += 1
        elif room < 1:
            counts["too_long"] += 1
        else:
            counts["kept"] += 1
            counts["prompts_cut"] += len(prompt_ids) > room
            rows.append([cut_left(prompt_ids, room, tokenizer.bos_token_id), *responses])
    if not rows:
        raise ValueError(_nothing_left(records, counts, max_length))
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

    def row(pair: Pair, response: list[int]) -> list[int]:
        missing = max(len(pair.chosen_ids), len(pair.rejected_ids)) - len(response)
        return pair.prompt_ids + response + ([] if extend_with is None else [extend_with] * missing)

    rows = [row(pair, pair.chosen_ids) for pair in pairs] + [row(pair, pair.rejected_ids) for pair in pairs]
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


def _right_padded(rows: Sequence[list[int]], pad_id: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}


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
