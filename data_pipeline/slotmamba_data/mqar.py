"""Multi-query associative recall (MQAR): samples made on the fly, each from its own seed.

A sample lists key-value pairs and later asks for the value of every key once. Some keys may be written a second time,
with another value that counts from then on, and all of it may be shown several times. The decoder form follows Arora et
al., "Zoology" (2023) as its authors' code generates it: `k1 v1 k2 v2 ...`, then queries at even offsets whose gaps
follow a power law, the answer being the label at the query and never part of the input. Keys that are written again
come after all pairs, as in that code's forgetting task; several passes follow Arora et al., "Just read twice" (2024).
Two things differ from that code. Every draw depends on the sample's own number and seed alone, and by default no filler
is a key or a value: with fillers from the whole vocabulary a query's key can turn up before it as noise, which caps
accuracy as if the model had failed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from slotmamba_data.mqar_spec import FIRST_FILLER, FIRST_KEY, MQARSetting, MQARSpec
from slotmamba_data.randomness import derive_key, distinct, random_bits, uniform

PAD, BOS, EOS = 0, 1, 2
IGNORE = -100  # label of a position that has no loss


@dataclass(frozen=True)
class MQARSamples:
    """`n` samples of one setting, all int64.

    Attributes:
        tokens: [n, length], or [n, 1 + queries] of the decoder in the seq2seq form.
        labels: like tokens; the value at a query, -100 elsewhere.
        queries: [n, queries], positions of the queries in `tokens`.
        gaps: [n, queries], tokens between the last showing of a value and the query for it; the decoder counts on from
            the encoder's end.
        encoder: [n, context + 2] in the seq2seq form, else None.
    """

    tokens: np.ndarray
    labels: np.ndarray
    queries: np.ndarray
    gaps: np.ndarray
    encoder: np.ndarray | None


def generate_mqar(spec: MQARSpec, setting: MQARSetting, numbers: np.ndarray, *, seed: int, stream: str) -> MQARSamples:
    """Samples `numbers` (int [n], from 0) of a setting: sample i is the same whatever it is generated with.

    Args:
        spec: the kind of samples.
        setting: one of the spec's settings.
        numbers: which samples.
        seed: of the run.
        stream: name that separates sets of samples of the same seed, such as training and validation.
    """
    special = (setting.updates, setting.passes) if (setting.updates, setting.passes) != (0, 1) else ()
    base = derive_key("mqar", seed, stream, setting.length, setting.pairs, *special)
    # The mixer is one-to-one, so different samples have different keys; likewise the parts of a sample.
    samples = random_bits(base + np.asarray(numbers, dtype=np.uint64), 1)[:, 0]
    for_keys, for_values, for_places, for_fillers, for_updates = random_bits(samples, 5).T
    keys = spec.first_key + distinct(for_keys, spec.num_keys, setting.pairs)
    written = setting.pairs + setting.updates
    values = spec.first_value + distinct(for_values, spec.vocab_size - spec.first_value, written)
    memory = _memory(setting, keys, values, for_updates)
    if spec.form == "seq2seq":
        return _seq2seq(setting, memory, for_places)
    places = _weighted_places(for_places, (setting.length - setting.context) // 2, setting.pairs, spec.power)
    return _decoder(spec, setting, memory, places, for_fillers)


class _Memory(NamedTuple):
    """What `n` samples are to remember, all int64."""

    tokens: np.ndarray  # [n, context], k1 v1 k2 v2 ..., then the keys that are written again, and all as often as asked
    keys: np.ndarray  # [n, pairs]
    values: np.ndarray  # [n, pairs], the last one of each key
    places: np.ndarray  # [n, pairs], where in `tokens` that value stands for the last time


def _memory(setting: MQARSetting, keys: np.ndarray, values: np.ndarray, for_updates: np.ndarray) -> _Memory:
    """Args: keys [n, pairs]; values [n, pairs + updates], those of the updates last."""
    again = np.argsort(random_bits(for_updates, setting.pairs), axis=1, kind="stable")[:, : setting.updates]
    keys_written = np.concatenate((keys, np.take_along_axis(keys, again, axis=1)), axis=1)
    once = np.stack((keys_written, values), axis=2).reshape(len(keys), -1)
    last = np.tile(np.arange(setting.pairs), (len(keys), 1))  # the writing of each key that counts
    np.put_along_axis(last, again, setting.pairs + np.arange(setting.updates)[None], axis=1)
    return _Memory(
        tokens=np.tile(once, (1, setting.passes)),
        keys=keys,
        values=np.take_along_axis(values, last, axis=1),
        places=once.shape[1] * (setting.passes - 1) + 2 * last + 1,
    )


@functools.lru_cache(maxsize=64)
def _place_weights(places: int, power: float) -> np.ndarray:
    return power * np.arange(1, places + 1, dtype=np.float64) ** (power - 1)


def _weighted_places(keys: np.ndarray, places: int, count: int, power: float) -> np.ndarray:
    """`count` different places each, drawn one after the other in proportion to the weights left: int64 [n, count].

    The order of arrival in a race of exponential clocks with those rates is such a draw (Efraimidis and Spirakis 2006).
    """
    arrivals = -np.log(uniform(keys, places)) / _place_weights(places, power)
    return np.argsort(arrivals, axis=1, kind="stable")[:, :count]


def _decoder(
    spec: MQARSpec, setting: MQARSetting, memory: _Memory, places: np.ndarray, for_fillers: np.ndarray
) -> MQARSamples:
    first, past = (0, spec.vocab_size) if spec.fillers == "any" else (FIRST_FILLER, FIRST_KEY)
    fillers = first + random_bits(for_fillers, setting.length - setting.context) % np.uint64(past - first)
    tokens = np.concatenate((memory.tokens, fillers.astype(np.int64)), axis=1)
    queries = setting.context + 2 * places
    labels = np.full_like(tokens, IGNORE)
    np.put_along_axis(tokens, queries, memory.keys, axis=1)
    np.put_along_axis(labels, queries, memory.values, axis=1)
    return MQARSamples(tokens, labels, queries, queries - memory.places, encoder=None)


def _seq2seq(setting: MQARSetting, memory: _Memory, for_places: np.ndarray) -> MQARSamples:
    count = len(memory.keys)
    ends = np.full((count, 1), BOS), np.full((count, 1), EOS)
    encoder = np.concatenate((ends[0], memory.tokens, ends[1]), axis=1)
    asked = np.argsort(random_bits(for_places, setting.pairs), axis=1, kind="stable")[:, : setting.length - 1]
    keys, values, places = (np.take_along_axis(each, asked, axis=1) for each in memory[1:])
    tokens = np.concatenate((ends[0], keys), axis=1)
    labels = np.concatenate((np.full((count, 1), IGNORE), values), axis=1)
    queries = np.tile(np.arange(1, tokens.shape[1]), (count, 1))
    gaps = encoder.shape[1] + queries - (1 + places)
    return MQARSamples(tokens, labels, queries, gaps, encoder)


def _by_samples(counts: dict[tuple[int, int], int]) -> tuple[MQARSetting, ...]:
    """Settings whose rows, filled with whole samples, hold samples in proportion to `counts`, by (length, pairs)."""
    return tuple(MQARSetting(length, pairs, count * length) for (length, pairs), count in counts.items())


# The "default" protocol of Zoology and Based, which RAM-Net reports: 180,000 training samples, and the mean over seven
# test settings of 1,000 samples each. (512, 128) and (1024, 256) are longer than anything in training.
PUBLISHED_TRAIN = _by_samples(
    {(64, 4): 100_000, (128, 8): 20_000, (256, 16): 20_000, (256, 32): 20_000, (256, 64): 20_000}
)
PUBLISHED_TEST = _by_samples(
    {
        (64, 4): 1000,
        (64, 8): 1000,
        (64, 16): 1000,
        (128, 32): 1000,
        (256, 64): 1000,
        (512, 128): 1000,
        (1024, 256): 1000,
    }
)
