"""What was checked: each claim's checks, on how many worlds, and the largest residual."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TITLES = {
    "T0": "RLHF closed form",
    "T1": "Full-sequence rewards say nothing about prefixes",
    "T2": "The ratio identity",
    "T3": "The price of tractability",
    "T4": "The optimal tokenwise policy",
    "T5": "Partial Bradley-Terry is identified",
    "T6": "What the partial reward is",
    "T7": "Guidance never loses",
    "T8": "Where the guarantee stops",
    "T9": "Small rewards",
    "T10": "Exactness by reweighting",
    "T11": "On-policy rounds",
    "T12": "DPO",
    "T13": "Best-of-N",
    "T14": "Controlled decoding",
    "T15": "The frontier",
    "T16": "One family",
    "T17": "Guidance without truncation",
    "T18": "The win tilt is exact",
    "T19": "Autoregressive reward models",
    "T20": "Two objectives whose optimum is the RLHF policy",
    "world": "The worlds agree with the rational oracle",
    "code": "The code computes the theory",
    "length": "The same at real length",
}


@dataclass
class Check:
    """One inequality `value <= within`, over all the worlds it was checked on."""

    claim: str
    what: str
    within: float
    kind: str
    worlds: int = 0
    largest: float = field(default=float("-inf"))


CHECKS: dict[tuple[str, str], Check] = {}


def verify(claim: str, what: str, value: float, within: float = 1e-12, kind: str = "identity") -> None:
    """Assert value <= within and remember the largest value seen.

    kind: "exact" (rational arithmetic, within = 0), "identity" (float64 residual), "fit" (stationarity of a Newton
    solution), "bound" (an inequality), "rate" (a loosely bounded error), "example" (one explicit world), "sampled".
    """
    check = CHECKS.setdefault((claim, what), Check(claim, what, within, kind))
    check.worlds += 1
    check.largest = max(check.largest, float(value))
    if not value <= within:
        check.largest = float(value)  # nan included
        raise AssertionError(f"{claim}, {what}: {float(value):.6g}, expected at most {within:.6g}")


def merge(checks: Iterable[Mapping[str, Any]]) -> None:
    """Add the checks of another process, each as `vars(check)`, to those of this one."""
    for check in (Check(**values) for values in checks):
        known = CHECKS.setdefault((check.claim, check.what), Check(check.claim, check.what, check.within, check.kind))
        known.worlds += check.worlds
        known.largest = float(np.maximum(known.largest, check.largest))  # nan included


def table(seconds: Mapping[str, float]) -> str:
    """The checks in the order of the claims, one line per check."""
    lines = [f"{'claim':<7}{'what was checked':<69}{'kind':<10}{'worlds':>6}{'largest':>11}{'allowed':>10}{'s':>7}"]
    order = list(TITLES)
    for claim in order:
        checks = [c for c in CHECKS.values() if c.claim == claim]
        if checks:
            lines.append(f"{claim:<7}{TITLES[claim]:<106}{seconds.get(claim, 0.0):>7.1f}")
        for c in checks:
            lines.append(f"{'':<7}  {c.what:<67}{c.kind:<10}{c.worlds:>6}{c.largest:>11.2g}{c.within:>10.2g}")
    return "\n".join(lines)
