"""`pytest theory/` ends with the table of its claims, in however many processes it ran."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

from theory.ledger import Check, merge

ROOT = Path(__file__).parents[1]


def printed_table(*options: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-q", "theory/test_t13_best_of_n.py", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "the claims and their largest residuals" in run.stdout
    return sorted(re.findall(r"^ {9}\S.*$", run.stdout, re.MULTILINE))


def test_the_table_holds_the_same_from_one_process_and_from_several():
    table = printed_table("-p", "no:xdist")
    assert len(table) == 4
    assert printed_table("-n", "2") == table


def test_merging_adds_worlds_and_keeps_the_worst(monkeypatch):
    monkeypatch.setattr("theory.ledger.CHECKS", checks := {})
    for largest in (1e-15, 3e-15, float("nan"), 2e-15):
        merge([vars(Check("T0", "a check", 1e-12, "identity", worlds=5, largest=largest))])
        if largest == 3e-15:
            assert checks["T0", "a check"] == Check("T0", "a check", 1e-12, "identity", worlds=10, largest=3e-15)
    assert checks["T0", "a check"].worlds == 20
    assert math.isnan(checks["T0", "a check"].largest)
