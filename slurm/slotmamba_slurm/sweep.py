"""From a recipe with a sweep to a job array, or to jobs on this machine: each cell trains in a folder of its own."""

from __future__ import annotations

import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit import Job
from submitit.core.utils import FailedJobError

from slotmamba.config import Recipe, recipe_yaml, save_recipe
from slotmamba.config.cells import Cell, Sweep
from slotmamba.config.sweep_file import CellRecord, SweepRecord, is_sweep, read_sweep, write_sweep
from slotmamba.errors import InputError, one_line
from slotmamba_slurm import jobs
from slotmamba_slurm.executors import LocalTasks, SlurmTasks
from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.resources import local_parameters
from slotmamba_slurm.submission import Submission, job_folder, write_submission
from slotmamba_slurm.submit import checked, count_of, said, sigint_ignored, slurm_executor

POLL_SECONDS = 0.1


class SubmittedSweep:
    """A sweep on its way: which cells are left to submit, and the file that says what became of the others.

    Args:
        sweep: what to train.
        finished: whether the run of a recipe is at its end.
    """

    def __init__(self, sweep: Sweep, finished: Callable[[Recipe], bool]) -> None:
        self.sweep = sweep
        self.folder = sweep.recipe.run_path
        before = read_sweep(self.folder).cells if is_sweep(self.folder) else ()
        self.record = SweepRecord(sweep.recipe.name, before)
        known = {cell.name: cell for cell in before}
        queue = jobs.queued_jobs() if self.record.in_slurm else {}
        self.finished = [cell for cell in sweep.cells if finished(cell.recipe)]
        others = [cell for cell in sweep.cells if cell not in self.finished]
        self.queued = [cell for cell in others if cell.name in known and _is_queued(known[cell.name], queue)]
        self.left = [cell for cell in others if cell not in self.queued]

    @property
    def recipe(self) -> Recipe:
        """What all jobs ask for is in any cell; the name is that of the sweep."""
        shared = {"name": self.sweep.recipe.name, "run_dir": self.folder}
        return self.sweep.cells[0].recipe.model_copy(update=shared)

    def describe(self) -> str:
        """How many cells there are, and why not all are submitted."""
        parts = [f"{self.sweep.recipe.name}: a sweep of {count_of(len(self.sweep.cells), 'cell')}"]
        for cells, words in ((self.finished, "already finished"), (self.queued, "queued or running already")):
            parts += [f"{len(cells)} {words}"] if cells else []
        return ", ".join(parts)

    def write(self, git: dict[str, Any] | None) -> Submission:
        """A submission with a recipe for each cell that is left."""
        submission = write_submission(self.sweep.recipe, git)
        (submission.folder / "cells").mkdir()
        for cell in self.left:
            save_recipe(cell.recipe, cell_recipe(submission, cell))
        return submission

    def job(self, submission: Submission, cell: Cell) -> TrainJob:
        slurm = self.recipe.slurm
        recipe = cell_recipe(submission, cell)
        return TrainJob(recipe, slurm.cpus_per_task, slurm.requeue, sweep=self.folder.absolute())

    def note(self, cells: Sequence[Cell], numbers: Sequence[str | None], host: str | None = None) -> None:
        """Keeps which job each of `cells` has."""
        records = [
            CellRecord(
                cell.name, cell.settings, cell.recipe.train.total_steps, bool(cell.recipe.data.validation), job, host
            )
            for cell, job in zip(cells, numbers, strict=True)
        ]
        self.record = self.record.with_cells(records)
        write_sweep(self.folder, self.record)


def submit_sweep(
    sweep: Sweep,
    cluster: str,
    finished: Callable[[Recipe], bool],
    report: Callable[[Path], str],
    git: dict[str, Any] | None,
) -> int:
    """Submits the cells of `sweep` that are neither finished nor queued; returns the exit code, at once for Slurm, when
    all have ended for `local`: 1 if any failed.

    Args:
        sweep: what to train.
        cluster: `slurm` or `local`.
        finished: whether the run of a recipe is at its end.
        report: writes the results of the sweep in a folder, and returns them as text.
        git: which commit the code is, for the record.

    Raises:
        InputError: the recipe does not fit its nodes, or the cluster refuses the array; nothing was submitted.
    """
    _check_cluster(cluster)
    submitted = SubmittedSweep(sweep, finished)
    if cluster == "local":
        return _run_local(submitted, report, git)
    return _submit_to_slurm(submitted, report, git)


def preview_sweep(sweep: Sweep, cluster: str, finished: Callable[[Recipe], bool], estimate: str) -> str:
    """What `submit_sweep` would do: the recipe, the batch script, `estimate`, the cells, and what the cluster says.

    Raises:
        InputError: as `submit_sweep`.
    """
    _check_cluster(cluster)
    submitted = SubmittedSweep(sweep, finished)
    parts = [recipe_yaml(sweep.recipe)]
    cells = "\n".join([submitted.describe(), *(f"  {cell.name}" for cell in submitted.left)])
    if cluster == "local":
        processes = count_of(local_parameters(submitted.recipe)["tasks_per_node"], "process", "es")
        parts += [estimate, cells, f"cluster=local: {_at_a_time(submitted)} on this machine, {processes} each"]
    elif submitted.left:
        script = _array_script(submitted, Submission(job_folder(submitted.recipe) / "submission-NNN"))
        parts += [script, estimate, cells, checked(script)]
    else:
        parts += [estimate, cells]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def cell_recipe(submission: Submission, cell: Cell) -> Path:
    return submission.folder / "cells" / f"{cell.name}.yaml"


def _check_cluster(cluster: str) -> None:
    if cluster == "debug":
        raise InputError("cluster=debug is one run in this process, not a sweep: set cluster=local, or sweep=null")
    assert cluster in ("slurm", "local")


def _is_queued(cell: CellRecord, queue: dict[str, str] | None) -> bool:
    if cell.job is None:
        return False
    if cell.host is not None:
        return jobs.lives(cell.job, cell.host)
    if queue is None:
        raise InputError(f"cell {cell.name} is job {cell.job} of Slurm, and there is no squeue on PATH to ask about it")
    return cell.job in queue


def _array_executor(submitted: SubmittedSweep, submission: Submission) -> SlurmTasks:
    executor = slurm_executor(submitted.recipe, submission)
    at_a_time = submitted.recipe.slurm.array_parallelism or len(submitted.left)
    executor.update_parameters(array_parallelism=at_a_time)
    return executor


def _array_script(submitted: SubmittedSweep, submission: Submission) -> str:
    executor = _array_executor(submitted, submission)
    if len(submitted.left) > 1:
        executor.parameters["map_count"] = len(submitted.left)  # as submitit's own, for an array
    return executor.script()


def _submit_to_slurm(submitted: SubmittedSweep, report: Callable[[Path], str], git: dict[str, Any] | None) -> int:
    if not submitted.left:
        print(submitted.describe())
        print(report(submitted.folder), end="")
        return 0
    checked(_array_script(submitted, Submission(job_folder(submitted.recipe) / "submission-NNN")))
    submission = submitted.write(git)
    cells = [submitted.job(submission, cell) for cell in submitted.left]
    try:
        array = _array_executor(submitted, submission).submit_array(cells)
    except FailedJobError as error:
        raise InputError(f"sbatch has failed: {one_line(error)}") from None
    submitted.note(submitted.left, [job.job_id for job in array])
    recipe = submitted.recipe
    each = f"{count_of(recipe.slurm.nodes, 'node')}, {count_of(recipe.parallel.size, 'process', 'es')} each"
    print(submitted.describe())
    print(f"  job {array[0].job_id.partition('_')[0]}: {_at_a_time(submitted)} on {each}")
    for cell, job in zip(submitted.left, array, strict=True):
        print(f"  {job.job_id}  {cell.name}")
    print(f"  run folder  {submitted.folder}, a folder in it for each cell")
    print(f"  results     {submitted.folder / 'results.txt'}, written anew whenever a cell ends")
    return 0


def _at_a_time(submitted: SubmittedSweep) -> str:
    left, most = len(submitted.left), submitted.recipe.slurm.array_parallelism
    cells = count_of(left, "cell")
    return cells if most is None or most >= left else f"{cells}, {most} at a time"


def _run_local(submitted: SubmittedSweep, report: Callable[[Path], str], git: dict[str, Any] | None) -> int:
    parameters = local_parameters(submitted.recipe)
    print(submitted.describe(), flush=True)
    failed = False
    if submitted.left:
        submission = submitted.write(git)
        executor = LocalTasks(job_folder(submitted.recipe))
        executor.code = submission.code
        executor.update_parameters(**parameters)
        submitted.note(submitted.left, [None] * len(submitted.left))
        failed = _LocalArray(submitted, submission, executor).run()
    print(report(submitted.folder), end="")
    return 1 if failed else 0


class _LocalArray:
    """The cells as jobs of this machine, as many at a time as the recipe says."""

    def __init__(self, submitted: SubmittedSweep, submission: Submission, executor: LocalTasks) -> None:
        self._submitted = submitted
        self._submission = submission
        self._executor = executor
        self._waiting = deque(submitted.left)
        self._running: dict[str, tuple[Cell, Job[None]]] = {}
        self._ended = 0
        self._failed = False

    def run(self) -> bool:
        """Until all cells have ended, or after Ctrl-C those that had started; returns whether any failed."""
        at_a_time = self._submitted.recipe.slurm.array_parallelism or 1
        while self._waiting or self._running:
            try:
                while self._waiting and len(self._running) < at_a_time:
                    self._start(self._waiting.popleft())
                time.sleep(POLL_SECONDS)
                for number in [number for number, (_, job) in self._running.items() if job.done()]:
                    self._end(*self._running.pop(number))
            except KeyboardInterrupt:
                print(f"interrupted: waiting for checkpoints, {len(self._waiting)} cells are not started", flush=True)
                self._waiting.clear()
        return self._failed

    def _start(self, cell: Cell) -> None:
        with sigint_ignored():
            job = self._executor.submit(self._submitted.job(self._submission, cell))
            self._running[job.job_id] = cell, job
            self._submitted.note([cell], [job.job_id], socket.gethostname())
        print(f"  {cell.name}: job {job.job_id}, output {job.paths.stdout}", flush=True)

    def _end(self, cell: Cell, job: Job[None]) -> None:
        self._ended += 1
        ended = f"({self._ended} of {len(self._submitted.left)})"
        if job.exception() is None:
            print(f"  {cell.name}: ended {ended}", flush=True)
            return
        self._failed = True
        print(f"  {cell.name}: failed {ended}", flush=True)
        for line in said(job):
            print(line, file=sys.stderr)
