"""Rows of recall samples that are made on the fly."""

from __future__ import annotations

import functools

import numpy as np

from slotmamba_data.errors import InputError
from slotmamba_data.mqar import MQARSamples, generate_mqar
from slotmamba_data.mqar_spec import MQARSpec
from slotmamba_data.packing import DocumentPart, Row, RowPacker
from slotmamba_data.row_source import Contents
from slotmamba_data.schedule import Schedule

_CHUNK_ROWS = 16  # rows of generated samples that are made together


class GeneratedRecall:
    """Recall samples made on the fly, without end: a row holds as many whole samples of one setting as fit.

    The settings take turns by weight. In the seq2seq form a row is one sample. A sample's document number is unique in
    the source: sample number * settings + setting.
    """

    def __init__(self, spec: MQARSpec, index: int, seq_len: int, seed: int, stream: str) -> None:
        longest = max(setting.length for setting in spec.settings)
        if longest > seq_len:
            raise InputError(f"samples of {longest} tokens do not fit rows of {seq_len}")
        self._spec, self._index, self._seq_len, self._seed, self._stream = spec, index, seq_len, seed, stream
        self._schedule = Schedule.constant([setting.weight for setting in spec.settings])
        self._per_row = [1 if spec.form == "seq2seq" else seq_len // setting.length for setting in spec.settings]
        self._chunk = functools.lru_cache(maxsize=len(spec.settings))(self._generate)
        self.vocab_size = spec.vocab_size
        self.tokenizer: str | None = None
        self.encoder_length = spec.encoder_length
        self.components = {
            "kind": "mqar, generated",
            **{name: str(getattr(spec, name)) for name in ("form", "vocab_size", "fillers", "power")},
            "order of settings": ", ".join(setting.name for setting in spec.settings),
            **{f"weight of {setting.name}": repr(float(setting.weight)) for setting in spec.settings},
        }

    @property
    def folder(self) -> None:
        return None

    def rows_per_epoch(self) -> None:
        return None

    def epochs(self, rows: int) -> None:
        return None

    def contents(self) -> Contents:
        used = total = 0.0
        for setting, per_row in zip(self._spec.settings, self._per_row, strict=True):
            tokens = setting.length
            if self._spec.form == "seq2seq":
                tokens = min(setting.length, 1 + setting.pairs)
            used += setting.weight * per_row * tokens
            total += setting.weight * self._seq_len
        return Contents(None, None, None, pad_share=1 - used / total)

    def cut_documents(self) -> int:
        return 0

    def origin(self, part: DocumentPart) -> str:
        number, which = divmod(part.document, len(self._spec.settings))
        return f"generated, sample {number} of {self._spec.settings[which].name}"

    def row(self, number: int) -> Row:
        which, turn = self._schedule.locate(number)
        chunk, place = divmod(turn, _CHUNK_ROWS)
        samples = self._chunk(which, chunk)
        per_row = self._per_row[which]
        packer = RowPacker(self._seq_len)
        for i in range(place * per_row, (place + 1) * per_row):
            document = (chunk * _CHUNK_ROWS * per_row + i) * len(self._spec.settings) + which
            packer.add(samples.tokens[i], samples.labels[i], DocumentPart(0, document, 0, samples.tokens.shape[1]))
        encoder = None if samples.encoder is None else samples.encoder[place]
        return packer.row(self._index, encoder, self.encoder_length)

    def _generate(self, which: int, chunk: int) -> MQARSamples:
        """The samples of `_CHUNK_ROWS` successive rows of a setting: many at once cost little more than one."""
        count = _CHUNK_ROWS * self._per_row[which]
        numbers = chunk * count + np.arange(count)
        return generate_mqar(self._spec, self._spec.settings[which], numbers, seed=self._seed, stream=self._stream)

    def close(self) -> None:
        pass
