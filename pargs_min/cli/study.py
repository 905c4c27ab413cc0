"""`pargs demo` and `pargs study`: experiments, on the embedded world or on a model of one's own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from pargs_min.cli.options import parse
from pargs_min.experiments import demo as small_world
from pargs_min.experiments import studies
from pargs_min.experiments.setup import Lab, Sizes, numbered


@dataclass(kw_only=True)
class DemoOptions:
    """Options of `pargs demo`.

    Args:
        output_dir: For models, figure and results. Default: runs/demo, or runs/demo-quick with --quick.
        quick: Everything much smaller, and numbers to match.
        seed: Seed of everything made; 0 takes the reference shipped with the package.
    """

    output_dir: Path | None = None
    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raises ValueError if a seed is negative."""
    if seed < 0:
        raise ValueError(f"seed (--seed) must be at least 0, got {seed}")


def demo(arguments: list[str]) -> None:
    """Train, decode and compare on a small embedded world, from start to end."""
    (options,) = parse(demo, arguments, DemoOptions)
    folder = options.output_dir or Path("runs/demo-quick" if options.quick else "runs/demo")
    small_world.run(folder, quick=options.quick, seed=options.seed)


@dataclass(kw_only=True)
class StudyOptions:
    """Options of `pargs study NAME` besides `Sizes`. Without --model it runs on the embedded world.

    Args:
        output_dir: For models, tables and figures. Studies share what they train; an interrupted one continues here.
        seeds: Number of seeds of everything that is trained or drawn. Each has an embedded world of its own,
            unless --worlds says otherwise.
        seed: The first of them.
        worlds: So many embedded worlds are shared by the seeds, in turn: seed S lives in world S mod N.
        processes: Processes that train and decode side by side, each with models of its own in memory.
        quick: So small that it only shows that it runs.
        methods: Only these of the study's methods, as its table names them, and plain; more can follow later.
        betas: Only these of the study's betas.
        model: Language model: a folder or a hub id.
        dataset: Preference pairs, as for `pargs train`.
        prompts: Prompts to generate from, as for `pargs generate`.
        judge: Scores texts, as for `pargs evaluate`.
    """

    output_dir: Path = Path("runs/study")
    seeds: int = 3
    seed: int = 0
    worlds: int | None = None
    processes: int = 2
    quick: bool = False
    methods: list[str] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    model: str | None = None
    dataset: str | None = None
    prompts: str | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("seeds", "processes", "worlds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        given = ("model", "dataset", "prompts", "judge")
        missing = [f"--{name}" for name in given if getattr(self, name) is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"a study of your own model needs {', '.join(missing)}, too")


def study(arguments: list[str]) -> None:
    """Answer an open question by a grid of experiments (`pargs study` lists them)."""
    name, *rest = arguments or ["--help"]
    name = studies.OTHER_NAMES.get(name, name)
    if name in ("-h", "--help"):
        rest = ["--help"]
    elif name not in studies.NAMES:
        raise ValueError(f"no study {name!r}; there are {', '.join(studies.NAMES)}")
    options, sizes = parse(study, rest, StudyOptions, Sizes, prog="pargs study NAME", description=studies.__doc__ or "")
    world, folder = _world(options, sizes), options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + options.seeds)
    settings = dict(processes=options.processes, quick=options.quick, methods=options.methods, betas=options.betas)
    print(studies.run(name, world, folder, seeds=seeds, **settings))
    print(f"saved {name}.md, {name}.json and {name}.png in {folder}")


def _world(options: StudyOptions, sizes: Sizes) -> Callable[[int], Lab]:
    """The lab of each seed: a world of its own, or the user's model.

    Raises:
        ValueError: for an option that would change nothing.
    """
    if options.model is None:
        if changed := [name for name, value in vars(sizes).items() if value != getattr(Sizes, name)]:
            raise ValueError(f"--{changed[0].replace('_', '-')} is for a study of your own model: add --model, ...")
        torch.set_num_threads(1)  # the world's models are so small that a second thread only waits
        return partial(_embedded, options)
    if options.worlds:
        raise ValueError("--worlds is for the embedded worlds: all seeds share your own model")
    own: dict = dict(model=options.model, pairs=options.dataset, prompts=options.prompts, judge=options.judge)
    return partial(_same, Lab(folder=str(options.output_dir), **own, **vars(sizes)))


def _embedded(options: StudyOptions, seed: int) -> Lab:
    return numbered(options.output_dir, options.quick, seed % options.worlds if options.worlds else seed)


def _same(lab: Lab, seed: int) -> Lab:
    return lab
