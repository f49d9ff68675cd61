"""What a cluster allows, for ``slotmamba doctor --slurm``: what Slurm says of itself, and a short job on its nodes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from slotmamba.config.slurm import SlurmConfig
from slotmamba.errors import one_line, suggestion
from slotmamba_slurm.trial import Finding, State, try_job

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
USABLE = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
SECONDS = 60  # that a command may take
SHORT_GRACE = 30  # seconds between being told to stop and the end, in which a large model may not be saved


class Broken(Exception):
    """There is nothing more to find out."""


def diagnose(slurm: SlurmConfig) -> Iterator[Finding]:
    """What a job that asks for `slurm` would meet.

    The job of the test has two nodes where `slurm.nodes` is 1 and the partition has them.
    """
    try:
        settings = _settings()
        yield Finding("ok", f"Slurm {settings['SLURM_VERSION']}, cluster {settings['ClusterName']} answers")
        partitions = _partitions()
        partition = _chosen(partitions, slurm.partition)
        for each in partitions.values():
            yield from _describe(each)
        yield _limit(partition)
        yield from _preemption(settings, partition)
        yield _requeue(settings)
        yield _accounting(settings)
        nodes = min(max(2, slurm.nodes), int(partition["TotalNodes"]))
        yield from try_job(slurm, partition["PartitionName"], max(1, nodes))
    except Broken as broken:
        yield Finding("problem", str(broken))


def _settings() -> dict[str, str]:
    """slurm.conf, as the controller reads it."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise Broken(
            f"not on PATH: {', '.join(missing)}: run this on a login node of the cluster, or install Slurm's client"
        )
    lines = _said("scontrol", "show", "config").splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines) if value}


def _partitions() -> dict[str, dict[str, str]]:
    """What Slurm says of each partition, by its name."""
    lines = _said("scontrol", "-o", "show", "partition").splitlines()
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    if not found:
        raise Broken("there is no partition that you may use: ask the administrators for access")
    return {each["PartitionName"]: each for each in found}


def _chosen(partitions: Mapping[str, dict[str, str]], name: str | None) -> dict[str, str]:
    if name is None:
        default = [each for each in partitions.values() if each["Default"] == "YES"]
        if not default:
            raise Broken(f"there is no default partition: set slurm.partition to one of {', '.join(partitions)}")
        return default[0]
    if name not in partitions:
        near = suggestion(name, partitions) or f"; there are {', '.join(partitions)}"
        raise Broken(f"there is no partition {name}{near}")
    return partitions[name]


def _describe(partition: Mapping[str, str]) -> Iterator[Finding]:
    """Nodes and what they have, by kind of node."""
    name = partition["PartitionName"]
    which = f"partition {name}{' (the default)' if partition['Default'] == 'YES' else ''}"
    if partition["State"] != "UP":
        yield Finding("note", f"{which} is {partition['State']}: jobs in it do not start")
        return
    rows = _said("sinfo", "-h", "-e", "-p", name, "-o", "%T|%D|%c|%m|%G").splitlines()
    kinds: dict[tuple[str, str, str], dict[bool, int]] = {}
    for state, count, *kind in (row.split("|") for row in rows):
        usable = state.rstrip("~#%$@^!-+") in USABLE  # a star, for one that does not answer, stays
        counts = kinds.setdefault((kind[0], kind[1], kind[2]), {True: 0, False: 0})
        counts[usable] += int(count)
    if not any(counts[True] for counts in kinds.values()):
        yield Finding("note", f"{which} has no node that is up: `sinfo -R` says why")
        return
    for (cpus, memory, gres), counts in kinds.items():
        node = f"{cpus} CPUs, {int(memory.rstrip('+')) / 1024:.0f} GiB, {_gpus(gres)}"
        yield Finding("ok", f"{which}: {counts[True]} of {sum(counts.values())} nodes up, each with {node}")


def _gpus(gres: str) -> str:
    found = re.search(r"gpu:(?:([^:,()]+):)?(\d+)", gres)
    if not found:
        return "no GPUs"
    kind = f"slurm.gpu={found[1]} " if found[1] else ""
    return f"{found[2]} GPUs ({kind}slurm.gpus_per_node={found[2]})"


def _limit(partition: Mapping[str, str]) -> Finding:
    name, longest, default = (partition[key] for key in ("PartitionName", "MaxTime", "DefaultTime"))
    if longest == "UNLIMITED":
        without = "no limit" if default == "NONE" else default
        return Finding("ok", f"time in {name}: as long as slurm.time says, without it {without}")
    without = longest if default == "NONE" else default
    text = (
        f"time in {name}: at most {longest} a start, without slurm.time {without}; longer runs go on in the next start"
    )
    return Finding("ok", text)


def _preemption(settings: Mapping[str, str], partition: Mapping[str, str]) -> Iterator[Finding]:
    name, mode = partition["PartitionName"], partition["PreemptMode"]
    wait, grace = _seconds(settings["KillWait"]), _seconds(partition["GraceTime"])
    if settings["PreemptType"] == "preempt/none" or mode == "OFF":
        yield Finding("ok", f"preemption in {name}: none")
    elif "REQUEUE" in mode:
        yield Finding("ok", f"preemption in {name}: the job is told to stop, queued again and resumes")
    elif "CANCEL" in mode:
        yield Finding("note", f"preemption in {name}: the job is told to stop and cancelled; submit it again to resume")
    else:
        yield Finding("note", f"preemption in {name} is {mode}: the job stays on its nodes and waits")
    state: State = "ok" if grace + wait >= SHORT_GRACE else "note"
    preempted = f" (preempted: {grace + wait} s)" if grace else ""
    yield Finding(
        state,
        f"KillWait: {wait} s from SIGTERM to SIGKILL{preempted}; a step and a save that take longer need a smaller "
        "train.checkpoint.every",
    )


def _requeue(settings: Mapping[str, str]) -> Finding:
    if settings["JobRequeue"] == "1":
        return Finding("ok", "JobRequeue: jobs may be queued again")
    return Finding("note", "JobRequeue=0: jobs are not queued again unless they ask for it, which slurm.requeue does")


def _accounting(settings: Mapping[str, str]) -> Finding:
    if not settings["AccountingStorageType"].endswith("slurmdbd"):
        return Finding("note", "no accounting: Slurm forgets soon why a job has ended; ask for slurmdbd")
    done = _run("sacct", "-n", "-X")
    if done.returncode:
        return Finding("note", f"accounting does not answer: {one_line(done.stderr)}")
    return Finding("ok", "accounting answers (sacct)")


def _seconds(text: str) -> int:
    """Of ``30 sec`` and ``30``."""
    return int(text.split()[0])


def _said(*command: str) -> str:
    done = _run(*command)
    if done.returncode:
        raise Broken(f"{' '.join(command)}: {one_line(done.stderr)}: does the controller run, is SLURM_CONF right?")
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Broken(f"{' '.join(command)}: no answer in {SECONDS} s") from None
