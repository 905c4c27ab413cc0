"""What a reward model reads of a text: its own tokens, in the form that it was trained on.

Judges read records of `pargs generate` in this way, and so do guides whose tokenizer is not the language model's.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pargs_min.codec import Codec, check_fits, left_pad, shares_ids
from pargs_min.records import is_messages
from pargs_min.reward_model import (
    check_evaluating,
    check_rates_texts,
    context_length,
    final_rewards,
    is_causal,
    recorded,
)
from pargs_min.scoring import RewardFn, model_rewards

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


def reads_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model is a published one of chats, which reads each of them whole, as its template closes it."""
    return bool(tokenizer.chat_template) and not recorded(model)


def closing_ids(model: PreTrainedModel, codec: Codec) -> list[int]:
    """What a published model of chats reads behind an answer (`Codec.closing`); nothing of other models and texts."""
    return codec.closing if codec.form == "chat" and reads_chats(model, codec.tokenizer) else []


def id_rewards(model: PreTrainedModel, codec: Codec) -> RewardFn:
    """The reward function, of whole texts, of a model with the language model's tokenizer, which reads their ids.

    A published model of chats reads all that its template writes behind an answer, as it does of records.

    Args:
        codec: the model's tokenizer, in the form of the texts.

    Raises:
        ValueError: as `check_rates_texts`.
    """
    check_rates_texts(model)
    if not (closing := closing_ids(model, codec)):
        return model_rewards(model)

    @torch.no_grad()
    def reward_fn(ids: Tensor, mask: Tensor) -> Tensor:
        rows = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
        closed = left_pad([row[:-1] + closing if codec.finished(row) else row for row in rows])
        return final_rewards(model, *(tensor.to(ids.device) for tensor in closed))

    return reward_fn


def record_rewards(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Texts], list[float]]:
    """The rewards of records by any one-label classifier, which are read together.

    A model that `pargs train` wrote reads ids, in its recorded prompt format, end token included. Of the others, those
    with a chat template read a chat, bidirectional ones (BERT's kind) a pair of texts, causal ones text and end token.

    Raises:
        ValueError: for a text that is longer than the model's context, counted in its own tokens, or that it cannot
            read; if the model is in training mode.
    """
    check_fits(model, tokenizer)
    settings, limit = recorded(model), context_length(model) or math.inf
    codec = Codec(tokenizer, settings.get("prompt_format"))
    pairs = not (settings or tokenizer.chat_template or is_causal(model))

    def row(record: dict) -> Mapping:
        if pairs:
            return tokenizer(prompt_text(record), record["response"])
        if not (codec.form == "ids" and "prompt_ids" in record and codec.wrote(record)):
            record = record | {"prompt": record["prompt"] or prompt_text(record)}
        if reads_chats(model, tokenizer):
            return {"input_ids": codec.conversation(record)}
        return {"input_ids": codec.whole(record, settings.get("append_eos", True))}

    @torch.no_grad()
    def rewards(records: Texts) -> list[float]:
        check_evaluating(model)
        rows = []
        for record in records:
            try:
                rows.append(row(record))
                if (length := len(rows[-1]["input_ids"])) > limit:
                    raise ValueError(
                        f"{length} tokens, and {type(model).__name__} reads at most {limit}; generate shorter texts "
                        "(--max-new-tokens)"
                    )
            except ValueError as error:
                at = f"prompt number {record['prompt_number']}, sample {record['sample']}"
                raise ValueError(f"{at}: {error}") from error
        if pairs:
            return model(**tokenizer.pad(rows, return_tensors="pt").to(model.device)).logits[:, 0].tolist()
        ids, mask = left_pad([some["input_ids"] for some in rows])
        return final_rewards(model, ids.to(model.device), mask.to(model.device)).tolist()

    return rewards


def text_rewards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codec: Codec, prompts: Sequence[dict]
) -> RewardFn:
    """The reward function of a model that reads each text as `record_rewards` does, say with a tokenizer of its own.

    The special tokens of the language model's text are dropped, but for the one that ends it, which becomes the reward
    model's own; a candidate that is half a character reaches the reward model as the replacement character.

    Args:
        codec: the language model's.
        prompts: records of the prompts that the texts continue.

    Raises:
        ValueError: if one prompt begins with another; the reward function raises it for a text that continues none.
    """
    asked = {tuple(codec.prompt(prompt)): prompt for prompt in prompts}
    lengths, rewards = sorted({len(ids) for ids in asked}), record_rewards(model, tokenizer)
    own = shares_ids(codec.tokenizer, tokenizer)
    for prompt, ids in ((prompt, tuple(codec.prompt(prompt))) for prompt in prompts):
        if asked[ids] != prompt or any(ids[:length] in asked for length in lengths if length < len(ids)):
            raise ValueError(f"a prompt begins with another one, or has its ids: {prompt!r:.60}; give them in two runs")

    def record(row: list[int]) -> dict:
        try:
            start = next(length for length in lengths if tuple(row[:length]) in asked)
        except StopIteration:
            raise ValueError("a text begins with none of the prompts; give all prompts that are continued") from None
        prompt, ids = asked[tuple(row[:start])], row[start:]
        text = prompt.get("prompt") or codec.tokenizer.decode(row[:start], skip_special_tokens=True)
        about = {"prompt_number": prompts.index(prompt), "sample": "of the run"}
        about |= {"prompt": text, "response": codec.text(ids), "finished": codec.finished(ids)}
        about |= {"response_ids": ids} if own else {}
        return about | ({"now": codec.now.isoformat()} if codec.now else {})

    def reward_fn(ids: Tensor, mask: Tensor) -> Tensor:
        rows = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
        dtype = torch.promote_types(model.dtype, torch.float32)
        return torch.tensor(rewards([record(row) for row in rows]), dtype=dtype, device=ids.device)

    return reward_fn
