"""Which of several weighted choices the n-th item takes: even at every prefix, and computed from n alone."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_UNIT = 2**64  # shares are counted in units of 1 / 2^64: whole numbers, so nothing drifts
_ENDLESS = 2**200  # items, by which a choice of any weight has had its turns or has none left
RAMP_PIECES = 100  # a weight that changes linearly does so in so many steps


@dataclass(frozen=True)
class WeightChange:
    """From row `row` on the weight of a source is `weight`; with `linear` it goes there in a straight line from the
    change before, or from row 0."""

    row: int
    weight: float
    linear: bool = False


@dataclass(frozen=True)
class Piece:
    """From item `first` on the choices have these weights: at least 0, not all 0."""

    first: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Split:
    """An inner node: of the items that reach it some go left, spread as evenly as whole items can be.

    Where the shares change, so does the slope of the line that the count of the left follows. `knots[k]` is the number
    of items, in units, from which on line k holds; at m items it has (offset + m * slope) / scale, rounded down.
    """

    knots: tuple[int, ...]
    lines: tuple[tuple[int, int, int], ...]
    left: _Split | int
    right: _Split | int

    def left_of_first(self, count: int) -> int:
        """How many of the first `count` items go left."""
        offset, slope, scale = self.lines[bisect_right(self.knots, count * _UNIT) - 1]
        return (offset + count * slope) // scale


class Schedule:
    """An endless low-discrepancy sequence over weighted choices, whose weights may change at given items.

    The choices are the leaves of a balanced binary tree. Each inner node rounds the number of items that its left side
    is due, at every prefix, to the nearest, so a node adds at most half an item of error, and after any number of items
    a choice is within ceil(log2(choices)) / 2 of what its weights make its due, however often they changed. The
    arithmetic is exact: no drift, however long the run.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        assert pieces and pieces[0].first == 0
        self.pieces = tuple(pieces)
        self.choices = len(pieces[0].weights)
        lengths = [later.first - piece.first for piece, later in itertools.pairwise(pieces)]
        assert all(length > 0 for length in lengths)
        self._root = _build(0, list(zip(*(_shares(piece.weights) for piece in pieces), strict=True)), lengths)

    @classmethod
    def constant(cls, weights: Sequence[float]) -> Schedule:
        """A schedule whose weights, all above 0, never change."""
        return cls([Piece(0, tuple(weights))])

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

    def counts(self, items: int) -> list[int]:
        """How many of the first `items` items each choice took."""
        counts = [0] * self.choices

        def descend(node: _Split | int, reached: int) -> None:
            if isinstance(node, _Split):
                left = node.left_of_first(reached)
                descend(node.left, left)
                descend(node.right, reached - left)
            else:
                counts[node] = reached

        descend(self._root, items)
        return counts

    def position(self, choice: int, turn: int) -> int | None:
        """The item at which `choice` has its turn number `turn` >= 0, None when it never comes."""
        if self.counts(_ENDLESS)[choice] <= turn:
            return None
        past = 1
        while self.counts(past)[choice] <= turn:
            past *= 2
        before = past // 2 if past > 1 else 0
        while past - before > 1:  # the turn is among the first `past` items, not among the first `before`
            middle = (before + past) // 2
            if self.counts(middle)[choice] <= turn:
                before = middle
            else:
                past = middle
        return past - 1


def _shares(weights: Sequence[float]) -> list[int]:
    """Shares in units, at least one where the weight is not 0; they add up to `_UNIT`."""
    assert all(weight >= 0 for weight in weights) and any(weights)
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    shares = [max(1, int(each * _UNIT / total)) if each else 0 for each in exact]
    shares[shares.index(max(shares))] += _UNIT - sum(shares)
    return shares


def _build(first: int, shares: list[tuple[int, ...]], lengths: list[int]) -> _Split | int:
    """The tree over the choices from `first` on; `shares` holds, for each of them, those of all pieces."""
    if len(shares) == 1:
        return first
    middle = len(shares) // 2
    both, left = ([sum(piece) for piece in zip(*some, strict=True)] for some in (shares, shares[:middle]))
    knots: list[int] = []
    lines: list[tuple[int, int, int]] = []
    due = due_left = 0  # units, at the start of the piece
    for share, left_share, length in zip(both, left, [*lengths, 0], strict=True):
        if share:
            # due_left + (m * UNIT - due) * left_share / share units, in items, plus 1/2
            offset = 2 * (due_left * share - due * left_share) + _UNIT * share
            knots.append(due)
            lines.append((offset, 2 * _UNIT * left_share, 2 * _UNIT * share))
        due += share * length
        due_left += left_share * length
    if not knots:  # neither side is ever due anything
        knots, lines = [0], [(0, 0, 1)]
    return _Split(
        tuple(knots),
        tuple(lines),
        _build(first, shares[:middle], lengths),
        _build(first + middle, shares[middle:], lengths),
    )


def mixture(weights: Sequence[float], changes: Sequence[Sequence[WeightChange]]) -> list[Piece]:
    """The pieces in which all weights are constant, for choices that start with `weights` and then change.

    A linear change is a staircase of up to `RAMP_PIECES` equal steps through the middle of the line, so that what a
    choice is due at either end is as on the line. At some piece all weights may be 0: the caller looks.

    Args:
        weights: at row 0.
        changes: of each choice, at rising rows.
    """
    bounds = {0}
    for some in changes:
        start = 0
        for change in some:
            bounds.add(change.row)
            if change.linear:
                span = change.row - start
                bounds |= {start + span * step // RAMP_PIECES for step in range(RAMP_PIECES)}
            start = change.row
    firsts = sorted(bounds)
    pieces = []
    for first, past in zip(firsts, [*firsts[1:], None], strict=True):
        now = (_weight(weight, some, first, past) for weight, some in zip(weights, changes, strict=True))
        pieces.append(Piece(first, tuple(now)))
    return _merged(pieces)


def _weight(weight: float, changes: Sequence[WeightChange], first: int, past: int | None) -> float:
    """The weight of a choice in rows `first` to `past - 1`, between which it has no bound."""
    start = 0
    for change in changes:
        if first < change.row:
            if not change.linear:
                return weight
            assert past is not None
            way = ((first + past) / 2 - start) / (change.row - start)
            return weight + (change.weight - weight) * way
        start, weight = change.row, change.weight
    return weight


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Without pieces that only repeat the weights before them."""
    return [piece for number, piece in enumerate(pieces) if not number or piece.weights != pieces[number - 1].weights]


@dataclass(frozen=True)
class Era:
    """From row `first` on the weights are those of `pieces`, whose rows count from the beginning of the plan."""

    first: int
    pieces: tuple[Piece, ...]


class Turns:
    """The turns of a plan's sources: one schedule, or several where the weights were changed while a run went on.

    A schedule looks at what is due next, so its past would change with its future. At such a change a new one starts,
    and what a source had before is counted. Each adds its own half items of error, no more.
    """

    def __init__(self, eras: Sequence[Era]) -> None:
        assert eras and eras[0].first == 0
        self.eras = tuple(eras)
        self._firsts = [era.first for era in eras]
        self._schedules = [Schedule(_from(era.first, era.pieces)) for era in eras]
        self._before = [[0] * self._schedules[0].choices]  # of each source, at the start of each era
        for schedule, (era, later) in zip(self._schedules, itertools.pairwise(eras), strict=False):
            self._before.append(_added(self._before[-1], schedule.counts(later.first - era.first)))

    def followed_by(self, pieces: Sequence[Piece], row: int) -> Turns:
        """The same turns before `row`, and those of `pieces` from there on, if they are others."""
        if self.eras[-1].pieces == tuple(pieces):
            return self
        kept = [era for era in self.eras if era.first < row]
        return Turns([*kept, Era(row, tuple(pieces))])

    def locate(self, row: int) -> tuple[int, int]:
        """The source of row `row` >= 0, and how many rows it had before."""
        era = bisect_right(self._firsts, row) - 1
        source, turn = self._schedules[era].locate(row - self._firsts[era])
        return source, self._before[era][source] + turn

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has."""
        era = bisect_right(self._firsts, rows) - 1
        return _added(self._before[era], self._schedules[era].counts(rows - self._firsts[era]))

    def position(self, source: int, turn: int) -> int | None:
        """The row at which `source` has its turn number `turn` >= 0, None when it never comes."""
        for era, first in enumerate(self._firsts):
            if era + 1 == len(self._firsts) or self._before[era + 1][source] > turn:
                row = self._schedules[era].position(source, turn - self._before[era][source])
                return None if row is None else first + row
        raise AssertionError


def _from(row: int, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces from `row` on, which counts as item 0."""
    current = [piece for piece in pieces if piece.first <= row][-1]
    return [Piece(0, current.weights), *(Piece(each.first - row, each.weights) for each in pieces if each.first > row)]


def _added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(left, right, strict=True)]
