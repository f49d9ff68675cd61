"""Which of several weighted choices the n-th item takes: even at every prefix, and computed from n alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Split:
    """An inner node: of the items that reach it, `share` go left, spread as evenly as whole items can be."""

    share: Fraction
    left: _Split | int
    right: _Split | int

    def left_of_first(self, count: int) -> int:
        """How many of the first `count` items go left: count * share, rounded to the nearest."""
        numerator, denominator = self.share.as_integer_ratio()
        return (2 * count * numerator + denominator) // (2 * denominator)


class Schedule:
    """An endless low-discrepancy sequence over weighted choices.

    The choices are the leaves of a balanced binary tree. Each inner node rounds its left share to the nearest whole
    item at every prefix, so a node adds at most half an item of error, and after any number of items a choice is within
    ceil(log2(choices)) / 2 of its weight. The arithmetic is exact (fractions): no drift, however long the run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        assert len(weights) and all(weight > 0 for weight in weights)
        self._root = _build(0, [Fraction(weight) for weight in weights])

    def locate(self, item: int) -> tuple[int, int]:
        """The choice that item number `item` >= 0 takes, and how many items before it took the same choice."""
        node = self._root
        while isinstance(node, _Split):
            before = node.left_of_first(item)
            if node.left_of_first(item + 1) > before:
                node, item = node.left, before
            else:
                node, item = node.right, item - before
        return node, item


def _build(first: int, weights: list[Fraction]) -> _Split | int:
    if len(weights) == 1:
        return first
    middle = len(weights) // 2
    left, right = weights[:middle], weights[middle:]
    return _Split(Fraction(sum(left)) / sum(weights), _build(first, left), _build(first + middle, right))
