"""Published preference pairs as chats, split in three by prompt, for the recipes in SMALL_GPU.md.

    python tutorials/split.py PAIRS FOLDER

writes pairs.jsonl for guides, judge_pairs.jsonl for judges and prompts.jsonl to decode for. PAIRS is whatever
`pargs train --dataset` takes: the turns of HH-RLHF's dialogues become messages, any other text the message of a user.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from pargs_min import read_preferences
from pargs_min.codec import as_messages

LONGEST = 1500  # characters of a prompt; longer ones are left out
DECODED = 32  # prompts to decode for; half of the others are for guides, half for judges


def write(file: Path, records: Iterable[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(source: str, folder: str) -> None:
    of_prompt: dict[str, list[dict]] = {}
    for pair in read_preferences(source):
        prompt, responses = as_messages(pair.prompt), dict(chosen=pair.chosen.strip(), rejected=pair.rejected.strip())
        if len(str(pair.prompt)) <= LONGEST and all(responses.values()):
            of_prompt.setdefault(json.dumps(prompt), []).append({"prompt": prompt, **responses})
    groups = list(of_prompt.values())
    random.Random(0).shuffle(groups)
    middle = (DECODED + len(groups)) // 2
    write(Path(folder) / "prompts.jsonl", ({"prompt": group[0]["prompt"]} for group in groups[:DECODED]))
    for name, some in (("pairs", groups[DECODED:middle]), ("judge_pairs", groups[middle:])):
        write(Path(folder) / f"{name}.jsonl", (pair for group in some for pair in group))


if __name__ == "__main__":
    main(*sys.argv[1:])
