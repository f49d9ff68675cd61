"""Weights that change: every source gets what is due to it at every prefix, and the positions can be found."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotmamba_data.schedule import Era, Piece, Schedule, Turns, WeightChange, mixture

Weights = st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(1e-3, 10))


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    choices = draw(st.integers(1, 8))
    weights = st.tuples(*[Weights] * choices).filter(any)
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 400), max_size=5)))]
    return [Piece(first, draw(weights)) for first in firsts]


@given(pieces=pieces())
def test_every_choice_gets_its_due_at_every_prefix(pieces: list[Piece]) -> None:
    schedule = Schedule(pieces)
    choices = schedule.choices
    bound = math.ceil(math.log2(choices)) / 2 + 1e-6
    seen, due = [0] * choices, [0.0] * choices
    for item in range(500):
        weights = [piece.weights for piece in pieces if piece.first <= item][-1]
        choice, turn = schedule.locate(item)
        assert turn == seen[choice]
        seen[choice] += 1
        for other, weight in enumerate(weights):
            due[other] += weight / sum(weights)
            assert abs(seen[other] - due[other]) <= bound
        if item % 50 == 0:
            assert schedule.counts(item + 1) == seen
            assert schedule.position(choice, turn) == item


def test_a_source_that_stays_without_weight_has_a_last_turn() -> None:
    schedule = Schedule([Piece(0, (1.0, 1.0)), Piece(10, (0.0, 1.0))])
    assert schedule.counts(10_000) == [5, 9995]
    assert schedule.position(0, 4) in (8, 9) and schedule.position(0, 5) is None
    assert schedule.position(1, 10**12) == 10**12 + 5


def test_shares_after_ten_thousand_rows_are_within_a_tenth_of_a_percent() -> None:
    weights = [0.37, 0.21, 0.13, 0.11, 0.07, 0.05, 0.04, 0.02]
    schedule = Schedule.constant(weights)
    for count, weight in zip(schedule.counts(10_000), weights, strict=True):
        assert abs(count / 10_000 - weight) < 0.001
    far = 10**13
    for before, after, weight in zip(schedule.counts(far), schedule.counts(far + 10_000), weights, strict=True):
        assert abs((after - before) / 10_000 - weight) < 0.001


def test_linear_changes_are_due_what_the_line_is() -> None:
    changes = [[WeightChange(1000, 3.0, linear=True), WeightChange(2000, 0.5)], []]
    schedule = Schedule(mixture([1.0, 4.0], changes))
    # of the weights 1 to 3 beside 4 the share w / (w + 4), whose integral over the line is 1 - 2 log(7 / 5)
    assert schedule.counts(1000)[0] == pytest.approx(1000 * (1 - 2 * math.log(7 / 5)), abs=1)
    steady = schedule.counts(2000)[0] - schedule.counts(1000)[0]
    assert steady == pytest.approx(1000 * 3 / 7, abs=1)
    assert schedule.counts(3000)[0] - schedule.counts(2000)[0] == pytest.approx(1000 * 0.5 / 4.5, abs=1)
    starts = [schedule.counts(row)[0] for row in (0, 250, 500, 750, 1000)]
    gains = [later - before for before, later in itertools.pairwise(starts)]
    assert gains == sorted(gains) and gains[0] < gains[-1]


def test_short_ramps_have_a_step_a_row() -> None:
    assert [piece.first for piece in mixture([0.0, 1.0], [[WeightChange(4, 1.0, linear=True)], []])] == [0, 1, 2, 3, 4]


@given(past=pieces(), row=st.integers(0, 500), data=st.data())
def test_changed_turns_keep_the_past(past: list[Piece], row: int, data: st.DataObject) -> None:
    weights = st.tuples(*[Weights] * len(past[0].weights)).filter(any)
    future = [Piece(0, data.draw(weights)), Piece(450, data.draw(weights))]
    before = Turns([Era(0, tuple(past))])
    after = before.followed_by(future, row)
    rows = [after.locate(number) for number in range(700)]
    assert rows[:row] == [before.locate(number) for number in range(row)]
    assert after.followed_by(future, row + 60) is after
    seen = [0] * len(past[0].weights)
    for number, (source, turn) in enumerate(rows):
        assert turn == seen[source]
        seen[source] += 1
        if number % 50 == 0:
            assert after.counts(number + 1) == seen and after.position(source, turn) == number
    alone = Schedule([Piece(0, future[1].weights)]).counts(250)
    late = after.counts(max(row, 450) + 250)
    gained = [count - earlier for count, earlier in zip(late, after.counts(max(row, 450)), strict=True)]
    assert all(abs(one - other) <= 4 for one, other in zip(gained, alone, strict=True))
