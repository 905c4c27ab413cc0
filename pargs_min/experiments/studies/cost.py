"""How does the time of a token grow?"""

from pathlib import Path

from pargs_min.benchmark import report, ways
from pargs_min.experiments.report import write
from pargs_min.experiments.setup import Lab
from pargs_min.models import default_device, load_language_model, load_reward_model


def run(lab: Lab, folder: Path, quick: bool) -> str:
    """The report of `pargs benchmark`, on the lab's model with a new reward head, or on small random models."""
    device = default_device()
    if lab.world:  # whose texts are too short to tell
        models = ways.models_of_shape("tiny", device=device)
    else:
        scalar = load_reward_model(lab.model, head="scalar", device=device)
        models = ways.Models(load_language_model(lab.model, device=device), scalar, ways.with_vocabulary_head(scalar))
    settings = dict(top_k=10, batch_size=1, prompt_length=64, tokens=4 if quick else 8, rounds=2 if quick else 7)
    measured = report.run(models, quick=quick, **settings)
    text = report.markdown(measured)
    write(folder / "cost", text, report.draw(measured), measured)
    return text
