"""One start of a job, from what happened before it to what becomes of the job after it; by the task of rank 0."""

from __future__ import annotations

import re
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slotmamba.run_lock import is_held
from slotmamba_slurm.history import LOCKED_OUT, NODE_FAILURE, History, Start, newest_checkpoint, read_history
from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.places import Place

BAD_INPUT = 2  # the exit code of training that refuses its recipe or data, as it will the next time
BAD_TWICE = 2  # a node that a job has failed on this often is excluded
STOPPED = 0  # the exit code of a task that was stopped
INTERRUPTED = "SIGINT"  # by somebody who wants the run to end


class TrainingFailed(RuntimeError):
    """It will not be tried again; the text says why, in one line."""


@dataclass(frozen=True)
class Stop:
    """That the job was told to stop."""

    signal: str
    time: float
    """Seconds since 1970."""


class Life(ABC):
    def __init__(self, place: Place, job: TrainJob, restart: int) -> None:
        self.place = place
        self.job = job
        self.history = History(job.run_dir, place.job_id, restart)
        self._log = job.run_dir / "logs" / "rank-00000.log"
        self._logged = 0

    def begin(self) -> int | None:
        """Records this start, and why the one before has ended.

        Returns:
            None: training is to start. Otherwise the exit code of the task, which has had the job queued again, on
            other nodes.
        """
        self.history.started(self.job.submission, self.nodes, self.job.processes)
        self._explain_start_before()
        bad = [node for node in self.nodes_to_exclude() if node in self.nodes]
        if bad and self.job.may_start_again:
            self.history.ended("stopped", STOPPED, f"failed twice before on {', '.join(bad)}")
            return self.queue_again()
        self._logged = self._log.stat().st_size if self._log.exists() else 0
        return None

    def end(self, code: int, stop: Stop | None) -> int:
        """Records the end of training, with exit code `code`, and does what is to be done with the job.

        Returns:
            The exit code of the task.

        Raises:
            TrainingFailed: training has failed, and the job with it.
        """
        if stop is not None:
            # Also when it failed: ranks that were stopped while they started fail those that were not. What fails for
            # a reason of its own fails the next time without having been stopped.
            print(f"stopped by {stop.signal}, training ended with exit code {code}", flush=True)
            for_good = stop.signal == INTERRUPTED or self.job.stop_file.exists()
            exit_code = self._stopped_for_good(code, stop) if for_good else self.stopped(code, stop)
            self._explain_start_before()
            return exit_code
        self._explain_start_before()
        if code == 0:
            self.history.ended("finished", code, "finished")
            self.end_chain()
            return 0
        if code == BAD_INPUT and is_held(self.job.run_dir):  # by others: our own processes have ended
            self.history.ended("stopped", code, LOCKED_OUT)
            self.end_chain()
            raise TrainingFailed(f"{LOCKED_OUT}: job {self.place.job_id} is not queued again")
        self.history.ended("failed", code, f"training failed ({_described(code)})", bad_nodes=self.blamed_nodes(code))
        return self._failed(code)

    def _explain_start_before(self) -> None:
        """At the end once more: Slurm's accounts may not have known of a lost node yet when this start began."""
        *earlier, own = self.history.until_own()
        if earlier:
            self.explain(earlier[-1], until=own.time)

    def _stopped_for_good(self, code: int, stop: Stop) -> int:
        reason = "slotmamba runs stop" if self.job.stop_file.exists() else f"told to stop by {stop.signal}"
        self.history.ended("stopped", code, reason, stop.signal)
        self.end_chain()
        if code:
            raise TrainingFailed("interrupted")
        return STOPPED

    def _failed(self, code: int) -> int:
        said, limit = f"training failed ({_described(code)})", self.job.max_retries
        if code == BAD_INPUT:
            self.end_chain()
            raise TrainingFailed(f"{said}: bad input is not tried again")
        failures = self._failures()
        if failures > limit:
            self.end_chain()
            raise TrainingFailed(
                f"{said}, for the {_ordinal(failures)} time without a new checkpoint: not tried again "
                f"(slurm.max_retries={limit})"
            )
        if not self.job.may_start_again:
            raise TrainingFailed(f"{said}: {self.hand_on()}")
        print(f"{said}: retry {failures} of {limit}", flush=True)
        return self.queue_again()

    def _failures(self) -> int:
        """How often training has failed since the newest checkpoint and since it was submitted, lost nodes aside."""
        newest = newest_checkpoint(self.job.run_dir)
        failed = [start for start in self._starts() if start.ended == "failed" and start.reason != NODE_FAILURE]
        return sum(start.checkpoint == newest for start in failed)

    def nodes_to_exclude(self) -> list[str]:
        """Nodes that the job was lost or has failed on twice since it was submitted, and has not been kept away from:
        where that has failed, it has to do with them."""
        starts = self._starts()
        count = Counter(node for start in starts for node in start.bad_nodes)
        excluded = {node for start in starts for node in start.excluded}
        return [node for node, times in count.items() if times >= BAD_TWICE and node not in excluded]

    def _starts(self) -> list[Start]:
        return [start for start in read_history(self.job.run_dir) if start.submission == self.job.submission]

    def blamed_nodes(self, code: int) -> list[str]:
        """The node of the rank that has caused the failure of all, where there is one.

        That is the rank that rank 0's log names. Rank 0 itself has left no word if it was killed.
        """
        rank = 0 if code < 0 else self._named_rank()
        return [] if rank is None else [self.nodes[rank * len(self.nodes) // self.job.processes]]

    def _named_rank(self) -> int | None:
        if not self._log.exists():
            return None
        with self._log.open("rb") as log:
            log.seek(self._logged)
            named = re.findall(rb"^the job ends: rank (\d+)\b", log.read(), re.MULTILINE)
        return int(named[-1]) if named else None

    @property
    def nodes(self) -> Sequence[str]:
        return self.place.hostnames

    @abstractmethod
    def explain(self, start: Start, until: float) -> None:
        """Records why a start that has ended by `until` did so, where that is not known yet."""

    @abstractmethod
    def stopped(self, code: int, stop: Stop) -> int:
        """Records the end of a start that was told to stop, and does what is to be done; returns the exit code."""

    @abstractmethod
    def queue_again(self) -> int:
        """Has the job start again, not on bad nodes; returns the exit code."""

    def hand_on(self) -> str:
        """Says what becomes of a run whose job may not start again."""
        return f"job {self.place.job_id} is not queued again; submit it again to resume"

    @abstractmethod
    def end_chain(self) -> None:
        """Cancels the jobs that were to go on after this one."""


def _described(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
