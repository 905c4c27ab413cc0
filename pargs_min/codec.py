"""Text to token ids and back: the one place where prompts and responses become ids, and that knows what ends a text.

Training, decoding, judging and every reading of a text again get their ids here, so that all of them see the same ones.
The ids of a prompt do not depend on the response, since a model that decodes continues ids; tokenising the joined text
could merge tokens across the boundary, into ids that decoding never meets.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Self, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.records import ASSISTANT, Messages, Prompt, is_messages

FORMS = ("text", "dialogue", "chat", "ids")  # of prompts
HUMAN, ASKED = re.compile(r"\s*Human:"), re.compile(r"\n\s*Assistant:\s*$")  # how a dialogue begins and ends
TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant):")
HI = {"role": "user", "content": "Hi"}
HELLO = ([HI], [{"role": "system", "content": "Hi"}, HI])  # a system message is demanded by some templates
ANSWER = "pargs"  # to see what a template writes behind an answer
STRFTIME_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")  # how chat templates ask for the date


@dataclass(frozen=True)
class Codec:
    """A tokenizer together with the form of the prompts that it is used on: one for a whole run.

    Args:
        form: of the prompts (`prompt_format`). None stands for "chat" where the tokenizer has a chat template, and for
            "text" elsewhere.
        ends: ids that end a response; None means those that tokenizer and template name.
        now: the time that a chat template is told which writes the date; None means the present.
    """

    tokenizer: PreTrainedTokenizerBase
    form: str | None = None
    ends: tuple[int, ...] | None = None
    now: datetime | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, *FORMS):
            raise ValueError(f"prompt_format must be one of {', '.join(FORMS)}, got {self.form!r}")
        object.__setattr__(self, "form", self.form or ("chat" if self.tokenizer.chat_template else "text"))

    @classmethod
    def of(cls, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str | None = None, **settings) -> Self:
        """The codec of a language model, whose generation configuration may name further end tokens.

        Raises:
            ValueError: if the tokenizer has more ids than the model.
        """
        check_fits(lm, tokenizer)
        return cls(tokenizer, form, tuple(end_tokens(lm, tokenizer)), **settings)

    @property
    def dated(self) -> bool:
        """Whether the chat template writes the time (`now`)."""
        return bool(STRFTIME_NOW.search(str(self.tokenizer.chat_template)))

    @cached_property
    def vocabulary(self) -> int:
        """The largest token id + 1, which is more than the number of tokens where ids are left out."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def end(self) -> int | None:
        """The id that a finished response ends in: of a chat what its template writes there, else the end token."""
        written = turn_end(self.tokenizer) if self.form == "chat" else None
        return self.tokenizer.eos_token_id if written is None else written

    @cached_property
    def _ends(self) -> tuple[int | None, ...]:
        return (self.tokenizer.eos_token_id, turn_end(self.tokenizer)) if self.ends is None else self.ends

    @cached_property
    def closing(self) -> list[int]:
        """What the chat template writes behind an answer, `end` first; nothing where it writes a chat that it closes
        otherwise than its prompt and its answer."""
        for chat in HELLO:
            try:
                prompt_ids, (ids,) = self.encode(chat, [ANSWER])
                whole = self._ids(self._closed(chat, ANSWER))
                return whole[len(prompt_ids + ids) :] if whole[: len(prompt_ids + ids)] == prompt_ids + ids else []
            except ValueError:  # no template; or it fails, which is said where a chat is read
                pass
        return []

    def prompt(self, record: dict) -> list[int]:
        """Token ids of a record's prompt (`encode_prompt`): its `prompt_ids` where it has some, else its `prompt`."""
        return encode_prompt(self.tokenizer, record.get("prompt_ids", record.get("prompt")), self.form, now=self.now)

    def encode(
        self, prompt: Prompt, responses: Sequence[Prompt], finished: bool = False
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt and of responses to it; blank text has none, and ids stay as they are.

        Together they are the ids of the whole text, as the tokenizer, or the chat template, would write it.

        Args:
            finished: whether the responses end in `end`.

        Raises:
            ValueError: as `encode_prompt`; for ids that the tokenizer does not know; if the chat template leaves out
                part of a response.
        """
        prompt_ids = self.prompt({"prompt": prompt})
        if self.form == "dialogue" and isinstance(prompt, str) and ASKED.search(prompt):
            blank = prompt[len(prompt.rstrip()) :]  # behind the last "Assistant:": it begins the response
            responses = [one if is_ids(one) or str(one)[:1].isspace() else blank + str(one) for one in responses]
        messages = as_messages(prompt) if self.form == "chat" and not is_ids(prompt) else None
        encoded = [
            cast("list[int]", response) if is_ids(response) else self._response(str(response), prompt_ids, messages)
            for response in responses
        ]
        for ids in encoded:
            check_ids(self.tokenizer, ids)
        if finished and self.end is not None:
            closing = {self.end, *self._ends, *special_ids(self.tokenizer)} - {self.tokenizer.unk_token_id}
            encoded = [ids if ids and ids[-1] in closing else [*ids, self.end] for ids in encoded]
        return prompt_ids, encoded

    def _response(self, text: str, prompt_ids: list[int], messages: Messages | None) -> list[int]:
        if not text.strip():
            return []
        if messages is None:
            return encode_within(self.tokenizer, text)
        asked = render_chat(self.tokenizer, messages, self.now, add_generation_prompt=True)
        closed = self._closed(messages, text)
        if not closed.startswith(asked):
            shared = os.path.commonprefix([asked, closed])  # noqa: RUF071 (characters are meant, not path components)
            if len(shared) >= len(render_chat(self.tokenizer, messages, self.now)):
                raise ValueError(
                    f"the chat template opens an answer with {asked[len(shared) :]!r}, which a chat that it has closed "
                    "lacks; give token ids, or another template"
                )
            return encode_within(self.tokenizer, text)
        whole, rest = self._ids(closed), closed[len(asked) :]
        begins = whole[: len(prompt_ids)] == prompt_ids
        ids = whole[len(prompt_ids) :] if begins else encode_within(self.tokenizer, rest)
        if self.end in ids:
            return ids[: len(ids) - 1 - ids[::-1].index(cast("int", self.end))]
        return encode_within(self.tokenizer, rest[: rest.rindex(text.strip()) + len(text.strip())])

    def _closed(self, messages: Messages, response: str) -> str:
        """A chat whose last message is this response, as the template writes it."""
        answer = {"role": "assistant", "content": response}
        chat = _apply_template(self.tokenizer, [*messages, answer], self.now)
        if response.strip() not in chat:
            raise ValueError(f"the chat template leaves out part of the response {response!r:.60}")
        if response not in chat:
            warnings.warn("the chat template strips responses of the whitespace around them", stacklevel=2)
        return chat

    def _ids(self, chat: str) -> list[int]:
        return self.tokenizer(chat, add_special_tokens=False)["input_ids"]

    def whole(self, record: dict, append_eos: bool = True) -> list[int]:
        """Token ids of a record's prompt and response, with the end token where the response ended by itself.

        Ids that the codec decodes to the response are its own, and read as they were drawn; others are encoded anew. So
        are prompts, but by models that were trained on ids.

        Args:
            append_eos: whether a response that is encoded anew gets an end token.
        """
        codec = self.at(record)
        if self.wrote(record):
            asked = record if self.form == "ids" else {"prompt": record["prompt"]}
            return codec.prompt(asked) + record["response_ids"]
        finished = append_eos and record.get("finished", True)
        prompt_ids, (ids,) = codec.encode(record["prompt"], [record["response"]], finished)
        return prompt_ids + ids

    def at(self, record: dict) -> Self:
        """The codec at the time that a record's chat template was told."""
        return replace(self, now=datetime.fromisoformat(record["now"])) if "now" in record else self

    def wrote(self, record: dict) -> bool:
        """Whether the record's ids are of this tokenizer. An empty response tells less: the special tokens of every
        tokenizer decode to it, and so do ids that it lacks."""
        ids, response = record.get("response_ids"), record["response"]
        if ids is None or (not response and record.get("finished") and not self.finished(ids)):
            return False
        ended = record.get("finished") and self.text(ids[:-1]) == response  # by a token that the codec does not know
        return max(ids, default=0) < self.vocabulary and (self.text(ids) == response or bool(ended))

    def conversation(self, record: dict) -> list[int]:
        """Token ids of a record as a chat, with all that its template writes behind it, unless the response was cut."""
        codec, prompt, response = self.at(record), record["prompt"], record["response"]
        if record.get("finished", True):
            prompt_ids, (ids,) = codec.encode(prompt, [response])
            whole = self._ids(codec._closed(as_messages(prompt), response))
            if whole[: len(prompt_ids) + len(ids)] == prompt_ids + ids:
                return whole
        elif "<think>" in response and "</think>" not in response:  # templates put empty reasoning before an answer
            return codec.prompt({"prompt": prompt}) + encode_within(self.tokenizer, response)
        return codec.whole(record)

    def text(self, response_ids: list[int]) -> str:
        """The text of a response, without its end token or any other special one."""
        ids = response_ids[:-1] if self.finished(response_ids) else response_ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def finished(self, response_ids: list[int]) -> bool:
        """Whether a response ended by itself."""
        return bool(response_ids) and response_ids[-1] in self._ends


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
        return "dialogue" if ASKED.search(prompt) else "text"
    return "chat" if is_messages(prompt) else "ids"


def is_ids(value: Prompt | None) -> bool:
    return isinstance(value, list) and not is_messages(value)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | None,
    prompt_format: str | None = None,
    now: datetime | None = None,
) -> list[int]:
    """Token ids of a prompt: the one function that training and decoding share.

    Text gets the tokenizer's own start token, if it has one and the text does not begin with it; messages go through
    its chat template, which writes its own; token ids stay as they are.

    Args:
        prompt: text, messages {role, content}, or token ids.
        prompt_format: what the reward model was trained on. "chat" makes text the message of a user, or of a dialogue
            its messages; "dialogue" makes it the turn of a human; with any other the prompt is taken as it is.
        now: as for `Codec`.

    Raises:
        ValueError: if messages are given but the tokenizer has no chat template, or the reward model was trained on
            text; if the template fails, or leaves a message out; if the last message is the assistant's; if the prompt
            has no token at all, or one that the tokenizer does not know.
    """
    if isinstance(prompt, str) and prompt_format == "chat":
        prompt = as_messages(prompt)
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, _as_dialogue(prompt) if prompt_format == "dialogue" else prompt)
    elif is_messages(prompt):
        ids = _encode_messages(tokenizer, prompt, prompt_format, now)
    else:
        ids = cast("list[int]", prompt)
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no token, and the tokenizer adds no start token; give some text")
    check_ids(tokenizer, ids)
    return ids


def as_messages(prompt: Prompt) -> Messages:
    """Text as the message of a user, or the turns of a dialogue as messages.

    >>> dialogue = "\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: Why?\\n\\nAssistant:"
    >>> [(message["role"], message["content"]) for message in as_messages(dialogue)]
    [('user', 'Hi'), ('assistant', 'Hello'), ('user', 'Why?')]
    """
    if not isinstance(prompt, str):
        return cast("Messages", prompt)
    if not (ASKED.search(prompt) and HUMAN.match(prompt)):
        return [{"role": "user", "content": prompt}]
    turns = TURN.split(ASKED.sub("", prompt))[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _as_dialogue(prompt: str) -> str:
    """The turn of a human, closed by "Assistant:"; what is such a dialogue already, or all but, is not wrapped again.

    >>> {_as_dialogue(text) for text in ("Hi", "\\n\\nHuman: Hi", "Human: Hi\\n\\nAssistant: ")}
    {'\\n\\nHuman: Hi\\n\\nAssistant:'}
    """
    if not (HUMAN.match(prompt) or ASKED.search(prompt)):
        prompt = f"Human: {prompt}"
    body = ASKED.sub("", prompt)
    return ("\n\n" + body.lstrip() if HUMAN.match(body) else body) + ASSISTANT


def _encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt_format: str | None, now: datetime | None
) -> list[int]:
    if prompt_format in ("text", "dialogue"):
        raise ValueError(f"prompt is a list of messages, but the reward model was trained on {prompt_format} prompts")
    if messages[-1]["role"] == "assistant":
        raise ValueError("prompt ends with a message of the assistant, which a response would follow; leave it out")
    chat = render_chat(tokenizer, messages, now, add_generation_prompt=True)
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, now: datetime | None = None, **settings) -> str:
    """The text of a chat by the tokenizer's template, in which every message is to be found.

    Raises:
        ValueError: if there is no template, if it fails, or if it leaves out (part of) a message.
    """
    text = _apply_template(tokenizer, messages, now, **settings)
    stand_ins = [message | {"content": f"message {number}."} for number, message in enumerate(messages)]
    roles = _apply_template(tokenizer, stand_ins, now, **settings)  # a content may occur elsewhere, a stand-in does not
    for message, stand_in in zip(messages, stand_ins, strict=True):
        if message["content"].strip() not in text or stand_in["content"] not in roles:
            raise ValueError(
                f"the chat template leaves out what {message['role']!r} says, or part of it "
                f"({message['content']!r:.60}): use the roles that it knows, and text that it keeps"
            )
    return text


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, now: datetime | None = None, **settings
) -> str:
    if not tokenizer.chat_template:
        raise ValueError("prompt is a list of messages, but the tokenizer has no chat template; give it as text")
    try:
        template = tokenizer.get_chat_template()  # the default one, where there are several
        if now is not None:
            template = STRFTIME_NOW.sub(lambda call: json.dumps(now.strftime(call[2])), template)
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} fails: {error}") from error


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind a message of the assistant; None where it writes none."""
    for chat in HELLO:
        try:
            answered = [*chat, {"role": "assistant", "content": ANSWER}]
            closing = _apply_template(tokenizer, answered).rpartition(ANSWER)[2]
            break
        except ValueError:  # no template; or it fails, which is said where a chat is read
            pass
    else:
        return None
    ids = tokenizer(closing.strip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in {*special_ids(tokenizer), *tokenizer.added_tokens_decoder} else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of tokens that text does not hold, those that end a text among them. Others were added as words are, say
    a closing tag or a run of spaces."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the tokenizer's start tokens, but without the end token that some tokenizers add: the text goes on."""
    ids, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    if bare and bare[0] == tokenizer.bos_token_id:
        return bare
    end = next(end for end in range(len(bare), len(ids) + 1) if ids[end - len(bare) : end] == bare)
    return ids[:end] if bare else [i for i in ids if i == tokenizer.bos_token_id]


def encode_within(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that others precede: without start or end token, and without the space that tokenizers of the
    SentencePiece kind begin every text with."""
    if not any(token.startswith("▁") for token in tokenizer.tokenize("a")):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    before, both = (tokenizer(some, add_special_tokens=False)["input_ids"] for some in ("\n", "\n" + text))
    return both[len(before) :]


def cut_left(ids: list[int], length: int, start_token: int | None) -> list[int]:
    """The last `length` >= 1 tokens; a start token counts, and stays in front.

    >>> cut_left([1, 5, 6, 7], 3, start_token=1)
    [1, 6, 7]
    """
    kept = 1 if ids[0] == start_token else 0
    return ids if len(ids) <= length else ids[:kept] + ids[len(ids) - length + kept :]


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Check that the tokenizer knows all token ids. Raises ValueError naming one that it does not."""
    if not ids or (min(ids) >= 0 and max(ids) < len(tokenizer)):
        return
    rows = max(tokenizer.get_vocab().values()) + 1
    if unknown := [i for i in (min(ids), max(ids)) if not 0 <= i < rows]:
        raise ValueError(
            f"token id {unknown[0]} is outside the tokenizer's vocabulary of {rows}; the ids were made with another "
            "tokenizer"
        )


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer has ids that the model has no row for."""
    last, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if last >= rows:
        ours, theirs = tokenizer.name_or_path or "the tokenizer", model.config.name_or_path or type(model).__name__
        raise ValueError(
            f"{ours} has token ids up to {last}, and {theirs} has {rows} rows: they do not belong together"
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


def shares_ids(tokenizer: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase | None) -> bool:
    """Whether all ids of a language model mean the same to a reward model; None: it has the same tokenizer."""
    try:
        check_vocabularies(tokenizer, theirs or tokenizer)
    except ValueError:
        return False
    return True


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's end token first, then that of its chat template (`turn_end`), then
    those of the generation configuration."""
    configured = lm.generation_config.eos_token_id if lm.generation_config else None
    configured = configured if isinstance(configured, list) else [configured]
    ends = [tokenizer.eos_token_id, turn_end(tokenizer), *configured]
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
