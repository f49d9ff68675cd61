"""What is submitted, kept beside the run: the resolved recipe and a copy of the code.

A job that is queued again so runs what was submitted, whatever has been edited since.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slotmamba.config import Recipe, save_recipe

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


def write_submission(recipe: Recipe, git: dict[str, Any] | None) -> Submission:
    """Writes a new submission of `recipe`; `git`: which commit the code is, to be kept with the copy."""
    submission = write_recipe(recipe)
    for package in PACKAGES:
        _copy_package(package, submission.code / package)
    if git is not None:
        (submission.code / "slotmamba" / "git.json").write_text(json.dumps(git))
    return submission


def write_recipe(recipe: Recipe) -> Submission:
    """Writes a new submission without code: the cells of a sweep all run that of the sweep."""
    jobs = job_folder(recipe)
    jobs.mkdir(parents=True, exist_ok=True)
    submission = Submission(_new_folder(jobs))
    save_recipe(recipe, submission.recipe)
    return submission


def _new_folder(jobs: Path) -> Path:
    number = len(list(jobs.glob("submission-*"))) + 1
    while True:
        folder = jobs / f"submission-{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _copy_package(package: str, target: Path) -> None:
    spec = find_spec(package)
    assert spec and spec.origin
    source = Path(spec.origin).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    if package != "slotmamba":
        return
    for name in BESIDE:
        beside = source.parent / name
        if beside.is_dir() and not (target / name).exists():
            shutil.copytree(beside, target / name)
        elif beside.is_file() and not (target / name).exists():
            shutil.copy2(beside, target / name)
