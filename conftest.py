"""Options of the whole suite (pytest reads them only from the root)."""

import gc
import os

from hypothesis import settings

# Deadlines measure the machine, not the code; CI must not fail on a draw that nobody can repeat.
settings.register_profile("pargs", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("pargs")


def pytest_addoption(parser):
    parser.addoption("--real", metavar="DIR", help="folder with a small pretrained model and real preference pairs")


def pytest_collection_finish():
    """Collecting garbage, as transformers does after each training, need not look through all that was imported."""
    gc.freeze()
