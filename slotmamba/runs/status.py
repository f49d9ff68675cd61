"""What state a run is in, how far it is, and how long it will take."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from slotmamba.runs.folder import RunFolder
from slotmamba.runs.starts import FAILED, FINISHED, STOPPED, End, Start
from slotmamba.runs.words import folded

QUEUED, RUNNING, CANCELLED, DEAD, SUBMITTED, NEW = "queued", "running", "cancelled", "dead", "submitted", "new"
STATES = (RUNNING, QUEUED, SUBMITTED, STOPPED, FINISHED, FAILED, CANCELLED, DEAD, NEW)
UNDER_WAY = (RUNNING, QUEUED)
WITHOUT_A_WORD = "ended without a word (killed? out of memory?)"
LAST_BYTES = 1 << 18  # of metrics.jsonl, for a line of the list: some hundred records


@dataclass(frozen=True)
class Job:
    """What a scheduler says of the last job of a run.

    state: in Slurm's words, such as PENDING; reason: why it waits, where it does; nodes: as Slurm writes them, empty
    before it starts; began: when it started or is expected to, in seconds since 1970.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    began: float | None = None

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")

    @property
    def runs(self) -> bool:
        return self.state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")

    @property
    def suspended(self) -> bool:
        return self.state in ("SUSPENDED", "STOPPED")


@dataclass(frozen=True)
class Status:
    """A line of `slotmamba runs`.

    name: the path below the folder that was listed; why: of the state, or of the last restart; step, total: optimizer
    steps; loss: nats per token; eta: seconds to the last step; seen: seconds since 1970 of the last sign of life;
    nodes: hosts, as Slurm writes them; broken: lines of metrics.jsonl that are no records.
    """

    name: str
    path: str
    state: str
    why: str
    step: int
    total: int | None
    loss: float | None
    tokens_per_second: float | None
    eta: float | None
    seen: float | None
    nodes: str
    restarts: int
    job: str | None
    broken: int


def status(name: str, folder: RunFolder, job: Job | None) -> Status:
    """The state of a run; `job`: the one that is under way, else the last, where a scheduler knows one.

    Raises:
        OSError: a file of the run cannot be read.
    """
    state, why = _state(folder, job)
    train = folder.records("train")
    last: dict[str, Any] = train[-1] if train else {}
    step, total = _step(folder, last), _total(folder)
    restarts = max(0, len(folder.starts) - 1)
    if state == QUEUED and folder.starts:
        why = ", ".join([*([why] if why else []), f"again after: {end_of(folder.starts[-1])}"])
    elif not why and restarts:
        why = f"restarted after: {end_of(folder.starts[-2])}"
    seen = [*(beat.time for beat in folder.beats), *([last["time"]] if "time" in last else [])]
    return Status(
        name=name,
        path=str(folder.path),
        state=state,
        why=why,
        step=step,
        total=total,
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
        eta=_eta(folder, train, step, total) if state == RUNNING else None,
        seen=max(seen, default=None),
        nodes=(job.nodes if job else "") or folded(beat.host for beat in folder.beats),
        restarts=restarts,
        job=job.id if job else None,
        broken=folder.metrics[1],
    )


def end_of(start: Start) -> str:
    """How a start that is over has ended, in words."""
    return start.end.reason if start.end else WITHOUT_A_WORD


def _state(folder: RunFolder, job: Job | None) -> tuple[str, str]:
    """The state, and why it is that."""
    last = folder.starts[-1] if folder.starts else None
    if job and job.waits:
        return QUEUED, job.reason
    if (job and job.runs) or folder.locked:
        return RUNNING, ""
    if last and last.end and job and job.state.startswith("CANCELLED"):  # the next one of a chain, say: nothing is lost
        return _ended(last.end)
    if job and job.state != "COMPLETED" and (last is None or (job.began or 0.0) > last.time):
        return _ended_by_slurm(job, "before training began")
    if last is None:
        return (SUBMITTED, "no job of it is known any more") if folder.submitted else (NEW, "")
    if last.end:
        return _ended(last.end)
    if _alive_elsewhere(folder, time.time()):
        return RUNNING, ""
    if job and job.state != "COMPLETED":
        return _ended_by_slurm(job, "without a checkpoint at the end")
    return DEAD, WITHOUT_A_WORD


def _ended(end: End) -> tuple[str, str]:
    return end.kind, "" if end.kind == FINISHED else end.reason


def _ended_by_slurm(job: Job, when: str) -> tuple[str, str]:
    state = CANCELLED if job.state.startswith("CANCELLED") else FAILED
    return state, f"job {job.id} {job.state} {when}"


def _alive_elsewhere(folder: RunFolder, now: float) -> bool:
    """Whether the last beats are young, and of another host, whose locks may not be known here."""
    here = socket.gethostname()
    return any(beat.host != here and now - beat.time < folder.silence_allowed() for beat in folder.beats)


def _step(folder: RunFolder, record: dict[str, Any]) -> int:
    """Steps done: while the model is built, which the beats call step 0, those of the record and the checkpoints."""
    now = max((beat.step for beat in folder.beats if beat.rank == 0), default=0)
    return now or max([record.get("step", 0), *folder.checkpoints])


def _total(folder: RunFolder) -> int | None:
    if folder.starts and folder.starts[-1].total is not None:
        return folder.starts[-1].total
    return folder.train.total_steps if folder.train else None


def _eta(folder: RunFolder, train: list[dict[str, Any]], step: int, total: int | None) -> float | None:
    """From the steps of this start, with the validations and checkpoints between them; at first from the speed."""
    if total is None or not train:
        return None
    began = folder.starts[-1].time if folder.starts else 0.0
    own = [record for record in train if record.get("time", 0.0) > began]
    if len(own) > 1 and own[-1]["time"] > own[0]["time"] and own[-1]["step"] > own[0]["step"]:
        per_step = (own[-1]["time"] - own[0]["time"]) / (own[-1]["step"] - own[0]["step"])
    elif folder.train and train[-1].get("tokens_per_second"):
        per_step = folder.train.global_batch_tokens / train[-1]["tokens_per_second"]
    else:
        return None
    return float(max(0, total - step) * per_step)
