"""Jobs in containers: enroot's, which srun starts through the plugin pyxis."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from slotmamba.config.slurm import SlurmConfig
from slotmamba_slurm.places import REQUEUE_FILE

PYTHON = "python3"  # of an image


class BatchRequeue(NamedTuple):
    """Lines of a batch script before and after its srun."""

    before: list[str]
    after: list[str]


def container_options(slurm: SlurmConfig, run_path: Path) -> list[str]:
    """Options of srun; none without a container.

    The run folder and the working directory, from which relative paths are found, are where they are outside.
    """
    if slurm.container is None:
        return []
    here = Path.cwd()
    folders = dict.fromkeys([str(here), str(run_path.absolute())])
    mounts = [*(f"{folder}:{folder}" for folder in folders), *slurm.container_mounts]
    return [
        f"--container-image={slurm.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
    ]


def batch_requeue(jobs: Path) -> BatchRequeue:
    """Has the batch script, which runs outside the container, queue the job again when a task asks for it with a file:
    Slurm's commands are not in images. A job that Slurm is about to queue again itself is not RUNNING any more."""
    return BatchRequeue(
        before=[
            f'export {REQUEUE_FILE}="{jobs}/${{SLURM_JOB_ID}}_requeue"',
            f'rm -f "${REQUEUE_FILE}"',
        ],
        after=[
            "code=$?",
            f'if [ -e "${REQUEUE_FILE}" ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
        ],
    )
