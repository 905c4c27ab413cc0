"""Preference records, prompts and texts: read from files or the model hub, and checked.

One line of JSON per record, or one array of them, in any of these forms:

    {"prompt": "...", "chosen": "...", "rejected": "..."}               text, continued as it stands
    {"prompt": [messages], "chosen": [message], "rejected": [message]}  through the tokenizer's chat template
    {"chosen": [messages], "rejected": [messages]}                      whole chats: the last message is the response
    {"chosen": "...", "rejected": "..."}                                whole dialogues, as HH-RLHF was published
    {"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}   token ids, preferred to text
    {"prompt": "...", "chosen": ["..."], "rejected": ["...", "..."]}    as RewardBench 2: each chosen with each rejected
    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}  as Alpaca: a prompt of one part or two
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

Messages = list[dict[str, str]]
Prompt = str | Messages | list[int]
ASSISTANT = "\n\nAssistant:"  # how HH-RLHF begins an answer
ASSISTANTS = ("assistant", "model")  # roles whose messages are responses
BESIDE = ("system", "system_prompt", "input", "history")  # columns of other data that belong to the prompt
JSON_NAMES = {".json", ".jsonl", ".jsonlines", ".ndjson"}
TRAIN_SPLITS = {"HuggingFaceH4/ultrafeedback_binarized": "train_prefs"}  # hub data sets whose is not "train"


class Preference(NamedTuple):
    """A checked record: the prompt is text, messages or token ids; the responses are text or token ids."""

    prompt: Prompt
    chosen: Prompt  # never messages
    rejected: Prompt
    source: str  # file:line, for errors
    subset: str | None = None  # of a benchmark, such as RewardBench, where the record says so


def read_preferences(name: str | os.PathLike) -> list[Preference]:
    """Read a file (`read_jsonl`, or .parquet), or a data set of the hub given as `owner/name` or `owner/name:split`.

    Raises:
        ValueError: naming file and line, at the first line that has none of the forms above.
        OSError: if there is no such file.
    """
    name = str(name)
    is_file = os.path.exists(name) or name.count("/") != 1 or _is_named_json(name)
    rows = _read_parquet(name) if name.endswith(".parquet") else read_jsonl(name) if is_file else _read_hub(name)
    preferences = [check_preference(one, source) for record, source in rows for one in _pairs(record)]
    if not preferences:
        raise ValueError(f"{name} holds no records; expected one preference per line")
    return preferences


class Response(NamedTuple):
    """A checked record of one text: the prompt is text, messages or token ids; the response is text or token ids."""

    prompt: Prompt
    response: Prompt  # never messages
    finished: bool  # whether it ended by itself
    source: str  # file:line, for errors
    form: str | None = None  # of the prompt (`codec.prompt_format`), where the record says so
    reference: Mapping = {}  # how the model was sampled (`decode.Warp`); empty: as it is
    text: str | None = None  # of a response of token ids, where the record has both


def read_responses(path: str | os.PathLike) -> list[Response]:
    """Read texts, such as `pargs generate` writes: JSONL records with `prompt`, `response` and, if known, `finished`.

    Raises:
        ValueError: naming file and line, if a field is missing or of the wrong type, or if there are none at all.
        OSError: if there is no such file.
    """
    responses = []
    for record, source in read_jsonl(path):
        finished, form = record.get("finished", True), record.get("prompt_format")
        if not isinstance(finished, bool):
            raise ValueError(f"{source}: `finished` must be true or false, got {_shown(finished)}")
        if not isinstance(form, str | None):
            raise ValueError(f"{source}: `prompt_format` must be text, got {_shown(form)}")
        if not isinstance(reference := record.get("reference", {}), dict):
            raise ValueError(f"{source}: `reference` must be an object, got {_shown(reference)}")
        prompt, response = _prompt(record, source), _field(record, "response", source)
        if is_messages(response):
            raise ValueError(f"{source}: `response` must be text or token ids, got messages; give the text of the last")
        text = record.get("response") if "response_ids" in record else None
        responses.append(Response(prompt, response, finished, source, form, reference, text))
    if not responses:
        raise ValueError(f"{path} holds no records; expected one text per line")
    return responses


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    """Whether sums and squares can be taken of it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _is_ids(value: object) -> bool:
    """As `_is_count` of each would say, but at once: files hold millions."""
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 2**31)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_time(value: object) -> bool:
    try:
        return bool(isinstance(value, str) and datetime.fromisoformat(value))
    except ValueError:
        return False


ROLES = ("model", "reward_model", "final_reward_model")  # settings that name a model, or none
# The fields of a record of `pargs generate` beside its prompt: those that must be there, and others.
REQUIRED: dict[str, Callable[[Any], bool]] = {"prompt_number": _is_count, "sample": _is_count, "response": _is_text}
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "response_ids": _is_ids,
    **dict.fromkeys(("kl", "ref_log_prob", "reward"), _is_number),
    "finished": lambda value: isinstance(value, bool),
    **dict.fromkeys(("method", "prompt_format"), _is_text),
    "now": _is_time,
    "reference": lambda value: isinstance(value, dict),
    "cost": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "settings": lambda value: (
        isinstance(value, dict)
        and all(isinstance(value.get(role), str | None) for role in ROLES)
        and isinstance(contents := value.get("contents", {}), dict)
        and all(isinstance(content, str) for content in contents.values())
    ),
}


def read_texts(path: str | os.PathLike) -> list[dict]:
    """Records of `pargs generate`, or {instruction, input, output} as AlpacaEval has them, by prompt and sample.

    Raises:
        ValueError: naming file and line, at the first that is no such record or repeats one; if there are none.
        OSError: if there is no such file.
    """
    texts: dict[tuple[int, int], dict] = {}
    asked: dict[str, tuple[int, int]] = {}
    for record, source in read_jsonl(path):
        is_foreign = "instruction" in record and "prompt_number" not in record
        text = check_text(_numbered(record, source, asked) if is_foreign else record, source)
        if texts.setdefault((text["prompt_number"], text["sample"]), text) is not text:
            raise ValueError(f"{source}: prompt {text['prompt_number']} has sample {text['sample']} already")
    if not texts:
        raise ValueError(f"{path} holds no texts; write some with `pargs generate`")
    return [texts[key] for key in sorted(texts)]


def check_text(record: dict, source: str) -> dict:
    """A record of `pargs generate`, with `prompt` None and `response_ids` [] where it lacks them.

    Raises:
        ValueError: naming `source`, if a field is missing or of the wrong type.
    """
    text = {"prompt": None, "response_ids": []} | record
    if missing := REQUIRED.keys() - text.keys():
        raise ValueError(f"{source}: not a record of `pargs generate`: no field `{min(missing)}`")
    for name, is_right in (REQUIRED | OPTIONAL).items():
        if name in text and not is_right(text[name]):
            raise ValueError(f"{source}: `{name}` must not be {_shown(text[name])}")
    _prompt(text, source)
    return text


def has_ids(text: dict) -> bool:
    """Whether a record of `read_texts` holds the token ids of its response, not its text alone."""
    return bool(text["response_ids"]) or not text["response"]


def _numbered(record: dict, source: str, asked: dict[str, tuple[int, int]]) -> dict:
    """A record of AlpacaEval as one of ours: prompts are numbered as they first appear, and so are samples of each."""
    prompt, response = _instruction(record, source), record.get("output")
    if not isinstance(response, str):
        raise ValueError(f"{source}: `output` must be text, got {_shown(response)}")
    number, sample = asked.get(prompt, (len(asked), 0))
    asked[prompt] = number, sample + 1
    return record | {"prompt": prompt, "response": response, "prompt_number": number, "sample": sample}


def _prompted(record: dict, source: str) -> dict:
    """The record, its instruction as its prompt where it has none."""
    if record.get("instruction") is None or record.keys() & {"prompt", "prompt_ids"}:
        return record
    return record | {"prompt": _instruction(record, source)}


def _instruction(record: dict, source: str) -> str:
    """The prompt of a record of Alpaca: its instruction, and its input in a paragraph of its own, if it has one."""
    parts = [record["instruction"], record.get("input") or ""]
    if not all(map(_is_text, parts)):
        raise ValueError(f"{source}: `instruction` and `input` must be text, got {_shown(parts)}")
    return "\n\n".join(filter(None, parts))


def read_prompts(path: str | os.PathLike) -> list[dict]:
    """Read prompts: records with a `prompt` (text or messages), or plain text, one prompt per line.

    A file whose name or beginning is that of JSON is read as `read_jsonl` does, and its records keep all other fields
    (`prompt_ids` among them); in any other file each line that is not empty becomes `{"prompt": line}`. A record of
    AlpacaEval has its prompt in `instruction` and, if it has one, `input`.

    Raises:
        ValueError: naming file and line, if a record has no usable prompt, or if there are none at all.
        OSError: if there is no such file.
    """
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        raise ValueError(f"{path}: tables are not read; give JSON records with a `prompt`, or one prompt per line")
    text = _text(path)
    if _is_named_json(path) or re.match(r'\s*(\{|\[\s*([{"]|\]\s*\Z))', text):
        prompts = []
        for record, source in _objects(text, path):
            record = _prompted(record, source)
            _prompt(record, source)
            # The ids of a text that was written are those of the model that wrote it.
            left_out = {"prompt_ids"} if {"prompt", "response"} <= record.keys() else set()
            kept = {name: value for name, value in record.items() if value is not None and name not in left_out}
            prompts.append(kept)
    else:
        prompts = [{"prompt": line} for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected one per line")
    return prompts


def read_jsonl(path: str | os.PathLike, *, growing: bool = False) -> Iterator[tuple[dict, str]]:
    """The objects of a JSONL file, or of a JSON array, each with its source: `file:line`, or `file: record n`.

    Gzipped files are known by their first bytes. Blank lines are skipped.

    Args:
        growing: the file is to be continued by `store.appending`: neither an array nor gzipped. Half a line at its end,
            which an interrupted run left, is skipped.

    Raises:
        ValueError: naming file and line, where a line is no JSON object, or holds what no text or number is (half a
            surrogate pair, NaN); if the gzip stream is damaged, or the file is growing and nothing that we wrote.
        OSError: if there is no such file.
    """
    return _objects(_text(path, growing), path, growing)


def whole_lines(data: bytes, path: str | os.PathLike) -> bytes:
    """The lines of a JSONL file, without half a line at its end that an interrupted run left.

    Raises:
        ValueError: if what it ends in is no such half: nobody shall lose a file of their own.
    """
    end = data.rfind(b"\n") + 1
    if (half := data[end:]) and (not half.startswith(b'{"') or (end == 0 and _is_json(half))):
        raise ValueError(
            f"{path} ends in {half[:30]!r}, which no interrupted run left; end it with a line break, or write to "
            "another file"
        )
    return data[:end]


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _text(path: str | os.PathLike, growing: bool = False) -> str:
    data = Path(path).read_bytes()
    try:
        if growing:
            data = whole_lines(data, path)
        elif data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        if (at := data.find(0)) >= 0:  # UTF-16, or no text at all
            raise UnicodeDecodeError("utf-8", data, at, at + 1, "no text has it")
        return data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip stream ({error}); copy or download it again") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not text in UTF-8 ({error}); save it as such") from None


def _is_named_json(path: str | os.PathLike) -> bool:
    return not JSON_NAMES.isdisjoint(suffix.lower() for suffix in Path(path).suffixes)


def _objects(text: str, path: str | os.PathLike, growing: bool = False) -> Iterator[tuple[dict, str]]:
    values: Iterator[tuple[Any, str]]
    if text.lstrip().startswith("[") and not growing:
        values = ((value, f"{path}: record {number}") for number, value in enumerate(_json(text, str(path)), 1))
    else:
        lines = ((line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip())
        values = ((_json(line, source), source) for line, source in lines)
    for value, source in values:
        if not isinstance(value, dict):
            raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
        yield value, source


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON ({error}); expected one object per line") from None


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object of unique names, and values that can be written again."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"field {max(names, key=names.count)!r} is there twice")
    for name, value in pairs:
        try:
            json.dumps([name, value], ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"field {name!r} holds half a character (a lone surrogate)") from None
        except ValueError:
            raise ValueError(f"field {name!r} holds NaN, Infinity or a number beyond all bounds") from None
    return dict(pairs)


def _shown(value: object) -> str:
    return json.dumps(value, default=repr)[:60]


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


def _read_parquet(name: str) -> Iterator[tuple[dict, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"to read {name}: pip install 'pargs-min[hub]'") from None
    try:
        rows = parquet.read_table(name).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{name} is no parquet file that can be read: {error}") from None
    for number, row in enumerate(rows):
        yield row, f"{name} row {number}"


def _pairs(record: dict) -> Iterator[dict]:
    """A record of each pair: every chosen response with every rejected one, where a side holds several texts."""
    sides = [record.get(name) for name in ("chosen", "rejected")]
    several = [side if isinstance(side, list) and side and all(map(_is_text, side)) else [side] for side in sides]
    for chosen, rejected in product(*several):
        yield record | {"chosen": chosen, "rejected": rejected}


def check_preference(record: dict, source: str) -> Preference:
    """Bring a record of any form above to prompt, chosen and rejected.

    Raises:
        ValueError: naming `source`, if a field is missing or of the wrong type.

    >>> check_preference({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, "sums.jsonl:1")
    Preference(prompt='1 + 1 =', chosen=' 2', rejected=' 3', source='sums.jsonl:1', subset=None)
    """
    record = _prompted(record, source)
    beside = {name: record.get(name) for name in BESIDE}
    record = {name: value for name, value in record.items() if value is not None}
    chosen, rejected = _field(record, "chosen", source), _field(record, "rejected", source)
    if is_messages(chosen) or is_messages(rejected):
        record = split_chats(record, source)
    elif not record.keys() & {"prompt", "prompt_ids"}:
        record = split_dialogues(record, source)
    prompt = _prompt(beside | record, source)
    chosen, rejected = _field(record, "chosen", source), _field(record, "rejected", source)
    if _repeats(prompt, chosen) and _repeats(prompt, rejected):
        raise ValueError(f"{source}: chosen and rejected both repeat the prompt; give what follows it alone")
    subset = record.get("subset")
    return Preference(prompt, chosen, rejected, source, subset if _is_text(subset) else None)


def _repeats(prompt: Prompt, response: Prompt) -> bool:
    return isinstance(prompt, str) and isinstance(response, str) and len(prompt) > 1 and response.startswith(prompt)


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

    >>> user, good, bad = ({"role": role, "content": role} for role in ("user", "assistant", "model"))
    >>> split_chats({"chosen": [user, good], "rejected": [user, bad]})
    {'chosen': 'assistant', 'rejected': 'model', 'prompt': [{'role': 'user', 'content': 'user'}]}
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not (is_messages(chosen) and is_messages(rejected)):
        raise ValueError(f"{source}: chosen and rejected must both be lists of messages, or both text")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{source}: chosen and rejected must share all messages but the last")
    for role in (chosen[-1]["role"], rejected[-1]["role"]):
        if role not in ASSISTANTS:
            raise ValueError(
                f"{source}: the last message is the response, and must be the assistant's; its role is {role!r}"
            )
    prompt = chosen[:-1] or _field(record, "prompt", source)
    if is_messages(record.get("prompt")) and prompt != record["prompt"]:
        raise ValueError(
            f"{source}: `prompt` is not what chosen and rejected begin with; give the prompt's messages in one place"
        )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return record | {"prompt": prompt, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _prompt(record: dict, source: str) -> Prompt:
    """The prompt; refused where it lacks what another column says that belongs to it."""
    prompt = _field(record, "prompt", source)
    if isinstance(prompt, str) or is_messages(prompt):
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        for name in BESIDE:
            if record.get(name) and not any(str(record[name]) in text for text in texts):
                raise ValueError(f"{source}: `{name}` would be left out; put it into `prompt` as a message")
    return prompt


def _field(record: dict, name: str, source: str) -> Prompt:
    """A field's token ids where it has some, else its text or messages; null stands for nothing."""
    ids, text = record.get(f"{name}_ids"), record.get(name)
    if not (ids is None or _is_ids(ids)):
        raise ValueError(f"{source}: `{name}_ids` must be a list of token ids, got {_shown(ids)}")
    if not (text is None or isinstance(text, str) or is_messages(text)):
        raise ValueError(
            f"{source}: `{name}` must be a string, or a list of messages {{role, content}} of two strings each, "
            f"got {_shown(text)}"
        )
    found = text if ids is None else ids
    if found is None:
        raise ValueError(f"{source}: no field `{name}`; found {', '.join(record) or 'none'}")
    return found


def is_messages(value: object) -> TypeGuard[Messages]:
    """Whether `value` is a non-empty list of messages {role, content}."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )
