"""The global plan of a run's data: sample number n is a pure function of (sources, seq_len, seed, n).

How many processes, workers or accumulation steps read it changes nothing: each asks for its own numbers. The state of a
reader is therefore one number, and the fingerprint proves at resume that the plan is still the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slotmamba_data.errors import InputError
from slotmamba_data.files import sha256_hex
from slotmamba_data.packing import Row
from slotmamba_data.schedule import Schedule
from slotmamba_data.sources import Contents, Source, open_source

VERSION = 1  # raised whenever the same sources, seq_len and seed would give other rows


@dataclass(frozen=True)
class SourceReport:
    """A source within a plan: its name, kind, share of the rows (0 to 1) and what it holds."""

    name: str
    kind: str
    share: float
    contents: Contents


class Plan:
    """An endless sequence of rows; `plan[n]` is row n >= 0, whatever was read before.

    The sources take turns by weight. All rows have `seq_len` tokens, so shares of rows are shares of tokens; after any
    number of rows a source is within ceil(log2(sources)) / 2 rows of its share.

    Attributes:
        sources: as given.
        seq_len: tokens of a row.
        seed: of all orders and samples.
        vocab_size: every token of every source is below.
        tokenizers: digests of the tokenizers of its text; one, or none when there is no text.
        components: name and digest (or value) of everything that decides the rows.
        fingerprint: SHA-256 over the components.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int, split: str) -> None:
        names = [source.name for source in sources]
        if not names or len(set(names)) != len(names):
            raise InputError(f"a plan needs sources with distinct names, not {names}")
        if seq_len < 1:
            raise InputError(f"seq_len={seq_len}: expected at least 1")
        self.sources = tuple(sources)
        self.seq_len = seq_len
        self.seed = seed
        self._rows = [open_source(source, index, seq_len, seed, split) for index, source in enumerate(sources)]
        self._schedule = Schedule([source.weight for source in sources])
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
            components[f"source {source.name}: weight"] = repr(float(source.weight))
            components |= {f"source {source.name}: {name}": value for name, value in rows.components.items()}
        return components

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
        return self._schedule.locate(number)

    def encoder_length(self, source: int) -> int | None:
        """Encoder tokens of the rows of a source, None when it has no encoder."""
        return self._rows[source].encoder_length

    def describe(self) -> tuple[SourceReport, ...]:
        """What each source holds, and its share of the rows."""
        total = sum(source.weight for source in self.sources)
        return tuple(
            SourceReport(source.name, source.kind, source.weight / total, rows.contents)
            for source, rows in zip(self.sources, self._rows, strict=True)
        )

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for rows in self._rows:
            rows.close()


def open_plan(sources: Sequence[Source], seq_len: int, seed: int, *, split: str = "train") -> Plan:
    """Open the plan of `sources`.

    Args:
        sources: what to mix.
        seq_len: tokens of a row.
        seed: of all orders and samples.
        split: part of every draw, so that generated validation samples are never those of training.

    Raises:
        InputError: a folder of shards is missing, incomplete or damaged, or samples do not fit the rows; says which.
    """
    return Plan(sources, seq_len, seed, split)


def check_fingerprint(saved: Mapping[str, Any], plan: Plan) -> None:
    """Refuse to go on with other data than before.

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

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, JSON values: seed, samples_consumed, fingerprint, components."""
        return {
            "seed": self.plan.seed,
            "samples_consumed": self.samples_consumed,
            "fingerprint": self.plan.fingerprint,
            "components": dict(self.plan.components),
        }

    @classmethod
    def from_state(cls, plan: Plan, state: Mapping[str, Any]) -> Self:
        """A reader that goes on where `state` was taken.

        Raises:
            InputError: the plan is not the one of the state; says what differs.
        """
        check_fingerprint(state, plan)
        return cls(plan, state["samples_consumed"])
