"""What recall samples can be asked for: settings, layout of the vocabulary, and the checks of both. No NumPy in here.

Tokens: 0 padding, 1 beginning, 2 end, 3 to 15 fillers, then keys up to vocab_size // 2 and values from there.
`fillers="any"` is the published layout instead: keys from 1, fillers from the whole vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self

from slotmamba_data.errors import InputError

FIRST_FILLER, FIRST_KEY = 3, 16


@dataclass(frozen=True)
class MQARSetting:
    """One difficulty of samples.

    Attributes:
        length: tokens of a sample; of the decoder in the seq2seq form.
        pairs: different keys.
        weight: share of the rows (not the samples) relative to other settings.
        updates: keys that are written once more, with another value, after all pairs; the last value counts
            ("forgetting").
        passes: how often pairs and updates are shown, one time after the other.
    """

    length: int
    pairs: int
    weight: float = 1.0
    updates: int = 0
    passes: int = 1

    @property
    def context(self) -> int:
        """Tokens of what is to be remembered."""
        return 2 * (self.pairs + self.updates) * self.passes

    @property
    def name(self) -> str:
        """Length, pairs and what is special, such as `64x8` or `64x8_updates4_passes2`."""
        updates = f"_updates{self.updates}" if self.updates else ""
        passes = f"_passes{self.passes}" if self.passes > 1 else ""
        return f"{self.length}x{self.pairs}{updates}{passes}"

    @classmethod
    def named(cls, name: str) -> Self:
        """The setting of a `name`."""
        parts = re.fullmatch(r"(\d+)x(\d+)(?:_updates(\d+))?(?:_passes(\d+))?", name)
        assert parts is not None, name
        length, pairs, updates, passes = parts.groups()
        return cls(int(length), int(pairs), updates=int(updates or 0), passes=int(passes or 1))

    @property
    def title(self) -> str:
        """The same in words."""
        updates = f", {self.updates} written again" if self.updates else ""
        passes = f", {self.passes} passes" if self.passes > 1 else ""
        return f"{self.length} tokens, {self.pairs} pairs{updates}{passes}"


@dataclass(frozen=True)
class MQARSpec:
    """What samples look like; the fields are those of a recipe's `mqar` section.

    Attributes:
        settings: lengths and numbers of pairs to mix; in the seq2seq form `length` is the decoder's.
        vocab_size: number of tokens, half of them values.
        form: `decoder`, pairs and queries in one sequence; `seq2seq`, the encoder sees `BOS k v k v ... EOS` and the
            decoder `BOS q q ...`: every key once in random order, or as many as fit its length. The label at a query
            is the value, and so the source document's target sequence.
        fillers: `outside` of the keys and values or `any` token; the seq2seq form has none.
        power: exponent a of the query gaps, whose i-th place is drawn with weight a * i^(a-1).

    Raises:
        InputError: no such samples exist.
    """

    settings: tuple[MQARSetting, ...]
    vocab_size: int = 8192
    form: Literal["decoder", "seq2seq"] = "decoder"
    fillers: Literal["outside", "any"] = "outside"
    power: float = 0.01

    def __post_init__(self) -> None:
        if not self.settings:
            raise InputError("mqar.settings is empty")
        names = [setting.name for setting in self.settings]
        if len(set(names)) < len(names):
            raise InputError(f"mqar.settings lists the same samples twice: {', '.join(names)}")
        if self.form not in ("decoder", "seq2seq") or self.fillers not in ("outside", "any"):
            raise InputError(f"mqar: unknown form {self.form!r} or fillers {self.fillers!r}")
        if self.form == "seq2seq" and self.fillers == "any":
            raise InputError("mqar.fillers=any has no meaning in the seq2seq form, which has no fillers")
        if not self.power > 0:
            raise InputError(f"mqar.power={self.power}: expected more than 0")
        for setting in self.settings:
            self._check(setting)

    def _check(self, setting: MQARSetting) -> None:
        shape = f"mqar setting of length {setting.length} with {setting.pairs} pairs"
        if setting.pairs < 1 or not setting.weight > 0:
            raise InputError(f"{shape} and weight {setting.weight}: expected at least one pair and a weight above 0")
        if not 0 <= setting.updates <= setting.pairs or setting.passes < 1:
            raise InputError(
                f"{shape}, {setting.updates} updates and {setting.passes} passes: expected at most as many updates as "
                "pairs and at least one pass"
            )
        least = setting.context + 2 * setting.pairs
        if self.form == "decoder" and setting.length < least:
            raise InputError(
                f"{shape}: the length must be at least {least}, {setting.context} tokens to remember and 2 a query"
            )
        if self.form == "seq2seq" and setting.length < 2:
            raise InputError(f"{shape}: a decoder needs room for the beginning and one query, 2 tokens")
        if setting.pairs > self.num_keys:
            raise InputError(
                f"{shape}: mqar.vocab_size={self.vocab_size} has only {max(self.num_keys, 0)} keys, "
                f"expected at least {2 * (setting.pairs + self.first_key)}"
            )
        if setting.pairs + setting.updates > self.vocab_size - self.first_value:
            raise InputError(
                f"{shape} and {setting.updates} updates: mqar.vocab_size={self.vocab_size} has only "
                f"{self.vocab_size - self.first_value} values, one for each pair and update is needed"
            )

    @property
    def first_key(self) -> int:
        return 1 if self.fillers == "any" else FIRST_KEY

    @property
    def first_value(self) -> int:
        return self.vocab_size // 2

    @property
    def num_keys(self) -> int:
        """Different keys; there are as many values or more."""
        return self.first_value - self.first_key

    @property
    def encoder_length(self) -> int | None:
        """Encoder tokens of the longest sample, None without an encoder."""
        return max(setting.context for setting in self.settings) + 2 if self.form == "seq2seq" else None
