"""Tables as the two steppers that `pargs_min.decode.generate` asks for, and a draw that takes every way at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pargs_min.scoring import LanguageModelScorer
from theory.world import Levels, World


class Walk:
    """Where each row stands in the tree of prefixes; -1 once it took a token that the reference never writes."""

    def __init__(self, world: World):
        self.world = world

    def start(self, prompt_ids: Tensor, mask: Tensor) -> None:
        self.length, self.at = 0, np.zeros(len(prompt_ids), dtype=np.int64)

    def children(self) -> np.ndarray:
        """(B, V) the place of each child in the next level, -1 where there is none."""
        i = self.length + 1
        table = np.full((len(self.world.prefixes[self.length]), self.world.vocabulary), -1)
        table[self.world.parents[i], self.world.prefixes[i][:, -1]] = np.arange(len(self.world.prefixes[i]))
        return np.where(self.at[:, None] >= 0, table[self.at], -1)

    def select(self, rows: Tensor) -> None:
        self.at = self.at[rows.numpy()]

    def push(self, tokens: Tensor) -> None:
        self.at, self.length = self.children()[np.arange(len(self.at)), tokens.numpy()], self.length + 1


class TabularPolicy(Walk):
    """The reference of a world as a policy stepper."""

    def log_probs(self) -> Tensor:
        children = self.children()
        log_probs = np.where(children >= 0, self.world.ref[self.length + 1][children], -np.inf)
        log_probs[self.at < 0] = -np.log(self.world.vocabulary)  # any numbers: the row has probability 0 already
        return torch.from_numpy(log_probs)


class TabularReward(Walk):
    """Scores on every prefix as a reward scorer."""

    def __init__(self, world: World, scores: Levels):
        super().__init__(world)
        self.scores = scores

    def score(self, candidates: Tensor, ref_log_probs: Tensor) -> Tensor:
        children = np.take_along_axis(self.children(), candidates.numpy(), axis=1)
        return torch.from_numpy(np.where(children >= 0, self.scores[self.length + 1][children], 0.0))


class TabularGuide(Walk, LanguageModelScorer):
    """A policy of the theory as the language model that guides; whatever the reference never writes has no mass."""

    def __init__(self, world: World, policy: Levels, beta: float | None = None):
        super().__init__(world)
        self.policy, self.beta, self.vocabulary = policy, beta, world.vocabulary

    def next_log_probs(self, vocabulary: int | None) -> Tensor:
        children = self.children()
        return torch.from_numpy(np.where(children >= 0, self.policy[self.length + 1][children], -1e3))


class EveryWay:
    """The draw that enumerates: way n takes at step i the token that is the i-th digit of n in base V.

    Rows are all ways for the first prompt, then as many for the next. With several particles a way is a token and an
    ancestor for each of them at each step (`resampler` hands the ancestors to `pargs_min.smc`), and the rows of a way
    stand together. `log_mass` (prompts * ways,) is the log-probability of what each way has drawn so far, an ancestor
    being drawn in proportion to its weight.
    """

    def __init__(self, vocabulary: int, steps: int, prompts: int = 1, particles: int = 1):
        count = steps * particles
        digits = np.indices((vocabulary,) * count + (particles,) * count).reshape(2 * count, -1)
        self.ways, self.particles = digits.shape[1], particles
        digits = np.tile(digits, prompts).reshape(-1, particles, digits.shape[1] * prompts)  # (step, particle, way)
        self.tokens = iter(torch.from_numpy(digits[:steps].swapaxes(1, 2).reshape(steps, -1)))
        self.ancestors = iter(torch.from_numpy(digits[steps:].swapaxes(1, 2).copy()))
        self.log_mass = torch.zeros(prompts * self.ways, dtype=torch.float64)

    def __call__(self, log_probs: Tensor, uniforms: Tensor) -> Tensor:
        tokens = next(self.tokens)
        self.log_mass += log_probs.gather(1, tokens[:, None]).view(-1, self.particles).sum(1)
        return tokens

    def resampler(self, log_weights: Tensor, uniforms: Tensor) -> Tensor:
        chosen = next(self.ancestors)
        self.log_mass += log_weights.log_softmax(-1).gather(1, chosen).sum(1)
        return chosen
