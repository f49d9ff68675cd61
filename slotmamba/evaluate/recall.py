"""Recall by setting and by the gap between a value and the query for it: on the published MQAR test settings, and on
those of the run's own whose keys are written again or whose pairs are shown several times."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slotmamba.config.data import SourceConfig
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.errors import InputError
from slotmamba.evaluate.pulse import Pulse
from slotmamba.models import SlotMamba
from slotmamba.plots import render
from slotmamba.tables import table
from slotmamba_data import PUBLISHED_TEST, MQARSamples, MQARSetting, MQARSpec, ShardFolder, generate_mqar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = 1000  # of each setting, as published


@dataclass(frozen=True)
class GapRecall:
    """Recall at queries whose gap, in tokens from the value to the query, is at least `first` and less than `past`."""

    first: int
    past: int
    answers: int
    recall: float


@dataclass(frozen=True)
class SettingRecall:
    """Recall at one setting: the share of queries whose likeliest token, of the whole vocabulary, is the value.

    length, pairs, updates, passes: of the samples (`MQARSetting`); trained: whether training has samples as long, and
    samples with as many pairs; gaps: buckets [2^i, 2^(i+1)) with queries.
    """

    length: int
    pairs: int
    updates: int
    passes: int
    trained: bool
    recall: float
    gaps: tuple[GapRecall, ...]

    @property
    def published(self) -> bool:
        """Whether it is one of the published settings, which have neither updates nor several passes."""
        return not self.updates and self.passes == 1

    @property
    def name(self) -> str:
        return MQARSetting(self.length, self.pairs, updates=self.updates, passes=self.passes).title


@dataclass(frozen=True)
class RecallReport:
    """spec: the samples; settings: results, the published settings first; left_out: published settings whose pairs the
    vocabulary has no keys for."""

    spec: MQARSpec
    samples: int
    settings: tuple[SettingRecall, ...]
    left_out: tuple[MQARSetting, ...]

    @property
    def mean(self) -> float:
        """Over the published settings."""
        return float(np.mean([setting.recall for setting in self.settings if setting.published]))

    @property
    def gaps(self) -> tuple[GapRecall, ...]:
        """Recall by gap over the queries of all settings."""
        buckets: dict[tuple[int, int], list[GapRecall]] = {}
        for gap in (gap for setting in self.settings for gap in setting.gaps):
            buckets.setdefault((gap.first, gap.past), []).append(gap)
        pooled = []
        for (first, past), some in sorted(buckets.items()):
            answers = sum(gap.answers for gap in some)
            pooled.append(GapRecall(first, past, answers, sum(gap.answers * gap.recall for gap in some) / answers))
        return tuple(pooled)

    def as_json(self) -> dict[str, Any]:
        spec = {name: getattr(self.spec, name) for name in ("form", "vocab_size", "fillers", "power")}
        return {
            "mqar": spec,
            "samples_per_setting": self.samples,
            "mean": self.mean,
            "settings": [asdict(setting) for setting in self.settings],
            "gaps": [asdict(gap) for gap in self.gaps],
            "left_out": [{"length": each.length, "pairs": each.pairs} for each in self.left_out],
        }

    def text(self) -> str:
        pooled = self.gaps
        rows = []
        for setting in self.settings:
            by_gap = {gap.first: f"{gap.recall:.3f}" for gap in setting.gaps}
            name = f"{setting.name}{'' if setting.trained else ' *'}"
            rows.append((name, f"{setting.recall:.3f}", *(by_gap.get(gap.first, "") for gap in pooled)))
        rows.append(("all queries", "", *(f"{gap.recall:.3f}" for gap in pooled)))
        header = ("setting", "recall", *(f"gap {gap.first}-{gap.past - 1}" for gap in pooled))
        published = sum(setting.published for setting in self.settings)
        kind = "settings" if published == len(self.settings) else "published settings"
        lines = [
            table(header, rows),
            f"mean of {published} {kind}: {self.mean:.3f} ({self.samples} samples each, "
            f"vocabulary {self.spec.vocab_size}, fillers {self.spec.fillers}, form {self.spec.form})",
        ]
        if not all(setting.trained for setting in self.settings):
            lines.append("* longer or with more pairs than anything in training")
        if self.left_out:
            names = ", ".join(f"({each.length}, {each.pairs})" for each in self.left_out)
            lines.append(
                f"not measured, as the vocabulary has {self.spec.num_keys} keys only: (length, pairs) {names}; "
                "the mean is not the published one"
            )
        return "\n".join(lines)

    def plot(self, title: str) -> bytes:
        """PNG of recall over the gap, one curve a setting."""

        def draw(axes: Axes) -> None:
            for setting in self.settings:
                centres = [(gap.first * gap.past) ** 0.5 for gap in setting.gaps]
                recalls = [gap.recall for gap in setting.gaps]
                label = f"{setting.name}: {setting.recall:.3f}"
                style = "-" if setting.published else "--"
                axes.plot(centres, recalls, style, marker="o", markersize=4, label=label)
            axes.set_xscale("log", base=2)
            axes.set_ylim(-0.02, 1.02)
            axes.set_ylabel("recall (share of answers that are right)")

        image = render(title, "tokens from value to query", draw)
        assert image is not None
        return image


def evaluate(
    model: SlotMamba, recipe: Recipe, device: torch.device, pulse: Pulse, samples: int = SAMPLES
) -> RecallReport:
    """Recall on fresh samples of those of the seven published test settings that the vocabulary has keys for, and of
    the run's own settings with updates or several passes.

    Vocabulary, fillers and form are those of the run's first recall source. A run without one is asked with the
    published vocabulary.

    Raises:
        InputError: the model's vocabulary is smaller than that of the samples, or too small for any setting.
    """
    spec = _spec(recipe)
    if spec.vocab_size > recipe.model.vocab_size:
        raise InputError(
            f"recall samples have a vocabulary of {spec.vocab_size} tokens, the model of {recipe.name} has "
            f"{recipe.model.vocab_size}: recall is for runs with a source of kind mqar, or a vocabulary that large"
        )
    settings = [setting for setting in PUBLISHED_TEST if setting.pairs <= spec.num_keys]
    if not settings:
        raise InputError(
            f"the recall samples of {recipe.name} have {spec.num_keys} keys, fewer than any published setting needs"
        )
    left_out = tuple(setting for setting in PUBLISHED_TEST if setting not in settings)
    settings += _special(recipe, spec)
    return RecallReport(
        spec=replace(spec, settings=tuple(settings)),
        samples=samples,
        settings=tuple(_measure(model, recipe, spec, setting, samples, device, pulse) for setting in settings),
        left_out=left_out,
    )


def _special(recipe: Recipe, spec: MQARSpec) -> list[MQARSetting]:
    """The run's settings with updates or several passes, of sources whose samples are otherwise those of `spec`."""
    found: dict[str, MQARSetting] = {}
    for source in (*recipe.data.validation, *recipe.data.sources):
        if source.kind == "mqar" and replace(own := _source_spec(source), settings=spec.settings) == spec:
            special = (setting for setting in own.settings if setting.updates or setting.passes > 1)
            found |= {setting.name: setting for setting in special}
    return list(found.values())


def _spec(recipe: Recipe) -> MQARSpec:
    """The samples of the run's first recall source, else the published ones."""
    for source in (*recipe.data.validation, *recipe.data.sources):
        if source.kind == "mqar":
            return _source_spec(source)
    return MQARSpec(PUBLISHED_TEST, form="seq2seq" if recipe.model.encoder_layers else "decoder")


def _source_spec(source: SourceConfig) -> MQARSpec:
    if source.mqar is not None:
        return source.mqar.spec
    assert source.shards is not None
    folder = ShardFolder(source.shards)
    content = folder.manifest.about.get("spec")
    if content is None:
        raise InputError(
            f"source {source.name!r}: {folder.location} does not say what samples it holds; build it again"
        )
    settings = tuple(MQARSetting(**setting) for setting in content["settings"])
    return MQARSpec(**(content | {"settings": settings}))


def _measure(
    model: SlotMamba,
    recipe: Recipe,
    spec: MQARSpec,
    setting: MQARSetting,
    samples: int,
    device: torch.device,
    pulse: Pulse,
) -> SettingRecall:
    # As many tokens at once as in training.
    batch = max(1, recipe.train.micro_batch * recipe.data.seq_len // setting.length)
    gaps, right = [], []
    for first in range(0, samples, batch):
        pulse.tick(f"{setting.title}: {first:,} of {samples:,} samples")
        numbers = np.arange(first, min(first + batch, samples))
        drawn = generate_mqar(spec, setting, numbers, seed=recipe.seed, stream="evaluation")
        gaps.append(drawn.gaps.ravel())
        right.append(_right(model, drawn, device, recipe.train.precision).ravel())
    seen = [each for source in recipe.data.sources if source.kind == "mqar" for each in _source_spec(source).settings]
    trained = any(each.length >= setting.length for each in seen) and any(each.pairs >= setting.pairs for each in seen)
    all_gaps, all_right = np.concatenate(gaps), np.concatenate(right)
    found = float(all_right.mean())
    pulse.say(f"{setting.title}: recall {found:.3f}")
    return SettingRecall(
        length=setting.length,
        pairs=setting.pairs,
        updates=setting.updates,
        passes=setting.passes,
        trained=trained,
        recall=found,
        gaps=_by_gap(all_gaps, all_right),
    )


@torch.no_grad()
def _right(model: SlotMamba, samples: MQARSamples, device: torch.device, precision: str) -> np.ndarray:
    """Whether the likeliest token at each query is the value, bool [n, queries] as `samples.queries`."""
    inputs = {"input_ids": samples.tokens, "labels": samples.labels}
    if samples.encoder is not None:
        inputs["encoder_ids"] = samples.encoder
    with compute_precision(device, precision):
        losses = model.losses(**{name: torch.from_numpy(array).to(device) for name, array in inputs.items()})
    right = np.zeros(samples.tokens.shape, dtype=bool)
    right[losses.row.cpu(), losses.position.cpu()] = losses.correct.cpu()
    return np.take_along_axis(right, samples.queries, axis=1)


def _by_gap(gaps: np.ndarray, right: np.ndarray) -> tuple[GapRecall, ...]:
    """Buckets of gaps from one power of two to the next."""
    exponents = np.log2(gaps).astype(int)
    buckets = []
    for exponent in map(int, np.unique(exponents)):
        here = right[exponents == exponent]
        buckets.append(GapRecall(2**exponent, 2 ** (exponent + 1), len(here), float(here.mean())))
    return tuple(buckets)
