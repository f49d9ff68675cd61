"""What a job asks for: nodes, processes, time, from the recipe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from slotmamba.config import Recipe
from slotmamba.config.duration import seconds
from slotmamba.config.schema import ParallelConfig
from slotmamba.config.slurm import SlurmConfig
from slotmamba.errors import InputError
from slotmamba_slurm.containers import PYTHON, container_options, open_door
from slotmamba_slurm.submission import job_folder

SPECIAL = {"%": "%", "\\": "a backslash", "\n": "a line break"}  # in the paths that Slurm and submitit are told


def processes_per_node(parallel: ParallelConfig, slurm: SlurmConfig) -> int:
    """Processes on each node of a job.

    Raises:
        InputError: they do not spread evenly over the nodes, or are not as many as the GPUs.
    """
    size, nodes, gpus = parallel.size, slurm.nodes, slurm.gpus_per_node
    have = f"parallel.replicate * parallel.shard = {size}"
    if gpus and size != nodes * gpus:
        raise InputError(
            f"slurm.nodes * slurm.gpus_per_node = {nodes} * {gpus} = {nodes * gpus} GPUs, but {have} processes: "
            f"set {_asking_for(nodes * gpus)}, or other nodes"
        )
    if size % nodes:
        raise InputError(
            f"slurm.nodes={nodes}: {have} processes do not spread evenly over them: set {_asking_for(nodes)}, "
            "a multiple of that, or other nodes"
        )
    return size // nodes


def slurm_parameters(recipe: Recipe, code: Path) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor.

    Args:
        recipe: what is to run.
        code: the folder of the packages that it runs.

    Raises:
        InputError: as `processes_per_node` and `check_path`, or the job would be told to save before it starts.
    """
    check_path(recipe)
    slurm = recipe.slurm
    minutes = None if slurm.time is None else -(-seconds(slurm.time) // 60)
    if minutes is not None and seconds(slurm.signal_lead) >= minutes * 60:
        raise InputError(f"slurm.signal_lead={slurm.signal_lead} is not less than slurm.time={slurm.time}")
    on_each = processes_per_node(recipe.parallel, slurm)
    tasks = on_each if slurm.launcher == "tasks" else 1
    cpus = slurm.cpus_per_task * on_each // tasks
    parameters = {
        "job_name": recipe.name,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "account": slurm.account,
        "time": minutes,
        "nodes": slurm.nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": f"{slurm.gpu}:{slurm.gpus_per_node}" if slurm.gpu else slurm.gpus_per_node or None,
        "cpus_per_task": cpus,
        "mem": None if slurm.memory_gb is None else f"{slurm.memory_gb}G",
        "signal_delay_s": seconds(slurm.signal_lead),
        "wckey": None,
        "stderr_to_stdout": True,
        # Sites set SBATCH_EXPORT=NONE: without PATH nothing would be found.
        "additional_parameters": {"requeue" if slurm.requeue else "no-requeue": True, "export": "ALL"},
        "setup": [*(open_door(job_folder(recipe), code) if slurm.container else []), *slurm.setup],
        # srun does not take over the first from the job; the second, against a site's KillOnBadExit, leaves the task
        # of rank 0 the time to have the job queued again when the others have failed.
        "srun_args": [
            f"--cpus-per-task={cpus}",
            "--kill-on-bad-exit=0",
            "--export=ALL",
            *container_options(slurm, recipe.run_path),
        ],
    }
    # Of these submitit has defaults of its own: five minutes, and a key that a cluster may not know.
    unset = ("time", "wckey")
    return {name: value for name, value in parameters.items() if value is not None or name in unset}


def check_path(recipe: Recipe) -> None:
    """
    Raises:
        InputError: the job's output would go to another folder than that of the run.
    """
    folder = str(job_folder(recipe))
    for character, words in SPECIAL.items():
        if character in folder:
            key, value = ("name", recipe.name) if recipe.run_dir == Path() else ("run_dir", str(recipe.run_dir))
            raise InputError(
                f"{key}={value!r}: jobs write to {folder!r}, and {words} in a path has a meaning for Slurm: "
                "set a run_dir without"
            )


def task_python(slurm: SlurmConfig) -> str:
    """The Python of the tasks of a Slurm job, for a shell."""
    return shlex.quote(slurm.python or (PYTHON if slurm.container else sys.executable))


def local_parameters(recipe: Recipe) -> dict[str, Any]:
    """The same for its LocalExecutor, which has this machine only.

    Raises:
        InputError: as `processes_per_node` and `check_path`, or the recipe asks for several nodes.
    """
    check_path(recipe)
    slurm = recipe.slurm
    if slurm.nodes > 1:
        raise InputError(f"slurm.nodes={slurm.nodes}: cluster=local is this machine alone: set slurm.nodes=1")
    limit = {} if slurm.time is None else {"timeout_min": seconds(slurm.time) / 60}
    return {
        "nodes": 1,
        "tasks_per_node": processes_per_node(recipe.parallel, slurm),
        "gpus_per_node": slurm.gpus_per_node,
        "timeout_min": 60 * 24 * 365,
        "signal_delay_s": seconds(slurm.signal_lead),
        "stderr_to_stdout": True,
        **limit,
    }


def _asking_for(processes: int) -> str:
    return f"parallel.engine=fsdp2 parallel.shard={processes}"
