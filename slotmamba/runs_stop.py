"""`slotmamba runs stop`: has runs save and end, wherever they run, and keeps their jobs from being queued again."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slotmamba import run_lock
from slotmamba.errors import InputError, SlotMambaError
from slotmamba.runs.folder import RunFolder
from slotmamba.runs.starts import FINISHED, STOPPED, Start
from slotmamba.runs.status import Job
from slotmamba.runs_jobs import as_job, open_run
from slotmamba_slurm import stop as jobs_stop
from slotmamba_slurm.queue import Queue, ask_squeue
from slotmamba_slurm.run_jobs import run_jobs

POLL_SECONDS = 0.5
REPEAT_SECONDS = 2.0  # between signals, of which one that comes before the processes is lost, and between questions


def stop_runs(runs: Mapping[str, Path], now: bool, sweep: bool = False) -> None:
    """Stops runs, all at once, and waits until all have ended.

    Args:
        runs: folders by the names that are printed.
        now: cancel them, without a checkpoint and without waiting.
        sweep: they are its cells: those are kept from starting too that have no job before their turn, as with
            cluster=local.

    Raises:
        InputError: one trains on another host without Slurm, a job is suspended and so cannot save, of which nothing is
            stopped then, or a command of Slurm's fails.
        SlotMambaError: whether there are jobs to stop is not to be found out, or a run ended without saving.
    """
    stoppings = [Stopping(name, path) for name, path in runs.items()]
    _look(stoppings)
    if not now:
        _refuse_suspended(stoppings)
    if sweep:
        for each in stoppings:
            jobs_stop.keep_from_starting_again(each.jobs.recipes, [])
        _look(stoppings)  # again, for those that have started before they were told not to
    stoppings = [each for each in stoppings if each.alive]
    if not stoppings:
        print("nothing to stop: no process trains there and no job waits")
        return
    for each in stoppings:
        each.begin()
        print(f"{each.name}: {'cancelling' if now else 'stopping'} {each.alive}", flush=True)
    if now:
        for each in stoppings:
            each.cancel()
    else:
        _wait(stoppings)


def _refuse_suspended(stoppings: Sequence[Stopping]) -> None:
    """Processes that Slurm has suspended hear nothing, and it does not answer those who tell it to signal them."""
    suspended = [job.id for each in stoppings for job in each.alive.jobs if job.suspended]
    if suspended:
        jobs = f"job {suspended[0]} is" if len(suspended) == 1 else f"jobs {', '.join(suspended)} are"
        raise InputError(
            f"{jobs} suspended and cannot save, so nothing was stopped: `scontrol resume {','.join(suspended)}` first, "
            "or `slotmamba runs stop --now`, which cancels without a checkpoint"
        )


def _wait(stoppings: Sequence[Stopping]) -> None:
    """Asks until all have ended, and says what they do meanwhile."""
    unsaved = []
    while living := [each for each in stoppings if each.alive]:
        for each in living:
            each.ask()
        asked = time.monotonic()
        while time.monotonic() - asked < REPEAT_SECONDS and any(each.may_live() for each in living):
            time.sleep(POLL_SECONDS)
            for each in living:
                each.say_what_it_does()
        try:
            _look(living)
        except SlotMambaError as error:
            print(f"  {error}: asking again", flush=True)
        for each in living:
            if not each.alive:
                ended, saved = each.how_it_ended()
                print(f"{each.name}: {ended}", flush=True)
                unsaved += [] if saved else [each.name]
    if unsaved:
        raise SlotMambaError(f"ended without saving: {', '.join(unsaved)}")


def _look(stoppings: Sequence[Stopping]) -> None:
    """Finds out what of each is alive, with one question to Slurm.

    Raises:
        InputError, SlotMambaError: as `stop_runs`.
    """
    queue = ask_squeue([number for each in stoppings for number in each.jobs.slurm])
    if queue.problems:
        raise SlotMambaError(f"{'; '.join(queue.problems)}: whether jobs run is not known")
    for each in stoppings:
        each.look(queue)


@dataclass(frozen=True)
class Alive:
    """What there is to stop of a run.

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

    def trains(self, start: Start) -> bool:
        """Whether `start`, the last one, is theirs and goes on."""
        since = [job.began for job in self.jobs if job.runs and job.began is not None]
        return start.end is None and (self.process is not None or any(began <= start.time for began in since))


class Stopping:
    """One run that is being stopped."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.jobs = run_jobs(path)
        self.alive = Alive()
        self._said = ""

    def look(self, queue: Queue) -> None:
        """Finds out what is alive."""
        known = [as_job(queue.jobs[number]) for number in self.jobs.slurm if number in queue.jobs]
        jobs = [job for job in known if job.waits or job.runs]
        controllers = jobs_stop.live_controllers(self.jobs.folder, self.jobs.local)
        held = not jobs and run_lock.is_held(self.path)
        self.alive = Alive(jobs, controllers, _holder(self.path) if held else None)

    def begin(self) -> None:
        """From here on nothing of the run starts again."""
        starts = open_run(self.path).starts
        self._starts = len(starts)
        self._trained = bool(starts) and self.alive.trains(starts[-1])
        jobs_stop.keep_from_starting_again(self.jobs.recipes, [job.id for job in self.alive.jobs])

    def ask(self) -> None:
        """Ends what waits and has what runs save. Those that save need no telling, and that signals were for them is
        not known any more when they have saved: it would kill them."""
        jobs_stop.cancel([job.id for job in self.alive.jobs if job.waits])
        if self._saves():
            return
        jobs_stop.tell_to_save([job.id for job in self.alive.jobs if job.runs])
        if self.alive.controllers:
            self._tell_controllers()
        elif self.alive.process:
            _send(self.alive.process, signal.SIGTERM)

    def _saves(self) -> bool:
        """Whether it does, or has."""
        run = open_run(self.path)
        ended = len(run.starts) > self._starts - self._trained and run.starts[-1].end is not None
        return ended or any(beat.rank == 0 and beat.phase == "saving" for beat in run.beats)

    def cancel(self) -> None:
        """Ends all of it, without a checkpoint."""
        jobs_stop.cancel([job.id for job in self.alive.jobs])
        if self.alive.process:  # the other ranks, and the controller, end when it is gone
            _send(self.alive.process, signal.SIGKILL)
        else:
            self._tell_controllers()

    def _tell_controllers(self) -> None:
        """They send SIGTERM on to all tasks."""
        for number in self.alive.controllers:
            _send(number, signal.SIGTERM)

    def may_live(self) -> bool:
        """False as soon as it is seen to have ended, without asking Slurm."""
        return bool(self.alive.jobs) or run_lock.is_held(self.path)

    def say_what_it_does(self) -> None:
        main = next((beat for beat in RunFolder(self.path).beats if beat.rank == 0), None)
        doing = f"step {main.step}, {main.phase}" if main else "no process has begun to train"
        if doing != self._said:
            print(f"  {self.name}: {doing}", flush=True)
        self._said = doing

    def how_it_ended(self) -> tuple[str, bool]:
        """In words, and whether all that it trained is saved."""
        run = open_run(self.path)
        newest = f"the newest checkpoint is of step {run.checkpoints[-1]}" if run.checkpoints else "no checkpoint"
        end = run.starts[-1].end if run.starts else None
        saved = end is not None and end.kind in (STOPPED, FINISHED)
        if not saved and not self._trained and len(run.starts) == self._starts:
            return f"ended before training began, {newest}", True
        if end and saved:
            resumes = "; the same recipe, submitted or trained again, resumes" if end.kind == STOPPED else ""
            return f"{end.kind}, {newest}{resumes}", True
        return f"ended without saving{f' ({end.reason})' if end else ''}, {newest}", False


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


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(process, number)
