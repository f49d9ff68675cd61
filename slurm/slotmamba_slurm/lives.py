"""Starts under Slurm and on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from slotmamba_slurm.history import NODE_FAILURE, WITHOUT_A_WORD, Start, read_history
from slotmamba_slurm.job import TrainJob
from slotmamba_slurm.jobs import rest_of_chain
from slotmamba_slurm.life import STOPPED, Life, Stop, TrainingFailed
from slotmamba_slurm.places import Place, SlurmPlace
from slotmamba_slurm.slurm_job import SlurmError, SlurmJob, insist, nodes_down

EARLY = 60  # seconds that Slurm may send a signal before it is asked to
UNNOTICED = 1800  # seconds after which Slurm, by SlurmdTimeout, has noticed that a node is gone
ACCOUNT_SECONDS = 5.0  # that accounts are waited for
REASONS = {
    "PREEMPTED": "preempted",
    "TIMEOUT": "time limit",
    "REQUEUED": "requeued by an operator",
    "NODE_FAIL": NODE_FAILURE,
    "BOOT_FAIL": NODE_FAILURE,
    "CANCELLED": "cancelled",
    "OUT_OF_MEMORY": "out of memory",
    "DEADLINE": "deadline",
}
"""States of a start in Slurm's accounts that say why it has ended. Those that it queued again by itself are in the
first four; one that we had queued again is REQUEUED too, and has a reason of ours already."""


class SlurmLife(Life):
    def __init__(self, place: Place, job: TrainJob) -> None:
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        super().__init__(place, job, self.restart)
        self.slurm = SlurmJob(place.job_id)

    def explain(self, start: Start, until: float) -> None:
        """A node that is lost often fails the training minutes before Slurm gives the node up."""
        if _explained(start):
            return
        try:
            reason, down = _from_accounts(start, until)
        except SlurmError as error:
            print(f"why job {start.job} has ended is not known: {error}", flush=True)
            return
        if reason is not None and (reason != start.reason or down):
            self.history.explained(start, reason, down)
            print(f"job {start.job} has ended: {', '.join([reason, *down])}", flush=True)

    def stopped(self, code: int, stop: Stop) -> int:
        self.history.ended("stopped", code, None, stop.signal)  # first of all: Slurm may not answer, and then kill
        try:
            fields = insist(self.slurm.fields)
        except SlurmError as error:
            raise TrainingFailed(f"{error}: {self.hand_on()}") from None
        if fields["JobState"] != "RUNNING":
            self._ended_by_slurm(queued_again=int(fields["Restarts"]) > self.restart)
            return STOPPED
        self.history.explained(self.history.until_own()[-1], why_told_to_stop(fields, stop, self.job.signal_lead))
        # `scontrol update job=... requeue=0` has the last word.
        if self.job.may_start_again and fields["Requeue"] == "1":
            return self.queue_again()
        print(self.hand_on(), flush=True)
        return STOPPED

    def _ended_by_slurm(self, queued_again: bool) -> None:
        """Slurm has ended the start and, for a lost node, an operator or at preemption, queued the job again."""
        deadline = time.monotonic() + ACCOUNT_SECONDS
        while not _explained(own := self.history.until_own()[-1]) and time.monotonic() < deadline:
            self.explain(own, until=time.time())
            time.sleep(0.5)
        what = "is queued again by Slurm" if queued_again else "is ended by Slurm"
        print(f"job {self.place.job_id} {what}: {own.reason}", flush=True)
        if queued_again:
            self._exclude_bad_nodes(self.slurm)
        else:
            print(self.hand_on(), flush=True)

    def queue_again(self) -> int:
        try:
            queued = insist(self._requeue)
        except SlurmError as error:
            raise TrainingFailed(f"{error}: {self.hand_on()}") from None
        if not queued:
            print(f"job {self.place.job_id} is ended by Slurm: {self.hand_on()}", flush=True)
            return STOPPED
        print(f"job {self.place.job_id} is queued again", flush=True)
        self._exclude_bad_nodes(self.slurm)
        return STOPPED

    def _requeue(self) -> bool:
        """Whether it is queued again: by this call, or by one before, the answer to which was lost."""
        fields = self.slurm.fields()
        if fields["JobState"] != "RUNNING":
            return int(fields["Restarts"]) > self.restart
        self.slurm.requeue()
        return True

    def _exclude_bad_nodes(self, *jobs: SlurmJob) -> None:
        bad = self.nodes_to_exclude()
        if not bad:
            return
        try:
            for job in jobs:
                insist(partial(job.exclude, bad))
        except SlurmError as error:  # the next start sees for itself that it is on a bad node
            print(f"the job has failed twice on {', '.join(bad)}, which cannot be excluded: {error}", flush=True)
            return
        self.history.excluded(bad)
        print(f"the job has failed twice on {', '.join(bad)}: excluded from now on", flush=True)

    def hand_on(self) -> str:
        """The next job of the chain goes on, where there is one."""
        rest = rest_of_chain(self.job.run_dir, self.place.job_id)
        if not rest:
            return super().hand_on()
        self._exclude_bad_nodes(*map(SlurmJob, rest))
        return f"job {rest[0]} of the chain goes on"

    def end_chain(self) -> None:
        rest = rest_of_chain(self.job.run_dir, self.place.job_id)
        try:
            for number in rest:
                insist(SlurmJob(number).cancel_pending)
        except SlurmError as error:
            print(f"the rest of the chain is not cancelled: {error}", flush=True)
            return
        if rest:
            print(f"the rest of the chain is cancelled: {', '.join(rest)}", flush=True)


class LocalLife(Life):
    """submitit's executor for this machine starts all tasks again when one of them asks for it."""

    def __init__(self, place: Place, job: TrainJob) -> None:
        before = [start for start in read_history(job.run_dir) if start.job == place.job_id]
        super().__init__(place, job, restart=len(before))

    def explain(self, start: Start, until: float) -> None:
        """Nobody has more to say."""

    def blamed_nodes(self, code: int) -> list[str]:
        """There is but one."""
        return []

    def stopped(self, code: int, stop: Stop) -> int:
        self.history.ended("stopped", code, f"told to stop by {stop.signal}", stop.signal)
        return self.queue_again() if self.job.may_start_again else STOPPED

    def queue_again(self) -> int:
        return LOCAL_REQUEUE_RETURN_CODE

    def end_chain(self) -> None:
        """There are no chains here."""


def life_of(place: Place, job: TrainJob) -> Life:
    return SlurmLife(place, job) if isinstance(place, SlurmPlace) else LocalLife(place, job)


def _explained(start: Start) -> bool:
    """Whether Slurm has nothing to add to what is known of an earlier start."""
    if start.reason == NODE_FAILURE:
        return start.bad_nodes != ()
    return start.ended is not None and start.ended != "failed" and start.reason is not None


def _from_accounts(start: Start, until: float) -> tuple[str | None, list[str]]:
    """Why an earlier start has ended, and which of its nodes went down. Raises SlurmError."""
    reason = None if start.reason == WITHOUT_A_WORD else start.reason
    reason = reason or REASONS.get(SlurmJob(start.job).state_of_start(start.time) or "")
    lost = start.ended == "failed" or reason == NODE_FAILURE
    if start.ended_at is not None:
        until = min(until, start.ended_at + UNNOTICED)
    down = nodes_down(start.nodes, start.time, until) if lost else []
    return (NODE_FAILURE if down else reason), down


def why_told_to_stop(fields: Mapping[str, str], stop: Stop, lead: int) -> str:
    """Why Slurm has sent a signal to a job that it goes on calling RUNNING: `fields` are what it says of the job."""
    if fields.get("PreemptTime", "").isdigit():
        return "preempted"
    if fields["EndTime"].isdigit() and int(fields["EndTime"]) - stop.time <= lead + EARLY:
        return "time limit"
    return f"told to stop by {stop.signal}"
