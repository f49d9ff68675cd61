"""One optimizer step on a global batch, which is tokens: the same for any accumulation and any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slotmamba.batch import Batch, RowCounts
from slotmamba.config.schema import Recipe
from slotmamba.engines import Engine
from slotmamba.errors import TrainingError
from slotmamba_data import PlanReader, Row


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all processes: mean loss in nats a labelled token, the same by source, what its rows
    held, gradient norm before clipping."""

    loss: float
    source_losses: dict[str, float]
    rows: RowCounts
    balance: float
    grad_norm: float
    skipped: bool


class GlobalStep:
    """Makes the steps of a recipe with an engine. Every process takes its part of the rows of each global batch."""

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        self.recipe = recipe
        self.engine = engine
        self.world = engine.world
        self.sources = [source.name for source in recipe.data.sources]

    def __call__(self, reader: PlanReader, lr: float) -> StepResult:
        """One step on the next global batch, unless its loss or gradient are not finite.

        Raises:
            TrainingError: no position of the batch has a label.
        """
        first = reader.samples_consumed
        rows = reader.next_batch(self.recipe.rows_per_step, self.world.rank, self.world.size)
        counted = RowCounts.of(rows, self.world)
        tokens = counted.labelled
        if tokens == 0:
            last = reader.samples_consumed - 1
            raise TrainingError(f"rows {first} to {last}, those of one step: no position has a label")
        # Nats and labelled tokens of each source, one more line for the balance term.
        sums = torch.zeros(len(self.sources) + 1, 2, dtype=torch.float64, device=self.world.device)
        batches = list(self._micro_batches(rows))
        for number, micro in enumerate(batches):
            self._accumulate(micro, tokens, sums, last=number + 1 == len(batches))
        sums = self.world.sum(sums)
        norm = self.engine.gradient_norm()
        nats, counts = sums[:-1, 0], sums[:-1, 1]
        finite = bool(torch.isfinite(nats.sum()) & torch.isfinite(norm))
        if finite:
            self.engine.step(lr, norm)
        else:
            self.engine.discard()
        return StepResult(
            loss=float(nats.sum() / tokens),
            source_losses=self._by_source(nats, counts),
            rows=counted,
            balance=float(sums[-1, 0]),
            grad_norm=float(norm),
            skipped=not finite,
        )

    def _accumulate(self, micro: Batch, tokens: int, sums: Tensor, last: bool) -> None:
        """Gradients of a micro-batch, and its share of the step's sums. All terms are sums over tokens or rows,
        divided by the count of the whole global batch."""
        losses = self.engine.losses(**micro.arguments())
        balance = losses.balance * (len(micro.input_ids) / self.recipe.rows_per_step)
        loss = (losses.nll.sum() + self.recipe.optim.z_loss * losses.z.sum()) / tokens
        self.engine.backward(loss + self.recipe.model.slots.balance * balance, last)
        source = micro.source[losses.row]
        nats = losses.nll.detach().double()
        sums.index_add_(0, source, torch.stack([nats, torch.ones_like(nats)], 1))
        sums[-1, 0] += balance.detach()

    def _micro_batches(self, rows: list[Row]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.recipe.train.micro_batch):
            yield Batch.of(rows[start : start + self.recipe.train.micro_batch], self.world.device)

    def _by_source(self, nats: Tensor, counts: Tensor) -> dict[str, float]:
        return {
            source: float(total / count)
            for source, total, count in zip(self.sources, nats.cpu(), counts.cpu(), strict=True)
            if count > 0
        }
