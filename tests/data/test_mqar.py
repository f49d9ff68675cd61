from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from slotmamba_data import (
    PUBLISHED_TEST,
    PUBLISHED_TRAIN,
    MQARSamples,
    MQARSetting,
    MQARSpec,
    Plan,
    Source,
    build_mqar,
    generate_mqar,
    open_plan,
)
from slotmamba_data.mqar import BOS, EOS, IGNORE
from slotmamba_data.mqar_spec import FIRST_FILLER, FIRST_KEY


def samples(spec: MQARSpec, numbers: list[int], setting: int = 0, seed: int = 0, stream: str = "s") -> MQARSamples:
    return generate_mqar(spec, spec.settings[setting], np.array(numbers), seed=seed, stream=stream)


def random_specs(count: int, fillers: Literal["outside", "any"]) -> list[MQARSpec]:
    rng = random.Random(count)
    specs = []
    for _ in range(count):
        pairs = rng.choice([1, 2, 3, 8, 31])
        length = 4 * pairs + rng.choice([0, 1, 2, 17, 100])
        vocab_size = 2 * (pairs + FIRST_KEY) + rng.choice([0, 1, 50, 8000])
        specs.append(
            MQARSpec((MQARSetting(length, pairs),), vocab_size, fillers=fillers, power=rng.choice([0.01, 1, 3]))
        )
    return specs


@pytest.mark.parametrize("fillers", ["outside", "any"])
def test_decoder_samples_can_be_answered(fillers: Literal["outside", "any"]) -> None:
    for spec in random_specs(40, fillers):
        length, pairs = spec.settings[0].length, spec.settings[0].pairs
        made = samples(spec, list(range(10)))
        assert made.encoder is None
        assert made.tokens.shape == made.labels.shape == (10, length)
        first_key, first_filler = (1, 0) if fillers == "any" else (FIRST_KEY, FIRST_FILLER)
        for row in range(10):
            tokens, labels = made.tokens[row].tolist(), made.labels[row].tolist()
            value_of = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
            place_of = {tokens[2 * i]: 2 * i + 1 for i in range(pairs)}
            assert len(value_of) == len(set(value_of.values())) == pairs
            assert all(
                first_key <= key < spec.vocab_size // 2 <= value < spec.vocab_size for key, value in value_of.items()
            )
            asked = [position for position in range(length) if labels[position] != IGNORE]
            assert sorted(tokens[position] for position in asked) == sorted(value_of)  # every key exactly once
            for position in asked:
                assert position >= 2 * pairs and position % 2 == 0
                assert labels[position] == value_of[tokens[position]]
            assert sorted(made.queries[row].tolist()) == asked
            gaps = [position - place_of[tokens[position]] for position in made.queries[row].tolist()]
            assert made.gaps[row].tolist() == gaps
            rest = set(range(2 * pairs, length)) - set(asked)
            noise = {tokens[position] for position in rest}
            if fillers == "outside":
                assert all(FIRST_FILLER <= token < FIRST_KEY for token in noise)
            else:
                assert all(first_filler <= token < spec.vocab_size for token in noise)


def test_seq2seq_samples_can_be_answered() -> None:
    for pairs, length in ((1, 2), (5, 6), (5, 100), (20, 8)):
        spec = MQARSpec((MQARSetting(length, pairs),), 96, form="seq2seq")
        made = samples(spec, list(range(10)))
        assert made.encoder is not None
        assert made.encoder.shape == (10, 2 * pairs + 2) and spec.encoder_length == 2 * pairs + 2
        count = min(pairs, length - 1)
        assert made.tokens.shape == made.labels.shape == (10, count + 1)
        for row in range(10):
            encoder, tokens, labels = (array[row].tolist() for array in (made.encoder, made.tokens, made.labels))
            assert (encoder[0], encoder[-1], tokens[0], labels[0]) == (BOS, EOS, BOS, IGNORE)
            value_of = dict(zip(encoder[1:-1:2], encoder[2:-1:2], strict=True))
            assert len(value_of) == len(set(value_of.values())) == pairs
            assert all(FIRST_KEY <= key < 48 <= value < 96 for key, value in value_of.items())
            assert len(set(tokens[1:])) == count
            assert labels[1:] == [value_of[key] for key in tokens[1:]]
            both = encoder + tokens
            for position, gap in zip(made.queries[row].tolist(), made.gaps[row].tolist(), strict=True):
                assert both[len(encoder) + position - gap] == labels[position]
    orders = {tuple(np.argsort(row).tolist()) for row in samples(spec, list(range(50))).tokens[:, 1:]}
    assert len(orders) > 40  # the order of the questions is drawn


@pytest.mark.parametrize("form", ["decoder", "seq2seq"])
def test_a_sample_depends_on_its_number_alone(form: Literal["decoder", "seq2seq"]) -> None:
    spec = MQARSpec((MQARSetting(64, 8), MQARSetting(64, 16)), form=form)
    together = samples(spec, list(range(20)))
    for number in (0, 7, 19):
        alone = samples(spec, [number])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[number])
        np.testing.assert_array_equal(alone.labels[0], together.labels[number])
    shuffled = samples(spec, [19, 3, 10**12, 7])
    np.testing.assert_array_equal(shuffled.tokens[[0, 1, 3]], together.tokens[[19, 3, 7]])
    other = [
        samples(spec, [0], seed=1),
        samples(spec, [0], stream="t"),
        samples(spec, [1]),
        samples(spec, [0], setting=1),
    ]
    for one in other:
        assert not np.array_equal(one.labels[one.labels != IGNORE], together.labels[0][together.labels[0] != IGNORE])


def test_samples_do_not_change_between_versions() -> None:
    made = samples(MQARSpec((MQARSetting(12, 2),), 64), [0, 1], seed=3)
    assert made.tokens.tolist() == [
        [30, 39, 23, 57, 7, 5, 30, 8, 23, 7, 4, 11],
        [16, 38, 29, 61, 29, 6, 6, 4, 16, 4, 12, 5],
    ]
    assert made.queries.tolist() == [[6, 8], [8, 4]]


def test_all_keys_and_fillers_are_used_evenly() -> None:
    spec = MQARSpec((MQARSetting(20, 4),), 2 * (FIRST_KEY + 10))
    made = samples(spec, list(range(20_000)))
    keys = np.bincount(made.tokens[:, 0:8:2].ravel(), minlength=FIRST_KEY + 10)[FIRST_KEY:]
    # 4 of 10 keys a sample: mean 8000, standard deviation below 70; 5 of them
    assert np.abs(keys - 8000).max() < 350
    tail = made.tokens[:, 8:]
    fillers = np.bincount(tail[tail < FIRST_KEY])[FIRST_FILLER:]
    assert len(fillers) == FIRST_KEY - FIRST_FILLER
    assert np.abs(fillers / fillers.mean() - 1).max() < 0.05


@pytest.mark.parametrize("power", [0.01, 0.5, 2.0])
def test_query_gaps_follow_the_power_law(power: float) -> None:
    spec = MQARSpec((MQARSetting(22, 1), MQARSetting(22, 3)), 64, power=power)
    count = 50_000
    rates = np.arange(1, 11) ** (power - 1)
    rates /= rates.sum()
    places = (samples(spec, list(range(count))).queries[:, 0] - 2) // 2
    seen = np.bincount(places, minlength=10)[:10] / count
    # a frequency has standard deviation sqrt(p (1 - p) / n); 5 of them
    np.testing.assert_array_less(np.abs(seen - rates), 5 * np.sqrt(rates / count))
    # without replacement: the second place is drawn from the rates that the first one left
    rates = np.arange(1, 9) ** (power - 1)
    rates /= rates.sum()
    places = (samples(spec, list(range(count)), setting=1).queries - 6) // 2
    second = sum(rates[first] * rates / (1 - rates[first]) * (np.arange(8) != first) for first in range(8))
    seen = np.bincount(places[:, 1], minlength=8) / count
    np.testing.assert_array_less(np.abs(seen - second), 5 * np.sqrt(second / count))


def test_published_settings() -> None:
    shapes = [(setting.length, setting.pairs) for setting in PUBLISHED_TEST]
    assert shapes == [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    rows = {(setting.length, setting.pairs): setting.weight for setting in PUBLISHED_TRAIN}
    drawn = {shape: weight / shape[0] for shape, weight in rows.items()}  # a row of T tokens holds T / length samples
    total = sum(drawn.values())
    shares = {shape: count / total for shape, count in drawn.items()}
    assert shares == pytest.approx(
        {(64, 4): 100 / 180, (128, 8): 20 / 180, (256, 16): 20 / 180, (256, 32): 20 / 180, (256, 64): 20 / 180}
    )
    made = samples(MQARSpec(PUBLISHED_TEST, fillers="any"), [0], setting=6)
    assert made.queries[0].min() >= 512  # full density: every even position of the second half is a query
    assert sorted(made.queries[0].tolist()) == list(range(512, 1024, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": ()}, "settings is empty"),
        (
            {"settings": (MQARSetting(15, 4),)},
            "length 15 with 4 pairs: the length must be at least 16",
        ),
        ({"settings": (MQARSetting(1, 4),), "form": "seq2seq"}, "needs room for the beginning and one query"),
        ({"settings": (MQARSetting(64, 9),), "vocab_size": 48}, "has only 8 keys, expected at least 50"),
        ({"settings": (MQARSetting(64, 9),), "vocab_size": 8}, "has only 0 keys"),
        ({"settings": (MQARSetting(64, 0),)}, "expected at least one pair"),
        ({"settings": (MQARSetting(64, 4), MQARSetting(64, 4, 2.0))}, "twice"),
        ({"settings": (MQARSetting(64, 4, 0.0),)}, "a weight above 0"),
        ({"settings": (MQARSetting(64, 4),), "power": 0.0}, "power=0.0: expected more than 0"),
        ({"settings": (MQARSetting(64, 4),), "form": "seq2seq", "fillers": "any"}, "no meaning in the seq2seq form"),
        ({"settings": (MQARSetting(64, 4),), "fillers": "some"}, "unknown form 'decoder' or fillers 'some'"),
    ],
)
def test_impossible_samples_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MQARSpec(**arguments)


def test_every_key_can_be_used_at_once() -> None:
    spec = MQARSpec((MQARSetting(40, 10),), 2 * (FIRST_KEY + 10))
    keys = samples(spec, [0]).tokens[0, :20:2]
    assert sorted(keys.tolist()) == list(range(FIRST_KEY, FIRST_KEY + 10))


def last_values(context: list[int]) -> dict[int, tuple[int, int]]:
    """The last value of each key of `k v k v ...`, and where it stands."""
    return {context[i]: (context[i + 1], i + 1) for i in range(0, len(context), 2)}


@pytest.mark.parametrize("form", ["decoder", "seq2seq"])
@pytest.mark.parametrize(("updates", "passes"), [(0, 1), (3, 1), (0, 3), (5, 2)])
def test_the_last_value_counts(form: Any, updates: int, passes: int) -> None:
    setting = MQARSetting(64 if form == "decoder" else 5, 5, updates=updates, passes=passes)
    spec = MQARSpec((setting,), vocab_size=64, form=form)
    samples = generate_mqar(spec, setting, np.arange(200), seed=3, stream="test")
    size = setting.context
    assert size == 2 * (5 + updates) * passes
    changed = 0
    for i in range(200):
        tokens = samples.tokens[i].tolist()
        if samples.encoder is None:
            context, start = tokens[:size], 0
        else:
            whole = samples.encoder[i].tolist()
            assert whole[0] == BOS and whole[-1] == EOS and tokens[0] == BOS
            context, start = whole[1:-1], -size - 1
        once = context[: size // passes]
        assert context == once * passes
        assert len(set(once[:10:2])) == 5 and set(once[10::2]) <= set(once[:10:2])
        assert len(set(once[1::2])) == 5 + updates  # every value is new
        last = last_values(context)
        changed += sum(last[key][0] != value for key, value in zip(once[:10:2], once[1:10:2], strict=True))
        for query, gap in zip(samples.queries[i].tolist(), samples.gaps[i].tolist(), strict=True):
            value, place = last[tokens[query]]
            assert samples.labels[i, query] == value
            assert gap == query - (place + start)
        asked = len(samples.queries[i])
        assert (samples.labels[i] != IGNORE).sum() == asked == len(set(np.asarray(tokens)[samples.queries[i]].tolist()))
    assert changed == 200 * updates


def test_special_settings_leave_the_plain_samples_as_they_were() -> None:
    plain = MQARSetting(64, 8)
    spec = MQARSpec((plain, MQARSetting(64, 8, updates=2), MQARSetting(64, 8, passes=2)), vocab_size=256)
    alone = generate_mqar(MQARSpec((plain,), vocab_size=256), plain, np.arange(50), seed=1, stream="a")
    mixed = [generate_mqar(spec, setting, np.arange(50), seed=1, stream="a") for setting in spec.settings]
    np.testing.assert_array_equal(alone.tokens, mixed[0].tokens)
    assert all((mixed[0].tokens[:, :16] != other.tokens[:, :16]).any(axis=1).all() for other in mixed[1:])
    assert [setting.name for setting in spec.settings] == ["64x8", "64x8_updates2", "64x8_passes2"]
    special = MQARSetting(128, 8, updates=3, passes=2)
    assert [MQARSetting.named(setting.name) for setting in (*spec.settings, special)] == [*spec.settings, special]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (MQARSetting(64, 4, updates=5), "4 pairs, 5 updates and 1 passes: expected at most as many updates as pairs"),
        (MQARSetting(64, 4, passes=0), "at least one pass"),
        (MQARSetting(63, 8, updates=4, passes=2), "length must be at least 64, 48 tokens to remember and 2 a query"),
        (MQARSetting(256, 20, updates=20), "has only 36 values, one for each pair and update"),
    ],
)
def test_special_settings_that_cannot_be(setting: MQARSetting, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MQARSpec((setting,), vocab_size=72 if setting.pairs == 20 else 4096)


@pytest.mark.parametrize("form", ["decoder", "seq2seq"])
def test_shards_hold_the_samples_of_the_source_of_that_name(tmp_path: Path, form: Any) -> None:
    """Generated on the fly or stored, sample i of a setting is the same for the same seed and stream."""
    settings = (MQARSetting(20, 3), MQARSetting(20, 3, updates=2), MQARSetting(32, 3, passes=2))
    spec = MQARSpec(settings, vocab_size=128, form=form)
    build_mqar(spec, [30, 20, 10], tmp_path, seed=4, stream="train/recall")
    stored = open_plan([Source("stored", "mqar", shards=tmp_path)], 32, seed=9)
    fly = open_plan([Source("recall", "mqar", mqar=spec)], 32, seed=4)

    def samples(plan: Plan, rows: int) -> dict[bytes, bytes]:
        found = {}
        for number in range(rows):
            row = plan[number]
            for start in sorted(set(row.doc_start[row.valid].tolist())):
                own = (row.doc_start == start) & row.valid
                encoder = b"" if row.encoder_tokens is None else row.encoder_tokens[row.encoder_valid].tobytes()
                found[encoder + row.tokens[own].tobytes()] = row.labels[own].tobytes()
        return found

    there = samples(stored, stored.describe()[0].contents.rows_per_epoch)
    assert len(there) == 60
    made = samples(fly, 200)
    assert there.items() <= made.items()
