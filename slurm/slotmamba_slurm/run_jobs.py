"""The jobs of a run, by the files that submitting leaves in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SCRIPT, _PICKLE = "_submission.sh", "_submitted.pkl"


@dataclass(frozen=True)
class RunJobs:
    """slurm: ids of its jobs on Slurm; local: process numbers of submitit's controllers for cluster=local, on the
    hosts where it was submitted; both in the order of their submission. recipes: what was submitted."""

    slurm: list[str]
    local: list[int]
    recipes: list[Path]


def run_jobs(run_dir: Path) -> RunJobs:
    folder = run_dir / "slurm"
    scripts = sorted(folder.glob(f"*{_SCRIPT}"), key=lambda path: path.stat().st_mtime)
    pickles = sorted(folder.glob(f"*{_PICKLE}"), key=lambda path: path.stat().st_mtime)
    slurm = [path.name.removesuffix(_SCRIPT) for path in scripts]
    named = [path.name.removesuffix(_PICKLE) for path in pickles]
    local = [int(name) for name in named if name.isdigit() and name not in slurm]
    return RunJobs(slurm, local, list(folder.glob("submission-*/recipe.yaml")))
