"""How far long work has come, on stderr: a bar where that is a terminal, elsewhere a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import is_progress_bar_enabled

SECONDS = 10  # between two lines


class _Lines(tqdm):
    """A line of its own for each report, which logs and pipes can hold."""

    def display(self, msg=None, pos=None):
        if self.n != getattr(self, "said", 0):
            self.said = self.n
            self.fp.write((str(self) if msg is None else msg).strip() + "\n")
            self.fp.flush()

    def close(self):
        if not self.disable:
            self.display()
            self._decr_instances(self)
            self.disable = True


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", initial: int = 0
):
    """tqdm's bar over an iterable, or one to `update()`; silent in workers, and wherever transformers' bars are off."""
    off = not is_progress_bar_enabled()
    settings: dict[str, Any] = dict(desc=desc, total=total, unit=unit, initial=initial, disable=off)
    if sys.stderr.isatty():
        return tqdm(iterable, **settings)
    return _Lines(
        iterable, mininterval=SECONDS, maxinterval=SECONDS, file=sys.stderr, ncols=100, ascii=True, **settings
    )
