"""How studies show what they measured: tables with a legend, and curves with their intervals."""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pargs_min import plots
from pargs_min.evaluation.statistics import FrontierPoint
from pargs_min.experiments.measure import Cell, rlhf_policies
from pargs_min.experiments.setup import Lab, as_json
from pargs_min.experiments.sweep import Row
from pargs_min.markdown import markdown_table
from pargs_min.store import write_json

BETAS = (0.5, 1.0, 2.0, 3.0)
BETA = 2.0  # where one is enough
PARTICLES = 8
LEAST_KL = 0.05  # nats: with less, the share of RLHF's gain is one of noise


@cache
def optimum(lab: Lab) -> list[FrontierPoint]:
    """The RLHF policies of the judge's reward, from little KL to much."""
    return rlhf_policies(lab, [*np.linspace(0, 1, 41), *np.linspace(1.1, 6, 50)])


def with_rlhf(lab: Lab, cell: Cell, found: dict) -> dict:
    """What a cell found, and what it is beside the RLHF policies of its lab, where its KL is a policy's and known to be
    theirs, too.

    Returns:
        also rlhf, the most reward that any policy has at this KL; and share, (reward - plain) / (rlhf - plain), where
        the KL is large enough to tell.
    """
    points = optimum(lab) if cell.method and not cell.writes.greedy else []
    if not points or "kl" not in found or found["kl"] > points[-1].kl:
        return found
    curve = np.transpose([(point.kl, point.reward) for point in points])
    plain, best = points[0].reward, np.interp(found["kl"], *curve)
    share = {"share": float((found["reward"] - plain) / (best - plain))} if found["kl"] > LEAST_KL else {}
    return found | {"rlhf": float(best)} | share


# ---- texts ----

HEADS = dict(lab="world", method="method", beta="beta", top_k="k", n="n", particles="particles", recipe="reward model")
# What a column is called, its decimals, and what the legend says of it.
MEASURES = json.loads(Path(__file__).with_name("measures.json").read_text("utf-8"))


def table(rows: list[Row], columns: Sequence[str], each_seed: bool = False) -> str:
    """The rows as Markdown: the settings that vary, means ± standard errors over seeds, and each seed's reward."""
    varied = [name for name in HEADS if len({getattr(row.cell, name) for row in rows}) > 1]
    shown = [name for name in columns if any(name in row.found for row in rows)]
    head = [HEADS[name] for name in varied] + [MEASURES[name]["title"] for name in shown] + ["each seed"] * each_seed
    lines = []
    for row in rows:
        line = [_setting(getattr(row.cell, name)) for name in varied] + [_measure(row, name) for name in shown]
        if each_seed:
            rewards = row.found["reward"].seeds if "reward" in row.found else ()  # too few texts may tell of a cap
            line.append(" ".join(f"{value:.2f}" for value in rewards))
        lines.append(line)
    return markdown_table(head, lines, "l" * len(varied) + "r" * (len(head) - len(varied)))


def _setting(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _measure(row: Row, name: str) -> str:
    if (found := row.found.get(name)) is None:
        return ""
    digits, bound = MEASURES[name]["digits"], "≤ " if name in ("kl", "gap") and row.cell.writes.bound else ""
    error = "" if math.isnan(found.error) else f" ± {found.error:.{digits}f}"
    return f"{bound}{round(found.mean, digits) + 0.0:.{digits}f}{error}"  # + 0.0: no minus before a zero


def legend(rows: list[Row], columns: Sequence[str], seeds: int, worlds: int = 1) -> str:
    """What the columns of a table say, and what its standard errors are over: worlds, or seeds if all are of one."""
    shown = [MEASURES[name] for name in columns if any(name in row.found for row in rows)]
    varies = f"{seeds} seeds: of what is trained and of the texts; reference, pairs and prompts stay the same"
    if worlds > 1:
        varies = f"{worlds} worlds: reference, pairs, reward models and texts; the prompts stay the same"
    if seeds > worlds > 1:
        varies += f"; {seeds} seeds of reward models and texts share them"
    over = f"± is the standard error over {varies}." if seeds > 1 else "One seed: no error bars."
    return "\n".join([*(f"- {measure['title']}: {measure['says']}" for measure in shown), over])


def write(stem: Path, text: str, drawing: Figure, facts: dict) -> None:
    """Write what was found as text, as a figure and as JSON: stem.md, stem.png, stem.json."""
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    write_json(stem.with_suffix(".json"), as_json(facts))
    plots.save(drawing, stem.with_suffix(".png"))


# ---- figures ----

SHOWN_KL = 6.0  # nats
RANKED = "candidates ranked right (by gain)"
KL_LABEL = "KL to the reference (nats per text)"


def kl(row: Row) -> float:
    return row.found["kl"].mean


def grouped(rows: list[Row], name: str) -> dict[Any, list[Row]]:
    """The rows by a setting of their cells."""
    settings = dict.fromkeys(getattr(row.cell, name) for row in rows)
    return {value: [row for row in rows if getattr(row.cell, name) == value] for value in settings}


def intervals_over(rows: list[Row]) -> str:
    """What the bars of a figure are."""
    return f"bars: 95% interval over {'worlds' if rows[0].worlds else 'seeds'}"


def curve(
    axes: Axes, rows: list[Row], x: Callable[[Row], Any], y: str, label: str, ink: tuple[str, str], **style
) -> None:
    """A line through rows, with the intervals of y."""
    found = [(x(row), row.found[y]) for row in rows if y in row.found]
    if points := sorted((at, one.mean, one.mean - one.low, one.high - one.mean) for at, one in found):
        at, mean, *bars = np.array(points).T
        axes.errorbar(at, mean, np.nan_to_num(bars), color=ink[0], marker=ink[1], label=label, capsize=2, **style)


def curves(axes: Axes, rows: list[Row], x: Callable[[Row], Any], y: str, **style) -> None:
    """A curve for each method."""
    for name, group in grouped(rows, "name").items():
        curve(axes, group, x, y, name, plots.ink(name), **style)


def log_scale(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def reward_against_kl(axes: Axes, rows: list[Row], labs: Sequence[Lab]) -> None:
    """A curve for each method, small marks for single seeds, and the most that any policy reaches: the mean over labs.

    Greedy methods are left out: the divergence of a policy with one text is another matter. So is what lies far right.
    """
    rows = [row for row in rows if "kl" in row.found and not row.cell.writes.greedy]
    points = [[(point.kl, point.reward) for point in at_beta] for at_beta in zip(*map(optimum, labs), strict=False)]
    axes.plot(*np.mean(points, 1).T, color=plots.BLACK, label="RLHF (the most at each KL)")
    for name, group in grouped(rows, "name").items():
        ink, mark = plots.ink(name)
        line, bound = "-" if group[0].cell.writes.guided else "none", group[0].cell.writes.bound
        label = f"{name} (KL is a bound)" if bound else name
        curve(axes, group, kl, "reward", label, (ink, mark), linestyle=line)
        for row in group:
            axes.scatter(row.found["kl"].seeds, row.found["reward"].seeds, s=8, color=ink, marker=mark, alpha=0.5)
    plots.root_scale(axes, min(SHOWN_KL, max(max(row.found["kl"].seeds) for row in rows)))
    if beyond := [f"{row.cell} at {kl(row):.0f} nats" for row in rows if kl(row) > SHOWN_KL]:
        axes.set_title(f"beyond the right edge: {', '.join(beyond)}", loc="right", fontsize=8)
    axes.set(xlabel=KL_LABEL, ylabel="reward")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.03, 0.5))
