"""The table of claims, printed when the checks end."""

import os
import re
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the models here are tiny
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks a model hub

from theory.ledger import CHECKS, table


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
