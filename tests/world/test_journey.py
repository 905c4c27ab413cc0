"""The grammar, its automata and the gold reward."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pargs_min.world import journey
from pargs_min.world.journey import (
    END,
    HELD_OUT_PROMPTS,
    HORIZON,
    OFF_GRAMMAR,
    PAD,
    PROMPTS,
    TRAIN_PROMPTS,
    UNKNOWN,
    Journey,
)
from theory import exact

WORLD = Journey()
ISLAND = "the sailor leaves for the island :"
N = 12_000  # sampled journeys, 1,000 a prompt


def written(seed: int = 0, world: Journey = WORLD) -> tuple[list[str], list[str], np.ndarray]:
    """Prompts, texts and log-probabilities of N journeys by the grammar."""
    tokens, log_probs = world.write(np.random.default_rng(seed).random((N, HORIZON)))
    texts = [" ".join(world.words[t] for t in row if world.words[t] != END) for row in tokens]
    return [PROMPTS[i % len(PROMPTS)] for i in range(N)], texts, log_probs.sum(1)


PROMPT_OF, TEXTS, LOG_PROBS = written()

# The grammar a second time, independently, as one regular expression; it knows no probabilities.
MOODS = "golden|warm|bright|grim|cold|bitter"
SIGHT = (
    f"(?: past (?:{MOODS}) (?:hills|orchards|villages)| under (?:{MOODS}) (?:skies|clouds|stars)"
    f"| through (?:{MOODS}) (?:rain|wind|woods))"
)
STORY = re.compile(
    r"(?:today |again )?she packs a (?:(?:small|red|heavy|worn) )?"
    r"(?:rope|raft|compass|lantern|kettle|blanket|flute|drum) and "
    rf"(?:(?P<stays>then stays home)|walks the (?:coast|marsh|ridge|valley){SIGHT}{{0,2}}"
    r" into (?:floods|fog|snow|wolves) (?:but comes home (?P<home>warm|bright|golden|tired|cold|bitter)"
    r"|and ends up (?P<away>warm|lost|tired|cold|bitter|grim))(?: with (?P<gift>songs|honey|nothing))?)"
)
FEELINGS = {
    "home": dict(warm=2.5, bright=2.25, golden=2.25, tired=2.0, cold=1.75, bitter=1.5),
    "away": dict(warm=-1.75, lost=-2.0, tired=-2.0, cold=-2.25, bitter=-2.25, grim=-2.5),
}
GIFTS = {None: 0.0, "songs": 0.25, "honey": 0.0, "nothing": -0.25}


def read(text: str) -> float:
    """The gold reward by the regular expression."""
    story = STORY.fullmatch(text)
    if story is None:
        return OFF_GRAMMAR
    if story["stays"]:
        return -2.0
    where = "home" if story["home"] else "away"
    return FEELINGS[where][story[where]] + GIFTS[story["gift"]]


def test_equal_worlds_are_built_once():
    assert Journey().vocabulary == WORLD.vocabulary
    assert Journey()._stories is WORLD._stories is not Journey(luck=Fraction(1, 4))._stories


def test_written_journeys_are_read_as_the_grammar_says():
    gold = WORLD.gold(PROMPT_OF, TEXTS)
    assert gold == [read(text) for text in TEXTS]
    assert min(gold) > OFF_GRAMMAR
    assert all(4 * reward == round(4 * reward) for reward in gold)


@given(st.data())
def test_gold_reads_any_string_of_words(data):
    """Journeys with words put in, taken out or replaced, and prefixes of journeys: gold is what the expression says."""
    words = TEXTS[data.draw(st.integers(0, 500))].split()
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(words)))
        word = data.draw(st.lists(st.sampled_from([*WORLD.words[3:], "zebra", PAD, UNKNOWN]), max_size=1))
        words[place : place + data.draw(st.integers(0, 1))] = word
    words = words[: data.draw(st.integers(0, len(words)) | st.just(len(words)))]
    assert WORLD.gold([data.draw(st.sampled_from(PROMPTS))], [" ".join(words)]) == [read(" ".join(words))]


def test_gold_of_ids_is_gold_of_the_words_up_to_the_first_end_token():
    text = "she packs a flute and walks the ridge into wolves but comes home warm with songs"
    ids = [WORLD.vocabulary[word] for word in text.split()]
    end, pad, the = (WORLD.vocabulary[word] for word in (END, PAD, "the"))
    responses = [text, ids, [*ids, end], [*ids, end, pad, pad], [*ids, end, the], f"{text} {END} the"]
    assert WORLD.gold([ISLAND] * 6, responses) == [2.75] * 6
    assert WORLD.gold([ISLAND] * 4, [[*ids, the], [*ids, pad], ids[:-1], []]) == [OFF_GRAMMAR] * 4
    with pytest.raises(ValueError, match="prompt must be one of"):
        WORLD.gold(["the sailor leaves for the moon :"], [text])


def test_a_journey_has_the_probability_of_its_choices():
    """By hand: opening, rope, no adjective, leaving, road, no sight, its trouble, home, feeling, no gift."""
    text = "she packs a rope and walks the coast into floods but comes home warm"
    p = [Fraction(1, 2), Fraction(3, 10), Fraction(1, 2), Fraction(92, 100), Fraction(1, 4), Fraction(1, 2),
         Fraction(13, 20), Fraction(17, 20), Fraction(1, 6), Fraction(1, 2)]  # fmt: skip
    assert np.exp(log_prob(ISLAND, text)) == pytest.approx(float(np.prod(p)), rel=1e-12)


def walk(automaton: exact.Automaton, world: Journey, text: str) -> tuple[int, float]:
    """The state a text leads to and its log-probability, edge by edge."""
    state, total = automaton.start, 0.0
    for word in text.split():
        [edge] = np.flatnonzero((automaton.sources == state) & (automaton.tokens == world.vocabulary[word]))
        state, total = int(automaton.targets[edge]), total + float(automaton.log_probs[edge])
    return state, total


def log_prob(prompt: str, text: str) -> float:
    return walk(WORLD.automata[prompt], WORLD, f"{text} {END}")[1]


def test_written_journeys_carry_their_log_probability():
    got = [log_prob(prompt, text) for prompt, text in zip(PROMPT_OF[:200], TEXTS, strict=False)]
    np.testing.assert_allclose(LOG_PROBS[:200], got, rtol=1e-12)


def test_journeys_have_8_to_24_words_and_nothing_is_cut():
    lengths = {len(text.split()) for text in TEXTS}
    assert min(lengths) == 8
    assert max(lengths) == HORIZON - 1 == 24
    for automaton in WORLD.automata.values():
        reached = exact.occupancy(automaton)[-1] > 0
        assert automaton.rewards[reached].min() > OFF_GRAMMAR


def test_the_vocabulary_is_small_and_pad_end_and_unknown_are_three_ids():
    assert 70 <= len(WORLD.vocabulary) <= 100
    assert [WORLD.vocabulary[word] for word in (PAD, END, UNKNOWN)] == [0, 1, 2]
    assert {word for text in (*TEXTS, *PROMPTS) for word in text.split()} | {PAD, END, UNKNOWN} == set(WORLD.words)


def test_states_forget_what_no_longer_matters():
    """Which opening, adjective or item of one use, which sight of one mood: equal futures, one state, small tables."""

    def state(prefix: str) -> int:
        return walk(WORLD.automata[ISLAND], WORLD, prefix)[0]

    assert state("today she packs a red rope and walks the") == state("she packs a raft and walks the")
    road = "she packs a flute and walks the ridge"
    assert state(f"{road} past golden hills under grim skies") == state(f"{road} through cold rain past bitter hills")
    assert state(f"{road} past golden hills") != state(f"{road} past grim hills")
    assert sum(int((exact.occupancy(automaton) > 0).sum()) for automaton in WORLD.automata.values()) < 20_000


def test_held_out_prompts_combine_what_pairs_show_only_apart():
    def seen(word: int) -> set[str]:
        return {prompt.split()[word] for prompt in TRAIN_PROMPTS}

    assert sorted((*TRAIN_PROMPTS, *HELD_OUT_PROMPTS)) == sorted(PROMPTS)
    for prompt in HELD_OUT_PROMPTS:
        assert prompt.split()[1] in seen(1)
        assert prompt.split()[5] in seen(5)


def test_samples_agree_with_the_exact_reward_and_entropy():
    """Hoeffding at 1e-6 false failures each; a text's reward spans 6.25, its surprisal at most 40 nats."""
    bound = np.sqrt(np.log(2 / 1e-6) / (2 * N))
    automata = WORLD.automata.values()
    reward = np.mean([exact.expected(automaton, automaton.rewards)[0, 0] for automaton in automata])
    assert abs(np.mean(WORLD.gold(PROMPT_OF, TEXTS)) - reward) < 6.25 * bound
    assert LOG_PROBS.min() > -40
    assert abs(-LOG_PROBS.mean() - np.mean([exact.entropy(automaton) for automaton in automata])) < 40 * bound


def expected_gold(world: Journey, prompt: str, prefix: str) -> float:
    """Expected gold of the journeys that begin so."""
    automaton = world.automata[prompt]
    state, _ = walk(automaton, world, prefix)
    return exact.expected(automaton, automaton.rewards)[len(prefix.split()), state]


def test_an_early_word_decides_and_no_later_one_undoes_it():
    """On the ridge of the island wolves wait: a flute helps there, on the coast it does not; then it is too late."""
    ridge = expected_gold(WORLD, ISLAND, "she packs a flute and walks the ridge")
    coast = expected_gold(WORLD, ISLAND, "she packs a flute and walks the coast")
    assert ridge > 0 > -1.4 > coast
    late = "she packs a flute and walks the coast into floods"
    lucky = Journey(luck=Fraction(1, 4))
    assert expected_gold(WORLD, ISLAND, late) < -2
    assert expected_gold(lucky, ISLAND, late) == pytest.approx(0.25 * 2 - 0.75 * 2 + expected_small_terms(0.25))


def expected_small_terms(home: float) -> float:
    feelings = {
        where: np.mean(list(values.values())) for where, values in (("home", journey.HOME), ("away", journey.AWAY))
    }
    return home * feelings["home"] + (1 - home) * feelings["away"] + 0.5 * np.mean(list(journey.GIFTS.values()))


def test_fair_skies_mislead_the_prepared_and_dark_ones_do_not():
    start = "she packs a flute and walks the ridge past {} hills"
    fair, dark = (expected_gold(WORLD, ISLAND, start.format(mood)) for mood in ("golden", "grim"))
    assert dark > expected_gold(WORLD, ISLAND, start.removesuffix(" past {} hills")) > fair


def test_chances_of_trouble_sum_to_one():
    for mood in ("plain", "fair", "dark"):
        for use in journey.TROUBLES:
            assert sum(journey.trouble_ahead(use, "fog", mood).values()) == 1


def test_a_safe_exit_changes_the_worth_of_staying_home_and_nothing_else():
    safe = Journey(stay_home_reward=0.0)
    assert written(world=safe)[1] == TEXTS
    before, after = np.array(WORLD.gold(PROMPT_OF, TEXTS)), np.array(safe.gold(PROMPT_OF, TEXTS))
    np.testing.assert_array_equal(after - before, [2.0 * text.endswith("stays home") for text in TEXTS])
    automaton = safe.automata[ISLAND]
    exact_greedy = exact.greedy(automaton, exact.partial_rewards(automaton), beta=4.0)
    assert exact.evaluate(automaton, exact_greedy).reward == 0.0  # a careful traveller never leaves


@pytest.mark.parametrize("prompt", HELD_OUT_PROMPTS)
def test_partial_rewards_guide_and_the_rlhf_policy_stays_ahead(prompt: str):
    """At every beta: plain < guided by the exact partial reward < any RLHF policy that may go as far (T0, T7)."""
    automaton = WORLD.automata[prompt]
    scores, plain = exact.partial_rewards(automaton), exact.expected(automaton, automaton.rewards)[0, 0]
    frontier = exact.rlhf_frontier(automaton, np.geomspace(0.05, 50, 40))
    last = plain
    for beta in (0.5, 1.0, 2.0, 3.0):
        reward, kl = exact.evaluate(automaton, exact.guided(automaton, scores, beta))
        assert reward > last
        assert reward < min(point.reward for point in frontier if point.kl >= kl)
        last = reward
