"""Text to token ids and back: the one place where prompts and responses become ids, and that knows what ends a text.

Training, decoding, judging and every reading of a text again get their ids here, so that all of them see the same ones.
Prompt and response are tokenised apart and joined as ids. A model that decodes continues ids; tokenising the joined
text can merge tokens across the boundary, into ids that decoding never meets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.records import ASSISTANT, Messages, Prompt, is_messages


@dataclass(frozen=True)
class Codec:
    """A tokenizer together with the form of the prompts that it is used on.

    Args:
        form: what the reward model was trained on (`prompt_format`); None takes every prompt as it is.
        ends: ids that end a response, the tokenizer's own end token first. None means that token alone.
    """

    tokenizer: PreTrainedTokenizerBase
    form: str | None = None
    ends: tuple[int, ...] | None = None

    @classmethod
    def of(cls, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str | None = None) -> Self:
        """The codec of a language model, whose generation configuration may name further end tokens."""
        return cls(tokenizer, form, tuple(end_tokens(lm, tokenizer)))

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    def prompt(self, record: dict) -> list[int]:
        """Token ids of a record's prompt (`encode_prompt`): its `prompt_ids` where it has some, else its `prompt`."""
        return encode_prompt(self.tokenizer, record.get("prompt_ids", record.get("prompt")), self.form)

    def text(self, response_ids: list[int]) -> str:
        """The text of a response, without its end token or any other special one."""
        return self.tokenizer.decode(response_ids, skip_special_tokens=True)

    def finished(self, response_ids: list[int]) -> bool:
        """Whether a response ended by itself."""
        ends = (self.tokenizer.eos_token_id,) if self.ends is None else self.ends
        return bool(response_ids) and response_ids[-1] in ends


def prompt_format(prompts: Iterable[Prompt]) -> str:
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


def _form(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return "dialogue" if prompt.endswith(ASSISTANT) else "text"
    return "chat" if is_messages(prompt) else "ids"


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | None,
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
        max_length: keep only the last tokens, this many; a start token counts, and stays in front.

    Raises:
        ValueError: if messages are given but the tokenizer has no chat template, or the reward model was trained on
            text; if the prompt has no token at all, or one that the tokenizer does not know.
    """
    if isinstance(prompt, str) and prompt_format == "chat":
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) and prompt_format == "dialogue" and not prompt.endswith(ASSISTANT):
        prompt = f"\n\nHuman: {prompt}{ASSISTANT}"
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, prompt)
    else:
        ids = _encode_messages(tokenizer, prompt, prompt_format) if is_messages(prompt) else cast("list[int]", prompt)
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no token, and the tokenizer adds no start token; give some text")
    check_ids(tokenizer, ids)
    return ids if max_length is None else cut_left(ids, max_length, tokenizer.bos_token_id)


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


def cut_left(ids: list[int], length: int, start_token: int | None) -> list[int]:
    """The last `length` >= 1 tokens; a start token counts, and stays in front.

    >>> cut_left([1, 5, 6, 7], 3, start_token=1)
    [1, 6, 7]
    """
    kept = 1 if ids[0] == start_token else 0
    return ids if len(ids) <= length else ids[:kept] + ids[len(ids) - length + kept :]


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of responses, without start or end token. Blank text has none; token ids stay as they are.

    Tokenizers of the SentencePiece kind begin every text with a space of their own. With those, the space that a
    response begins with (after "Assistant:", say) is dropped, or there would be two.
    """
    own_space = any(token.startswith("▁") for token in tokenizer.tokenize("a"))
    texts = [text if text.strip() else "" for text in responses if isinstance(text, str)]
    texts = [text.removeprefix(" ") if own_space else text for text in texts]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    return [next(encoded) if isinstance(response, str) else cast("list[int]", response) for response in responses]


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Check that the tokenizer knows all token ids. Raises ValueError naming the largest, if it does not."""
    if max(ids, default=0) >= len(tokenizer):
        raise ValueError(
            f"token id {max(ids)} is outside the tokenizer's vocabulary of {len(tokenizer)}; "
            "the ids were made with another tokenizer"
        )


def check_vocabularies(lm_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every token id of the language model means the same to the reward model, which may know more.

    Raises:
        ValueError: naming the first ids that differ.
    """
    theirs = tokenizer.get_vocab()
    differ = sorted((i, token) for token, i in lm_tokenizer.get_vocab().items() if theirs.get(token) != i)
    if differ:
        shown = ", ".join(f"{i} ({token!r})" for i, token in differ[:3])
        raise ValueError(
            f"the tokenizers of language model and reward model differ at {len(differ)} ids: {shown}; train the reward "
            "model from the language model's own family, or score decoded texts (ReencodeScorer with text_rewards)"
        )


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's end token first, then those of the generation configuration."""
    configured = lm.generation_config.eos_token_id if lm.generation_config else None
    ends = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def left_pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, P), of token lists padded on the left (with id 0, which the mask hides).

    >>> left_pad([[5, 6], [7]])[0]
    tensor([[5, 6],
            [0, 7]])
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side="left")
    return ids, mask
