"""Models out: the card that says what a trained model is, and its way to the model hub."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase, __version__

from pargs_min.codec import Codec
from pargs_min.decode import Warp
from pargs_min.markdown import markdown_table
from pargs_min.methods import guided_by
from pargs_min.models import WRITTEN
from pargs_min.reward_model import OBJECTIVES, has_vocabulary_head, is_language_model, recorded

TEMPLATE = Path(__file__).with_name("card.md")


def model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    base: str,
    dataset: str,
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
    reference: str = "MODEL",
) -> str:
    """A model card in Markdown, with the header that the hub reads, of a guide that has been trained.

    Args:
        model: with what training recorded, `config.pargs`.
        name: what the model is called where it is read: its id on the hub, or its folder.
        base: what training began from; of it and of `dataset`, where they are paths, the last part alone is told.
        counts: what was learned from, by its name.
        metrics: of the end of training; those of time are left out.
        reference: the language model that is to be guided.
    """
    made = recorded(model)
    objective, form, warp = made.get("objective", "full"), made["prompt_format"], made.get("reference", {})
    asked = {"method": guided_by(objective), "beta": made.get("lam") or made.get("beta") or 1.0}
    asked["beta"] = made.get("distilled", {}).get("beta", asked["beta"])
    asked |= {f"ref_{key}": value for key, value in warp.items() if value != getattr(Warp(), key)}
    flags = [part for key, value in asked.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    models = ["--model", told(reference), "--reward-model", name]
    files = ["--prompts", "prompts.txt", "--output", "texts.jsonl"]

    language_model = is_language_model(model)
    end = Codec(tokenizer, form).end
    head = "one number per token that may come next" if has_vocabulary_head(model) else "one reward per prefix"
    facts = {
        "objective": objective,
        "base model": told(base),
        "head": "none: a language model" if language_model else head,
        "data": f"{told(dataset)}: {', '.join(f'{count} {what}' for what, count in counts.items())}",
        "form of prompts": form,
        "end of a response": "none" if end is None else f"`{tokenizer.convert_ids_to_tokens(end)}`",
    }
    facts |= {key: str(value) for key, value in made.items() if key not in ("objective", "prompt_format")}
    timeless = {key: f"{value:.4g}" for key, value in metrics.items() if not key.endswith(("runtime", "per_second"))}
    header = ModelCardData(
        base_model=None if os.path.exists(base) else base,
        datasets=None if os.path.exists(dataset) or dataset.count("/") != 1 else [dataset.partition(":")[0]],
        library_name="transformers",
        pipeline_tag="text-generation" if language_model else "text-classification",
        tags=["pargs-min", "reward-guided-generation", objective],
    )
    card = ModelCard.from_template(
        header,
        str(TEMPLATE),
        name=name,
        path=repr(name),
        what=OBJECTIVES[objective][0].upper() + OBJECTIVES[objective][1:],
        base=told(base),
        reference=repr(told(reference)),
        version=__version__,
        facts=markdown_table(["what", "as trained"], [*map(list, facts.items())], align="ll"),
        metrics=markdown_table(["metric", "value"], [*map(list, timeless.items())]),
        command=shlex.join(["pargs", "generate", *models, *flags, *files]),
        arguments=", ".join(f"{key}={value!r}" for key, value in asked.items()),
    )
    return f"{card}\n"


def told(name: str) -> str:
    """The last part of a path, which says nothing of the machine; an id of the hub as it is."""
    return Path(os.path.abspath(name)).name if os.path.exists(name) else name


def push(folder: str | Path, name: str, **settings: Any) -> str:
    """Upload the model of a folder to the hub, without checkpoints or results that are there, too.

    Args:
        name: owner/name; it is made where there is none.
        settings: `private` and `token`.

    Returns:
        Its address.

    Raises:
        OSError: if that fails, saying how to go on: the folder stays.
    """
    api = HfApi(token=settings.get("token"))
    try:
        address = api.create_repo(name, private=settings.get("private"), exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[*WRITTEN], ignore_patterns="*/*")
    except Exception as error:
        raise OSError(
            f"{folder} is saved, but cannot be pushed to {name} ({error or type(error).__name__}): when it can, "
            f"`hf upload {name} {folder} . --exclude '*/*'`"
        ) from error
    return str(address)
