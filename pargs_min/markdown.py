"""Tables in Markdown, which read as tables in a terminal, too."""

import re
from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """A table with padded columns.

    Args:
        align: "l" or "r" for each column; by default the first is set left, the others right.

    >>> print(markdown_table(["way", "ms"], [["floor", "1.5"], ["our loop", "12"]]))
    | way      |   ms |
    | -------- | ---: |
    | floor    |  1.5 |
    | our loop |   12 |
    """
    head, *rows = ([one_line(cell) for cell in line] for line in (head, *rows))
    sides = align or "l" + "r" * (len(head) - 1)
    widths = [
        max(3, *map(len, column)) + (side == "r")
        for side, column in zip(sides, zip(head, *rows, strict=True), strict=True)
    ]
    rule = ["-" * (width - 1) + ("-" if side == "l" else ":") for width, side in zip(widths, sides, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(cells, widths, sides, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), line(rule), *map(line, rows)])


def one_line(text: str) -> str:
    r"""The text as a cell of a table or an item of a list, which it neither ends nor divides.

    >>> print(one_line("a|b\r\nc\\"))
    a\|b  c\\
    """
    return re.sub(r"\s", " ", re.sub(r"([\\|])", r"\\\1", text))
