"""The task of doctor's job, ``python -m slotmamba_slurm.probe FILE gloo [nccl]``: prints what it finds on its node."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from slotmamba_slurm.places import SlurmPlace

MARK = "slotmamba-probe "
TIMEOUT = timedelta(seconds=60)


HINT = "where nodes have several networks, {}_SOCKET_IFNAME names the one to use"


def main(file: Path, backends: list[str]) -> None:
    place = SlurmPlace()
    node = socket.gethostname().partition(".")[0]
    report: dict[str, Any] = {"node": node, "sees": _sees(file, node), "scontrol": _scontrol(place.job_id)}
    for number, backend in enumerate(backends):
        report[backend] = _all_reduce(place, backend, place.main_port + number)
    print(MARK + json.dumps(report), flush=True)


def answer_of(node: str, file: Path) -> Path:
    """What a node leaves beside the file for the other side to find."""
    return file.with_name(f"{file.name}-{node}")


def _sees(file: Path, node: str) -> bool:
    """Whether the file is there with its content."""
    try:
        answer_of(node, file).touch()
        return file.read_text() == file.name
    except OSError:
        return False


def _scontrol(job: str) -> str | None:
    """Why it does not work, or None."""
    try:
        done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return "there is no scontrol on PATH"
    except subprocess.TimeoutExpired:
        return "scontrol does not answer"
    return " ".join(done.stderr.split()) if done.returncode else None


def _all_reduce(place: SlurmPlace, backend: str, port: int) -> str | None:
    """Sums the ranks of all tasks; what goes wrong, or None."""
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        return f"{error} (Python: {sys.executable}; slurm.python names another)"
    if backend == "nccl" and not torch.cuda.is_available():
        return "PyTorch finds no GPU, though the job was given one: is it a build for CUDA, and of that of the driver?"
    size, rank = place.num_tasks, place.global_rank
    total = torch.full((1000,), float(rank), device="cuda" if backend == "nccl" else "cpu")
    try:
        where = f"tcp://{place.main_host}:{port}"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=size, timeout=TIMEOUT)
        dist.all_reduce(total)
        right = bool((total == size * (size - 1) / 2).all())
        dist.destroy_process_group()
    except (RuntimeError, OSError) as error:
        traceback.print_exc()
        return f"{' '.join(str(error).split())[:300]}; {HINT.format(backend.upper())}"
    return None if right else f"the sum is wrong: {total[0]} of {size} ranks"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
