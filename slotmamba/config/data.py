"""The section `data`: sources of text and of recall samples."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slotmamba.config.section import Name, Section
from slotmamba_data import mqar_spec


class MQARSetting(Section):
    length: int = Field(ge=4, description="Tokens of a sample (of the decoder's input in the seq2seq form).")
    pairs: int = Field(ge=1, description="Key-value pairs of a sample.")
    weight: float = Field(
        1.0, gt=0, description="Share of the source's rows with this setting, relative to the others."
    )


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
        settings = tuple(mqar_spec.MQARSetting(each.length, each.pairs, each.weight) for each in self.settings)
        return mqar_spec.MQARSpec(settings, self.vocab_size, self.form, self.fillers, self.power)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.spec
        return self


class SourceConfig(Section):
    name: Name = Field(description="Name in logs and metrics.")
    kind: Literal["lm", "mqar"] = Field(
        "lm", description="`lm`: shards of tokenised text; `mqar`: synthetic recall, generated or from shards."
    )
    shards: str | None = Field(
        None, description="Folder written by `slotmamba data build`; not needed for generated mqar."
    )
    weight: float = Field(1.0, gt=0, description="Share of the tokens, relative to the other sources.")
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
        return self


class DataConfig(Section):
    seq_len: int = Field(1024, ge=1, description="Tokens of a row.")
    tokenizer: str | None = Field(None, description="Sentencepiece model that made the shards; `generate` needs it.")
    packing: Literal["concat"] = Field(
        "concat", description="`concat`: documents one after the other, cut at row ends."
    )
    sources: list[SourceConfig] = Field(min_length=1, description="Training sources and their weights.")
    validation: list[SourceConfig] = Field([], description="Validation sources, each evaluated on its own.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("sources", "validation"):
            names = [source.name for source in getattr(self, key)]
            if len(set(names)) != len(names):
                raise ValueError(f"data.{key}: the names {names} are not distinct")
        return self
