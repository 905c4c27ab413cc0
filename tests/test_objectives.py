"""Every loss against its exact population optimum: all responses of an enumerable world, weighted by their probability,
and a table with one number for each prefix in place of a network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logit

from pargs_min.baselines.farma import farma_loss
from pargs_min.baselines.genarm import autoregressive_loss
from pargs_min.losses import (
    distillation_loss,
    likelihood_loss,
    partial_bradley_terry_loss,
    prefix_value_loss,
    prefix_win_loss,
    soft_value_loss,
)
from theory.bradley_terry import partial_reward, win_rates
from theory.policies import conditionals, rlhf, soft_value
from theory.world import World, bradley_terry_labels

LAM = 1.7
seeds = pytest.mark.parametrize("seed", range(5))


def world_of(seed):
    """Three tokens and three steps, where the reward of texts also labels pairs."""
    world = World.random(seed, reward_scale=1.5)
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


class Population:
    """The responses of a world as one batch, or all pairs of them: what a loss reads, a row each, and its weight."""

    def __init__(self, world):
        self.world, self.p = world, torch.from_numpy(np.exp(world.log_ref[-1]))
        self.rewards, self.lengths = torch.from_numpy(world.rewards[-1]), torch.from_numpy(world.lengths)
        self.places = torch.from_numpy(np.stack([world.ancestors(i) for i in range(1, world.horizon + 1)], 1))

    def table(self, levels):
        """A number to learn for each prefix, from levels A_1 .. A_T."""
        return [torch.tensor(level, dtype=torch.float64, requires_grad=True) for level in levels[1:]]

    def normalised(self, table):
        """A table of log-probabilities of tokens, from one of logits."""
        rows = []
        for level, parent in zip(table, map(torch.from_numpy, self.world.parents[1:]), strict=True):
            total = torch.zeros(int(parent[-1]) + 1, dtype=level.dtype).index_add(0, parent, level.exp())
            rows.append(level - total.log()[parent])
        return rows

    def read(self, table):
        """(N, T) of a table: its number at each prefix of each response."""
        return torch.stack([level[self.places[:, i]] for i, level in enumerate(table)], 1)

    def of_texts(self, loss, counts, *terms, weights=None):
        """The mean of a loss over all items of texts that are drawn by `weights` (the reference), row by row."""
        weights = self.p if weights is None else weights
        rows = torch.stack([loss(*row) for row in zip(*(term.split(1) for term in terms), strict=True)])
        return (weights * counts * rows).sum() / (weights * counts).sum()

    def of_pairs(self, loss, counts, values, *more):
        """The same over pairs Y, Y' of the reference, each labelled by chance: both ways round, by their weight."""
        one, other = torch.cartesian_prod(torch.arange(len(self.p)), torch.arange(len(self.p))).unbind(1)
        weights = self.p[one] * self.p[other] * torch.sigmoid(self.rewards[one] - self.rewards[other])
        terms = values[one], values[other], self.lengths[one], self.lengths[other], *(term[one] for term in more)
        return self.of_texts(loss, counts(terms[2], terms[3]), *terms, weights=weights)


def ones(n, m):
    """What a loss of whole pairs is a mean of."""
    return torch.ones_like(n)


def assert_least(loss, table):
    """`loss()` is stationary at this table, and greater at others near it."""
    best = loss()
    best.backward()
    assert max(level.grad.abs().max() for level in table) < 1e-10
    for seed in range(3):
        generator, kept = torch.Generator().manual_seed(seed), [level.detach().clone() for level in table]
        with torch.no_grad():
            for level in table:
                level += 0.3 * torch.randn(level.shape, generator=generator, dtype=level.dtype)
            assert loss() > best
            for level, old in zip(table, kept, strict=True):
                level.copy_(old)


@seeds
def test_values_are_expected_rewards(seed):
    world = world_of(seed)
    all_texts = Population(world)
    table = all_texts.table(world.mean(world.rewards[-1]))
    lengths = all_texts.lengths
    assert_least(
        lambda: all_texts.of_texts(prefix_value_loss, lengths, all_texts.read(table), all_texts.rewards, lengths), table
    )


@seeds
def test_soft_values_are_those_whose_tilt_is_the_rlhf_policy(seed):
    world = world_of(seed)
    all_texts = Population(world)
    table, lengths = all_texts.table(soft_value(world, world.rewards[-1], LAM)), all_texts.lengths
    highest = float(all_texts.rewards.max())

    def loss(*terms):
        return soft_value_loss(*terms, lam=LAM, highest=highest)

    assert_least(lambda: all_texts.of_texts(loss, lengths, all_texts.read(table), all_texts.rewards, lengths), table)


def test_far_above_every_reward_the_soft_loss_is_a_line():
    """Its slope is that of the exponential where they meet, and it goes on rising."""
    highest = 0.5
    places = [0.0, 2.9, 3.1, 50.0, 1e4]  # of lam (V - highest)
    values = torch.tensor([[place / LAM + highest] for place in places], dtype=torch.float64, requires_grad=True)
    texts = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.long)
    loss = soft_value_loss(values, *texts, lam=LAM, highest=highest)
    loss.backward()
    slopes = torch.tensor([min(place, 3.0) + LAM * highest for place in places], dtype=torch.float64).exp()
    torch.testing.assert_close(values.grad[:, 0], LAM * (slopes - 1) / 5)
    assert loss.isfinite()


@seeds
def test_reweighted_likelihood_is_greatest_at_the_rlhf_policy(seed):
    world = world_of(seed)
    all_texts = Population(world)
    best = conditionals(world, rlhf(world, world.horizon, world.rewards[-1], LAM))
    table, lengths = all_texts.table(best), all_texts.lengths
    weights = all_texts.p * (LAM * all_texts.rewards).exp()

    def loss():
        log_probs = all_texts.read(all_texts.normalised(table))
        return all_texts.of_texts(likelihood_loss, lengths, log_probs, lengths, weights=weights)

    assert_least(loss, table)


@seeds
def test_soft_labels_and_hard_ones_have_one_optimum(seed):
    """That of T5: labels that are drawn and labels that are probabilities."""
    world = world_of(seed)
    all_texts = Population(world)
    table = all_texts.table(partial_reward(world))
    assert_least(lambda: all_texts.of_pairs(partial_bradley_terry_loss, torch.maximum, all_texts.read(table)), table)
    one, other = torch.triu_indices(len(all_texts.p), len(all_texts.p), offset=1)
    weights, lengths = 2 * all_texts.p[one] * all_texts.p[other], all_texts.lengths
    labels = torch.sigmoid(all_texts.rewards[one] - all_texts.rewards[other])

    def soft():
        values = all_texts.read(table)
        terms = values[one], values[other], lengths[one], lengths[other], labels
        counts = torch.maximum(lengths[one], lengths[other])
        return all_texts.of_texts(
            lambda *row: partial_bradley_terry_loss(*row[:-1], labels=row[-1]), counts, *terms, weights=weights
        )

    for level in table:
        level.grad = None
    assert_least(soft, table)


@seeds
def test_win_rates_of_prefixes(seed):
    world = world_of(seed)
    all_texts = Population(world)
    table = all_texts.table([logit(level) for level in win_rates(world)])
    assert_least(lambda: all_texts.of_pairs(prefix_win_loss, torch.add, all_texts.read(table)), table)


@seeds
def test_an_autoregressive_reward_is_the_reward_under_counting_measure(seed):
    """pi_r(y) in proportion to exp(r(y)), without the reference (T19)."""
    world = world_of(seed)
    all_texts = Population(world)
    log_pi = world.rewards[-1] - np.logaddexp.reduce(world.rewards[-1])
    table = all_texts.table(conditionals(world, log_pi))

    def loss():
        return all_texts.of_pairs(autoregressive_loss, ones, all_texts.read(all_texts.normalised(table)))

    assert_least(loss, table)


@seeds
def test_a_distilled_head_is_its_guide_up_to_a_constant_per_prefix(seed):
    """Whatever a prefix has for candidates; one without any, and what is no candidate, counts nothing."""
    generator = torch.Generator().manual_seed(seed)
    guide, ref = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    ref[0, 1, 2:] = ref[1, 2] = -math.inf
    rewards = guide + torch.randn(4, 3, 1, generator=generator, dtype=torch.float64)
    rewards[0, 1, 2:] = 7.0
    rewards.requires_grad_()
    assert_least(lambda: distillation_loss(rewards, guide, ref, LAM), [rewards])
    p = (ref + LAM * guide)[~ref.isneginf().all(-1)].softmax(-1)
    entropies = torch.special.entr(p).sum(-1)
    assert distillation_loss(rewards, guide, ref, LAM).item() == pytest.approx(entropies.mean().item(), rel=1e-12)
    loss = distillation_loss(rewards, guide, ref, LAM + 0.5)  # at another beta it is least there, too
    assert torch.autograd.grad(loss, rewards)[0].abs().max() < 1e-10


def test_farma_asks_nothing_of_whole_responses_and_of_padding():
    nan = math.nan
    chosen = torch.tensor([[1.0, 2.0, 5.0], [1.0, 3.0, nan], [2.0, nan, nan]], requires_grad=True)
    best = torch.tensor([[2.0, 4.0, nan], [4.0, nan, nan], [nan, nan, nan]])
    lengths = torch.tensor([3, 2, 1])
    loss = farma_loss(chosen, torch.zeros(3, 3), lengths, torch.ones(3, dtype=torch.long), best)
    whole = torch.nn.functional.softplus(-torch.tensor([5.0, 3.0, 2.0])).mean()
    torch.testing.assert_close(loss.detach(), whole + ((1 + 4) / 2 + 9) / 3)
    loss.backward()
    assert chosen.grad.isfinite().all()


@seeds
def test_farma_gives_a_prefix_the_reward_of_its_best_completion(seed):
    world = world_of(seed)
    all_texts = Population(world)
    best = world.backward(world.rewards[-1], world.max_up)
    table = all_texts.table(best)

    def loss():
        values = all_texts.read(table)
        children = [
            torch.zeros(int(world.parents[i][-1]) + 1, dtype=torch.float64).scatter_reduce(
                0, torch.from_numpy(world.parents[i]), table[i - 1], "amax", include_self=False
            )
            for i in range(2, world.horizon + 1)
        ]
        after = all_texts.read([*children, torch.full_like(table[-1], math.nan)])  # nothing follows a whole response
        return all_texts.of_pairs(farma_loss, ones, values, after)

    assert_least(loss, table)
