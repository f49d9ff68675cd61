"""The shape of a training row, from the recipe alone."""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.config.data import SourceConfig
from slotmamba.config.schema import Recipe


@dataclass(frozen=True)
class RowShape:
    """A row of training data.

    tokens: of the decoder, T; encoder_tokens: of the encoder, S, 0 without one; labelled: share of the T positions that
    have a label, a mean over the sources; padded: whether rows have padding as a rule.
    """

    tokens: int
    encoder_tokens: int
    labelled: float
    padded: bool


def row_shape(recipe: Recipe) -> RowShape:
    """The row that the training sources make.

    Text has a label everywhere, and no padding but in the last row of an epoch, or in rows that documents are
    fitted into. Generated recall samples say how many labels and encoder tokens they have; the longest encoder row
    counts, as shorter ones are padded to it. Recall samples from shards, which need not be there yet, are taken to
    have a label everywhere and as many encoder tokens as decoder tokens, which is the most they can cost.
    """
    sources, length = recipe.data.sources, recipe.data.seq_len
    weight = sum(source.weight for source in sources)
    return RowShape(
        tokens=length,
        encoder_tokens=max(_encoder_tokens(source, length) for source in sources) if recipe.model.encoder_layers else 0,
        labelled=sum(source.weight * _labelled(source, length) for source in sources) / weight,
        padded=recipe.data.packing == "best_fit" or any(source.kind != "lm" for source in sources),
    )


def _encoder_tokens(source: SourceConfig, length: int) -> int:
    return length if source.mqar is None else source.mqar.spec.encoder_length or 0


def _labelled(source: SourceConfig, length: int) -> float:
    """Labels a position; the weights of settings are shares of rows."""
    if source.mqar is None:
        return 1.0
    labels = weight = 0.0
    for setting in source.mqar.settings:
        if source.mqar.form == "seq2seq":
            queries = min(setting.pairs, setting.length - 1)
        else:
            queries = setting.pairs * (length // setting.length)
        labels += setting.weight * queries
        weight += setting.weight
    return labels / weight / length
