"""What became of the cells of a sweep: from their metrics.jsonl, the files of their jobs and Slurm's queue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from slotmamba.config import Recipe
from slotmamba.config.sweep_file import CellRecord, read_sweep
from slotmamba.metrics import read_metrics
from slotmamba_slurm import jobs

RECALL, VALIDATION, TRAINING = "recall", "validation loss", "training loss"
MEANING = {
    RECALL: "recall, the mean over all settings of the validation sources",
    VALIDATION: "validation loss, the mean over the validation sources",
    TRAINING: "training loss",
}
Curve = dict[int, float | None]
"""Values of a measure by step; None where they were not finite."""


@dataclass(frozen=True)
class CellResult:
    """A cell with its state (done, failed, stopped, running, pending, ... as Slurm says it), what it measured, and the
    output of its job."""

    cell: CellRecord
    state: str
    step: int
    curves: dict[str, Curve]
    output: Path | None

    def last(self, measure: str) -> float | None:
        curve = self.curves[measure]
        return curve[max(curve)] if curve else None


@dataclass(frozen=True)
class SweepResults:
    """The cells of a sweep as they are now."""

    name: str
    cells: tuple[CellResult, ...]

    @cached_property
    def measure(self) -> str:
        """What cells are ranked by: recall where all validation is recall, else the loss of validation or training."""
        return next((each for each in MEANING if any(cell.curves[each] for cell in self.cells)), TRAINING)

    @cached_property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for cell in self.cells for key in cell.cell.settings))

    @cached_property
    def ranked(self) -> list[CellResult]:
        """Cells that are done come first, the best of them in front."""

        def rank(cell: CellResult) -> tuple[bool, float, float]:
            worst = float("inf")
            values = [worst if value is None else value for value in map(cell.last, (self.measure, VALIDATION))]
            return (
                cell.state != "done",
                -values[0] if self.measure == RECALL and values[0] < worst else values[0],
                values[1],
            )

        return sorted(self.cells, key=rank)


def is_done(run_dir: Path, steps: int, validates: bool) -> bool:
    """Whether a run has made `steps` steps, validated after the last where it `validates`, and saved that."""
    from slotmamba.checkpoint.manifest import committed_steps

    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    if _last_step(records, "train") < steps or (validates and _last_step(records, "validation") < steps):
        return False
    return max(committed_steps(run_dir / "checkpoints"), default=0) >= steps


def is_finished(recipe: Recipe) -> bool:
    """Whether the run of a recipe is at its end."""
    return is_done(recipe.run_path, recipe.train.total_steps, bool(recipe.data.validation))


def sweep_results(folder: Path) -> SweepResults:
    """
    Raises:
        InputError: a file in `folder` is damaged.
        OSError: it is not the folder of a sweep, or Slurm does not answer.
    """
    record = read_sweep(folder)
    queue = jobs.queued_jobs() if record.in_slurm else {}
    return SweepResults(record.name, tuple(_cell_result(folder, cell, queue) for cell in record.cells))


def _cell_result(folder: Path, cell: CellRecord, queue: dict[str, str] | None) -> CellResult:
    run_dir = folder / cell.name
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    state = "done" if is_done(run_dir, cell.steps, cell.validates) else _state(folder / "slurm", cell, queue)
    output = jobs.output(folder / "slurm", cell.job) if cell.job is not None else None
    return CellResult(cell, state, _last_step(records, "train"), _curves(records), output)


def _state(job_files: Path, cell: CellRecord, queue: dict[str, str] | None) -> str:
    """Of a cell that is not done."""
    if cell.job is None:
        return "pending"
    queued = queue.get(cell.job) if queue else None
    result = jobs.result(job_files, cell.job)
    if result is not None and queued != "PENDING":
        return "failed" if result == "error" else "stopped"
    if cell.host is not None:
        return "running" if jobs.lives(cell.job, cell.host) else "failed"
    if queue is None:
        return "unknown"
    return queued.lower() if queued else "failed"


def _last_step(records: Sequence[dict[str, Any]], kind: str) -> int:
    return max((record["step"] for record in records if record["kind"] == kind), default=0)


def _curves(records: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    validations: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "validation":
            validations.setdefault(record["step"], []).append(record)
    recalls = {
        step: [[value for key, value in record.items() if key.startswith("recall/")] for record in at_step]
        for step, at_step in validations.items()
    }
    only_recall = all(values for at_step in recalls.values() for values in at_step)
    return {
        RECALL: {step: _mean(list(chain(*values))) for step, values in recalls.items()} if only_recall else {},
        VALIDATION: {step: _mean([record["loss"] for record in at_step]) for step, at_step in validations.items()},
        TRAINING: {record["step"]: record["loss"] for record in records if record["kind"] == "train"},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if len(finite) == len(values) else None


def setting_text(value: Any) -> str:
    """A value that a cell tries, as tables and plots show it."""
    return value if isinstance(value, str) else json.dumps(value)
