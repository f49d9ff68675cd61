from __future__ import annotations

import math

from slotmamba.runs.terminal_plot import HEIGHT, WIDTH, plot


def body(text: str) -> list[str]:
    """Inside the box."""
    return [line.partition("|")[2] for line in text.splitlines()[1 : HEIGHT + 1]]


def test_a_falling_line() -> None:
    text = plot("loss", [(x, 100.0 - x) for x in range(101)], braille=False)
    rows = body(text)
    assert text.splitlines()[0] == "loss"
    assert rows[0].startswith("*") and rows[-1] == " " * (WIDTH - 8) + "*" * 8
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)
    assert text.splitlines()[1].startswith("  100 |") and text.splitlines()[HEIGHT].startswith("    0 |")
    assert text.splitlines()[-1].split() == ["0", "100"]


def test_dots_of_a_character() -> None:
    corners = body(plot("x", [(0, 0.0), (0.5, math.nan), (1, 1.0)], braille=True))
    assert corners[-1][0] == "\u2840"  # the lowest dot of the left column
    assert corners[0][-1] == "\u2808"  # the highest of the right one


def test_points_are_joined() -> None:
    rows = body(plot("x", [(0, 0.0), (1, 1.0)], braille=False))
    columns = [[row.ljust(WIDTH)[column] for row in rows] for column in range(WIDTH)]
    assert all("*" in column for column in columns)
    assert [row.index("*") for row in rows] == sorted((row.index("*") for row in rows), reverse=True)


def test_values_that_are_not_finite() -> None:
    rows = body(plot("x", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 1.0)], braille=False))
    assert sum(row.count("*") for row in rows) == 2
    assert plot("x", [(1, math.nan)], braille=False) == "x\n  no finite values"


def test_one_value() -> None:
    rows = body(plot("x", [(7, 2.5)], braille=False))
    assert sum(row.count("*") for row in rows) == 1
