"""Validation on fixed rows: loss, bits per token, and recall by setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slotmamba.batch import Batch, plan_source, validation_plan
from slotmamba.config.schema import Recipe
from slotmamba.models import SlotMamba
from slotmamba.models.slotmamba import TokenLosses
from slotmamba.world import World
from slotmamba_data import Plan, Source


@dataclass(frozen=True)
class _Part:
    """One thing to measure: a source, or one setting of a recall source, with a plan of its own."""

    source: str
    recall: str | None
    plan: Plan


class Validation:
    """The validation sources of a recipe, opened once; every call measures the same rows."""

    def __init__(self, recipe: Recipe) -> None:
        self._rows = recipe.train.eval_rows
        self._micro_batch = recipe.train.micro_batch
        self._parts = [
            _Part(source.name, recall, validation_plan(recipe, part))
            for source in map(plan_source, recipe.data.validation)
            for recall, part in _parts(source)
        ]

    @property
    def plans(self) -> list[Plan]:
        return [part.plan for part in self._parts]

    def close(self) -> None:
        """Closes the files; they open again when needed."""
        for plan in self.plans:
            plan.close()

    @torch.no_grad()
    def run(
        self,
        model: SlotMamba,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        stop: Callable[[], bool] = lambda: False,
        measured: Callable[[int], None] = lambda rows: None,
        world: World | None = None,
    ) -> list[dict[str, float | str]] | None:
        """One record a source: loss in nats a token, bits_per_token, recall/SETTING (such as 64x8) of generated
        recall samples, recall/all of those from shards.

        `stop` is asked between batches; once it holds the measurement is given up and the result is None. `measured` is
        told after each batch how many rows of a source, or of a recall setting, are done. The processes of a `world`
        share the rows; all get the same records, and all make the same number of forward passes.
        """
        world = world or World.alone(device)
        training = model.training
        model.eval()
        records: dict[str, dict[str, float | str]] = {}
        totals: dict[str, Tensor] = {}
        try:
            for part in self._parts:
                counts = torch.zeros(3, dtype=torch.float64)  # nats, correct, tokens
                done = 0
                for batch, counted in self._batches(part.plan, device, world):
                    if stop():
                        return None
                    with autocast():
                        losses = model.losses(**batch.arguments())
                    if counted:
                        counts += _counts(losses)
                    done = min(done + world.size * self._micro_batch, self._rows)
                    measured(done)
                counts = world.sum(counts)
                record = records.setdefault(part.source, {"source": part.source})
                if part.recall is not None:
                    record[f"recall/{part.recall}"] = float(counts[1] / counts[2])
                totals[part.source] = totals.get(part.source, torch.zeros_like(counts)) + counts
        finally:
            model.train(training)
        for source, (nats, _, tokens) in totals.items():
            loss = float(nats / tokens)
            records[source] |= {"loss": loss, "bits_per_token": loss / math.log(2)}
        return list(records.values())

    def _batches(self, plan: Plan, device: torch.device, world: World) -> Iterator[tuple[Batch, bool]]:
        """This process's micro-batches, and whether they count: where the rows do not go round, a process that has none
        computes on a row that another one counts, because sharded weights are gathered by all together."""
        for start in range(0, self._rows, world.size * self._micro_batch):
            first = start + world.rank * self._micro_batch
            numbers = range(first, min(first + self._micro_batch, self._rows))
            yield Batch.of([plan[number] for number in numbers or [start]], device), len(numbers) > 0


def _counts(losses: TokenLosses) -> Tensor:
    """Nats, correct tokens, tokens."""
    return torch.stack([losses.nll, losses.correct, torch.ones_like(losses.nll)]).double().sum(1).cpu()


def _parts(source: Source) -> list[tuple[str | None, Source]]:
    """A generated recall source falls apart into its settings, so that recall can be told by setting."""
    if source.mqar is None:
        return [("all" if source.kind == "mqar" else None, source)]
    return [
        (setting.name, replace(source, mqar=replace(source.mqar, settings=(setting,))))
        for setting in source.mqar.settings
    ]
