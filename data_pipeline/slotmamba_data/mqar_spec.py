"""What recall samples can be asked for: settings, layout of the vocabulary, and the checks of both. No NumPy in here.

Tokens: 0 padding, 1 beginning, 2 end, 3 to 15 fillers, then keys up to vocab_size // 2 and values from there.
`fillers="any"` is the published layout instead: keys from 1, fillers from the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slotmamba_data.errors import InputError

FIRST_FILLER, FIRST_KEY = 3, 16


@dataclass(frozen=True)
class MQARSetting:
    """A length in tokens, a number of pairs, and the share of the rows (not the samples) relative to other settings."""

    length: int
    pairs: int
    weight: float = 1.0


@dataclass(frozen=True)
class MQARSpec:
    """What samples look like; the fields are those of a recipe's `mqar` section.

    Attributes:
        settings: lengths and numbers of pairs to mix; in the seq2seq form `length` is the decoder's.
        vocab_size: number of tokens, half of them values.
        form: `decoder`, pairs and queries in one sequence; `seq2seq`, the encoder sees `BOS k v k v ... EOS` and the
            decoder `BOS q q ...`: every key once in random order, or as many as fit its length.
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
        shapes = [(setting.length, setting.pairs) for setting in self.settings]
        if len(set(shapes)) < len(shapes):
            raise InputError(f"mqar.settings lists a (length, pairs) twice: {shapes}")
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
        if self.form == "decoder" and setting.length < 4 * setting.pairs:
            raise InputError(f"{shape}: the length must be at least 4 times the pairs, {4 * setting.pairs}")
        if self.form == "seq2seq" and setting.length < 2:
            raise InputError(f"{shape}: a decoder needs room for the beginning and one query, 2 tokens")
        if setting.pairs > self.num_keys:
            raise InputError(
                f"{shape}: mqar.vocab_size={self.vocab_size} has only {max(self.num_keys, 0)} keys, "
                f"expected at least {2 * (setting.pairs + self.first_key)}"
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
        """Encoder tokens of the sample with the most pairs, None without an encoder."""
        return 2 * max(setting.pairs for setting in self.settings) + 2 if self.form == "seq2seq" else None
