"""The Bradley-Terry losses: against their definition, and their symmetries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from pargs_min.losses import bradley_terry_loss, partial_bradley_terry_loss, prefix_value_loss
from tests.strategies import rows, scored_pairs

EXACT = dict(rtol=1e-12, atol=1e-12)
TAILS, REDUCTIONS = st.sampled_from(["extend", "min"]), st.sampled_from(["prefix", "pair"])


def by_definition(chosen, rejected, chosen_lengths, rejected_lengths, tail, reduction):
    """One prefix of one pair at a time, in plain Python."""
    pairs = []
    batch = (x.tolist() for x in (chosen, rejected, chosen_lengths, rejected_lengths))
    for won, lost, n, m in zip(*batch, strict=True):
        last = max(n, m) if tail == "extend" else min(n, m)
        pairs.append([math.log1p(math.exp(lost[i] - won[i])) for i in range(last)])
    means = [sum(pair) / len(pair) for pair in pairs] if reduction == "pair" else [x for pair in pairs for x in pair]
    return sum(means) / len(means)


@given(scored_pairs(), TAILS, REDUCTIONS)
def test_the_partial_loss_is_its_definition(pairs, tail, reduction):
    loss = partial_bradley_terry_loss(*pairs, tail=tail, reduction=reduction)
    assert loss.item() == pytest.approx(by_definition(*pairs, tail, reduction), abs=1e-12)


@given(rows(st.just(1)), rows(st.just(1)))
def test_on_responses_of_one_token_both_losses_agree(chosen, rejected):
    one = torch.ones(3, dtype=torch.long)
    whole = bradley_terry_loss(chosen[:, 0], rejected[:, 0])
    assert_close(partial_bradley_terry_loss(chosen, rejected, one, one), whole, **EXACT)


@given(scored_pairs(), TAILS, REDUCTIONS)
def test_swapping_a_pair_adds_the_difference(pairs, tail, reduction):
    """-log sigmoid(-d) = -log sigmoid(d) + d: the swapped loss is the loss plus the mean difference of rewards."""
    chosen, rejected, n, m = pairs
    loss = partial_bradley_terry_loss(chosen, rejected, n, m, tail, reduction)
    swapped = partial_bradley_terry_loss(rejected, chosen, m, n, tail, reduction)
    last = torch.maximum(n, m) if tail == "extend" else torch.minimum(n, m)
    differences = [(c - r)[:i] for c, r, i in zip(chosen, rejected, last, strict=True)]
    mean = (
        torch.cat(differences).mean() if reduction == "prefix" else torch.stack([d.mean() for d in differences]).mean()
    )
    assert_close(swapped, loss + mean, rtol=1e-9, atol=1e-9)


@given(scored_pairs(), TAILS, REDUCTIONS, st.data())
def test_a_constant_per_pair_and_length_changes_nothing(pairs, tail, reduction, data):
    """Rewards of prefixes are compared only with rewards of the same prompt and length."""
    chosen, rejected, *lengths = pairs
    shift = data.draw(rows(st.just(chosen.shape[1])))
    loss = partial_bradley_terry_loss(chosen, rejected, *lengths, tail, reduction)
    shifted = partial_bradley_terry_loss(chosen + shift, rejected + shift, *lengths, tail, reduction)
    assert_close(shifted, loss, rtol=1e-9, atol=1e-9)


@given(scored_pairs(), TAILS, REDUCTIONS)
def test_equal_rewards_give_log_two(pairs, tail, reduction):
    rewards, _, *lengths = pairs
    loss = partial_bradley_terry_loss(rewards, rewards, *lengths, tail, reduction)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert bradley_terry_loss(rewards[:, 0], rewards[:, 0]).item() == pytest.approx(math.log(2), abs=1e-12)


@given(scored_pairs(), TAILS, REDUCTIONS)
def test_what_stands_at_padding_reaches_neither_loss_nor_gradient(pairs, tail, reduction):
    chosen, rejected, n, m = pairs
    last = torch.maximum(n, m) if tail == "extend" else torch.minimum(n, m)
    padding = torch.arange(chosen.shape[1]) >= last[:, None]
    dirty = chosen.masked_fill(padding, float("nan")).requires_grad_()
    loss = partial_bradley_terry_loss(dirty, rejected, n, m, tail, reduction)
    assert_close(loss.detach(), partial_bradley_terry_loss(chosen, rejected, n, m, tail, reduction), **EXACT)
    loss.backward()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("tail", ["extend", "min"])
@pytest.mark.parametrize("reduction", ["prefix", "pair"])
def test_gradients_pass_gradcheck(tail, reduction):
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2, 3]), torch.tensor([1, 4, 3])
    torch.autograd.gradcheck(
        lambda c, r: partial_bradley_terry_loss(c, r, *lengths, tail, reduction), (chosen, rejected)
    )
    torch.autograd.gradcheck(lambda c, r: bradley_terry_loss(c[:, 0], r[:, 0]), (chosen, rejected))


def test_huge_differences_neither_overflow_nor_vanish():
    chosen, rejected = torch.tensor([[-1e4]]), torch.tensor([[1e4]])
    one = torch.tensor([1])
    assert partial_bradley_terry_loss(chosen, rejected, one, one).item() == 2e4
    assert partial_bradley_terry_loss(rejected, chosen, one, one).item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tail="hold"), 'tail must be "extend" or "min"'),
        (dict(reduction="sum"), 'reduction must be "prefix" or "pair"'),
        (dict(rejected_rewards=torch.zeros(2, 4)), "must have one shape"),
        (dict(chosen_lengths=torch.tensor([[3], [1]])), r"lengths \(B,\), got \(2, 3\) and \(2, 1\) and \(2,\)"),
        (dict(rejected_lengths=torch.tensor(2)), r"lengths \(B,\), got \(2, 3\) and \(2,\) and \(\)"),
        (dict(chosen_rewards=torch.zeros(2), rejected_rewards=torch.zeros(2)), r"rewards must be \(B, T\)"),
        (dict(chosen_lengths=torch.tensor([0, 1])), "must lie in 1..3"),
        (dict(chosen_lengths=torch.tensor([4, 1])), "must lie in 1..3"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = dict(
        chosen_rewards=torch.zeros(2, 3),
        rejected_rewards=torch.zeros(2, 3),
        chosen_lengths=torch.tensor([3, 1]),
        rejected_lengths=torch.tensor([1, 2]),
    )
    partial_bradley_terry_loss(**good)
    with pytest.raises(ValueError, match=message):
        partial_bradley_terry_loss(**{**good, **change})


def test_the_whole_loss_names_shapes_that_differ():
    with pytest.raises(ValueError, match="must have one shape"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))


@given(scored_pairs())
def test_the_value_loss_is_its_definition_and_least_at_the_mean(pairs):
    values, _, lengths, _ = pairs
    rewards = values[:, 0] + 1.5
    errors = [
        (value - reward) ** 2
        for row, reward, n in zip(values.tolist(), rewards.tolist(), lengths.tolist(), strict=True)
        for value in row[:n]
    ]
    assert_close(prefix_value_loss(values, rewards, lengths).item(), sum(errors) / len(errors), **EXACT)
    shared = rewards.mean().requires_grad_()  # one prefix that all three texts begin with
    prefix_value_loss(shared.expand(3, 1), rewards, torch.ones_like(lengths)).backward()
    assert shared.grad.abs() < 1e-12


def test_the_value_loss_does_not_see_padding():
    values = torch.tensor([[1.0, float("nan")], [2.0, 3.0]], requires_grad=True)
    prefix_value_loss(values, torch.tensor([0.0, 0.0]), torch.tensor([1, 2])).backward()
    assert_close(values.grad, torch.tensor([[2 / 3, 0.0], [4 / 3, 2.0]]))


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 3), [[1], [1]], r"values must be"),
        ((2, 3), [1, 4], r"lengths must lie in 1..3 .*got 1..4"),
        ((3, 3), [1, 2], r"values must be \(B, T\)"),
    ],
)
def test_bad_arguments_of_the_value_loss_are_named(shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        prefix_value_loss(torch.zeros(shape), torch.zeros(2), torch.tensor(lengths))


def test_lengths_restrict_the_loss_to_some_prefixes():
    """Exactly the mean over the prefixes that are left; with none left it is zero, and so is its gradient."""
    chosen = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rejected, ends = torch.zeros_like(chosen), (torch.tensor([4, 2]), torch.tensor([3, 1]))
    some = partial_bradley_terry_loss(chosen, rejected, *ends, lengths=(2, 3))
    kept = [chosen[0, 1], chosen[0, 2], chosen[1, 1]]
    assert_close(some, sum(torch.nn.functional.softplus(-r) for r in kept) / 3, rtol=0, atol=1e-14)
    none = partial_bradley_terry_loss(chosen[1:], rejected[1:], torch.tensor([2]), torch.tensor([1]), lengths=(3, None))
    none.backward()
    assert none == 0
    assert (chosen.grad == 0).all()
    with pytest.raises(ValueError, match="lengths must be"):
        partial_bradley_terry_loss(chosen, rejected, *ends, lengths=(3, 2))


def test_a_pair_that_compares_nothing_counts_zero_in_a_mean_over_pairs():
    chosen = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], requires_grad=True)
    lengths = torch.tensor([3, 1]), torch.tensor([2, 1])
    loss = partial_bradley_terry_loss(chosen, torch.zeros(2, 3), *lengths, reduction="pair", lengths=(3, None))
    assert_close(loss.detach(), torch.tensor(math.log1p(math.exp(-3)) / 2))
    loss.backward()
    assert chosen.grad[1].tolist() == [0, 0, 0]
