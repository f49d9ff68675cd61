"""Which rows of the data the steps of a run take, when the global batch may be changed wherever the run resumes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self


class BatchSize(NamedTuple):
    """From step `step` on, which begins with row `row`, a step takes `rows` rows."""

    step: int
    row: int
    rows: int


@dataclass(frozen=True)
class StepRows:
    """The sizes of a run's batches, in their order; the first is of step 0 and row 0."""

    sizes: tuple[BatchSize, ...]

    @classmethod
    def constant(cls, rows: int) -> Self:
        return cls((BatchSize(0, 0, rows),))

    @classmethod
    def of(cls, state: Sequence[Sequence[int]]) -> Self:
        return cls(tuple(BatchSize(*size) for size in state))

    def resumed(self, step: int, row: int, rows: int) -> Self:
        """The same up to a step, which begins with this row, and from there on steps of so many rows."""
        return self if self.sizes[-1].rows == rows else type(self)((*self.sizes, BatchSize(step, row, rows)))

    def first_row(self, step: int) -> int:
        size = self.sizes[bisect_right(self.sizes, step, key=lambda size: size.step) - 1]
        return size.row + (step - size.step) * size.rows

    def steps_within(self, rows: int) -> int:
        """How many steps are done when so many rows are there, and the next would need more."""
        size = self.sizes[bisect_right(self.sizes, rows, key=lambda size: size.row) - 1]
        return size.step + (rows - size.row) // size.rows
