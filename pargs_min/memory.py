"""Out of memory: an error that says what was being done and what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What torch's allocators and libraries say when they do not raise torch.OutOfMemoryError.
SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of some device ran out.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes"))
    True
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


@contextmanager
def enough_memory(doing: str, way_out: str) -> Iterator[None]:
    """Context manager: an out-of-memory error says what was being done, and what to do about it.

    Raises:
        MemoryError: "out of memory while `doing`: `way_out`", from torch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory while {doing}: {way_out}") from error
