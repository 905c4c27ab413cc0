"""The demonstration: a miniature of it end to end."""

from concurrent.futures import ThreadPoolExecutor

from pargs_min.experiments import demo
from pargs_min.experiments import measure as lab
from pargs_min.experiments import studies as study
from pargs_min.experiments.demo import run


def test_the_whole_job_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "workers", lambda processes: ThreadPoolExecutor(1))
    monkeypatch.setattr(study, "BETAS", (0.5, 2.0))
    monkeypatch.setattr(demo, "MODELS", 1)
    monkeypatch.setattr(demo, "small", lambda folder, seed: lab.embedded(folder, quick=True, seed=seed))
    said = []
    run(tmp_path, quick=True, say=said.append)
    assert said[0].startswith("reference: ")
    texts = {words.split("\n")[1]: words.split("\n")[2:] for words in said[1:-1]}
    assert {"plain", "args beta=2", "pargs beta=2", "pargs-greedy beta=2", "best-of-n n=16"} <= texts.keys()
    assert all(len(some) == 3 for some in texts.values())
    assert ["|", "pargs", "|", "2"] in [line.split()[:4] for line in said[-1].splitlines()]
    assert "PARGS less plain" in said[-1]
    for picture in ("partial-vs-full.png", "prefix_accuracy.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    trained = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")}
    assert len(trained) == 4  # the reference and a reward model of each kind
    again = []
    run(tmp_path, quick=True, say=again.append)  # reuses what it trained, and says the same
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")} == trained
    assert again == said
