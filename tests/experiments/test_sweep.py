"""Grids of cells: what is kept when one is interrupted, what is trained once, how seeds are gathered."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
import warnings
from dataclasses import replace

import pytest
import torch

from pargs_min.cli import warning_line
from pargs_min.experiments import measure, recipes, studies, sweep
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import FULL, VALUE
from pargs_min.experiments.setup import contents
from pargs_min.experiments.sweep import gather


def everywhere(lab, seeds=6):
    """The same lab for all seeds."""
    return {seed: {"": lab} for seed in range(seeds)}


def swept(*arguments):
    with sweep.workers(1) as pool:
        return sweep.sweep(pool, *arguments)


@pytest.mark.usefixtures("one_process")
def test_an_interrupted_grid_keeps_its_cells_and_goes_on(lab, tmp_path, monkeypatch):
    measured, limit = [], [3]

    def counted(lab, cell):
        if len(measured) == limit[0]:
            time.sleep(0.5)  # until the others are kept
            raise KeyboardInterrupt
        measured.append(cell)
        return {"reward": float(cell.seed)}

    monkeypatch.setattr(measure, "measure", counted)
    cells, file = [Cell(seed, "plain") for seed in range(6)], tmp_path / "grid.jsonl"
    with pytest.raises(KeyboardInterrupt):
        swept(everywhere(lab), cells, file)
    with file.open("a") as out:
        out.write('{"cell": {"method": "plain", "seed": 5}, "found": {"rew')  # what a killed run leaves
    limit[0] = None
    found = swept(everywhere(lab), cells, file)
    assert [cell.seed for cell in measured] == list(range(6))  # none twice
    assert list(found) == cells
    assert [one["reward"] for one in found.values()] == list(range(6))
    assert sweep.sweep(None, everywhere(lab), cells, file) == found  # nothing is left that would need workers
    assert len(measured) == 6
    with pytest.raises(ValueError, match="made with other samples: choose another"):
        swept(everywhere(replace(lab, samples=4)), cells, file)


@pytest.mark.usefixtures("one_process")
def test_a_grid_knows_what_it_was_made_with_and_not_where_that_lies(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda lab, cell: {"reward": 1.0})
    file, cells = tmp_path / "grid.jsonl", [Cell(0, "plain")]
    found = swept(everywhere(lab), cells, file)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured again"))
    shutil.copy(lab.prompts, tmp_path / "copy.jsonl")
    moved = replace(lab, folder=f"{lab.folder}/.", prompts=str(tmp_path / "copy.jsonl"), batch_size=lab.batch_size + 1)
    assert swept(everywhere(moved), cells, file) == found
    (tmp_path / "copy.jsonl").write_text('{"prompt": "another"}\n')
    contents.cache_clear()
    with pytest.raises(ValueError, match="made with other prompts: choose another"):
        swept(everywhere(moved), cells, file)


@pytest.mark.usefixtures("one_process")
def test_a_judge_is_loaded_before_anything_is_made_and_may_be_another_until_it_has_judged(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda lab, cell: {"reward": 1.0})
    monkeypatch.setattr(measure, "plain_rewards", lambda lab: pytest.fail("made"))
    cells, file = [Cell(0, "plain")], tmp_path / "grid.jsonl"
    for wrong, said in (("no/such-judge", "cannot be loaded"), ("http://localhost#m", "compares texts")):
        with pytest.raises(ValueError, match=said):
            swept(everywhere(replace(lab, second_judge=wrong)), cells, file)
    monkeypatch.setattr(measure, "plain_rewards", lambda lab: None)
    assert swept(everywhere(lab), cells, file)


@pytest.mark.usefixtures("one_process")
def test_a_grid_that_was_killed_at_once_begins_anew(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda lab, cell: {"reward": 1.0})
    (tmp_path / "grid.jsonl").write_text('{"labs": {"')
    for _ in range(2):
        assert swept(everywhere(lab), [Cell(0, "plain")], tmp_path / "grid.jsonl") == {Cell(0, "plain"): {"reward": 1}}


@pytest.mark.usefixtures("one_process")
def test_what_cells_share_is_trained_once_and_ingredients_first(lab, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recipes, "make", lambda lab, recipe, seed: made.append(recipe.folder_name(seed)))
    monkeypatch.setattr(recipes, "rated", lambda lab, seed: made.append(f"rated-{seed}"))
    monkeypatch.setattr(measure, "measure", lambda lab, cell: {})
    cells = [
        Cell(0, "cd", beta=1.0, recipe=VALUE),
        Cell(0, "cd", beta=2.0, recipe=VALUE),
        Cell(0, "args", beta=1.0, recipe=FULL),
        Cell(1, "ppo", beta=1.0),
    ]
    swept(everywhere(lab), cells, tmp_path / "grid.jsonl")
    assert sorted(made[:2]) == ["full-seed=0", "full-seed=1"]
    assert sorted(made[2:4]) == ["ppo-beta=1.0-seed=1", "rated-0"]
    assert made[4:] == ["value-seed=0"]


@pytest.mark.usefixtures("one_process")
def test_each_seed_is_measured_in_its_own_world_and_seeds_can_be_added(lab, tmp_path, monkeypatch):
    measured, file = [], tmp_path / "grid.jsonl"
    monkeypatch.setattr(measure, "measure", lambda lab, cell: measured.append((lab.samples, cell)) or {"reward": 0.0})
    monkeypatch.setattr(measure, "plain_rewards", lambda lab: None)
    with sweep.workers(1) as pool:
        worlds = sweep.in_each_world(pool, lambda seed: {"": replace(lab, samples=10 + seed)}, [2, 0, 1])
    assert [*worlds] == [2, 0, 1]
    cells = [Cell(seed, "plain") for seed in range(3)]
    swept({seed: worlds[seed] for seed in (0, 1)}, cells[:2], file)
    swept(worlds, cells, file)
    assert measured == [(10, cells[0]), (11, cells[1]), (12, cells[2])]
    with pytest.raises(ValueError, match="made with other samples"):
        swept({1: worlds[2]}, [cells[1]], file)


def test_what_is_not_installed_is_said_before_anything_is_made(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="which is TRL's: pip install"):
        swept(everywhere(lab), [Cell(0, "dpo", beta=1.0)], tmp_path / "grid.jsonl")
    assert not (tmp_path / "grid.jsonl").exists()


def test_workers_have_one_thread_end_at_an_interrupt_without_a_word_and_warn_as_their_parent_does(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(warnings, "formatwarning", warning_line)
    with sweep.workers(1) as pool:
        assert pool.executor.submit(torch.get_num_threads).result() == 1
        assert pool.executor.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_DFL
        assert pool.executor.submit(warnings_of_a_worker).result() == "pargs: warning: careful\n"


def warnings_of_a_worker():
    return warnings.formatwarning("careful", UserWarning, "code.py", 1)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_or_an_interrupt_drops_what_has_not_begun(lab, tmp_path, monkeypatch, error):
    begun = []

    def measured(lab, cell):
        begun.append(cell)
        if cell.seed == 0:
            raise error
        time.sleep(0.05)

    monkeypatch.setattr(measure, "measure", measured)
    with pytest.raises(error):
        swept(everywhere(lab, 100), [Cell(seed, "plain") for seed in range(100)], tmp_path / "grid.jsonl")
    assert len(begun) < 50


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero")  # one beta makes no picture
def test_a_study_starts_its_workers_once(lab, tmp_path, monkeypatch):
    """They take longer to start than a small study to run."""
    opened, one = [], sweep.ProcessPoolExecutor
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda *how: opened.append(how) or one(*how))
    studies.run("partial-vs-full", lambda seed: lab, tmp_path, seeds=[0], methods=["pargs"], betas=[1.0])
    assert len(opened) == 1


def test_a_worker_that_is_killed_is_one_error():
    with (
        sweep.workers(1) as pool,
        pytest.raises(ValueError, match="a process that made cells was killed, perhaps for memory: lower --processes"),
    ):
        [*sweep._run(pool, [(os._exit, 9)], "cells")]


def test_rows_gather_the_seeds_of_a_cell():
    first, second = gather(
        {
            Cell(seed, method): {"reward": reward, "by_prompt": [reward, reward + 2], "accuracy": [reward, 0.0]}
            for method, seed, reward in (("plain", 0, 1.0), ("pargs", 0, 5.0), ("plain", 1, 3.0))
        }
    )
    assert (first.cell.method, second.cell.method) == ("plain", "pargs")
    found = first.found["reward"]
    assert (found.mean, found.error, found.seeds) == (2.0, 1.0, [1.0, 3.0])
    assert first.found["prompt_error"].mean == 1.0
    assert first.found["accuracy"].mean == [2.0, 0.0]
    assert math.isnan(second.found["reward"].error)
    assert second.as_json()["reward"] == {"mean": 5.0, "error": None, "low": None, "high": None, "seeds": [5.0]}
    assert "seed" not in second.as_json()


def test_what_one_seed_alone_found_is_no_mean_over_seeds():
    (row,) = gather({Cell(0, "plain"): {"reward": 1.0, "gap": 2.0}, Cell(1, "plain"): {"reward": 1.0}})
    assert row.found.keys() == {"reward"}
