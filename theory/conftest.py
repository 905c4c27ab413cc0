"""The table of claims, printed when the checks end."""

from __future__ import annotations

import os
import re
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the models here are tiny
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks a model hub

import pytest

from theory.ledger import CHECKS, merge, table


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands what it checked to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["checks"] = [vars(check) for check in CHECKS.values()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Such a process has ended; one that crashed has handed over nothing."""
    merge(getattr(node, "workeroutput", {}).get("checks", []))


def pytest_terminal_summary(terminalreporter) -> None:
    if not CHECKS:
        return
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if match := re.search(r"theory/test_(t\d\d|[a-z]+)", getattr(report, "nodeid", "")):
                name = match[1]
                seconds[f"T{int(name[1:])}" if name[1:].isdigit() else name] += getattr(report, "duration", 0.0)
    terminalreporter.section("the claims and their largest residuals")
    terminalreporter.write_line(table(seconds))
