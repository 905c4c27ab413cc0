"""The production loop draws from the policies of T17 to T20, and its particles are exact with the rest kept.

As in `test_code_computes_the_theory.py`, a draw that takes every way at once gives `pargs_min.decode.generate`'s law of
responses, string by string, and `pargs_min.smc.smc`'s law of whole runs: every token of every particle, and every
ancestor. Tables and tiny models guide through the scorers of `pargs_min.scoring`. Falsified by one string with another
probability, by a win rate below 1/2, or by a biased estimate of Z_T.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.special import logit

from pargs_min.decode import ModelPolicy
from pargs_min.scoring import LanguageModelScorer, WinTilt
from pargs_min.smc import smc
from theory.bradley_terry import partial_reward, win_rate, win_rates
from theory.ledger import verify
from theory.policies import conditionals, kept, likeliest, rlhf, soft_value, tokenwise, top_k
from theory.steppers import EveryWay, TabularGuide, TabularPolicy, TabularReward
from theory.strategies import WORLDS, betas, for_all, labelled_worlds, worlds
from theory.test_code_computes_the_theory import SMALL, Law, largest_difference, law_of, laws, table_law, tiny
from theory.test_t08_where_the_guarantee_stops import CUT_AWAY
from theory.test_t17_without_truncation import KS, undecided
from theory.test_t18_the_win_tilt import etas, win_tilt
from theory.test_t19_autoregressive_reward_models import autoregressive
from theory.world import Levels, World, noise

WIDE = [(12, 2), (5, 2), (4, 3), (3, 4)]  # the first has room for ten candidates of twelve


def as_array(world: World, law: Law) -> np.ndarray:
    """log q over A_T, -inf for a response that cannot be drawn."""
    return np.array([law.get(tuple(y), -np.inf) for y in world.prefixes[-1].tolist()])


def at_least(world: World, least: float) -> Levels:
    """Whether ref(t | a) is at least so much; the likeliest token always counts."""
    tops = [level == world.down(i, world.max_up(i, level)) for i, level in enumerate(world.ref) if i]
    return [np.ones(1, bool)] + [top | (np.exp(level) >= least) for top, level in zip(tops, world.ref[1:], strict=True)]


# ---- T17 ------------------------------------------------------------------------------------------------------------


@for_all(world=labelled_worlds(shapes=WIDE), beta=betas())
def test_the_rest_keeps_its_mass_and_guidance_never_loses(world, beta):
    s = partial_reward(world)
    for k in (*(k for k in KS if k < world.vocabulary), 0):
        law = table_law(world, s, beta=beta, top_k=k)
        exact = kept(world, s, beta, likeliest(world, k or world.vocabulary))
        gap = largest_difference(law, law_of(world, exact))
        verify("code", "T17, top_k = 1, 2, 3, 5, 10, all: log q of every string", gap)
        lost = 0.5 - win_rate(world, as_array(world, law), world.log_ref[-1])
        verify("code", "T17, top_k = 1, 2, 3, 5, 10, all: 1/2 - win rate", lost, kind="bound")


@for_all(world=labelled_worlds(shapes=WIDE), beta=betas(), least=st.floats(0.01, 0.9), top_k=st.integers(0, 3))
def test_so_it_is_with_a_floor_for_candidates(world, beta, least, top_k):
    s = partial_reward(world)
    law = table_law(world, s, beta=beta, top_k=top_k, min_ref_prob=least)
    first = likeliest(world, top_k or world.vocabulary)
    candidates = [a & b for a, b in zip(first, at_least(world, least), strict=True)]
    gap = largest_difference(law, law_of(world, kept(world, s, beta, candidates)))
    verify("code", "T17, min_ref_prob and top_k: log q of every string", gap)
    lost = 0.5 - win_rate(world, as_array(world, law), world.log_ref[-1])
    verify("code", "T17, min_ref_prob and top_k: 1/2 - win rate", lost, kind="bound")


@for_all(
    world=labelled_worlds(shapes=WIDE),
    beta=betas(),
    below=st.floats(0.2, 1.0),
    k=st.integers(0, 3),
    truncate=st.booleans(),
)
def test_so_it_is_with_unguided_steps(world, beta, below, k, truncate):
    s, open_, inside = partial_reward(world), undecided(world, below), likeliest(world, k or world.vocabulary)
    law = table_law(world, s, beta=beta, top_k=k, guide_below=below, truncate=truncate)
    scores = [np.where(level, score, 0.0) for level, score in zip(open_, s, strict=True)]
    if truncate:
        exact = tokenwise(world, scores, beta, ref=top_k(world, k or world.vocabulary))
    else:
        exact = kept(world, scores, beta, inside)
        lost = 0.5 - win_rate(world, as_array(world, law), world.log_ref[-1])
        verify("code", "T17, guide_below: 1/2 - win rate", lost, kind="bound")
    gap = largest_difference(law, law_of(world, exact))
    verify("code", "T17, guide_below: log q of every string", gap)


def test_it_repairs_the_world_of_t8b():
    s = partial_reward(CUT_AWAY)
    settings = {"beta": 16.0, "top_k": 2}
    cut, plain_cut = (as_array(CUT_AWAY, table_law(CUT_AWAY, r, truncate=True, **settings)) for r in (s, None))
    verify("code", "T8(b) truncated, against the cut reference: win rate", win_rate(CUT_AWAY, cut, plain_cut), 0.45,
           "example")  # fmt: skip
    whole = as_array(CUT_AWAY, table_law(CUT_AWAY, s, **settings))
    won = win_rate(CUT_AWAY, whole, CUT_AWAY.log_ref[-1])
    verify("code", "T8(b) with the rest kept: 1/2 - win rate", 0.5 - won, -0.02, "example")


def smc_law(world: World, scores: Levels, beta: float, particles: int, **settings) -> tuple[float, np.ndarray]:
    """(E[Z-hat], E[Z-hat sum_k w_k 1(Y_k = y)] over A_T) of `smc`, over every token and every ancestor."""
    every = EveryWay(world.vocabulary, world.horizon, particles=particles)
    one = torch.zeros(every.ways, 1, dtype=torch.long)
    base = world.vocabulary ** np.arange(world.horizon)
    places = np.full(world.vocabulary**world.horizon, -1)
    places[world.prefixes[-1] @ base] = np.arange(len(world.prefixes[-1]))

    def located(tokens: torch.Tensor) -> np.ndarray:
        ended = np.full((len(tokens), world.horizon - tokens.shape[1]), world.eos)
        return places[np.hstack([tokens.numpy(), ended]) @ base]

    def final(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = ids[:, 1:].where(mask[:, 1:] > 0, world.eos)
        return torch.from_numpy(np.append(world.rewards[-1], 0.0)[located(tokens)])

    out = smc(TabularPolicy(world), TabularReward(world, scores), one, one + 1, n=particles, beta=beta, final=final,
              threshold=2.0, resampler=every.resampler, draw=every, max_new_tokens=world.horizon, eos=world.eos,
              **settings)  # fmt: skip
    mass = (every.log_mass + out.log_evidence).exp()
    law = np.zeros(len(world.prefixes[-1]) + 1)
    np.add.at(law, located(out.generation.tokens), (mass[:, None] * out.log_weights.exp()).flatten().numpy())
    assert law[-1] == 0  # nothing that the reference never writes
    return float(mass.sum()), law[:-1]


@pytest.mark.parametrize(("particles", "shape"), [(1, (3, 3)), (2, (3, 2)), (2, (2, 3))])
@pytest.mark.parametrize("truncate", [False, True])
def test_particles_are_exact_whatever_the_candidates(particles, shape, truncate):
    """Any scores at all guide; only the reward of whole texts decides. Truncated, the target is ref on C."""
    how = f"{'truncated' if truncate else 'the rest kept'}, N = {particles}"
    for seed in range(WORLDS if particles == 1 else WORLDS // 8):
        world, beta = World.random(seed, *shape), 1.5
        least = [0.0, 0.3][seed % 2]
        k = [1, 2][seed // 2 % 2]
        z, law = smc_law(world, noise(world, seed), beta, particles, top_k=k, min_ref_prob=least, truncate=truncate)
        target = np.exp(world.log_ref[-1] + beta * world.rewards[-1])
        if truncate:
            inside = zip(likeliest(world, k), at_least(world, least), strict=True)
            paths = world.paths([np.where(a & b, 0.0, -np.inf) for a, b in inside])[-1]
            target = np.where(paths == 0, target, 0.0)
        verify("code", f"smc, {how}: E[Z-hat 1(Y = y)] = Z pi(y)", abs(law - target).max() / target.sum())
        verify("code", f"smc, {how}: E[Z-hat] / Z - 1", abs(z / target.sum() - 1))


# ---- T18 to T20 -----------------------------------------------------------------------------------------------------


@for_all(world=labelled_worlds(shapes=SMALL), eta=etas)
def test_the_win_tilt_is_exact(world, eta):
    """The model's number is the logit of W, as binary cross-entropy on prefixes learns it; beta of the loop is 1."""
    tilt = win_tilt(world, eta)
    closed_form = world.log_ref[-1] + tilt[-1] - np.log1p(np.expm1(eta) / 2)
    scorer = WinTilt(TabularReward(world, [logit(win) for win in win_rates(world)]), eta)
    law = as_array(world, table_law(world, scorer, beta=1.0))
    verify("code", "T18, method win: q(y) = ref(y) (1 + c u(y)) / (1 + c / 2)", abs(law - closed_form).max())


@for_all(world=worlds(SMALL), beta=betas())
def test_an_autoregressive_reward_model_guides_as_t19_says(world, beta):
    p = autoregressive(world)
    law = table_law(world, TabularGuide(world, p), beta=beta)
    gap = largest_difference(law, law_of(world, tokenwise(world, p, beta)))
    verify("code", "T19, log p as a guide: log q of every string", gap)


@for_all(world=worlds(SMALL), beta=betas(), other=betas())
def test_both_objectives_give_the_rlhf_policy(world, beta, other):
    optimum = rlhf(world, world.horizon, world.rewards[-1], beta)
    value = as_array(world, table_law(world, soft_value(world, world.rewards[-1], beta), beta=beta))
    verify("code", "T20(a), u / lambda at beta = lambda: pi_T", abs(value - optimum).max())
    p = conditionals(world, optimum)
    reweighted = as_array(world, table_law(world, TabularGuide(world, p, beta), beta=beta))
    verify("code", "T20(b), log(p / ref) / beta at beta: pi_T", abs(reweighted - optimum).max())
    scores = [(a - b) / beta for a, b in zip(p, world.ref, strict=True)]
    elsewhere = table_law(world, TabularGuide(world, p, beta), beta=other)
    gap = largest_difference(elsewhere, law_of(world, tokenwise(world, scores, other)))
    verify("code", "T20(b), at another beta: log q of every string", gap)


@pytest.mark.parametrize("seed", range(5))
def test_a_tiny_gpt2_guides_another(seed):
    """Two prompts of different lengths in one left-padded batch, each model with its own cache."""
    (model, _), (guide, _) = tiny(seed), tiny(seed + 100)
    prompts = [[0, 1, 2], [2]]
    ids, mask = torch.tensor([[0, 1, 2], [3, 3, 2]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    sizes = {"vocabulary": 4, "horizon": 3, "eos": 3, "top_k": 0}
    relative = laws(ModelPolicy(model), LanguageModelScorer(guide, beta=0.7), ids, mask, beta=0.7, **sizes)
    absolute = laws(ModelPolicy(model), LanguageModelScorer(guide), ids, mask, beta=0.7, **sizes)
    for prompt, first, second in zip(prompts, relative, absolute, strict=True):
        world, theirs = (World.from_model(m, prompt, horizon=3, eos=3) for m in (model, guide))
        gap = largest_difference(first, law_of(theirs, theirs.ref))
        verify("code", "T20(b), a tiny GPT-2 at its beta: log pi_r of every string", gap)
        gap = largest_difference(second, law_of(world, tokenwise(world, theirs.ref, 0.7)))
        verify("code", "T19, a tiny GPT-2: log q of every string", gap)


def test_control_another_strength_is_another_policy():
    world = World.random(0)
    optimum = rlhf(world, world.horizon, world.rewards[-1], 1.0)
    p = conditionals(world, optimum)
    for guide, beta in (
        (TabularGuide(world, p, 1.0), 1.2),
        (TabularGuide(world, p, 1.2), 1.0),
        (TabularGuide(world, p), 1.0),
    ):
        assert abs(as_array(world, table_law(world, guide, beta=beta)) - optimum).max() > 0.01
