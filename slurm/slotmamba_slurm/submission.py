"""What is submitted, kept beside the run: the resolved recipe and a copy of the code.

A job that is queued again so runs what was submitted, whatever has been edited since.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slotmamba.config import Recipe, save_recipe
from slotmamba.config.sweep_file import is_sweep
from slotmamba.errors import InputError, SlotMambaError
from slotmamba.runs.folder import is_run

PACKAGES = ("slotmamba", "slotmamba_kernels", "slotmamba_data", "slotmamba_slurm")
BESIDE = ("recipes", "constraints.txt")  # beside the package in a checkout, inside it when installed


@dataclass(frozen=True)
class Submission:
    """A folder RUN_DIR/slurm/submission-NNN."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder.parents[1]

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def code(self) -> Path:
        """What goes on PYTHONPATH."""
        return self.folder / "code"


def job_folder(recipe: Recipe) -> Path:
    """Where the files of all jobs of a run are; absolute."""
    return (recipe.run_path / "slurm").absolute()


def check_folder(recipe: Recipe) -> None:
    """
    Raises:
        InputError: it is a run and its folder that of a sweep, or the other way round: `slotmamba runs` would not
            show one of them; or it may not be looked into.
    """
    folder = recipe.run_path
    try:
        sweep, run = is_sweep(folder), is_run(folder)
    except PermissionError as error:
        raise InputError(f"{job_folder(recipe)}: {error.strerror}: nothing is submitted") from None
    if recipe.sweep is None and sweep:
        raise InputError(
            f"{folder} is the folder of a sweep, whose runs are below it: set another run_dir for this run"
        )
    if recipe.sweep is not None and run:
        raise InputError(f"{folder} is the folder of a run: set another run_dir for this sweep")


def write_submission(recipe: Recipe, git: dict[str, Any] | None, written: list[Path]) -> Submission:
    """Writes a new submission.

    Args:
        recipe: what is to run.
        git: which commit the code is, to be kept with the copy.
        written: to which the folder is added.
    """
    submission = write_recipe(recipe, written)
    for package in PACKAGES:
        _copy_package(package, submission.code / package)
    if git is not None:
        (submission.code / "slotmamba" / "git.json").write_text(json.dumps(git))
    return submission


def write_recipe(recipe: Recipe, written: list[Path]) -> Submission:
    """Writes a new submission without code: the cells of a sweep all run that of the sweep."""
    submission = Submission(_new_folder(job_folder(recipe)))
    written.append(submission.folder)
    save_recipe(recipe, submission.recipe)
    return submission


@contextmanager
def all_or_nothing(*recipes: Recipe) -> Iterator[list[Path]]:
    """Yields a list of files and folders, which are taken away when what is inside fails: a submission adds what it
    writes, and nothing that is another's.

    Raises:
        InputError: the job folder may not be written.
        SlotMambaError: it cannot be, as on a full disk.
    """
    jobs = [job_folder(recipe) for recipe in recipes]
    folders = {folder for each in jobs for folder in (each, *each.parents)}
    new = [folder for folder in folders if not os.path.exists(folder)]
    new.sort(key=lambda folder: -len(folder.parts))  # those that are in others come first
    written: list[Path] = []
    try:
        yield written
    except BaseException as error:
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for folder in new:
            with suppress(OSError):  # it was not made, or others have put something there
                folder.rmdir()
        if isinstance(error, OSError):
            refused = InputError if isinstance(error, PermissionError) else SlotMambaError
            raise refused(f"{jobs[0]}: {error.strerror}: nothing is submitted") from None
        raise


def _new_folder(jobs: Path) -> Path:
    number = len(list(jobs.glob("submission-*"))) + 1
    while True:
        folder = jobs / f"submission-{number:03d}"
        try:
            folder.mkdir(parents=True)  # another submission that fails may take those above away again
            return folder
        except FileExistsError:
            if not os.path.lexists(folder):  # it is one above, which is no folder
                raise
            number += 1


def _copy_package(package: str, target: Path) -> None:
    spec = find_spec(package)
    assert spec and spec.origin
    source = Path(spec.origin).parent
    _copy_folder(source, target)
    if package != "slotmamba":
        return
    for name in BESIDE:
        beside = source.parent / name
        if beside.is_dir() and not (target / name).exists():
            _copy_folder(beside, target / name)
        elif beside.is_file() and not (target / name).exists():
            shutil.copy2(beside, target / name)


def _copy_folder(source: Path, target: Path) -> None:
    """As shutil.copytree, which goes on after a failure and then raises a list of all of them."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            _copy_folder(entry, target / entry.name)
        elif entry.is_file():
            shutil.copy2(entry, target / entry.name)
