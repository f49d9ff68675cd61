"""The sources of a plan: what a recipe names, and what maps the number of a row within the source to the row."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slotmamba_data.errors import InputError
from slotmamba_data.generated_rows import GeneratedRecall
from slotmamba_data.mqar_spec import MQARSpec
from slotmamba_data.row_source import RowSource
from slotmamba_data.schedule import WeightChange
from slotmamba_data.shard_reader import ShardFolder
from slotmamba_data.shard_rows import Reading, ShardRows


@dataclass(frozen=True)
class Source:
    """A source as a recipe names it: text or recall samples from shards, or recall samples made on the fly.

    Attributes:
        name: name in logs; also part of the seed of everything drawn for the source.
        kind: `lm` or `mqar`.
        weight: share of the rows, and so of the tokens, relative to the other sources.
        shards: folder written by `slotmamba data build`, or its URL.
        mqar: generated samples instead.
        changes: how the weight changes later, at rising rows of the plan.
        on_exhausted: after an epoch `repeat` in a new order, or `stop`: the plan ends before the first row of another.

    Raises:
        InputError: neither or both of shards and mqar, lm without shards, weights that cannot be, or samples without
            end that are to stop.
    """

    name: str
    kind: Literal["lm", "mqar"] = "lm"
    weight: float = 1.0
    shards: str | Path | None = None
    mqar: MQARSpec | None = None
    changes: tuple[WeightChange, ...] = ()
    on_exhausted: Literal["repeat", "stop"] = "repeat"

    def __post_init__(self) -> None:
        weights = [self.weight, *(change.weight for change in self.changes)]
        if not all(weight >= 0 for weight in weights) or not any(weights):
            raise InputError(f"source {self.name!r}: weights {weights}, expected none below 0 and one above")
        rows = [0, *(change.row for change in self.changes)]
        if any(later <= row for row, later in itertools.pairwise(rows)):
            raise InputError(
                f"source {self.name!r}: its weight changes at rows {rows[1:]}, expected rising ones above 0"
            )
        if (self.shards is None) == (self.mqar is None):
            raise InputError(f"source {self.name!r} needs either `shards` or `mqar` settings, one of them")
        if self.kind == "lm" and self.shards is None:
            raise InputError(
                f"source {self.name!r} of kind lm needs `shards`, a folder written by `slotmamba data build`"
            )
        if self.mqar is not None and self.on_exhausted == "stop":
            raise InputError(f"source {self.name!r}: on_exhausted=stop, but generated samples never run out")


def open_source(source: Source, index: int, seq_len: int, seed: int, split: str, reading: Reading) -> RowSource:
    """Open source number `index` of a plan.

    Raises:
        InputError: the shards are not there, damaged, of another kind, or a sample is longer than a row.
    """
    stream = f"{split}/{source.name}"
    try:
        if source.mqar is not None:
            return GeneratedRecall(source.mqar, index, seq_len, seed, stream)
        assert source.shards is not None
        # Where one group ends and the next begins, both are in use.
        folder = ShardFolder(
            source.shards,
            remote=reading.remote,
            kept_open=2 * reading.shuffle_shards,
            truncated=reading.on_corrupt == "skip",
        )
        if folder.manifest.kind != source.kind:
            raise InputError(
                f"{folder.location} holds data of kind {folder.manifest.kind}, the source is of kind {source.kind}"
            )
        return ShardRows(folder, index, seq_len, seed, stream, reading)
    except InputError as error:
        raise InputError(f"source {source.name!r}: {error}") from error
