"""The order of rows: the same whatever the processes, workers, stops and restarts, for any mixture and any corpus."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotmamba_data import (
    MQARSetting,
    MQARSpec,
    Plan,
    PlanReader,
    Reading,
    Row,
    ShardFolder,
    ShardWriter,
    Source,
    WeightChange,
    open_plan,
)
from slotmamba_data.shards import Shard

ROWS = 24  # of a global batch: every number of processes below divides it
WORLDS = (1, 2, 3, 8)
WORKERS = (0, 1, 4)


def content(row: Row) -> tuple[Any, ...]:
    return row.source, row.documents, row.tokens.tobytes(), row.labels.tobytes(), row.doc_start.tobytes()


def corpus(folder: Path, lengths: Sequence[int], shard_bytes: int = 6000, seed: int = 0) -> list[np.ndarray]:
    """Shards of documents of random tokens; returns the documents."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, 1000, length) for length in lengths]
    with ShardWriter(folder, vocab_size=1000, shard_bytes=shard_bytes) as writer:
        for document in documents:
            writer.add(document)
    return documents


def add_empty_shards(folder: Path, places: Sequence[int]) -> None:
    """Put shards without documents among the shards of a folder."""
    manifest = ShardFolder(folder).manifest
    shards = list(manifest.shards)
    for number, place in enumerate(places):
        name = f"{9000 + number:06d}"
        shards.insert(place, Shard(folder / f"shard-{name}.tar", name).finish())
    replace(manifest, shards=tuple(shards)).write(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(1)
    corpus(folder / "many", rng.geometric(0.02, 900).tolist())  # about twenty shards
    corpus(folder / "few", [1, 1, 5000, 3, 700, 1], seed=2)
    assert len(ShardFolder(folder / "many").manifest.shards) > 10
    return {"many": folder / "many", "few": folder / "few"}


def plan_of(folders: dict[str, Path], packing: Any = "concat", weights: tuple[float, float] = (3.0, 1.0)) -> Plan:
    recall = MQARSpec((MQARSetting(16, 2, updates=1), MQARSetting(20, 2, passes=2)), vocab_size=512)
    sources = [
        Source("many", weight=weights[0], shards=folders["many"], changes=(WeightChange(100, 0.5, linear=True),)),
        Source("few", weight=weights[1], shards=folders["few"]),
        Source("recall", "mqar", 1.5, mqar=recall),
    ]
    return open_plan(sources, 40, seed=5, reading=Reading(packing, shuffle_shards=4))


def read_by_processes(plan: Plan, start: int, batches: int, world: int, workers: int) -> dict[int, tuple[Any, ...]]:
    """What the processes of a world read, each with some workers that take its batches in turn, by number of row.

    A worker has a plan of its own, as another process has. Rows that two of them read are an error.
    """
    read: dict[int, tuple[Any, ...]] = {}
    for rank in range(world):
        plans = [pickle.loads(pickle.dumps(plan)) for _ in range(workers)] or [plan]
        for worker, own in enumerate(plans):
            for batch in range(worker, batches, len(plans)):
                first = start + batch * ROWS
                rows = PlanReader(own, first).next_batch(ROWS, rank, world)
                for number, row in enumerate(rows, first + rank * (ROWS // world)):
                    assert number not in read
                    read[number] = content(row)
            if own is not plan:
                own.close()
    return read


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_any_world_and_workers_read_the_plan(folders: dict[str, Path], packing: str) -> None:
    plan = plan_of(folders, packing)
    expected = [content(plan[number]) for number in range(ROWS * 12)]
    for world in WORLDS:
        for workers in WORKERS:
            read = read_by_processes(plan_of(folders, packing), 0, 12, world, workers)
            assert [read[number] for number in range(len(read))] == expected


@pytest.mark.parametrize("seed", range(3))
def test_stops_at_random_points_with_other_worlds_change_nothing(folders: dict[str, Path], seed: int) -> None:
    draw = random.Random(seed)
    plan = plan_of(folders)
    expected = [content(plan[number]) for number in range(ROWS * 30)]
    read: dict[int, tuple[Any, ...]] = {}
    state = PlanReader(plan).state()
    while len(read) < len(expected):
        reader = PlanReader.from_state(plan_of(folders), json.loads(json.dumps(state)))
        batches = min(draw.randint(1, 9), 30 - len(read) // ROWS)
        read |= read_by_processes(
            reader.plan, reader.samples_consumed, batches, draw.choice(WORLDS), draw.choice(WORKERS)
        )
        reader.samples_consumed += batches * ROWS
        state = reader.state()
        reader.plan.close()
    assert [read[number] for number in range(len(expected))] == expected


@pytest.mark.parametrize(("name", "packing"), [("few", "concat"), ("few", "best_fit"), ("many", "best_fit")])
def test_resumed_at_every_row_around_the_ends_of_epochs(folders: dict[str, Path], name: str, packing: Any) -> None:
    def opened() -> Plan:
        return open_plan([Source(name, shards=folders[name])], 40, seed=5, reading=Reading(packing, shuffle_shards=4))

    plan = opened()
    epoch = plan.describe()[0].contents.rows_per_epoch
    assert epoch is not None
    expected = {number: content(plan[number]) for number in range(epoch - 2, 2 * epoch + 20)}
    for start in (*range(epoch - 2, epoch + 3), *range(2 * epoch - 2, 2 * epoch + 3)):
        reader = PlanReader.from_state(opened(), PlanReader(plan, start).state())
        assert [content(row) for row in reader.next_batch(10)] == [expected[start + row] for row in range(10)]


def test_weights_changed_at_a_resume(folders: dict[str, Path]) -> None:
    """Rows before the change stay what they were, no source repeats or skips a row, and the new shares hold."""
    first, second = plan_of(folders), plan_of(folders, weights=(1.0, 6.0))
    reader = PlanReader.from_state(second, json.loads(json.dumps(PlanReader(first, 150).state())))
    changed = reader.plan
    assert [content(changed[number]) for number in range(150)] == [content(first[number]) for number in range(150)]
    turns: Counter[int] = Counter()
    for number in range(2000):
        source, turn = changed.locate(number)
        assert turn == turns[source]
        turns[source] += 1
    gained = [count - before for count, before in zip(changed.turns.counts(2000), first.turns.counts(150), strict=True)]
    assert [count / 1850 for count in gained] == pytest.approx([0.5 / 8, 6 / 8, 1.5 / 8], abs=2 / 1850)
    # resumed again, with the same weights and with others
    again = PlanReader.from_state(plan_of(folders, weights=(1.0, 6.0)), PlanReader(changed, 400).state()).plan
    assert again.turns.eras == changed.turns.eras
    back = PlanReader.from_state(plan_of(folders), json.loads(json.dumps(PlanReader(again, 400).state()))).plan
    assert [back.locate(number) for number in range(400)] == [changed.locate(number) for number in range(400)]
    assert [era.first for era in back.turns.eras] == [0, 150, 400]
    for world in (1, 3):  # other processes know of the change
        read = read_by_processes(back, 96, 20, world, 1)
        assert read == {number: content(back[number]) for number in range(96, 96 + 20 * ROWS)}


def test_a_source_that_stops_ends_the_plan(folders: dict[str, Path]) -> None:
    for packing in ("concat", "best_fit"):
        plan = plan_of(folders, packing)
        assert plan.ends() is None
        sources = [replace(plan.sources[0], on_exhausted="stop"), *plan.sources[1:]]
        stopping = open_plan(sources, 40, seed=5, reading=Reading(packing, shuffle_shards=4))
        ends = stopping.ends()
        assert ends is not None and ends[1] == "many"
        rows = stopping.describe()[0].contents.rows_per_epoch
        assert stopping.locate(ends[0]) == (0, rows)
        last = max(turn for number in range(ends[0]) for source, turn in [stopping.locate(number)] if source == 0)
        assert last + 1 == rows
        documents = {
            part.document
            for number in range(ends[0])
            if stopping.locate(number)[0] == 0
            for part in stopping[number].documents
        }
        assert documents == set(range(900))


def test_a_group_of_shards_is_read_at_a_time(folders: dict[str, Path]) -> None:
    """A remote store is asked for few shards at a time, and all rows of a group come before those of the next."""
    plan = open_plan([Source("many", shards=folders["many"])], 40, seed=0, reading=Reading(shuffle_shards=3))
    shards = ShardFolder(folders["many"]).manifest.shards
    first = np.cumsum([0] + [entry.documents for entry in shards])
    rows = plan.describe()[0].contents.rows_per_epoch
    assert rows is not None
    touched: list[set[int]] = []
    for number in range(rows):
        parts = plan[number].documents
        touched.append({int(np.searchsorted(first, part.document, side="right")) - 1 for part in parts})
    last = {shard: max(n for n, some in enumerate(touched) if shard in some) for shard in range(len(shards))}
    for number in range(rows):
        begun = set().union(*touched[: number + 1])
        assert sum(last[shard] >= number for shard in begun) <= 3
    assert len({frozenset(sorted(some)) for some in touched}) > 10  # rows of a group mix its shards


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Any corpora and any mixture of them."""
    row = draw(st.integers(1, 30))
    length = st.one_of(st.just(0), st.just(1), st.integers(1, 5), st.integers(1, 80), st.just(100 * row))
    corpora = draw(st.lists(st.lists(length, max_size=25).filter(any), min_size=1, max_size=4))
    return {
        "row": row,
        "corpora": corpora,
        "weights": draw(st.tuples(*[st.floats(0.01, 5)] * len(corpora))),
        "change": draw(st.integers(1, 60)),
        "reading": Reading(draw(st.sampled_from(["concat", "best_fit"])), draw(st.integers(1, 5))),
        "seed": draw(st.integers(0, 3)),
        "empty": draw(st.lists(st.integers(0, 3), max_size=3)),
        "shard_bytes": draw(st.sampled_from([1, 4000, 10**6])),
        "stops": draw(st.lists(st.integers(1, 60), max_size=4)),
    }


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=mixtures())
def test_any_mixture_of_any_corpora(case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    documents = [
        corpus(folder / str(number), lengths, case["shard_bytes"], number)
        for number, lengths in enumerate(case["corpora"])
    ]
    for number in range(len(documents)):
        add_empty_shards(folder / str(number), case["empty"])
    sources = [
        Source(str(number), weight=weight, shards=folder / str(number), changes=(WeightChange(case["change"], 1.0),))
        for number, weight in enumerate(case["weights"])
    ]

    def opened() -> Plan:
        return open_plan(sources, case["row"], case["seed"], reading=case["reading"])

    plan = opened()
    rows = [plan[number] for number in range(120)]
    # every epoch of every source that went by has every token once, with its label
    epochs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for row in rows:
        position = 0
        for part in row.documents:
            epochs.setdefault((row.source, part.epoch), []).append((part.document, part.start, part.stop))
            document = documents[row.source][part.document]
            size = part.stop - part.start
            np.testing.assert_array_equal(row.tokens[position : position + size], document[part.start : part.stop])
            following = document[part.start + 1 : part.stop + 1].tolist()
            labels = row.labels[position : position + size].tolist()
            assert labels == following + [-100] * (part.stop == len(document))
            position += size
    for (source, epoch), parts in epochs.items():
        complete = (source, epoch + 1) in epochs
        seen = Counter((document, token) for document, *span in parts for token in range(*span))
        assert max(seen.values()) == 1
        assert not complete or len(seen) == sum(map(len, documents[source]))
    # and stops at any place change nothing
    again: list[Row] = []
    reader = PlanReader(opened())
    for size in (*case["stops"], len(rows)):
        again += reader.next_batch(min(size, len(rows) - len(again)))
        reader = PlanReader.from_state(opened(), json.loads(json.dumps(reader.state())))
    assert [content(row) for row in again] == [content(row) for row in rows]
