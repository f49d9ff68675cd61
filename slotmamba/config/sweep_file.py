"""RUN_DIR/sweep.json, which says that a folder is that of a sweep, what its cells are, and which job each one has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slotmamba.config.sweep import Settings
from slotmamba.errors import InputError
from slotmamba.files import write_text

NAME = "sweep.json"


@dataclass(frozen=True)
class CellRecord:
    """A cell that was submitted.

    name: of its folder; settings: keys and values; steps: of the run; validates: whether it ends with validation;
    job: number of its newest job; host: where that is a process, with cluster=local.
    """

    name: str
    settings: Settings
    steps: int
    validates: bool
    job: str | None
    host: str | None


@dataclass(frozen=True)
class SweepRecord:
    name: str
    cells: tuple[CellRecord, ...]

    @property
    def in_slurm(self) -> bool:
        """Whether Slurm knows some of its jobs."""
        return any(cell.job is not None and cell.host is None for cell in self.cells)

    def with_cells(self, cells: Sequence[CellRecord]) -> SweepRecord:
        """The same with cells added, or replaced by those of the same name."""
        merged = {cell.name: cell for cell in (*self.cells, *cells)}
        return SweepRecord(self.name, tuple(merged.values()))


def is_sweep(folder: Path) -> bool:
    return (folder / NAME).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """
    Raises:
        InputError: the file is damaged.
        FileNotFoundError: `folder` is not that of a sweep.
    """
    path = folder / NAME
    text = path.read_text()
    try:
        content = json.loads(text)
        return SweepRecord(content["name"], tuple(CellRecord(**cell) for cell in content["cells"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected what `slotmamba submit` wrote: {error}") from None


def write_sweep(folder: Path, record: SweepRecord) -> None:
    write_text(folder / NAME, json.dumps(asdict(record), indent=2) + "\n")
