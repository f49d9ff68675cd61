"""Rows of the data plan as tensors, the recipe's sources as the plan's, and whether data and model fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slotmamba.config.data import DataConfig, SourceConfig
from slotmamba.config.schema import Recipe
from slotmamba.errors import InputError
from slotmamba.models.slotmamba import IGNORED
from slotmamba.step_rows import StepRows
from slotmamba.world import World
from slotmamba_data import Plan, Reading, Row, Source, Tokenizer, WeightChange, open_plan


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B rows of T tokens.

    input_ids, labels, doc_start: [B, T] int64; valid: [B, T] bool, None when no row has padding, which spares the model
    to look for it; source: [B] int64, index of the row's source;
    encoder_ids [B, S] int64 and encoder_valid [B, S] bool for encoder-decoder models, else None.
    """

    input_ids: Tensor
    labels: Tensor
    doc_start: Tensor
    valid: Tensor | None
    source: Tensor
    encoder_ids: Tensor | None
    encoder_valid: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        """Stacks rows, padding encoder tokens to the longest, and moves them to the device."""

        def stack(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(device=device, dtype=dtype)

        encoder_ids = encoder_valid = None
        if rows[0].encoder_tokens is not None:
            longest = max(len(_encoder(row)[0]) for row in rows)
            padded = [[np.pad(array, (0, longest - len(array))) for array in _encoder(row)] for row in rows]
            encoder_ids = stack([tokens for tokens, _ in padded], torch.long)
            encoder_valid = stack([valid for _, valid in padded], torch.bool)
        return cls(
            input_ids=stack([row.tokens for row in rows], torch.long),
            labels=stack([row.labels for row in rows], torch.long),
            doc_start=stack([row.doc_start for row in rows], torch.long),
            valid=None if all(row.valid.all() for row in rows) else stack([row.valid for row in rows], torch.bool),
            source=torch.tensor([row.source for row in rows], device=device),
            encoder_ids=encoder_ids,
            encoder_valid=encoder_valid,
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a model's `losses`."""
        arguments: dict[str, Any] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "doc_start": self.doc_start,
            "valid": self.valid,
        }
        if self.encoder_ids is not None:
            arguments |= {"encoder_ids": self.encoder_ids, "encoder_valid": self.encoder_valid}
        return arguments


def _encoder(row: Row) -> tuple[np.ndarray, np.ndarray]:
    if row.encoder_tokens is None or row.encoder_valid is None:
        raise InputError("a batch mixes rows with and without encoder tokens: give all sources the same form")
    return row.encoder_tokens, row.encoder_valid


@dataclass(frozen=True)
class RowCounts:
    """Of some rows: positions with a loss, positions that are no padding, and documents left out as unreadable."""

    labelled: int
    valid: int
    skipped: int

    @classmethod
    def of(cls, rows: Sequence[Row], world: World) -> RowCounts:
        """The sums over the rows of all processes."""
        counts = [(int((row.labels != IGNORED).sum()), int(row.valid.sum()), row.skipped) for row in rows]
        return cls(*map(int, world.sum(torch.tensor(counts).sum(0))))


def plan_source(config: SourceConfig, changes: tuple[WeightChange, ...] = ()) -> Source:
    """A recipe's source as the data plan takes it; its changes of weight are given in rows."""
    return Source(
        name=config.name,
        kind=config.kind,
        weight=config.weight,
        shards=config.shards,
        mqar=None if config.mqar is None else config.mqar.spec,
        changes=changes,
        on_exhausted=config.on_exhausted,
    )


def plan_reading(data: DataConfig) -> Reading:
    """How a recipe's rows are made of shards."""
    return Reading(data.packing, data.shuffle_shards, data.on_corrupt, data.remote.settings)


def training_plan(recipe: Recipe, steps: StepRows | None = None) -> Plan:
    """The plan of a recipe's training rows; steps: the rows of the run's steps, if not all are of the recipe's batch.

    Raises:
        InputError: as `open_plan`.
    """
    steps = steps or StepRows.constant(recipe.rows_per_step)
    sources = []
    for config in recipe.data.sources:
        changes = (WeightChange(steps.first_row(each.step), each.weight, each.linear) for each in config.weight_changes)
        sources.append(plan_source(config, tuple(changes)))
    return open_plan(sources, recipe.data.seq_len, recipe.seed, reading=plan_reading(recipe.data))


def validation_plan(recipe: Recipe, source: Source) -> Plan:
    """The plan of a validation source's rows, never those of training.

    Raises:
        InputError: as `open_plan`.
    """
    reading = plan_reading(recipe.data)
    return open_plan([source], recipe.data.seq_len, recipe.seed, split="validation", reading=reading)


def check_data(recipe: Recipe, plans: Sequence[Plan]) -> None:
    """Checks what only the data can tell: that the model can take them.

    Raises:
        InputError: the model has no embedding for a token, the shards are not all of one tokenizer, the recipe's, or a
            source has encoder tokens for a model without encoder, or none for one with it.
    """
    largest = max(plan.vocab_size for plan in plans)
    if largest > recipe.model.vocab_size:
        raise InputError(
            f"model.vocab_size={recipe.model.vocab_size}, but the data have tokens up to {largest - 1}: "
            f"set it to {largest} or more"
        )
    digests = {digest for plan in plans for digest in plan.tokenizers}
    if recipe.data.tokenizer is not None:
        digests.add(Tokenizer(recipe.data.tokenizer).digest)
    if len(digests) > 1:
        raise InputError(
            "data.tokenizer, the training and the validation shards are not of one tokenizer: "
            "build them with the same one"
        )
    for plan in plans:
        for index, source in enumerate(plan.sources):
            if (plan.encoder_length(index) is not None) != (recipe.model.encoder_layers > 0):
                raise InputError(
                    f"source {source.name!r}: samples of the seq2seq form go with an encoder, all others without one, "
                    f"not with model.encoder_layers={recipe.model.encoder_layers}"
                )
