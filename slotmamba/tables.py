"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Lines of columns two spaces apart, the first and those in `left` aligned left, the others right, under a ruled
    header."""
    lines = [header, *rows]
    assert all(len(line) == len(header) for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if title in (header[0], *left) else cell.rjust(width)
            for title, cell, width in zip(header, cells, widths, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([row(header), rule, *map(row, rows)])
