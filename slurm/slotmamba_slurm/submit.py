"""From a recipe to a job: ``slotmamba submit``."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import DebugExecutor, Job

from slotmamba.config import Recipe, recipe_yaml
from slotmamba.config.duration import seconds
from slotmamba.errors import InputError, one_line
from slotmamba_slurm.executors import LocalTasks, SlurmTasks
from slotmamba_slurm.interrupts import interrupts_held
from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.jobs import note_job
from slotmamba_slurm.resources import local_parameters, processes_per_node, slurm_parameters, task_python
from slotmamba_slurm.run_jobs import check_none_under_way
from slotmamba_slurm.slurm_job import SlurmError, SlurmJob
from slotmamba_slurm.stop import cancel
from slotmamba_slurm.submission import Submission, all_or_nothing, check_folder, job_folder, write_submission

CLUSTERS = ("slurm", "local", "debug")
Train = Callable[[Path], int]
"""Trains the recipe of a file in this process; returns the exit code."""


def submit(recipe: Recipe, cluster: str, train: Train, git: dict[str, Any] | None) -> int:
    """Submits `recipe`; returns the exit code: at once for Slurm, when training has ended for the others.

    Args:
        recipe: what to train.
        cluster: one of `CLUSTERS`: a Slurm job; processes on this machine; in this process.
        train: for `debug`.
        git: which commit the code is, for the record.

    Raises:
        InputError: the recipe does not fit its nodes, a job of the run is under way, or the cluster refuses the job;
            nothing was submitted.
    """
    check_folder(recipe)
    match cluster:
        case "slurm":
            return _submit_to_slurm(recipe, git)
        case "local":
            return _run_local(recipe, git)
        case "debug":
            return _run_debug(recipe, train, git)
    raise AssertionError(cluster)


def preview(recipe: Recipe, cluster: str, estimate: str) -> str:
    """What `submit` would do: the recipe, the batch script, `estimate`, and what the cluster says to it.

    Raises:
        InputError: as `submit`.
    """
    check_folder(recipe)
    parts = [recipe_yaml(recipe)]
    if cluster == "slurm":
        executor = slurm_executor(recipe, Submission(job_folder(recipe) / "submission-NNN"))
        parts += [executor.script(), estimate, checked(executor)]
    else:
        count = 1 if cluster == "debug" else local_parameters(recipe)["tasks_per_node"]
        if cluster == "debug":
            _check_debug(recipe)
        parts += [estimate, f"cluster={cluster}: {count_of(count, 'process', 'es')} on this machine"]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def checked(executor: SlurmTasks) -> str:
    """What `sbatch --test-only` says to a batch script that it accepts.

    Raises:
        InputError: there is no sbatch, or it refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise InputError("there is no sbatch on PATH: submit from a node of the cluster, or set cluster=local")
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(executor.script())
        file.flush()
        try:
            return _in_words(executor.sbatch("--test-only", file.name, timeout=120).stderr)
        except SlurmError as error:
            raise InputError(f"the cluster refuses the job: {_in_words(str(error))}") from None


def _in_words(said: str) -> str:
    """What sbatch says, in one line."""
    return one_line(said.replace("sbatch: ", "").replace("error: ", "")).removeprefix("allocation failure: ")


def slurm_executor(recipe: Recipe, submission: Submission, written: list[Path] | None = None) -> SlurmTasks:
    if shutil.which("srun") is None:
        raise InputError("there is no srun on PATH: submit from a node of the cluster, or set cluster=local")
    executor = SlurmTasks(job_folder(recipe), written, python=task_python(recipe.slurm))
    executor.code = submission.code
    executor.update_parameters(**slurm_parameters(recipe, submission.code))
    return executor


def _submit_to_slurm(recipe: Recipe, git: dict[str, Any] | None) -> int:
    check_none_under_way(recipe.run_path)
    checked(slurm_executor(recipe, Submission(job_folder(recipe) / "submission-NNN")))
    with interrupts_held() as stop_here:
        with all_or_nothing(recipe) as written:
            jobs = _submit_chain(recipe, write_submission(recipe, git, written), written, stop_here)
        _say_submitted(recipe, jobs)
    return 0


def _say_submitted(recipe: Recipe, jobs: list[Job[None]]) -> None:
    first, *others = jobs
    nodes, size = recipe.slurm.nodes, recipe.parallel.size
    print(f"{recipe.name}: job {first.job_id} on {count_of(nodes, 'node')}: {count_of(size, 'process', 'es')}")
    if others:
        print(f"  goes on as  {', '.join(job.job_id for job in others)}, each when the one before has ended")
    print(f"  run folder  {recipe.run_path}")
    print(f"  output      {first.paths.stdout}", flush=True)


def _submit_chain(
    recipe: Recipe, submission: Submission, written: list[Path], stop_here: Callable[[], None]
) -> list[Job[None]]:
    """The jobs of `slurm.chain`: all or none of them.

    The first one is held until all are there, for it cancels the others when it fails or finishes.
    """
    jobs: list[Job[None]] = []
    try:
        for number in range(recipe.slurm.chain):
            stop_here()
            executor = slurm_executor(recipe, submission, written)
            if recipe.slurm.chain > 1:
                place = {"dependency": f"afterany:{jobs[-1].job_id}"} if number else {"hold": True}
                executor.parameters["additional_parameters"] |= place
            jobs.append(executor.submit(train_job(recipe, submission)))
        stop_here()
        for job in jobs:
            note_job(submission.run_dir, job.job_id, "slurm", submission.folder.name)
        if len(jobs) > 1:
            SlurmJob(jobs[0].job_id).release()
    except BaseException as error:
        cancel([job.job_id for job in jobs])
        if isinstance(error, SlurmError):
            raise InputError(f"sbatch has failed: {_in_words(str(error))}") from None
        raise
    return jobs


def _run_local(recipe: Recipe, git: dict[str, Any] | None) -> int:
    parameters = local_parameters(recipe)
    with all_or_nothing(recipe) as written:
        submission = write_submission(recipe, git, written)
        executor = LocalTasks(job_folder(recipe), written)
        executor.code = submission.code
        executor.update_parameters(**parameters)
        with sigint_ignored():
            job = executor.submit(train_job(recipe, submission))
    note_job(submission.run_dir, job.job_id, "local", submission.folder.name)
    processes = count_of(recipe.parallel.size, "process", "es")
    print(f"{recipe.name}: job {job.job_id} on this machine: {processes}", flush=True)
    print(f"  run folder  {recipe.run_path}")
    print(f"  output      {job.paths.stdout}", flush=True)
    _wait(job)
    if job.exception() is None:
        return 0
    for line in said(job):
        print(line, file=sys.stderr)
    return 1


def said(job: Job[None]) -> list[str]:
    """Why a job of this machine failed: the lines of its output that say so, or the last one."""
    lines = job.paths.stdout.read_text(errors="replace").splitlines()
    errors = dict.fromkeys(line for line in lines if line.startswith("error: "))  # each retry says it again
    return list(errors) or lines[-1:]


def _run_debug(recipe: Recipe, train: Train, git: dict[str, Any] | None) -> int:
    _check_debug(recipe)
    with all_or_nothing(recipe) as written:
        submission = write_submission(recipe, git, written)
    return int(DebugExecutor(job_folder(recipe)).submit(train, submission.recipe).result())


def _check_debug(recipe: Recipe) -> None:
    processes_per_node(recipe.parallel, recipe.slurm)
    if recipe.parallel.size > 1:
        raise InputError(f"cluster=debug is one process, the recipe asks for {recipe.parallel.size}: set cluster=local")


def train_job(recipe: Recipe, submission: Submission, sweep: Path | None = None) -> TrainJob:
    """`sweep`: the folder of the sweep of which the run is a cell."""
    slurm = recipe.slurm
    return TrainJob(
        submission.recipe,
        cpus=slurm.cpus_per_task,
        processes=recipe.parallel.size,
        requeue=slurm.requeue,
        max_retries=slurm.max_retries,
        signal_lead=seconds(slurm.signal_lead),
        torchrun=slurm.launcher == "torchrun",
        sweep=sweep,
    )


def count_of(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number > 1 else ''}"


@contextmanager
def sigint_ignored() -> Iterator[None]:
    """For what is started inside: Ctrl-C is for the training processes, which take it themselves and save; submitit's
    controller would kill them a second later."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _wait(job: Job[None]) -> None:
    """Until the job has ended, which it does by itself after Ctrl-C."""
    while True:
        try:
            return job.wait()
        except KeyboardInterrupt:
            print("interrupted: waiting for the checkpoint", flush=True)
