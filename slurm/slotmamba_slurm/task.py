"""A task of a job, ``python -m slotmamba_slurm.task FOLDER``: trains. That of rank 0 decides what becomes of the job.

Training is a child process. A checkpoint is therefore always taken by the training loop between two steps, never by a
signal's handler, and a crash of the child leaves someone to say so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import FrameType

from submitit.core.utils import DelayedSubmission, cloudpickle_dump, temporary_save_path

from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.life import INTERRUPTED, Stop, TrainingFailed
from slotmamba_slurm.lives import life_of
from slotmamba_slurm.places import LocalPlace, Place, SlurmPlace, of_a_world
from slotmamba_slurm.sweep_hook import write_sweep_results
from slotmamba_slurm.timed_output import TimedLines

PICKLE_SECONDS = 60.0  # in which submitit moves the pickle to where the job's number says, once it knows the number
STOPS = (signal.SIGUSR2, signal.SIGTERM)
LIBC = ctypes.CDLL(None)  # loaded here: not between fork and exec
PR_SET_PDEATHSIG = 1


class Child:
    """A process that is sent on the signals that ask a job to stop. Whatever was asked before it starts counts too.

    It does not outlive the task, whose end nobody could tell it any more.
    """

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self._process: subprocess.Popen[bytes] | None = None
        for number in (*STOPS, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self, command: list[str], env: Mapping[str, str], last: signal.Signals) -> int:
        """The exit code of `command`; 0 where a stop came before it. Where the task is killed, it is sent `last`."""
        if self.stop is not None:
            return 0
        self._process = subprocess.Popen(command, env=env, preexec_fn=partial(_end_with, os.getpid(), last))
        if self.stop is not None:  # while it started
            self._process.send_signal(STOPS[0])
        return self._process.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # Slurm sends more than one, and to the child too, which takes the first and ignores the others. A terminal
        # sends SIGINT to both; the child would take a second one for somebody's who does not want to wait.
        self.stop = self.stop or Stop(signal.Signals(number).name, time.time())
        if number in STOPS and self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def main(folder: str) -> int:
    child = Child()  # first of all: a signal that comes before it ends the task
    os.environ["SUBMITIT_FOLDER"] = folder  # where submitit's paths are
    place = _place()
    place.paths.result_pickle.unlink(missing_ok=True)  # of a start before, if the job was queued again by hand
    try:
        job = _load(place.paths.submitted_pickle)
        if job.stop_file.exists():  # `slotmamba runs stop` came before the training processes did
            print(f"{job.stop_file} is there: nothing is trained", flush=True)
            _write_result(place.paths.result_pickle, ("success", 0))
            return 0
        print(f"{place}: rendezvous at {place.rendezvous}", flush=True)
        if place.global_rank == 0:
            return _lead(place, job, child)
        code = _train(place, job, child)
        if not _goes_on(job, child.stop):
            _finish(place, code)
    except TrainingFailed as error:
        _write_result(place.paths.result_pickle, ("error", str(error)))
        print(error, flush=True)
        if place.global_rank == 0:
            write_sweep_results(job)
        return 1
    except Exception:
        _write_result(place.paths.result_pickle, ("error", traceback.format_exc()))
        traceback.print_exc()
        return 1
    return 0


def _lead(place: Place, job: TrainJob, child: Child) -> int:
    """The task of rank 0; returns its exit code."""
    life = life_of(place, job)
    elsewhere = life.begin()
    if elsewhere is not None:
        return elsewhere
    code = _train(place, job, child)
    exit_code = life.end(code, child.stop)
    if exit_code == 0 and code == 0 and not _goes_on(job, child.stop):
        _finish(place, code)
        write_sweep_results(job)
    return exit_code


def _train(place: Place, job: TrainJob, child: Child) -> int:
    # torchrun would leave the processes behind that it has started: ours looks for itself whether the task is there.
    last = signal.SIGCONT if job.torchrun else signal.SIGKILL
    own = place.variables(job)
    return child.run(
        place.command(job),
        env={name: value for name, value in os.environ.items() if not of_a_world(name)} | own,
        last=last,
    )


def _end_with(task: int, last: signal.Signals) -> None:
    """In the child: has it sent `last` when the thread that starts it, the only one of the task, ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, last)
    if os.getppid() != task:  # it has ended already
        os.kill(os.getpid(), last)


def _goes_on(job: TrainJob, stop: Stop | None) -> bool:
    """Whether it was stopped for a time only."""
    return stop is not None and stop.signal != INTERRUPTED and not job.stop_file.exists()


def _finish(place: Place, code: int) -> None:
    """Tells submitit how the job has ended."""
    if code:
        raise TrainingFailed(f"training has ended with exit code {code}")
    _write_result(place.paths.result_pickle, ("success", code))


def _place() -> Place:
    return SlurmPlace() if os.environ["SUBMITIT_EXECUTOR"] == "slurm" else LocalPlace()


def _load(pickle: Path) -> TrainJob:
    deadline = time.monotonic() + PICKLE_SECONDS
    while not pickle.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"{pickle} does not appear: is the run folder on a file system that all nodes see?")
        time.sleep(0.2)
    job = DelayedSubmission.load(pickle).function
    assert isinstance(job, TrainJob)
    return job


def _write_result(path: Path, result: tuple[str, object]) -> None:
    """On a full disk nothing is written: what the job has printed, and its exit code, say the same."""
    temporary = path.with_name(path.name + ".save_tmp")  # as submitit calls it, which refuses to go on with one
    temporary.unlink(missing_ok=True)
    try:
        with temporary_save_path(path):
            cloudpickle_dump(result, temporary)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        print(f"how the job has ended is not written: {error}", flush=True)


if __name__ == "__main__":
    with redirect_stdout(TimedLines(sys.stdout)):
        sys.exit(main(sys.argv[1]))
