"""From preference records to batches: format and tokenise, split by prompt, collate.

Prompt and response are tokenised apart and joined as ids. A model that decodes continues ids; tokenising the joined
text can merge tokens across the boundary, into ids that decoding never meets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pargs_min.records import ASSISTANT, Messages, Preference, Response, is_messages


class Pair(NamedTuple):
    """A preference as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Text(NamedTuple):
    """A prompt and one response as token ids, and the reward of the whole (nan until somebody gave one)."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float = math.nan


def prompt_format(prompts: Iterable[str | Messages | list[int]]) -> str:
    """The form that all prompts have: "text", "dialogue" (ends in "Assistant:", as in HH-RLHF), "chat" or "ids".

    Training records it with the reward model, and decoding applies it: a reward model judges what it was trained on.

    Raises:
        ValueError: if the forms differ.

    >>> prompt_format(["Once upon a time", "One day"])
    'text'
    """
    formats = {_form(prompt) for prompt in prompts}
    if len(formats) != 1:
        raise ValueError(
            f"prompts must all have one form, got {', '.join(sorted(formats)) or 'no prompt'}: a reward model is "
            "trained on one form; split the data"
        )
    return formats.pop()


def _form(prompt: str | Messages | list[int]) -> str:
    if isinstance(prompt, str):
        return "dialogue" if prompt.endswith(ASSISTANT) else "text"
    return "chat" if is_messages(prompt) else "ids"


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages | list[int],
    prompt_format: str | None = None,
    max_length: int | None = None,
) -> list[int]:
    """Token ids of a prompt: the one function that training and decoding share.

    Text gets the tokenizer's own start token, if it has one; messages go through its chat template, which writes its
    own; token ids stay as they are.

    Args:
        prompt: text, messages {role, content}, or token ids.
        prompt_format: what the reward model was trained on. "chat" makes text the message of a user, "dialogue" makes
            it the turn of a human; with any other the prompt is taken as it is.
        max_length: keep the last so many tokens; a start token counts, and stays in front.

    Raises:
        ValueError: if messages are given but the tokenizer has no chat template, or the reward model was trained on
            text; if the prompt has no token at all, or one that the tokenizer does not know.
    """
    if isinstance(prompt, str) and prompt_format == "chat":
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) and prompt_format == "dialogue" and not prompt.endswith(ASSISTANT):
        prompt = f"\n\nHuman: {prompt}{ASSISTANT}"
    if is_messages(prompt):
        ids = _encode_messages(tokenizer, prompt, prompt_format)
    else:
        ids = _encode_text(tokenizer, prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no token, and the tokenizer adds no start token; give some text")
    _check_ids(tokenizer, ids)
    return ids if max_length is None else _cut_left(ids, max_length, tokenizer.bos_token_id)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt_format: str | None) -> list[int]:
    if prompt_format in ("text", "dialogue"):
        raise ValueError(f"prompt is a list of messages, but the reward model was trained on {prompt_format} prompts")
    if not tokenizer.chat_template:
        raise ValueError("prompt is a list of messages, but the tokenizer has no chat template; give it as text")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the tokenizer's start tokens, but without the end token that some tokenizers add: the text goes on."""
    ids, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    end = next(end for end in range(len(bare), len(ids) + 1) if ids[end - len(bare) : end] == bare)
    return ids[:end] if bare else [i for i in ids if i == tokenizer.bos_token_id]


def _cut_left(ids: list[int], length: int, start_token: int | None) -> list[int]:
    """The last `length` >= 1 tokens; a start token counts, and stays in front.

    >>> _cut_left([1, 5, 6, 7], 3, start_token=1)
    [1, 6, 7]
    """
    kept = 1 if ids[0] == start_token else 0
    return ids if len(ids) <= length else ids[:kept] + ids[len(ids) - length + kept :]


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of responses, without start or end token. Blank text has none; token ids stay as they are.

    Tokenizers of the SentencePiece kind begin every text with a space of their own. With those, the space that a
    response begins with (after "Assistant:", say) is dropped, or there would be two.
    """
    own_space = any(token.startswith("▁") for token in tokenizer.tokenize("a"))
    texts = [text if text.strip() else "" for text in responses if isinstance(text, str)]
    texts = [text.removeprefix(" ") if own_space else text for text in texts]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    return [next(encoded) if isinstance(response, str) else response for response in responses]


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
        append_eos: end each response with the tokenizer's end token, unless its ids end so already. Turn it off for
            responses that were cut at a length limit. Without it an empty response cannot be scored: it is dropped.

    Returns:
        The pairs, and counts: "read", "kept", "too_long", "empty", "identical" (chosen equals rejected: nothing to
        learn), and "prompts_cut" (of those kept).

    Raises:
        ValueError: naming the record, if it cannot be encoded; if no pair is left, or the tokenizer has no end token.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set its eos_token, or train with append_eos=False")
    counts = dict.fromkeys(("read", "kept", "too_long", "empty", "identical", "prompts_cut"), 0)
    pairs = []
    for preference, *responses in zip(
        preferences,
        encode_responses(tokenizer, [p.chosen for p in preferences]),
        encode_responses(tokenizer, [p.rejected for p in preferences]),
        strict=True,
    ):
        prompt_ids = _encode_checked(preference, tokenizer, responses)
        if append_eos:
            end = [tokenizer.eos_token_id]
            responses = [ids if ids[-1:] == end else ids + end for ids in responses]
        room = len(prompt_ids) if max_length is None else max_length - max(map(len, responses))
        counts["read"] += 1
        if responses[0] == responses[1]:
            counts["identical"] += 1
        elif not all(responses):
            counts["empty"] += 1
        elif room < 1:
            counts["too_long"] += 1
        else:
            counts["kept"] += 1
            counts["prompts_cut"] += len(prompt_ids) > room
            pairs.append(Pair(_cut_left(prompt_ids, room, tokenizer.bos_token_id), *responses))
    if not pairs:
        raise ValueError(_nothing_left(preferences, counts, max_length))
    return pairs, counts


def encode_texts(
    responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[list[Text], dict[str, int]]:
    """Tokenise texts as `encode_preferences` does; a finished response ends with the end token, a cut one does not.

    Returns:
        The texts, and counts: "read", "kept", "too_long", "empty", "prompts_cut".

    Raises:
        ValueError: naming the record, if it cannot be encoded; if none is left, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set its eos_token")
    counts = dict.fromkeys(("read", "kept", "too_long", "empty", "prompts_cut"), 0)
    texts, end = [], [tokenizer.eos_token_id]
    for response, ids in zip(responses, encode_responses(tokenizer, [r.response for r in responses]), strict=True):
        ids = ids + end if response.finished and ids[-1:] != end else ids
        prompt_ids = _encode_checked(response, tokenizer, [ids])
        room = len(prompt_ids) if max_length is None else max_length - len(ids)
        counts["read"] += 1
        if not ids:
            counts["empty"] += 1
        elif room < 1:
            counts["too_long"] += 1
        else:
            counts["kept"] += 1
            counts["prompts_cut"] += len(prompt_ids) > room
            texts.append(Text(_cut_left(prompt_ids, room, tokenizer.bos_token_id), ids))
    if not texts:
        raise ValueError(
            f"{responses[0].source if responses else 'no texts given'} and all that follow: no text left of "
            f"{counts['read']}: {counts['too_long']} longer than max_length={max_length}, {counts['empty']} empty"
        )
    return texts, counts


def _encode_checked(
    record: Preference | Response, tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]
) -> list[int]:
    try:
        for ids in responses:
            _check_ids(tokenizer, ids)
        return encode_prompt(tokenizer, record.prompt)
    except ValueError as error:
        raise ValueError(f"{record.source}: {error}") from None


def _check_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    if max(ids, default=0) >= len(tokenizer):
        raise ValueError(
            f"token id {max(ids)} is outside the tokenizer's vocabulary of {len(tokenizer)}; "
            "the ids were made with another tokenizer"
        )


def _nothing_left(preferences: Sequence[Preference], counts: dict[str, int], max_length: int | None) -> str:
    where = preferences[0].source if preferences else "no preferences given"
    if counts["identical"] == counts["read"]:
        return f"{where} and all that follow: chosen equals rejected everywhere; there is no preference to learn"
    return (
        f"{where} and all that follow: no pair left of {counts['read']}: {counts['too_long']} responses longer than "
        f"max_length={max_length}, {counts['empty']} empty, {counts['identical']} identical; raise --max-length, or "
        "append end tokens"
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
    rows = [
        torch.tensor(pair.prompt_ids + response + extension)
        for side in (1, 2)
        for pair in pairs
        for response, extension in [(pair[side], _extension(pair, pair[side], extend_with))]
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
    return _right_padded([torch.tensor(text.prompt_ids + text.response_ids) for text in texts], pad_id) | {
        "prompt_lengths": torch.tensor([len(text.prompt_ids) for text in texts]),
        "response_lengths": torch.tensor([len(text.response_ids) for text in texts]),
        "rewards": torch.tensor([text.reward for text in texts]),
    }


def _right_padded(rows: list[Tensor], pad_id: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
    }


def _extension(pair: Pair, response: list[int], token: int | None) -> list[int]:
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    return [] if token is None else [token] * (longest - len(response))


def at_response_tokens(values: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The values at the tokens of the responses of a collated batch, right padded: (chosen, rejected), each (B, T').

    T' is the length of the longest response of the batch. What stands beyond a response and its extension is
    arbitrary.

    >>> batch = collate([Pair([1], [5, 6, 2], [7, 2])], pad_id=0)
    >>> at_response_tokens(batch["input_ids"], batch)
    (tensor([[5, 6, 2]]), tensor([[7, 2, 0]]))
    """
    width = int(torch.maximum(batch["chosen_lengths"], batch["rejected_lengths"]).max())
    return from_columns(values, batch["prompt_lengths"].repeat(2), width).chunk(2)


def from_columns(values: Tensor, first: Tensor, width: int) -> Tensor:
    """(B, width) of each row's values from column first[b] on; beyond the last column the last value again.

    >>> from_columns(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([0, 1]), width=2)
    tensor([[0, 1],
            [4, 5]])
    """
    columns = first[:, None] + torch.arange(width, device=values.device)
    return values.gather(1, columns.clamp(max=values.shape[1] - 1))
