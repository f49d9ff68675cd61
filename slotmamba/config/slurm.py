"""What a recipe asks of a Slurm cluster."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slotmamba.config.duration import Duration
from slotmamba.config.section import Name, Section


class SlurmConfig(Section):
    partition: str | None = Field(None, min_length=1, description="Partition; null: the cluster's default.")
    nodes: int = Field(1, ge=1, description="Nodes, over which the processes of `parallel` are spread evenly.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of each node, one for each process; 0: a job on CPUs.")
    gpu: Name | None = Field(None, description="Type of the GPUs as the cluster calls it, such as h100; null: any.")
    cpus_per_task: int = Field(1, ge=1, description="CPU cores of each process, data workers included.")
    memory_gb: int | None = Field(None, ge=1, description="Memory of each node, in GB; null: the cluster's default.")
    time: Duration | None = Field(
        None, description="Wall time of one start of the job, rounded up to minutes; null: the partition's default."
    )
    qos: str | None = Field(None, min_length=1, description="Quality of service.")
    account: str | None = Field(None, min_length=1, description="Account to charge.")
    signal_lead: Duration = Field(
        "2m", description="How long before the end of `time` the job is told to save: at least a step and a save."
    )
    requeue: bool = Field(
        True, description="Queue a job again that was preempted, ran into `time`, lost a node or failed; it resumes."
    )
    max_retries: int = Field(
        2,
        ge=0,
        description="How often in a row training that fails is tried again without a new checkpoint in between; bad "
        "input is not. Needs `requeue` or `chain`.",
    )
    chain: int = Field(
        1,
        ge=1,
        description="Jobs submitted at once, each of which goes on when the one before has ended, where a site forbids "
        "`requeue`; 1: no chain. Not for cluster=local.",
    )
    array_parallelism: int | None = Field(
        None,
        ge=1,
        description="Cells of a `sweep` that run at the same time; null: as many as there is room for, with "
        "cluster=local one.",
    )
    setup: list[str] = Field(
        [], description="Lines of shell before the processes start, such as `module load cuda`; not for cluster=local."
    )
    launcher: Literal["tasks", "torchrun"] = Field(
        "tasks",
        description="`tasks`: each process is a task of Slurm's; `torchrun`: each node has one, which runs torchrun. "
        "cluster=local has tasks only.",
    )
    python: str | None = Field(
        None,
        min_length=1,
        description="Python of the processes, such as that of a virtual environment, `/shared/venv/bin/python`; null: "
        "the one that `submit` runs under, in a container `python3`.",
    )
    container: str | None = Field(
        None, min_length=1, description="Image to run in, as `srun --container-image` of pyxis takes it; null: none."
    )
    container_mounts: list[str] = Field(
        [],
        description="What it sees beside the run folder and the working directory, such as `/data:/data:ro`.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpu and not self.gpus_per_node:
            raise ValueError(f"gpu={self.gpu} needs gpus_per_node, which is 0")
        if self.container_mounts and not self.container:
            raise ValueError("container_mounts needs container, the image")
        if self.chain > 1 and self.requeue:
            raise ValueError(f"chain={self.chain} is for jobs that are not queued again: set requeue=false")
        return self
