"""Rows of documents: cut, fitted whole, side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotmamba_data.layouts import Concatenated, Layout, best_fit, best_fitted, side_by_side

Lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40), st.just(3000)), max_size=60)


def laid_out(kind: str, counts: np.ndarray, order: np.ndarray, seq_len: int) -> Layout:
    if kind == "concat":
        return Concatenated(counts, order, seq_len)
    return best_fitted(counts, order, seq_len)


@given(lengths=Lengths, seq_len=st.integers(1, 50), kind=st.sampled_from(["concat", "best_fit"]), data=st.data())
def test_every_token_is_in_exactly_one_row(lengths: list[int], seq_len: int, kind: str, data: st.DataObject) -> None:
    counts = np.asarray(lengths, dtype=np.int64)
    order = np.asarray(data.draw(st.permutations(range(len(lengths)))), dtype=np.int64)
    layout = laid_out(kind, counts, order, seq_len)
    seen: list[list[int]] = [[] for _ in lengths]
    rows_of: list[set[int]] = [set() for _ in lengths]
    places: list[list[tuple[int, int, int]]] = [[] for _ in lengths]
    padding = 0
    for row in range(layout.rows):
        used = 0
        for document, start, stop in layout.parts(row):
            assert start < stop
            seen[document] += range(start, stop)
            rows_of[document].add(row)
            places[document].append((row, start, stop))
            used += stop - start
        assert 0 < used <= seq_len
        padding += seq_len - used
    assert [sorted(tokens) for tokens in seen] == [list(range(length)) for length in lengths]
    assert [sorted(layout.places(document)) for document in range(len(lengths))] == places
    assert layout.cut() == sum(len(rows) > 1 for rows in rows_of)
    assert layout.rows == laid_out(kind, counts, np.sort(order), seq_len).rows
    if kind == "concat":
        assert padding < seq_len
    else:
        assert all(len(rows) == -(-length // seq_len) for rows, length in zip(rows_of, lengths, strict=True))


def reference_best_fit(sizes: list[int], room: int) -> list[int]:
    """Free room of each bin, by the definition."""
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [(free, number) for number, free in enumerate(left) if free >= size]
        if fitting:
            left[min(fitting)[1]] -= size
        else:
            left.append(room - size)
    return sorted(left)


@given(sizes=st.lists(st.integers(1, 40), max_size=80), room=st.integers(40, 60))
def test_best_fit_is_best_fit_decreasing(sizes: list[int], room: int) -> None:
    bins = best_fit(np.asarray(sizes, dtype=np.int64), room)
    loads = np.bincount(bins, weights=sizes) if sizes else np.empty(0)
    assert sorted(room - loads) == reference_best_fit(sizes, room)


def test_fitting_wastes_little_and_cuts_only_what_is_too_long() -> None:
    rng = np.random.default_rng(0)
    counts = np.maximum(1, rng.lognormal(5, 1.2, 20_000)).astype(np.int64)
    order = rng.permutation(len(counts))
    fitted, cut = best_fitted(counts, order, 1024), Concatenated(counts, order, 1024)
    assert fitted.cut() == np.count_nonzero(counts > 1024) < cut.cut() / 2
    assert cut.rows <= fitted.rows <= cut.rows * 1.001


@pytest.mark.parametrize(("one_a_row", "rows"), [(False, 2 + 3 + 1), (True, 5 + 5 + 1)])
def test_samples_of_one_length_share_rows(one_a_row: bool, rows: int) -> None:
    counts = np.asarray([3, 5, 3, 5, 3, 0, 5, 3, 5, 3, 5, 9])
    layout = side_by_side(counts, np.random.default_rng(0).permutation(len(counts)), 10, one_a_row)
    assert layout.rows == rows
    parts = [layout.parts(row) for row in range(rows)]
    assert sorted(document for row in parts for document, _, _ in row) == [*range(5), *range(6, 12)]
    for row in parts:
        assert len({stop for _, _, stop in row}) == 1 and all(start == 0 for _, start, _ in row)
        assert sum(stop for _, _, stop in row) <= 10 and (len(row) == 1 or not one_a_row)
