"""The global plan of a run's data: sample number n is a pure function of (sources, seq_len, seed, n).

How many processes, workers or accumulation steps read it changes nothing: each asks for its own numbers. The state of a
reader is therefore one number, and the fingerprint proves at resume that the plan is still the same. Only the weights
of the sources may change at a resume, from there on; the state remembers what they were before.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slotmamba_data.errors import InputError
from slotmamba_data.files import sha256_hex
from slotmamba_data.packing import Row
from slotmamba_data.row_source import Contents
from slotmamba_data.schedule import Era, Piece, Turns, mixture
from slotmamba_data.shard_reader import ShardFolder
from slotmamba_data.shard_rows import Reading
from slotmamba_data.sources import Source, open_source

VERSION = 2  # raised whenever the same sources, seq_len and seed would give other rows


@dataclass(frozen=True)
class SourceReport:
    """A source within a plan: its name, kind, share of the rows (0 to 1) at row 0 and what it holds."""

    name: str
    kind: str
    share: float
    contents: Contents


@dataclass(frozen=True)
class SourceProgress:
    """How far a source is after some rows of the plan: its share of them, and epochs, None without end."""

    share: float
    epochs: float | None


class Plan:
    """A sequence of rows; `plan[n]` is row n >= 0, whatever was read before.

    The sources take turns by weight, which may change at given rows. All rows have `seq_len` tokens, so shares of rows
    are shares of tokens, padding included; after any number of rows a source is within ceil(log2(sources)) / 2 rows of
    what is due to it.

    Attributes:
        sources: as given.
        seq_len: tokens of a row.
        seed: of all orders and samples.
        vocab_size: every token of every source is below.
        turns: which source each row is of, and where its weights come from.
        tokenizers: digests of the tokenizers of its text; one, or none when there is no text.
        components: name and digest (or value) of everything that decides the rows but for the weights.
        fingerprint: SHA-256 over the components.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int, split: str, reading: Reading) -> None:
        names = [source.name for source in sources]
        if not names or len(set(names)) != len(names):
            raise InputError(f"a plan needs sources with distinct names, not {names}")
        if seq_len < 1:
            raise InputError(f"seq_len={seq_len}: expected at least 1")
        self.sources = tuple(sources)
        self.seq_len = seq_len
        self.seed = seed
        self._split, self._reading = split, reading
        self.turns = Turns([Era(0, tuple(_mixture(sources)))])
        self._rows = [open_source(source, index, seq_len, seed, split, reading) for index, source in enumerate(sources)]
        self.vocab_size = max(rows.vocab_size for rows in self._rows)
        self.tokenizers = frozenset(rows.tokenizer for rows in self._rows if rows.tokenizer is not None)
        if len(self.tokenizers) > 1:
            raise InputError(
                f"the sources {names} were tokenised with different tokenizers: build them with the same one"
            )
        self.components = self._components(split)
        self.fingerprint = sha256_hex(json.dumps(self.components, sort_keys=True).encode())

    def _components(self, split: str) -> dict[str, str]:
        components = {
            "plan version": str(VERSION),
            "seq_len": str(self.seq_len),
            "seed": str(self.seed),
            "split": split,
            "order of sources": ", ".join(source.name for source in self.sources),
        }
        for source, rows in zip(self.sources, self._rows, strict=True):
            components |= {f"source {source.name}: {name}": value for name, value in rows.components.items()}
        return components

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes open it for themselves."""
        arguments = self.sources, self.seq_len, self.seed, self._split, self._reading, self.turns.eras
        return _reopened, arguments

    def __getitem__(self, number: int) -> Row:
        """Row `number`.

        Raises:
            IndexError: the number is negative.
            InputError: a shard is damaged; names shard and byte.
            OSError: a shard cannot be read.
        """
        source, turn = self.locate(number)
        return self._rows[source].row(turn)

    def locate(self, number: int) -> tuple[int, int]:
        """The index of the source of row `number`, and the number of the row within that source."""
        if number < 0:
            raise IndexError(f"row {number}: rows are numbered from 0")
        return self.turns.locate(number)

    def with_turns(self, turns: Turns) -> Plan:
        """The same plan, whose sources take other turns. It shares the open files with this one."""
        plan = object.__new__(type(self))
        plan.__dict__.update(self.__dict__)
        plan.turns = turns
        return plan

    def ends(self) -> tuple[int, str] | None:
        """How many rows there are, and the name of the source that has no more; None without end.

        Where a source fits documents whole this reads all its indexes.
        """
        ends = []
        for index, (source, rows) in enumerate(zip(self.sources, self._rows, strict=True)):
            epoch = rows.rows_per_epoch() if source.on_exhausted == "stop" else None
            row = None if epoch is None else self.turns.position(index, epoch)
            if row is not None:
                ends.append((row, source.name))
        return min(ends, default=None)

    def encoder_length(self, source: int) -> int | None:
        """Encoder tokens of the rows of a source, None when it has no encoder."""
        return self._rows[source].encoder_length

    def describe(self) -> tuple[SourceReport, ...]:
        """What each source holds, and its share of the rows."""
        weights = self.turns.eras[0].pieces[0].weights
        return tuple(
            SourceReport(source.name, source.kind, weight / sum(weights), rows.contents())
            for source, rows, weight in zip(self.sources, self._rows, weights, strict=True)
        )

    def progress(self, rows: int) -> dict[str, SourceProgress]:
        """How far each source is after `rows` >= 1 rows."""
        counts = self.turns.counts(rows)
        return {
            source.name: SourceProgress(count / rows, own.epochs(count))
            for source, own, count in zip(self.sources, self._rows, counts, strict=True)
        }

    def folder(self, source: int) -> ShardFolder | None:
        """The shards of a source, None where samples are generated."""
        return self._rows[source].folder

    def cut_documents(self, source: int) -> int:
        """How many documents of a source are in more than one row of its first epoch; reads all its indexes."""
        return self._rows[source].cut_documents()

    def origins(self, row: Row) -> list[str]:
        """Where each document of a row comes from, in words."""
        return [self._rows[row.source].origin(part) for part in row.documents]

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for rows in self._rows:
            rows.close()


def _mixture(sources: Sequence[Source]) -> list[Piece]:
    pieces = mixture([source.weight for source in sources], [source.changes for source in sources])
    for piece, later in itertools.zip_longest(pieces, pieces[1:]):
        if not any(piece.weights):
            until = "on" if later is None else f"to {later.first - 1}"
            raise InputError(f"no source has a weight above 0 in rows from {piece.first} {until}")
    return pieces


def _reopened(
    sources: Sequence[Source], seq_len: int, seed: int, split: str, reading: Reading, eras: Sequence[Era]
) -> Plan:
    return Plan(sources, seq_len, seed, split, reading).with_turns(Turns(eras))


def open_plan(
    sources: Sequence[Source], seq_len: int, seed: int, *, split: str = "train", reading: Reading | None = None
) -> Plan:
    """Open the plan of `sources`.

    Args:
        sources: what to mix.
        seq_len: tokens of a row.
        seed: of all orders and samples.
        split: part of every draw, so that generated validation samples are never those of training.
        reading: how rows are made of shards.

    Raises:
        InputError: a folder of shards is missing, incomplete or damaged, samples do not fit the rows, or at some row no
            source has a weight; says which.
    """
    return Plan(sources, seq_len, seed, split, reading or Reading())


def check_fingerprint(saved: Mapping[str, Any], plan: Plan) -> None:
    """Refuse to go on with other data than before; other weights are no other data.

    Args:
        saved: a reader's state (`PlanReader.state`).
        plan: the plan to go on with.

    Raises:
        InputError: they differ; names the sources, shards or settings that do.
    """
    if saved["fingerprint"] == plan.fingerprint:
        return
    before, now = saved["components"], plan.components
    changes = [
        f"{name} (was {_brief(before.get(name))}, is {_brief(now.get(name))})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    raise InputError(
        f"the data are not those of the saved run; changed: {'; '.join(changes[:5])}{more}. "
        "Resume with the same data, or start a new run"
    )


def _brief(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) < 64 else value[:12]


class PlanReader:
    """Reads a plan in order and knows where it is."""

    def __init__(self, plan: Plan, start: int = 0) -> None:
        self.plan = plan
        self.samples_consumed = start

    def next_batch(self, rows: int, part: int = 0, parts: int = 1) -> list[Row]:
        """Of the next `rows` rows those of one of `parts` processes that read together, rows / parts in a row.

        The position is that of all of them. Errors as for `Plan.__getitem__`, and then it stays.
        """
        assert rows % parts == 0 and 0 <= part < parts
        share = rows // parts
        start = self.samples_consumed + part * share
        batch = [self.plan[number] for number in range(start, start + share)]
        self.samples_consumed += rows
        return batch

    def close(self) -> None:
        """Close the plan's files; reading opens them again."""
        self.plan.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, JSON values: seed, samples_consumed, weights, fingerprint, components."""
        return {
            "seed": self.plan.seed,
            "samples_consumed": self.samples_consumed,
            "weights": [
                [era.first, [[piece.first, list(piece.weights)] for piece in era.pieces]]
                for era in self.plan.turns.eras
            ],
            "fingerprint": self.plan.fingerprint,
            "components": dict(self.plan.components),
        }

    @classmethod
    def from_state(cls, plan: Plan, state: Mapping[str, Any]) -> Self:
        """A reader that goes on where `state` was taken.

        Its plan has the weights of the state for the rows before, and those of `plan` from there on.

        Raises:
            InputError: the plan is not the one of the state; says what differs.
        """
        check_fingerprint(state, plan)
        consumed = state["samples_consumed"]
        before = Turns(
            [Era(row, tuple(Piece(first, tuple(weights)) for first, weights in era)) for row, era in state["weights"]]
        )
        return cls(plan.with_turns(before.followed_by(plan.turns.eras[-1].pieces, consumed)), consumed)
