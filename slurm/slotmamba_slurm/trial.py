"""A short job on the nodes of a cluster, for ``slotmamba doctor --slurm``: what it finds there, whether they meet."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slotmamba.config.slurm import SlurmConfig
from slotmamba.errors import one_line
from slotmamba_slurm.containers import container_options
from slotmamba_slurm.probe import MARK, answer_of
from slotmamba_slurm.resources import task_python

QUEUE_SECONDS = 120  # that the job waits for free nodes
SECONDS = 300  # that it takes with that
BUSY = "Requested nodes are busy"  # srun's words

State = Literal["ok", "note", "problem"]


class Finding(NamedTuple):
    """One line. A problem keeps jobs from working; a note is what a user should know of the site."""

    state: State
    text: str


def try_job(slurm: SlurmConfig, partition: str, nodes: int) -> Iterator[Finding]:
    """Runs `slotmamba_slurm.probe` once on each of `nodes` nodes, as a job that asks for `slurm` would."""
    file = Path.cwd() / f".slotmamba-doctor-{uuid.uuid4().hex[:8]}"
    file.write_text(file.name)
    try:
        done = _srun(slurm, partition, nodes, file)
        reports = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
        reports.sort(key=lambda report: report["node"])
        # By name: what a network file system knows of a folder may be half a minute old.
        answers = [report["node"] for report in reports if answer_of(report["node"], file).exists()]
    except subprocess.TimeoutExpired:
        yield Finding("problem", f"a job on {nodes} nodes of {partition} has not ended in {SECONDS} s: cancelled")
        return
    finally:
        for path in file.parent.glob(f"{file.name}*"):
            path.unlink()
    if len(reports) < nodes:
        said = _last_words(done)
        if BUSY in said:
            yield Finding("note", f"{nodes} nodes of {partition} were not free within {QUEUE_SECONDS} s: not tried")
            return
        yield Finding("problem", f"a job on {nodes} nodes of {partition} does not run: {said}")
    if reports:
        yield from _findings(reports, answers, file.parent, slurm)


def _srun(slurm: SlurmConfig, partition: str, nodes: int, file: Path) -> subprocess.CompletedProcess[str]:
    options = {
        "job-name": "slotmamba-doctor",
        "partition": partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": f"{slurm.gpu}:1" if slurm.gpu else 1 if slurm.gpus_per_node else None,
        "time": -(-SECONDS // 60),
        "immediate": QUEUE_SECONDS,
        "export": "ALL",
    }
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    given += container_options(slurm, file.parent)
    probe = [*shlex.split(task_python(slurm)), "-m", "slotmamba_slurm.probe", str(file), *_backends(slurm)]
    process = subprocess.Popen(
        ["bash", "-c", "\n".join([*slurm.setup, f"exec {shlex.join(['srun', *given, *probe])}"])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()  # srun cancels its job then
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _backends(slurm: SlurmConfig) -> list[str]:
    return ["gloo", "nccl"] if slurm.gpus_per_node else ["gloo"]


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    said = one_line(" ".join(done.stderr.splitlines()[-3:]).replace("srun: ", "").replace("error: ", ""))
    return said or f"srun ended with exit code {done.returncode}"


def _findings(reports: list[dict[str, Any]], answers: list[str], folder: Path, slurm: SlurmConfig) -> Iterator[Finding]:
    """What the tasks of all nodes have reported, one line for each question."""
    nodes = [report["node"] for report in reports]
    yield Finding("ok", f"a job runs on {len(nodes)} node{'s' if len(nodes) > 1 else ''}: {', '.join(nodes)}")
    yield _verdict(
        [report["node"] for report in reports if not report["sees"] or report["node"] not in answers],
        f"no access to {folder}: put run_dir on a file system that all nodes share",
        f"all nodes read and write {folder}, as those of a run folder here would",
    )
    if slurm.container is None:
        why = next((report["scontrol"] for report in reports if report["scontrol"]), None)
        yield _verdict(
            [report["node"] for report in reports if report["scontrol"]],
            f"{why}: a job there cannot be queued again; without it set slurm.requeue=false",
            "all nodes have scontrol: a job that saved can be queued again",
        )
    for name in _backends(slurm):
        wrong = [report for report in reports if report[name]]
        yield _verdict(
            [f"{name} on {report['node']}" for report in wrong[:1]],
            wrong[0][name] if wrong else "",
            f"{name}: an all-reduce over {len(reports)} processes is right",
        )
    if not slurm.gpus_per_node:
        yield Finding("note", "nccl was not tried: slurm.gpus_per_node=1 asks for GPUs")


def _verdict(where: list[str], problem: str, good: str) -> Finding:
    return Finding("problem", f"{', '.join(where)}: {problem}") if where else Finding("ok", good)
