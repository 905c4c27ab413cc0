"""Sequential Monte Carlo: unbiased over all outcomes, near the RLHF policy with many particles, PARGS with one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from pargs_min.decode import ModelPolicy, generate, greedy, row_uniforms
from pargs_min.methods import response_rewards, sampled_kl
from pargs_min.reward_model import final_rewards, prefix_rewards
from pargs_min.scoring import ReencodeScorer, SiblingScorer, model_rewards
from pargs_min.smc import effective_sample_size, smc, systematic
from tests.strategies import left_padded, rows, tiny_lm, tiny_reward_model

END, BETA, VOCABULARY = 1, 2.5, 3
PROMPT = torch.tensor([[2, 0, 2]])


# ---- exactly: every outcome of two particles that write two tokens ----


def responses(vocabulary, steps):
    """Every response of up to so many tokens."""
    strings = itertools.product(range(vocabulary), repeat=steps)
    return sorted({y[: y.index(END) + 1] if END in y else y for y in strings})


@torch.no_grad()
def log_ref(lm, y, top_k):
    """log pi_ref(y); -inf where a token is not among the top k."""
    logits = lm(input_ids=torch.cat([PROMPT[0], torch.tensor(y)])[None]).logits[0, PROMPT.shape[1] - 1 : -1]
    log_probs = logits.log_softmax(-1)
    log_probs = log_probs.where(log_probs >= log_probs.topk(top_k, -1).values[:, -1:], -torch.inf)
    return log_probs.gather(1, torch.tensor(y)[:, None]).sum()


@torch.no_grad()
def reward_of(model, y):
    ids = torch.cat([PROMPT[0], torch.tensor(y)])[None]
    return final_rewards(model, ids, torch.ones_like(ids))[0]


def written(generation):
    return [tuple(row[:n].tolist()) for row, n in zip(generation.tokens, generation.lengths, strict=True)]


class EveryOutcome:
    """Two particles, two tokens each, one resampling: a group of rows for each combination of what can happen.

    `chance` (B,) is the probability of a group's draws and resampling; the final pick by weight is not in it.
    """

    def __init__(self, threshold):
        ways = torch.tensor(list(itertools.product(*[range(VOCABULARY)] * 4, range(3))))
        self.groups, self.threshold = len(ways), threshold
        self.draws, self.outcome = iter(ways[:, :4].view(-1, 2, 2).unbind(1)), ways[:, 4]
        self.chance = torch.where(self.outcome == 1, 1.0, 0.0).double()  # one way where nothing is resampled, not three

    def draw(self, log_probs, uniforms):
        tokens = next(self.draws).reshape(-1)
        self.chance = self.chance * log_probs.gather(1, tokens[:, None]).view(-1, 2).sum(-1).exp()
        return tokens

    def resample(self, log_weights, uniforms):
        """Both like the first, as they are, both like the second: as often as `systematic` with n = 2."""
        if torch.allclose(log_weights[:, 0], log_weights[:, 1]):  # before the first token
            return torch.tensor([[0, 1]]).expand(self.groups, -1)
        lead = 2 * log_weights.softmax(-1)[:, :1] - 1
        chances = torch.cat([lead.clamp(min=0), 1 - lead.abs(), (-lead).clamp(min=0)], 1)
        apart = effective_sample_size(log_weights) < 2 * self.threshold
        draws = self.chance.view(-1, 3)[:, 1:2].expand(-1, 3).reshape(-1)
        self.chance = torch.where(apart, draws * chances.gather(1, self.outcome[:, None])[:, 0], self.chance)
        return torch.tensor([[0, 0], [0, 1], [1, 1]])[self.outcome]


@pytest.mark.parametrize("threshold", [0.0, 0.97, 2.0])
@pytest.mark.parametrize(
    ("settings", "final"),
    [
        (dict(top_k=0), None),
        (dict(top_k=2, truncate=True), None),
        (dict(top_k=0), "another"),
        (dict(top_k=2), "another"),  # the rest kept
        (dict(top_k=1), "another"),
        (dict(top_k=3, min_ref_prob=0.3), "its own"),
    ],
)
def test_the_evidence_is_unbiased_over_all_outcomes(settings, final, threshold):
    """E[Z-hat 1(picked = y)] = pi_ref(y) exp(beta R(y)), whatever the fraction at which particles are resampled."""
    lm, rm = tiny_lm("gpt2", 3), tiny_reward_model("llama", 3, seed=5)
    whole = tiny_reward_model("qwen2", 3, seed=4) if final == "another" else rm
    every, top_k = EveryOutcome(threshold), 2 if settings.get("truncate") else 3
    found = smc(
        ModelPolicy(lm), SiblingScorer(rm), PROMPT.expand(every.groups, -1), torch.ones(every.groups, 3), n=2,
        beta=BETA, threshold=threshold, final=None if final is None else model_rewards(whole), **settings,
        resampler=every.resample, draw=every.draw, max_new_tokens=2, eos=END,
    )  # fmt: skip
    assert every.chance.sum().item() == pytest.approx(1, abs=1e-12)
    if settings["top_k"] != 1:  # one candidate is never guided, so that its particles stay alike
        assert (every.chance[every.outcome != 1] > 0).any() == (threshold > 0)

    ys = responses(3, 2)
    picked = (every.chance[:, None] * found.log_weights.nan_to_num(-torch.inf).exp()).flatten()
    weighted = picked * found.log_evidence.exp().repeat_interleave(2)
    place = torch.tensor([ys.index(y) for y in written(found.generation)])
    log_gamma = torch.stack([log_ref(lm, y, top_k) + BETA * reward_of(whole, y) for y in ys])
    gamma = torch.zeros(len(ys), dtype=torch.float64).index_add(0, place, weighted)
    assert_close(gamma, log_gamma.exp(), rtol=1e-10, atol=1e-15)

    law = torch.zeros(len(ys), dtype=torch.float64).index_add(0, place, picked)
    ref = torch.stack([log_ref(lm, y, 3) for y in ys])
    divergence = torch.xlogy(law, law).sum() - (law * ref).sum()
    bound = (picked * found.kl.flatten()).sum()
    assert divergence - 1e-12 < bound < divergence + 1, "the mean kl bounds the divergence of what is picked"


# ---- many particles ----


class Table:
    """Numbers on every string of up to three of four tokens, as policy stepper and reward scorer."""

    def __init__(self, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        self.levels = [scale * torch.randn(4**i, 4, generator=generator, dtype=torch.float64) for i in range(3)]

    def start(self, prompt_ids, mask):
        self.at, self.length = torch.zeros(len(prompt_ids), dtype=torch.long), 0

    def log_probs(self):
        return self.levels[self.length][self.at].log_softmax(-1)

    def score(self, candidates, ref_log_probs):
        return self.levels[self.length][self.at].gather(1, candidates)

    def push(self, tokens):
        self.at, self.length = 4 * self.at + tokens, self.length + 1

    def select(self, rows):
        self.at = self.at[rows]

    def follow(self, y, log):
        """The numbers along one response."""
        self.start(torch.zeros(1, 1), None)
        for token in y:
            row = self.levels[self.length][self.at][0]
            yield (row.log_softmax(-1) if log else row)[token]
            self.push(torch.tensor([token]))


def many_runs(particles, runs):
    """Total variation between the RLHF policy and so many picks, and the estimates of log Z less log Z itself."""
    policy, reward, ys = Table(0, 1.0), Table(1, 1.5), responses(4, 3)
    log_gamma = torch.stack([sum(policy.follow(y, True)) + BETA * [*reward.follow(y, False)][-1] for y in ys])
    uniforms = torch.rand(runs, 3 * particles + 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = smc(
        policy, reward, torch.zeros(runs, 1).long(), torch.ones(runs, 1), n=particles, beta=BETA, top_k=0,
        max_new_tokens=3, eos=END, uniforms=uniforms[:, 4:].reshape(-1, 3), choices=uniforms[:, :3],
    )  # fmt: skip
    picked, _ = found.pick(uniforms[:, 3])
    counts = dict.fromkeys(ys, 0)
    for y in written(picked):
        counts[y] += 1
    law = torch.tensor(list(counts.values())) / runs
    return 0.5 * (law - log_gamma.softmax(-1)).abs().sum().item(), found.log_evidence - log_gamma.logsumexp(-1)


def test_many_particles_come_to_the_rlhf_policy():
    """20,000 runs of 32 particles; fails by chance with probability below 1e-6.

    A run moves the sampled total variation by at most 1 / 20,000, so (McDiarmid) it exceeds its mean by 0.019 with less
    than that, and its mean exceeds the total variation of the law by at most sqrt(40 / 20,000) / 2 = 0.023.
    """
    one, _ = many_runs(1, 20_000)
    many, log_errors = many_runs(32, 20_000)
    assert one > 0.2
    assert many < 0.02 + 0.019 + 0.023
    ratios = log_errors.exp()
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / 20_000**0.5


# ---- what else it must be ----


def run(n, ids, mask, uniforms, **changes):
    lm, rm = tiny_lm(), tiny_reward_model("llama")
    settings = dict(beta=BETA, top_k=5, max_new_tokens=6, eos=END, uniforms=uniforms[:, :6], threshold=2.0)
    settings |= dict(choices=uniforms[::n, 6:12], final=model_rewards(rm))
    return smc(ModelPolicy(lm), SiblingScorer(rm), ids, mask, n=n, **settings | changes)


def streams(prompts, n, steps=12):
    rows = [(p, k) for p in prompts for k in range(n)]
    return row_uniforms(0, *zip(*rows, strict=True), steps)


def test_one_particle_is_pargs():
    ids, mask = left_padded(4, 2, 6)
    uniforms = streams(range(3), 1)
    found = run(1, ids, mask, uniforms)
    settings = dict(beta=BETA, top_k=5, max_new_tokens=6, eos=END, uniforms=uniforms[:, :6])
    pargs = generate(ModelPolicy(tiny_lm()), SiblingScorer(tiny_reward_model("llama")), ids, mask, **settings)
    assert torch.equal(found.generation.tokens, pargs.tokens)
    assert_close(found.kl[:, 0], sampled_kl(pargs), rtol=0, atol=1e-10)


def test_a_prompt_has_particles_of_its_own():
    """Alone or in a padded batch beside others that are resampled at other steps: the same texts and numbers."""
    ids, mask = left_padded(4, 2, 6)
    together = run(4, ids, mask, streams(range(3), 4), threshold=0.9)
    for row in range(3):
        prompt = ids[row][mask[row].bool()][None]
        alone = run(4, prompt, torch.ones_like(prompt), streams([row], 4), threshold=0.9)
        assert written(alone.generation) == written(together.generation)[4 * row : 4 * row + 4]
        assert_close(alone.log_weights[0], together.log_weights[row])
        assert_close(alone.log_evidence[0], together.log_evidence[row])


@torch.no_grad()
@pytest.mark.parametrize("scorer", [SiblingScorer, lambda model: ReencodeScorer(model_rewards(model))])
def test_resampled_rows_keep_their_numbers(scorer):
    """Log-probabilities and rewards of every row are those of its own text, whatever row it came from."""
    lm, rm = tiny_lm(), tiny_reward_model("llama")
    ids, mask = left_padded(4, 2, 6)
    uniforms = streams(range(3), 4)
    unsplit = run(4, ids, mask, uniforms, threshold=0.0).generation
    settings = dict(beta=BETA, top_k=5, max_new_tokens=6, eos=END, uniforms=uniforms[:, :6], choices=uniforms[::4, 6:])
    settings |= dict(n=4, threshold=2.0, final=model_rewards(rm))
    found = smc(ModelPolicy(lm), scorer(rm), ids, mask, **settings).generation
    assert written(found) != written(unsplit)
    for row, y in enumerate(written(found)):
        prompt = ids[row // 4][mask[row // 4].bool()]
        text = torch.cat([prompt, torch.tensor(y)])[None]
        log_probs = lm(input_ids=text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(y)[:, None])[:, 0]
        assert_close(found.ref_log_probs[row, : len(y)], expected, rtol=0, atol=1e-10)
        rewards = prefix_rewards(rm, text, torch.ones_like(text))[0, len(prompt) :]
        ours = found.rewards[row, : len(y)]
        assert_close(ours, rewards.where(~ours.isnan(), torch.nan), rtol=0, atol=1e-10, equal_nan=True)
        assert (found.rewards[row, len(y) :] == 0).all()


def test_the_final_reward_decides_the_weight_and_the_kl():
    ids, mask = left_padded(4, 2, 6)
    uniforms, other = streams(range(3), 4), model_rewards(tiny_reward_model("qwen2", seed=5))
    plain, found = (run(4, ids, mask, uniforms, final=final, threshold=0.0, top_k=0) for final in (None, other))
    rewards = response_rewards(other, ids.repeat_interleave(4, 0), mask.repeat_interleave(4, 0), found.generation).view(
        3, 4
    )
    last = found.generation.rewards.gather(1, found.generation.lengths[:, None] - 1).view(3, 4)
    assert_close(found.log_weights, (plain.log_weights + BETA * (rewards - last)).log_softmax(-1))
    assert_close(found.kl, BETA * rewards - found.log_evidence[:, None])


@given(weights=rows(st.integers(1, 6), -8.0, 0.0, batch=1))
def test_systematic_resampling_is_unbiased(weights):
    """Over a grid of uniforms, which misses the exact mean by at most a grid step for each of two breakpoints."""
    grid = (torch.arange(2000).double() + 0.5) / 2000
    n = weights.shape[1]
    chosen = systematic(weights.expand(2000, -1), grid)
    copies = torch.nn.functional.one_hot(chosen, n).sum(1).double()
    expected = n * weights.double().softmax(-1)[0]
    assert ((copies - expected).abs() < 1 + 1e-9).all(), "never a whole copy from what is due"
    assert ((copies.mean(0) - expected).abs() <= 2 / 2000 + 1e-9).all()


def test_a_particle_without_weight_is_never_chosen():
    log_weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(2, -1)
    chosen = systematic(log_weights, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert chosen[0].tolist() == [1, 1, 2, 2]
    assert set(chosen[1].tolist()) == {1, 2}


def test_effective_sample_size_between_one_and_all():
    log_weights = torch.tensor([[0.0, -torch.inf, -torch.inf], [5.0, 5.0, 5.0], [0.0, 0.0, -torch.inf]])
    assert_close(effective_sample_size(log_weights), torch.tensor([1.0, 3.0, 2.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=1e308), "row 0, step 0: .* a log-probability is not a number"),
        (dict(beta=1e307, final=lambda ids, mask: 1e6 + ids[:, -1].double()), "prompt 0: the weights of its particles"),
    ],
)
def test_weights_that_are_no_numbers_pick_nothing(change, message):
    ids, mask = left_padded(3)
    scorer = ReencodeScorer(lambda ids, mask: (0 if "final" in change else 9) * ids[:, -1].double())
    settings = dict(n=2, top_k=0, max_new_tokens=2, eos=END) | change
    with pytest.raises(FloatingPointError, match=message):
        smc(ModelPolicy(tiny_lm()), scorer, ids, mask, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n=0), r"n \(particles\) must be at least 1, got 0"),
        (dict(choices=torch.rand(2, 2)), r"choices must be \(1, 2\), a prompt and step each, got \(2, 2\)"),
        (dict(choices=torch.rand(1, 1)), r"choices must be \(1, 2\), a prompt and step each, got \(1, 1\)"),
        (dict(threshold=-0.5), "threshold must be a fraction of the particles, at least 0, got -0.5"),
        (dict(temperature=0.7), "temperature must be 1 for smc"),
        (dict(draw=greedy), "draw must sample .leave it out., not be greedy"),
        (dict(top_k=5), "final, the reward of whole texts, is needed where some tokens are no candidates"),
        (dict(min_ref_prob=0.1), "final, the reward of whole texts, is needed where some tokens are no candidates"),
    ],
)
def test_bad_arguments_are_named(change, message):
    ids, mask = left_padded(3)
    settings = dict(n=2, beta=1.0, top_k=0, max_new_tokens=2, eos=END) | change
    with pytest.raises(ValueError, match=message):
        smc(ModelPolicy(tiny_lm()), SiblingScorer(tiny_reward_model()), ids, mask, **settings)
