"""From a recipe with a sweep to a job array: each cell is a run in a folder of its own; all share the code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit import Job

from slotmamba.config import Recipe, recipe_yaml
from slotmamba.config.cells import Cell, Sweep
from slotmamba.config.sweep_file import record_sweep
from slotmamba.errors import InputError, one_line
from slotmamba_slurm.executors import SlurmTasks
from slotmamba_slurm.interrupts import interrupts_held
from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.jobs import note_job
from slotmamba_slurm.local_sweep import run_local
from slotmamba_slurm.resources import check_path, local_parameters
from slotmamba_slurm.slurm_job import SlurmError, SlurmJob
from slotmamba_slurm.stop import cancel
from slotmamba_slurm.submission import (
    Submission,
    all_or_nothing,
    check_folder,
    job_folder,
    write_recipe,
    write_submission,
)
from slotmamba_slurm.submit import checked, count_of, slurm_executor, train_job

Report = Callable[[Path], str]
"""Writes the results of the sweep in a folder, and returns them as text."""


def submit_sweep(
    sweep: Sweep, cluster: str, left_out: dict[str, list[Cell]], report: Report, git: dict[str, Any] | None
) -> int:
    """Submits `sweep`; returns the exit code: at once for Slurm, for `local` when all have ended, 1 if any failed.

    Args:
        sweep: what to train.
        cluster: `slurm` or `local`.
        left_out: cells that are not to be submitted, by the reason in words.
        report: for `local`, and where no cell is left.
        git: which commit the code is, for the record.

    Raises:
        InputError: the recipe does not fit its nodes, or the cluster refuses the array; nothing was submitted.
    """
    _check_cluster(cluster)
    check_folder(sweep.recipe)
    cells = _left(sweep, left_out)
    if not cells:
        print(_summary(sweep, left_out))
        print(report(sweep.recipe.run_path), end="")
        return 0
    if cluster == "slurm":
        checked(_array_preview(sweep, cells))
    else:
        local_parameters(_shared(sweep))
        for cell in cells:
            check_path(cell.recipe)
    with interrupts_held() as stop_here:
        with all_or_nothing(sweep.recipe, *(cell.recipe for cell in cells)) as written:
            submission = write_submission(sweep.recipe, git, written)
            jobs = [_cell_job(sweep, cell, written) for cell in cells]
            if cluster == "slurm":
                arrays = _submit_arrays(sweep, jobs, submission, written, stop_here)
            else:
                stop_here()
                record_sweep(sweep)
        if cluster == "slurm":
            _say_submitted(sweep, left_out, arrays)
            return 0
    print(_summary(sweep, left_out), flush=True)
    ended_well = run_local(_shared(sweep), list(zip(cells, jobs, strict=True)), submission.code)
    print(report(sweep.recipe.run_path), end="")
    return 0 if ended_well else 1


def preview_sweep(sweep: Sweep, cluster: str, left_out: dict[str, list[Cell]], estimate: str) -> str:
    """What `submit_sweep` would do: the recipe, the batch script, `estimate`, the cells, and what the cluster says.

    Raises:
        InputError: as `submit_sweep`.
    """
    _check_cluster(cluster)
    check_folder(sweep.recipe)
    cells = _left(sweep, left_out)
    parts = [recipe_yaml(sweep.recipe)]
    listed = "\n".join([_summary(sweep, left_out), *(f"  {cell.name}" for cell in cells)])
    if cluster == "local":
        processes = count_of(local_parameters(_shared(sweep))["tasks_per_node"], "process", "es")
        at_a_time = sweep.recipe.slurm.array_parallelism or 1
        parts += [estimate, listed, f"cluster=local: {at_a_time} at a time on this machine, {processes} each"]
    elif cells:
        executor = _array_preview(sweep, cells)
        parts += [executor.script(), estimate, listed, checked(executor)]
    else:
        parts += [estimate, listed]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _check_cluster(cluster: str) -> None:
    if cluster == "debug":
        raise InputError("cluster=debug is one run in this process, not a sweep: set cluster=local, or sweep=null")
    assert cluster in ("slurm", "local")


def _left(sweep: Sweep, left_out: dict[str, list[Cell]]) -> list[Cell]:
    out = {cell.name for cells in left_out.values() for cell in cells}
    return [cell for cell in sweep.cells if cell.name not in out]


def _summary(sweep: Sweep, left_out: dict[str, list[Cell]]) -> str:
    parts = [f"{sweep.recipe.name}: a sweep of {count_of(len(sweep.cells), 'cell')}"]
    return ", ".join(parts + [f"{len(cells)} {reason}" for reason, cells in left_out.items() if cells])


def _shared(sweep: Sweep) -> Recipe:
    """What all jobs ask for, which any cell says, under the name and in the folder of the sweep."""
    return sweep.cells[0].recipe.model_copy(update={"name": sweep.recipe.name, "run_dir": sweep.recipe.run_path})


def _cell_job(sweep: Sweep, cell: Cell, written: list[Path]) -> TrainJob:
    """What is submitted for a cell lies in its own folder, as for any run, but for the code."""
    return train_job(cell.recipe, write_recipe(cell.recipe, written), sweep.recipe.run_path.absolute())


def _array_executor(sweep: Sweep, count: int, submission: Submission, written: list[Path] | None = None) -> SlurmTasks:
    executor = slurm_executor(_shared(sweep), submission, written)
    executor.update_parameters(array_parallelism=sweep.recipe.slurm.array_parallelism or count)
    return executor


def _array_preview(sweep: Sweep, cells: list[Cell]) -> SlurmTasks:
    executor = _array_executor(sweep, len(cells), Submission(job_folder(sweep.recipe) / "submission-NNN"))
    if len(cells) > 1:
        executor.parameters["map_count"] = len(cells)  # as for an array
    return executor


def _submit_arrays(
    sweep: Sweep, jobs: list[TrainJob], submission: Submission, written: list[Path], stop_here: Callable[[], None]
) -> list[list[Job[None]]]:
    """The arrays of `slurm.chain`, one as a rule: all or none of them. Each goes on with the cells that the one before
    has left unfinished.

    The first one is held until all are there, for its jobs cancel their likes in the others when they fail or finish.
    """
    chain = sweep.recipe.slurm.chain
    arrays: list[list[Job[None]]] = []
    try:
        for number in range(chain):
            stop_here()
            executor = _array_executor(sweep, len(jobs), submission, written)
            if chain > 1:
                waits = {"dependency": f"afterany:{_number(arrays[-1])}"} if number else {"hold": True}
                executor.parameters["additional_parameters"] |= waits
            arrays.append(executor.submit_array(jobs))
        stop_here()
        for array in arrays:
            for train, job in zip(jobs, array, strict=True):
                _link_files(job, train.run_dir / "slurm", written)
                note_job(train.run_dir, job.job_id, "slurm", train.submission)
        record_sweep(sweep)
        if chain > 1:
            SlurmJob(_number(arrays[0])).release()
    except BaseException as error:
        cancel([_number(array) for array in arrays])
        if isinstance(error, SlurmError):
            raise InputError(f"sbatch has failed: {one_line(error)}") from None
        raise
    return arrays


def _number(array: list[Job[None]]) -> str:
    return array[0].job_id.partition("_")[0]


def _link_files(job: Job[None], folder: Path, written: list[Path]) -> None:
    """Puts links to the files of a cell's job where those of any run are: submitit has one folder for an array."""
    files = {f"{job.job_id}_submission.sh": job.paths.submission_file}
    for paths in (job.task(rank).paths for rank in range(job.num_tasks)):
        written.append(paths.stdout)
        paths.stdout.touch()  # a job that waits has no output yet, and one that runs adds to it
        files |= {path.name: path for path in (paths.stdout, paths.result_pickle)}
    for name, path in files.items():
        (folder / name).symlink_to(os.path.relpath(path, folder))
        written.append(folder / name)


def _say_submitted(sweep: Sweep, left_out: dict[str, list[Cell]], arrays: list[list[Job[None]]]) -> None:
    recipe, folder, count = _shared(sweep), sweep.recipe.run_path, len(arrays[0])
    most = recipe.slurm.array_parallelism
    at_a_time = f", {most} at a time" if most is not None and most < count else ""
    nodes, processes = count_of(recipe.slurm.nodes, "node"), count_of(recipe.parallel.size, "process", "es")
    first, *others = map(_number, arrays)
    print(_summary(sweep, left_out))
    print(f"  job {first}: {count_of(count, 'cell')}{at_a_time}")
    if others:
        print(f"  goes on as  {', '.join(others)}, each when all cells of the one before have ended")
    print(f"  each on {nodes}: {processes}")
    print(f"  run folder  {folder}, a folder in it for each cell")
    print(f"  results     {folder / 'results.txt'}, written anew whenever a cell ends")
