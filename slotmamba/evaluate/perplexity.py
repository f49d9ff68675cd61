"""Perplexity of a run's validation text, beside the entropy of its tokens' frequencies."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from slotmamba.batch import check_data, plan_source, validation_plan
from slotmamba.config.data import SourceConfig
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.errors import InputError, SlotMambaError
from slotmamba.evaluate.pulse import Pulse
from slotmamba.evaluate.validation import Validation
from slotmamba.models import SlotMamba
from slotmamba.tables import table
from slotmamba_data import ShardFolder, Source, Tokenizer


@dataclass(frozen=True)
class SourcePerplexity:
    """One epoch of a text source, every token but the first of each document predicted once.

    source: its name; tokens: predicted tokens; bytes: of UTF-8 text that they stand for, None without a tokenizer;
    loss: mean, in nats a token; perplexity: exp(loss); bits_per_byte: None without a tokenizer;
    unigram_bits_per_token: `unigram_entropy`, what the best constant prediction would get.
    """

    source: str
    tokens: int
    bytes: int | None
    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    unigram_bits_per_token: float


@dataclass(frozen=True)
class PerplexityReport:
    sources: tuple[SourcePerplexity, ...]

    def as_json(self) -> dict[str, Any]:
        return {"sources": [asdict(source) for source in self.sources]}

    def text(self) -> str:
        rows = [
            (
                each.source,
                f"{each.tokens:,}",
                f"{each.loss:.4f}",
                f"{each.perplexity:,.2f}",
                f"{each.bits_per_token:.4f}",
                "-" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}",
                f"{each.unigram_bits_per_token:.4f}",
            )
            for each in self.sources
        ]
        header = ("source", "tokens", "nats/token", "perplexity", "bits/token", "bits/byte", "unigram bits/token")
        lines = [table(header, rows)]
        if any(each.bits_per_byte is None for each in self.sources):
            lines.append("bits/byte needs data.tokenizer, which the recipe does not set")
        return "\n".join(lines)


def evaluate(model: SlotMamba, recipe: Recipe, device: torch.device, pulse: Pulse) -> PerplexityReport:
    """Perplexity on one whole epoch of each validation source of kind lm, packed in rows as in training.

    Raises:
        InputError: there is no such source, or its shards are missing, damaged or not of the run's tokenizer and
            vocabulary.
        SlotMambaError: the loss is not finite.
    """
    sources = [source for source in recipe.data.validation if source.kind == "lm"]
    if not sources:
        raise InputError(
            f"{recipe.name} has no validation text: perplexity needs a source of kind lm in data.validation"
        )
    assert not recipe.model.encoder_layers, "recipes refuse text for models with an encoder"
    tokenizer = None if recipe.data.tokenizer is None else Tokenizer(recipe.data.tokenizer)
    return PerplexityReport(tuple(_measure(model, recipe, source, tokenizer, device, pulse) for source in sources))


def unigram_entropy(source: Source) -> float:
    """Entropy in bits per token of the labels' frequencies in one epoch of a text source.

    No model that predicts the same distribution everywhere has a lower loss on it.

    Raises:
        InputError: the shards are missing or damaged, not text, or have nothing to predict.
    """
    return _entropy(_label_counts(source))


def _label_counts(source: Source) -> np.ndarray:
    """How often each token is a label in one epoch, int64 [vocab_size]: all tokens but the first of each document."""
    if source.shards is None:
        raise InputError(f"source {source.name!r} is not text: expected one of kind lm")
    folder = ShardFolder(source.shards)
    if folder.manifest.kind != "lm":
        raise InputError(f"source {source.name!r}: {folder.location} holds data of kind {folder.manifest.kind}, not lm")
    counts = np.zeros(folder.manifest.vocab_size, dtype=np.int64)
    try:
        for document in range(folder.manifest.documents):
            counts += np.bincount(folder.tokens(document, 1), minlength=len(counts))
    finally:
        folder.close()
    if not counts.any():
        raise InputError(f"source {source.name!r}: {folder.location} has no document of two tokens or more")
    return counts


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _measure(
    model: SlotMamba,
    recipe: Recipe,
    config: SourceConfig,
    tokenizer: Tokenizer | None,
    device: torch.device,
    pulse: Pulse,
) -> SourcePerplexity:
    source = plan_source(config)
    with closing(validation_plan(recipe, source)) as plan:
        check_data(recipe, [plan])
        rows = plan.describe()[0].contents.rows_per_epoch
    assert rows is not None
    counts = _label_counts(source)
    tokens, size = int(counts.sum()), None
    if tokenizer is not None:
        size = int(counts @ [len(tokenizer.token_bytes(token)) for token in range(len(counts))])
    loss = _loss(model, recipe, config, rows, device, pulse)
    bits = loss / math.log(2)
    return SourcePerplexity(
        source=source.name,
        tokens=tokens,
        bytes=size,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_token=bits,
        bits_per_byte=None if size is None else bits * tokens / size,
        unigram_bits_per_token=_entropy(counts),
    )


def _loss(
    model: SlotMamba, recipe: Recipe, source: SourceConfig, rows: int, device: torch.device, pulse: Pulse
) -> float:
    """Mean loss in nats over the first rows of a source."""
    data = recipe.data.model_copy(update={"validation": [source]})
    train = recipe.train.model_copy(update={"eval_rows": rows})
    with closing(Validation(recipe.model_copy(update={"data": data, "train": train}))) as validation:
        records = validation.run(
            model,
            device,
            lambda: compute_precision(device, recipe.train.precision),
            measured=lambda done: pulse.tick(f"{source.name}: {done:,} of {rows:,} rows"),
        )
    assert records is not None
    loss = float(records[0]["loss"])
    if not math.isfinite(loss):
        raise SlotMambaError(f"source {source.name!r}: the loss is {loss}, so the weights are of no use")
    return loss
