"""The section `data`: sources of text and of recall samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from slotmamba.config.section import Name, Section
from slotmamba_data import mqar_spec, schedule

if TYPE_CHECKING:
    from slotmamba_data.remote import RemoteSettings


class MQARSetting(Section):
    length: int = Field(ge=4, description="Tokens of a sample (of the decoder's input in the seq2seq form).")
    pairs: int = Field(ge=1, description="Key-value pairs of a sample.")
    weight: float = Field(
        1.0, gt=0, description="Share of the source's rows with this setting, relative to the others."
    )
    updates: int = Field(
        0, ge=0, description="Keys that are written a second time, after all pairs; the last value counts (forgetting)."
    )
    passes: int = Field(1, ge=1, description="How often pairs and updates are shown, one time after the other.")


class MQARConfig(Section):
    form: Literal["decoder", "seq2seq"] = Field(
        "decoder",
        description="`decoder`: pairs and queries in one sequence; "
        "`seq2seq`: the encoder sees the pairs, the decoder the queries.",
    )
    settings: list[MQARSetting] = Field(min_length=1, description="Lengths and numbers of pairs to mix.")
    vocab_size: int = Field(8192, ge=8, description="Tokens: keys in the lower half, values in the upper half.")
    fillers: Literal["outside", "any"] = Field(
        "outside",
        description="Filler tokens: `outside` of the keys and values, or `any` token (the published behaviour).",
    )
    power: float = Field(
        0.01, gt=0, description="Exponent of the power law of query gaps; small means close to the pairs."
    )

    @property
    def spec(self) -> mqar_spec.MQARSpec:
        """The same as the data pipeline takes it; raises ValueError where no such samples exist."""
        settings = tuple(mqar_spec.MQARSetting(**each.model_dump()) for each in self.settings)
        return mqar_spec.MQARSpec(settings, self.vocab_size, self.form, self.fillers, self.power)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.spec
        return self


class WeightChange(Section):
    step: int = Field(
        ge=1, description="Steps after which the weight holds, or which a linear change takes to get there."
    )
    weight: float = Field(ge=0, description="The weight from then on; 0 leaves the source out.")
    linear: bool = Field(False, description="Go there in a straight line from the change before, or from the start.")


class SourceConfig(Section):
    name: Name = Field(description="Name in logs and metrics.")
    kind: Literal["lm", "mqar"] = Field(
        "lm", description="`lm`: shards of tokenised text; `mqar`: synthetic recall, generated or from shards."
    )
    shards: str | None = Field(
        None, description="Folder written by `slotmamba data build`, or its URL; not needed for generated mqar."
    )
    weight: float = Field(1.0, ge=0, description="Share of the tokens, relative to the other sources.")
    weight_changes: list[WeightChange] = Field(
        [], description="A curriculum: how the weight changes later, at rising steps."
    )
    on_exhausted: Literal["repeat", "stop"] = Field(
        "repeat",
        description="After an epoch: `repeat` in a new order, or `stop`: the run ends where the next one would begin.",
    )
    mqar: MQARConfig | None = Field(
        None, description="Settings of generated recall samples (kind mqar without shards)."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "lm" and self.shards is None:
            raise ValueError(
                f"source {self.name!r} of kind lm needs `shards`, a folder written by `slotmamba data build`"
            )
        if self.kind == "lm" and self.mqar is not None:
            raise ValueError(f"source {self.name!r} is of kind lm, `mqar` has no meaning there")
        if self.kind == "mqar" and (self.shards is None) == (self.mqar is None):
            raise ValueError(f"source {self.name!r} of kind mqar needs either `mqar` settings or `shards`, one of them")
        if self.mqar is not None and self.on_exhausted == "stop":
            raise ValueError(f"source {self.name!r}: on_exhausted=stop, but generated samples never run out")
        steps = [change.step for change in self.weight_changes]
        if steps != sorted(set(steps)):
            raise ValueError(f"source {self.name!r}: weight_changes at steps {steps}, expected rising ones")
        if not any([self.weight, *(change.weight for change in self.weight_changes)]):
            raise ValueError(f"source {self.name!r} never has a weight above 0")
        return self


class RemoteConfig(Section):
    cache: str | None = Field(
        None, description="Folder for what was fetched; null is one for this user in the folder for temporary files."
    )
    cache_gib: float = Field(
        32.0, ge=1 / 256, description="How large it may become, in GiB, 4 MiB at least; processes share it."
    )
    attempts: int = Field(10, ge=1, description="Tries of a request, with growing waits, before it is an error.")
    timeout: float = Field(
        30.0, gt=0, le=86400, description="Seconds without any data after which a request has failed."
    )

    @property
    def settings(self) -> RemoteSettings:
        from slotmamba_data.remote import RemoteSettings

        return RemoteSettings(self.cache, int(self.cache_gib * 2**30), self.attempts, self.timeout)


class DataConfig(Section):
    seq_len: int = Field(1024, ge=1, description="Tokens of a row.")
    tokenizer: str | None = Field(
        None, description="Sentencepiece model or tokenizer.json that made the shards; `generate` needs it."
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="`concat`: documents one after the other, cut at row ends; `best_fit`: documents whole where a row "
        "can hold them, the largest first where the least room is left. Recall samples are always whole.",
    )
    shuffle_shards: int = Field(
        16,
        ge=1,
        le=32,
        description="Shards that are shuffled together: their documents, then their rows. Readers need so many at a "
        "time, and memory for their documents.",
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error", description="Documents that cannot be read: an `error`, or `skip` and count them."
    )
    workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that read rows ahead, for each training process; 0 reads them when they are due. "
        "The rows are the same.",
    )
    remote: RemoteConfig = Field(RemoteConfig(), description="How shards behind a URL are read.")
    sources: list[SourceConfig] = Field(min_length=1, description="Training sources and their weights.")
    validation: list[SourceConfig] = Field([], description="Validation sources, each evaluated on its own.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("sources", "validation"):
            names = [source.name for source in getattr(self, key)]
            if len(set(names)) != len(names):
                raise ValueError(f"data.{key}: the names {names} are not distinct")
        self._check_weights()
        for source in self.validation:
            if source.weight_changes or source.on_exhausted == "stop":
                raise ValueError(
                    f"data.validation: source {source.name!r} is evaluated on its own, `weight_changes` and "
                    "`on_exhausted` have no meaning there"
                )
        return self

    def _check_weights(self) -> None:
        """At every step some source must have a weight above 0."""
        changes = [
            [schedule.WeightChange(change.step, change.weight, change.linear) for change in source.weight_changes]
            for source in self.sources
        ]
        for piece in schedule.mixture([source.weight for source in self.sources], changes):
            if not any(piece.weights):
                raise ValueError(f"data.sources: after step {piece.first} no source has a weight above 0")
