"""Preference records, prompts and texts: read from files or the model hub, and checked.

One line of JSON per record, in any of these forms:

    {"prompt": "...", "chosen": "...", "rejected": "..."}               text, continued as it stands
    {"prompt": [messages], "chosen": [message], "rejected": [message]}  through the tokenizer's chat template
    {"chosen": [messages], "rejected": [messages]}                      whole chats: the last message is the response
    {"chosen": "...", "rejected": "..."}                                whole dialogues, as HH-RLHF was published
    {"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}   token ids, preferred to text
"""

import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

Messages = list[dict[str, str]]
Prompt = str | Messages | list[int]
ASSISTANT = "\n\nAssistant:"  # how HH-RLHF begins an answer
TRAIN_SPLITS = {"HuggingFaceH4/ultrafeedback_binarized": "train_prefs"}  # hub data sets whose is not "train"


class Preference(NamedTuple):
    """A checked record: the prompt is text, messages or token ids; the responses are text or token ids."""

    prompt: Prompt
    chosen: Prompt  # never messages
    rejected: Prompt
    source: str  # file:line, for errors


def read_preferences(name: str | os.PathLike) -> list[Preference]:
    """Read a .jsonl or .jsonl.gz file, or a data set of the model hub given as `owner/name` or `owner/name:split`.

    Raises:
        ValueError: naming file and line, at the first line that has none of the forms above.
        OSError: if there is no such file.
    """
    name = str(name)
    is_file = os.path.exists(name) or name.count("/") != 1 or name.endswith((".json", ".jsonl", ".gz"))
    preferences = [check_preference(*row) for row in (read_jsonl(name) if is_file else _read_hub(name))]
    if not preferences:
        raise ValueError(f"{name} holds no records; expected one preference per line")
    return preferences


class Response(NamedTuple):
    """A checked record of one text: the prompt is text, messages or token ids; the response is text or token ids."""

    prompt: Prompt
    response: Prompt  # never messages
    finished: bool  # whether it ended by itself
    source: str  # file:line, for errors


def read_responses(path: str | os.PathLike) -> list[Response]:
    """Read texts, such as `pargs generate` writes: JSONL records with `prompt`, `response` and, if known, `finished`.

    Raises:
        ValueError: naming file and line, if a field is missing or of the wrong type, or if there are none at all.
        OSError: if there is no such file.
    """
    responses = []
    for record, source in read_jsonl(path):
        finished = record.get("finished", True)
        if not isinstance(finished, bool):
            raise ValueError(f"{source}: `finished` must be true or false, got {json.dumps(finished)[:60]}")
        prompt, response = _field(record, "prompt", source), _field(record, "response", source)
        if is_messages(response):
            raise ValueError(f"{source}: `response` must be text or token ids, got messages; give the text of the last")
        responses.append(Response(prompt, response, finished, source))
    if not responses:
        raise ValueError(f"{path} holds no records; expected one text per line")
    return responses


# The fields of a record of `pargs generate`, with their types: those that must be there, and others.
REQUIRED: dict[str, Any] = {
    "prompt_number": int,
    "sample": int,
    "prompt": (str, list, type(None)),
    "response": str,
    "response_ids": list,
}
OPTIONAL: dict[str, Any] = {"kl": (int, float), "finished": bool, "method": str, "cost": dict, "settings": dict}


def read_texts(path: str | os.PathLike) -> list[dict]:
    """Records of `pargs generate`, sorted by prompt and sample.

    Raises:
        ValueError: naming file and line, at the first that is no such record or repeats one; if there are none.
        OSError: if there is no such file.
    """
    texts: dict[tuple[int, int], dict] = {}
    for record, source in read_jsonl(path):
        text = {"prompt": None} | record if "prompt_ids" in record else record
        if missing := REQUIRED.keys() - text.keys():
            raise ValueError(f"{source}: not a record of `pargs generate`: no field `{min(missing)}`")
        kinds = {name: kind for name, kind in (REQUIRED | OPTIONAL).items() if name in text}
        wrong = [name for name, kind in kinds.items() if not isinstance(text[name], kind)]
        wrong += ["kl"] if not wrong and not math.isfinite(text.get("kl", 0)) else []
        if wrong:
            raise ValueError(f"{source}: `{wrong[0]}` must not be {json.dumps(text[wrong[0]])[:60]}")
        if texts.setdefault((text["prompt_number"], text["sample"]), text) is not text:
            raise ValueError(f"{source}: prompt {text['prompt_number']} has sample {text['sample']} already")
    if not texts:
        raise ValueError(f"{path} holds no texts; write some with `pargs generate`")
    return [texts[key] for key in sorted(texts)]


def read_prompts(path: str | os.PathLike) -> list[dict]:
    """Read prompts: JSONL records with a `prompt` (text or messages), or plain text, one prompt per line.

    Files that end in .jsonl or .jsonl.gz are JSONL, and their records keep all other fields (`prompt_ids` among
    them); in any other file each line that is not empty becomes `{"prompt": line}`.

    Raises:
        ValueError: naming file and line, if a record has no usable prompt, or if there are none at all.
        OSError: if there is no such file.
    """
    if str(path).endswith((".json", ".jsonl", ".gz")):
        prompts = []
        for record, source in read_jsonl(path):
            _field(record, "prompt", source)
            prompts.append(record)
    else:
        try:
            text = Path(path).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from None
        prompts = [{"prompt": line} for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected one per line")
    return prompts


def read_jsonl(path: str | os.PathLike, *, growing: bool = False) -> Iterator[tuple[dict, str]]:
    """The objects of a JSONL file, gzipped if its name ends in .gz, each with its `file:line`; blank lines are skipped.

    Args:
        growing: the file may end in half a line, which an interrupted run left (`store.appending`): it is skipped.

    Raises:
        ValueError: naming file and line, where a line is no JSON object; if the gzip stream is cut.
        OSError: if there is no such file.
    """
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip() and not (growing and not line.endswith(b"\n")):
                    yield _json_object(line, f"{path}:{number}"), f"{path}:{number}"
        except EOFError:
            raise ValueError(f"{path} ends in the middle of its gzip stream; copy or download it again") from None


def _json_object(line: bytes, source: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{source}: not JSON ({error}); expected one object per line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected a JSON object, got {json.dumps(record)[:60]}")
    return record


def _read_hub(name: str) -> Iterator[tuple[dict, str]]:
    name, _, split = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"there is no file {name}; to load it as a data set of the hub: pip install 'pargs-min[hub]'"
        ) from None
    for number, row in enumerate(load_dataset(name, split=split or TRAIN_SPLITS.get(name, "train"))):
        yield dict(row), f"{name} row {number}"


def check_preference(record: dict, source: str) -> Preference:
    """Bring a record of any form above to prompt, chosen and rejected.

    Raises:
        ValueError: naming `source`, if a field is missing or of the wrong type.

    >>> check_preference({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, "sums.jsonl:1")
    Preference(prompt='1 + 1 =', chosen=' 2', rejected=' 3', source='sums.jsonl:1')
    """
    chosen, rejected = _field(record, "chosen", source), _field(record, "rejected", source)
    if is_messages(chosen) or is_messages(rejected):
        record = split_chats(record, source)
    elif not record.keys() & {"prompt", "prompt_ids"}:
        record = split_dialogues(record, source)
    prompt, chosen, rejected = (_field(record, name, source) for name in ("prompt", "chosen", "rejected"))
    return Preference(prompt, chosen, rejected, source)


def split_dialogues(record: dict, source: str = "record") -> dict:
    """Two whole dialogues: the prompt is what they share, up to the last "Assistant:" of it.

    >>> asked = "\\n\\nHuman: Hi\\n\\nAssistant:"
    >>> split_dialogues({"chosen": asked + " Hello", "rejected": asked + " No"})
    {'prompt': '\\n\\nHuman: Hi\\n\\nAssistant:', 'chosen': ' Hello', 'rejected': ' No'}
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(f"{source}: no field `prompt`; add it (or `prompt_ids`)")
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (characters are meant, not path components)
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise ValueError(
            f"{source}: no field `prompt`, and chosen and rejected share no beginning up to {ASSISTANT!r} as dialogues "
            "of HH-RLHF do; add a `prompt`"
        )
    end = start + len(ASSISTANT)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def split_chats(record: dict, source: str = "record") -> dict:
    """Responses given as messages: the last message is the response, those before it are the prompt.

    >>> user, good, bad = ({"role": "-", "content": text} for text in ("Hi", "Hello", "No"))
    >>> split_chats({"chosen": [user, good], "rejected": [user, bad]})
    {'chosen': 'Hello', 'rejected': 'No', 'prompt': [{'role': '-', 'content': 'Hi'}]}
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not (is_messages(chosen) and is_messages(rejected)):
        raise ValueError(f"{source}: chosen and rejected must both be lists of messages, or both text")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{source}: chosen and rejected must share all messages but the last")
    prompt = chosen[:-1] or _field(record, "prompt", source)
    if is_messages(record.get("prompt")) and prompt != record["prompt"]:
        raise ValueError(
            f"{source}: `prompt` is not what chosen and rejected begin with; give the prompt's messages in one place"
        )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return record | {"prompt": prompt, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _field(record: dict, name: str, source: str) -> Prompt:
    """A field's token ids where it has some, else its text or messages."""
    if f"{name}_ids" in record:
        ids = record[f"{name}_ids"]
        if not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
            raise ValueError(f"{source}: `{name}_ids` must be a list of token ids, got {json.dumps(ids)[:60]}")
        return ids
    if name not in record:
        raise ValueError(f"{source}: no field `{name}`; found {', '.join(record) or 'none'}")
    if not (isinstance(record[name], str) or is_messages(record[name])):
        raise ValueError(
            f"{source}: `{name}` must be a string, or a list of messages {{role, content}}, "
            f"got {json.dumps(record[name])[:60]}"
        )
    return record[name]


def is_messages(value: object) -> TypeGuard[Messages]:
    """Whether `value` is a non-empty list of messages {role, content}."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )
