"""RUN_DIR/sweep.json, which says that a folder is that of a sweep, and what its cells are: runs in folders there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from slotmamba.config.cells import Sweep
from slotmamba.config.sweep import Settings
from slotmamba.errors import InputError
from slotmamba.files import write_text

NAME = "sweep.json"


@dataclass(frozen=True)
class CellRecord:
    """name: of the folder; settings: keys and values."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class SweepRecord:
    name: str
    cells: tuple[CellRecord, ...]


def is_sweep(folder: Path) -> bool:
    return (folder / NAME).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """
    Raises:
        InputError: the file is damaged.
        FileNotFoundError: `folder` is not that of a sweep.
    """
    path = folder / NAME
    text = path.read_bytes()
    try:
        content = json.loads(text)
        cells = tuple(CellRecord(**cell) for cell in content["cells"])
        if not all(isinstance(cell.name, str) and isinstance(cell.settings, dict) for cell in cells):
            raise TypeError("cells have a name and settings")
        return SweepRecord(content["name"], cells)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected what `slotmamba submit` wrote: {error}") from None


def record_sweep(sweep: Sweep) -> None:
    """Writes the cells of a sweep, after those that were submitted before it with other values."""
    folder = sweep.recipe.run_path
    before = read_sweep(folder).cells if is_sweep(folder) else ()
    cells = {cell.name: cell for cell in (*before, *(CellRecord(cell.name, cell.settings) for cell in sweep.cells))}
    record = SweepRecord(sweep.recipe.name, tuple(cells.values()))
    write_text(folder / NAME, json.dumps(asdict(record), indent=2) + "\n")
