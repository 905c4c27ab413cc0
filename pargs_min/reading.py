"""What a judge reads of a record of `pargs generate`: text, a chat, or token ids."""

from collections.abc import Iterator, Sequence

from pargs_min.codec import Codec, encode_responses
from pargs_min.records import Messages, is_messages

Texts = Sequence[dict]  # records of `pargs generate`


def prompt_text(record: dict) -> str:
    """The prompt as text.

    Raises:
        ValueError: naming the prompt, if it was given as token ids alone.

    >>> prompt_text({"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    'user: Hi\\n\\nassistant: Hello'
    """
    prompt = record["prompt"]
    if is_messages(prompt):
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt number {record['prompt_number']} has no text, and the judge reads text; add `prompt`")
    return prompt


def as_chats(codec: Codec, texts: Texts) -> Iterator[list[int]]:
    """Token ids of each text as a chat; a prompt that is text becomes the message of a user."""
    for text in texts:
        prompt = text["prompt"] if is_messages(text["prompt"]) else [{"role": "user", "content": prompt_text(text)}]
        chat: Messages = [*prompt, {"role": "assistant", "content": text["response"]}]
        yield codec.tokenizer.apply_chat_template(chat, return_dict=False)


def as_ids(codec: Codec, texts: Texts, append_eos: bool) -> Iterator[list[int]]:
    """Token ids of each text's prompt and response, with the end token where the response ended by itself.

    Ids that the codec decodes to the response are its own, and read as they were drawn; others are encoded anew.

    Args:
        append_eos: whether a response that is encoded anew gets an end token.
    """
    end = codec.tokenizer.eos_token_id
    for text, ids in zip(texts, encode_responses(codec.tokenizer, [text["response"] for text in texts]), strict=True):
        if _are_own(codec, text):
            ids = text["response_ids"]
        elif text.get("finished") and append_eos and end is not None:
            ids = [*ids, end]
        yield codec.prompt({"prompt": text["prompt"] or prompt_text(text)}) + ids


def _are_own(codec: Codec, text: dict) -> bool:
    """An empty response tells less: every tokenizer's special tokens decode to it, and so do ids that it lacks."""
    ids = text["response_ids"]
    if not text["response"] and text.get("finished") and not codec.finished(ids):
        return False
    return max(ids, default=0) < codec.vocabulary and codec.text(ids) == text["response"]
