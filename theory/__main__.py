"""`python -m theory`: check every claim, print the table, draw the pictures into `theory/figures/`."""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    failed = pytest.main([str(Path(__file__).parent), "-q", *sys.argv[1:]])
    if failed:
        sys.exit(failed)
    from theory.figures import draw_all

    draw_all()
