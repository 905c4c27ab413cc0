"""`pargs benchmark`: what a guided token costs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pargs_min.benchmark.report import draw, markdown, run
from pargs_min.benchmark.targets import check
from pargs_min.benchmark.ways import SHAPES, Models, Setting, models_of_shape, with_vocabulary_head
from pargs_min.cli.options import choice, parse
from pargs_min.models import default_device, load_language_model, load_reward_model
from pargs_min.plots import save
from pargs_min.store import write_json


@dataclass(kw_only=True)
class BenchmarkOptions:
    """Options of `pargs benchmark` besides `Setting`.

    Args:
        config: Shape of models with random weights; tiny has 4 layers of width 256.
        model: A language model instead: a folder or a hub id.
        reward_model: Its scalar reward model. Default: a new head on --model.
        rounds: Interleaved rounds, over which medians are taken.
        dtype: Type of the weights.
        device: Default: cuda if available, else cpu.
        threads: CPU threads. One is timed in processor time, which ignores other programs.
        quick: Only the table of ways, without growth and training.
        check: Check what the project promises on the CPU; status 1 if a promise fails.
        output_dir: For the report as JSON, the tables and the figure.
    """

    config: str = choice(SHAPES, "tiny")
    model: str | None = None
    reward_model: str | None = None
    rounds: int = 7
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    threads: int = 1
    quick: bool = False
    check: bool = False
    output_dir: str = "runs/benchmark"


def benchmark(arguments: list[str]) -> int:
    """Measure what a guided token costs, next to plain generation and the published loops."""
    options, setting = parse(benchmark, arguments, BenchmarkOptions, Setting)
    for name, number in (vars(setting) | {"threads": options.threads}).items():
        if number < 1:
            raise ValueError(f"{name} (--{name.replace('_', '-')}) must be at least 1, got {number}")
    torch.set_num_threads(options.threads)
    if options.check:
        return 0 if check(options.rounds) else 1
    if options.model is None and options.reward_model is not None:
        raise ValueError("--reward-model goes with --model; without one, models of the shape --config are timed")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = run(_models(options), rounds=options.rounds, quick=options.quick, **vars(setting))
    print(markdown(report))  # before anything is written, which may fail
    write_json(folder / "benchmark.json", report | {"options": vars(options) | vars(setting)})
    (folder / "benchmark.md").write_text(markdown(report) + "\n", "utf-8")
    save(draw(report), folder / "benchmark.png")
    print(f"saved {folder}")
    return 0


def _models(options: BenchmarkOptions) -> Models:
    dtype, device = getattr(torch, options.dtype), default_device(options.device)
    if options.model is None:
        return models_of_shape(options.config, dtype, device)
    lm = load_language_model(options.model, dtype=dtype, device=device)
    name, head = options.reward_model or options.model, None if options.reward_model else "scalar"
    scalar = load_reward_model(name, head=head, dtype=dtype, device=device)
    return Models(lm, scalar, with_vocabulary_head(scalar))
