"""A curve in the terminal, of Braille characters, each of which is 2 x 4 dots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

WIDTH, HEIGHT = 64, 8  # characters
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row, then column, as Unicode numbers them
_EMPTY = 0x2800

Point = tuple[float, float]


def plot(title: str, points: Sequence[Point], braille: bool) -> str:
    """Lines of text: a title, a box with the curve, its least and greatest values at its sides.

    Args:
        points: (x, y) with x ascending; those whose y is not finite leave a gap.
        braille: whether the terminal has these characters; otherwise stars.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return f"{title}\n  no finite values"
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    cells = _cells(points, low, high)
    rows = ["".join(_character(cell, braille) for cell in row).rstrip() for row in cells]
    labels = [_value(high), *[""] * (HEIGHT - 2), _value(low)]
    width = max(map(len, labels))
    first, last = f"{finite[0][0]:g}", f"{finite[-1][0]:g}"
    body = [f"  {label:>{width}} |{row}" for label, row in zip(labels, rows, strict=True)]
    return "\n".join(
        [title, *body, f"  {'':{width}} +{'-' * WIDTH}", f"  {'':{width}}  {first:<{WIDTH - len(last)}}{last}"]
    )


def _cells(points: Sequence[Point], low: float, high: float) -> list[list[int]]:
    """The dots of each character, as bits."""
    cells = [[0] * WIDTH for _ in range(HEIGHT)]
    finite = [x for x, y in points if math.isfinite(y)]
    before: tuple[int, int] | None = None
    for x, y in points:
        if not math.isfinite(y):
            before = None
            continue
        dot = _place(x, finite[0], finite[-1], 2 * WIDTH), 4 * HEIGHT - 1 - _place(y, low, high, 4 * HEIGHT)
        for column, row in _line(before or dot, dot):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        before = dot
    return cells


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Column and row of a dot in each column after `start` up to `end`, and of `end`."""
    for column in range(start[0] + 1, end[0]):
        yield column, round(start[1] + (end[1] - start[1]) * (column - start[0]) / (end[0] - start[0]))
    yield end


def _place(value: float, low: float, high: float, count: int) -> int:
    """Which of `count` dots from `low` to `high` is nearest; the middle where both are the same."""
    return round((value - low) / (high - low) * (count - 1)) if high > low else (count - 1) // 2


def _character(dots: int, braille: bool) -> str:
    if not dots:
        return " "
    return chr(_EMPTY + dots) if braille else "*"


def _value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
