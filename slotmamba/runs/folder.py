"""Run folders: where they are, and what their files say of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slotmamba import run_lock
from slotmamba.checkpoint.manifest import claimed_steps
from slotmamba.config.duration import seconds
from slotmamba.config.schema import ParallelConfig, TrainConfig
from slotmamba.config.sweep_file import is_sweep, read_sweep
from slotmamba.errors import InputError, suggestion
from slotmamba.faults.heartbeat import Beat, read_beats
from slotmamba.metrics import readable_metrics
from slotmamba.notes import note_once
from slotmamba.runs.starts import Start, merged, read_starts

DEFAULT_FOLDER = Path("runs")
OWN_FOLDERS = {"slurm", "logs", "checkpoints", "plots", "wandb"}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, and ten times faster, where it is built in


def find_runs(folder: Path, unreadable: Callable[[Exception], object]) -> Iterator[Path]:
    """The run folders at and below `folder`, in the order of their names; those of cells of a sweep, which may not
    have been made yet, in that of the sweep, or as other runs if its file is damaged. `unreadable` is told of folders
    that cannot be looked into, by OSError, and of such files, by InputError.
    """
    for parent, folders, _ in os.walk(folder, onerror=unreadable):
        path = Path(parent)
        sweep = is_sweep(path)
        run = not sweep and is_run(path)
        if sweep:
            try:
                yield from cells(path)
                folders.clear()
            except (InputError, OSError) as error:
                unreadable(error)
        elif run:
            yield path
        own = OWN_FOLDERS if run or sweep else set()
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or name in own))


def cells(sweep: Path) -> list[Path]:
    """The run folders of a sweep; InputError if its file is damaged."""
    return [sweep / cell.name for cell in read_sweep(sweep).cells]


def is_run(path: Path) -> bool:
    """Whether something has trained in a folder, or was submitted for it; that of a sweep has its runs below it."""
    return not is_sweep(path) and (_has_trained(path) or bool(_submissions(path)))


def _has_trained(path: Path) -> bool:
    return any((path / name).exists() for name in (run_lock.NAME, "metrics.jsonl"))


def find_run(name: str) -> Path:
    """The folder of a run, or a sweep, that is named by its path, or by its name below the folder where runs are by
    default.

    Raises:
        InputError: it is not there.
    """
    if not name:
        raise InputError("the name of the run is empty: expected a run folder, or the name of one below runs/")
    for path in (Path(name), DEFAULT_FOLDER / name):
        if is_run(path) or is_sweep(path):
            return path
    if Path(name).is_dir():
        raise InputError(f"{name}: nothing has trained in this folder, and no job was submitted for it")
    names = [str(path.relative_to(DEFAULT_FOLDER)) for path in find_runs(DEFAULT_FOLDER, lambda error: None)]
    raise InputError(f"{name}: no such run, neither as a path nor below {DEFAULT_FOLDER}/{suggestion(name, names)}")


def _submissions(path: Path) -> list[Path]:
    """Their recipes, oldest first."""
    return sorted((path / "slurm").glob("submission-*/recipe.yaml"))


def _mapping(path: Path) -> dict[str, Any]:
    """Of a YAML file, which JSON is too; a damaged one is empty, and a note says so."""
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, ValueError):  # the latter of a date that is none
        content = None
    if isinstance(content, dict):
        return content
    note_once(f"{path} is damaged and left out")
    return {}


@dataclass(frozen=True)
class RunFolder:
    """What the files of a run say. Each is read when it is first asked for, and once.

    job_starts: the starts of its jobs; last_bytes: of metrics.jsonl, to read that many only.
    """

    path: Path
    job_starts: Sequence[Start] = ()
    last_bytes: int | None = None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Of the last start or else the last submission, as it was saved; empty where there is none, or a damaged one,
        of which a note tells."""
        for path in (self.path / "recipe.yaml", *reversed(_submissions(self.path))):
            if path.is_file():
                return _mapping(path)
        return {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Of the last start; empty as for the recipe."""
        path = self.path / "environment.json"
        return _mapping(path) if path.is_file() else {}

    @cached_property
    def train(self) -> TrainConfig | None:
        """None for a recipe of a version that this one cannot read."""
        try:
            return TrainConfig.model_validate(self.recipe.get("train"))
        except ValidationError:
            return None

    @cached_property
    def parallel(self) -> ParallelConfig:
        try:
            return ParallelConfig.model_validate(self.recipe.get("parallel", {}))
        except ValidationError:
            return ParallelConfig()

    @cached_property
    def starts(self) -> list[Start]:
        return merged(read_starts(self.path), self.job_starts)

    @cached_property
    def beats(self) -> list[Beat]:
        """The last of each rank of the last start."""
        size = self.starts[-1].processes if self.starts else self.parallel.size
        return read_beats(self.path / "logs", size)

    @cached_property
    def metrics(self) -> tuple[list[dict[str, Any]], int]:
        """The records that are sound, and how many lines are not."""
        path = self.path / "metrics.jsonl"
        return readable_metrics(path, self.last_bytes) if path.exists() else ([], 0)

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.metrics[0] if record.get("kind") == kind]

    @cached_property
    def checkpoints(self) -> list[int]:
        """Their steps, ascending."""
        return claimed_steps(self.path / "checkpoints")

    @cached_property
    def locked(self) -> bool:
        return run_lock.is_held(self.path)

    @cached_property
    def submitted(self) -> bool:
        return bool(_submissions(self.path))

    def silence_allowed(self) -> float:
        """Seconds without a beat after which the run would have ended itself."""
        before = self.starts[-1].step if self.starts else None
        first = before is None or all(beat.step <= before for beat in self.beats)
        return float(seconds(self.parallel.first_step_timeout if first else self.parallel.step_timeout))
