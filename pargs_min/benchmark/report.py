"""The report of `pargs benchmark`: every way side by side, how cost grows, and training; as tables and a figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from pargs_min.benchmark import ways
from pargs_min.benchmark.ways import Models, Setting, interleaved, ratios
from pargs_min.markdown import markdown_table
from pargs_min.plots import BLUE, GREEN, ORANGE, panels
from pargs_min.progress import progress
from pargs_min.reward_model import context_length

GROWN = {"plain generation": ORANGE, "our loop": BLUE, "vocabulary head": GREEN}
SWEEPS = {"top_k": (1, 5, 10, 20, 50), "batch_size": (1, 2, 4, 8), "prompt_length": (64, 128, 256, 512)}
RESPONSES = (32, 64, 128)  # tokens of the responses that training reads

# Table -> head of a column -> how a row is written there.
COLUMNS = json.loads(Path(__file__).with_name("columns.json").read_text("utf-8"))


def run(models: Models, *, rounds: int, quick: bool = False, **settings: int) -> dict:
    """Measure all that the report shows, on random prompts.

    Args:
        models: in evaluation mode, all on one device.
        rounds: of interleaved runs, of which medians are taken.
        quick: only the ways side by side, neither growth nor training.
        settings: those of `ways.Setting`.

    Raises:
        ValueError: if `tokens` or `rounds` is below 2, if `top_k` is out of range, or if a text would outgrow a
            model's context.
    """
    setting = Setting(**settings)
    if setting.tokens < 2 or rounds < 2:
        raise ValueError(f"tokens and rounds must be at least 2, got {setting.tokens} and {rounds}")
    limit = min((n for n in map(context_length, (models.lm, models.scalar)) if n), default=2**31)
    if setting.prompt_length + setting.tokens > limit:
        raise ValueError(
            f"prompt_length {setting.prompt_length} and tokens {setting.tokens} exceed the models' context of {limit}"
        )
    report: dict = {"setting": vars(setting) | {"rounds": rounds}, "device": str(models.lm.device)}
    report["weights_mb"] = ways.weight_bytes(models.lm, models.scalar) / 1e6
    report["ways"] = _side_by_side(models, setting, rounds)
    if quick:
        return report

    points = [(name, replace(setting, **{name: value})) for name, values in SWEEPS.items() for value in values]
    report["growth"] = {name: [] for name in SWEEPS}
    for name, point in progress(points, desc="growth"):
        if point.prompt_length + point.tokens <= limit:
            seconds = interleaved(ways.all_ways(models, point, *GROWN), range(rounds), models.lm.device)
            milliseconds = {way: 1e3 * median(times) for way, times in seconds.items()}
            report["growth"][name].append({name: vars(point)[name]} | milliseconds)
    lengths = [length for length in RESPONSES if setting.prompt_length + length <= limit]
    report["training"] = [
        _training(models, setting.prompt_length, length, rounds) for length in progress(lengths, desc="training")
    ]
    return report


def _side_by_side(models: Models, setting: Setting, rounds: int) -> list[dict]:
    found, device = ways.all_ways(models, setting), models.lm.device
    seconds = interleaved(found, progress(range(rounds), desc="rounds"), device)
    return [
        {
            "way": name,
            "ms": 1e3 * median(seconds[name]),
            "over_plain": median(ratios(seconds, name, "plain generation")),
            "over_floor": median(ratios(seconds, name, "floor")),
            "peak_mb": ways.peak_bytes(way, device) / 1e6,
        }
        | ({} if name in ways.COMPILED else ways.passes_per_token(way, models))
        for name, way in found.items()
    ]


def _training(models: Models, prompt: int, response: int, rounds: int) -> dict[str, float]:
    seconds = interleaved(ways.training_ways(models.scalar, prompt, response), range(rounds), models.lm.device)
    one_row, one_pass = "a row per prefix", "one pass"
    return {
        "response": response,
        one_pass: median(seconds[one_pass]),
        one_row: response * median(seconds[one_row]),
        "speed_up": response * median(ratios(seconds, one_row, one_pass)),
        "ideal": ways.ideal_speed_up(prompt, response),
    }


def markdown(report: dict) -> str:
    """The tables of a report."""
    parts = [_table(COLUMNS["ways"], report["ways"])]
    parts[0] += f"\npeak: besides {report['weights_mb']:.0f} MB of weights, after the prompt was read"
    for name, points in report.get("growth", {}).items():
        parts.append(_table({name: f"{{{name}}}"} | {f"{way}, ms": f"{{{way}:.2f}}" for way in GROWN}, points))
    if "training" in report:
        parts.append(_table(COLUMNS["training"], report["training"]))
    return "\n\n".join(parts)


def _table(columns: Mapping[str, str], rows: Sequence[dict]) -> str:
    return markdown_table(list(columns), [[_cell(cell, row) for cell in columns.values()] for row in rows])


def _cell(cell: str, row: dict) -> str:
    """How a row is written in a column; blank where that was not measured."""
    try:
        return cell.format_map(row)
    except KeyError:
        return ""


def draw(report: dict) -> Figure:
    """A bar for each way, on a logarithmic scale, and how the time per token grows with k, batch and prompt."""
    growth = report.get("growth", {})
    drawing, (bars, *curves) = panels(1 + len(growth), (4.8 + 2.8 * len(growth), 3.6))
    names, times = zip(*((row["way"], row["ms"]) for row in report["ways"]), strict=True)
    drawn = bars.barh(names, times, color=[GROWN.get(name, "#BBBBBB") for name in names], log=True)
    bars.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("ms per token")
    for axes, (name, points) in zip(curves, growth.items(), strict=True):
        for way, ink in GROWN.items():
            axes.plot([point[name] for point in points], [point[way] for point in points], "o-", color=ink, label=way)
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
    if curves:
        curves[0].set_ylabel("ms per token")
        curves[0].legend(fontsize=8, frameon=False)
    return drawing
