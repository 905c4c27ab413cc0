"""The embedded world: a traveller packs one thing, and much later it matters.

    the sailor leaves for the island : she packs a small flute and walks the ridge past golden hills into wolves
    and comes home warm with songs

A grammar writes such journeys, 8 to 24 words, for twelve prompts (a role and a place). Each road of a place has its own
trouble, each item is of use in one trouble, and only who carries the right thing comes home. So the item and the road,
neutral words at the start, all but settle the ending, and no later word undoes them; the words on the way mislead
(under fair skies a traveller strays from her road). The gold reward is read off how the journey ends. It is a finite
automaton over any word string, nobody optimises it, and the automaton's values are known exactly (`exact.py`).

The reference language model is a tiny GPT-2 trained on the grammar's texts; preference pairs are its own samples,
labelled by Bradley-Terry noise on the gold reward. It has seen every prompt; pairs are made for TRAIN_PROMPTS alone, so
a reward model meets the role and place of each of HELD_OUT_PROMPTS only apart from each other.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import tqdm

from pargs_min.decode import ModelPolicy, generate, row_uniforms
from pargs_min.exact import Array, Automaton, entropy, expected_length, sample

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
HORIZON = 25  # tokens in the longest journey, its end token included
OFF_GRAMMAR = -3.5  # the gold reward of a word string that the grammar cannot have written

ADJECTIVES = "small", "red", "heavy", "worn"
USE = {
    "rope": "floods",
    "raft": "floods",
    "compass": "fog",
    "lantern": "fog",
    "kettle": "snow",
    "blanket": "snow",
    "flute": "wolves",
    "drum": "wolves",
}
TROUBLES = tuple(dict.fromkeys(USE.values()))
HABIT = {"sailor": "rope", "baker": "kettle", "painter": "lantern", "shepherd": "flute"}  # what a role packs most often
ROADS = {
    "island": {"coast": "floods", "marsh": "fog", "ridge": "wolves", "valley": "floods"},
    "mountain": {"coast": "fog", "marsh": "wolves", "ridge": "snow", "valley": "snow"},
    "forest": {"coast": "snow", "marsh": "floods", "ridge": "fog", "valley": "fog"},
}
SIGHTS = {
    "past": ("hills", "orchards", "villages"),
    "under": ("skies", "clouds", "stars"),
    "through": ("rain", "wind", "woods"),
}
MOODS = {"golden": "fair", "warm": "fair", "bright": "fair", "grim": "dark", "cold": "dark", "bitter": "dark"}
HOME = {"warm": 0.5, "bright": 0.25, "golden": 0.25, "tired": 0.0, "cold": -0.25, "bitter": -0.5}
AWAY = {"warm": 0.25, "lost": 0.0, "tired": 0.0, "cold": -0.25, "bitter": -0.25, "grim": -0.5}
GIFTS = {"songs": 0.25, "honey": 0.0, "nothing": -0.25}

PROMPTS = tuple(f"the {role} leaves for the {place} :" for role in HABIT for place in ROADS)
HELD_OUT_PROMPTS = tuple(
    f"the {role} leaves for the {place} :"
    for role, place in (("sailor", "mountain"), ("baker", "forest"), ("painter", "island"), ("shepherd", "mountain"))
)
TRAIN_PROMPTS = tuple(prompt for prompt in PROMPTS if prompt not in HELD_OUT_PROMPTS)

# A place in the story, and a way on from it: how likely, which words, and the place they lead to.
Place = tuple
Way = tuple[Fraction | int, str, Place]
# A state of the automaton: all that can still be written, as ((words, place after them), probability) pairs.
State = tuple[tuple[tuple[tuple[str, ...], Place], Fraction], ...]


@dataclass(frozen=True)
class Journey:
    """The world. stay_home_reward: gold of never leaving (0 makes it a safe exit); luck: P(home without the right thing).

    >>> world = Journey()
    >>> world.gold(["the baker leaves for the forest :"] * 2, ["she packs a drum and then stays home", "she packs"])
    [-2.0, -3.5]
    """

    stay_home_reward: float = -2.0
    luck: Fraction = Fraction(1, 200)

    def ways(self, place: Place) -> list[Way]:
        """The grammar: the ways on from a place in the story. Their weights are proportional to probabilities."""
        match place:
            case "start", role, land:
                packing = "packing", role, land
                return [
                    (2, "she packs a", packing),
                    (1, "today she packs a", packing),
                    (1, "again she packs a", packing),
                ]
            case "packing", role, land:
                items = [(3 if item == HABIT[role] else 1, item, ("packed", use, land)) for item, use in USE.items()]
                return [(4 * n, item, then) for n, item, then in items] + [
                    (n, f"{adjective} {item}", then) for adjective in ADJECTIVES for n, item, then in items
                ]
            case "packed", use, land:
                return [
                    (92, "and walks the", ("roads", use, land)),
                    (8, "and then stays home", ("end", self.stay_home_reward)),
                ]
            case "roads", use, land:
                return [(1, road, ("road", use, trouble, "plain", 2)) for road, trouble in ROADS[land].items()]
            case "road", use, own, mood, sights_left:
                chance = trouble_ahead(use, own, mood)
                onward = [(p, f"into {trouble} and", ("trouble", trouble == use)) for trouble, p in chance.items()]
                sights = [
                    (Fraction(1, 3), word, ("sight", word, use, own, sights_left - 1)) for word in SIGHTS if sights_left
                ]
                return onward + sights
            case "sight", preposition, use, own, sights_left:
                return [
                    (1, f"{word} {noun}", ("road", use, own, mood, sights_left))
                    for word, mood in MOODS.items()
                    for noun in SIGHTS[preposition]
                ]
            case "trouble", prepared:
                home = Fraction(17, 20) if prepared else self.luck
                return [(home, "comes home", ("ending", 2.0, "home")), (1 - home, "ends up", ("ending", -2.0, "away"))]
            case "ending", reward, where:
                feelings = HOME if where == "home" else AWAY
                return [(1, word, ("gift", reward + value)) for word, value in feelings.items()]
            case "gift", reward:
                return [(3, END, ("end", reward))] + [
                    (1, f"with {gift}", ("end", reward + value)) for gift, value in GIFTS.items()
                ]
            case "end", _:
                return [(1, END, place)]
        raise ValueError(f"place {place!r} is not in the story")

    @cached_property
    def _stories(self) -> dict[str, tuple[list[State], list[dict[str, tuple[Fraction, int]]]]]:
        """For each prompt its states, the first one first, and from each state word -> (probability, next state)."""
        stories, moves_from = {}, cache(self._moves)
        for prompt in PROMPTS:
            _, role, *_, land, _ = prompt.split()
            states = [self._state([((), ("start", role, land), Fraction(1))])]
            number, moves = {states[0]: 0}, []
            for state in states:  # grows as it is read
                moves.append({})
                for word, probability, then in moves_from(state):
                    if then not in number:
                        number[then] = len(states)
                        states.append(then)
                    moves[-1][word] = probability, number[then]
            stories[prompt] = states, moves
        return stories

    def _moves(self, state: State) -> list[tuple[str, Fraction, State]]:
        """The next words of a state: each with its probability and what can be written after it."""
        rest = defaultdict(list)
        for (words, place), p in state:
            rest[words[0]].append((words[1:], place, p))
        return [(word, sum(p for *_, p in options), self._state(options)) for word, options in rest.items()]

    def _state(self, options: Iterable[tuple[tuple[str, ...], Place, Fraction]]) -> State:
        """The state of these (words, place after them, weight): what can follow, equal continuations added up.

        Prefixes with the same future share a state, so the automaton forgets what no longer matters.
        """
        future: dict[tuple[tuple[str, ...], Place], Fraction] = {}
        for words, place, p in options:
            if words:
                future[words, place] = future.get((words, place), 0) + p
            else:
                ways = self.ways(place)
                total = sum(weight for weight, *_ in ways)
                for weight, phrase, then in ways:
                    key = tuple(phrase.split()), then
                    future[key] = future.get(key, 0) + p * Fraction(weight) / total
        total = sum(future.values())
        return tuple((key, p / total) for key, p in future.items())

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every word and its id: pad, end, unknown, then the words of prompts and journeys in alphabetical order."""
        words = {word for _, moves in self._stories.values() for move in moves for word in move}
        words |= {word for prompt in PROMPTS for word in prompt.split()}
        return {word: i for i, word in enumerate([PAD, END, UNKNOWN, *sorted(words - {END})])}

    @cached_property
    def words(self) -> list[str]:
        """The word of each id."""
        return list(self.vocabulary)

    @cached_property
    def automata(self) -> dict[str, Automaton]:
        """The automaton of each prompt; the reward of an unfinished state is that of an off-grammar text."""
        return {prompt: self._automaton(*story) for prompt, story in self._stories.items()}

    def _automaton(self, states: list[State], moves: list[dict[str, tuple[Fraction, int]]]) -> Automaton:
        edges = [
            (i, self.vocabulary[word], j, float(p)) for i, move in enumerate(moves) for word, (p, j) in move.items()
        ]
        sources, tokens, targets, probabilities = map(np.array, zip(*edges, strict=True))
        rewards = np.array([_final_reward(state) for state in states])
        return Automaton(sources, tokens, targets, np.log(probabilities), rewards, start=0, horizon=HORIZON)

    def write(self, uniforms: Array, prompts: Sequence[str] = PROMPTS) -> tuple[NDArray[np.int64], Array]:
        """Journeys by the grammar itself, row i for prompts[i % len(prompts)]: tokens and their log-probabilities.

        uniforms (N, HORIZON) in [0, 1); results (N, HORIZON), after the end more end tokens, of log-probability 0.
        """
        tokens, log_probs = np.empty(uniforms.shape, dtype=np.int64), np.empty(uniforms.shape)
        for i, prompt in enumerate(prompts):
            rows = slice(i, None, len(prompts))
            tokens[rows], log_probs[rows] = sample(self.automata[prompt], uniforms[rows])
        return tokens, log_probs

    def gold(self, prompts: Sequence[str], responses: Sequence[str | Sequence[int]]) -> list[float]:
        """The gold reward of each response, as text or as token ids, to its prompt.

        A response goes up to its first end token, if it has one. What the grammar cannot have written, an unfinished
        journey included, is worth OFF_GRAMMAR. Raises ValueError for a prompt that is not among PROMPTS.
        """
        return [self._gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _gold(self, prompt: str, response: str | Sequence[int]) -> float:
        if prompt not in self._stories:
            raise ValueError(f"prompt must be one of the world's twelve (PROMPTS), got {prompt!r}")
        states, moves = self._stories[prompt]
        state = 0
        for word in (*takewhile(lambda word: word != END, self._words(response)), END):
            if word not in moves[state]:
                return OFF_GRAMMAR
            _, state = moves[state][word]
        return _final_reward(states[state])

    def _words(self, response: str | Sequence[int]) -> list[str]:
        return response.split() if isinstance(response, str) else [self.words[token] for token in response]


def _final_reward(state: State) -> float:
    (words, place), _ = state[0]
    return place[1] if words == (END,) and place[0] == "end" and len(state) == 1 else OFF_GRAMMAR


def trouble_ahead(use: str, own: str, mood: str) -> dict[str, Fraction]:
    """P(trouble) for who packed against `use`, on a road whose own trouble is `own`, after the last mood she saw.

    Dark moods keep her on her road, so she meets its own trouble; under fair ones she strays to where what she packed
    is of no use.
    """
    likely, p = (
        (use, Fraction(3, 20)) if mood == "fair" else (own, Fraction(19, 20) if mood == "dark" else Fraction(13, 20))
    )
    return {trouble: p if trouble == likely else (1 - p) / (len(TROUBLES) - 1) for trouble in TROUBLES}


# The reference language model and its preference pairs -----------------------------------------------------------------


def word_tokenizer(world: Journey) -> PreTrainedTokenizerFast:
    """One token a word, words apart by blanks; pad, end and unknown tokens have ids of their own."""
    words = Tokenizer(WordLevel(world.vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def reference(
    folder: str | Path,
    world: Journey | None = None,
    *,
    seed: int = 0,
    texts: int = 24_000,
    steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the reference on the grammar's journeys for all prompts, or load it if the folder holds it already.

    A GPT-2 of 2 layers, width 64 and 4 heads (about 110,000 parameters), saved with its tokenizer as an ordinary hub
    folder. About 40 seconds on one core. Raises ValueError if the folder holds a model made with other arguments.
    """
    folder, world = Path(folder), world or Journey()
    made_with = {
        "world": repr(world),
        "seed": seed,
        "texts": texts,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    if not folder.exists():
        tokenizer, model = word_tokenizer(world), _new_model(world, seed)
        _train(model, world, seed, texts, steps, batch_size, learning_rate)
        model.config.journey = made_with
        unfinished = folder.with_name(f"{folder.name}.unfinished")  # so that the folder, once there, is whole
        for part in (model, tokenizer):
            part.save_pretrained(unfinished)
        unfinished.rename(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if getattr(model.config, "journey", None) != made_with:
        raise ValueError(
            f"folder {folder} holds a model made with {getattr(model.config, 'journey', 'other code')}, "
            f"not with {made_with}: choose another folder or delete this one"
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _new_model(world: Journey, seed: int) -> GPT2LMHeadModel:
    end, pad = world.vocabulary[END], world.vocabulary[PAD]
    config = GPT2Config(
        vocab_size=len(world.vocabulary),
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _train(
    model: PreTrainedModel, world: Journey, seed: int, texts: int, steps: int, batch_size: int, learning_rate: float
) -> None:
    rng = np.random.default_rng(seed)
    ids, labels = _with_prompts(world, world.write(rng.random((texts, HORIZON)))[0], PROMPTS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="reference model")
    for _ in progress:
        rows = torch.from_numpy(rng.integers(texts, size=batch_size))
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"{loss.item():.3f} nats a token", refresh=False)


def _with_prompts(world: Journey, tokens: NDArray[np.int64], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (N, P + T) of prompts and journeys, and labels: -100 at the prompt and after the first end token."""
    prompt_ids = np.array([[world.vocabulary[word] for word in prompt.split()] for prompt in prompts])
    ids = np.concatenate([np.resize(prompt_ids, (len(tokens), prompt_ids.shape[1])), tokens], axis=1)
    ended = np.cumsum(tokens == world.vocabulary[END], axis=1) - (tokens == world.vocabulary[END]) > 0
    labels = ids.copy()
    labels[:, : prompt_ids.shape[1]] = -100
    labels[:, prompt_ids.shape[1] :][ended] = -100
    return torch.from_numpy(ids), torch.from_numpy(labels)


@torch.no_grad()
def reference_gap(model: PreTrainedModel, world: Journey, *, texts: int = 2400, seed: int = 1) -> dict[str, float]:
    """How close the reference comes to the automaton, on fresh journeys of the grammar; all in nats.

    model, automaton: per token, on the same texts; entropy: the automaton's exact rate, entropy / expected length; gap:
    model minus automaton per text, an unbiased estimate of KL(automaton || model), with its standard error gap_se.
    """
    tokens, log_probs = world.write(np.random.default_rng([seed, texts]).random((texts, HORIZON)))
    ids, labels = _with_prompts(world, tokens, PROMPTS)
    losses = [
        cross_entropy(model(input_ids=x).logits[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").sum(1)
        for x, y in zip(ids.split(256), labels.split(256), strict=True)
    ]
    by_model, by_automaton, count = torch.cat(losses).double().numpy(), -log_probs.sum(1), int((labels != -100).sum())
    gap = by_model - by_automaton
    exact = [
        (entropy(automaton), expected_length(automaton, world.vocabulary[END])) for automaton in world.automata.values()
    ]
    return {
        "model": by_model.sum() / count,
        "automaton": by_automaton.sum() / count,
        "entropy": sum(h for h, _ in exact) / sum(n for _, n in exact),
        "gap": gap.mean(),
        "gap_se": gap.std(ddof=1) / len(gap) ** 0.5,
    }


def write_pairs(
    file: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: Journey,
    *,
    pairs: int = 4000,
    seed: int = 0,
    prompts: Sequence[str] = TRAIN_PROMPTS,
    batch_size: int = 500,
) -> int:
    """Write preference pairs: two samples of the reference each, the chosen one drawn with P = sigmoid(gold - gold').

    JSONL records {prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids}; responses without their end token.
    Pair i is of prompts[i % len(prompts)]. A pair with a response that did not end within HORIZON tokens is left out;
    returns how many were. Off-grammar responses stay: they are part of the reference.
    """
    left_out = 0
    unfinished = Path(f"{file}.unfinished")
    with unfinished.open("w", encoding="utf-8") as out, tqdm(total=pairs, desc="preference pairs") as progress:
        for first in range(0, pairs, batch_size):
            numbers = range(first, min(first + batch_size, pairs))
            asked = [prompts[i % len(prompts)] for i in numbers]
            one, other = (responses(model, tokenizer, asked, [2 * i + k for i in numbers], seed) for k in (0, 1))
            noise = row_uniforms(
                seed, (PROMPTS.index(prompt) for prompt in asked), (2 * i for i in numbers), HORIZON + 1
            )
            for prompt, a, b, u in zip(asked, one, other, noise[:, -1].tolist(), strict=True):
                if a is None or b is None:
                    left_out += 1
                    continue
                better, worse = world.gold([prompt] * 2, [a, b])
                chosen, rejected = (a, b) if u < 1 / (1 + math.exp(worse - better)) else (b, a)
                record = {
                    "prompt": prompt,
                    "chosen": tokenizer.decode(chosen),
                    "rejected": tokenizer.decode(rejected),
                    "prompt_ids": tokenizer(prompt).input_ids,
                    "chosen_ids": chosen,
                    "rejected_ids": rejected,
                }
                out.write(json.dumps(record) + "\n")
            progress.update(len(numbers))
    unfinished.rename(file)
    return left_out


def responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    samples: Sequence[int],
    seed: int,
) -> list[list[int] | None]:
    """One sample of the reference a row, ids without the end token; None where HORIZON tokens brought no end.

    Row i is sample number samples[i] of prompts[i], whatever the other rows are (`row_uniforms`).
    """
    ids = torch.tensor(tokenizer(list(prompts)).input_ids)
    uniforms = row_uniforms(seed, (PROMPTS.index(prompt) for prompt in prompts), samples, HORIZON)
    end = tokenizer.eos_token_id
    drawn = generate(
        ModelPolicy(model),
        None,
        ids,
        beta=0.0,
        top_k=0,
        max_new_tokens=HORIZON,
        eos=end,
        pad=tokenizer.pad_token_id,
        uniforms=uniforms,
    )
    rows = [row[:n] for row, n in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)]
    return [row[:-1] if row[-1] == end else None for row in rows]


class FrontierPoint(NamedTuple):
    """The best expected reward at a KL (nats a response), and the effective sample size that it rests on."""

    beta: float
    reward: float
    kl: float
    effective_samples: float


def frontier(gold: Array, betas: Sequence[float], least: float = 500.0) -> list[FrontierPoint]:
    """The RLHF frontier of the model that wrote the samples: their weights are w = exp(beta gold) / sum exp(beta gold).

    Reward sum_n w_n gold_n and KL sum_n w_n log(N w_n), self-normalised for each prompt and averaged over prompts;
    effective samples 1 / sum_n w_n^2, added over prompts. Points with fewer than `least` are left out.

    gold (prompts, N): gold rewards of N samples of each prompt.

    >>> frontier(np.array([[0.0, 1.0] * 600]), [0.0, 1.0])[1].reward   # sigmoid(1)
    0.7310585786300049
    """
    points = []
    for beta in betas:
        log_weights = beta * gold - logsumexp(beta * gold, axis=1, keepdims=True)
        weights = np.exp(log_weights)
        reward = (weights * gold).sum(1).mean()
        kl = (weights * (log_weights + math.log(gold.shape[1]))).sum(1).mean()
        points.append(FrontierPoint(beta, float(reward), float(kl), float((1 / (weights**2).sum(1)).sum())))
    return [point for point in points if point.effective_samples >= least]
