"""Multi-query associative recall (MQAR): samples made on the fly, each from its own seed.

A sample lists key-value pairs and later asks for the value of every key once. The decoder form follows Arora et al.,
"Zoology" (2023) as its authors' code generates it: `k1 v1 k2 v2 ...`, then queries at even offsets whose gaps follow a
power law, the answer being the label at the query and never part of the input. Two things differ from that code. Every
draw depends on the sample's own number and seed alone, and by default no filler is a key or a value: with fillers from
the whole vocabulary a query's key can turn up before it as noise, which caps accuracy as if the model had failed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
        gaps: [n, queries], tokens between a value and the query for it; the decoder counts on from the encoder's end.
        encoder: [n, 2 * pairs + 2] in the seq2seq form, else None.
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
    base = derive_key("mqar", seed, stream, setting.length, setting.pairs)
    # The mixer is one-to-one, so different samples have different keys; likewise the parts of a sample.
    samples = random_bits(base + np.asarray(numbers, dtype=np.uint64), 1)[:, 0]
    for_keys, for_values, for_places, for_fillers = random_bits(samples, 4).T
    keys = spec.first_key + distinct(for_keys, spec.num_keys, setting.pairs)
    values = spec.first_value + distinct(for_values, spec.vocab_size - spec.first_value, setting.pairs)
    if spec.form == "seq2seq":
        return _seq2seq(setting, keys, values, for_places)
    places = _weighted_places(for_places, (setting.length - 2 * setting.pairs) // 2, setting.pairs, spec.power)
    return _decoder(spec, setting, keys, values, places, for_fillers)


@functools.lru_cache(maxsize=64)
def _place_weights(places: int, power: float) -> np.ndarray:
    return power * np.arange(1, places + 1, dtype=np.float64) ** (power - 1)


def _weighted_places(keys: np.ndarray, places: int, count: int, power: float) -> np.ndarray:
    """`count` different places each, drawn one after the other in proportion to the weights left: int64 [n, count].

    The order of arrival in a race of exponential clocks with those rates is such a draw (Efraimidis and Spirakis 2006).
    """
    arrivals = -np.log(uniform(keys, places)) / _place_weights(places, power)
    return np.argsort(arrivals, axis=1, kind="stable")[:, :count]


def _pairs(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """k1 v1 k2 v2 ...: [n, 2 * pairs]."""
    return np.stack((keys, values), axis=2).reshape(len(keys), -1)


def _decoder(
    spec: MQARSpec,
    setting: MQARSetting,
    keys: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    for_fillers: np.ndarray,
) -> MQARSamples:
    first, past = (0, spec.vocab_size) if spec.fillers == "any" else (FIRST_FILLER, FIRST_KEY)
    context = 2 * setting.pairs
    fillers = first + random_bits(for_fillers, setting.length - context) % np.uint64(past - first)
    tokens = np.concatenate((_pairs(keys, values), fillers.astype(np.int64)), axis=1)
    queries = context + 2 * places
    labels = np.full_like(tokens, IGNORE)
    np.put_along_axis(tokens, queries, keys, axis=1)
    np.put_along_axis(labels, queries, values, axis=1)
    return MQARSamples(tokens, labels, queries, queries - np.arange(1, context, 2), encoder=None)


def _seq2seq(setting: MQARSetting, keys: np.ndarray, values: np.ndarray, for_places: np.ndarray) -> MQARSamples:
    count = len(keys)
    ends = np.full((count, 1), BOS), np.full((count, 1), EOS)
    encoder = np.concatenate((ends[0], _pairs(keys, values), ends[1]), axis=1)
    asked = np.argsort(random_bits(for_places, setting.pairs), axis=1, kind="stable")[:, : setting.length - 1]
    tokens = np.concatenate((ends[0], np.take_along_axis(keys, asked, axis=1)), axis=1)
    labels = np.concatenate((np.full((count, 1), IGNORE), np.take_along_axis(values, asked, axis=1)), axis=1)
    queries = np.tile(np.arange(1, tokens.shape[1]), (count, 1))
    gaps = encoder.shape[1] + queries - (2 + 2 * asked)  # the encoder holds value i at 2 + 2i
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
