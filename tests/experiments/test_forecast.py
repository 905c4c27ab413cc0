"""How long an experiment will take, before it starts."""

from dataclasses import replace

import pytest

from pargs_min.experiments import measure, recipes
from pargs_min.experiments.forecast import Pace, forecast, pace
from pargs_min.experiments.measure import Cell
from pargs_min.experiments.recipes import FULL, PARTIAL, SOFT_LABELS, Recipe
from pargs_min.experiments.setup import material
from pargs_min.experiments.sweep import sweep, workers

UNITS = Pace(plain=1.0, guided=10.0, read=100.0)


def of(lab, *jobs, processes=1):
    return forecast([[(make, lab, *rest) for make, *rest in jobs]], {lab: UNITS}, processes)


def test_texts_count_as_often_as_they_are_written_and_rated(lab):
    """2 prompts, 3 samples each."""
    cells = {
        Cell(0, "plain"): 6,
        Cell(0, "pargs", beta=1.0, recipe=PARTIAL): 60,
        Cell(0, "best-of-n", n=4, recipe=FULL): 24 + 2400,
        Cell(0, "smc", beta=1.0, particles=5, recipe=PARTIAL, final=FULL): 300 + 3000,
    }
    for cell, seconds in cells.items():
        assert of(lab, (measure.measure, cell)) == seconds
    assert of(lab, *((measure.measure, cell) for cell in cells), processes=2) == max(5790 / 2, 3300)
    assert of(lab, (measure.plain_rewards,)) == 2 * lab.plain_samples
    few = replace(lab, text_prompts=3, texts_per_prompt=4)
    assert of(few, (recipes.samples,), (recipes.rated, 0)) == 12 + 1200


def test_a_training_step_reads_every_text_of_its_examples_three_times_and_models_that_are_there_cost_nothing(lab):
    pairs = len(material(lab).pairs)
    assert of(lab, (recipes.make, PARTIAL, 0)) == 3 * 100 * 2 * pairs
    assert of(lab, (recipes.make, Recipe("soft", beta=1.0), 0)) == 3 * 100 * 6 * pairs  # six times the steps, one text
    assert of(lab, (recipes.make, SOFT_LABELS, 0)) == 3 * 100 * 2 * pairs  # twice the steps, groups of 8, 1/8 as many
    assert of(lab, (recipes.make, Recipe("farma"), 0)) == 3 * 3 * 100 * 2 * pairs  # at each of three rates
    halved = replace(lab, shared_layers=1)  # of two layers, so that half of the way back is left
    assert of(halved, (recipes.make, PARTIAL, 0)) == 2 * 100 * 2 * pairs
    soft = of(halved, (recipes.make, Recipe("soft", beta=1.0), 0))
    assert soft == 100 * (3 * 6 / 2 + 2 / 2) * pairs  # the half below reads each of two texts per pair once
    recipes.folder(lab, PARTIAL, 0).mkdir(parents=True)
    assert of(lab, (recipes.make, PARTIAL, 0)) == 0
    assert of(lab, (recipes.make, PARTIAL, 1)) > 0


def test_a_pace_is_per_whole_text(lab, monkeypatch):
    """A clock that ticks once per text and token: a text of 8 tokens takes 8 ticks, whatever it is measured by."""
    ticks = [0.0]

    def generated(lab, prompts, many, max_new_tokens, method="plain", **_):
        ticks[0] += len(prompts) * many * max_new_tokens * (2 if method == "pargs" else 1)

    monkeypatch.setattr("pargs_min.experiments.forecast.generated", generated)
    monkeypatch.setattr("time.perf_counter", lambda: ticks[0])
    assert pace(lab)[:2] == pytest.approx((8, 16))


def test_a_sweep_says_how_long_it_will_take(lab, one_process, tmp_path, capsys):
    with workers(1) as pool:
        sweep(pool, {0: {"": lab}}, [Cell(0, "plain")], tmp_path / "cells.jsonl")
    assert (
        "this will take about 1 minute; it can be interrupted, and then continues from what is finished"
        in capsys.readouterr().err
    )
    sweep(None, {0: {"": lab}}, [Cell(0, "plain")], tmp_path / "cells.jsonl")
    assert "this will take" not in capsys.readouterr().err
