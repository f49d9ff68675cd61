"""Jobs in containers: enroot's, which srun starts through the plugin pyxis."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from slotmamba.config.slurm import SlurmConfig
from slotmamba_slurm import door

PYTHON = "python3"  # of an image


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


def open_door(jobs: Path, code: Path) -> list[str]:
    """Lines of a batch script that runs outside of the container what the tasks in it cannot: Slurm's commands."""
    serve = f"PYTHONPATH={shlex.quote(str(code))} {shlex.quote(sys.executable)} -m {door.__name__}"
    return [
        f"export {door.VARIABLE}={shlex.quote(str(jobs))}/${{SLURM_JOB_ID}}_door",
        f'{serve} "${door.VARIABLE}" &',
    ]
