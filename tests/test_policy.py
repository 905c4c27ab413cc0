"""The equation and its properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from pargs_min.policy import guided_log_probs, keep_rest, tempered, top_k_candidates, truncate_rest
from tests.strategies import candidates, rows

EXACT = dict(rtol=0, atol=1e-12)


@given(candidates())
def test_it_is_the_papers_formula(step):
    ref, rewards, beta = step
    weights = ref.exp() * torch.exp(beta * (rewards - rewards.amax(-1, keepdim=True)))
    assert_close(guided_log_probs(ref, rewards, beta).exp(), weights / weights.sum(-1, keepdim=True), **EXACT)


@given(candidates(), st.floats(0.1, 5.0))
def test_it_is_normalised_at_every_temperature(step, temperature):
    total = tempered(guided_log_probs(*step), temperature).exp().sum(-1)
    assert_close(total, torch.ones(3, dtype=torch.float64), **EXACT)


@given(candidates(), rows(st.just(1)), rows(st.just(1)))
def test_a_constant_per_row_changes_nothing(step, ref_shift, reward_shift):
    ref, rewards, beta = step
    shifted = guided_log_probs(ref + ref_shift, rewards + reward_shift, beta)
    assert_close(shifted, guided_log_probs(ref, rewards, beta), rtol=0, atol=1e-10)


@given(candidates())
def test_beta_zero_is_the_reference(step):
    ref, rewards, _ = step
    assert_close(guided_log_probs(ref, rewards, 0.0), ref, **EXACT)


@given(candidates())
def test_beta_to_infinity_is_the_argmax_of_the_reward(step):
    ref, rewards, _ = step
    rewards = rewards.round()  # ties exactly, or differences of at least one
    best = rewards == rewards.amax(-1, keepdim=True)
    expected = ref.masked_fill(~best, -torch.inf).softmax(-1)  # the reference among the best
    assert_close(guided_log_probs(ref, rewards, 1000.0).exp(), expected, **EXACT)


@given(candidates(), st.randoms(use_true_random=False))
def test_candidates_may_come_in_any_order(step, random):
    ref, rewards, beta = step
    order = list(range(ref.shape[-1]))
    random.shuffle(order)
    assert_close(
        guided_log_probs(ref[:, order], rewards[:, order], beta),
        guided_log_probs(ref, rewards, beta)[:, order],
        **EXACT,
    )


@given(candidates(), st.floats(0.1, 5.0))
def test_temperature_divides_the_sum(step, temperature):
    ref, rewards, beta = step
    expected = guided_log_probs(ref / temperature, rewards / temperature, beta)
    assert_close(tempered(guided_log_probs(ref, rewards, beta), temperature), expected, rtol=0, atol=1e-11)


def test_half_precision_is_computed_in_float32_and_float64_stays():
    half = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert guided_log_probs(half, half, 1.0).dtype == torch.float32
    assert guided_log_probs(half.double(), half, 1.0).dtype == torch.float64


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_beta_must_be_finite(beta):
    with pytest.raises(ValueError, match="beta must be a finite number"):
        guided_log_probs(torch.zeros(1, 2), torch.zeros(1, 2), beta)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), 1e-39, 1e39])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        tempered(torch.zeros(1, 2), temperature)


def test_what_is_out_of_range_depends_on_the_dtype():
    ref, rewards = torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([[1.0, 0.0]])
    assert guided_log_probs(ref, rewards, 1e39).exp().tolist() == [[1, 0]]
    assert tempered(ref, 1e-39).exp().tolist() == [[0, 1]]


@given(rows(st.integers(1, 8)), st.data())
def test_top_k_are_the_k_most_likely(ref, data):
    k = data.draw(st.integers(1, ref.shape[1]))
    values, ids = top_k_candidates(ref, k)
    assert_close(values, ref.gather(1, ids), **EXACT)
    assert_close(values, ref.sort(-1, descending=True).values[:, :k], **EXACT)


def test_top_k_zero_is_the_whole_vocabulary_in_id_order():
    ref = torch.tensor([[0.1, 0.6, 0.3]]).log()
    values, ids = top_k_candidates(ref, 0)
    assert ids.tolist() == [[0, 1, 2]]
    assert_close(values, ref)


@given(rows(st.integers(2, 8)), st.data())
def test_a_floor_leaves_those_above_it_and_always_the_likeliest(ref, data):
    ref = ref.log_softmax(-1)
    k, floor = data.draw(st.integers(0, ref.shape[1])), data.draw(st.floats(0, 1))
    values, ids = top_k_candidates(ref, k, floor)
    theirs = ref.gather(1, ids)
    above = (theirs.exp() >= floor) | (theirs == ref.amax(-1, keepdim=True))
    clear = (theirs.exp() - floor).abs() > 1e-12  # a logarithm may round across the floor
    assert torch.equal(values.isfinite()[clear], above[clear])
    assert_close(values[values.isfinite()], theirs[values.isfinite()], **EXACT)


@given(rows(st.integers(2, 8)), st.data())
def test_the_rest_keeps_what_the_reference_gives_it(ref, data):
    """And the candidates share their mass as the equation says; nothing is lost; the likeliest token is a candidate."""
    ref = ref.log_softmax(-1)
    k, floor, beta = data.draw(st.integers(0, ref.shape[1])), data.draw(st.floats(0, 0.5)), data.draw(st.floats(0, 4))
    candidate_ref, ids = top_k_candidates(ref, k, floor)
    rewards = data.draw(rows(st.just(ids.shape[1])))
    policy = keep_rest(ref, ids, guided_log_probs(candidate_ref, rewards, beta))
    inside = torch.zeros_like(ref, dtype=torch.bool).scatter(1, ids, candidate_ref.isfinite())
    assert_close(policy[~inside], ref[~inside], **EXACT)
    tilted = (ref + beta * torch.zeros_like(ref).scatter(1, ids, rewards)).exp() * inside
    expected = tilted / tilted.sum(-1, keepdim=True) * (ref.exp() * inside).sum(-1, keepdim=True)
    assert_close(policy.exp()[inside], expected[inside], rtol=0, atol=1e-11)
    assert (policy.masked_fill(~inside, -torch.inf).amax(-1) >= policy.amax(-1) - 1e-12).all()


def test_without_reward_and_without_candidates_it_is_the_reference():
    ref = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    for floor, rewards in ((0.0, [[0.0, 0.0]]), (0.6, [[3.0, -2.0]])):
        candidate_ref, ids = top_k_candidates(ref, 2, floor)
        policy = keep_rest(ref, ids, guided_log_probs(candidate_ref, torch.tensor(rewards), 2.0))
        assert_close(policy, ref, **EXACT)


def test_truncation_draws_candidates_alone():
    ref = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    candidate_ref, ids = top_k_candidates(ref, 2)
    among = guided_log_probs(candidate_ref, torch.tensor([[0.0, 1.0]]), 1.0)
    policy = truncate_rest(ref, ids, among)
    assert policy[0, 2] == -torch.inf
    assert_close(policy.gather(1, ids), among, **EXACT)


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_a_floor_is_a_probability(floor):
    with pytest.raises(ValueError, match="min_ref_prob must be a probability, from 0 to 1"):
        top_k_candidates(torch.zeros(1, 3), 2, floor)


@pytest.mark.parametrize("top_k", [-1, 4])
def test_top_k_must_fit_the_vocabulary(top_k):
    with pytest.raises(ValueError, match="top_k must lie between 1 and the vocabulary size 3"):
        top_k_candidates(torch.zeros(1, 3), top_k)
