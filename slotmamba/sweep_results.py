"""What became of the cells of a sweep, each a run: their states, and what they measured, from metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from slotmamba.config import Recipe
from slotmamba.config.cells import Cell, Sweep
from slotmamba.config.sweep import Settings
from slotmamba.config.sweep_file import CellRecord, is_sweep, read_sweep
from slotmamba.errors import InputError
from slotmamba.runs.folder import RunFolder
from slotmamba.runs.starts import FAILED, FINISHED
from slotmamba.runs.status import CANCELLED, DEAD, UNDER_WAY, Status, status
from slotmamba.runs_jobs import last_jobs, open_run

RECALL, VALIDATION, TRAINING = "recall", "validation loss", "training loss"
MEANING = {
    RECALL: "recall, the mean over all settings of the validation sources",
    VALIDATION: "validation loss, the mean over the validation sources",
    TRAINING: "training loss",
}
Curve = dict[int, float | None]
"""Values of a measure by step; None where they were not finite."""
IN_TROUBLE = (FAILED, CANCELLED, DEAD)
DECISIVE = ("seed", "model", "data", "optim", "train")  # sections of a recipe: what it trains, not where


@dataclass(frozen=True)
class CellResult:
    """A cell, the state of its run, what it measured, and where its jobs' output is."""

    cell: CellRecord
    status: Status
    curves: dict[str, Curve]

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def settings(self) -> Settings:
        return self.cell.settings

    @property
    def is_finished(self) -> bool:
        return self.status.state == FINISHED

    @property
    def output(self) -> Path | None:
        """What the first task of its newest job wrote."""
        outputs = (Path(self.status.path) / "slurm").glob("*_0_log.out")
        return max(outputs, key=lambda path: path.stat().st_mtime, default=None)

    def last(self, measure: str) -> float | None:
        curve = self.curves[measure]
        return curve[max(curve)] if curve else None


@dataclass(frozen=True)
class SweepResults:
    """The cells of a sweep as they are now; problems: a line for each question that Slurm did not answer."""

    name: str
    cells: tuple[CellResult, ...]
    problems: list[str]

    @cached_property
    def measure(self) -> str:
        """What cells are ranked by: recall where all validation is recall, else the loss of validation or training."""
        return next((each for each in MEANING if any(cell.curves[each] for cell in self.cells)), TRAINING)

    @cached_property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for cell in self.cells for key in cell.settings))

    @cached_property
    def ranked(self) -> list[CellResult]:
        """Cells that are finished come first, the best of them in front."""

        def rank(cell: CellResult) -> tuple[bool, bool, float, float]:
            value, loss = cell.last(self.measure), cell.last(VALIDATION)
            least = 0.0 if value is None else -value if self.measure == RECALL else value
            return not cell.is_finished, value is None, least, 0.0 if loss is None else loss

        return sorted(self.cells, key=rank)


def sweep_results(folder: Path) -> SweepResults:
    """
    Raises:
        InputError: sweep.json is damaged.
        OSError: it is not the folder of a sweep, or a file cannot be read.
    """
    record = read_sweep(folder)
    runs = [open_run(folder / cell.name) for cell in record.cells]
    jobs = last_jobs(runs)
    cells = [
        CellResult(cell, status(cell.name, run, jobs.jobs.get(run.path)), _curves(run.metrics[0]))
        for cell, run in zip(record.cells, runs, strict=True)
    ]
    return SweepResults(record.name, tuple(cells), jobs.problems)


def not_to_submit(sweep: Sweep) -> dict[str, list[Cell]]:
    """The cells of a sweep that there is nothing to submit for, by the reason in words.

    Raises:
        InputError: Slurm does not say which are queued, or sweep.json is damaged.
        OSError: a file cannot be read.
    """
    folder = sweep.recipe.run_path
    results = sweep_results(folder) if is_sweep(folder) else SweepResults(sweep.recipe.name, (), [])
    if results.problems:
        raise InputError(f"{results.problems[0]}: whether cells are queued already is not known")
    found = {cell.name: cell.status for cell in results.cells}
    known = [(cell, found[cell.name].state) for cell in sweep.cells if cell.name in found]
    return {
        "already finished": [cell for cell, state in known if state == FINISHED and _is_as_trained(cell.recipe)],
        "queued or running already": [cell for cell, state in known if state in UNDER_WAY],
    }


def _is_as_trained(recipe: Recipe) -> bool:
    """Whether the last start of a run was of this recipe, as far as it says what is trained."""
    trained, wanted = RunFolder(recipe.run_path).recipe, recipe.model_dump(mode="json")
    return all(trained.get(key) == wanted[key] for key in DECISIVE)


def _curves(records: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    validations: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "validation":
            validations.setdefault(record["step"], []).append(record)
    recalls = {
        step: [[value for key, value in record.items() if key.startswith("recall/")] for record in at_step]
        for step, at_step in validations.items()
    }
    only_recall = all(values for at_step in recalls.values() for values in at_step)
    return {
        RECALL: {step: _mean(list(chain(*values))) for step, values in recalls.items()} if only_recall else {},
        VALIDATION: {step: _mean([record.get("loss") for record in at_step]) for step, at_step in validations.items()},
        TRAINING: {record["step"]: record.get("loss") for record in records if record.get("kind") == "train"},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if len(finite) == len(values) else None


def setting_text(value: Any) -> str:
    """A value that a cell tries, as tables and plots show it."""
    return value if isinstance(value, str) else json.dumps(value)
