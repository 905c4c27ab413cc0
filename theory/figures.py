"""The pictures of `theory/README.md`, drawn from the exact quantities; `python -m theory` writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers.utils import logging

from pargs_min.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, STYLE, save
from pargs_min.world.automaton import Automaton
from pargs_min.world.journey import PROMPTS, Journey
from theory import exact
from theory.bradley_terry import partial_reward
from theory.policies import best_of_n, max_value, reward_and_kl, rlhf, soft_value, tokenwise
from theory.smc import enumerate_particles, sample_particles
from theory.test_t09_small_rewards import ORDERS, errors
from theory.test_t10_exactness_by_reweighting import BETA, WORLD, target
from theory.test_t11_on_policy_rounds import losses, pair_rounds, value_rounds
from theory.test_t16_one_family import BETA as FAMILY_BETA
from theory.test_t16_one_family import SECOND_ROOT, divergence, second_root
from theory.test_t19_autoregressive_reward_models import autoregressive, world_of_sharpness
from theory.training import exact_policy, trained_policy, training_world
from theory.world import World, bradley_terry_labels, kl, total_variation

FOLDER = Path(__file__).parent / "figures"


def draw_all() -> list[Path]:
    """Write every figure, the slow one (it trains) last; returns their paths."""
    FOLDER.mkdir(exist_ok=True)
    written = []
    for draw in (
        frontier, small_rewards, rounds, particles, one_family, full_length,
        kept_rest, win_tilt, autoregressive_guides, two_objectives, trained,
    ):  # fmt: skip
        save(draw(), FOLDER / f"{draw.__name__}.png")
        written.append(FOLDER / f"{draw.__name__}.png")
        print(f"wrote {written[-1]}", flush=True)
    return written


def panels(count: int = 1) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(6.4 if count == 1 else 9.6, 4.2))
        return drawing, list(np.atleast_1d(drawing.subplots(1, count)))


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)


def labelled(world: World) -> World:
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))


def frontier() -> Figure:
    """T15: expected reward against KL for every method in one world."""
    world = labelled(World.random(10, 3, 4, reward_scale=2.0))
    r, betas = world.rewards[-1], np.geomspace(0.03, 8, 40)
    drawing, (axes,) = panels()

    def curve(laws: list[np.ndarray], ink: str, label: str, mark: str = "") -> None:
        rewards, divergences = zip(*(reward_and_kl(world, law, r) for law in laws), strict=True)
        every, line = (1, ":") if mark == "D" else (5, "-")
        axes.plot(divergences, rewards, marker=mark, color=ink, label=label, ls=line, ms=4, markevery=every)

    def guided(scores: list) -> list[np.ndarray]:
        return [world.paths(tokenwise(world, scores, beta))[-1] for beta in betas]

    curve([rlhf(world, world.horizon, r, beta) for beta in betas], BLACK, "RLHF, the optimum")
    curve([world.paths(pair_rounds(world, b, 4)[-1])[-1] for b in betas], SKY, "PARGS after 4 on-policy rounds", "v")
    curve(guided(partial_reward(world)), BLUE, "PARGS", "o")
    curve(guided(world.mean(r)), ORANGE, "controlled decoding", "s")
    curve(guided(world.rewards), RED, "ARGS, arbitrary prefix rewards", "^")
    curve([best_of_n(world, r, n) for n in 2 ** np.arange(0, 9)], GREEN, "best of N, N = 1, 2, 4, ..", "D")
    axes.set(xlabel="KL(method || reference), nats per response", ylabel="expected reward")
    title(axes, "T15  One world, |V| = 3, T = 4: nothing is above RLHF")
    axes.legend(fontsize=8, loc="upper left")
    return drawing


def small_rewards() -> Figure:
    """T9: the errors of the approximations against the size of the reward."""
    world, epsilons = World.random(0, 3, 3), 2.0 ** -np.arange(0, 8)
    rows = [errors(world, epsilon) for epsilon in epsilons]
    drawing, (axes,) = panels()
    for (name, order), ink, mark in zip(ORDERS.items(), (BLUE, GREEN, ORANGE, BLACK), "o^sD", strict=True):
        values = np.array([row[name] for row in rows])
        axes.loglog(epsilons, values, mark, color=ink, ms=5, label=f"{name}, slope {order}")
        axes.loglog(epsilons, values[-1] * (epsilons / epsilons[-1]) ** order, color=ink, lw=1)
    axes.set(xlabel="size of the reward, eps", ylabel="error (reward units; nats)")
    title(axes, "T9  Small rewards: the partial reward s is the mean m, then the third order")
    axes.legend(fontsize=8)
    return drawing


def rounds() -> Figure:
    """T11: on-policy rounds, from pairs (a) and with exact values (b)."""
    drawing, (left, right) = panels(2)
    lost = np.array([losses(seed, 4.0, 6) for seed in range(50)])
    numbers = np.arange(1, 7)
    low, middle, high = np.quantile(lost, [0.1, 0.5, 0.9], axis=0)
    left.fill_between(numbers, low, high, color=SKY, alpha=0.4, lw=0, label="10 % to 90 % of 50 worlds")
    left.plot(numbers, middle, "o-", color=BLUE, label="median")
    left.plot(numbers, lost.mean(0), "s--", color=BLACK, label="mean")
    left.set(xlabel="round of fresh pairs", ylabel="reward lost to RLHF at equal KL", ylim=(0, None))
    title(left, "T11(a)  Rounds of pairs, beta = 4")
    left.legend(fontsize=8)

    world, beta = World.random(0, 3, 4), 2.0
    pi = rlhf(world, world.horizon, world.rewards[-1], beta)
    for log_ratio, ink, mark, label in ((True, BLUE, "o", "with"), (False, RED, "^", "without")):
        divergences = [max(kl(world.paths(q)[-1], pi), 1e-17) for q in value_rounds(world, beta, 6, log_ratio)]
        right.semilogy(numbers, divergences, mark + "-", color=ink, label=f"{label} the log-ratio term")
    right.set(xlabel="round of exact values", ylabel="KL(q || RLHF), nats (floor 1e-17)")
    title(right, "T11(b)  Exact after T = 4 rounds")
    right.legend(fontsize=8)
    return drawing


def particles() -> Figure:
    """T10: total variation to the RLHF policy against the number of particles."""
    pi, runs = target(WORLD, BETA), 20_000
    numbers = 2 ** np.arange(0, 9)
    rng = np.random.default_rng(0)
    sampled = []
    for n in numbers:
        at, _ = sample_particles(WORLD, WORLD.rewards, BETA, int(n), runs, rng)
        law = np.bincount(at.ravel(), minlength=len(pi)) / at.size
        sampled.append(0.5 * np.abs(law - np.exp(pi)).sum())
    few = [1, 2, 3]
    enumerated = [
        total_variation(np.log(enumerate_particles(WORLD, WORLD.rewards, BETA, n, weighted=False)[0]), pi) for n in few
    ]
    drawing, (axes,) = panels()
    axes.loglog(numbers, sampled, "o-", color=BLUE, label=f"{runs:,} runs of the sampler")
    axes.loglog(few, enumerated, "s", color=ORANGE, ms=9, mfc="none", label="every outcome enumerated")
    axes.loglog(numbers, sampled[4] * numbers[4] / numbers, ":", color=BLACK, label="slope -1")
    axes.set(xlabel="particles N (N = 1 is the tokenwise policy)", ylabel="TV(law of one particle, RLHF)")
    axes.set_xticks(numbers, [str(n) for n in numbers], minor=False)
    title(axes, "T10  Weighted by T2's normaliser, the tokenwise policy becomes RLHF")
    axes.legend(fontsize=8)
    return drawing


def one_family() -> Figure:
    """T16: KL to RLHF of guidance by V_lambda, and of PARGS."""
    drawing, axes = panels(2)
    typical, lambdas = World.random(0, 4, 3, reward_scale=2.0), np.geomspace(0.02, 50, 300)
    worlds = (
        (typical, 1.0, [1.0], "T16  A random world"),
        (SECOND_ROOT, FAMILY_BETA, [FAMILY_BETA, second_root()], "T16  A world with a second root"),
    )
    for panel, (world, beta, roots, text) in zip(axes, worlds, strict=True):
        world, r = labelled(world), world.rewards[-1]
        inside = np.sort(np.concatenate([lambdas, roots]))
        family = [max(divergence(world, soft_value(world, r, lam), beta), 1e-9) for lam in inside]
        panel.loglog(inside, family, color=BLACK, label="V_lambda")
        marks = (
            (partial_reward(world), BLUE, "-.", "PARGS"),
            (world.mean(r), ORANGE, "--", "mean (controlled decoding)"),
            (max_value(world, r), PINK, ":", "maximum (FaRMA's target)"),
        )
        for scores, ink, line, label in marks:
            panel.axhline(divergence(world, scores, beta), color=ink, ls=line, label=label)
        panel.axvline(beta, color="#BBBBBB", lw=1, label="lambda = beta")
        panel.set(xlabel="lambda", ylabel="KL(RLHF || guided), nats (floor 1e-9)")
        title(panel, f"{text}, beta = {beta}")
    axes[0].legend(fontsize=8)
    return drawing


def full_length() -> Figure:
    """T8(c) and T11 in the embedded world with a safe exit, 25 tokens, by recursion."""
    automaton = Journey(stay_home_reward=0.0).automata[PROMPTS[0]]
    betas = 2.0 ** np.linspace(-3, 5, 25)
    scores = exact.partial_rewards(automaton)
    u = exact.win_rates(automaton)[-1]
    drawing, (left, right) = panels(2)
    first = [exact.guided(automaton, scores, beta) for beta in betas]
    second = [
        exact.guided(automaton, exact.partial_rewards(automaton, policy=q), beta)
        for q, beta in zip(first, betas, strict=True)
        if beta <= 4
    ]
    for policies, ink, mark, label in ((first, BLUE, "o", "PARGS"), (second, SKY, "v", "PARGS, pairs of PARGS")):
        judged = [exact.evaluate(automaton, q) for q in policies]
        wins = [float(exact.occupancy(automaton, q)[-1] @ u) for q in policies]
        left.semilogx(betas[: len(wins)], wins, mark + "-", color=ink, ms=4, label=label)
        right.plot([j.kl for j in judged], [j.reward for j in judged], mark + "-", color=ink, ms=4, label=label)
    left.axhline(0.5, color=BLACK, lw=1, label="the guarantee of T7")
    optimum = exact.rlhf_frontier(automaton, betas)
    right.plot([j.kl for j in optimum], [j.reward for j in optimum], color=BLACK, label="RLHF, the optimum")
    left.set(xlabel="beta", ylabel="win rate against the reference")
    right.set(xlabel="KL(method || reference), nats per response", ylabel="expected reward")
    title(left, "T7, T8(c)  At 25 tokens: never below 1/2, not monotone")
    title(right, "T11(a)  One round of fresh pairs")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return drawing


def kept_rest() -> Figure:
    """T17 in the embedded world: what candidates cost, cut off from the rest and beside it."""
    automata = list(Journey().automata.values())
    scores = [exact.partial_rewards(automaton) for automaton in automata]
    betas = np.append(0.0, np.geomspace(0.25, 3, 12))
    drawing, (axes,) = panels()

    def curve(policy, k: int) -> np.ndarray:
        """(betas, 2) reward and KL, the mean over the prompts."""
        judged = [
            [exact.evaluate(a, policy(a, s, beta, exact.likeliest(a, k))) for beta in betas]
            for a, s in zip(automata, scores, strict=True)
        ]
        return np.mean(judged, axis=0)

    optimum = np.mean([exact.rlhf_frontier(a, np.geomspace(0.05, 8, 30)) for a in automata], axis=0)
    axes.plot(optimum[:, 1], optimum[:, 0], color=BLACK, label="RLHF, the optimum")
    for k, ink, mark in ((10, BLUE, "o"), (5, GREEN, "D"), (3, ORANGE, "s")):
        rewards, kls = curve(exact.kept, k).T
        axes.plot(kls, rewards, mark + "-", color=ink, ms=4, label=f"k = {k}, the rest kept")
        rewards, kls = curve(exact.truncated, k).T
        axes.plot(kls, rewards, mark + ":", color=ink, ms=5, mfc="none", label=f"k = {k}, truncated")
    axes.set(xlabel="KL(method || reference), nats per response", ylabel="expected reward", xlim=(-0.1, 6.2))
    title(axes, "T17  PARGS, beta from 0 to 3: truncation alone costs up to 3 nats")
    axes.legend(fontsize=8, loc="lower right")
    return drawing


def win_tilt() -> Figure:
    """T18 in the embedded world: the win tilt and rounds of its limit, against the frontier of the win rate."""
    automaton = Journey().automata[PROMPTS[0]]
    win, scores = exact.win_rates(automaton), exact.partial_rewards(automaton)
    judge = replace(automaton, rewards=win[-1])  # u(y), so that the reward of a policy is its win rate
    drawing, (axes,) = panels()

    def curve(policies: list[np.ndarray], mark: str, ink: str, label: str, size: int = 5) -> None:
        rates, kls = zip(*(exact.evaluate(judge, policy) for policy in policies), strict=True)
        axes.plot(kls, rates, mark, color=ink, label=label, ms=size)

    rounds = [automaton.reference]
    for _ in range(5):  # the winner of a pair of winners of pairs ..
        fresh = exact.win_rates(automaton, policy=rounds[-1])
        rounds.append(exact.normalise(automaton, rounds[-1] + np.log(fresh)[1:, automaton.targets]))
    tilts = [np.log1p(np.expm1(eta) * win) for eta in (0.5, 1, 1.5, 2, 2.5, 3, 4, 12)]
    best = [exact.guided(judge, exact.soft_values(judge, beta), beta) for beta in np.geomspace(0.1, 16, 30)]
    curve(best, "-", BLACK, "RLHF for the win rate, the optimum")
    curve([exact.guided(automaton, scores, b) for b in np.geomspace(0.05, 3, 14)], "o-", BLUE, "PARGS, beta 0.05 to 3")
    curve([exact.guided(automaton, tilt, 1.0) for tilt in tilts], "s-", RED, "win tilt, eta 0.5 to 12")
    curve(rounds[1:], "*", GREEN, "its limit, the winner of a pair: rounds 1 to 5", 11)
    axes.set(xlabel="KL(method || reference), nats per response", ylabel="win rate against the reference")
    title(axes, "T18  At 25 tokens: on the frontier, a short way per round")
    axes.legend(fontsize=8, loc="lower right")
    return drawing


def autoregressive_guides() -> Figure:
    """T19: where an autoregressive reward model is near the RLHF policy, and where it is not."""
    drawing, axes = panels(2)
    sharpnesses, seeds, beta = np.linspace(0, 3, 13), range(40), 1.0

    def distances(sharpness: float, seed: int, eos: int) -> list[float]:
        world = world_of_sharpness(sharpness, seed, eos)
        p, s = autoregressive(world), partial_reward(labelled(world))
        optimum = rlhf(world, world.horizon, world.rewards[-1], beta)
        guided = [world.paths(tokenwise(world, scores, beta))[-1] for scores in (p, s)]
        return [kl(optimum, q) for q in (*guided, world.log_ref[-1])]

    texts = ((-1, "T19  All texts of one length"), (2, "T19  Texts that may end early"))
    for panel, (eos, text) in zip(axes, texts, strict=True):
        found = np.array([[distances(sharpness, seed, eos) for seed in seeds] for sharpness in sharpnesses])
        low, middle, high = np.quantile(found, [0.1, 0.5, 0.9], axis=1)
        marks = ((ORANGE, "s-", "autoregressive (GenARM's optimum)"), (BLUE, "o-", "PARGS"), (BLACK, "--", "no guide"))
        for n, (ink, line, label) in enumerate(marks):
            panel.plot(sharpnesses, middle[:, n], line, color=ink, ms=4, label=label)
            if label != "no guide":
                panel.fill_between(sharpnesses, low[:, n], high[:, n], color=ink, alpha=0.15, lw=0)
        panel.set(xlabel="sharpness of the reference (0: uniform)", ylabel="KL(RLHF || guided), nats", ylim=(0, 1.2))
        title(panel, text)
    axes[0].legend(fontsize=8)
    return drawing


def two_objectives() -> Figure:
    """T20: how much the exponent of the soft value matters, and the noise of the reward it is made of."""
    drawing, (left, right) = panels(2)
    automata, beta = list(Journey().automata.values()), 2.0
    frontier = np.mean([exact.rlhf_frontier(a, np.geomspace(0.05, 30, 60)) for a in automata], axis=0)
    plain = np.mean([exact.evaluate(a, a.reference).reward for a in automata])

    def share(scores: list[np.ndarray]) -> float:
        """Of what the RLHF policy gains at the same KL."""
        judged = [exact.evaluate(a, exact.guided(a, s, beta)) for a, s in zip(automata, scores, strict=True)]
        reward, divergence = np.mean(judged, axis=0)
        return float((reward - plain) / (np.interp(divergence, frontier[:, 1], frontier[:, 0]) - plain))

    lambdas = beta * np.geomspace(1 / 32, 8, 33)
    left.semilogx(lambdas / beta, [share([exact.soft_values(a, lam) for a in automata]) for lam in lambdas],
                  color=BLACK, label="soft value V_lambda")  # fmt: skip
    marks = ((exact.partial_rewards, BLUE, "-.", "PARGS"), (means, ORANGE, "--", "mean (controlled decoding)"))
    for scores, ink, line, label in marks:
        left.axhline(share([scores(a) for a in automata]), color=ink, ls=line, label=label)
    left.set(xlabel="lambda / beta", ylabel="share of RLHF's gain at equal KL", ylim=(0.85, 1.01))
    left.set_xticks([1 / 16, 1 / 4, 1, 4], ["1/16", "1/4", "1", "4"])
    title(left, f"T20(a)  At 25 tokens, beta = {beta:g}: lambda need not be beta")
    left.legend(fontsize=8, loc="lower left")

    sizes, seeds = np.geomspace(0.03, 2, 13), range(50)
    found = np.array([[noisy_distances(size, seed, beta) for seed in seeds] for size in sizes]).mean(1)
    lines = (
        (BLACK, "D-", "the two objectives, beta = 2"),
        (GREEN, "v-", "the two objectives, beta = 1"),
        (BLUE, "o-", "partial Bradley-Terry (PARGS)"),
        (ORANGE, "s-", "mean (controlled decoding)"),
    )
    for (ink, line, label), distance in zip(lines, found.T, strict=True):
        right.loglog(sizes, distance, line, color=ink, ms=4, label=label)
    right.set(xlabel="noise of the reward of each text (sd of the reward: 1)", ylabel="KL(RLHF || guided), nats")
    title(right, f"T20  {len(seeds)} random worlds, beta = {beta:g}: what noise does")
    right.legend(fontsize=8)
    return drawing


def means(automaton: Automaton) -> np.ndarray:
    return exact.expected(automaton, automaton.rewards)


def noisy_distances(size: float, seed: int, beta: float) -> list[float]:
    """KL(pi_T || q) for guides of a reward that is known up to noise on every text."""
    world = World.random(seed, 3, 4)
    truth = rlhf(world, world.horizon, world.rewards[-1], beta)
    noisy = world.rewards[-1] + size * np.random.default_rng([seed, 1]).standard_normal(len(truth))
    s = partial_reward(world.with_labels(bradley_terry_labels(noisy)))
    guides = (
        (soft_value(world, noisy, beta), beta),
        (soft_value(world, noisy, beta / 2), beta / 2),
        (s, beta),
        (world.mean(noisy), beta),
    )
    return [kl(truth, world.paths(tokenwise(world, scores, strength))[-1]) for scores, strength in guides]


def trained(steps: int = 300, seeds: int = 3) -> Figure:
    """A model trained by pargs_min.train, against the exact policy, as pairs grow."""
    logging.set_verbosity_error()
    world, sizes = training_world(), 4 ** np.arange(2, 8)
    best = exact_policy(world)
    runs = [[trained_policy(world, int(n), steps=steps, seed=seed) for seed in range(seeds)] for n in sizes]
    distances = np.array([[total_variation(q, best) for q in row] for row in runs])
    drawing, (axes,) = panels()
    axes.loglog(sizes, distances, "o", color=SKY, ms=5)
    axes.loglog(sizes, distances.mean(1), "o-", color=BLUE, label=f"trained model, mean of {seeds} seeds")
    axes.axhline(total_variation(world.log_ref[-1], best), color=BLACK, ls="--", label="the reference, unguided")
    axes.set(xlabel="preference pairs", ylabel="TV(guided by the model, exact PARGS)")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()
    title(axes, f"The trainer ({steps} steps) approaches the population minimiser of T5")
    axes.legend(fontsize=8)
    return drawing
