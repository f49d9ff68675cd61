"""The jobs of a run, by the files that submitting leaves in its folder."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

from slotmamba_slurm.stop import live_controllers

_SCRIPT, _PICKLE = "_submission.sh", "_submitted.pkl"


@dataclass(frozen=True)
class RunJobs:
    """slurm: ids of its jobs on Slurm; local: process numbers of submitit's controllers for cluster=local, on the
    hosts where it was submitted; both in the order of their submission. recipes: what was submitted."""

    slurm: list[str]
    local: list[int]
    recipes: list[Path]


def local_state(run_dir: Path, number: int) -> str | None:
    """The state of a job of cluster=local in Slurm's words; None where it has ended without a result, or elsewhere."""
    if live_controllers(run_dir, [number]):
        return "RUNNING"
    results = [pickle.loads(path.read_bytes())[0] for path in (run_dir / "slurm").glob(f"{number}_*_result.pkl")]
    return None if not results else "FAILED" if "error" in results else "COMPLETED"


def run_jobs(run_dir: Path) -> RunJobs:
    folder = run_dir / "slurm"
    scripts = sorted(folder.glob(f"*{_SCRIPT}"), key=lambda path: path.stat().st_mtime)
    pickles = sorted(folder.glob(f"*{_PICKLE}"), key=lambda path: path.stat().st_mtime)
    slurm = [path.name.removesuffix(_SCRIPT) for path in scripts]
    named = [path.name.removesuffix(_PICKLE) for path in pickles]
    local = [int(name) for name in named if name.isdigit() and name not in slurm]
    return RunJobs(slurm, local, list(folder.glob("submission-*/recipe.yaml")))
