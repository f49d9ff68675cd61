"""Random numbers and schedules: the ground the plan stands on."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from slotmamba_data.randomness import derive_key, distinct, permutation, random_bits, uniform
from slotmamba_data.schedule import Schedule


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.7, 0.2, 0.1], [1e-3, 5, 2, 2, 7], [1] * 7, [1e9, 1e-9]])
def test_shares_are_even_at_every_prefix(weights: list[float]) -> None:
    schedule = Schedule.constant(weights)
    bound = math.ceil(math.log2(len(weights))) / 2
    seen: Counter[int] = Counter()
    for item in range(2000):
        choice, turn = schedule.locate(item)
        assert turn == seen[choice]  # the turns of a choice are 0, 1, 2 ... without a gap
        seen[choice] += 1
        for other, weight in enumerate(weights):
            assert abs(seen[other] - (item + 1) * weight / sum(weights)) <= bound + 1e-9


def test_schedule_is_exact_far_out() -> None:
    schedule = Schedule.constant([0.1, 0.2, 0.7])
    far = 10**15
    located = [schedule.locate(item) for item in range(far, far + 3000)]
    for choice, weight in enumerate((0.1, 0.2, 0.7)):
        turns = [turn for which, turn in located if which == choice]
        assert turns == list(range(turns[0], turns[0] + len(turns)))
        assert abs(turns[0] - far * weight) <= 2
        assert abs(len(turns) - 3000 * weight) <= 2


def test_stream_is_splitmix64() -> None:
    # The published outputs of splitmix64.c for the seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(np.uint64(1234567), 5).tolist() == expected
    assert random_bits(np.uint64(1234567), 2, first=3).tolist() == expected[3:]


def test_keys_tell_every_part_apart() -> None:
    several: list[tuple[str | int, ...]] = [("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), (1, "a"), ("", "a", 1)]
    keys = [derive_key(*parts) for parts in several]
    assert len(set(map(int, keys))) == len(keys)
    assert derive_key("a", 1) == derive_key("a", 1)


def test_uniform_is_uniform() -> None:
    numbers = uniform(random_bits(derive_key("test"), 100), 1000).ravel()
    assert numbers.min() > 0 and numbers.max() < 1
    # Kolmogorov-Smirnov: the 1e-6 quantile of D for n = 1e5 is 2.7 / sqrt(n)
    gap = np.abs(np.sort(numbers) - np.arange(len(numbers)) / len(numbers)).max()
    assert gap < 2.7 / math.sqrt(len(numbers))


@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 5), (10, 3), (100, 99), (4080, 256)])
def test_distinct_numbers(size: int, count: int) -> None:
    keys = random_bits(derive_key("distinct", size), 50)
    numbers = distinct(keys, size, count)
    assert numbers.shape == (50, count)
    assert numbers.min() >= 0 and numbers.max() < size
    assert all(len(set(row)) == count for row in numbers.tolist())
    alone = np.concatenate([distinct(keys[i : i + 1], size, count) for i in range(50)])
    np.testing.assert_array_equal(numbers, alone)


def test_distinct_numbers_are_uniform_in_every_place() -> None:
    numbers = distinct(random_bits(derive_key("places"), 60_000), 6, 3)
    counts = np.stack([np.bincount(numbers[:, place], minlength=6) for place in range(3)])
    # each is binomial(60000, 1/6): standard deviation 91; 5 of them
    assert np.abs(counts - 10_000).max() < 460


def test_permutation() -> None:
    orders = np.stack([permutation(derive_key("order", n), 40) for n in range(2000)])
    assert (np.sort(orders, axis=1) == np.arange(40)).all()
    # the mean of 2000 uniform places has standard deviation 11.5 / sqrt(2000) = 0.26; 5 of them
    assert np.abs(orders.mean(axis=0) - 19.5).max() < 1.3
