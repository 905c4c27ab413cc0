"""The worlds themselves: what they promise, the oracle's agreement, and what bad input gets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import strategies as st

from theory import oracle
from theory.bradley_terry import fit_bradley_terry, partial_reward, win_rate
from theory.ledger import verify
from theory.policies import rlhf, soft_value, tokenwise
from theory.strategies import for_all, seeds, worlds
from theory.world import World, bradley_terry_labels, finished, kl, largest_gap, random_labels, total_variation


@for_all(seed=seeds, shape=st.sampled_from([(2, 4), (3, 3), (4, 2)]))
def test_numpy_agrees_with_the_rational_oracle(seed, shape):
    exact = oracle.random_rational_world(seed, *shape)
    world = World.from_rational(exact)
    assert [tuple(a) for a in world.prefixes[-1]] == oracle.prefixes(exact, exact.horizon)
    world = world.with_labels(bradley_terry_labels(world.rewards[-1]))
    q = world.paths(tokenwise(world, world.rewards, 1.0))[-1]
    pairs = {
        "q": (q, oracle.sequences(exact).values()),
        "pi_T": (rlhf(world, world.horizon, world.rewards[-1], 1.0), oracle.rlhf(exact, exact.horizon).values()),
        "V*": (
            np.concatenate(soft_value(world, world.rewards[-1], 1.0)),
            [oracle.expected_weight(exact, a) for i in range(exact.horizon + 1) for a in oracle.prefixes(exact, i)],
        ),
        "win rate": (
            np.log([win_rate(world, q, world.log_ref[-1])]),
            [oracle.win_rate(exact, oracle.sequences(exact))],
        ),
    }
    for name, (logs, rational) in pairs.items():
        gap = np.abs(logs - [math.log(x) for x in rational]).max()
        verify("world", f"numpy = rational oracle: {name} (logs)", gap)


@for_all(world=worlds())
def test_a_world_is_normalised_and_its_end_absorbs(world):
    for i in range(1, world.horizon + 1):
        done = finished(world.prefixes[i - 1], world.eos)[world.parents[i]]
        assert (world.prefixes[i][done, -1] == world.eos).all()
        assert (world.ref[i][done] == 0).all()
        assert (world.rewards[i][done] == world.down(i, world.rewards[i - 1])[done]).all()
        assert (world.prefixes[i][:, :-1] == world.prefixes[i - 1][world.parents[i]]).all()
        assert np.abs(world.log_up(i, world.ref[i])).max() < 1e-12
        assert abs(np.logaddexp.reduce(world.log_ref[i])) < 1e-12


def test_a_full_world_has_every_string_once():
    world = World.random(0, vocabulary=3, horizon=3)
    strings = {s for s in itertools.product(range(3), repeat=3) if all(s[j + 1] == 2 for j in range(2) if s[j] == 2)}
    assert {tuple(map(int, y)) for y in world.prefixes[-1]} == strings
    assert len(world.prefixes[-1]) == len(strings)


def test_a_tiny_gpt2_becomes_a_world():
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=3, eos_token_id=3)
    model = GPT2LMHeadModel(config).double().eval()
    world = World.from_model(model, [0, 1], horizon=3, eos=3)
    assert len(world.prefixes[-1]) == 1 + 3 + 9 * 4
    row = int(np.flatnonzero((world.prefixes[2] == [1, 2]).all(-1))[0])
    with torch.no_grad():
        logits = model(torch.tensor([[0, 1, 1]])).logits[0, -1]
    assert world.ref[2][row] == pytest.approx(float(logits.log_softmax(-1)[2]), abs=1e-12)


def test_divergences():
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert kl(p, q) == pytest.approx(0.5 * math.log(4 / 3))
    assert total_variation(p, q) == pytest.approx(0.25)
    tiny = np.log([0.5 + 1e-7, 0.5 - 1e-7])
    assert kl(p, tiny) == pytest.approx(2e-14, rel=1e-6)  # the plain sum of p log(p/q) keeps no digit of it
    assert kl(np.array([0.0, -np.inf]), q) == pytest.approx(math.log(4))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_an_unnormalised_table_is_refused():
    with pytest.raises(ValueError, match=r"ref\(\. \| \(0,\)\) sums to 1\.1, expected 1"):
        World.from_tables({(): [0.5, 0.5], (0,): [0.6, 0.5]}, {}, horizon=2, eos=1)


def test_a_table_with_a_missing_row_is_refused():
    with pytest.raises(ValueError, match=r"no row for the prefix \(0,\)"):
        World.from_tables({(): [0.5, 0.5]}, {}, horizon=2, eos=1)


def test_a_world_too_large_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"too large to enumerate: 87,381 prefixes of length 8"):
        World.random(0, vocabulary=5, horizon=8)


def test_a_labeler_must_be_antisymmetric_and_strict():
    world = World.random(0, vocabulary=2, horizon=1)
    with pytest.raises(ValueError, match=r"p\(a > b\) \+ p\(b > a\) must be 1, it is off by 0.3"):
        world.with_labels(np.array([[0.5, 0.7], [0.6, 0.5]]))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        world.with_labels(np.array([[0.5, 1.0], [0.0, 0.5]]))
    with pytest.raises(ValueError, match=r"labels has shape \(3, 3\)"):
        world.with_labels(random_labels(0, 3))


def test_a_negative_beta_is_refused():
    world = World.random(0)
    with pytest.raises(ValueError, match=r"beta=-1\.0, expected a number >= 0"):
        tokenwise(world, world.rewards, -1.0)
    with pytest.raises(ValueError, match=r"beta=-1\.0, expected a number >= 0"):
        rlhf(world, world.horizon, world.rewards[-1], -1.0)


def test_a_fit_without_labels_or_without_a_minimum_is_refused():
    with pytest.raises(ValueError, match=r"world\.labels is None"):
        partial_reward(World.random(0))
    with pytest.raises(ValueError, match="stationarity residual"):
        fit_bradley_terry(np.ones((2, 2)) / 4, np.array([0.5, 0.0]))  # one item always wins


def test_largest_gap_sees_every_level():
    world = World.random(0)
    changed = [x.copy() for x in world.ref]
    changed[1][0] += 0.5
    assert largest_gap(world.ref, changed) == 0.5
