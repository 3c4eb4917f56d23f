"""Plain-text tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns aligned to the right, the first `left` ones to the left, under a ruled header.

    Examples
    --------
    >>> print(text_table(["channel", "share"], [["0", "1.5%"], ["1", "98.5%"]]))
    channel  share
    -------  -----
    0         1.5%
    1        98.5%
    """
    table = [list(headers), ["-" * len(h) for h in headers], *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    table[1] = ["-" * width for width in widths]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
