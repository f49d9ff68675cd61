"""The rows of steps when the size of the batch changes."""

from __future__ import annotations

from slotmamba.step_rows import StepRows


def test_steps_of_one_size() -> None:
    steps = StepRows.constant(4)
    assert [steps.first_row(step) for step in (0, 1, 7)] == [0, 4, 28]
    assert [steps.steps_within(rows) for rows in (0, 3, 4, 28, 31)] == [0, 0, 1, 7, 7]


def test_later_sizes_leave_earlier_steps_where_they_were() -> None:
    steps = StepRows.constant(4).resumed(5, 20, 8).resumed(7, 36, 2)
    assert [steps.first_row(step) for step in range(10)] == [0, 4, 8, 12, 16, 20, 28, 36, 38, 40]
    assert [steps.steps_within(rows) for rows in (19, 20, 27, 28, 35, 36, 37, 40)] == [4, 5, 5, 6, 6, 7, 7, 9]


def test_resuming_with_the_same_size_changes_nothing() -> None:
    steps = StepRows.constant(4).resumed(5, 20, 8)
    assert steps.resumed(6, 28, 8) == steps
    assert StepRows.of([list(size) for size in steps.sizes]) == steps
