"""An enumerable world: every prefix that the reference can write, level by level.

`A_i` is the set of length-i prefixes with ref(a) > 0. A *level* is one array with one number for each prefix of one
length, and `Levels` is the list of them for the lengths 0..T. Three moves do all the work:

    down(i, x)    x(a)                for every prefix `at` of A_i: what its parent a holds
    up(i, x)      sum_t x(at)         for every prefix a of A_{i-1}
    log_up(i, x)  log sum_t exp x(at)

After the end token only the end token follows, with probability 1, so every response is a string of exactly T tokens.
A finished response keeps its reward at every length. Logs are natural, everything is float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from scipy.special import expit

from theory.oracle import RationalWorld

Levels = list[np.ndarray]
MAX_STRINGS = 50_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class World:
    """A reference policy with an absorbing end token, a reward on every prefix, and (if given) a preference labeler."""

    prefixes: Levels  # prefixes[i] (n_i, i): the token ids of A_i, siblings side by side
    parents: Levels  # parents[i] (n_i,): the place of a in A_{i-1}, for `at` in A_i
    ref: Levels  # ref[i] (n_i,): log ref(t | a)
    rewards: Levels  # rewards[i] (n_i,)
    vocabulary: int
    eos: int
    labels: np.ndarray | None = None  # labels[m, n] = p(y_m > y_n) over A_T

    @classmethod
    def build(
        cls,
        conditionals: Callable[[np.ndarray], np.ndarray],
        reward: Callable[[np.ndarray], np.ndarray],
        *,
        vocabulary: int,
        horizon: int,
        eos: int,
    ) -> World:
        """Enumerate the world of log ref(. | a) = conditionals((n, i)) -> (n, V) and r = reward((n, i)) -> (n,).

        Both are asked of prefixes without an end token before the last place; -inf marks a token that cannot follow.
        Raises ValueError for a table that is not normalised and for a world of more than MAX_STRINGS responses.
        """
        empty = np.zeros((1, 0), dtype=np.int64)
        prefixes, parents, ref, rewards = [empty], [np.zeros(1, dtype=np.int64)], [np.zeros(1)], [reward(empty)]
        for i in range(1, horizon + 1):
            done = finished(prefixes[-1], eos)
            table = np.full((len(done), vocabulary), -np.inf)
            table[done, eos] = 0.0
            table[~done] = _checked_table(conditionals(prefixes[-1][~done]), prefixes[-1][~done])
            parent, token = np.nonzero(table > -np.inf)
            if len(parent) > MAX_STRINGS:
                raise ValueError(
                    f"world too large to enumerate: {len(parent):,} prefixes of length {i} of {horizon} "
                    f"(vocabulary={vocabulary}), at most {MAX_STRINGS:,}: lower the vocabulary or the horizon"
                )
            prefixes.append(np.column_stack([prefixes[-1][parent], token]))
            kept = done[parent]
            level = np.empty(len(parent))
            level[kept] = rewards[-1][parent[kept]]
            level[~kept] = reward(prefixes[-1][~kept])
            parents.append(parent)
            ref.append(table[parent, token])
            rewards.append(level)
        return cls(prefixes, parents, ref, rewards, vocabulary, eos)

    @classmethod
    def random(
        cls,
        seed: int,
        vocabulary: int = 3,
        horizon: int = 3,
        *,
        sharpness: float = 1.0,
        reward_scale: float = 1.0,
        ties: bool = False,
        zeros: float = 0.0,
    ) -> World:
        """ref = softmax(sharpness * normal), r = reward_scale * normal; `ties` rounds r, `zeros` forbids tokens."""
        rng = np.random.default_rng(seed)

        def conditionals(prefixes: np.ndarray) -> np.ndarray:
            logits = sharpness * rng.standard_normal((len(prefixes), vocabulary))
            allowed = rng.random(logits.shape) >= zeros
            allowed[np.arange(len(logits)), logits.argmax(-1)] = True
            logits = np.where(allowed, logits, -np.inf)
            return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

        def reward(prefixes: np.ndarray) -> np.ndarray:
            values = reward_scale * rng.standard_normal(len(prefixes))
            return np.round(values) if ties else values

        return cls.build(conditionals, reward, vocabulary=vocabulary, horizon=horizon, eos=vocabulary - 1)

    @classmethod
    def from_tables(cls, probabilities: Mapping, rewards: Mapping, *, horizon: int, eos: int) -> World:
        """probabilities[prefix] holds ref(. | prefix), rewards[prefix] a number, both keyed by tuples of token ids.

        An unfinished prefix without a reward gets 0; one without a row of probabilities is an error.
        """

        def lookup(table: Mapping, prefix: np.ndarray, *default) -> Sequence[float] | float:
            key = tuple(map(int, prefix))
            if key not in table and not default:
                raise ValueError(f"probabilities has no row for the prefix {key}: give ref(. | prefix)")
            return table.get(key, *default)

        width = len(probabilities[()])

        def conditionals(prefixes: np.ndarray) -> np.ndarray:
            rows = np.array([lookup(probabilities, a) for a in prefixes], dtype=np.float64).reshape(-1, width)
            return np.log(rows, out=np.full(rows.shape, -np.inf), where=rows > 0)

        def reward(prefixes: np.ndarray) -> np.ndarray:
            return np.array([lookup(rewards, a, 0.0) for a in prefixes], dtype=np.float64)

        return cls.build(conditionals, reward, vocabulary=width, horizon=horizon, eos=eos)

    @classmethod
    def from_rational(cls, world: RationalWorld) -> World:
        """The oracle's world in float64, at beta = 1: r = log w."""
        probabilities = {a: [float(p) for p in row] for a, row in world.conditionals.items()}
        rewards = {a: float(np.log(float(w))) for a, w in world.weights.items()}
        return cls.from_tables(probabilities, rewards, horizon=world.horizon, eos=world.eos)

    @classmethod
    def from_model(cls, model, prompt_ids: Sequence[int], *, horizon: int, eos: int, reward_model=None) -> World:
        """The world of a transformers causal model after one prompt, read by plain forward passes, without a cache.

        The reward of a prefix is the reward model's head at its last token, each prefix encoded anew (0 without one).
        """
        import torch

        @torch.no_grad()
        def conditionals(prefixes: np.ndarray) -> np.ndarray:
            logits = model(_after_prompt(prompt_ids, prefixes)).logits[:, -1]
            return torch.log_softmax(logits.double(), dim=-1).numpy()

        def reward(prefixes: np.ndarray) -> np.ndarray:
            return np.zeros(len(prefixes)) if reward_model is None else model_reward(reward_model, prompt_ids, prefixes)

        return cls.build(conditionals, reward, vocabulary=model.config.vocab_size, horizon=horizon, eos=eos)

    def with_labels(self, labels: np.ndarray) -> World:
        """The same world with p(y > y') on A_T x A_T; ValueError unless p + p' = 1 and 0 < p < 1."""
        n = len(self.prefixes[-1])
        if labels.shape != (n, n):
            raise ValueError(f"labels has shape {labels.shape}, expected one row and column a response: {(n, n)}")
        gap = np.abs(labels + labels.T - 1.0).max()
        if gap > 1e-9:
            raise ValueError(f"labels: p(a > b) + p(b > a) must be 1, it is off by {gap:.3g}")
        if labels.min() <= 0.0 or labels.max() >= 1.0:
            raise ValueError(f"labels must lie strictly between 0 and 1, they span [{labels.min()}, {labels.max()}]")
        return dataclasses.replace(self, labels=labels)

    def __repr__(self) -> str:
        return f"World(vocabulary={self.vocabulary}, horizon={self.horizon}, responses={len(self.prefixes[-1])})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every array

    @property
    def horizon(self) -> int:
        return len(self.prefixes) - 1

    @cached_property
    def first_children(self) -> Levels:
        return [np.searchsorted(parent, np.arange(parent[-1] + 1)) for parent in self.parents]

    def down(self, i: int, x: np.ndarray) -> np.ndarray:
        """x(a) for every `at` in A_i, x on A_{i-1}."""
        return x[self.parents[i]]

    def up(self, i: int, x: np.ndarray) -> np.ndarray:
        """sum_t x(at) for every a in A_{i-1}, x on A_i."""
        return np.add.reduceat(x, self.first_children[i])

    def max_up(self, i: int, x: np.ndarray) -> np.ndarray:
        """max_t x(at) for every a in A_{i-1}, x on A_i."""
        return np.maximum.reduceat(x, self.first_children[i])

    def log_up(self, i: int, x: np.ndarray) -> np.ndarray:
        """log sum_t exp x(at) for every a in A_{i-1}, x on A_i."""
        top = self.max_up(i, x)
        return top + np.log(self.up(i, np.exp(x - self.down(i, top))))

    def paths(self, policy: Levels) -> Levels:
        """log pi(a) on every A_i, from the conditionals log pi(t | a)."""
        paths = [np.zeros(1)]
        for i in range(1, self.horizon + 1):
            paths.append(self.down(i, paths[-1]) + policy[i])
        return paths

    @cached_property
    def log_ref(self) -> Levels:
        """log ref(a) on every A_i."""
        return self.paths(self.ref)

    def backward(self, last: np.ndarray, step: Callable[[int, np.ndarray], np.ndarray]) -> Levels:
        """Levels from A_T to A_0: x_{i-1} = step(i, x_i), starting at x_T = last."""
        levels = [np.asarray(last, dtype=np.float64)]
        for i in range(self.horizon, 0, -1):
            levels.append(step(i, levels[-1]))
        return levels[::-1]

    def mean(self, last: np.ndarray, policy: Levels | None = None) -> Levels:
        """E_pi[last(Y) | Y_1:i = a] on every A_i (pi = ref unless given)."""
        policy = self.ref if policy is None else policy
        return self.backward(last, lambda i, x: self.up(i, np.exp(policy[i]) * x))

    def ancestors(self, i: int) -> np.ndarray:
        """(n_T,) the place in A_i of each response's first i tokens."""
        places = np.arange(len(self.prefixes[-1]))
        for j in range(self.horizon, i, -1):
            places = self.parents[j][places]
        return places

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n_T,) tokens of every response, its end token counted."""
        return np.minimum((self.prefixes[-1] != self.eos).sum(-1) + 1, self.horizon)


def finished(prefixes: np.ndarray, eos: int) -> np.ndarray:
    """(n,) whether a prefix (n, i) has ended."""
    return prefixes[:, -1] == eos if prefixes.shape[1] else np.zeros(len(prefixes), dtype=bool)


def model_reward(reward_model, prompt_ids: Sequence[int], prefixes: np.ndarray) -> np.ndarray:
    """(n,) a transformers reward model's head at the last token of prompt and prefix (n, i), each read by itself."""
    import torch

    with torch.no_grad():
        hidden = reward_model.base_model(_after_prompt(prompt_ids, prefixes)).last_hidden_state[:, -1]
        return reward_model.score(hidden)[:, 0].double().numpy()


def _after_prompt(prompt_ids: Sequence[int], prefixes: np.ndarray):
    import torch

    prompt = np.broadcast_to(np.asarray(prompt_ids, dtype=np.int64), (len(prefixes), len(prompt_ids)))
    return torch.from_numpy(np.concatenate([prompt, prefixes], axis=1))


def bradley_terry_labels(rewards: np.ndarray) -> np.ndarray:
    """p(y > y') = sigmoid(r(y) - r(y'))."""
    return expit(rewards[:, None] - rewards[None, :])


def random_labels(seed: int, n: int, scale: float = 2.0) -> np.ndarray:
    """A labeler that is no one's reward: sigmoid(X - X') of a random matrix X, as a rule not even transitive."""
    x = scale * np.random.default_rng(seed).standard_normal((n, n))
    return expit(x - x.T)


def noise(world: World, seed: int, scale: float = 1.0) -> Levels:
    """Any scores at all: scale * normal on every prefix, drawn anew at every length."""
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal(len(level)) for level in world.ref]


def largest_gap(x: Levels, y: Levels) -> float:
    """max |x - y| over every level."""
    return max(float(np.abs(a - b).max()) for a, b in zip(x, y, strict=True))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) = sum p (e^d - 1 - d), d = log q - log p: no term is negative, so a tiny KL keeps its digits."""
    p, q = np.exp(log_p), np.exp(log_q)
    inside = p > 0
    d = log_q[inside] - log_p[inside]
    small = np.minimum(d, 1.0)  # beyond it e^d may overflow, and the plain form is exact enough
    terms = np.where(d < 1.0, p[inside] * (np.expm1(small) - small), q[inside] - p[inside] * (1.0 + d))
    return float(terms.sum() + q[~inside].sum())


def total_variation(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """TV(p, q) = sum_y |p(y) - q(y)| / 2."""
    return float(np.abs(np.exp(log_p) - np.exp(log_q)).sum() / 2)


def _checked_table(table: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    off = np.abs(np.logaddexp.reduce(table, axis=-1)) if len(table) else np.zeros(1)
    if not off.max() <= 1e-9:
        worst = int(off.argmax())
        raise ValueError(
            f"ref(. | {tuple(map(int, prefixes[worst]))}) sums to {np.exp(table[worst]).sum():.6g}, expected 1: "
            "normalise every row of the table"
        )
    return table
