"""`pargs demo` and `pargs study`: experiments, on the embedded world or on a model of one's own."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from pargs_min.cli.options import HfArg, parse
from pargs_min.experiments import demo as small_world
from pargs_min.experiments import studies
from pargs_min.experiments.setup import Lab, embedded


@dataclass(kw_only=True)
class DemoOptions:
    """Options of `pargs demo`."""

    output_dir: str | None = HfArg(
        default=None, help="For models, figure and results. Default: runs/demo, or runs/demo-quick with --quick."
    )
    quick: bool = HfArg(default=False, help="Everything much smaller, and numbers to match.")
    seed: int = HfArg(default=0, help="Seed of everything made; 0 takes the reference shipped with the package.")


def demo(arguments: list[str]) -> None:
    """Train, decode and compare on a small embedded world, from start to end."""
    (options,) = parse(demo, arguments, DemoOptions)
    folder = Path(options.output_dir or ("runs/demo-quick" if options.quick else "runs/demo"))
    folder.mkdir(parents=True, exist_ok=True)
    small_world.run(folder, quick=options.quick, seed=options.seed)


@dataclass(kw_only=True)
class StudyOptions:
    """Options of `pargs study NAME`. Without --model it runs on the embedded world."""

    output_dir: str = HfArg(
        default="runs/study",
        help="For models, tables and figures. Studies share what they train; an interrupted one continues here.",
    )
    seeds: int = HfArg(default=3, help="Number of seeds of everything that is trained or drawn.")
    seed: int = HfArg(default=0, help="The first of them.")
    processes: int = HfArg(default=2, help="Processes that train and decode side by side; use 1 on a GPU.")
    quick: bool = HfArg(default=False, help="So small that it only shows that it runs.")
    model: str | None = HfArg(default=None, help="Language model: a folder or a hub id.")
    dataset: str | None = HfArg(default=None, help="Preference pairs, as for `pargs train`.")
    prompts: str | None = HfArg(default=None, help="Prompts to generate from, as for `pargs generate`.")
    judge: str | None = HfArg(default=None, help="Scores texts, as for `pargs evaluate`.")
    held_out: str | None = HfArg(default=None, help="Pairs to test on. Default: those of a tenth of the prompts.")
    max_new_tokens: int = HfArg(default=64, help="Length limit of a response, in tokens.")
    samples: int = HfArg(default=16, help="Texts per prompt.")
    batch_size: int = HfArg(default=32, help="Texts decoded together.")
    pairs_per_step: int = HfArg(default=16, help="Pairs per training step.")
    epochs: float = HfArg(default=1.0, help="Passes over the pairs.")
    learning_rate: float = HfArg(default=1e-5, help="Learning rate of reward models.")
    dpo_learning_rate: float = HfArg(default=1e-6, help="Learning rate of DPO.")
    ppo_learning_rate: float = HfArg(default=1e-5, help="Learning rate of PPO.")
    ppo_updates: int = HfArg(default=100, help="Batches of texts that PPO learns from.")
    append_eos: bool = HfArg(default=True, help="Use --no-append-eos if responses were cut at a length limit.")

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.processes < 1:
            raise ValueError(f"--seeds and --processes must be at least 1, got {self.seeds} and {self.processes}")
        given = ("model", "dataset", "prompts", "judge")
        missing = [f"--{name}" for name in given if getattr(self, name) is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"a study of your own model needs {', '.join(missing)}, too")


def study(arguments: list[str]) -> None:
    """Answer one of nine questions by a grid of experiments (`pargs study` lists them)."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        rest = ["--help"]
    elif name not in studies.NAMES:
        raise ValueError(f"no study {name!r}; there are {', '.join(studies.NAMES)}")
    (options,) = parse(study, rest, StudyOptions, prog="pargs study NAME", description=studies.__doc__ or "")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lab = _lab(options, folder)
    seeds = range(options.seed, options.seed + options.seeds)
    print(studies.run(name, lab, folder, seeds=seeds, processes=options.processes, quick=options.quick))
    print(f"saved {name}.md, {name}.json and {name}.png in {folder}")


def _lab(options: StudyOptions, folder: Path) -> Lab:
    if options.model is None:
        torch.set_num_threads(1)  # the world's models are so small that a second thread only waits
        return embedded(folder, quick=options.quick)
    shared = {field.name for field in fields(Lab)} & vars(options).keys()
    return Lab(folder=str(folder), pairs=str(options.dataset), **{name: getattr(options, name) for name in shared})
