"""Shared by all tests: one thread, no network, and the folder of real material where one is given."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a model hub fails at once

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def real(request: pytest.FixtureRequest) -> Path:
    """The folder given as --real=DIR: a small pretrained model and real preference pairs."""
    folder = request.config.getoption("--real")
    if folder is None:
        pytest.skip("needs --real=DIR")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute comes first, so that no process of pytest-xdist waits for another's last test."""
    long = ("test_tutorials.py", "test_real.py", "test_kill.py")
    items.sort(key=lambda item: item.path.name not in long)
