"""Tables as the two steppers that `pargs_min.decode.generate` asks for, and a draw that takes every way at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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

    def score(self, candidates: Tensor) -> Tensor:
        children = np.take_along_axis(self.children(), candidates.numpy(), axis=1)
        return torch.from_numpy(np.where(children >= 0, self.scores[self.length + 1][children], 0.0))


class EveryWay:
    """The draw that enumerates: way n takes at step i the candidate that is the i-th digit of n in base K.

    Rows are K**steps ways for the first prompt, then as many for the next.
    """

    def __init__(self, candidates: int, steps: int, prompts: int = 1):
        digits = np.indices((candidates,) * steps).reshape(steps, -1)
        self.ways, self.digits = digits.shape[1], iter(torch.from_numpy(np.tile(digits, prompts)))

    def __call__(self, log_probs: Tensor, uniforms: Tensor) -> Tensor:
        return next(self.digits)
