"""`slotmamba runs stop`: has a run save and end, wherever it runs, and keeps its jobs from being queued again."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slotmamba import run_lock
from slotmamba.errors import InputError, SlotMambaError
from slotmamba.outcome import DONE
from slotmamba.runs.folder import RunFolder
from slotmamba.runs.starts import FINISHED, STOPPED, Start
from slotmamba.runs.status import Job, end_of
from slotmamba_slurm import stop as jobs_stop
from slotmamba_slurm.queue import ask_squeue
from slotmamba_slurm.run_jobs import RunJobs, run_jobs

POLL_SECONDS = 0.5
REPEAT_SECONDS = 2.0  # between signals, of which one that comes before the processes is lost, and between questions


@dataclass(frozen=True)
class Alive:
    """What there is to stop.

    jobs: on Slurm, that wait or run; controllers: process numbers of jobs of cluster=local; process: the number of the
    one that holds the run folder, if that is no Slurm job's.
    """

    jobs: list[Job] = field(default_factory=list)
    controllers: list[int] = field(default_factory=list)
    process: int | None = None

    def __bool__(self) -> bool:
        return bool(self.jobs or self.controllers or self.process)

    def __str__(self) -> str:
        parts = [f"job {job.id} ({job.state})" for job in self.jobs]
        parts += [f"job {number} on this machine" for number in self.controllers]
        parts += [f"process {self.process} on this machine"] if self.process and not self.controllers else []
        return ", ".join(parts)

    def in_training(self, start: Start) -> bool:
        """Whether `start`, the last one, is theirs and goes on."""
        since = [job.began for job in self.jobs if job.runs and job.began is not None]
        return start.end is None and (self.process is not None or any(began <= start.time for began in since))


def stop_run(name: str, path: Path, now: bool) -> int:
    """Stops a run and returns the exit code 0.

    Args:
        name: of the run, for what is printed.
        path: of its folder.
        now: cancel it, without a checkpoint and without waiting.

    Raises:
        InputError: it trains on another host without Slurm, or a command of Slurm's fails.
        SlotMambaError: whether there are jobs to stop is not to be found out, or the run ended without saving.
    """
    jobs = run_jobs(path)
    alive = find_alive(path, jobs)
    if not alive:
        print(f"{name}: nothing to stop, no process trains there and no job waits")
        return DONE
    starts = RunFolder(path).starts
    jobs_stop.keep_from_starting_again(jobs.recipes, [job.id for job in alive.jobs])
    if now:
        _cancel(alive)
        print(f"{name}: cancelled {alive}")
        return DONE
    print(f"{name}: stopping {alive}", flush=True)
    trained = bool(starts) and alive.in_training(starts[-1])
    _wait(path, jobs, alive)
    run = RunFolder(path)
    if not trained and len(run.starts) == len(starts):
        print(f"{name}: ended before training began{_newest(run)}")
    else:
        print(f"{name}: {_how_it_ended(run)}")
    return DONE


def find_alive(path: Path, jobs: RunJobs) -> Alive:
    """The jobs and processes of a run that wait or run.

    Raises:
        InputError, SlotMambaError: as `stop_run`.
    """
    queue = ask_squeue(jobs.slurm)
    if queue.problems:
        raise SlotMambaError(f"{'; '.join(queue.problems)}: whether a job of {path} runs is not known")
    found = [Job(each.id, each.state, each.reason, each.nodes, each.began) for each in queue.jobs.values()]
    living = [job for job in found if job.waits or job.runs]
    controllers = jobs_stop.live_controllers(path, jobs.local)
    return Alive(living, controllers, _holder(path) if run_lock.is_held(path) and not living else None)


def _holder(path: Path) -> int:
    """The number of the process that holds the run folder."""
    main = next((beat for beat in RunFolder(path).beats if beat.rank == 0), None)
    if main is not None and main.host != socket.gethostname():
        raise InputError(f"process {main.pid} on {main.host} trains in {path}: run the same command there")
    if main is None or not _has_open(main.pid, path / run_lock.NAME):
        raise SlotMambaError(f"which process trains in {path} is not known yet: try again in a moment")
    return main.pid


def _has_open(pid: int, file: Path) -> bool:
    """Whether a process has a file open; one that is gone or another user's has not, as far as can be seen."""
    try:
        return any(
            descriptor.exists() and descriptor.samefile(file) for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        )
    except OSError:
        return False


def _cancel(alive: Alive) -> None:
    jobs_stop.cancel([job.id for job in alive.jobs])
    if alive.process:  # the other ranks, and the controller, end when it is gone
        _send(alive.process, signal.SIGKILL)
    else:
        _tell_controllers(alive)


def _ask(alive: Alive) -> None:
    """Ends what waits and has what runs save; asking again changes nothing."""
    jobs_stop.cancel([job.id for job in alive.jobs if job.waits])
    jobs_stop.tell_to_save([job.id for job in alive.jobs if job.runs])
    if alive.controllers:
        _tell_controllers(alive)
    elif alive.process:
        _send(alive.process, signal.SIGTERM)


def _tell_controllers(alive: Alive) -> None:
    """They send SIGTERM on to all tasks."""
    for number in alive.controllers:
        _send(number, signal.SIGTERM)


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(process, number)


def _wait(path: Path, jobs: RunJobs, alive: Alive) -> None:
    """Asks until all has ended, and says what the run does meanwhile."""
    said = ""
    while alive:
        _ask(alive)
        asked = time.monotonic()
        while time.monotonic() - asked < REPEAT_SECONDS and (alive.jobs or run_lock.is_held(path)):
            time.sleep(POLL_SECONDS)
            doing = _doing(path)
            if doing != said:
                print(f"  {doing}", flush=True)
            said = doing
        try:
            alive = find_alive(path, jobs)
        except SlotMambaError as error:
            print(f"  {error}: asking again", flush=True)


def _doing(path: Path) -> str:
    main = next((beat for beat in RunFolder(path).beats if beat.rank == 0), None)
    return f"step {main.step}, {main.phase}" if main else "no process has begun to train"


def _how_it_ended(run: RunFolder) -> str:
    """In words; SlotMambaError if it did not save."""
    last = run.starts[-1]
    if last.end and last.end.kind == STOPPED:
        return f"stopped by {last.end.reason}{_newest(run)}; the same recipe, submitted or trained again, resumes"
    if last.end and last.end.kind == FINISHED:
        return f"finished{_newest(run)}"
    raise SlotMambaError(f"{run.path}: ended without saving: {end_of(last)}{_newest(run)}")


def _newest(run: RunFolder) -> str:
    return (
        f", the newest checkpoint is of step {run.checkpoints[-1]}" if run.checkpoints else ", there is no checkpoint"
    )
