"""The job of making recall samples, for `slotmamba_data.pieces`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from slotmamba_data.mqar import generate_mqar
from slotmamba_data.mqar_spec import MQARSpec
from slotmamba_data.pieces import Item
from slotmamba_data.shards import checked_tokens

_CHUNK = 256  # samples generated at once


@dataclass(frozen=True)
class RecallJob:
    """What a build of recall samples does; arguments as for `build.build_mqar`.

    Attributes:
        pieces: the setting of each piece, the number of its first sample and the one past its last.
    """

    spec: MQARSpec
    counts: tuple[int, ...]
    seed: int
    stream: str
    shard_bytes: int
    pieces: tuple[tuple[int, int, int], ...]
    unit: ClassVar[str] = " samples"
    splits: ClassVar[tuple[str, ...]] = ("train",)

    @classmethod
    def of(cls, spec: MQARSpec, counts: Sequence[int], seed: int, stream: str, shard_bytes: int) -> RecallJob:
        """The job, with pieces that are a shard each, about."""
        found = []
        for which, (setting, count) in enumerate(zip(spec.settings, counts, strict=True)):
            step = max(1, shard_bytes // (8 * setting.length))
            found += [(which, first, min(first + step, count)) for first in range(0, count, step)]
        return cls(spec, tuple(counts), seed, stream, shard_bytes, tuple(found))

    @property
    def work(self) -> tuple[int, ...]:
        return tuple(past - first for _, first, past in self.pieces)

    def about(self) -> dict[str, Any]:
        """What decides the samples, as JSON values."""
        return {"spec": asdict(self.spec), "counts": list(self.counts), "seed": self.seed, "stream": self.stream}

    def read(self, piece: int) -> _RecallReading:
        return _RecallReading(self, piece)

    def arrays(self, item: Item) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = item.payload
        return {
            name: array.astype("<i4") if name == "labels" else checked_tokens(array, self.spec.vocab_size)
            for name, array in arrays.items()
        }


class _RecallReading:
    def __init__(self, job: RecallJob, piece: int) -> None:
        self._job = job
        self._which, self._first, self._past = job.pieces[piece]
        self.done = 0.0

    def __iter__(self) -> Iterator[Item]:
        setting = self._job.spec.settings[self._which]
        source = setting.name
        for first in range(self._first, self._past, _CHUNK):
            numbers = np.arange(first, min(first + _CHUNK, self._past))
            samples = generate_mqar(self._job.spec, setting, numbers, seed=self._job.seed, stream=self._job.stream)
            for row, number in enumerate(numbers.tolist()):
                payload = {"tokens": samples.tokens[row], "labels": samples.labels[row]}
                if samples.encoder is not None:
                    payload["encoder"] = samples.encoder[row]
                yield Item("train", source, payload, {"sample": number})
            self.done += len(numbers)
