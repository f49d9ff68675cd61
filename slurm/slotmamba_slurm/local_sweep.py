"""The cells of a sweep as jobs of this machine, some at a time."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path

from submitit import Job

from slotmamba.config import Recipe
from slotmamba.config.cells import Cell
from slotmamba_slurm.executors import LocalTasks
from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.jobs import note_job
from slotmamba_slurm.resources import local_parameters
from slotmamba_slurm.submission import job_folder
from slotmamba_slurm.submit import said, sigint_ignored

POLL_SECONDS = 0.1


def run_local(shared: Recipe, cells: list[tuple[Cell, TrainJob]], code: Path) -> bool:
    """Runs cells until all have ended, or after Ctrl-C those that had started; returns whether none failed.

    Args:
        shared: what all of them ask for; `slurm.array_parallelism` at a time, one by default.
        cells: with their jobs, in the order in which they start.
        code: what they run.
    """
    array = _LocalArray(shared, cells, code)
    while not array.is_over:
        try:
            array.start()
            time.sleep(POLL_SECONDS)
            array.collect()
        except KeyboardInterrupt:
            array.interrupt()
    return not array.failed


class _LocalArray:
    def __init__(self, shared: Recipe, cells: list[tuple[Cell, TrainJob]], code: Path) -> None:
        self._parameters = local_parameters(shared)
        self._at_a_time = shared.slurm.array_parallelism or 1
        self._code = code
        self._waiting = deque(cells)
        self._running: list[tuple[Cell, TrainJob, Job[None]]] = []
        self._count = len(cells)
        self._ended = 0
        self.failed = False

    @property
    def is_over(self) -> bool:
        return not (self._waiting or self._running)

    def start(self) -> None:
        """Starts the cells that there is room for."""
        while self._waiting and len(self._running) < self._at_a_time:
            cell, train = self._waiting.popleft()
            if train.stop_file.exists():  # `slotmamba runs stop` is for all cells
                print(f"stopped: {1 + len(self._waiting)} cells are not started", flush=True)
                self._waiting.clear()
                return
            executor = LocalTasks(job_folder(cell.recipe))
            executor.code = self._code
            executor.update_parameters(**self._parameters)
            with sigint_ignored():
                job = executor.submit(train)
                self._running.append((cell, train, job))
            note_job(train.run_dir, job.job_id, "local", train.submission)
            print(f"  {cell.name}: job {job.job_id}, output {job.paths.stdout}", flush=True)

    def collect(self) -> None:
        """Says which cells have ended, and how."""
        for cell, train, job in [each for each in self._running if each[2].done()]:
            self._running.remove((cell, train, job))
            self._ended += 1
            how = "stopped" if train.stop_file.exists() else "failed" if job.exception() else "ended"
            print(f"  {cell.name}: {how} ({self._ended} of {self._count})", flush=True)
            if how == "failed":
                self.failed = True
                for line in said(job):
                    print(line, file=sys.stderr)

    def interrupt(self) -> None:
        """Ctrl-C has told the processes already: they save and end."""
        print(f"interrupted: waiting for checkpoints, {len(self._waiting)} cells are not started", flush=True)
        self._waiting.clear()
