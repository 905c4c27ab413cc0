"""Published preference pairs as chats, split in three by prompt, for the recipes in SMALL_GPU.md.

    python tutorials/split.py PAIRS FOLDER

writes pairs.jsonl for guides, judge_pairs.jsonl for judges and prompts.jsonl to decode for. PAIRS is whatever
`pargs train --dataset` takes, but for token ids: the turns of HH-RLHF's dialogues become messages, any other text the
message of a user.
"""

import json
import random
import sys
from pathlib import Path

from pargs_min import read_preferences
from pargs_min.codec import as_messages
from pargs_min.store import write_lines

LONGEST = 1500  # characters of a prompt; longer ones are left out
DECODED = 32  # prompts to decode for; half of the others are for guides, half for judges


def main(source: str, folder: str) -> None:
    of_prompt: dict[str, list[dict]] = {}
    for pair in read_preferences(source):
        prompt, responses = as_messages(pair.prompt), dict(chosen=pair.chosen.strip(), rejected=pair.rejected.strip())
        if len(str(pair.prompt)) <= LONGEST and all(responses.values()):
            of_prompt.setdefault(json.dumps(prompt), []).append({"prompt": prompt, **responses})
    groups = list(of_prompt.values())
    if len(groups) < DECODED + 2:
        sys.exit(f"{source} has {len(groups)} prompts of up to {LONGEST} characters; {DECODED + 2} are needed")
    random.Random(0).shuffle(groups)
    middle = (DECODED + len(groups)) // 2
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_lines(Path(folder) / "prompts.jsonl", ({"prompt": group[0]["prompt"]} for group in groups[:DECODED]))
    for name, some in (("pairs", groups[DECODED:middle]), ("judge_pairs", groups[middle:])):
        write_lines(Path(folder) / f"{name}.jsonl", (pair for group in some for pair in group))


if __name__ == "__main__":
    main(*sys.argv[1:])
