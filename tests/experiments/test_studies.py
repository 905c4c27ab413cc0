"""The studies: each from start to end in miniature, and what they read off their numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from pargs_min import plots
from pargs_min.benchmark import ways
from pargs_min.cli import main
from pargs_min.evaluation.statistics import FrontierPoint
from pargs_min.experiments import measure, report, studies
from pargs_min.experiments.measure import CAP, Cell
from pargs_min.experiments.recipes import DISTILLED, FULL, PARTIAL, SOFT_LABELS, make
from pargs_min.experiments.report import legend, table
from pargs_min.experiments.setup import embedded, numbered
from pargs_min.experiments.studies import NAMES, run
from pargs_min.experiments.studies.attribute import relabelled
from pargs_min.experiments.studies.partial_vs_full import conclude
from pargs_min.experiments.sweep import Row, gather, interval
from pargs_min.models import load_tokenizer
from pargs_min.records import read_preferences

MODULES = {name: import_module(f"{studies.__name__}.{name.replace('-', '_')}") for name in NAMES}
GRIDS = [name for name in NAMES if name != "cost"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The embedded world, far too small to show anything; the studies share it and what they train."""
    return embedded(tmp_path_factory.mktemp("world"), quick=True)


@pytest.fixture(autouse=True)
def in_miniature(monkeypatch, one_process):
    for module in MODULES.values():
        monkeypatch.setattr(module, "BETAS", (0.5, 2.0), raising=False)


def alike(lab):
    """The same lab for all seeds."""
    return lambda seed: lab


@pytest.mark.parametrize("name", GRIDS)
def test_a_study_writes_its_table_its_figure_and_its_numbers_and_does_nothing_twice(name, world, tmp_path, monkeypatch):
    text = run(name, alike(world), tmp_path, seeds=[0], quick=True)
    cells = (tmp_path / f"{name}.jsonl").read_text().count('"found"')
    saved = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert len(saved["rows"]) == cells > 3
    assert (tmp_path / f"{name}.md").read_text() == text + "\n"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    measured = []
    monkeypatch.setattr(measure, "measure", lambda *cell: measured.append(cell) or {})
    assert run(name, alike(world), tmp_path, seeds=[0], quick=True) == text
    assert not measured


@pytest.mark.parametrize("name", ["guides", "partial-vs-full", "real", "cheaper"])
def test_a_study_can_be_of_some_methods_first(name, world, tmp_path, monkeypatch):
    def rows(**some):
        run(name, alike(world), tmp_path, seeds=[0], quick=True, **some)
        return json.loads((tmp_path / f"{name}.json").read_text())["rows"]

    few = rows(methods=["pargs (soft labels)"], betas=[2.0])
    assert [(row["method"], row.get("beta")) for row in few] == [("plain", None), ("pargs", 2.0)]
    measured, measure_one = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda lab, cell: measured.append(cell) or measure_one(lab, cell))
    every = rows()
    assert len(measured) == len(every) - 2  # what was measured before is kept
    assert [row for row in every if row in few] == few


def test_a_real_model_is_compared_with_plain_seed_by_seed_and_prompt_by_prompt():
    def found(rewards):
        return {"reward": sum(rewards) / 2, "kl": 1.0, "by_prompt": rewards}

    plain = {Cell(seed, "plain"): found([1.0 + seed, 2.0]) for seed in (0, 1)}
    ours = {Cell(seed, "pargs", beta=1.0): found([3.0 + seed, 4.0 + 4 * seed]) for seed in (0, 1)}
    said = MODULES["real"].conclude(gather(plain | ours))  # two prompts gain 2 and 4: the error of their mean is 1
    assert "each seed +2.00 +4.00; over prompts ± 1.00" in said


def test_what_is_kept_is_a_share_of_the_whole_guide_alone():
    cheaper = MODULES["cheaper"]
    distilled = row("pargs", [2.0, 3.0], [1.0, 1.0], beta=1.0, recipe=DISTILLED)
    gated = row("pargs", [1.0, 1.0], [1.0, 1.0], beta=1.0, recipe=SOFT_LABELS, guide_below=0.9)
    best = row("pargs", [4.0, 4.0], [1.0, 1.0], beta=1.0, recipe=SOFT_LABELS)
    plain = row("plain", [0.0, 0.0], [0.0, 0.0])
    shares = [found.mean for found in cheaper.kept([plain, distilled, gated, best]).values()]
    assert shares == [0.625, 0.25, 1.0]
    assert all(math.isnan(found.mean) for found in cheaper.kept([plain, distilled, gated]).values())


def test_further_worlds_are_of_the_seed_of_their_world(tmp_path):
    """Which cells of other seeds may share."""
    further = MODULES["beta"].labs(numbered(tmp_path, True, 1), True)
    assert {one.seed for one in further.values()} == {1}


def test_intervals_are_over_the_worlds_that_seeds_share():
    worlds = {seed: "ab"[seed % 2] for seed in range(8)}
    found = {Cell(seed, "plain"): {"reward": 0.0, "kl": 0.0, "by_prompt": [0.0, 0.0]} for seed in worlds}
    found |= {
        Cell(seed, "pargs", beta=1.0): {"reward": 1.0 + seed % 2, "kl": 1.0, "by_prompt": [1.0, 1.0]} for seed in worlds
    }
    said = MODULES["real"].conclude(gather(found, worlds))  # two worlds, of means 1 and 2: Student's 12.7 errors of 0.5
    assert "+1.50, 95% [-4.85, +7.85] over 2 worlds; each seed +1.00 +2.00" in said


def test_a_cap_that_too_few_texts_tell_of_leaves_its_cells_empty():
    rows = [row("plain", [0.0, 0.0], [0.0, 0.0]), Row(Cell(0, CAP, beta=2.0), {})]
    first, *_, last = table(rows, ["reward", "kl"], each_seed=True).splitlines()
    assert first.count("|") == last.count("|")


def test_a_kl_beyond_all_of_ours_is_said():
    rows = [row("plain", [0.0], [0.0]), row("pargs", [1.0], [2.0], beta=1.0), row("args", [1.0], [9.0], beta=1.0)]
    for one in rows:
        one.found["by_prompt"] = interval([[0.0, 1.0]])
    said = MODULES["real"].conclude(rows)
    assert "at the KL of args beta=1 (9.00): +0.00 (one seed) (ours at its largest, 2.00)" in said


@pytest.mark.parametrize("asked", [dict(methods=["parks"]), dict(betas=[7.0])])
def test_a_method_or_beta_that_a_study_does_not_have_is_named(asked, world, tmp_path):
    with pytest.raises(ValueError, match=r"--(methods|betas): this study has no ('parks'|7.0); it has '?(plain|0.5)"):
        run("real", alike(world), tmp_path, seeds=[0], quick=True, **asked)


def test_cost_is_the_report_of_the_benchmark(world, tmp_path, monkeypatch):
    shape = dict(vocab_size=30, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    monkeypatch.setitem(ways.SHAPES, "tiny", ("gpt2", shape))
    assert "our loop" in run("cost", alike(world), tmp_path, seeds=[0], quick=True)
    assert {file.suffix for file in tmp_path.glob("cost.*")} == {".md", ".json", ".png"}


def test_pairs_are_labelled_anew_by_the_attribute(world):
    other = relabelled(world, "brevity", "pargs_min.world.attributes:brevity")
    before, after = read_preferences(world.pairs), read_preferences(other.pairs)
    tokenizer = load_tokenizer(world.model)

    def words(ids):
        return len(tokenizer.decode(ids, skip_special_tokens=True).split())

    assert all(words(pair.chosen) < words(pair.rejected) for pair in after)
    assert len(after) == sum(words(pair.chosen) != words(pair.rejected) for pair in before)
    assert {tuple(pair.prompt) for pair in after} <= {tuple(pair.prompt) for pair in before}


def row(method, rewards, kls, **settings):
    return Row(Cell(0, method, **settings), {"reward": interval(rewards), "kl": interval(kls)})


def test_pargs_and_others_are_compared_at_the_kl_of_the_other_seed_by_seed():
    rows = [
        row("plain", [0.0, 1.0], [0.0, 0.0]),
        row("pargs", [2.0, 3.0], [1.0, 2.0], beta=1.0, recipe=SOFT_LABELS),
        row("pargs", [0.0, 0.0], [1.0, 2.0], beta=1.0, recipe=PARTIAL),
        row("args", [0.5, 1.0], [0.5, 1.0], beta=1.0),  # there PARGS has 1 and 2
        row("args", [0.0, 1.0], [9.0, 9.0], beta=2.0),  # beyond its largest KL: 2 and 3
        row("best-of-n", [3.0, 3.0], [1.0, 1.0], n=4),  # there PARGS has 2 and 2
        row("args-greedy", [9.0, 9.0], [9.0, 9.0], beta=2.0),
    ]
    _, paper, first, second, bound, plain = conclude(rows).split("\n")
    assert "at the KL of pargs beta=1 (1.50): +2.50" in paper
    assert "beta=1 (0.75): +0.75" in first  # .5 and 1
    assert "beta=2 (9.00): +2.00" in second
    assert "best-of-n n=4 (1.00): at most -1.00" in bound
    assert "- minus plain, beta=1: +2.00, 95% [+2.00, +2.00] over 2 seeds" in plain
    alone = [row("plain", [0.0], [0.0]), row("pargs", [2.0], [1.0], beta=1.0, recipe=SOFT_LABELS)]
    assert conclude(alone).split("\n")[1:] == ["- minus plain, beta=1: +2.00 (one seed)"]


def test_the_table_names_what_was_varied_and_marks_bounds():
    rows = [row("plain", [1.0, 2.0], [0.0, 0.0]), row("best-of-n", [3.0, 3.5], [0.6, 0.6], n=4)]
    shown = table(rows, ("reward", "kl", "gap")).split("\n")
    head, _, first, second = (" ".join(line.split()) for line in shown)
    assert head == "| method | n | reward | KL |"
    assert first == "| plain | | 1.50 ± 0.50 | 0.00 ± 0.00 |"
    assert second == "| best-of-n | 4 | 3.25 ± 0.25 | ≤ 0.60 ± 0.00 |"
    each = table(rows, ("reward",), each_seed=True).split("\n")
    assert each[0].split()[-4:] == ["|", "each", "seed", "|"]
    assert " ".join(each[3].split()).endswith("| 3.25 ± 0.25 | 3.00 3.50 |")
    assert len({len(line) for line in each}) == 1  # in columns, for a terminal


def test_the_legend_says_what_the_columns_are_and_what_varies():
    rows = [row("plain", [1.0, 2.0], [0.0, 0.0])]
    reward, kl, over = legend(rows, ("reward", "kl", "gap"), seeds=2).split("\n")
    assert reward.startswith("- reward: ")
    assert "in nats (base e) per text" in kl
    assert over.startswith("± is the standard error over 2 seeds")
    assert "±" not in legend(rows, ("reward", "kl"), seeds=1)
    *_, over = legend(rows, ("reward",), seeds=2, worlds=2).split("\n")
    assert over.startswith("± is the standard error over 2 worlds: reference, pairs, reward models and texts")
    assert over.endswith("the prompts stay the same.")
    *_, over = legend(rows, ("reward",), seeds=4, worlds=2).split("\n")
    assert over.startswith("± is the standard error over 2 worlds")
    assert over.endswith("4 seeds of reward models and texts share them.")


@pytest.mark.parametrize("name", GRIDS)
def test_every_column_is_explained(name):
    assert set(MODULES[name].COLUMNS) <= report.MEASURES.keys()


def test_the_figure_of_the_frontier_leaves_out_greedy_methods_and_names_what_lies_beyond(world):
    _, (axes,) = plots.panels(1)
    rows = [
        row("plain", [1.0, 2.0], [0.0, 0.0]),
        row("pargs-greedy", [3.0, 3.5], [20.0, 20.0], beta=2.0),
        row("best-of-n", [3.0, 3.5], [8.0, 8.0], n=64),
    ]
    report.reward_against_kl(axes, rows, [world])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["RLHF (the most at each KL)", "plain", "best-of-n (KL is a bound)"]
    assert axes.get_title("right") == "beyond the right edge: best-of-n n=64 at 8 nats"


def test_the_share_of_rlhfs_gain_is_of_the_same_world_at_the_same_kl(world, monkeypatch):
    points = [FrontierPoint(beta, reward, kl, 1e4) for beta, reward, kl in ((0, -1.0, 0.0), (1, 1.0, 2.0))]
    monkeypatch.setattr(report, "optimum", lambda lab: points)
    found = report.with_rlhf(world, Cell(0, "pargs", beta=1.0), {"reward": -0.5, "kl": 1.0})
    assert (found["rlhf"], found["share"]) == (0.0, 0.5)
    assert "share" not in report.with_rlhf(world, Cell(0, "plain"), {"reward": -1.0, "kl": 0.001})
    assert "rlhf" not in report.with_rlhf(world, Cell(0, "pargs", beta=9.0), {"reward": 1.0, "kl": 2.1})
    assert "rlhf" not in report.with_rlhf(world, Cell(0, "pargs-greedy", beta=1.0), {"reward": 0.5, "kl": 1.0})


def test_the_frontier_of_several_worlds_is_their_mean(world, monkeypatch):
    tops = {world: 1.0, replace(world, samples=3): 3.0}
    monkeypatch.setattr(report, "optimum", lambda lab: [FrontierPoint(b, b * tops[lab], b, 1e4) for b in (0.0, 1.0)])
    _, (axes,) = plots.panels(1)
    report.reward_against_kl(axes, [row("plain", [0.0, 1.0], [0.0, 0.0])], list(tops))
    (line,) = (line for line in axes.get_lines() if line.get_label().startswith("RLHF"))
    assert line.get_xydata().tolist() == [[0, 0], [1, 2]]


def test_a_study_of_a_model_of_ones_own(world, tmp_path, capsys):
    """The world's files as if they were anybody's: held-out pairs are split off, win rates come from rollouts."""
    given = ["--model", world.model, "--dataset", world.pairs, "--prompts", world.prompts]
    given += ["--judge", "pargs_min.world.attributes:style", "--max-new-tokens", "16", "--samples", "2", "--seeds", "1"]
    given += ["--pairs-per-step", "32", "--epochs", "0.3", "--learning-rate", "1e-3", "--output-dir", str(tmp_path)]
    assert main(["study", "data-size", *given]) == 0
    rows = json.loads((tmp_path / "data-size.json").read_text())["rows"]
    assert all(0 <= r["concordance"]["mean"] <= 1 for r in rows)
    assert rows[0]["ceiling"]["mean"] < 1
    assert "saved data-size.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no study 'nonsense'; there are data-size"),
        (["beta", "--model", "x"], "needs --dataset, --prompts, --judge, too"),
        (["beta", "--seeds", "0"], "must be at least 1, got 0"),
        (["beta", "--seed", "-1"], "seed (--seed) must be at least 0, got -1"),
        (["beta", "--samples", "4"], "--samples is for a study of your own model: add --model"),
        (["cost", "--methods", "pargs"], "this study has no 'pargs'; it has none"),
        (
            ["real", "--worlds", "2", "--model", "m", "--dataset", "d", "--prompts", "p", "--judge", "j"],
            "all seeds share your own model",
        ),
    ],
)
def test_what_cannot_be_studied_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_gap_of_policies_is_part_of_the_study_of_guides(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(studies, "run", lambda name, *_, **__: asked.append(name) or "")
    assert main(["study", "policy-gap", "--output-dir", str(tmp_path)]) == 0
    assert asked == ["guides"]
    assert "saved guides.md" in capsys.readouterr().out


def test_the_share_of_the_cap_is_of_the_same_world_and_beta():
    def beside(method, shares, beta):
        found = row(method, [1.0, 2.0], [1.0, 1.0], beta=beta, recipe=FULL).found | {"share": interval(shares)}
        return Row(Cell(0, method, beta=beta, recipe=FULL), found)

    rows = [beside(CAP, [0.8, 0.5], 2.0), beside("args", [0.4, 0.4], 2.0), beside("args", [0.4, 0.4], 3.0)]
    _, line = MODULES["guides"].conclude(rows).split("\n")  # no cap is known at beta 3
    assert line == "- args beta=2: 0.40, 0.65 of the cap, sd 0.71"


def test_every_world_of_a_study_is_its_own(tmp_path):
    first, second = (numbered(tmp_path, True, seed) for seed in (0, 1))
    weights = [Path(lab.model, "model.safetensors").read_bytes() for lab in (first, second)]
    pairs = [Path(lab.pairs).read_text() for lab in (first, second)]
    assert weights[0] != weights[1]
    assert pairs[0] != pairs[1]
    assert (first.folder, second.folder) == (f"{tmp_path}/world-0", f"{tmp_path}/world-1")


def test_seeds_may_share_worlds(tmp_path, capsys):
    """Then the mean of a world's seeds counts once."""
    arguments = ["--seeds", "4", "--worlds", "2", "--methods", "pargs", "--betas", "2", "--output-dir", str(tmp_path)]
    main(["study", "real", "--quick", "--processes", "1", *arguments])
    assert "over 2 worlds" in capsys.readouterr().out
    assert {folder.name for folder in tmp_path.iterdir() if folder.is_dir()} == {"world-0", "world-1"}
    kl = json.loads((tmp_path / "real.json").read_text())["rows"][1]["kl"]
    first, second, third, fourth = kl["seeds"]
    assert len({first, second, third, fourth}) == 4
    assert kl["error"] == pytest.approx(abs(first + third - second - fourth) / 4)


def test_an_attribute_may_be_judged_by_a_reward_model_or_by_the_world(world, tmp_path):
    """Their records hold what such judges read."""
    for judge in (str(make(world, FULL, 0)), "toy"):
        other = relabelled(replace(world, folder=str(tmp_path)), judge.rpartition("/")[2], judge)
        assert read_preferences(other.pairs)


def test_every_question_has_a_study():
    """The list in the help is the first line of each study's file."""
    listed = [line.split(None, 1) for line in studies.__doc__.split("\n") if line.startswith("    ")]
    for name, question in listed:
        assert question.capitalize() == MODULES[name].__doc__.split("\n")[0].capitalize()
    files = {file.stem.replace("_", "-") for file in Path(studies.__file__).parent.glob("*.py")}
    assert set(NAMES) == files - {"--init--"}
