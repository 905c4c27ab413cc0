"""The same statements at real length, where enumeration would need 100^24 strings.

Prefixes of one length that lead to one state of a finite automaton have the same future, so the values of T4, T6 and
T7 obey a backward recursion over (time, state): `exact.py`. It is checked against enumeration on
random automata small enough for both, and then used on the embedded world at its full 25 tokens, in the variant with a
safe exit (never leaving is worth 0): there T7 holds, more beta wins less (T8c), on-policy rounds recover what was lost
(T11), and T17, T18 and T20 hold too.
Falsified by a state whose value differs from that of an enumerated prefix, or a win rate below 1/2.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from pargs_min.world.automaton import Automaton
from pargs_min.world.journey import HORIZON, PROMPTS, Journey
from theory import exact
from theory.bradley_terry import partial_reward, win_rates
from theory.ledger import verify
from theory.policies import best_of_n, kept, likeliest, reward_and_kl, soft_value, tokenwise
from theory.strategies import WORLDS
from theory.world import Levels, World, bradley_terry_labels

JOURNEYS = Journey().automata
SAFE_EXIT = Journey(stay_home_reward=0.0).automata
END = 2


# ---- recursion = enumeration ----------------------------------------------------------------------------------------


def random_automaton(seed: int, live: int = 3, horizon: int = 5) -> Automaton:
    """Two words that lead among a few live states, and an end token that leads to one of two ended ones."""
    rng = np.random.default_rng(seed)
    sources = np.append(np.repeat(np.arange(live), 3), [live, live + 1])
    tokens = np.append(np.tile([0, 1, END], live), [END, END])
    targets = rng.integers(0, live, len(sources))
    targets[tokens == END] = rng.integers(live, live + 2, live + 2)
    targets[-2:] = live, live + 1
    odds = rng.dirichlet([2.0, 2.0, 1.0], live)
    log_probs = np.append(np.log(odds).ravel(), [0.0, 0.0])
    return Automaton(sources, tokens, targets, log_probs, 2 * rng.standard_normal(live + 2), 0, horizon)


def states_after(automaton: Automaton, prefixes: np.ndarray) -> np.ndarray:
    """(n,) where the automaton stands after each prefix (n, i)."""
    table = np.full((len(automaton.rewards), END + 1), -1)
    table[automaton.sources, automaton.tokens] = automaton.targets
    states = np.full(len(prefixes), automaton.start)
    for token in prefixes.T:
        states = table[states, token]
    return states


def unrolled(automaton: Automaton) -> World:
    """The world of all strings that the automaton writes."""
    table = np.full((len(automaton.rewards), END + 1), -np.inf)
    table[automaton.sources, automaton.tokens] = automaton.log_probs
    world = World.build(
        lambda prefixes: table[states_after(automaton, prefixes)],
        lambda prefixes: automaton.rewards[states_after(automaton, prefixes)],
        vocabulary=END + 1,
        horizon=automaton.horizon,
        eos=END,
    )
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def gap(automaton: Automaton, world: World, by_state: np.ndarray, by_prefix: Levels) -> float:
    """Largest difference between a table over (time, state) and the enumerated levels."""
    rows = zip(world.prefixes, by_state, by_prefix, strict=True)
    return max(float(np.abs(row[states_after(automaton, a)] - level).max()) for a, row, level in rows)


def test_recursion_equals_enumeration():
    beta = 1.5
    for seed in range(WORLDS):
        automaton = random_automaton(seed)
        world = unrolled(automaton)
        r, s = world.rewards[-1], partial_reward(world)
        scores = exact.partial_rewards(automaton)
        pairs = {
            "W": (exact.win_rates(automaton), win_rates(world)),
            "E[r]": (exact.expected(automaton, automaton.rewards), world.mean(r)),
            "V*": (exact.soft_values(automaton, beta), soft_value(world, r, beta)),
        }
        for name, (by_state, by_prefix) in pairs.items():
            verify("length", f"recursion = enumeration: {name}", gap(automaton, world, by_state, by_prefix))
        verify("length", "recursion = enumeration: partial reward", gap(automaton, world, scores, s), 1e-9, "fit")
        found = exact.evaluate(automaton, exact.kept(automaton, scores, beta, exact.likeliest(automaton, 2)))
        enumerated = reward_and_kl(world, world.paths(kept(world, s, beta, likeliest(world, 2)))[-1], r)
        verify("length", "recursion = enumeration: reward and KL with the rest kept",
               float(np.abs(np.subtract(found, enumerated)).max()), 1e-9, "fit")  # fmt: skip
        for name, by_state, by_prefix in (("PARGS", scores, s), ("RLHF", pairs["V*"][0], pairs["V*"][1])):
            judged = exact.evaluate(automaton, exact.guided(automaton, by_state, beta))
            enumerated = reward_and_kl(world, world.paths(tokenwise(world, by_prefix, beta))[-1], r)
            verify("length", f"recursion = enumeration: reward and KL of {name}",
                   float(np.abs(np.subtract(judged, enumerated)).max()), 1e-9, "fit")  # fmt: skip


def law(automaton: Automaton, world: World, policy: np.ndarray) -> np.ndarray:
    """log q of every enumerated string under a policy (T, E)."""
    total = np.zeros(len(world.prefixes[-1]))
    for i, step in enumerate(policy):
        table = np.full((len(automaton.rewards), END + 1), -np.inf)
        table[automaton.sources, automaton.tokens] = step
        total += table[states_after(automaton, world.prefixes[-1][:, :i]), world.prefixes[-1][:, i]]
    return total


def test_reweighted_texts_are_the_rlhf_policy_and_the_best_of_n():
    for seed in range(WORLDS):
        automaton = random_automaton(seed)
        world, guide = unrolled(automaton), exact.soft_values(automaton, 1.5)
        found = exact.reweighted(automaton, np.exp(1.5 * automaton.rewards))
        rlhf = exact.guided(automaton, guide, 1.5)
        verify(
            "length", "texts reweighted by exp(beta r) = RLHF", np.abs(found - rlhf)[:, automaton.sources == 0].max()
        )
        levels, place = np.unique(automaton.rewards, return_inverse=True)
        chance = exact.reward_distribution(automaton)[1][0, automaton.start]
        best = np.diff(np.cumsum(chance) ** 3, prepend=0.0)
        ratio = np.divide(best, chance, out=np.ones(len(levels)), where=chance > 0)
        picked = exact.reweighted(automaton, ratio[place])
        enumerated = np.exp(best_of_n(world, world.rewards[-1], 3))
        gap = np.abs(np.exp(law(automaton, world, picked)) - enumerated).max()
        verify("length", "reweighted levels = the best of n", gap)
        h = -(enumerated * np.log(enumerated)).sum()
        verify("length", "entropy of a policy", abs(exact.entropy(automaton, picked) - h))
        tokens = float(enumerated @ world.lengths + enumerated[(world.prefixes[-1] != END).all(-1)].sum())
        verify("length", "tokens of a policy", abs(exact.expected_length(automaton, END, picked) - tokens))


def test_split_states_know_what_was_written():
    weights = np.array([[1.0, 0.0], [-1.0, 2.0], [0.0, 0.5]])
    for seed in range(WORLDS):
        automaton = random_automaton(seed)
        counted, totals, origins = exact.split(automaton, weights)
        strings = unrolled(automaton).prefixes[-1]
        states = states_after(counted, strings)
        assert (totals[states] == weights[strings].sum(1)).all()
        assert (origins[states] == states_after(automaton, strings)).all()
        scores = exact.win_rates(automaton)
        before = exact.evaluate(automaton, exact.guided(automaton, scores, 2.0))
        after = exact.evaluate(counted, exact.guided(counted, scores[:, origins], 2.0))
        verify("length", "a split reference is the same one", float(np.abs(np.subtract(before, after)).max()))


def test_control_a_value_of_another_horizon_is_caught():
    automaton = random_automaton(0)
    world = unrolled(automaton)
    shifted = np.roll(exact.win_rates(automaton), 1, axis=0)
    assert gap(automaton, world, shifted, win_rates(world)) > 0.01


# ---- at full length -------------------------------------------------------------------------------------------------


@cache
def scores_after(prompt: str) -> np.ndarray:
    """The partial reward of the world with a safe exit; solved once per prompt."""
    return exact.partial_rewards(SAFE_EXIT[prompt])


def win_rate(automaton: Automaton, policy: np.ndarray) -> float:
    """P(Y > Y'), Y from the policy (T, E) and Y' from the reference."""
    return float(exact.occupancy(automaton, policy)[-1] @ exact.win_rates(automaton)[-1])


def expected_covariance(automaton: Automaton, scores: np.ndarray, beta: float) -> tuple[float, float]:
    """(sum over steps of E_q[Cov_t(W(at), pi(t | a) / ref(t | a))], the least of these covariances)."""
    win, q = exact.win_rates(automaton), exact.guided(automaton, scores, beta)
    mass = exact.occupancy(automaton, q)
    total, least = 0.0, np.inf
    for i, log_pi in enumerate(q):
        shift = np.exp(log_pi) - np.exp(automaton.log_probs)  # ref * (tilt - 1), and E_ref[tilt] = 1
        covariance = np.add.reduceat(shift * win[i + 1, automaton.targets], automaton.first_edges)
        total += mass[i] @ covariance
        least = min(least, covariance[mass[i] > 0].min())
    return float(total), float(least)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_guidance_never_loses_at_full_length(prompt):
    automaton, scores = SAFE_EXIT[prompt], scores_after(prompt)
    assert automaton.horizon == HORIZON == 25
    for beta in (0.5, 2.0, 8.0):
        gain = win_rate(automaton, exact.guided(automaton, scores, beta)) - 0.5
        total, least = expected_covariance(automaton, scores, beta)
        verify("length", "T7 at 25 tokens: win rate - 1/2 = sum E_q[Cov]", abs(gain - total))
        verify("length", "T7 at 25 tokens: each Cov >= 0", -least, kind="bound")
        verify("length", "T7 at 25 tokens: win rate >= 1/2", -gain, kind="bound")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_rest_kept_never_loses_at_full_length(prompt):
    """And spends less than the cut, which begins with the KL of the cut reference."""
    automaton, scores = SAFE_EXIT[prompt], scores_after(prompt)
    for k in (1, 2, 3, 5, 10):
        candidates = exact.likeliest(automaton, k)
        for beta in (0.5, 8.0):
            q = exact.kept(automaton, scores, beta, candidates)
            verify("length", "T17 at 25 tokens: win rate >= 1/2", 0.5 - win_rate(automaton, q), kind="bound")
            cut = exact.truncated(automaton, scores, beta, candidates)
            saved = exact.evaluate(automaton, cut).kl - exact.evaluate(automaton, q).kl
            verify("length", "T17 at 25 tokens: KL kept less KL truncated", -saved, 0.0, "example")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_win_tilt_is_exact_at_full_length(prompt):
    automaton = SAFE_EXIT[prompt]
    tilt = np.log1p(np.expm1(3.0) * exact.win_rates(automaton))
    own = replace(automaton, rewards=tilt[-1])
    price = exact.kl(own, exact.guided(own, exact.soft_values(own, 1.0), 1.0), exact.guided(automaton, tilt, 1.0))
    verify("length", "T18 at 25 tokens: KL(pi_T || q)", price)


def test_rounds_of_winners_lie_on_the_frontier_of_the_win_rate():
    """T18's limit, from pairs of winners of pairs; the frontier is that of RLHF for the reward u."""
    for prompt in PROMPTS[:3]:
        automaton = JOURNEYS[prompt]
        judge = replace(automaton, rewards=exact.win_rates(automaton)[-1])
        frontier = np.array(exact.rlhf_frontier(judge, np.geomspace(1.5, 16, 20)))
        q = automaton.reference
        for _ in range(5):
            win = exact.win_rates(automaton, policy=q)
            q = exact.normalise(automaton, q + np.log(win)[1:, automaton.targets])
            rate, spent = exact.evaluate(judge, q)
            below = float(np.interp(spent, frontier[:, 1], frontier[:, 0])) - rate
            verify("length", "T18 at 25 tokens, 5 rounds: win rate below RLHF's", below, 2e-3, "example")


def mean_place(policy) -> np.ndarray:
    """(reward, KL) of policy(automaton) in the embedded world, the mean over its prompts."""
    return np.mean([exact.evaluate(automaton, policy(automaton)) for automaton in JOURNEYS.values()], axis=0)


def test_the_numbers_on_the_page():
    """At beta = 2: T17's rewards and nats, and T20(a)'s share of RLHF's gain at the same KL."""
    beta = 2.0
    scores = {id(automaton): exact.partial_rewards(automaton) for automaton in JOURNEYS.values()}
    pages = {
        (exact.truncated, 3): (1.91, 5.52), (exact.kept, 3): (1.58, 2.22), (exact.truncated, 5): (2.06, 2.70),
        (exact.kept, 5): (1.92, 1.75), (exact.kept, 12): (2.01, 1.77),
    }  # fmt: skip
    for (policy, k), page in pages.items():
        found = mean_place(lambda a, policy=policy, k=k: policy(a, scores[id(a)], beta, exact.likeliest(a, k)))
        verify("length", "T17 at 25 tokens: README.md's rewards and nats", abs(found - page).max(), 0.0051, "example")

    frontier = np.mean([exact.rlhf_frontier(a, np.geomspace(0.5, 4, 24)) for a in JOURNEYS.values()], axis=0)
    plain = mean_place(lambda a: a.reference)[0]

    def lost(value) -> float:
        """Share of RLHF's gain at the same KL that guidance by value(automaton) does not have."""
        reward, spent = mean_place(lambda a: exact.guided(a, value(a), beta))
        return 1 - (reward - plain) / float(np.interp(spent, frontier[:, 1], frontier[:, 0]) - plain)

    for lam in (beta / 2, 1.5 * beta):
        short = lost(lambda a, lam=lam: exact.soft_values(a, lam))
        verify("length", "T20(a) at 25 tokens, lambda / beta = .5, 1.5: share lost", short, 0.03, "example")
    assert 0.04 < lost(lambda a: scores[id(a)]) < 0.05
    assert 0.04 < lost(lambda a: exact.expected(a, a.rewards)) < 0.05


@pytest.mark.parametrize("prompt", PROMPTS)
def test_more_beta_wins_less_and_rounds_recover_it(prompt):
    """Strong guidance stays at home, not knowing how well it would travel; its own pairs tell it."""
    automaton = SAFE_EXIT[prompt]
    first, strong = (exact.guided(automaton, scores_after(prompt), beta) for beta in (2.0, 16.0))
    change = win_rate(automaton, strong) - win_rate(automaton, first)
    verify("length", "T8(c) at 25 tokens: win rate at beta = 16 less that at 2", change, -0.05, "example")

    beta = 4.0
    before = exact.guided(automaton, scores_after(prompt), beta)
    after = exact.guided(automaton, exact.partial_rewards(automaton, policy=before), beta)
    lost = exact.evaluate(automaton, before).reward - exact.evaluate(automaton, after).reward
    verify("length", "T11(a) at 25 tokens: reward, minus that after one round", lost, -1.0, "example")


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_the_exact_rounds_end_at_the_rlhf_policy(prompt):
    automaton, beta = SAFE_EXIT[prompt], 4.0
    best = exact.soft_values(automaton, beta)[0, automaton.start]
    q = automaton.reference
    for _ in range(automaton.horizon):
        value = [automaton.rewards]
        for log_q in q[::-1]:
            step = np.exp(log_q) * (value[-1][automaton.targets] - (log_q - automaton.log_probs) / beta)
            value.append(np.add.reduceat(step, automaton.first_edges))
        q = exact.guided(automaton, np.stack(value[::-1]), beta)
    reward, divergence = exact.evaluate(automaton, q)
    verify("length", "T11(b) at 25 tokens: J(pi_T) - J after 25 rounds", abs(best - (reward - divergence / beta)))


def test_control_the_reward_upside_down_loses_at_full_length():
    automaton, scores = SAFE_EXIT[PROMPTS[0]], -scores_after(PROMPTS[0])
    assert win_rate(automaton, exact.guided(automaton, scores, 2.0)) < 0.4
    assert expected_covariance(automaton, scores, 2.0)[1] < 0
