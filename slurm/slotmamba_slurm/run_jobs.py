"""The jobs of a run, by the files that submitting leaves in its folder, or in that of its sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slotmamba.config.sweep_file import is_sweep, read_sweep

_SCRIPT, _PICKLE = "_submission.sh", "_submitted.pkl"


@dataclass(frozen=True)
class RunJobs:
    """folder: of the files of the jobs; slurm: ids of those on Slurm; local: process numbers of submitit's controllers
    for cluster=local, on the hosts where it was submitted; both in the order of their submission; recipes: what was
    submitted; of_a_cell: the folder is that of a sweep, with the jobs of other cells."""

    folder: Path
    slurm: list[str]
    local: list[int]
    recipes: list[Path]
    of_a_cell: bool = False

    @property
    def numbers(self) -> list[str]:
        """Of all its jobs."""
        return [*self.slurm, *map(str, self.local)]


def run_jobs(run_dir: Path) -> RunJobs:
    """
    Raises:
        InputError: the file of the sweep is damaged.
    """
    sweep = run_dir.absolute().parent
    if is_sweep(sweep):
        return _of_a_cell(sweep, run_dir.absolute().name)
    folder = run_dir / "slurm"
    slurm = _numbers(folder, _SCRIPT)
    local = [int(name) for name in _numbers(folder, _PICKLE) if name.isdigit() and name not in slurm]
    return RunJobs(folder, slurm, local, list(folder.glob("submission-*/recipe.yaml")))


def _of_a_cell(sweep: Path, name: str) -> RunJobs:
    """Its newest job: when it was submitted the ones before had ended."""
    folder = sweep / "slurm"
    cells = [cell for cell in read_sweep(sweep).cells if cell.name == name and cell.job is not None]
    slurm = [cell.job for cell in cells if cell.job and cell.host is None]
    local = [int(cell.job) for cell in cells if cell.job and cell.host is not None]
    return RunJobs(folder, slurm, local, list(folder.glob(f"submission-*/cells/{name}.yaml")), of_a_cell=True)


def _numbers(folder: Path, suffix: str) -> list[str]:
    """What stands before `suffix` in the names of files, oldest file first."""
    files = sorted(folder.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime)
    return [path.name.removesuffix(suffix) for path in files]
