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


def test_words_in_a_later_column() -> None:
    text = table(("run", "step", "why"), [("a", "7", "killed"), ("b", "12", "lost a node")], left=("why",))
    assert text.splitlines()[2:] == ["a       7  killed", "b      12  lost a node"]
