from __future__ import annotations

from slotmamba.tables import table


def test_columns_are_aligned() -> None:
    text = table(("part", "parameters"), [("embedding", "1,024"), ("a", "7")])
    assert text.splitlines() == [
        "part       parameters",
        "---------  ----------",
        "embedding       1,024",
        "a                   7",
    ]
